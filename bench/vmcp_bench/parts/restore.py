"""From the start of the process to the first sign of life of a guest that comes from a file: `vmcp run --from` and QEMU's -incoming.

The guest was saved while it sent its status line over and over, one byte at a time; so the first byte on its console is the first thing that it does
that can be seen from outside. The page cache is warm (the files were just read) or cold (it was just emptied).
"""

import glob
import os
import subprocess
import time

from .. import host
from ..figures import parse_size, significant
from ..qemu import QemuGuest
from ..vm import VmcpGuest

NAME = "restore"
TITLE = "start to the first guest progress"
LOAD = "hot"
SETTLE_SECONDS = 0.5


def sizes_of(args):
    return [size for size in args.sizes if parse_size(size) <= 8 << 30]


def rounds_of(args, size, engine):
    return max(1, args.rounds // 4) if engine == "QEMU" and parse_size(size) > 256 << 20 else args.rounds


def seconds(plan):
    total = 0.0
    for size in sizes_of(plan.args):
        data = parse_size(size)
        total += (data / (120 << 20) * 2 + data / plan.disk_bytes_per_s * 2 + plan.args.rounds * 2 * (2 + data / plan.disk_bytes_per_s * 2)) * plan.builds
        total += data / (80 << 20) + rounds_of(plan.args, size, "QEMU") * 2 * (data / plan.disk_bytes_per_s * 2 + 2)
    return total


def warm(paths):
    """Reads files, and so brings them into the page cache."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(8 << 20):
                pass


def prepare(paths, state):
    """False where this host does not let us empty the page cache."""
    if state == "cold":
        return host.drop_caches()
    warm(paths)
    return True


class Saved:
    """A saved guest that can be started as often as one likes."""

    def __init__(self, engine, paths, start, program):
        self.engine, self.paths, self.start, self.program = engine, paths, start, program

    def program_ns(self):
        """What the host takes to load the program and let it say its version: no start from a file is shorter."""
        began = time.monotonic_ns()
        subprocess.run(self.program, stdout=subprocess.DEVNULL, check=True)
        return time.monotonic_ns() - began


def save_vmcp(context, build, size):
    """The VM that was saved is gone afterwards; its store stays."""
    folder = context.new_folder(f"{build.label}-{size}")
    guest = VmcpGuest.boot(build, folder, size, LOAD, context.args.shield)
    try:
        guest.tiny.ask("report 1", "ok")
        taken = guest.checkpoint(full=True)
    finally:
        guest.close()
    numbers = iter(range(1, 1 << 30))
    paths = [*glob.glob(os.path.join(guest.store, "layers", "*")), *glob.glob(os.path.join(guest.store, "checkpoints", "*", "*"))]
    return Saved(build.label, paths, lambda: VmcpGuest.start(build, guest.store, taken["id"], f"again{next(numbers)}", context.args.shield),
                 [build.path, "version"])


def save_qemu(context, size):
    folder = context.new_folder(f"qemu-{size}")
    guest = QemuGuest.boot(folder, size, LOAD, context.args.shield)
    try:
        guest.tiny.ask("report 1", "ok")
        # Its memory as it is, of a running VM: what was saved of a stopped one would wait for a command.
        guest.background_snapshot()
    finally:
        guest.close()
    saved = os.path.join(folder, "saved")
    numbers = iter(range(1, 1 << 30))
    return Saved("QEMU", [saved], lambda: QemuGuest.incoming(os.path.join(folder, f"again{next(numbers)}"), size, LOAD, saved), ["qemu-system-x86_64", "--version"])


def sample(context, one, size, state, last):
    if not prepare(one.paths, state):
        context.results.lacks(NAME, "the page cache cannot be emptied without root", engine=one.engine, what="cold")
        return
    context.quiet()
    program_ns = one.program_ns()
    prepare(one.paths, state)
    guest, progress_ns = one.start()
    try:
        guest.tiny.ask("report 0", "ok", 120)
        guest.tiny.ask("status", "status", 120)
        time.sleep(SETTLE_SECONDS)
        settled = int(guest.tiny.ask("status", "status", 120)["writes_per_s"])
        if last:
            guest.check()
            context.results.meta["checked_guests"] = context.results.meta.get("checked_guests", 0) + 1
    finally:
        guest.close()
    context.results.record(NAME, one.engine, size=size, cache=state).add(progress_ns=progress_ns, program_ns=program_ns, first_half_second_writes_per_s=settled)
    context.say(f"{size} {state} {one.engine}: {significant(progress_ns / 1e6)} ms")


def run(context):
    for size in context.fitting(sizes_of(context.args), LOAD, 1):
        with context.guests():
            saved = [save_vmcp(context, build, size) for build in context.builds]
            if host.qemu_version():
                saved.append(save_qemu(context, size))
            for state in ("warm", "cold"):
                for number in range(1, context.rounds + 1):
                    for one in saved:
                        most = rounds_of(context.args, size, one.engine)
                        if number <= most:
                            sample(context, one, size, state, number == most)
