#!/usr/bin/env python3
"""The demonstration of quickstart.sh: quickstart_demo.py VMCP GUEST_FOLDER, on a machine with a KVM that runs stock kernels."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "lib"))
from guest_console import READY, GuestConsole  # noqa: E402

STEP = 3


def say(text):
    global STEP
    STEP += 1
    print(f"\n== {STEP}. {text}", flush=True)


def tell(text):
    print(f"   {text}", flush=True)


def stop(text):
    print(f"\nquickstart: {text}", file=sys.stderr)
    sys.exit(1)


class Machine:
    """vmcp with a store of its own, and the guest's console."""

    def __init__(self, vmcp, folder):
        self.vmcp, self.store, self.console = vmcp, os.path.join(folder, "store"), None

    def run(self, *args):
        shown = " ".join(f"'{a}'" if " " in a else a for a in args)
        print(f"   $ vmcp {shown}", flush=True)
        done = subprocess.run([self.vmcp, "--store", self.store, "--json", *args], stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode:
            stop(f"vmcp {shown}: {done.stderr.decode()}")
        return json.loads(done.stdout)

    def attach(self, name):
        if self.console:
            self.console.close()
        self.console = GuestConsole.spawn([self.vmcp, "--store", self.store, "console", name])

    def guest(self, command, timeout=60):
        return self.console.check(command, timeout).strip()

    def count(self):
        """Where the counting process is. The line written last may still be in the making."""
        # A line of its own: the guest's kernel may have something to say at any time, on a slow host that an interrupt took long.
        said = self.guest("tail -n 2 /var/log/counter.log | head -n 1")
        line = re.search(r"^\d+\s*$", said, re.MULTILINE)
        if not line:
            stop(f"the counter says {said!r}")
        return int(line[0])


def look(machine):
    """What matters in the guest: files, memory, a process that runs."""
    return {
        "files in /srv/work": machine.guest("ls /srv/work 2>/dev/null | wc -l"),
        "their contents (sha256)": machine.guest("cat /srv/work/* 2>/dev/null | sha256sum | cut -c1-16"),
        "a file in memory (sha256)": machine.guest("sha256sum /dev/shm/only-in-memory 2>/dev/null | cut -c1-16"),
        "the counting process": machine.guest("kill -0 $(cat /run/counter.pid) 2>/dev/null && echo runs || echo dead"),
    }


def show(facts):
    for what, value in facts.items():
        tell(f"{what + ':':28} {value or 'gone'}")


def emulated_processor(config):
    """QEMU's emulated SVM does not intercept XSETBV, so the KVM on it cannot save AVX registers: the guest does without. norandmaps: boots faster there."""
    with open(config, encoding="utf-8") as file:
        text = re.sub(r"(?m)^(cmdline = .*)$", r"\1 noxsave norandmaps", file.read())
    with open(config, "w", encoding="utf-8") as file:
        file.write(text)


def demonstrate(vmcp, source, folder):
    machine = Machine(vmcp, folder)
    for name in ("vmlinuz", "initrd.img", "root.qcow2", "guest.cfg"):
        shutil.copy(os.path.join(source, name), folder)
    if os.environ.get("VMCP_WITH_KVM") == "nested":
        emulated_processor(os.path.join(folder, "guest.cfg"))

    say("A Debian guest boots: Debian's own kernel, its own initramfs, an ext4 root on qcow2")
    started = time.monotonic()
    vm = machine.run("run", "--detach", os.path.join(folder, "guest.cfg"))["vm"]
    machine.attach(vm)
    machine.console.wait_for(READY, 180)
    machine.console.sync(60)
    tell(f"it is up after {time.monotonic() - started:.0f} s: {machine.guest('uname -sr')}")

    say("It gets work to do: files, something that is only in memory, and a process that counts and writes without end")
    machine.guest("mkdir -p /srv/work && for i in $(seq 40); do head -c 30000 /dev/urandom > /srv/work/$i; done; "
                  "head -c 2000000 /dev/urandom > /dev/shm/only-in-memory; sync", 120)
    machine.guest("(i=0; while :; do i=$((i+1)); echo $i >> /var/log/counter.log; done) & echo $! > /run/counter.pid")
    good = look(machine)
    show(good)

    say("A live checkpoint is taken, while the guest writes")
    taken = machine.run("checkpoint", "--live", "--tag", "good", "-m", "before the accident")
    count = machine.count()
    tell(f"the guest stood still for {taken['pause_ns'] / 1e6:.2f} ms; all was on disk after {taken['durable_ns'] / 1e9:.1f} s; "
         f"{taken['memory']['saved_pages'] * 4 // 1024} MiB of memory saved")
    tell(f"the counting process is at {count}")

    say("The accident: files are deleted, and then the kernel crashes")
    machine.guest("rm -rf /srv/work /dev/shm/only-in-memory /usr/sbin; kill $(cat /run/counter.pid); sync")
    show(look(machine))
    machine.console.send_line("echo c > /proc/sysrq-trigger")
    machine.console.wait_for(re.compile(rb"sysrq: Trigger a crash|Kernel panic"), 60)
    tell("the guest's kernel has crashed")

    say("Back to the checkpoint, in place")
    back = machine.run("revert", "good")
    machine.console.sync(60)
    tell(f"the machine was back after {back['revert_ns'] / 1e6:.0f} ms; {back['restored_pages']} pages of memory were put back")
    now = look(machine)
    show(now)
    first = machine.count()
    time.sleep(1)
    second = machine.count()
    tell(f"and it counts on: {first}, {second}")
    if now != good or second <= first:
        stop("what came back is not what was saved")

    say("Even with the VM's process gone it comes back")
    machine.run("kill", vm)
    back = machine.run("revert", "good")
    machine.attach(vm)
    machine.console.sync(60)
    now = look(machine)
    show(now)
    if now != good or back["mode"] != "started":
        stop("what came back is not what was saved")

    say("The tree of checkpoints")
    subprocess.run([vmcp, "--store", machine.store, "log", "--graph"], check=True)
    machine.run("kill", vm)
    print("\nEverything that mattered was back: files, memory and running processes.", flush=True)


def main():
    vmcp, source = (os.path.abspath(path) for path in sys.argv[1:3])
    folder = tempfile.mkdtemp(prefix="vmcp-quickstart-", dir=os.environ.get("VMCP_TMP"))
    try:
        demonstrate(vmcp, source, folder)
    finally:
        running = subprocess.run([vmcp, "--store", os.path.join(folder, "store"), "--json", "ps"], capture_output=True, check=False)
        for vm in json.loads(running.stdout or b"{}").get("vms", []) if running.returncode == 0 else []:
            if vm["pid"]:
                subprocess.run([vmcp, "--store", os.path.join(folder, "store"), "kill", vm["name"]], capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
