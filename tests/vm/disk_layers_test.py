#!/usr/bin/env python3
"""Whole VMs with the tiny guest: chains of disk layers stay short, and what is merged stays right."""

import hashlib
import json
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import vmcp_test  # noqa: E402
from tiny_test import image_check  # noqa: E402
from vmcp_test import check, check_equal  # noqa: E402

WRITER = "set=4M rate=500 disk=1 disk_blocks=256 disk_rate=400 report=0"


def listed(env):
    return [one["id"] for one in env.vmcp_json("log")["checkpoints"]]


def layer_files(env):
    return sorted(name for name in os.listdir(os.path.join(env.store, "layers")) if (".qcow2" in name or ".raw" in name) and not name.endswith(".sum"))


def chain_of(env, path):
    """The files below an image, top first, by qemu-img; again where a merge came in between."""
    for _ in range(20):
        done = subprocess.run(["qemu-img", "info", "-U", "--backing-chain", "--output=json", path], capture_output=True, check=False)
        if done.returncode == 0:
            return [one["filename"] for one in json.loads(done.stdout)]
        time.sleep(0.1)
    raise vmcp_test.Failed(f"{path}: {done.stderr.decode()}")


def content(env, source):
    """A hash of all bytes of a disk."""
    file = env.path("content.raw")
    env.vmcp("disk", "export", source, file, "--format", "raw")
    total = hashlib.sha256()
    with open(file, "rb") as data:
        while chunk := data.read(1 << 20):
            total.update(chunk)
    os.unlink(file)
    return total.hexdigest()


def contents(env, checkpoints):
    return {one: content(env, f"{one}:data") for one in checkpoints}


def layer_of(env, one):
    return env.vmcp_json("show", one)["disks"][0]["layer"] + ".qcow2"


def wait_for(env, what, vm, condition, timeout=120):
    deadline = time.monotonic() + timeout
    while True:
        stats = env.vmcp_json("stats", vm)
        if condition(stats):
            return stats
        check(time.monotonic() < deadline, f"no {what}: {stats}")
        time.sleep(0.1)


KEEP = 6


def test_chain_stays_bounded_under_keep(env):
    """A disk that is written in every interval: the chain does not grow with the number of checkpoints, and each one that is left is right."""
    disk = env.image("disk.qcow2")
    config = env.tiny_config(memory="64M", cmdline=WRITER, disks=[("data", disk)], extra=f"[checkpoint]\nevery = 50ms\nkeep = {KEEP}\n")
    guest = env.spawn_tiny("run", config)
    # What merges leave is removed by the VM itself, soon.
    stats = wait_for(env, "merges", "tiny", lambda s: s["periodic"]["removed"] >= 150 and s["disk_layers"]["merges"] >= 3
                     and s["disk_layers"]["removed_layers"] >= 100, 300)
    check_equal((stats["periodic"]["failed"], stats["periodic"]["problem"], stats["disk_layers"]["problem"]), (0, None, None), "problems")
    # Those that are kept, those that wait to be removed (40 at most, and what was taken since), and what is not worth merging yet.
    wait_for(env, "removals", "tiny", lambda s: s["periodic"]["removed"] >= stats["periodic"]["removed"] + 20)
    length = len(chain_of(env, disk))
    check(length <= KEEP + 60 + 24, f"a chain of {length} images after {stats['periodic']['taken']} checkpoints")
    newest = listed(env)[-1]
    if env.vmcp("revert", newest, status=None).status == 0:  # it may have been let go meanwhile
        guest.check()
    guest.check()
    env.vmcp("kill", "tiny")
    image_check(disk)
    left = listed(env)
    before, present = contents(env, left), content(env, disk)
    # How much there is to merge depends on where the VM's own merges were when it was killed: what counts is what is left.
    result = env.vmcp_json("gc")
    check_equal(contents(env, left), before, "disks after gc")
    check_equal(content(env, disk), present, "the present disk after gc")
    # One file for each checkpoint, and below the oldest what is not worth more copying.
    files = layer_files(env)
    check(len(files) <= len(left) + 8, f"{len(files)} disk layers for {len(left)} checkpoints: {result}")
    check_equal(env.vmcp_json("gc")["disk_layers"], 0, "layers that a second gc removes")
    for one in left:
        image_check(os.path.join(env.store, "layers", layer_of(env, one)))
    for one in (left[0], left[len(left) // 2], left[-1]):
        env.vmcp_json("run", "--from", one, "--every", "0", "--detach")
        env.attach_tiny("tiny").check()
        env.vmcp("kill", "tiny")


def take(env, guest, count, vm="tiny"):
    ids = []
    for number in range(count):
        guest.epoch(100 + number)
        time.sleep(0.05)
        ids.append(env.vmcp_json("checkpoint", "--live", vm)["id"])
    return ids


def test_largest_and_empty_disks(env):
    """A disk of 8 TiB, written all over, and one of nothing: checkpointed, put back, started anew."""
    big, empty = env.image("big.qcow2", "8T"), env.image("empty.qcow2", "0")
    guest = env.start_tiny(memory="128M", cmdline="set=4M bench=1", disks=[("big", big), ("empty", empty)])

    def bench(kind, requests=64):
        done = guest.ask(f"bench {kind} 4096 8 {requests} 60000", "bench")
        check_equal([int(done[key]) for key in ("requests", "errors", "wrong")], [requests, 0, 0], kind)
    bench("write")
    ids = []
    for _ in range(2):
        ids.append(env.vmcp_json("checkpoint", "--live", "tiny")["id"])
        bench("write")
    for one in (ids[0], ids[1], ids[0]):
        env.vmcp_json("revert", one)
        bench("read")
        bench("write")
    env.vmcp("kill", "tiny")
    for file in (big, empty):
        image_check(file)
    env.vmcp("verify", ids[0])
    env.vmcp_json("run", "--from", ids[1], "--detach")
    env.attach_tiny("tiny").check()
    env.vmcp("kill", "tiny")


def test_killed_at_each_step_of_a_merge_by_gc(env):
    """gc dies at each step: every disk reads as before, and the next gc finishes the work."""
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(memory="64M", cmdline=WRITER, disks=[("data", disk)])
    ids = take(env, guest, 16)
    env.vmcp("kill", "tiny")
    kept = [ids[0], ids[5], ids[10], ids[15]]
    for one in ids:
        if one not in kept:
            # Not by `rm`, which would merge itself.
            env.vmcp("rm", one, env={"VMCP_FAULT": "320:1:eio"})
    check_equal(listed(env), kept, "checkpoints left")
    before, present = contents(env, kept), content(env, disk)
    length = len(chain_of(env, disk))
    # Three runs to be merged: the last three of those that reach a merge end one each.
    for fault in ("320:1", "118:1", "119:1", "118:1:eio", "119:1:enospc", "120:1", "321:1", "120:1:eio", "316:1", "316:2"):
        dead = env.vmcp("gc", status=None, env={"VMCP_FAULT": fault + (":kill" if fault.count(":") == 1 else "")})
        check(dead.status != 0, f"fault {fault} was not reached: {dead}")
        check_equal(contents(env, kept), before, f"disks after fault {fault}")
        check_equal(content(env, disk), present, f"the present disk after fault {fault}")
    env.vmcp("gc")
    check_equal(len(chain_of(env, disk)), length - 9, "images in the chain")
    check_equal(len(layer_files(env)), len(chain_of(env, disk)) - 1, "disk layers")
    check_equal(contents(env, kept), before, "disks in the end")
    check_equal(content(env, disk), present, "the present disk in the end")
    for one in kept:
        env.vmcp_json("run", "--from", one, "--detach")
        env.attach_tiny("tiny").check()
        env.vmcp("kill", "tiny")


def test_killed_at_each_step_of_a_merge_by_the_vm(env):
    """kill -9 of a VM that merges: what it kept is whole, and the disk goes on."""
    for number, fault in enumerate(("320:1", "118:1", "119:1", "120:1", "321:1", "121:1", "316:1")):
        sub = vmcp_test.Env(f"merge{number}")
        try:
            disk = sub.image("disk.qcow2")
            config = sub.tiny_config(memory="64M", cmdline=WRITER, disks=[("data", disk)])
            guest = sub.spawn_tiny("run", config, "--every", "50ms", "--keep", "3", env={"VMCP_FAULT": fault + ":kill"})
            guest.console.wait_exit(120)
            image_check(disk)
            left = listed(sub)
            check(len(left) >= 3, f"{fault}: checkpoints left: {left}")
            before, present = contents(sub, left), content(sub, disk)
            sub.vmcp("gc")
            check_equal((contents(sub, left), content(sub, disk)), (before, present), f"disks after fault {fault} and gc")
            check(not [name for name in layer_files(sub) if name.endswith("merge")], f"{fault}: leftovers: {layer_files(sub)}")
            for one in (left[0], left[-1]):
                sub.vmcp_json("run", "--from", one, "--every", "0", "--detach")
                sub.attach_tiny("tiny").check()
                sub.vmcp("kill", "tiny")
        finally:
            sub.close(keep=False)


def test_errors_in_a_merge_by_the_vm(env):
    """Each step fails once: the VM and its checkpoints go on, and a later merge succeeds."""
    for number, fault in enumerate(("118:1:enospc", "119:1:eio", "120:1:eio", "321:1:eio", "121:1:eio")):
        sub = vmcp_test.Env(f"mergefail{number}")
        try:
            disk = sub.image("disk.qcow2")
            config = sub.tiny_config(memory="64M", cmdline=WRITER, disks=[("data", disk)])
            guest = sub.spawn_tiny("run", config, "--every", "50ms", "--keep", "3", env={"VMCP_FAULT": fault})
            wait_for(sub, "a merge after the failure", "tiny", lambda s: s["disk_layers"]["merges"] >= 2)
            check_equal(sub.stderr_text().count("fault point " + fault.split(":")[0]), 1, "times that it was told")
            guest.check()
            newest = listed(sub)[-1]
            if sub.vmcp("revert", newest, status=None).status == 0:
                guest.check()
            sub.vmcp("kill", "tiny")
            image_check(disk)
        finally:
            sub.close(keep=False)


def test_two_vms_on_the_same_layers(env):
    """A VM merges layers on which another one runs: neither notices, and the other turns to the merged file when it is told."""
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(memory="64M", cmdline=WRITER, disks=[("data", disk)])
    ids = take(env, guest, 12)
    env.vmcp_json("run", "--from", ids[-1], "--name", "twin", "--detach")
    twin = env.attach_tiny("twin")
    ids += take(env, guest, 1)
    for one in ids[:-2]:
        env.vmcp("rm", one)
    wait_for(env, "merge", "tiny", lambda s: s["disk_layers"]["merges"] >= 1 or env.vmcp_json("stats", "twin")["disk_layers"]["merges"] >= 1)
    guest.check()
    twin.check()
    env.vmcp("gc")
    stats = {vm: wait_for(env, "turn to the merged layers", vm, lambda s: s["disk_layers"]["merges"] + s["disk_layers"]["followed"] >= 1)
             for vm in ("tiny", "twin")}
    check(any(one["disk_layers"]["followed"] for one in stats.values()), f"nobody followed: {stats}")
    for vm, one in (("tiny", guest), ("twin", twin)):
        one.check()
        last = env.vmcp_json("checkpoint", "--live", vm)["id"]
        one.epoch(7)
        time.sleep(0.1)
        env.vmcp_json("revert", last)
        one.check()
    # What nobody has open any more is gone from the disk, too.
    pid = env.vmcp_json("ps")["vms"][0]["pid"]
    held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd") if os.path.islink(f"/proc/{pid}/fd/{fd}")]
    check(not [name for name in held if "layers/" in name and ".qcow2" in name and name.endswith("(deleted)")], f"open: {held}")
    env.vmcp("kill", "tiny")
    env.vmcp("kill", "twin")
    image_check(disk)


def test_what_is_named_is_not_touched(env):
    """Merging changes no file that a checkpoint names, byte by byte, nor one that a user has put another image on."""
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(memory="64M", cmdline=WRITER, disks=[("data", disk)])
    ids = take(env, guest, 12)
    kept = [ids[0], ids[5], ids[11]]
    for one in ids:
        if one not in kept:
            env.vmcp("rm", one)
    env.vmcp("kill", "tiny")
    files = {}
    for one in kept:
        with open(os.path.join(env.store, "layers", layer_of(env, one)), "rb") as data:
            files[one] = hashlib.sha256(data.read()).hexdigest()
    result = env.vmcp_json("gc")
    check(result["merged_layers"] >= 4, f"gc: {result}")
    check_equal(env.vmcp_json("gc")["merged_layers"], 0, "layers merged by a second gc")
    for one in kept:
        with open(os.path.join(env.store, "layers", layer_of(env, one)), "rb") as data:
            check_equal(hashlib.sha256(data.read()).hexdigest(), files[one], f"layer of {one}")
    check_equal(len(chain_of(env, disk)), 1 + 3 + 2, "images in the chain")


def cancel_one(env):
    """A checkpoint that is cancelled behind its instant, while its memory is being saved; returns when that has been undone."""
    env.vmcp("checkpoint", "--live", "--full", "--wait", "captured", "--max-rate", "1M", "tiny")
    env.vmcp("cancel", "tiny")
    check_equal(env.vmcp_json("stats", "tiny")["operation"], None, "what is under way behind a cancel")


def test_cancelled_checkpoints_leave_no_layer(env):
    """A checkpoint that is cancelled, again and again, under a guest that writes: the disk stands on what it stood on before, in the same file."""
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(memory="64M", cmdline=WRITER, disks=[("data", disk)])
    first = env.vmcp_json("checkpoint", "--live", "--tag", "first", "tiny")["id"]
    length, inode = len(chain_of(env, disk)), os.stat(disk).st_ino
    for _ in range(6):
        cancel_one(env)
        guest.check()
    check_equal(listed(env), [first], "checkpoints")
    check_equal((len(chain_of(env, disk)), os.stat(disk).st_ino), (length, inode), "length of the chain, and the image")
    check_equal(len(layer_files(env)), 1, "disk layers")
    second = env.vmcp_json("checkpoint", "--live", "tiny")["id"]
    guest.epoch(5)
    time.sleep(0.2)
    for one in (first, second, first, second):
        env.vmcp_json("revert", one)
        guest.check()
        guest.epoch(int(time.monotonic() * 1000))
    env.vmcp("kill", "tiny")
    image_check(disk)
    env.vmcp("verify")


def test_killed_while_a_cancelled_checkpoint_is_undone(env):
    """kill -9, and errors, at each step of that: the disk is whole, with all that the guest was told is written."""
    for number, fault in enumerate(("250:1:kill", "251:1:kill", "250:1:eio")):
        sub = vmcp_test.Env(f"undo{number}")
        try:
            disk = sub.image("disk.qcow2")
            config = sub.tiny_config(memory="64M", cmdline=WRITER, disks=[("data", disk)])
            guest = sub.spawn_tiny("run", config, env={"VMCP_FAULT": fault})
            first = sub.vmcp_json("checkpoint", "--live", "--tag", "first", "tiny")["id"]
            if fault.endswith("kill"):
                sub.vmcp("checkpoint", "--live", "--full", "--wait", "captured", "--max-rate", "1M", "tiny")
                sub.vmcp("cancel", "tiny", status=None)
                guest.console.wait_exit(60)
                check_equal(len(chain_of(sub, disk)), 3 if fault.startswith("250") else 2, f"{fault}: images in the chain")
            else:
                cancel_one(sub)
                guest.check()
                check_equal(len(chain_of(sub, disk)), 3, f"{fault}: images in the chain")
                sub.vmcp("kill", "tiny")
            image_check(disk)
            sub.vmcp("gc")
            image_check(disk)
            sub.vmcp("verify")
            sub.vmcp_json("revert", first)
            sub.attach_tiny("tiny").check()
            sub.vmcp("kill", "tiny")
        finally:
            sub.close(keep=False)


if __name__ == "__main__":
    vmcp_test.main(__name__)
