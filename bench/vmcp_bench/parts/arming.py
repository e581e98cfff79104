"""The longest gap that the guest sees between the request for a root checkpoint and the pause, while its memory is being protected.

The guest is asked for its gap again and again while the request is on its way; what it answered before the instant counts. Each answer is a line on the
console, so that the figure is to be seen beside the same questions without a checkpoint.
"""

import time

from ..figures import parse_size, significant
from ..sample import take_gap

NAME = "arming"
TITLE = "gap while memory is protected ahead of the pause"
LOAD = "hot"


def seconds(plan):
    return sum(parse_size(size) / (120 << 20) + (plan.args.rounds + 1) * (parse_size(size) / plan.disk_bytes_per_s * 1.5 + 0.6)
               for size in sizes(plan.args)) * plan.builds


def sizes(args):
    """The large ones, where arming lasts long enough to be asked in."""
    found = [size for size in args.sizes if (1 << 30) <= parse_size(size) <= (8 << 30)]
    return found[-2:] or sorted(args.sizes, key=parse_size)[:1]


def sample(guest):
    take_gap(guest)
    began = time.monotonic_ns()
    guest.control.send("checkpoint.take", live=True, full=True, wait="captured")
    answers = []
    while time.monotonic_ns() - began < 60e6 or len(answers) < 3:
        gap = take_gap(guest)
        answers.append((time.monotonic_ns() - began, gap["max_ns"]))
    result = guest.control.receive()
    guest.wait_durable(result["id"])
    ahead = [gap for at, gap in answers if at < result["captured_ns"]]
    take_gap(guest)
    rest = [take_gap(guest)["max_ns"] for _ in ahead]
    return (max(ahead), max(rest), len(ahead)) if ahead else (None, None, 0)


def run(context):
    for batch in context.batches(sizes(context.args), LOAD):
        with context.guests():
            guests = {(size, build.label): context.boot(build, size, LOAD) for size in batch for build in context.builds}
            for number in range(context.rounds + 1):
                for (size, label), guest in guests.items():
                    context.quiet(guest.pid)
                    guest.go()
                    gap, rest, answers = sample(guest)
                    guest.hold()
                    guest.discard_layers()
                    if number > 0 and gap is not None:
                        context.results.record(NAME, label, load=LOAD, size=size).add(gap_ns=gap, gap_at_rest_ns=rest, answers=answers)
                        context.say(f"{size} {number}/{context.rounds} {label}: {significant(gap / 1e6)} ms in {answers} answers")
            for (size, label), guest in guests.items():
                if not context.results.find(NAME, label, size=size):
                    context.results.lacks(NAME, f"at {size} the instant came before the guest could answer once", engine=label, what=size)
                context.check(guest)
