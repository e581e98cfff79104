"""Samples: what the guest saw before, during and after something was done to it."""

import time

from . import host
from .figures import significant

GAP_LIMITS = ("over_1ms", "over_2ms", "over_5ms", "over_10ms")


def take_gap(guest):
    """The guest's figures since it was asked last."""
    return {key: int(value) for key, value in guest.tiny.ask("gap", "gap", 120).items()}


def take_rate(guest):
    """Page writes a second since it was asked last, by the guest's own clock."""
    return int(guest.tiny.ask("status", "status", 120)["writes_per_s"])


def window(guest, action):
    """What the guest saw while `action` ran, and what action returned."""
    take_rate(guest)
    take_gap(guest)
    stolen = host.stolen_ns()
    began = time.monotonic_ns()
    result = action()
    took = time.monotonic_ns() - began
    stolen = host.stolen_ns() - stolen
    gap = take_gap(guest)
    return {"gap": gap, "took_ns": took, "stolen_ns": stolen, "result": result, "writes_per_s": take_rate(guest)}


def quiet_window(args, guest, action):
    """A window during which others left the CPUs alone; the last try counts in any case, and says so."""
    for attempt in range(args.tries):
        host.wait_for_quiet(args.foreign, args.wait, guest.pid)
        foreign = host.Foreign(guest.pid)
        sample = window(guest, action)
        sample["disturbed"] = foreign.share() > args.foreign
        if not sample["disturbed"]:
            break
        if attempt + 1 < args.tries:
            host.say(f"      others used the CPUs: gap {significant(sample['gap']['max_ns'] / 1e6)} ms does not count")
    return sample


def around(args, guest, action, rest_seconds, after_seconds=0.2):
    """Before, during and after `action`: the figures of one sample, and its result. The guest runs, and nobody else's."""
    rest = quiet_window(args, guest, lambda: time.sleep(rest_seconds))
    taken = quiet_window(args, guest, action)
    after = window(guest, lambda: time.sleep(after_seconds))
    figures = {"gap_ns": taken["gap"]["max_ns"], "gap_at_rest_ns": rest["gap"]["max_ns"], "took_ns": taken["took_ns"],
               "gaps_over_1ms": taken["gap"]["over_1ms"], "stolen_ns": taken["stolen_ns"], "disturbed": int(taken["disturbed"])}
    if rest["writes_per_s"] > 100:  # a guest that does not write has no speed
        figures.update(before_writes_per_s=rest["writes_per_s"], during_writes_per_s=taken["writes_per_s"], after_writes_per_s=after["writes_per_s"],
                       speed_share=taken["writes_per_s"] / rest["writes_per_s"])
    return figures, taken["result"]


# What is taken over from a checkpoint's own account; a build that does not tell one has no such column.
TOLD = ("pause_ns", "quiesce_ns", "state_ns", "memory_ns", "disks_ns", "resume_ns", "captured_ns", "durable_ns", "cow_faults", "cow_fault_p50_ns",
        "cow_fault_p99_ns", "cow_fault_p999_ns", "cow_fault_max_ns", "throttled", "throttled_faults", "armed_again_pages", "saved_pages", "written_bytes")


def told(result):
    return {key: result.get(key) for key in TOLD}
