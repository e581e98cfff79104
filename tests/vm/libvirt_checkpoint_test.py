#!/usr/bin/env python3
"""Checkpoints of domains that QEMU runs below a real libvirtd, with the tiny guest, which boots under QEMU's TCG too, and with Debian: VMCP_GUEST names the folder that
examples/debian-guest/build.sh made."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import vmcp_test  # noqa: E402
from debian_guest import fsck, said  # noqa: E402
from guest_console import READY  # noqa: E402
from libvirt_host import Daemon, need, run, virsh  # noqa: E402
from libvirt_test import disk_xml, domain_console, domain_xml, one_error  # noqa: E402
from vmcp_test import Skip, check, check_equal  # noqa: E402

URI = "qemu:///system"
ROUNDS = int(os.environ.get("VMCP_TEST_LIBVIRT_ROUNDS", "3"))
BUSY = "set=16M rate=2000 disk=2 disk_blocks=1024 qd=8 report=0"  # half of the blocks are on each of two disks


class Domain:
    """A domain `web` with two disks, running, its guest at work on both."""

    def __init__(self, env, user="root"):
        self.env = env
        self.images = self.make_images()
        self.daemon = Daemon(env.dir, user)
        virsh("define", env.write("web.xml", self.xml().replace("type='kvm'", "type='qemu'")))
        virsh("start", "web", "--paused")
        self.attach()
        virsh("resume", "web")
        self.ready()

    def make_images(self):
        return [self.env.image("first.qcow2", "32M"), self.env.image("second.qcow2", "32M")]

    def xml(self, cmdline=BUSY, memory=64):
        seed = self.env.image("seed.qcow2", "1M")
        return domain_xml(self.env, "web", disk_xml(self.images[0]) + disk_xml(self.images[1], "vdb") + disk_xml(seed, "vdc").replace("<target", "<readonly/><target"),
                          "<controller type='usb' model='none'/>", cmdline, memory)

    def ready(self):
        self.guest.ready()

    def attach(self):
        self.guest = domain_console(self.env, "web")

    def check(self):
        return self.guest.check(timeout=180)

    def disks(self, *more):
        tree = ElementTree.fromstring(virsh("dumpxml", "web", *more))
        return [disk.find("source").get("file") for disk in tree.findall("devices/disk") if disk.find("readonly") is None]

    def backing(self, path):
        return run("qemu-img", "info", "-U", "--backing-chain", path).stdout

    @staticmethod
    def pid():
        with open("/run/libvirt/qemu/web.pid", encoding="utf-8") as file:
            return int(file.read())

    def consistent(self):
        """libvirt's view, live and for the next start, is the files that QEMU has open."""
        live = self.disks()
        check_equal(self.disks("--inactive"), live, "disks of the next start")
        pid = self.pid()
        opened = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        for path in live:
            check(path in opened, f"QEMU does not have {path} open: {opened}")
        listed = [line.split()[1] for line in virsh("domblklist", "web").strip().split("\n") if line.split()[0] in ("vda", "vdb")]
        check_equal(listed, live, "domblklist")
        check_equal(virsh("domstate", "web").strip(), "running", "the domain's state")
        return live

    def check_images(self):
        """Whole, with nothing leaked: QEMU writes back what it knows of them when it stops."""
        paths = self.consistent()
        virsh("suspend", "web")
        for path in paths:
            run("qemu-img", "check", "-U", path)
        virsh("resume", "web")
        return paths

    def close(self):
        self.daemon.close()


class Debian(Domain):
    """The same with a Debian, which writes to a filesystem on each of its disks all the time."""

    def make_images(self):
        return [shutil.copy(os.path.join(os.environ["VMCP_GUEST"], "root.qcow2"), self.env.path("root.qcow2")), self.env.image("data.qcow2", "256M")]

    def xml(self):
        guest = os.environ["VMCP_GUEST"]
        return super().xml("console=ttyS0 root=/dev/vda rootfstype=ext4 rw quiet loglevel=5 norandmaps", 256).replace(
            f"<kernel>{self.env.tiny}</kernel>", f"<kernel>{guest}/vmlinuz</kernel><initrd>{guest}/initrd.img</initrd>")

    def ready(self):
        self.console.wait_for(READY, 180)
        self.console.sync(60)
        self.console.check("mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt", 60)
        for folder in ("/root", "/mnt"):
            self.console.check(f"(n=0; while :; do n=$((n + 1)); head -c 300000 /dev/urandom > {folder}/busy; echo $n > {folder}/count; sync -f {folder}/count; done) &")

    def attach(self):
        super().attach()
        self.console = self.guest.console

    def check(self):
        """Its writers go on, and its kernel has nothing to say of its disks."""
        self.console.sync(120)
        counts = "sync; cat /root/count /mnt/count"
        before = [int(word) for word in said(self.console, counts).split()]
        deadline = time.monotonic() + 60
        while not all(now > then for now, then in zip([int(word) for word in said(self.console, counts).split()], before)):
            check(time.monotonic() < deadline, f"the guest does not write any more: {before}")
        check_equal(said(self.console, "dmesg | grep -E 'EXT4-fs error|I/O error|JBD2.*rror' || true"), "", "what its kernel says")


def with_domain(function, kind=Domain):
    def test(env):
        need("libvirtd", "virsh", "qemu-img", "qemu-system-x86_64")
        if kind is Debian and not os.environ.get("VMCP_GUEST"):
            raise Skip("VMCP_GUEST names no Debian guest")
        domain = kind(env)
        try:
            function(env, domain)
        finally:
            domain.close()
    test.__name__, test.__doc__ = function.__name__, function.__doc__
    return test


def with_debian(function):
    return with_domain(function, Debian)


def take(env, *more, live=True, **how):
    return env.vmcp_json("--quiet", "checkpoint", *(["--live"] if live else []), "--connect", URI, "web", *more, complete=True, **how)


@with_domain
def test_rounds(env, domain):
    """Checkpoint, damage, revert; the disks as libvirt, QEMU and the files have them; then the store's own commands."""
    taken, pauses = [], []
    for number in range(ROUNDS):
        live = number != 1  # one stands still meanwhile
        one = take(env, live=live)
        taken.append(one["id"])
        if live:
            pauses.append(one["pause_ns"])
        check_equal((one["vm"], one["live"], one["durability"], one["vmm"]), ("web", live, "durable", "qemu"), "what was taken")
        check(one["pause"]["memory_ns"] <= one["pause_ns"] <= one["durable_ns"], f"times: {one}")
        check_equal(one["parent"], taken[-2] if number else None, "parent")
        check_equal([disk["name"] for disk in one["disks"]], ["vda", "vdb"], "disks")
        domain.check()
        back = taken[-1] if number % 3 else taken[number // 2]
        result = env.vmcp_json("--quiet", "revert", "--connect", URI, back)
        check_equal((result["vm"], result["checkpoint"], result["mode"]), ("web", back, "started"), "revert")
        if back != taken[-1]:
            taken.append(back)  # where it stands now: the next one's parent
        domain.attach()
        domain.check()
        domain.guest.epoch(number + 1)
        for path in domain.check_images():
            parts = json.loads(run("qemu-img", "map", "-U", "--output=json", path).stdout)
            check(any(part["depth"] == 0 and part["data"] for part in parts), f"the guest writes nothing to {path}")
    pauses.sort()
    print(f"  pauses: median {pauses[len(pauses) // 2] / 1e6:.1f} ms, longest {pauses[-1] / 1e6:.1f} ms", flush=True)
    ids = list(dict.fromkeys(taken))
    check_equal(sorted(one["id"] for one in env.vmcp_json("log")["checkpoints"]), sorted(ids), "log")
    check_equal(env.vmcp_json("show", ids[0])["vmm"], "qemu", "show")
    check(all(one["ok"] for one in env.vmcp_json("verify", *ids)["checkpoints"]), "verify")

    one_error(env.vmcp("run", "--from", ids[0], status=4), "only QEMU")
    one_error(env.vmcp("revert", ids[0], status=4), "only QEMU")
    one_error(env.vmcp("clone", ids[0], status=4), "only QEMU")
    one_error(env.vmcp("dump", ids[0], env.path("core"), status=4), "only QEMU")
    one_error(env.vmcp("diff", ids[0], ids[1], status=4), "only QEMU")
    env.vmcp("disk", "export", f"{ids[0]}:vdb", env.path("flat.qcow2"))  # the way out that the hints name
    run("qemu-img", "check", env.path("flat.qcow2"))

    # Through a file into another store, from which the domain goes on.
    env.vmcp("--quiet", "export", ids[1], env.path("file"))
    env.vmcp("rm", ids[1])
    check(all(one["ok"] for one in env.vmcp_json("verify")["checkpoints"]), "verify after rm")
    other = env.path("other")
    env.vmcp("--quiet", "import", env.path("file"), store=other)
    virsh("destroy", "web")
    env.vmcp("--quiet", "revert", "--connect", URI, ids[1], store=other)
    domain.attach()
    domain.check()


@with_debian
def test_debian(env, domain):
    """Files on both disks and in memory are back after a wreck and a panic, while both filesystems are written to."""
    files = "/root/state /mnt/state /dev/shm/state"
    for number in range(ROUNDS):
        domain.console.check(f"for f in {files}; do head -c 500000 /dev/urandom > $f; done", 120)
        sums = said(domain.console, f"sha256sum {files}")
        taken = take(env)["id"]
        domain.console.check(f"rm -rf {files} /etc /mnt/count; sync", 120)
        domain.console.send_line("echo c > /proc/sysrq-trigger")
        domain.console.wait_for("Kernel panic", 60)
        env.vmcp_json("--quiet", "revert", "--connect", URI, taken)
        domain.attach()
        domain.check()
        check_equal(said(domain.console, f"sha256sum {files}"), sums, f"content after revert {number}")
        domain.check_images()
    fsck(env, taken, "the last checkpoint")


def refused(env, domain):
    """What is refused changes nothing."""
    before = virsh("dumpxml", "web"), sorted(os.listdir(env.dir))

    one_error(env.vmcp("checkpoint", "--live", "--connect", URI, "nosuch", status=3), "nosuch")
    for option in (["--full"], ["--instant", "now"], ["--max-rate", "1M"], ["--wait", "durable"], ["--timeout", "9"]):
        one_error(env.vmcp("checkpoint", "--live", "--connect", URI, "web", *option, status=2), option[0], "has no effect")
    one_error(env.vmcp("revert", "--connect", URI, "web", "--vm", "other", status=2), "--vm", "has no effect")
    one_error(env.vmcp("checkpoint", "--live", "--connect", URI, status=2), "domain")
    one_error(env.vmcp("checkpoint", "--live", "--connect", "test:///default", "test", status=6), "none of QEMU")
    one_error(env.vmcp("checkpoint", "--live", "--connect", URI, "web", status=1, store="/dev/shm/vmcp-other-fs"), "vda")
    subprocess.run(["rm", "-rf", "/dev/shm/vmcp-other-fs"], check=True)
    one_error(env.vmcp("revert", "--connect", URI, "nosuch", status=3), "nosuch")
    virsh("suspend", "web")
    one_error(env.vmcp("checkpoint", "--live", "--connect", URI, "web", status=4), "paused")
    virsh("resume", "web")
    check_equal((virsh("dumpxml", "web"), [name for name in sorted(os.listdir(env.dir)) if name != "store"]), before, "the domain and its files")
    domain.check()


@with_domain
def test_failures(env, domain):
    """Refused, or failed at a fault point: the domain runs on with the disks that it had."""
    refused(env, domain)
    for point, live in ((302, True), (100, False), (355, True), (355, False), (362, True), (362, False), (356, True), (357, False)):
        result = env.vmcp("--quiet", "checkpoint", *(["--live"] if live else []), "--connect", URI, "web", status=None, env={"VMCP_FAULT": f"{point}:1:eio"})
        check_equal(result.status, 1, f"{point}: {result}")
        check_equal(domain.consistent(), domain.images, f"{point}: disks")
        domain.check()
        check_equal([name for name in os.listdir(env.dir) if ".vmcp-" in name], [], f"{point}: overlays")
        check_equal(env.vmcp_json("log")["checkpoints"], [], f"{point}: checkpoints")
    first = take(env)["id"]
    # The domain is ended already: it says so, and the next try brings it back.
    result = env.vmcp("--quiet", "revert", "--connect", URI, first, status=1, env={"VMCP_FAULT": "358:1:eio"})
    check("the domain is off" in result.err, str(result))
    env.vmcp("--quiet", "revert", "--connect", URI, first)
    domain.attach()
    domain.check()
    domain.consistent()
    virsh("destroy", "web")
    one_error(env.vmcp("checkpoint", "--live", "--connect", URI, "web", status=4), "off")


def test_unprivileged(env):
    """QEMU as the user that libvirt's packages make for it: what docs/libvirt.md says must be set is enough, and is needed."""
    need("libvirtd", "virsh", "qemu-img", "qemu-system-x86_64")
    reachable(env)
    domain = Domain(env, user="libvirt-qemu")
    try:
        with open(f"/proc/{domain.pid()}/status", encoding="utf-8") as file:
            check("\nUid:\t64055\t" in file.read(), "QEMU does not run as libvirt-qemu")
        with open("/proc/sys/vm/unprivileged_userfaultfd", encoding="utf-8") as file:
            allowed = file.read().strip() == "1"
        if allowed:
            take(env)
        else:
            one_error(env.vmcp("checkpoint", "--live", "--connect", URI, "web", status=6), "ackground-snapshot")
        taken = take(env, live=False)["id"]
        domain.check()
        domain.consistent()
        # The store's folders are its user's alone: QEMU, started anew, cannot get at the layers.
        one_error(env.vmcp("--quiet", "revert", "--connect", URI, taken, status=1), "ermission denied")
        for folder in (env.store, os.path.join(env.store, "layers")):
            os.chmod(folder, 0o711)
        env.vmcp("--quiet", "revert", "--connect", URI, taken)
        domain.attach()
        domain.check()
        domain.consistent()
        print(f"  userfaultfd without privileges: {'tried' if allowed else 'not allowed on this host, and refused so'}", flush=True)
    finally:
        domain.close()


def reachable(env):
    """QEMU's user must come to the images, and to a kernel that libvirt gives to it."""
    folder = os.path.dirname(env.dir)
    while folder != "/":
        if not os.stat(folder).st_mode & 0o001:
            raise Skip(f"other users cannot pass {folder}")
        folder = os.path.dirname(folder)
    os.chmod(env.dir, 0o711)
    env.tiny = shutil.copy(env.tiny, env.path("tiny.elf"))


def start_with(env, fault):
    """A checkpoint that has come to a fault point, and sleeps there."""
    process = subprocess.Popen([env.vmcp_bin, "--store", env.store, "--quiet", "checkpoint", "--live", "--connect", URI, "web"], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, VMCP_FAULT=fault))
    process.stderr.readline()  # said as the sleep begins
    return process


@with_domain
def test_deaths(env, domain):
    """vmcp is killed, or libvirtd is, in mid-checkpoint: the domain runs on, and the next checkpoint succeeds."""
    for point in (355, 357):
        result = env.vmcp("--quiet", "checkpoint", "--live", "--connect", URI, "web", status=None, env={"VMCP_FAULT": f"{point}:1:kill"})
        check_equal(result.status, -signal.SIGKILL, f"{point}: {result}")
        if point == 355:  # in the pause: libvirt's user lets it run
            virsh("resume", "web")
        deadline = time.monotonic() + 60
        while "unlimited" not in virsh("domjobinfo", "web") and virsh("domstate", "web").strip() != "running" and time.monotonic() < deadline:
            time.sleep(0.1)
        domain.check()
        domain.consistent()
    disks = domain.disks()
    process = start_with(env, "356:1:sleep=2000")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    check(process.returncode == 1 and b"cancelled" in err, f"not cancelled: {process.returncode} {out} {err}")
    check_equal(domain.consistent(), disks, "disks after a cancel")
    domain.check()
    taken = take(env)["id"]
    process = start_with(env, "356:1:sleep=3000")
    domain.daemon.stop(signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    domain.daemon.start()
    check(process.returncode == 0, f"all that is left to do needs no libvirt: {process.returncode} {out} {err}")
    domain.check()
    # While QEMU saves: the checkpoint is none, the domain runs on, on its overlays, and whoever comes next finds it so.
    process = start_with(env, "362:1:sleep=2000")
    domain.daemon.stop(signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    check(process.returncode == 6 and err.count(b"\n") == 2 and b"daemon has ended" in err, f"not one error: {process.returncode} {out} {err}")
    domain.check()
    domain.daemon.start()
    domain.consistent()
    check_equal([one["id"] for one in env.vmcp_json("log")["checkpoints"] if one["vm"] == "web"][0], taken, "the newest checkpoint")
    between = take(env)["id"]
    # In the pause: it cannot let the guest run any more, and says how.
    process = start_with(env, "355:1:sleep=2000")
    domain.daemon.stop(signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    check(process.returncode == 6 and b"virsh resume web" in err, f"not told: {process.returncode} {out} {err}")
    domain.daemon.start()
    virsh("resume", "web")
    domain.check()
    domain.consistent()
    last = take(env)["id"]
    check(all(one["ok"] for one in env.vmcp_json("verify")["checkpoints"]), "verify")
    for one in (taken, between, last):
        env.vmcp("--quiet", "revert", "--connect", URI, one)
        domain.attach()
        domain.check()
        domain.consistent()


if __name__ == "__main__":
    vmcp_test.main(__name__)
