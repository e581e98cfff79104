#!/usr/bin/env python3
"""Bad input and full disks: one clear error with a hint and the right exit status; store, disks and older checkpoints stay whole."""

import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import vmcp_test  # noqa: E402
from tiny_test import image_check  # noqa: E402
from vmcp_test import Skip, check, check_equal  # noqa: E402

# Every key of guest.cfg wrong in turn: a section's text, and words that the error must hold.
WRONG_KEYS = [
    ("[vm]\nnme = x\n", "nme"), ("[vm]\nname = a/b\n", "name"), ("[vm]\nmemory = 12X\n", "memory"), ("[vm]\nmemory = 900000T\n", "memory"),
    ("[vm]\nmemory = 1M\n", "memory"), ("[vm]\ncpus = 0\n", "cpus"), ("[vm]\ncpus = 65\n", "cpus"), ("[vm]\nkernel = nothere\n", "nothere"),
    ("[vm]\ninitrd = nothere\n", "nothere"), ("[vm]\ncpu_model = z80\n", "cpu_model"), ("[vm]\nmemory_backing = gold\n", "memory_backing"),
    ("[vm]\nconsole = vga\n", "console"), ("[vm]\nrng = maybe\n", "rng"), ("[vm]\nballoon = 7\n", "balloon"), ("[vm]\nvsock_cid = 2\n", "vsock_cid"),
    ("[disk a]\npath = nothere.qcow2\n", "nothere.qcow2"), ("[disk a]\nbase = nothere.qcow2\n", "nothere.qcow2"), ("[disk a]\nreadonly = yes\n", "disk a"),
    ("[disk a]\npth = x\n", "pth"), ("[disk a/b]\npath = x\n", "a/b"), ("[net n]\nmode = smoke\n", "mode"), ("[net n]\nmac = 52:54:00:12:34\n", "mac"),
    ("[net n]\nmac = 53:54:00:12:34:56\n", "mac"), ("[net n]\nforward = tcp:99999:1\n", "forward"), ("[net n]\nforward = tcp:[::1]:8080:80\n", "forward"), ("[net n]\ntap = a/b\n", "tap"),
    ("[checkpoint]\nevery = soon\n", "every"), ("[checkpoint]\nkeep = 0\n", "keep"), ("[vmm]\nname = x\n", "vmm"), ("memory = 1G\n", "memory"), ("[vm\n", "cfg"),
]


def one_error(result, *words):
    """One line `vmcp: WHAT: WHY` and one `hint: ...`, nothing on stdout."""
    lines = result.err.strip().split("\n")
    check(len(lines) == 2 and lines[0].startswith("vmcp: ") and lines[1].startswith("hint: "), f"not one error with a hint: {result}")
    check(result.out == "", f"something on stdout: {result}")
    for word in words:
        check(word in lines[0], f"'{word}' is not in the error: {result}")


def test_every_key_wrong(env):
    for text, word in WRONG_KEYS:
        body = text if text.startswith("[vm]") else f"[vm]\nkernel = {env.tiny}\n" + text
        if text.startswith("[vm]") and "kernel" not in text:
            body += f"kernel = {env.tiny}\n"
        if not text.startswith("["):
            body = text
        result = env.vmcp("run", env.write("bad.cfg", body), status=None)
        check(result.status in (2, 3), f"exit status {result.status} for {text!r}: {result}")
        one_error(result, word, "bad.cfg")


def test_files_that_are_none(env):
    one_error(env.vmcp("run", env.path("nothere.cfg"), status=3), "nothere.cfg")
    junk = env.write("junk", "no kernel at all\n" * 100)
    one_error(env.vmcp("run", env.write("a.cfg", f"[vm]\nkernel = {junk}\n"), status=2), "junk")
    # A qcow2 cut short: inside the header, inside the tables.
    good = env.image("good.qcow2", "64M")
    with open(good, "rb") as file:
        content = file.read()
    for size in (40, 70000):
        with open(env.path("cut.qcow2"), "wb") as file:
            file.write(content[:size])
        config = env.tiny_config(disks=[("data", env.path("cut.qcow2"))])
        result = env.vmcp("run", config, status=None)
        check(result.status in (1, 5), f"exit status: {result}")
        one_error(result, "cut.qcow2")
    # A chain that bites its own tail.
    a, b = env.image("a.qcow2"), env.path("b.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", a, "-F", "qcow2", b], check=True)
    subprocess.run(["qemu-img", "rebase", "-q", "-u", "-b", b, "-F", "qcow2", a], check=True)
    one_error(env.vmcp("run", env.tiny_config(disks=[("data", a)]), status=None), "qcow2")


def test_no_kvm(env):
    script = ("mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9 && mknod /dev/random c 1 8 && "
              f"exec {env.vmcp_bin} --store {env.store} run {env.tiny_config()}")
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if b"unshare" in done.stderr or b"mount" in done.stderr:
        raise Skip(f"no mount namespace to hide /dev/kvm in: {done.stderr.decode().strip()}")
    check_equal(done.returncode, 6, f"exit status: {done.stderr.decode()}")
    one_error(vmcp_test.CommandResult(["vmcp", "run"], done), "/dev/kvm")


def test_disk_in_use(env):
    disk = env.image("disk.qcow2")
    env.start_tiny(cmdline="report=0", disks=[("data", disk)])
    one_error(env.vmcp("run", env.tiny_config(name="other", disks=[("data", disk)]), status=4), "disk.qcow2")
    one_error(env.vmcp("run", env.tiny_config(name="tiny"), status=4), "tiny")
    for verb in (["check", "tiny:data"], ["export", "tiny:data", env.path("out.qcow2")]):
        refused = env.vmcp("disk", *verb, status=4)
        one_error(refused, "disk.qcow2")
        check("VM tiny runs on it" in refused.err, f"the way out: {refused}")
    one_error(env.vmcp("disk", "info", "tiny", status=3), "tiny")
    # QEMU's tools see the lock as well.
    done = subprocess.run(["qemu-img", "check", disk], capture_output=True, check=False)
    check(done.returncode != 0 and b"lock" in done.stderr, f"qemu-img takes an image in use: {done.stderr.decode()}")


def test_wrong_usage(env):
    one_error(env.vmcp("nosuch", status=2), "nosuch")
    one_error(env.vmcp("run", "--nosuch", "x", status=2), "--nosuch")
    one_error(env.vmcp("checkpoint", "--wait", "never", status=2), "never")
    one_error(env.vmcp("checkpoint", "--instant", "never", status=2), "never")
    one_error(env.vmcp("checkpoint", "--max-rate", "fast", status=2), "fast")
    env.write("empty.cfg", "")
    one_error(env.vmcp("run", env.path("empty.cfg"), status=2), "empty.cfg")
    one_error(env.vmcp("checkpoint", "--live", status=4), "VM")
    one_error(env.vmcp("checkpoint", "--live", "nosuch", status=3), "nosuch")
    one_error(env.vmcp("revert", "nosuch", status=3), "nosuch")
    one_error(env.vmcp("run", "--from", "nosuch", status=3), "nosuch")
    one_error(env.vmcp("ps", store=env.tiny, status=None), "tiny.elf")


def mounted_tmpfs(env, size):
    folder = env.path("small")
    os.mkdir(folder)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True, check=False)
    if done.returncode:
        raise Skip(f"cannot mount a small filesystem: {done.stderr.decode().strip()}")
    return folder


def test_full_disk(env):
    """The filesystem fills up during a checkpoint: it fails, the VM and what was there before stay whole."""
    folder = mounted_tmpfs(env, "160M")
    try:
        env.store = os.path.join(folder, "store")
        disk = os.path.join(folder, "disk.qcow2")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "64M"], check=True)
        guest = env.start_tiny(memory="512M", cmdline="set=32M rate=2000 disk=1 disk_blocks=512 report=0", disks=[("data", disk)])
        first = env.vmcp_json("checkpoint", "--live", "tiny")
        guest.check()
        # All memory, and what was written since the first: the guest's own writes to its disk need room as well.
        for how, left in (["--full"], 24 << 20), ([], 6 << 20):
            if not how:
                time.sleep(4)
            used = os.statvfs(folder)
            with open(os.path.join(folder, "ballast"), "wb") as file:
                file.write(b"x" * (used.f_bavail * used.f_frsize - left))
            # A slow host has time for lines of progress; --quiet leaves the error alone.
            result = env.vmcp("--quiet", "checkpoint", "--live", *how, "tiny", status=1)
            one_error(result)
            check("space" in result.err.lower(), f"the error does not name the lack of space: {result}")
            os.unlink(os.path.join(folder, "ballast"))
            guest.check()
        check_equal([one["id"] for one in env.vmcp_json("log")["checkpoints"]], [first["id"]], "checkpoints")
        second = env.vmcp_json("checkpoint", "--live", "tiny")
        for taken in (first, second):
            env.vmcp_json("revert", taken["id"])
            guest.check()
            guest.epoch(int(time.monotonic() * 1000))
        env.vmcp("kill", "tiny")
        image_check(disk)
    finally:
        for vm in env.vmcp_json("ps", status=None).get("vms", []):
            env.vmcp("kill", vm["name"], status=None)
        for console in env.consoles:
            console.close()
        subprocess.run(["umount", folder], check=False)
        env.store = env.path("store")


if __name__ == "__main__":
    vmcp_test.main(__name__)
