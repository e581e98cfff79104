"""Live checkpoints: of all memory (root) and of what was written since the one before (incremental), for each load and size."""

from ..figures import parse_size, significant
from ..loads import SPARSE_FROM_BYTES, populated_bytes
from ..sample import around, told

NAME = "checkpoint"
TITLE = "live checkpoints by size and load"
# Of all memory, as the first checkpoint of a tree is, and of what was written since the one before.
KINDS = {"root": {"full": True}, "incremental": {}}
REST_SECONDS = (0.3, 3.0)  # at rest for as long as the checkpoint takes, within these


def sizes_of(args, load):
    """The very large ones are there with idle guests only."""
    return [size for size in args.sizes if load in ("idle", "sparse") or parse_size(size) < SPARSE_FROM_BYTES]


def seconds(plan):
    total = 0.0
    for load in plan.args.loads:
        for size in sizes_of(plan.args, load):
            data = populated_bytes(load, parse_size(size))
            save = data / plan.disk_bytes_per_s * 1.5
            total += data / (120 << 20)  # the first fill, and the check at the end
            for kind in plan.args.kinds:
                part = 1 if kind == "root" else 0.7 if load in ("uniform", "busy") else 0.1
                total += (plan.args.rounds + 1) * (save * part + min(REST_SECONDS[1], max(REST_SECONDS[0], save * part)) + 1.2)
    return total * plan.builds


def sample(context, guest, kind, durations):
    """The guest runs only while it is measured: it is never idle, and would disturb the others' samples."""
    rest = min(REST_SECONDS[1], max(REST_SECONDS[0], durations.get((guest, kind), 0)))
    limit = {"max_rate": context.args.max_rate} if context.args.max_rate else {}
    guest.go()
    try:
        figures, result = around(context.args, guest, lambda: guest.checkpoint(**KINDS[kind], **limit), rest)
    finally:
        guest.hold()
        guest.discard_layers()
    durations[guest, kind] = figures["took_ns"] / 1e9
    return {**figures, **told(result)}, result


def run_batch(context, load, sizes):
    guests, durations = {}, {}
    for size in sizes:
        for build in context.builds:
            context.say(f"{load}: filling {size}")
            guests[size, build.label] = context.boot(build, size, load)
    for number in range(context.rounds + 1):
        for (size, label), guest in guests.items():
            for kind in context.args.kinds:
                figures, result = sample(context, guest, kind, durations)
                context.say(f"{load} {size} {kind} {number}/{context.rounds} {label}: pause {significant(figures['pause_ns'] / 1e6)} ms, gap "
                            f"{significant(figures['gap_ns'] / 1e6)} ms (at rest {significant(figures['gap_at_rest_ns'] / 1e6)} ms)")
                if number > 0:  # the first one of each warms up
                    record = context.results.record(NAME, label, load=load, size=size, kind=kind)
                    record.add(**figures)
                    record.note(f"plan {result.get('plan')}")
    for guest in guests.values():
        context.check(guest)


def run(context):
    for load in context.args.loads:
        for sizes in context.batches(sizes_of(context.args, load), load):
            with context.guests():
                run_batch(context, load, sizes)
