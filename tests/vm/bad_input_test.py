#!/usr/bin/env python3
"""Bad input and bad luck: one clear error with a hint and the right exit status; store, disks and older checkpoints stay whole."""

import os
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import vmcp_test  # noqa: E402
from tiny_test import BUSY, image_check  # noqa: E402
from vmcp_test import Skip, check, check_equal  # noqa: E402

# Every key of guest.cfg wrong in turn: a section's text, and words that the error must hold.
WRONG_KEYS = [
    ("[vm]\nnme = x\n", "nme"), ("[vm]\nname = a/b\n", "name"), ("[vm]\nmemory = 12X\n", "memory"), ("[vm]\nmemory = 900000T\n", "memory"),
    ("[vm]\nmemory = 1M\n", "memory"), ("[vm]\ncpus = 0\n", "cpus"), ("[vm]\ncpus = 65\n", "cpus"), ("[vm]\nkernel = nothere\n", "nothere"),
    ("[vm]\ninitrd = nothere\n", "nothere"), ("[vm]\ncpu_model = z80\n", "cpu_model"), ("[vm]\nmemory_backing = gold\n", "memory_backing"),
    ("[vm]\nconsole = vga\n", "console"), ("[vm]\nrng = maybe\n", "rng"), ("[vm]\nballoon = 7\n", "balloon"), ("[vm]\nvsock_cid = 2\n", "vsock_cid"),
    ("[disk a]\npath = nothere.qcow2\n", "nothere.qcow2"), ("[disk a]\nbase = nothere.qcow2\n", "nothere.qcow2"), ("[disk a]\nreadonly = yes\n", "disk a"),
    ("[disk a]\npth = x\n", "pth"), ("[disk a/b]\npath = x\n", "a/b"), ("[net n]\nmode = smoke\n", "mode"), ("[net n]\nmac = 52:54:00:12:34\n", "mac"),
    ("[net n]\nmac = 53:54:00:12:34:56\n", "mac"), ("[net n]\nforward = tcp:99999:1\n", "forward"), ("[net n]\ntap = a/b\n", "tap"),
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


def fault_points():
    """Numbers and names from base/fault_points.def."""
    import re
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "base", "fault_points.def")
    with open(path, encoding="utf-8") as file:
        return [(int(number), name) for number, name in re.findall(r"^FAULT_POINT\((\d+), (\w+),", file.read(), re.M)]


def start_with_fault(env, fault, disk):
    return env.spawn_tiny("run", env.tiny_config(memory="128M", cmdline=BUSY.replace("set=64M", "set=16M"), disks=[("data", disk)]), env={"VMCP_FAULT": fault},
                          ready=False)


def recover_and_check(env, disk, first, what):
    """After a death at any point: images are clean, the older checkpoint and, if it exists, the newer one can be gone back to."""
    image_check(disk)
    ids = [one["id"] for one in env.vmcp_json("log")["checkpoints"]]
    check(first in ids, f"{what}: the older checkpoint is gone")
    check_equal(os.listdir(os.path.join(env.store, "staging")), [], f"{what}: staging")
    for number, one in enumerate(ids):
        env.vmcp_json("revert", one)
        guest = env.attach_tiny("tiny")
        guest.check()
        guest.epoch(1000 + number)
    env.vmcp("kill", "tiny")
    image_check(disk)


def test_kill_at_fault_points(env):
    """kill -9 at every fault point that a second checkpoint or a revert passes."""
    died = 0
    for number, name in fault_points():
        sub = vmcp_test.Env(f"fault{number}")
        try:
            disk = sub.image("disk.qcow2", "16M")
            # The first checkpoint is taken by a process without faults, the second one by one with.
            guest = sub.start_tiny(memory="128M", cmdline=BUSY.replace("set=64M", "set=16M"), disks=[("data", disk)])
            first = sub.vmcp_json("checkpoint", "--live", "tiny")["id"]
            guest.check()
            sub.vmcp("kill", "tiny")
            guest.console.close()
            console = start_with_fault(sub, f"{number}:1:kill", disk).console
            deadline = time.monotonic() + 30
            while console.process.poll() is None and time.monotonic() < deadline:
                if sub.vmcp("checkpoint", "--live", "tiny", status=None).status == 0:
                    sub.vmcp("revert", "tiny", status=None)
                    time.sleep(0.1)
                    break
            time.sleep(0.05)
            if console.process.poll() == -signal.SIGKILL:
                died += 1
                print(f"  killed at {number} {name}", flush=True)
            else:
                print(f"  not passed on this way: {number} {name}", flush=True)
                sub.vmcp("kill", "tiny", status=None)
            console.close()
            recover_and_check(sub, disk, first, f"fault point {number} {name}")
        finally:
            sub.close(keep=False)
    check(died >= 15, f"only {died} fault points were passed")


def test_errors_at_fault_points(env):
    """EIO at every fault point of a checkpoint: it fails or succeeds, the VM runs on unharmed, the next one succeeds."""
    failed = 0
    for number, name in fault_points():
        # A new store passes the catalogue's making: there nothing starts, and that is right (store tests).
        if number < 100 or name == "STORE_BEFORE_UPGRADE_COMMIT":
            continue
        sub = vmcp_test.Env(f"eio{number}")
        try:
            disk = sub.image("disk.qcow2", "16M")
            guest = start_with_fault(sub, f"{number}:1:eio", disk)
            if 100 <= number < 200:
                # The guest's disk fails: what it makes of that is its affair, the image has to stay whole.
                try:
                    guest.line("(ready|error|check)", timeout=5)
                except vmcp_test.ConsoleError:
                    pass
                sub.vmcp("kill", "tiny", status=None)
                image_check(disk)
                continue
            guest.ready()
            result = sub.vmcp("checkpoint", "--live", "tiny", status=None)
            check(result.status in (0, 1, 6), f"{number} {name}: {result}")
            failed += result.status != 0
            guest.check()
            # Where userfaultfd cannot be had (any more), checkpoints of a VM that stands still are left.
            live = sub.vmcp("--json", "checkpoint", "--live", "tiny", status=None)
            if live.status == 1 and result.status == 0 and name in live.err:  # only a checkpoint with a parent passes it
                guest.check()
                live = sub.vmcp("--json", "checkpoint", "--live", "tiny", status=None)
            taken = live.json if live.status == 0 else sub.vmcp_json("checkpoint", "tiny")
            check(live.status in (0, 6), f"{number} {name}: the next live checkpoint: {live}")
            sub.vmcp("revert", taken["id"], status=None)
            sub.vmcp("kill", "tiny", status=None)
            image_check(disk)
        finally:
            sub.close(keep=False)
    check(failed >= 10, f"only {failed} fault points made a checkpoint fail")


if __name__ == "__main__":
    vmcp_test.main(__name__)
