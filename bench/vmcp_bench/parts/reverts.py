"""Reverts in place, over the control socket, by one client that waits for each: how long one takes by the number of pages, and how many a second."""

import time

from ..figures import significant

NAME = "reverts"
TITLE = "reverts in place"
PAGES = (16, 256, 4096)
FAULT_SECONDS = 60e-6  # what a guest may need for the first write to a page, about


def count_of(args, pages):
    if args.smoke:
        return 2
    return {16: 15, 256: 10}.get(pages, 2) * args.rounds


def seconds(plan):
    return sum(3 + count_of(plan.args, pages) * (pages * FAULT_SECONDS * 1.3 + 0.004) * 2 for pages in PAGES) * plan.builds


def revert_all(guest, checkpoint, count, wait):
    """`count` reverts, `wait` seconds for the guest to write before each. For each: the client's time, vmcp's time and the pages."""
    told = []
    for _ in range(count):
        if wait > 0:
            time.sleep(wait)
        began = time.monotonic_ns()
        result = guest.revert(checkpoint)
        told.append((time.monotonic_ns() - began, result["revert_ns"], result["restored_pages"]))
    return told


def find_wait(guest, checkpoint, pages):
    """How long the guest needs to write all of its pages after a revert."""
    wait = pages * FAULT_SECONDS
    while wait < 5:
        told = revert_all(guest, checkpoint, 4, wait)
        if min(restored for _, _, restored in told) >= pages:
            return wait
        wait *= 1.5
    raise RuntimeError(f"the guest does not write {pages} pages in {wait:.1f} s after a revert")


def run(context):
    size = context.nearest_size("1G")
    guests = {}
    for pages in PAGES:
        for build in context.builds:
            # All of so small a set is written over and over, one page after the other.
            guests[pages, build] = context.boot(build, size, f"set={pages * 4}K mode=seq")
    for (pages, build), guest in guests.items():
        record = context.results.record(NAME, build.label, size=size, pages=pages)
        context.quiet(guest.pid)
        guest.go()
        checkpoint = guest.checkpoint()["id"]
        wait = find_wait(guest, checkpoint, pages)
        count = count_of(context.args, pages)
        for took, revert_ns, restored in revert_all(guest, checkpoint, count, wait):
            record.add(client_ns=took, revert_ns=revert_ns, restored_pages=restored)
        began = time.monotonic()
        told = revert_all(guest, checkpoint, count, 0)
        record.add(back_to_back_per_s=count / (time.monotonic() - began))
        for _, _, restored in told:
            record.add(back_to_back_pages=restored)
        guest.tiny.console.send_line("")  # ends what may be half a command
        guest.tiny.epoch(1)
        guest.hold()
        context.say(f"{pages} pages {build.label}: {significant(record.figure('revert_ns') / 1e6)} ms, {record.figure('back_to_back_per_s'):.0f} a second "
                    f"of {record.figure('back_to_back_pages'):.0f} pages back to back")
        context.check(guest)
