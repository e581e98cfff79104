"""A libvirtd of the test's own, on a host that may have one already.

enter() puts this process and all that it starts into mount and network namespaces of their own, in which /etc/libvirt, /run, /var/lib/libvirt and so on are empty;
it needs root. Daemon() starts libvirtd there; virsh() talks to it. Nothing of the host's own libvirt is touched, or seen.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import time

from vmcp_test import Skip, check

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
FOLDERS = ("/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt")

QEMU_CONF = """user = "{user}"
group = "{user}"
dynamic_ownership = {ownership}
remember_owner = 0
security_driver = "none"
stdio_handler = "file"
namespaces = []
cgroup_controllers = []
"""
LIBVIRTD_CONF = 'auth_unix_rw = "none"\nauth_unix_ro = "none"\n'


def need(*programs):
    for program in programs:
        if not shutil.which(program):
            raise Skip(f"{program} is not installed (scripts/setup.sh test)")


def run(*argv, status=0, **more):
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **more)
    check(status is None or done.returncode == status, f"{' '.join(argv)}: exit {done.returncode}: {done.stdout}{done.stderr}")
    return done


_entered = False


def enter():
    """Once per process, for good."""
    global _entered
    if _entered:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | CLONE_NEWNET):
        raise Skip(f"no namespaces of our own: {os.strerror(ctypes.get_errno())}")
    _entered = True
    for argv in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "none", "/run"], ["mount", "-t", "sysfs", "none", "/sys"],
                 ["ip", "link", "set", "lo", "up"]):
        run(*argv)
    for folder in FOLDERS:
        if not os.path.isdir(folder):
            os.makedirs(folder)  # an empty folder is all that stays on the host
        run("mount", "-t", "tmpfs", "none", folder)
    add_user("/etc/passwd", "libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin\n")
    add_user("/etc/group", "libvirt-qemu:x:64055:\n")


def add_user(path, line):
    """libvirtd does not start without that user; Debian's libvirt-daemon-system makes it, which brings much else."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if not text.startswith("libvirt-qemu:") and "\nlibvirt-qemu:" not in text:
        with open(f"/run/{os.path.basename(path)}", "w", encoding="utf-8") as file:
            file.write(text + line)
        run("mount", "--bind", file.name, path)


class Daemon:
    """QEMU runs as root, or as libvirt-qemu, whom libvirt then gives the images."""

    def __init__(self, folder, user="root"):
        need("libvirtd", "virsh")
        enter()
        self.folder = tempfile.mkdtemp(prefix="libvirtd-", dir=folder)
        # A /dev/kvm that QEMU finds when it is asked what it can, but its user may not open, makes libvirtd ask anew before each step, for minutes.
        self.hides_kvm = user != "root" and os.path.exists("/dev/kvm")
        if self.hides_kvm:
            nothing = os.path.join(self.folder, "kvm")
            os.close(os.open(nothing, os.O_CREAT, 0o600))
            run("mount", "--bind", nothing, "/dev/kvm")
        qemu_conf = QEMU_CONF.format(user=user, ownership=int(user != "root"))
        for name, text in (("qemu.conf", qemu_conf), ("libvirtd.conf", LIBVIRTD_CONF)):
            with open(f"/etc/libvirt/{name}", "w", encoding="utf-8") as file:
                file.write(text)
        self.start()

    def start(self):
        self.log = open(os.path.join(self.folder, "log"), "ab")
        self.process = subprocess.Popen(["libvirtd", "-f", "/etc/libvirt/libvirtd.conf", "-p", os.path.join(self.folder, "pid"), "-t", "0"],
                                        stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 60
        while run("virsh", "-c", "qemu:///system", "version", status=None).returncode:
            check(self.process.poll() is None, f"libvirtd ended: {self.log_text()}")
            check(time.monotonic() < deadline, f"libvirtd does not answer: {self.log_text()}")
            time.sleep(0.1)

    def log_text(self):
        with open(self.log.name, encoding="utf-8", errors="replace") as file:
            return file.read()[-3000:]

    def stop(self, how=15):
        if self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(30)
        self.log.close()

    def close(self):
        """Domains and their definitions too: they outlive the daemon."""
        for name in virsh("list", "--all", "--name", status=None).split():
            virsh("destroy", name, status=None)
            virsh("undefine", name, status=None)
        self.stop()
        if self.hides_kvm:
            run("umount", "/dev/kvm")


def virsh(*args, status=0):
    return run("virsh", "-q", "-c", "qemu:///system", *map(str, args), status=status).stdout
