#!/usr/bin/env python3
"""A store on ext4, XFS and btrfs: the same operations, the same results; and what each of them makes of a full disk.

Each filesystem is made in a file and mounted through a loop device. Where that is refused, or its mkfs is missing, it is skipped, aloud."""

import hashlib
import os
import shutil
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import store_memory  # noqa: E402
import vmcp_test  # noqa: E402
from tiny_test import image_check  # noqa: E402
from vmcp_test import Skip, check, check_equal  # noqa: E402

SIZE = "400M"  # XFS takes no less than 300


class Mounted:
    """A new filesystem of that kind, with the env's store on it."""

    def __init__(self, env, kind, *options):
        self.env, self.folder = env, env.path(kind)
        make = shutil.which(f"mkfs.{kind}", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if not make:
            raise Skip(f"no mkfs.{kind}")
        image = env.path(f"{kind}.image")
        subprocess.run(["truncate", "-s", SIZE, image], check=True)
        subprocess.run([make, "-q", *options, image], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.mkdir(self.folder)
        done = subprocess.run(["mount", "-o", "loop", "-t", kind, image, self.folder], capture_output=True, check=False)
        if done.returncode:
            raise Skip(f"{kind} cannot be mounted: {done.stderr.decode().strip()}")
        env.store = os.path.join(self.folder, "store")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for vm in self.env.vmcp_json("ps", status=None).get("vms", []):
            self.env.vmcp("kill", vm["name"], status=None)
        for console in self.env.consoles:
            console.close()
        for _ in range(50):
            if subprocess.run(["umount", self.folder], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.1)
        self.env.store = self.env.path("store")

    def disk(self, name):
        path = os.path.join(self.folder, name)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "16M"], check=True)
        return path

    def free(self):
        subprocess.run(["sync", "-f", self.folder], check=True)
        now = os.statvfs(self.folder)
        return now.f_bavail * now.f_frsize


class Here:
    """Where the tests' files are, whatever that is: not to be filled."""

    def __init__(self, env):
        self.folder = env.dir
        self.disk = env.image


def memory_sum(env, one):
    memory = store_memory.Memory(env.store, one)
    total = hashlib.sha256(memory.contents()).hexdigest()
    memory.close()
    return total


def disk_sum(env, source):
    path = env.path("content.raw")
    env.vmcp("disk", "export", source, path, "--format", "raw")
    with open(path, "rb") as file:
        total = hashlib.sha256(file.read()).hexdigest()
    os.unlink(path)
    return total


def work(env, place):
    """Checkpoints, reverts, removals, merges, an export and an import, a kill, and a full disk, each one checked."""
    disk = place.disk("disk.qcow2")
    guest = env.start_tiny(memory="32M", cmdline="set=8M rate=5000 disk=1 disk_blocks=512 report=0", disks=[("data", disk)])
    ids = []
    for number in range(8):
        guest.epoch(20 + number)
        time.sleep(0.03)
        ids.append(env.vmcp_json("checkpoint", "--live", *(["--full"] if number == 4 else []), "tiny")["id"])
    kept = [ids[0], ids[4], ids[-1]]
    sums = {one: (memory_sum(env, one), disk_sum(env, f"{one}:data")) for one in kept}
    for one in (ids[2], ids[5], ids[-1]):
        env.vmcp_json("revert", one)
        guest.check()
        guest.epoch(int(time.monotonic() * 1000))
    env.vmcp("rm", *[one for one in ids if one not in kept])
    guest.check()
    os.kill(env.vmcp_json("ps")["vms"][0]["pid"], 9)
    guest.console.wait_exit(60)
    env.vmcp("gc")
    env.vmcp("verify")
    for one in kept:
        check_equal((memory_sum(env, one), disk_sum(env, f"{one}:data")), sums[one], f"content of {one}")
    image_check(disk)
    # Out and in again, beside what is there.
    env.vmcp("export", kept[1], os.path.join(place.folder, "out.vmcp"))
    env.vmcp("rm", kept[1])
    env.vmcp("import", os.path.join(place.folder, "out.vmcp"), "--name", "back")
    check_equal((memory_sum(env, kept[1]), disk_sum(env, f"{kept[1]}:data")), sums[kept[1]], "content of what was imported")
    env.vmcp("verify")
    if hasattr(place, "free"):
        fill(env, place, kept[2], disk)


def fill(env, place, one, disk):
    """Full: the checkpoint fails, and nothing else; then there is room again."""
    env.vmcp_json("run", "--from", one, "--detach")
    guest = env.attach_tiny("tiny")
    guest.check()
    with open(os.path.join(place.folder, "ballast"), "wb") as file:
        left = place.free() - (6 << 20)
        while left > 0:
            file.write(os.urandom(1 << 20))
            left -= 1 << 20
    guest.set("disk 0")
    failed = env.vmcp("--quiet", "checkpoint", "--live", "--full", "tiny", status=None)
    check(failed.status == 1 and "space" in failed.err.lower(), f"a checkpoint on a full disk: {failed}")
    os.unlink(os.path.join(place.folder, "ballast"))
    guest.check()
    guest.set("disk 1")
    last = env.vmcp_json("checkpoint", "--live", "--full", "tiny")["id"]
    env.vmcp_json("revert", last)
    guest.check()
    env.vmcp("kill", "tiny")
    env.vmcp("gc")
    env.vmcp("verify")
    image_check(disk)


def consolidate(env, reflinks):
    """Memory layers that are merged share blocks with the old ones where the filesystem can; the content is the same either way."""
    config = env.tiny_config(name="often", memory="64M", cmdline="set=16M rate=4000 mode=seq report=0")
    guest = env.spawn_tiny("run", config, "--every", "50ms", "--keep", "3")
    deadline = time.monotonic() + 60
    while True:
        stats = env.vmcp_json("stats", "often")["periodic"]
        if stats["consolidations"] >= 2:
            break
        check(time.monotonic() < deadline, f"no consolidation: {stats}")
        time.sleep(0.1)
    check_equal(stats["shared_pages"] > 0, reflinks, f"whether pages are shared: {stats}")
    guest.check()
    env.vmcp("kill", "often")
    env.vmcp("verify")
    newest = [one["id"] for one in env.vmcp_json("log", "often")["checkpoints"]][-1]
    env.vmcp_json("run", "--from", newest, "--every", "0", "--detach")
    env.attach_tiny("often").check()
    env.vmcp("kill", "often")


def test_here(env):
    work(env, Here(env))


def test_ext4(env):
    with Mounted(env, "ext4", "-F", "-m", "0") as place:
        work(env, place)
        consolidate(env, False)


def test_xfs(env):
    with Mounted(env, "xfs", "-f") as place:
        work(env, place)
        consolidate(env, True)


def test_btrfs(env):
    with Mounted(env, "btrfs", "-f") as place:
        work(env, place)
        consolidate(env, True)


if __name__ == "__main__":
    vmcp_test.main(__name__)
