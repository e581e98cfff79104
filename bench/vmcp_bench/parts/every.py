"""Periodic checkpoints: 20 a second for a minute, of a guest that writes 1000 pages in each interval, in a store that is kept bounded."""

import os
import time

from ..figures import significant
from ..sample import take_gap, take_rate
from ..vm import NotInThisBuild

NAME = "every"
TITLE = "20 checkpoints a second, kept bounded"
KEEP = 20
LOAD = "set=256M mode=uniform rate=20000"


def length_of(args):
    return 3 if args.smoke else 60 if args.rounds >= 20 else 15


def seconds(plan):
    return (length_of(plan.args) + 8) * plan.builds


def store_bytes(store):
    """What the layers and checkpoints occupy."""
    total = 0
    for folder, _, names in os.walk(store):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_blocks * 512
            except OSError:
                pass  # deleted just now
    return total


def run(context):
    size = context.nearest_size("1G")
    for build in context.builds:
        with context.guests():
            # Not at once: how fast the guest is without checkpoints is seen in a VM that takes none.
            plain = context.boot(build, size, LOAD)
            plain.go()
            take_rate(plain)
            time.sleep(1)
            before = take_rate(plain)
            plain.hold()
            context.quiet()
            guest = context.boot(build, size, LOAD, config=f"[checkpoint]\nevery = 50ms\nkeep = {KEEP}\n")
            watch(context, build, guest, before, size)
            context.check(guest)


def periodic(guest):
    found = guest.control.call("vm.stats").get("periodic")
    if found is None:
        raise NotInThisBuild("vm.stats without periodic checkpoints")
    return found


def wait_for_root(guest, timeout=120):
    """The first one saves all memory, and is not what this is about."""
    deadline = time.monotonic() + timeout
    while periodic(guest)["taken"] == 0:
        if time.monotonic() > deadline:
            raise RuntimeError(f"no periodic checkpoint in {timeout} s: {periodic(guest).get('problem')}")
        time.sleep(0.1)


def watch(context, build, guest, before, size):
    sizes = []
    guest.go()
    wait_for_root(guest)
    take_rate(guest)
    take_gap(guest)
    first, began = periodic(guest), time.monotonic()
    while time.monotonic() - began < length_of(context.args):
        time.sleep(0.5)
        sizes.append(store_bytes(guest.store))
    took, last = time.monotonic() - began, periodic(guest)
    gap, rate = take_gap(guest), take_rate(guest)
    guest.hold()
    kept = len(build.command(guest.store, "log")["checkpoints"])
    record = context.results.record(NAME, build.label, size=size)
    record.add(checkpoints_per_s=(last["taken"] - first["taken"]) / took, skipped=last["skipped"] - first["skipped"], failed=last["failed"] - first["failed"],
               merged_layers=last["merged_layers"] - first["merged_layers"], gap_ns=gap["max_ns"], gaps_over_1ms=gap["over_1ms"], before_writes_per_s=before,
               during_writes_per_s=rate, speed_share=rate / max(1, before), kept=kept, seconds=took, store_growth_bytes=sizes[-1] - sizes[len(sizes) // 2])
    for number in sizes:
        record.add(store_bytes=number)
    context.say(f"{build.label}: {record.figure('checkpoints_per_s'):.1f} a second, longest gap {significant(gap['max_ns'] / 1e6)} ms")
