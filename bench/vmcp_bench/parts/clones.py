"""Many VMs from one checkpoint: what each costs in memory beyond the pages that it has written itself."""

import time

from .. import host
from ..figures import significant
from ..vm import VmcpGuest

NAME = "clones"
TITLE = "50 VMs from one checkpoint of 512 MiB"
COUNT = 50
# One page after the other, so that as many pages are written as the guest counts writes.
LOAD = "set=256M mode=seq rate=2000"
RUN_SECONDS = 0.3


def count_of(args):
    return 3 if args.smoke else COUNT


def size_of(args):
    return "64M" if args.smoke else "512M"


def seconds(plan):
    return (6 + count_of(plan.args) * 1.2) * plan.builds


def writes_of(guest):
    return int(guest.tiny.ask("status", "status", 120)["writes"])


def save(context, build):
    """Taken while the guest's work stands still, so that it is known what every clone begins with."""
    guest = VmcpGuest.boot(build, context.new_folder("origin"), size_of(context.args), LOAD, context.args.shield)
    try:
        guest.tiny.ask("pause", "ok")
        writes = writes_of(guest)
        return guest.store, guest.checkpoint(full=True)["id"], writes
    finally:
        guest.close()


def start_some(context, build, store, checkpoint):
    """As many as are wanted, or as this host's memory takes."""
    clones, before, each = [], host.meminfo("MemAvailable"), 0
    while len(clones) < count_of(context.args):
        if host.meminfo("MemAvailable") < (3 << 30) + 2 * each:
            context.results.lacks(NAME, f"{len(clones)} VMs of {each / 2 ** 20:.0f} MiB each are all that this host's memory takes", engine=build.label,
                                  what=f"{count_of(context.args)} VMs")
            break
        clone = VmcpGuest.start_silent(build, store, checkpoint, f"c{len(clones) + 1}", context.args.shield)
        context.stack.callback(clone.close)
        clone.tiny.ask("go", "ok")
        time.sleep(RUN_SECONDS)
        clone.tiny.ask("pause", "ok")
        clone.writes = writes_of(clone)
        clone.hold()  # it would not be idle
        clones.append(clone)
        each = max(0, (before - host.meminfo("MemAvailable")) // len(clones))
    return clones, each


def run(context):
    for build in context.builds:
        with context.guests():
            store, checkpoint, writes = save(context, build)
            clones, each = start_some(context, build, store, checkpoint)
            record = context.results.record(NAME, build.label, size=size_of(context.args))
            for clone in clones:
                memory = host.memory_of(clone.pid)
                # What is private and clean is the page cache's: it is there once, and goes when memory is short.
                own = memory["Private_Dirty"] + memory["VmPTE"]
                record.add(pss_bytes=memory["Pss"], private_bytes=own, page_tables_bytes=memory["VmPTE"], page_cache_bytes=memory["Private_Clean"],
                           guest_wrote_bytes=(clone.writes - writes) * host.PAGE, beyond_writes_bytes=own - (clone.writes - writes) * host.PAGE)
            record.add(host_each_bytes=each, vms=len(clones))
            context.say(f"{build.label}: {len(clones)} VMs, {significant(record.figure('beyond_writes_bytes') / 2 ** 20)} MiB each beyond what the guest wrote")
            for clone in clones[:1] + clones[-1:]:
                context.check(clone)
