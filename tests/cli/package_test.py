#!/usr/bin/env python3
"""The Debian package: built by CPack, installed by dpkg into a throw-away copy of this system's root, looked at, and removed without a trace.

Environment: VMCP_BUILD: the build folder. Needs root and overlayfs.
"""

import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "lib"))
import vmcp_test  # noqa: E402
from vmcp_test import Skip, check, check_equal  # noqa: E402

# In a mount namespace of its own: the host's root below, all changes in memory.
INSIDE = r"""
set -eu
mount -t tmpfs none /mnt && mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
mkdir -p /mnt/root/pkg && cp "$1" /mnt/root/pkg/vmcp.deb
mount --rbind /dev /mnt/root/dev; mount -t proc proc /mnt/root/proc
rm -f /mnt/root/usr/local/bin/vmcp
echo MOUNTED
exec chroot /mnt/root sh -euxc '
cd /
dpkg -i /pkg/vmcp.deb >/dev/null
vmcp version
test "$(command -v vmcp)" = /usr/bin/vmcp
vmcp doctor >/dev/null
ls /usr/share/man/man1/vmcp.1* /usr/share/man/man1/vmcp-checkpoint.1* /usr/share/man/man5/guest.cfg.5* /usr/share/man/man5/vmcp-store.5* /usr/share/man/man7/vmcp-tutorial.7*
bash -c "source /usr/share/bash-completion/completions/vmcp; COMP_LINE=\"vmcp chec\" COMP_POINT=9 _vmcp; echo completes \${COMPREPLY[0]}" 2>/dev/null
ls /usr/share/zsh/*/_vmcp /usr/share/fish/vendor_completions.d/vmcp.fish
if command -v systemd-analyze >/dev/null; then systemd-analyze verify --man=no /usr/lib/systemd/system/vmcp@.service 2>&1; systemd-analyze verify --user --man=no /usr/lib/systemd/user/vmcp@.service 2>&1 || true; fi
ldconfig -p | grep libvmcp.so.0
PKG_CONFIG_PATH=/usr/lib/pkgconfig
export PKG_CONFIG_PATH
cc -o /try /usr/share/doc/vmcp/examples/try.c $(pkg-config --cflags --libs vmcp)
VMCP_STORE=/nosuch /try a b && exit 1 || test $? = 125
dpkg -L vmcp | sort >/pkg/files
dpkg -r vmcp >/dev/null
while read -r file; do test -d "$file" || ! test -e "$file" || { echo "left: $file"; exit 1; }; done </pkg/files
test ! -e /usr/share/doc/vmcp
echo REMOVED'
"""


def make(env):
    build = os.environ["VMCP_BUILD"]
    done = subprocess.run(["cpack", "--config", os.path.join(build, "CPackConfig.cmake"), "-B", env.path("out")], cwd=build, capture_output=True, timeout=200,
                          check=False)
    check(done.returncode == 0, f"cpack: {done.stdout.decode()}{done.stderr.decode()}")
    packages = [name for name in os.listdir(env.path("out")) if name.endswith(".deb")]
    check_equal(len(packages), 1, "packages")
    return os.path.join(env.path("out"), packages[0])


def test_package(env):
    package = make(env)
    check(re.search(r"/vmcp_[0-9.]+_\w+\.deb$", package), package)
    fields = subprocess.run(["dpkg-deb", "-f", package], capture_output=True, check=True).stdout.decode()
    for words in ("Package: vmcp", "Depends: ", "libc6", "libsqlite3-0", "libjansson4", "Description: "):
        check(words in fields, f"no '{words}' in {fields}")
    if os.geteuid() != 0:
        raise Skip("only root can install a package, in a copy of the root filesystem too")
    done = subprocess.run(["unshare", "-m", "--propagation", "private", "sh", "-c", INSIDE, "sh", package], stdin=subprocess.DEVNULL, capture_output=True,
                          timeout=200, check=False)
    text = done.stdout.decode() + done.stderr.decode()
    if b"MOUNTED" not in done.stdout:
        raise Skip(f"no overlay filesystem here: {text.strip().splitlines()[-1] if text.strip() else 'unshare failed'}")
    check(done.returncode == 0 and b"REMOVED" in done.stdout, f"exit {done.returncode}: {text}")
    check("completes checkpoint" in text, text)


if __name__ == "__main__":
    vmcp_test.main(__name__)
