#!/usr/bin/env python3
"""Whole VMs with the tiny guest: removing checkpoints, collecting, periodic checkpoints and what `keep` and consolidation leave."""

import hashlib
import os
import random
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import store_memory  # noqa: E402
import vmcp_test  # noqa: E402
from tiny_test import image_check  # noqa: E402
from vmcp_test import check, check_equal  # noqa: E402


def memory_sum(env, checkpoint):
    """A hash of a checkpoint's memory, read by the format's description alone."""
    memory = store_memory.Memory(env.store, checkpoint)
    total = hashlib.sha256()
    for _, data in memory.runs():
        total.update(data)
    memory.close()
    return total.hexdigest()


def layers_needed(env, checkpoints):
    needed = set()
    for one in checkpoints:
        needed.add(env.vmcp_json("show", one)["memory"]["layer"])
        needed.update(store_memory.layers(env.store, one))
    return needed


def layers_there(env):
    return {name[:-4] for name in os.listdir(os.path.join(env.store, "layers")) if name.endswith(".mem")}


def listed(env):
    return [one["id"] for one in env.vmcp_json("log")["checkpoints"] if one["durability"] == "durable"]


def test_rm_of_random_nodes(env):
    """A tree of 14 under a running guest with a disk: nodes go in random order, and every one that is left is whole, byte by byte."""
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(memory="64M", cmdline="set=16M rate=2000 disk=1 disk_blocks=512 qd=4 report=0", disks=[("data", disk)])
    rng = random.Random(7)
    sums, states = {}, {}
    for number in range(14):
        if number and rng.random() < 0.5:
            env.vmcp_json("revert", rng.choice(list(sums)))
        guest.epoch(100 + number)
        time.sleep(0.05)
        guest.set("pause")
        state = {key: value for key, value in guest.sum().items() if key in ("mem", "disk", "sequence", "epoch")}
        one = env.vmcp_json("checkpoint", "--live", "tiny")["id"]
        guest.set("go")
        sums[one], states[one] = memory_sum(env, one), state
    standing = listed(env)[-1]
    refused = env.vmcp("rm", standing, status=4)
    check("stands at it" in refused.err, f"rm of the position: {refused}")
    rest = [one for one in sums if one != standing]
    rng.shuffle(rest)
    for number, gone in enumerate(rest[:10]):
        check_equal(env.vmcp("rm", gone).out.split(), [gone], "what rm prints")
        left = [one for one in sums if one in listed(env)]
        check_equal(len(left), 13 - number, "checkpoints left")
        for one in left:
            check_equal(memory_sum(env, one), sums[one], f"memory of {one} after {number + 1} removals")
        check_equal(layers_there(env), layers_needed(env, left), "memory layers")
    env.vmcp("gc")
    left = listed(env)
    for one in left:
        env.vmcp_json("revert", one)
        got = {key: value for key, value in guest.sum().items() if key in states[one]}
        check_equal(got, states[one], f"content of {one}")
        guest.check()
    # The VM is gone: now the one that it stands at may go, and it stands at its ancestor.
    env.vmcp("kill", "tiny")
    image_check(disk)
    env.vmcp("rm", *[one for one in listed(env)[1:]])
    last = listed(env)
    check_equal(len(last), 1, "checkpoints left")
    env.vmcp("gc")
    image_check(disk)
    env.vmcp_json("revert", last[0])
    guest = env.attach_tiny("tiny")
    guest.check()
    env.vmcp("kill", "tiny")
    env.vmcp("rm", last[0])
    env.vmcp("gc")
    check_equal(layers_there(env), set(), "memory layers in the end")
    image_check(disk)


def test_rm_by_name(env):
    """Tags protect, and VM~N means the same checkpoint throughout one command."""
    env.start_tiny(memory="64M", cmdline="set=8M rate=1000 report=0")
    ids = [env.vmcp_json("checkpoint", "--live", "tiny", *(["--tag", "first"] if number == 0 else []))["id"] for number in range(4)]
    check("tag" in env.vmcp("rm", ids[0], status=4).err, "rm of a checkpoint with a tag")
    env.vmcp("rm", "tiny~1", "tiny~2")
    check_equal(listed(env), [ids[0], ids[3]], "checkpoints left")
    env.vmcp("rm", "nosuch", status=3)
    env.vmcp("tag", "tiny", "late")
    env.vmcp("tag", "--delete", "late")
    env.vmcp("show", "late", status=3)
    check("late" in env.vmcp("tag", "--delete", "late", status=3).err, "a tag that is not there")
    env.vmcp("tag", "tiny", status=2)
    result = env.vmcp_json("rm", "first")
    check_equal(sorted(result), ["disk_layers", "freed_bytes", "memory_layers", "merged_layers", "removed"], "rm --json")
    check_equal(listed(env), [ids[3]], "checkpoints left")
    collected = env.vmcp_json("gc")
    check_equal(sorted(collected), ["disk_layers", "forgotten", "freed_bytes", "freed_resources", "kept_disk_layers", "memory_layers", "merged_layers"], "gc --json")


def stop_periodic(env, name="tiny"):
    """Ends the VM as a user does; what was kept stays."""
    env.vmcp("kill", name)
    return [one for one in env.vmcp_json("log")["checkpoints"] if one["periodic"]]


def wait_for(env, what, condition, timeout=120):
    deadline = time.monotonic() + timeout
    while True:
        stats = env.vmcp_json("stats", "tiny")["periodic"]
        if condition(stats):
            return stats
        check(time.monotonic() < deadline, f"no {what}: {stats}")
        time.sleep(0.1)


def stored_pages(env):
    """Pages of memory in the store's layers, by their checksum files."""
    total = 0
    for name in os.listdir(os.path.join(env.store, "layers")):
        if name.endswith(".sums"):
            try:
                total += max(0, os.stat(os.path.join(env.store, "layers", name)).st_size - 32) // 16
            except FileNotFoundError:
                pass  # it went meanwhile
    return total


KEEP, SET_PAGES = 8, 4096


def test_every_and_keep(env):
    """Periodic checkpoints of a guest that writes: their number and the store stay bounded, and every one that is kept is whole."""
    disk = env.image("disk.qcow2")
    config = env.tiny_config(memory="64M", cmdline="set=16M rate=8000 disk=1 disk_blocks=64 disk_rate=50 report=0", disks=[("data", disk)],
                             extra=f"[checkpoint]\nevery = 1h\nkeep = {KEEP}\n")
    guest = env.spawn_tiny("run", config, "--every", "50ms")
    guest.set("disk 0")
    user = env.vmcp_json("checkpoint", "--live", "tiny", "--tag", "mine")["id"]
    wait_for(env, "periodic checkpoints", lambda stats: stats["taken"] >= 3)
    tagged = [one for one in env.vmcp_json("log")["checkpoints"] if one["durability"] == "durable"][-2]
    env.vmcp("tag", tagged["id"], "keeper")
    stats = wait_for(env, "60 removals and 3 consolidations", lambda stats: stats["removed"] >= 60 and stats["consolidations"] >= 3, 300)
    check_equal(stats["failed"], 0, "failures")
    check_equal(stats["problem"], None, "problem")
    # Memory twice, and for each one that is kept, or waits to be, what it saved: pages written in an interval, skipped ones included.
    intervals = (stats["taken"] + stats["skipped"]) / stats["taken"]
    bound = 2 * 16384 + (2 * KEEP + 40) * 8000 * 0.05 * intervals + SET_PAGES
    pages = stored_pages(env)
    check(pages <= bound, f"{pages} pages are stored, more than {bound}")
    guest.epoch(5)
    # An idle disk adds no layers.
    disks = len([name for name in os.listdir(os.path.join(env.store, "layers")) if name.endswith(".qcow2")])
    taken = stats["taken"]
    wait_for(env, "20 more checkpoints", lambda stats: stats["taken"] >= taken + 20)
    check_equal(len([name for name in os.listdir(os.path.join(env.store, "layers")) if name.endswith(".qcow2")]), disks, "disk layers")
    guest.set("disk 1")
    taken = env.vmcp_json("stats", "tiny")["periodic"]["taken"]
    wait_for(env, "10 more checkpoints", lambda stats: stats["taken"] >= taken + 10)
    # A revert and a user's checkpoint go ahead.
    newest = [one for one in env.vmcp_json("log")["checkpoints"] if one["periodic"]][-1]["id"]
    if env.vmcp("revert", newest, status=None).status == 0:  # it may have been let go meanwhile
        guest.check()
    env.vmcp_json("checkpoint", "--live", "tiny", "-m", "by the user")
    guest.check()
    periodic = stop_periodic(env)
    everything = {one["id"]: one for one in env.vmcp_json("log")["checkpoints"] if one["durability"] == "durable"}
    check(user in everything and tagged["id"] in everything, "a checkpoint of the user's, or one with a tag, is gone")
    check(KEEP <= len(periodic) <= KEEP + 70, f"{len(periodic)} periodic checkpoints are left")
    env.vmcp("gc")
    check_equal(layers_there(env), layers_needed(env, everything), "memory layers")
    image_check(disk)
    for one in [user, tagged["id"], periodic[0]["id"], periodic[len(periodic) // 2]["id"], periodic[-1]["id"]]:
        env.vmcp_json("run", "--from", one, "--every", "0", "--detach")
        guest = env.attach_tiny("tiny")
        guest.check()
        check_equal(env.vmcp_json("stats", "tiny")["periodic"], None, "periodic checkpoints with --every 0")
        env.vmcp("kill", "tiny")


def test_killed_while_periodic(env):
    """kill -9 in the middle: the store opens, everything listed is whole and exact after gc, and the VM goes on from the newest. Also at each
    fault point of a consolidation."""
    for number, fault in enumerate((None, None, "240:2", "241:2", "242:1", "307:2", "243:1", "311:9", "313:9", "315:9")):
        sub = vmcp_test.Env(f"killed{number}")
        try:
            config = sub.tiny_config(memory="64M", cmdline="set=16M rate=20000 report=0")
            environment = {"VMCP_FAULT": fault + ":kill"} if fault else {}
            guest = sub.spawn_tiny("run", config, "--every", "50ms", "--keep", "5", env=environment)
            pid = sub.vmcp_json("ps")["vms"][0]["pid"]
            if fault:
                guest.console.wait_exit(240)
            else:
                wait_for(sub, "a consolidation", lambda stats: stats["consolidations"] >= 2, 240)
                time.sleep(random.random() * 0.2)
                os.kill(pid, 9)
                guest.console.wait_exit(60)
            check_equal(sub.vmcp_json("ps")["vms"][0]["state"], "crashed", "state")
            check_equal(os.listdir(os.path.join(sub.store, "staging")), [], f"staging after {fault}")
            sub.vmcp("gc")
            left = listed(sub)
            check(len(left) >= 5, f"{fault}: checkpoints left: {left}")
            check_equal(layers_there(sub), layers_needed(sub, left), f"memory layers after {fault}")
            for one in (left[0], left[-1]):
                sub.vmcp_json("run", "--from", one, "--every", "0", "--detach")
                sub.attach_tiny("tiny").check()
                sub.vmcp("kill", "tiny")
        finally:
            sub.close(keep=False)


def test_trouble_is_told_once(env):
    """A periodic checkpoint that fails is told, and harms nobody; the next one succeeds, and that is told too."""
    config = env.tiny_config(memory="64M", cmdline="set=8M rate=1000 report=0")
    guest = env.spawn_tiny("run", config, "--every", "50ms", "--keep", "5", env={"VMCP_FAULT": "213:4:eio"})
    stats = wait_for(env, "a failure and checkpoints after it", lambda stats: stats["failed"] == 1 and stats["taken"] >= 8)
    check_equal(stats["problem"], None, "problem")
    check_equal(env.vmcp_json("ps")["vms"][0]["note"], None, "note")
    check_equal(env.stderr_text().count("fault point 213"), 1, "times that it was told")
    guest.check()


def test_bad_options(env):
    config = env.tiny_config()
    for wrong in (("--every", "soon"), ("--every", "1ms"), ("--keep", "0"), ("--keep", "x")):
        result = env.vmcp("run", config, *wrong, status=2)
        check(wrong[0] in result.err and "hint: " in result.err, f"{wrong}: {result}")


if __name__ == "__main__":
    vmcp_test.main(__name__)
