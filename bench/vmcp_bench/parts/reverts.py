"""Reverts in place, over the control socket, by one client that waits for each: how long one takes by the number of pages, and how many a second."""

import time

from ..figures import significant

NAME = "reverts"
TITLE = "reverts in place"
PAGES = (16, 256, 4096)
TURNS = 5  # in which the samples of one case are taken, so that builds take turns
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


class Subject:
    """A guest at its checkpoint, and how long it needs to write all of its pages."""

    def __init__(self, context, build, size, pages):
        # All of so small a set is written over and over, one page after the other.
        self.guest = context.boot(build, size, f"set={pages * 4}K mode=seq")
        self.record = context.results.record(NAME, build.label, size=size, pages=pages)
        self.guest.go()
        self.checkpoint = self.guest.checkpoint()["id"]
        self.wait = find_wait(self.guest, self.checkpoint, pages)
        self.guest.hold()

    def sample(self, count):
        self.guest.go()
        for took, revert_ns, restored in revert_all(self.guest, self.checkpoint, count, self.wait):
            self.record.add(client_ns=took, revert_ns=revert_ns, restored_pages=restored)
        began = time.monotonic()
        told = revert_all(self.guest, self.checkpoint, count, 0)
        self.record.add(back_to_back_per_s=count / (time.monotonic() - began))
        for _, _, restored in told:
            self.record.add(back_to_back_pages=restored)
        self.guest.hold()

    def check(self, context):
        self.guest.go()
        self.guest.tiny.console.send_line("")  # ends what may be half a command
        self.guest.tiny.epoch(1)
        context.check(self.guest)


def run(context):
    size = context.nearest_size("1G")
    for pages in PAGES:
        with context.guests():
            subjects = [Subject(context, build, size, pages) for build in context.builds]
            turns = min(TURNS, count_of(context.args, pages))
            for _ in range(turns):
                for subject in subjects:
                    context.quiet(subject.guest.pid)
                    subject.sample(-(-count_of(context.args, pages) // turns))
            for subject in subjects:
                record = subject.record
                context.say(f"{pages} pages {record.engine}: {significant(record.figure('revert_ns') / 1e6)} ms, {record.figure('back_to_back_per_s'):.0f} a "
                            f"second of {record.figure('back_to_back_pages'):.0f} pages back to back")
                subject.check(context)
