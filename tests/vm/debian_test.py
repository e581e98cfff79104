#!/usr/bin/env python3
"""A stock Debian guest on a KVM that can run one: run by tests/with-kvm. VMCP_GUEST names the folder that examples/debian-guest/build.sh made."""

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import vmcp_test  # noqa: E402
from guest_console import READY, GuestConsole  # noqa: E402
from vmcp_test import check, check_equal  # noqa: E402

BOOT_S = 180
NESTED = os.environ.get("VMCP_WITH_KVM") == "nested"
# QEMU's emulated SVM does not intercept XSETBV, so its KVM does not know which state the guest's kernel switched on (QEMU as the inner VMM sees the
# same): there the guest keeps to FXSAVE.
GUEST_WORDS = " norandmaps noxsave" if NESTED else ""
ROUNDS = int(os.environ.get("VMCP_TEST_DEBIAN_ROUNDS", "20"))
# What a guest's kernel says when it was treated badly, for grep -E. "clocksource: Switched" and the like are no complaints.
COMPLAINTS = ("lockup|stall|hung_task|blocked for more|I/O error|EXT4-fs error|time jumped|Clocksource .* unstable|clock skew|BUG:|WARNING:|Oops|"
              "Call Trace|NMI watchdog: (BUG|Watchdog)|ACPI (Error|Warning|BIOS)|virtio.*error")


def config(env, cpus=1, memory="384M", name="debian", extra=""):
    guest = os.environ["VMCP_GUEST"]
    disk = env.path("root.qcow2")
    if not os.path.exists(disk):
        shutil.copyfile(os.path.join(guest, "root.qcow2"), disk)
    return env.write(f"{name}.cfg", f"""[vm]
name = {name}
memory = {memory}
cpus = {cpus}
kernel = {guest}/vmlinuz
initrd = {guest}/initrd.img
cmdline = console=ttyS0 root=/dev/vda rootfstype=ext4 rw quiet loglevel=5{GUEST_WORDS}
rng = yes
{extra}
[disk root]
path = {disk}
""")


def spread(env):
    """Lets all but the vCPUs run on any processor: in the software machine a test begins on one alone (tests/with-kvm), which the vCPUs need."""
    for vm in env.vmcp_json("ps")["vms"]:
        for task in os.listdir(f"/proc/{vm['pid']}/task") if vm["pid"] else ():
            with open(f"/proc/{vm['pid']}/task/{task}/comm", encoding="ascii") as comm:
                if not comm.read().startswith("vcpu"):
                    os.sched_setaffinity(int(task), range(os.cpu_count()))


def boot(env, **kwargs):
    console = GuestConsole.spawn([env.vmcp_bin, "--store", env.store, "run", config(env, **kwargs)], log=env.path("console.log"),
                                 stderr=open(env.path("stderr.log"), "ab"))
    env.consoles.append(console)
    console.wait_for(READY, BOOT_S)
    console.sync(60)
    spread(env)
    return console


def attach(env, name="debian"):
    console = GuestConsole.spawn([env.vmcp_bin, "--store", env.store, "console", name], log=env.path("console.log"))
    env.consoles.append(console)
    console.sync(60)
    spread(env)
    return console


def said(console, command):
    """What a command prints, without what the kernel says on the console in between."""
    return re.sub(r"\[ *\d+\.\d{6}\] [^\n]*\n", "", console.check(command)).strip()


def check_log(console, what):
    # Filtered in the guest: each byte on the console is an exit, which costs a nested machine most of a millisecond.
    lines, *bad = console.check(f"dmesg | wc -l; dmesg | grep -i -E '{COMPLAINTS}' | head -n 20").splitlines()
    check(int(lines) > 100, f"{what}: the guest's kernel log has only {lines} lines")
    check(not bad, f"{what}: the guest's kernel complains:\n" + "\n".join(bad))


def fsck(env, checkpoint, what):
    """The disk as of a checkpoint: clean after the journal is replayed. On a flat copy. Where the test itself keeps to one processor (tests/with-kvm),
    this goes to another."""
    shown = env.vmcp_json("show", checkpoint)
    disk = shown["disks"][0]
    layer = os.path.join(env.store, "layers", f"{disk['layer']}.{disk['format']}")
    raw = env.path(f"fsck-{checkpoint}.raw")
    elsewhere = ["taskset", "-c", "0"] if NESTED else []
    subprocess.run([*elsewhere, "qemu-img", "convert", "-U", "-O", "raw", layer, raw], check=True)
    subprocess.run([*elsewhere, "e2fsck", "-p", "-E", "journal_only", raw], capture_output=True, check=False)
    done = subprocess.run([*elsewhere, "e2fsck", "-f", "-n", raw], capture_output=True, check=False)
    os.unlink(raw)
    check_equal(done.returncode, 0, f"{what}: e2fsck: {done.stdout.decode()}{done.stderr.decode()}")


def test_boot_smp(env):
    """1, 2 and 4 vCPUs; every device is found; the power button and poweroff work."""
    for cpus in (1, 2, 4):
        console = boot(env, cpus=cpus, name=f"smp{cpus}")
        check_equal(said(console, "nproc"), str(cpus), "nproc")
        check_equal(console.check("cat /sys/devices/system/clocksource/clocksource0/current_clocksource").strip() in ("kvm-clock", "tsc"), True, "clocksource")
        check("virtio_rng" in console.check("cat /sys/class/misc/hw_random/rng_current"), "no virtio rng")
        check_log(console, f"{cpus} vCPUs")
        if cpus == 2:
            result = env.vmcp_json("stop", f"smp{cpus}", "--timeout", "60", timeout=90)
            check_equal(result["how"], "powered off", "how it stopped")
        else:
            console.send_line("sync; poweroff -f")
        check_equal(console.wait_exit(60), 0, "exit status")


def test_checkpoint_damage_revert(env):
    """The main job: a live checkpoint while files are written, damage, a crash, back; files, processes and memory are there."""
    console = boot(env)
    console.check("mkdir -p /data /dev/shm/mem && for i in $(seq 50); do head -c 20000 /dev/urandom > /data/$i; done; "
                  "head -c 3000000 /dev/urandom > /dev/shm/mem/secret; sync", 120)
    sums = said(console, "sha256sum /data/* /dev/shm/mem/secret | sha256sum")
    console.check("(i=0; while :; do i=$((i+1)); echo $i >> /var/log/counter; done) & echo $! > /run/pid; sleep 1")
    taken = env.vmcp_json("checkpoint", "--live", "--tag", "good", timeout=120)
    uptime = float(console.check("cat /proc/uptime").split()[0])
    console.check("rm -rf /data /dev/shm/mem /usr/sbin /etc/passwd; sync")
    console.send_line("kill $(cat /run/pid); echo c > /proc/sysrq-trigger")
    console.wait_for(re.compile(rb"Kernel panic|sysrq: Trigger a crash"), 60)
    env.vmcp_json("revert", "good", timeout=120)
    console.sync(60)
    check_equal(said(console, "sha256sum /data/* /dev/shm/mem/secret | sha256sum"), sums, "content after the revert")
    last = "tail -n 2 /var/log/counter | head -n 1"  # the line written last may still be in the making
    first = int(console.check(last))
    check(int(console.check("sleep 1; " + last)) > first, "the process does not go on")
    check_equal(console.run("kill -0 $(cat /run/pid)")[0], 0, "the process is gone")
    after = float(console.check("cat /proc/uptime").split()[0])
    check(abs(after - uptime) < 60, f"the guest's clock jumped: {uptime} -> {after}")
    check_log(console, "after the revert in place")
    fsck(env, taken["id"], "checkpoint")
    # The same once more with the VM's process gone.
    env.vmcp("kill", "debian")
    back = env.vmcp_json("revert", "good", timeout=120)
    check_equal(back["mode"], "started", "mode")
    console = attach(env)
    check_equal(said(console, "sha256sum /data/* /dev/shm/mem/secret | sha256sum"), sums, "content after the start")
    check_log(console, "after the start from a checkpoint")
    env.vmcp("kill", "debian")


def test_balloon(env):
    """The stock driver reports free pages and follows the balloon's size; what comes back after a revert is what was there."""
    console = boot(env, extra="balloon = yes")
    check("virtio_balloon" in console.check("ls -l /sys/bus/virtio/devices/*/driver"), "the guest has no driver for the balloon")

    def stats():
        return env.vmcp_json("stats", "debian")

    def wait_for(what, condition):
        deadline = time.monotonic() + 120
        while not condition(stats()):
            check(time.monotonic() < deadline, f"not within 120 s: {what}: {stats()}")
            time.sleep(0.5)

    # All of memory is used once, and then free.
    console.check("head -c 150M /dev/zero | tr '\\0' x > /dev/shm/used", 180)
    used = stats()["memory_allocated_bytes"]
    console.check("rm /dev/shm/used")
    wait_for(f"free pages given back of {used} bytes", lambda s: s["memory_allocated_bytes"] < used - (100 << 20))
    check(stats()["reported_bytes"] > 100 << 20, f"too few pages were reported: {stats()}")
    env.vmcp("balloon", "debian", "256M")
    wait_for("the balloon's size", lambda s: s["balloon_bytes"] == 128 << 20 and s["balloon_pending_bytes"] == 0)
    console.check("head -c 10M /dev/urandom > /dev/shm/secret")
    secret = said(console, "sha256sum /dev/shm/secret")
    env.vmcp_json("checkpoint", "--live", "--tag", "small", timeout=120)
    env.vmcp("balloon", "debian", "384M")
    wait_for("the balloon's end", lambda s: s["balloon_bytes"] == 0)
    console.check("rm /dev/shm/secret; head -c 150M /dev/zero | tr '\\0' y > /dev/shm/used", 180)
    env.vmcp_json("checkpoint", "--live", "debian", timeout=120)
    env.vmcp_json("revert", "small", timeout=120)
    console.sync(60)
    check_equal(stats()["balloon_bytes"], 128 << 20, "the balloon after the revert")
    check_equal(said(console, "sha256sum /dev/shm/secret"), secret, "content after the revert")
    env.vmcp("balloon", "debian", "384M")
    wait_for("the balloon's end after the revert", lambda s: s["balloon_bytes"] == 0)
    console.check("head -c 150M /dev/zero | tr '\\0' x > /dev/shm/used; rm /dev/shm/used", 180)
    check_equal(said(console, "sha256sum /dev/shm/secret"), secret, "content at the end")
    check_log(console, "with a balloon")
    env.vmcp("kill", "debian")


def test_stress_smp(env):
    """2 vCPUs under stress-ng survive rounds of live checkpoint and revert; the disk as of every checkpoint is clean."""
    console = boot(env, cpus=2, memory="256M")
    console.check("cd /var/tmp && (stress-ng --cpu 1 --vm 1 --vm-bytes 32M --hdd 1 --hdd-bytes 16M --switch 1 --timer 1 --quiet --timeout 0 & echo $! > /run/stress); sleep 3", 60)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        checks = []
        for number in range(ROUNDS):
            started = time.monotonic()
            taken = env.vmcp_json("checkpoint", "--live", "debian", timeout=180)
            time.sleep(0.3)
            env.vmcp_json("revert", taken["id"], timeout=120)
            checks.append(pool.submit(fsck, env, taken["id"], f"round {number}"))
            print(f"  round {number}: {time.monotonic() - started:.1f} s, of which until durable {taken['durable_ns'] / 1e9:.1f} s; "
                  f"pause {taken['pause_ns'] / 1e6:.2f} ms, {taken['memory']['cow_faults']} faults", flush=True)
        for done in checks:
            done.result()
    console.sync(120)
    check_equal(console.run("kill -0 $(cat /run/stress)")[0], 0, "stress-ng is gone")
    console.check("kill $(cat /run/stress); wait; sync", 120)
    check_log(console, f"after {ROUNDS} rounds")
    env.vmcp("kill", "debian")


if __name__ == "__main__":
    vmcp_test.main(__name__)
