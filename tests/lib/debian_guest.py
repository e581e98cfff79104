"""The stock Debian guest of the tests: booting it, its shell, what its kernel says. VMCP_GUEST names the folder that examples/debian-guest/build.sh made."""

import contextlib
import os
import re
import shutil
import subprocess

from guest_console import READY, GuestConsole
from vmcp_test import check, check_equal

BOOT_S = 180
NESTED = os.environ.get("VMCP_WITH_KVM") == "nested"
# QEMU's emulated SVM does not intercept XSETBV, so its KVM does not know which state the guest's kernel switched on (QEMU as the inner VMM sees the
# same): there the guest keeps to FXSAVE.
GUEST_WORDS = " norandmaps noxsave" if NESTED else ""
# What a guest's kernel says when it was treated badly, for grep -E. "clocksource: Switched" and the like are no complaints.
COMPLAINTS = ("lockup|stall|hung_task|blocked for more|I/O error|EXT4-fs error|time jumped|Clocksource .* unstable|clock skew|BUG:|WARNING:|Oops|"
              "Call Trace|NMI watchdog: (BUG|Watchdog)|ACPI (Error|Warning|BIOS)|virtio.*error")


def config(env, cpus=1, memory="384M", name="debian", extra="", root="root.qcow2", disks=()):
    """root: the file of the root disk, a copy of the pristine one where it is not there yet; disks: sections of guest.cfg after it."""
    guest = os.environ["VMCP_GUEST"]
    disk = env.path(root)
    if not os.path.exists(disk):
        shutil.copyfile(os.path.join(guest, "root.qcow2"), disk)
    more = "\n".join(disks)
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
{more}
""")


def spread(env):
    """Lets all but the vCPUs run on any processor: in the software machine a test begins on one alone (tests/with-kvm), which the vCPUs need."""
    for vm in env.vmcp_json("ps")["vms"]:
        for task in os.listdir(f"/proc/{vm['pid']}/task") if vm["pid"] else ():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
                with open(f"/proc/{vm['pid']}/task/{task}/comm", encoding="ascii") as comm:
                    if not comm.read().startswith("vcpu"):
                        os.sched_setaffinity(int(task), range(os.cpu_count()))


def boot(env, boot_s=BOOT_S, **kwargs):
    console = GuestConsole.spawn([env.vmcp_bin, "--store", env.store, "run", config(env, **kwargs)], log=env.path("console.log"),
                                 stderr=open(env.path("stderr.log"), "ab"))
    env.consoles.append(console)
    console.wait_for(READY, boot_s)
    console.sync(60)
    spread(env)
    return console


def attach(env, name="debian"):
    console = GuestConsole.spawn([env.vmcp_bin, "--store", env.store, "console", name], log=env.path("console.log"))
    env.consoles.append(console)
    console.sync(60)
    spread(env)
    return console


def said(console, command, timeout=60):
    """What a command prints, without what the kernel says on the console in between."""
    return re.sub(r"\[ *\d+\.\d{6}\] [^\n]*\n", "", console.check(command, timeout)).strip()


def check_log(console, what):
    # Filtered in the guest: each byte on the console is an exit, which costs a nested machine most of a millisecond.
    lines, *bad = console.check(f"dmesg | wc -l; dmesg | grep -i -E '{COMPLAINTS}' | head -n 20", 300).splitlines()
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
