"""The guest's disk: vmcp and QEMU's virtio-blk, the same guest with the same driver on copies of the same image, in turns.

States of the disk: `written`, all of it has data; `new`, the image is empty, so that each first write to a cluster allocates; `copy-up` (vmcp only), the
first writes after a checkpoint of a disk that is full of data. Requests at random never come to the same 4 KiB twice before all were visited.
"""

import os
import subprocess

from .. import host
from ..figures import significant
from ..qemu import CACHES, QemuGuest
from ..vm import CommandFailed

NAME = "disk_io"
TITLE = "the guest's disk, side by side with QEMU"
LOAD = "set=4M paused=1 bench=1"
MEMORY = "128M"
MIB = 1 << 20
PAGE = 4096
# What, kind for the guest, bytes, depth.
CASES = (("4 KiB read", "read", 4096, 1), ("4 KiB read", "read", 4096, 32), ("4 KiB write", "write", 4096, 1), ("4 KiB write", "write", 4096, 32),
         ("1 MiB sequential read", "seqread", MIB, 4), ("1 MiB sequential write", "seqwrite", MIB, 4), ("4 KiB write and flush", "sync", 4096, 1))
# In sequence first: of what is visited at random later only a few clusters lie there.
NEW_CASES = (CASES[5], CASES[2], CASES[3], CASES[6])
NEW_BYTES = 8 << 30
NEW_REQUESTS = {"seqwrite": 256, "write": 6000, "sync": 400}


def disk_bytes(args):
    return (64 if args.smoke else 512) * MIB


def milliseconds(args):
    return 50 if args.smoke else 700


def seconds(plan):
    engines = plan.builds + len(CACHES)
    fill = disk_bytes(plan.args) * (engines + 1) / plan.disk_bytes_per_s
    each = engines * (len(CASES) * (milliseconds(plan.args) / 1e3 + 0.3) + len(NEW_CASES) + 2)
    return fill + (plan.args.rounds + 1) * each


def make_full(folder, size):
    """An image full of data, not in the page cache."""
    path = os.path.join(folder, "full.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)], check=True)
    commands = [word for at in range(0, size, 64 * MIB) for word in ("-c", f"write -q -P 0 {at} {64 * MIB}")]
    subprocess.run(["qemu-io", "-n", *commands, path], check=True, stdout=subprocess.DEVNULL)
    return path


def copy_of(full, folder):
    path = os.path.join(folder, "disk.qcow2")
    subprocess.run(["cp", "--reflink=never", full, path], check=True)
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return path


def new_image(folder):
    path = os.path.join(folder, "disk.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(NEW_BYTES)], check=True)
    return path


def fill_page_cache(paths):
    """In single pages, as an advice reads them: what is read ahead in sequence lies there in units so large that a small write to them takes ext4 ten times as
    long, whoever writes. And a piece of each image in turn, so that their pages lie equally well in memory: of two images that were read at random and one after
    the other the second one was then read up to 1.26 times as fast, whoever read."""
    fds = [os.open(path, os.O_RDONLY) for path in paths]
    sizes = [os.fstat(fd).st_size for fd in fds]
    for at in range(0, max(sizes), MIB):
        for fd in fds:
            os.posix_fadvise(fd, at, MIB, os.POSIX_FADV_WILLNEED)
    for fd, size in zip(fds, sizes):
        for at in range(0, size, PAGE):  # the reads have ended
            os.pread(fd, 1, at)
        os.close(fd)


def boot(context, build, image):
    return context.boot(build, MEMORY, LOAD, config=f"[disk root]\npath = {image}\n")


def boot_all(context, make_image, fill=False):
    """A guest of each build and of QEMU with each cache mode; all held. `fill`: the images of those that use the page cache are in it."""
    caches = CACHES if context.results.meta.get("qemu") else ()
    images = {label: make_image(context.new_folder(f"{label}-disk")) for label in [*(build.label for build in context.builds), *(f"QEMU {cache}" for cache in caches)]}
    if fill:
        fill_page_cache([path for label, path in images.items() if label != "QEMU none"])
    guests = {build.label: boot(context, build, images[build.label]) for build in context.builds}
    for cache in caches:
        path = images[f"QEMU {cache}"]
        guest = QemuGuest.boot(os.path.dirname(path), MEMORY, LOAD, context.args.shield, disk=path, cache=cache)
        context.stack.callback(guest.close)
        guest.hold()
        guests[f"QEMU {cache}"] = guest
    return guests


def sample(context, guest, case, requests):
    """Requests a second."""
    _, kind, size, depth = case
    os.sync()
    context.quiet(guest.pid)
    guest.go()
    try:
        fields = guest.tiny.ask(f"bench {kind} {size} {depth} {requests} {milliseconds(context.args) if requests > MIB else 60000}", "bench", 300)
    finally:
        guest.hold()
    done = {key: int(fields[key]) for key in ("requests", "ns", "errors", "wrong")}
    if done["errors"] or done["wrong"] or not done["requests"]:
        raise CommandFailed(f"{guest.engine}: the guest's disk", str(fields))
    return done["requests"] * 1e9 / done["ns"]


def take(context, label, guest, case, state, number, requests=1 << 40):
    what, _, size, depth = case
    rate = sample(context, guest, case, requests)
    if number > 0:
        record = context.results.record(NAME, label, what=what, depth=depth, state=state)
        record.add(requests_per_s=rate, **({"data_bytes_per_s": rate * size} if size >= MIB else {}))


def tell(context, number, state):
    for one in context.results.find(NAME, state=state):
        context.say(f"{state} {number}/{context.rounds}: {one.case['what']}, depth {one.case['depth']}, {one.engine}: "
                    f"{significant(one.samples['requests_per_s'][-1])} a second")


def run_written(context, full):
    with context.guests():
        guests = boot_all(context, lambda folder: copy_of(full, folder), fill=True)
        for number in range(context.rounds + 1):
            for case in CASES:
                for label, guest in guests.items():
                    take(context, label, guest, case, "written", number)
        tell(context, context.rounds, "written")
        for guest in guests.values():
            context.check(guest)


def run_new(context):
    for number in range(1, context.rounds + 1):
        with context.guests():
            guests = boot_all(context, new_image)
            for case in NEW_CASES:
                for label, guest in guests.items():
                    take(context, label, guest, case, "new", number, NEW_REQUESTS[case[1]] // (10 if context.args.smoke else 1))
            for guest in guests.values():
                context.check(guest)
    tell(context, context.rounds, "new")


def run_copy_up(context, full):
    with context.guests():
        images = {build.label: copy_of(full, context.new_folder(f"{build.label}-copy-up")) for build in context.builds}
        fill_page_cache(list(images.values()))
        guests = {build.label: boot(context, build, images[build.label]) for build in context.builds}
        for number in range(context.rounds + 1):
            for case in NEW_CASES[1:]:
                for label, guest in guests.items():
                    guest.go()
                    guest.checkpoint()
                    guest.hold()
                    take(context, label, guest, case, "copy-up", number, NEW_REQUESTS[case[1]] // (10 if context.args.smoke else 1))
        tell(context, context.rounds, "copy-up")
        for guest in guests.values():
            context.check(guest)


def run(context):
    context.results.meta["qemu"] = host.qemu_version()
    if not context.results.meta["qemu"]:
        context.results.lacks(NAME, "qemu-system-x86_64 is not installed (scripts/setup.sh bench)", engine="QEMU")
    folder = context.new_folder("full")
    full = make_full(folder, disk_bytes(context.args))
    run_written(context, full)
    run_new(context)
    run_copy_up(context, full)
