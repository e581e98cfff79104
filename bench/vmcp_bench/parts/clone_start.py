"""Many clones by one command, all of which run: from the start of each one's process to the first instruction of its guest.

Each starts beside those that came before it. Guests with a rate sleep between their work, as a stock guest does; guests without never do, so that all of them want the host's processors.
"""

from ..figures import significant
from ..vm import VmcpGuest

NAME = "clone_start"
TITLE = "clones of one checkpoint of 512 MiB, each start beside all before it"
LOADS = {"sleeping": "set=64M rate=100 idle=1", "never idle": "set=64M rate=100"}
COUNTS = {"sleeping": 100, "never idle": 10}


def size_of(args):
    return "64M" if args.smoke else "512M"


def count_of(args, guests):
    return 2 if args.smoke else COUNTS[guests]


def seconds(plan):
    return (10 + sum(count_of(plan.args, guests) for guests in COUNTS) * 0.3) * plan.builds


def save(context, build, load):
    guest = VmcpGuest.boot(build, context.new_folder("origin"), size_of(context.args), load, context.args.shield)
    try:
        return guest.store, guest.checkpoint(full=True)["id"]
    finally:
        guest.close()


def end_all(build, store):
    for vm in build.command(store, "ps")["vms"]:
        if vm["pid"]:
            build.command(store, "kill", vm["name"])


def run(context):
    for guests, load in LOADS.items():
        for build in context.builds:
            with context.guests():
                store, checkpoint = save(context, build, load)
                context.stack.callback(end_all, build, store)
                context.quiet()
                vms = build.command(store, "clone", checkpoint, "--count", count_of(context.args, guests))["vms"]
                record = context.results.record(NAME, build.label, size=size_of(context.args), guests=guests)
                for vm in vms:
                    record.add(first_instruction_ns=vm["clone_ns"])
                record.add(vms=len(vms))
            context.say(f"{build.label}, {guests}: {len(vms)} VMs, {significant(record.figure('first_instruction_ns') / 1e6)} ms")
