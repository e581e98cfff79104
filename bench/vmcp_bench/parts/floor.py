"""What a pause costs at least on this host, and the pause of an idle VM beside it.

The floor is taken in two ways: by bench/kvm_floor, a program that knows nothing of vmcp and does with KVM what no checkpoint can do without (kick one
vCPU out of the guest, read its and the irqchip's state by the same ioctls, enter the guest again), and from vmcp's own account of checkpoints
of an idle VM (quiesce and state).
"""

import json
import subprocess
import time

from .. import host
from ..figures import parse_size, significant
from ..sample import take_gap, told

NAME = "floor"
TITLE = "the floor of a pause, and an idle VM's"
LOAD = "set=16M paused=1"


def seconds(plan):
    return ((plan.args.rounds + 1) * 2 * 0.9 + 3) * plan.builds


def measure_kvm(context):
    path = host.program("kvm_floor")
    if not path:
        context.results.lacks(NAME, "bench/kvm_floor was not built beside this vmcp", engine="kvm_floor", what="the floor without vmcp")
        return
    done = subprocess.run([path, str(max(20, context.rounds * 5))], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        context.results.lacks(NAME, done.stderr, engine="kvm_floor", what="the floor without vmcp")
        return
    for sample in json.loads(done.stdout)["samples"]:
        context.results.record(NAME, "kvm_floor").add(**sample)


def sizes(args):
    ordered = sorted(args.sizes, key=parse_size)
    return list(dict.fromkeys((ordered[0], ordered[-1])))


def sample(guest):
    guest.go()
    time.sleep(0.02)
    taken = guest.checkpoint()
    take_gap(guest)
    began = time.monotonic_ns()
    guest.control.call("vm.pause")
    paused = time.monotonic_ns()
    guest.control.call("vm.resume")
    ended = time.monotonic_ns()
    gap = take_gap(guest)["max_ns"]
    guest.hold()
    floor = taken["quiesce_ns"] + taken["state_ns"]
    return {**told(taken), "floor_ns": floor, "pause_to_floor": taken["pause_ns"] / max(1, floor), "noop_pause_ns": paused - began,
            "noop_resume_ns": ended - paused, "noop_gap_ns": gap}


def run(context):
    measure_kvm(context)
    guests = {(size, build.label): context.boot(build, size, LOAD) for size in context.fitting(sizes(context.args), LOAD) for build in context.builds}
    for guest in guests.values():
        guest.go()
        guest.checkpoint()
        guest.hold()
    for number in range(context.rounds + 1):
        for (size, label), guest in guests.items():
            context.quiet(guest.pid)
            figures = sample(guest)
            if number > 0:
                context.results.record(NAME, label, size=size).add(**figures)
    for (size, label), guest in guests.items():
        record = context.results.one(NAME, label, size=size)
        context.say(f"{size} {label}: pause {significant(record.figure('pause_ns') / 1e6)} ms, of it quiesce and state "
                    f"{significant(record.figure('floor_ns') / 1e6)} ms")
        context.check(guest)
