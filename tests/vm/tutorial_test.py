#!/usr/bin/env python3
"""The command blocks of README and tutorial, word by word, with the tiny guest in the place of the Debian one that they make.

VMCP_TUTORIAL_GUEST: a folder that examples/debian-guest/build.sh made. Then the guest is that one, and what the tutorial lets people type on its console is typed;
tests/with-kvm is where that can run:

    VMCP_TUTORIAL_GUEST=$PWD/build/debian-guest tests/with-kvm --mem 6144 --timeout 1800 python3 tests/vm/tutorial_test.py tutorial readme
"""

import os
import re
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, "..", "..")
sys.path.insert(0, os.path.join(HERE, "..", "lib"))
import vmcp_test  # noqa: E402
from debian_guest import GUEST_WORDS  # noqa: E402
from guest_console import GuestConsole  # noqa: E402
from vmcp_test import check, check_equal  # noqa: E402

# What makes the guest, for this test: a kernel that boots on any KVM, and an image.
MAKE_GUEST = """#!/bin/sh -e
mkdir -p "$1"; cp {tiny} "$1/vmlinuz"; : >"$1/initrd.img"; head -c 4096 /dev/zero >"$1/initrd.img"
qemu-img create -q -f qcow2 "$1/root.qcow2" 64M
printf '[vm]\\nname = debian\\nmemory = 128M\\nkernel = vmlinuz\\n[disk root]\\npath = root.qcow2\\n' >"$1/guest.cfg"
"""


MAKE_DEBIAN = """#!/bin/sh -e
mkdir -p "$1"; cp {guest}/vmlinuz {guest}/initrd.img {guest}/root.qcow2 {guest}/guest.cfg "$1"
"""
REAL = os.environ.get("VMCP_TUTORIAL_GUEST")
# With a real guest: the words that its kernel needs in a software machine; what is typed on the console of web, which is the shell's answer when it comes.
CONSOLE = """
vmcp() {{
    command vmcp "$@"
    case "$1 ${{2:-}}" in "config init") sed -i 's|^cmdline = .*|&{words}|' "$3" ;; esac
}}
at_console() {{ python3 {this} --type "$1"; }}
"""
CONSOLE_S = 400
CRASH = "rm -rf /usr /etc; echo c > /proc/sysrq-trigger"  # word by word what the tutorial says
# Behind the blocks that have these words.
TYPED = {
    "vmcp run --dry-run guest/web.cfg": "at_console true",
    'before the agent"\nvmcp log\n': f"at_console '{CRASH}'",
    "vmcp show good": "at_console 'ls -d /etc/passwd /usr/share >/dev/null'",
    "vmcp diff good web": "at_console 'dmesg | tail -n 3'",
    "vmcp log --svg": "at_console true",
}


def blocks(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return re.findall(r"^```sh\n(.*?)^```$", file.read(), re.M | re.S)


def run_blocks(env, texts, extra=""):
    """All in one bash, which stops at the first command that fails; returns what it printed."""
    env.store = env.path("store")
    os.makedirs(env.path("examples/debian-guest"), exist_ok=True)
    script = env.write("examples/debian-guest/build.sh", MAKE_DEBIAN.format(guest=REAL) if REAL else MAKE_GUEST.format(tiny=env.tiny))
    os.chmod(script, 0o755)
    if REAL:
        extra += CONSOLE.format(this=os.path.abspath(__file__), words=GUEST_WORDS)
        texts = [text + "".join(f"{typed}\n" for words, typed in TYPED.items() if words in text) for text in texts]
    path = os.path.dirname(env.vmcp_bin) + ":" + os.environ["PATH"]
    done = subprocess.run(["bash", "-exuo", "pipefail", "-c", extra + "\n".join(texts)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=1700 if REAL else 300, cwd=env.dir, env=dict(os.environ, PATH=path, HOME=env.dir, VMCP_STORE=env.store), check=False)
    text = done.stdout.decode("utf-8", "replace")
    check(done.returncode == 0, f"exit {done.returncode}:\n{text}")
    return text


def type_at_console(command):
    """As the script's own helper: one command on the console of web; returns its status."""
    with GuestConsole.spawn(["vmcp", "console", "web"]) as guest:
        guest.sync(CONSOLE_S)
        if command == CRASH:
            guest.send(command + "\n")
            guest.wait_for("Kernel panic", CONSOLE_S)
            return 0
        status, output = guest.run(command, CONSOLE_S)
        print(output)
        return status


def test_tutorial(env):
    texts = blocks("docs/tutorial.md")
    check(len(texts) > 10, f"only {len(texts)} blocks in the tutorial")
    with open(os.path.join(ROOT, "docs", "tutorial.md"), encoding="utf-8") as file:
        check(f"    {CRASH}\n" in file.read(), "the tutorial damages its guest in another way by now")
    text = run_blocks(env, texts)
    for words in ("web is back at", "in-place", "tag: good", "tried.vmcp", "disk root  "):
        check(words in text, f"'{words}' is not in what the tutorial prints:\n{text}")
    with open(env.path("tree.svg"), encoding="utf-8") as file:
        check("try1 (running)" in file.read(), "the picture does not say where try1 stands")
    check_equal([vm["state"] for vm in env.vmcp_json("ps")["vms"]], ["stopped", "stopped"], "states at the end")


def test_readme(env):
    texts = blocks("README.md")
    check(len(texts) >= 1, "no blocks in the README")
    text = run_blocks(env, texts)
    check("is back at" in text, text)


def test_python_example(env):
    """The client of docs/control.md in 20 lines does what it says."""
    script = os.path.join(ROOT, "examples", "client", "checkpoint.py")
    with open(script, encoding="utf-8") as file:
        check(len(file.readlines()) <= 20, "more than 20 lines")
    guest = env.start_tiny(memory="64M", cmdline="set=16M rate=1000 report=0")
    guest.epoch(1)
    done = subprocess.run([sys.executable, script, env.store, "tiny"], capture_output=True, timeout=60, check=False)
    check(done.returncode == 0, f"{done.stdout.decode()}{done.stderr.decode()}")
    taken = re.search(r"taken: (\w{32}) ", done.stdout.decode()).group(1)
    check("back after" in done.stdout.decode(), done.stdout.decode())
    check_equal(env.vmcp_json("show", taken)["message"], "by a script", "message")
    guest.check()
    failed = subprocess.run([sys.executable, script, env.store, "nosuch"], capture_output=True, timeout=60, check=False)
    check(failed.returncode != 0, "a VM that is not there is no error")


def test_c_example(env):
    """libvmcp from an installed tree: pkg-config, the example, events, errors."""
    build = os.path.dirname(os.path.dirname(env.vmcp_bin))
    prefix = env.path("prefix")
    subprocess.run(["cmake", "--install", build, "--prefix", prefix], check=True, stdout=subprocess.DEVNULL)
    pkgconfig = os.path.join(prefix, "lib", "pkgconfig")
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "vmcp"], env=dict(os.environ, PKG_CONFIG_PATH=pkgconfig), capture_output=True, check=True)
    source = os.path.join(ROOT, "examples", "client", "try.c")
    subprocess.run(["cc", "-Wall", "-Wextra", "-Werror", "-o", env.path("try"), source, *flags.stdout.decode().split()], check=True)
    symbols = subprocess.run(["nm", "-D", "--defined-only", os.path.join(prefix, "lib", "libvmcp.so.0")], capture_output=True, check=True).stdout.decode()
    names = re.findall(r" T (\w+)", symbols)
    check(names and all(name.startswith("vmcp_") for name in names), f"symbols: {names}")

    def attempt(*words):
        return subprocess.run([env.path("try"), *words], capture_output=True, timeout=60, check=False,
                              env=dict(os.environ, VMCP_STORE=env.store, LD_LIBRARY_PATH=os.path.join(prefix, "lib")))

    guest = env.start_tiny(memory="64M", cmdline="set=16M rate=1000 report=0")
    guest.epoch(5)
    epoch = guest.sum()["epoch"]
    good = attempt("tiny", "true")
    check(good.returncode == 0 and re.search(rb"try: \S+ checkpoint \w{32}", good.stdout), f"{good.stdout}{good.stderr}")
    bad = attempt("tiny", "sh", "-c", "exit 3")
    check(bad.returncode == 3 and b"back in" in bad.stdout and b" reverted " in bad.stdout, f"{bad.stdout}{bad.stderr}")
    check_equal(guest.sum()["epoch"], epoch, "epoch")
    guest.check()
    nobody = attempt("nosuch", "true")
    check(nobody.returncode == 125 and b"try: VM nosuch: " in nobody.stderr and b"hint: " in nobody.stderr, f"{nobody.stderr}")
    shutil.rmtree(prefix)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--type"]:
        sys.exit(type_at_console(sys.argv[2]))
    vmcp_test.main(__name__)
