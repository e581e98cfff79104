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
    return [one["id"] for one in env.vmcp_json("log")["checkpoints"]]


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
    result = env.vmcp_json("rm", "first")
    check_equal(sorted(result), ["disk_layers", "freed_bytes", "memory_layers", "removed"], "rm --json")
    check_equal(listed(env), [ids[3]], "checkpoints left")
    collected = env.vmcp_json("gc")
    check_equal(sorted(collected), ["disk_layers", "forgotten", "freed_bytes", "kept_disk_layers", "memory_layers"], "gc --json")


if __name__ == "__main__":
    vmcp_test.main(__name__)
