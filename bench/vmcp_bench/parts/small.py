"""An incremental checkpoint of about 1000 pages of a large guest: how long until it is durable, against a plain write of the same bytes, and bytes."""

import time

from .. import host
from ..figures import significant
from ..sample import told

NAME = "small"
TITLE = "1000 dirty pages of 4 GiB"
LOAD = "set=256M mode=uniform rate=10000"


def seconds(plan):
    return (8 + (plan.args.rounds + 1) * 1.0) * plan.builds


def sample(context, guest):
    guest.go()
    guest.checkpoint()  # the pages of the time before
    time.sleep(0.1)     # 1000 writes
    before = host.written_bytes(guest.pid)
    result = guest.checkpoint()
    after = host.written_bytes(guest.pid)
    guest.hold()
    plain, syncs = host.plain_write(context.folder, max(host.PAGE, result["written_bytes"]))
    dirty = (result["saved_pages"] + result["zero_pages"]) * host.PAGE
    figures = {**told(result), "plain_ns": plain, "plain_sync_ns": syncs, "durable_beyond_sync_ns": result["durable_ns"] - syncs,
               "layer_ratio": result["written_bytes"] / max(1, dirty)}
    if before is not None and after is not None:
        figures.update(io_bytes=after - before, io_ratio=(after - before) / max(1, dirty))
    return figures


def run(context):
    size = context.nearest_size("4G")
    guests = {build.label: context.boot(build, size, LOAD) for build in context.builds}
    for guest in guests.values():
        guest.go()
        guest.checkpoint(full=True)
        guest.hold()
    for number in range(context.rounds + 1):
        for label, guest in guests.items():
            context.quiet(guest.pid)
            figures = sample(context, guest)
            guest.discard_layers()
            if number > 0:
                context.results.record(NAME, label, size=size).add(**figures)
                context.say(f"{size} {number}/{context.rounds} {label}: durable after {significant(figures['durable_ns'] / 1e6)} ms")
    for guest in guests.values():
        context.check(guest)
