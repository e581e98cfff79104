"""How fast a VM boots, and what the VMM itself takes of memory. A guest of 512 MiB."""

import os
import time

from .. import host
from ..figures import significant
from ..vm import VmcpGuest

NAME = "boot"
TITLE = "boot, and memory of the VMM"
LOAD = "set=16M rate=1000"


def seconds(plan):
    return ((plan.args.rounds + 1) * 0.8 + 4) * plan.builds


def boot_ns(context, build, number):
    """`boot_ns` of `vmcp run --detach`, of a VM that is ended at once."""
    folder = context.new_folder(f"boot-{number}")
    config, store = os.path.join(folder, "boot.cfg"), os.path.join(folder, "store")
    with open(config, "w", encoding="utf-8") as file:
        file.write(f"[vm]\nname = boot\nmemory = 512M\ncpus = 1\nkernel = {os.environ['VMCP_TINY']}\ncmdline = {LOAD} report=0\n")
    try:
        return build.command(store, "run", "--detach", config)["boot_ns"]
    finally:
        build.command(store, "kill", "boot")


def run(context):
    for number in range(context.rounds + 1):
        for build in context.builds:
            context.quiet()
            with context.guests():
                took = boot_ns(context, build, number)
            if number > 0:
                context.results.record(NAME, build.label, size="512M").add(boot_ns=took)
    for build in context.builds:
        context.say(f"{build.label}: {significant(context.results.one(NAME, build.label).figure('boot_ns') / 1e6)} ms")
        for number in range(min(3, context.rounds)):
            with context.guests():
                guest = VmcpGuest.boot(build, context.new_folder(f"memory-{number}"), "512M", LOAD, context.args.shield)
                context.stack.callback(guest.close)
                time.sleep(0.5)
                idle = host.resident_beyond_guest(guest.pid)
                guest.checkpoint()
                time.sleep(0.2)
                context.results.record(NAME, build.label, size="512M").add(
                    resident_idle_bytes=idle, resident_after_checkpoint_bytes=host.resident_beyond_guest(guest.pid))
                context.check(guest)
