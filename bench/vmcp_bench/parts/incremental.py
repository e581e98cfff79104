"""Checkpoints again and again: 10 and 100 a second, of a guest that writes 1,000 to 100,000 pages a second."""

import time

from ..figures import parse_size, significant
from ..sample import take_gap, take_rate, told

NAME = "incremental"
TITLE = "10 and 100 incremental checkpoints a second"
LOAD = "set=256M mode=uniform"
RATES = (1000, 10000, 100000)
PER_SECOND = (10, 100)


def sizes(args):
    """1 and 8 GiB, or what comes next to them."""
    ordered = sorted((size for size in args.sizes if parse_size(size) <= 8 << 30), key=parse_size)
    small = [size for size in ordered if parse_size(size) <= 1 << 30][-1:]
    return list(dict.fromkeys(small + ordered[-1:]))


def cases(args):
    """(checkpoints a second, pages a second)"""
    every = [(per_second, rate) for per_second in PER_SECOND for rate in RATES]
    return every[:1] if args.smoke else every


def samples_of(args, per_second):
    return max(2, args.rounds) if per_second == 10 else max(2, args.rounds * 5)


def seconds(plan):
    one = sum(samples_of(plan.args, hz) * max(1 / hz, 0.045) + 3.5 for hz, _ in cases(plan.args))
    return (len(sizes(plan.args)) * (one + 8) + 4) * plan.builds


def series(guest, per_second, count):
    """`count` checkpoints at that pace, as far as it can be held; all they told, and what the guest saw of the whole."""
    seen, results = {}, []
    take_rate(guest)
    time.sleep(1.0)
    seen["before_writes_per_s"] = take_rate(guest)
    take_gap(guest)
    guest.checkpoint()  # what the pause before it left
    take_rate(guest)
    take_gap(guest)
    began = due = time.monotonic()
    for _ in range(count):
        time.sleep(max(0, due - time.monotonic()))
        results.append(guest.checkpoint())
        due = max(due + 1 / per_second, time.monotonic() - 1 / per_second)
    took = time.monotonic() - began
    seen["series_gap_ns"] = take_gap(guest)["max_ns"]
    seen["during_writes_per_s"] = take_rate(guest)
    seen["checkpoints_per_s"] = count / max(took, count / per_second)
    seen["speed_share"] = seen["during_writes_per_s"] / max(1, seen["before_writes_per_s"])
    return seen, results


def run(context):
    guests = {(size, build.label): context.boot(build, size, LOAD + " rate=1000") for size in context.fitting(sizes(context.args), LOAD)
              for build in context.builds}
    for guest in guests.values():
        guest.go()
        guest.checkpoint(full=True)
        guest.hold()
    for per_second, rate in cases(context.args):
        for (size, label), guest in guests.items():
            context.quiet(guest.pid)
            guest.go()
            guest.tiny.ask(f"rate {rate}", "ok")
            seen, results = series(guest, per_second, samples_of(context.args, per_second))
            guest.tiny.ask("rate 1000", "ok")
            guest.hold()
            guest.discard_layers()
            record = context.results.record(NAME, label, size=size, per_second=per_second, rate=rate)
            record.add(**seen)
            for result in results:
                record.add(**told(result))
                record.note(f"plan {result.get('plan')}")
            context.say(f"{size} {rate} pages/s, {per_second}/s {label}: pause {significant(record.figure('pause_ns') / 1e6)} ms, "
                        f"{seen['checkpoints_per_s']:.0f} a second, guest at {seen['speed_share']:.0%}")
    for guest in guests.values():
        context.check(guest)
