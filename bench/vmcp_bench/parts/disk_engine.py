"""The disk engine without a guest: bench/disk_bench and `qemu-img bench` on the same image, the same offsets, in turns.

States of the disk: `written`, all of it has data, in the page cache; `new`, the image is empty, so that each first write to a cluster allocates; `copy-up` (vmcp
only), an overlay as a checkpoint leaves it, over the full image. 4 KiB requests go in steps that jump about the disk, as qemu-img has no random ones. A flush
comes after so many writes; qemu-img lets those under way end first, as it would else not wait for the flush, ours is one of the requests in flight. The engine is served as by a VM's I/O thread to which all processors are spare.
"""

import os
import re
import shutil
import subprocess

from .. import host
from ..figures import significant
from ..vm import CommandFailed
from .disk_io import make_full

NAME = "disk_engine"
TITLE = "the disk engine without a guest, side by side with qemu-img bench"
QEMU = "qemu-img"
MIB = 1 << 20
STEP = 37 * MIB + 20480
OVERLAY_CLUSTER = 4096  # of a checkpoint's overlay of a disk of this size


class Case:
    """op, bytes, depth; a flush after so many writes (0: none)."""

    def __init__(self, what, op, size, depth, flush=0):
        self.what, self.op, self.size, self.depth, self.flush = what, op, size, depth, flush

    def requests(self, args, state):
        count = 1000 if self.flush == 1 else 8000 if self.flush or state != "written" else 40000
        count = count // 40 if args.smoke else count
        return min(count, disk_bytes(args) // self.size)


WRITTEN = [Case(f"4 KiB {op}", op, 4096, depth) for op in ("read", "write") for depth in (1, 16, 32)]
WRITTEN += [Case("4 KiB write and flush", "write", 4096, 1, 1), Case("4 KiB write, flush after 16", "write", 4096, 16, 16)]
WRITTEN += [Case(f"1 MiB sequential {op}", op, MIB, depth) for op in ("read", "write") for depth in (1, 16)]
NEW = [case for case in WRITTEN if case.op == "write" and case.depth in (1, 16)] + [Case("512 byte write", "write", 512, 16)]


def disk_bytes(args):
    return (64 if args.smoke else 512) * MIB


def seconds(plan):
    engines = plan.builds + 1
    return disk_bytes(plan.args) / plan.disk_bytes_per_s + plan.args.rounds * engines * (len(WRITTEN) * 0.6 + 2 * len(NEW))


def run_program(argv):
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        raise CommandFailed(" ".join(map(str, argv)), done.stderr)
    return done.stdout


def step_of(case):
    return case.size if case.size >= MIB else STEP


def run_ours(path, image, case, count):
    flushes = count // case.flush if case.flush else 0
    out = run_program([path, image, f"op={case.op}", f"block={case.size}", f"depth={case.depth}", f"step={step_of(case)}", f"count={count + flushes}",
                       f"flush={case.flush}", f"spare={os.cpu_count()}"])
    return int(out.split()[1]) / 1e9


def run_qemu(image, case, count):
    write = ["-w", "--pattern", "90"] if case.op == "write" else []
    flush = [f"--flush-interval={case.flush}"] if case.flush else []
    out = run_program(["qemu-img", "bench", "-f", "qcow2", "-t", "writeback", "-i", "io_uring", "-c", count, "-d", case.depth, "-s", case.size,
                       "-S", step_of(case), *write, *flush, image])
    return float(re.search(r"in ([0-9.]+) seconds", out).group(1))


def warm_up(path, image, size):
    """Into the page cache by small reads at random, as disk_io.py does, and says why."""
    run_program([path, image, "op=read", "depth=64", f"count={2 * size // 4096}"])


def create(folder, args, *options):
    path = os.path.join(folder, "disk.qcow2")
    if os.path.exists(path):
        os.unlink(path)
    run_program(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, disk_bytes(args)])
    return path


def image_for(state, folder, full, args):
    if state == "written":
        return full
    return create(folder, args) if state == "new" else create(folder, args, "-b", full, "-F", "qcow2", "-o", f"cluster_size={OVERLAY_CLUSTER}")


def sample(context, engines, case, state, folder, full):
    count = case.requests(context.args, state)
    for label, path in engines.items():
        if state == "copy-up" and path is None:
            continue
        image = image_for(state, folder, full, context.args)
        os.sync()
        context.quiet()
        spent = run_ours(path, image, case, count) if path else run_qemu(image, case, count)
        rate = count / spent
        context.results.record(NAME, label, what=case.what, depth=case.depth, state=state).add(
            requests_per_s=rate, **({"data_bytes_per_s": rate * case.size} if case.size >= MIB else {}))


def tell(context, case, state):
    rates = [(one.engine, one.figure("requests_per_s")) for one in context.results.find(NAME, what=case.what, depth=case.depth, state=state)]
    context.say(f"{state}: {case.what}, depth {case.depth}: " + ", ".join(f"{engine} {significant(rate)} a second" for engine, rate in rates))


def run(context):
    engines = {build.label: host.program("disk_bench", build.path) for build in context.builds}
    engines = {label: path for label, path in engines.items() if path}
    for build in context.builds:
        if build.label not in engines:
            context.results.lacks(NAME, "bench/disk_bench was not built beside this vmcp", engine=build.label)
    if context.builds[0].label not in engines:
        return
    if shutil.which("qemu-img"):
        engines[QEMU] = None
        context.results.meta["qemu"] = host.qemu_version()
    else:
        context.results.lacks(NAME, "qemu-img is not installed (scripts/setup.sh bench)", engine=QEMU)
    folder = context.new_folder("disk-engine")
    full = make_full(folder, disk_bytes(context.args))
    warm_up(engines[context.builds[0].label], full, disk_bytes(context.args))
    for state, cases in (("written", WRITTEN), ("new", NEW), ("copy-up", NEW)):
        for case in cases:
            for _ in range(context.rounds):
                sample(context, engines, case, state, folder, full)
            tell(context, case, state)
