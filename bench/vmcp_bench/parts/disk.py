"""Time to durable of a full checkpoint, as a share of what a plain O_DIRECT writer of as many bytes reaches in the same run."""

from .. import host
from ..figures import parse_size, significant
from ..sample import told

NAME = "disk"
TITLE = "time to durable against a plain writer"
LOADS = ("idle", "hot")


def seconds(plan):
    size = min(parse_size("4G"), max(map(parse_size, plan.args.sizes)))
    return len(LOADS) * (size / (120 << 20) + (plan.args.rounds + 1) * (size / plan.disk_bytes_per_s * 2.6 + 1)) * plan.builds


def run(context):
    size = context.nearest_size("4G")
    for load in LOADS:
        with context.guests():
            guests = {build.label: context.boot(build, size, load) for build in context.builds if context.fitting([size], load)}
            for number in range(context.rounds + 1):
                for label, guest in guests.items():
                    context.quiet(guest.pid)
                    guest.go()
                    result = guest.checkpoint(full=True)
                    guest.hold()
                    guest.discard_layers()
                    plain, _ = host.plain_write(context.folder, result["written_bytes"])
                    if number > 0:
                        context.results.record(NAME, label, load=load, size=size).add(
                            plain_ns=plain, plain_share=plain / result["durable_ns"], plain_bytes_per_s=result["written_bytes"] * 1e9 / plain, **told(result))
                        context.say(f"{load} {size} {number}/{context.rounds} {label}: {significant(result['durable_ns'] / 1e6)} ms, plain "
                                    f"{significant(plain / 1e6)} ms")
            for guest in guests.values():
                context.check(guest)
