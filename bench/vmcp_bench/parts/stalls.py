"""What the host does by itself: the longest time that a thread which never idles stands still, with an idle disk and beside a plain writer, with one
processor busy and with all of them.

The gaps that a guest sees during a checkpoint are judged beside these: a machine that stops as a whole does so to every guest.
"""

import json
import os
import subprocess
import time

from .. import host
from ..figures import significant

NAME = "stalls"
TITLE = "how long the host itself stands still"
BYTES = 1 << 30
REST_SECONDS = 2


def seconds(plan):
    return (plan.args.rounds + 1) * (2 * BYTES / plan.disk_bytes_per_s + 2 * REST_SECONDS + 0.5)


def sample(path, threads, action):
    stolen = host.stolen_ns()
    watcher = host.own(subprocess.Popen([path, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=host.die_with_us))
    action()
    out, _ = watcher.communicate("", timeout=60)
    return {**json.loads(out), "stolen_ns": host.stolen_ns() - stolen}


def run(context):
    path = host.program("host_stalls")
    if not path:
        context.results.lacks(NAME, "bench/host_stalls was not built beside this vmcp")
        return
    cases = (("idle disk", 1, lambda: time.sleep(REST_SECONDS)), ("idle disk, all processors busy", os.cpu_count(), lambda: time.sleep(REST_SECONDS)),
             ("plain writer", 1, lambda: host.plain_write(context.folder, BYTES)),
             ("plain writer, all processors busy", os.cpu_count(), lambda: host.plain_write(context.folder, BYTES)))
    for number in range(context.rounds):
        context.quiet()
        for what, threads, action in cases:
            figures = sample(path, threads, action)
            context.results.record(NAME, "host", what=what).add(**figures)
            context.say(f"{what} {number + 1}/{context.rounds}: {significant(figures['gap_ns'] / 1e6)} ms")
