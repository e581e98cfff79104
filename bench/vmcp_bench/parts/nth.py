"""The first checkpoint of a VM's life, and those after it up to the tenth: what having a history costs."""

import time

from ..figures import significant
from ..sample import quiet_window, told

NAME = "nth"
TITLE = "the first and the tenth checkpoint of one VM"
COUNT = 10
LOAD = "set=128M mode=uniform rate=10000"


def count_of(args):
    return 2 if args.smoke else COUNT


def rounds_of(args):
    return max(1, args.rounds // 4)


def seconds(plan):
    return (rounds_of(plan.args) * (3 + count_of(plan.args) * 1.2)) * plan.builds


def run(context):
    size = context.nearest_size("1G")
    for number in range(1, rounds_of(context.args) + 1):
        for build in context.builds:
            with context.guests():
                guest = context.boot(build, size, LOAD)
                guest.go()
                for nth in range(1, count_of(context.args) + 1):
                    time.sleep(0.1)
                    taken = quiet_window(context.args, guest, guest.checkpoint)
                    context.results.record(NAME, build.label, size=size, nth=nth).add(gap_ns=taken["gap"]["max_ns"], **told(taken["result"]))
                context.say(f"{size} {number}/{rounds_of(context.args)} {build.label}: the last one's pause {significant(taken['result']['pause_ns'] / 1e6)} ms")
                context.check(guest)
