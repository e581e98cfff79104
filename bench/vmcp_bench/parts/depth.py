"""What the depth of the tree costs: start and revert at depth 100 against depth 1, the same guest and the same number of pages to put back."""

import time

from ..figures import significant
from ..vm import VmcpGuest

NAME = "depth"
TITLE = "tree depth 100 against depth 1"
DEPTH = 100
LOAD = "set=192M mode=uniform rate=10000"
BETWEEN_SECONDS = 0.02


def depth_of(args):
    return 3 if args.smoke else DEPTH


def seconds(plan):
    return (8 + depth_of(plan.args) * 0.08 + plan.args.rounds * 2 * (0.6 + 10 * 0.03)) * plan.builds


def sample(context, guest, checkpoint, record, name):
    """Ten reverts in place, then a start as another VM."""
    context.quiet(guest.pid)
    guest.go()
    for _ in range(10):
        time.sleep(BETWEEN_SECONDS)
        result = guest.revert(checkpoint)
        record.add(revert_ns=result["revert_ns"], restored_pages=result["restored_pages"])
    guest.hold()
    other, progress_ns = VmcpGuest.start(guest.build, guest.store, checkpoint, name, context.args.shield)
    other.close()
    record.add(progress_ns=progress_ns)


def run(context):
    size, depth = context.nearest_size("256M"), depth_of(context.args)
    guests = {}
    for build in context.builds:
        for levels in (1, depth):
            guest = context.boot(build, size, LOAD)
            guest.go()
            # The console works all the time from here on: the first byte of a VM that starts from such a checkpoint is its first progress.
            guest.tiny.ask("report 1", "ok")
            for _ in range(levels):
                checkpoint = guest.checkpoint()["id"]
                time.sleep(BETWEEN_SECONDS)
            guest.hold()
            guests[build.label, levels] = (guest, checkpoint)
            context.say(f"{size} {build.label}: a chain of {levels}")
    for number in range(context.rounds + 1):
        for (label, levels), (guest, checkpoint) in guests.items():
            record = context.results.record(NAME, label, size=size, depth=levels if number > 0 else 0)
            sample(context, guest, checkpoint, record, f"again{levels}x{number}")
    context.results.records = [one for one in context.results.records if one.part != NAME or one.case["depth"] > 0]
    for (label, levels), (guest, checkpoint) in guests.items():
        record = context.results.one(NAME, label, depth=levels)
        context.say(f"{label}: depth {levels}: start {significant(record.figure('progress_ns') / 1e6)} ms, revert {significant(record.figure('revert_ns') / 1e6)} ms")
        guest.go()
        guest.revert(checkpoint)
        guest.tiny.console.send_line("")
        guest.tiny.ask("report 0", "ok")
        context.check(guest)
