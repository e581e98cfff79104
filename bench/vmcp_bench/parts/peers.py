"""Saving a running guest, by vmcp and by QEMU's four ways: the same guest file, the same host, samples taken in turns."""

from .. import host
from ..figures import parse_size, significant
from ..qemu import WAYS, DoesNotEnd
from ..sample import around, told

NAME = "peers"
TITLE = "side by side with QEMU"
LOADS = ("idle", "moderate", "hot", "uniform")
REST_SECONDS = 0.5


def loads_of(args):
    return [load for load in args.loads if load in LOADS] or args.loads[:1]


def sizes_of(args):
    """Up to 4 GiB: QEMU takes minutes beyond."""
    return [size for size in args.sizes if parse_size(size) <= 4 << 30][:3]


def rounds_of(args, size):
    """QEMU's large saves take seconds to a minute each; few are enough to see that."""
    return args.rounds if parse_size(size) <= 256 << 20 else max(1, args.rounds // 4)


def seconds(plan):
    total = 0.0
    for load in loads_of(plan.args):
        for size in sizes_of(plan.args):
            data = parse_size(size)
            each = 6 * (data / plan.disk_bytes_per_s * 1.5 + 1.5) + (data / (80 << 20)) * (2 if load != "idle" else 0.5)
            total += 2 * data / (120 << 20) + rounds_of(plan.args, size) * each
    return total


def sample_qemu(context, guest, way, failed):
    guest.go()
    try:
        figures, result = around(context.args, guest, lambda: WAYS[way](guest), REST_SECONDS)
    except DoesNotEnd as why:
        failed[way] = str(why)
        context.say(f"{way}: {why}")
        return None
    finally:
        guest.hold()
        guest.discard()
        if way == "snapshot-save" and way not in failed:
            guest.discard_snapshot()
    return {**figures, "durable_ns": figures["took_ns"], **result}


def sample_vmcp(context, guest, live):
    guest.go()
    try:
        figures, result = around(context.args, guest, lambda: guest.checkpoint(live=live, full=True), REST_SECONDS)
    finally:
        guest.hold()
        guest.discard_layers()
    return {**figures, **told(result)}


def run_one(context, load, size):
    context.say(f"{load}: filling {size} twice")
    ours = {build.label: context.boot(build, size, load) for build in context.builds}
    qemu, failed = context.boot_qemu(size, load), {}
    for number in range(1, rounds_of(context.args, size) + 1):
        for label, guest in ours.items():
            for way, live in (("checkpoint --live", True), ("checkpoint, stopped", False)):
                context.results.record(NAME, label, load=load, size=size, way=way).add(**sample_vmcp(context, guest, live))
        for way in WAYS:
            if way in failed:
                continue
            figures = context.attempt(way, lambda: sample_qemu(context, qemu, way, failed), failed)
            if figures:
                context.results.record(NAME, "QEMU", load=load, size=size, way=way).add(**figures)
        context.say(f"{load} {size} {number}/{rounds_of(context.args, size)}: longest gap, ms: " + ", ".join(
            f"{one.engine if one.engine != 'QEMU' else 'QEMU'} {one.case['way']} {significant(one.samples['gap_ns'][-1] / 1e6)}"
            for one in context.results.find(NAME, load=load, size=size)))
    for way, why in failed.items():
        context.results.lacks(NAME, why, engine="QEMU", what=f"{way}, {load}, {size}")
    for guest in (*ours.values(), qemu):
        context.check(guest)


def run(context):
    context.results.meta["qemu"] = version = host.qemu_version()
    if not version:
        context.results.lacks(NAME, "qemu-system-x86_64 is not installed (scripts/setup.sh bench)", engine="QEMU")
        return
    for load in loads_of(context.args):
        for size in context.fitting(sizes_of(context.args), load, len(context.builds) + 1):
            with context.guests():
                run_one(context, load, size)


