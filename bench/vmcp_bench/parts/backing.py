"""Live checkpoints of guests whose memory the host backs with small pages, with huge pages where it has them at hand, and with those of its pool."""

import time

from .. import host, loads
from ..figures import parse_size, significant
from ..vm import NotInThisBuild
from . import checkpoint

NAME = "backing"
TITLE = "live checkpoints by memory_backing"
LOAD = "hot"
BACKINGS = ("small", "thp", "hugetlb")


def seconds(plan):
    data = parse_size(size_of(plan.args))
    each = data / plan.disk_bytes_per_s * 3 + 4
    return len(BACKINGS) * (data / (120 << 20) * 2 + plan.args.rounds * each) * plan.builds


def size_of(args):
    return ([size for size in args.sizes if parse_size(size) <= 1 << 30] or args.sizes[:1])[-1]


def boot(context, build, size, backing):
    """A filled guest, and how fast filling was; None where this host or build cannot."""
    free_bytes = host.meminfo("HugePages_Free") * host.meminfo("Hugepagesize")
    if backing == "hugetlb" and free_bytes < parse_size(size):
        context.results.lacks(NAME, f"the host's pool of huge pages has {free_bytes >> 20} MiB free; vm.nr_hugepages makes it larger", what=backing)
        return None
    try:
        began = time.monotonic_ns()
        guest = context.boot(build, size, LOAD, config=f"memory_backing = {backing}\n")
        filled_ns = time.monotonic_ns() - began
    except NotInThisBuild as why:
        context.results.lacks(NAME, str(why), what=backing, engine=build.label)
        return None
    for kind in context.args.kinds:
        record = context.results.record(NAME, build.label, size=size, backing=backing, kind=kind)
        record.add(filled_bytes_per_s=loads.populated_bytes(LOAD, parse_size(size)) * 1e9 / filled_ns)
    return guest


def run(context):
    size, durations, guests = size_of(context.args), {}, {}
    with context.guests():
        for backing in BACKINGS:
            for build in context.builds:
                context.say(f"{backing}: filling {size}")
                guest = boot(context, build, size, backing)
                if guest:
                    guests[backing, build.label] = guest
        for number in range(context.rounds + 1):
            for (backing, label), guest in guests.items():
                for kind in context.args.kinds:
                    figures, result = checkpoint.sample(context, guest, kind, durations)
                    context.say(f"{backing} {kind} {number}/{context.rounds} {label}: {result.get('plan')}, pause {significant(figures['pause_ns'] / 1e6)} ms")
                    if number > 0:  # the first one of each warms up
                        record = context.results.record(NAME, label, size=size, backing=backing, kind=kind)
                        record.add(**figures)
                        record.note(f"plan {result.get('plan')}")
        for guest in guests.values():
            context.check(guest)
