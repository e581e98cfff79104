"""The store itself: its log, a removal, verify and export from the page cache, and beside the export `zstd -1` on all processors, in turns on the same pages.

Histories are made by bench/store_bench, without a VM: 10,000 small checkpoints for `vmcp log`, 1,000 for a removal; in memory (/dev/shm), as each commit is synced. What
is verified and exported is one checkpoint of a guest whose memory is full of data, or whose disk is full of text; the figure is the bytes of that layer by the time of the
whole command.
"""

import os
import random
import shutil
import subprocess
import tempfile
import time

from .. import host
from ..figures import parse_size, significant
from ..vm import CommandFailed

NAME = "store"
TITLE = "the store: log, removal, verify, export"
ZSTD = "zstd -1"
LOAD = "idle"


def counts(args):
    """Of checkpoints: for the log, and for the removal."""
    return (200, 100) if args.smoke else (10000, 1000)


def seconds(plan):
    many, some = counts(plan.args)
    return (many * 0.004 + plan.args.rounds * (some * 0.004 + 7) + (3 << 30) / plan.disk_bytes_per_s + 10) * plan.builds


def new_history(context):
    """A folder in memory, where there is such a place."""
    if not os.access("/dev/shm", os.W_OK):
        return context.new_folder("history")
    path = tempfile.mkdtemp(prefix="vmcp-bench-", dir="/dev/shm")
    context.stack.callback(host.remove, path)
    return path


def make_history(path, count, folder):
    """What store_bench tells."""
    done = subprocess.run([path, os.path.join(folder, "store"), str(count)], capture_output=True, text=True, timeout=900, check=False)
    if done.returncode != 0:
        raise CommandFailed("store_bench", done.stderr.strip())
    return {name: int(value) for name, value in (word.split("=") for word in done.stdout.split())}


def timed(words, **how):
    """ns of a command whose output nobody reads."""
    began = time.monotonic_ns()
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=600, check=False, **how)
    took = time.monotonic_ns() - began
    if done.returncode != 0:
        raise CommandFailed(" ".join(words), done.stderr.decode(errors="replace").strip())
    return took


def measure_histories(context, build, program):
    many, some = counts(context.args)
    folder = new_history(context)
    told = make_history(program, many, folder)
    record = context.results.record(NAME, build.label, what=f"{many} checkpoints")
    record.add(list_ns=told["list_ns"], open_ns=told["open_ns"], commit_ns=told["commit_ns"])
    log = [build.path, "--store", os.path.join(folder, "store"), "log"]
    for _ in range(context.rounds):
        context.quiet()
        record.add(log_ns=timed(log), log_json_ns=timed([*log, "--json"]), graph_ns=timed([*log, "--graph"]))
    host.remove(folder)
    record = context.results.record(NAME, build.label, what=f"{some} checkpoints")
    for _ in range(context.rounds):
        folder = new_history(context)
        context.quiet()
        told = make_history(program, some, folder)
        record.add(**{name: told[name] for name in ("list_ns", "open_ns", "commit_ns", "remove_ns", "remove_written_bytes")})
        host.remove(folder)


def one_processor():
    """Runs in a child before exec."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def read_all(path):
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass


def make_text(path, total):
    """Words at random, which zstd makes a third of."""
    words = [bytes(random.choices(b"abcdefghijklmnopqrstuvwxyz", k=3 + number % 7)) for number in range(4000)]
    block = b" ".join(random.choices(words, weights=[1 / (1 + number) for number in range(4000)], k=3 << 20))[:16 << 20]
    with open(path, "wb") as file:
        for at in range(0, total, len(block)):
            file.write(block[:total - at])


def measure_export(context, build, guest, checkpoint, path, record):
    """Against zstd, which reads nearly the same bytes from one file."""
    zstd = shutil.which("zstd")
    if not zstd:
        context.results.lacks(NAME, "zstd is not installed (scripts/setup.sh bench)", engine=ZSTD)
    read_all(path)
    total = os.stat(path).st_blocks * 512
    for _ in range(context.rounds):
        context.quiet()
        export = timed([build.path, "--store", guest.store, "export", "-q", checkpoint, "-"])
        record.add(export_bytes_per_s=total * 1e9 / export)
        if zstd:
            plain = timed([zstd, "-1", "-T0", "-q", "-c", path])
            record.add(zstd_bytes_per_s=total * 1e9 / plain, export_to_zstd=plain / export)


def measure_memory(context, build):
    """What tiny has in its memory cannot be compressed."""
    size = context.nearest_size("1G")
    guest = context.boot(build, size, LOAD)
    guest.go()
    checkpoint = guest.checkpoint()["id"]
    guest.hold()
    layers = os.path.join(guest.store, "layers")
    path = max((os.path.join(layers, name) for name in os.listdir(layers) if name.endswith(".mem")), key=os.path.getsize)
    record = context.results.record(NAME, build.label, what="memory", size=size)
    measure_export(context, build, guest, checkpoint, path, record)
    total = os.stat(path).st_blocks * 512
    verify = [build.path, "--store", guest.store, "verify", "-q", checkpoint]
    for _ in range(context.rounds):
        context.quiet()
        record.add(verify_one_bytes_per_s=total * 1e9 / timed(verify, preexec_fn=one_processor), verify_all_bytes_per_s=total * 1e9 / timed(verify))
    context.check(guest)
    tell(context, build, record)


def measure_disk(context, build):
    size = "64M" if context.args.smoke else "512M"
    path = os.path.join(context.new_folder("text"), "text.raw")
    make_text(path, parse_size(size))
    guest = context.boot(build, "64M", "set=1M paused=1", f"[disk text]\npath = {path}\n")
    guest.go()
    checkpoint = guest.checkpoint()["id"]
    guest.hold()
    layers = os.path.join(guest.store, "layers")
    layer = next(os.path.join(layers, name) for name in os.listdir(layers) if name.endswith(".raw"))
    record = context.results.record(NAME, build.label, what="disk of text", size=size)
    measure_export(context, build, guest, checkpoint, layer, record)
    tell(context, build, record)


def tell(context, build, record):
    context.say(f"{record.case['what']} of {record.case['size']}, {build.label}: " + ", ".join(f"{what} {significant(record.figure(name) / 1e9)} GB/s" for what, name in (
        ("verify", "verify_one_bytes_per_s"), ("on all processors", "verify_all_bytes_per_s"), ("export", "export_bytes_per_s"), (ZSTD, "zstd_bytes_per_s")) if record.has(name)))


def run(context):
    for build in context.builds:
        program = host.program("store_bench", build.path)
        if program:
            measure_histories(context, build, program)
        else:
            context.results.lacks(NAME, "bench/store_bench was not built beside this vmcp", engine=build.label, what="log and removal")
        measure_memory(context, build)
        measure_disk(context, build)
