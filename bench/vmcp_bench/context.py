"""What every part is given: the options, the builds, the results, and guests that end with the part."""

import contextlib
import os
import time

from . import host, loads
from .figures import parse_size, size_text
from .qemu import QemuGuest
from .vm import CommandFailed, VmcpGuest

SPARE_BYTES = 2 << 30  # memory that guests leave to the host and the page cache


class Context:
    def __init__(self, args, builds, results, folder):
        self.args, self.builds, self.results, self.folder = args, builds, results, folder
        self.rounds = args.rounds
        self.part = ""
        self.began = time.monotonic()
        self.stack = None
        self.serial = 0

    def say(self, text):
        seconds = int(time.monotonic() - self.began)
        host.say(f"{seconds // 60:4d}:{seconds % 60:02d}  {self.part:<11} {text}")

    @contextlib.contextmanager
    def running(self, part):
        """While a part runs: at its end no guest and no file of it is left, whatever happened."""
        self.part = part
        with contextlib.ExitStack() as self.stack:
            yield
        self.part = ""

    @contextlib.contextmanager
    def guests(self):
        """Guests that end before the part does: those of one load, or of one size."""
        outer = self.stack
        try:
            with contextlib.ExitStack() as self.stack:
                yield
        finally:
            self.stack = outer

    def new_folder(self, name):
        """An empty folder; it is removed with the guests around it."""
        self.serial += 1
        path = os.path.join(self.folder, f"{self.serial}-{name}".replace(" ", "-"))
        os.makedirs(path)
        self.stack.callback(host.remove, path)
        return path

    def boot(self, build, size, load, config=""):
        """A guest that is held."""
        folder = self.new_folder(f"{build.label}-{size}")
        guest = VmcpGuest.boot(build, folder, size, load, self.args.shield, config=config)
        self.stack.callback(guest.close)
        guest.hold()
        return guest

    def boot_qemu(self, size, load):
        folder = self.new_folder(f"qemu-{size}")
        guest = QemuGuest.boot(folder, size, load, self.args.shield)
        self.stack.callback(guest.close)
        guest.hold()
        return guest

    def check(self, guest):
        """Every run ends with the guest's check of itself; a guest that is not whole fails the part."""
        guest.go()
        guest.check()
        guest.hold()
        self.results.meta["checked_guests"] = self.results.meta.get("checked_guests", 0) + 1

    def quiet(self, *pids):
        host.wait_for_quiet(self.args.foreign, self.args.wait, *pids)

    def fitting(self, sizes, load, copies=None):
        """The sizes of which this host can have `copies` guests at once (default: one of each build); it says which it cannot."""
        copies = copies or len(self.builds)
        fit = []
        for size in sizes:
            need = loads.populated_bytes(load, parse_size(size)) * copies + SPARE_BYTES
            if need <= host.meminfo("MemAvailable"):
                fit.append(size)
            else:
                self.results.lacks(self.part, f"{size_text(parse_size(size))} with the load {load} needs {need / 2 ** 30:.0f} GiB of free memory, "
                                   f"this host has {host.meminfo('MemAvailable') / 2 ** 30:.0f}", what=f"{size} {load}")
        return fit

    def batches(self, sizes, load):
        """Sizes in groups, each of which fits into memory at once, so that samples of a group can be interleaved."""
        room, groups, used = host.meminfo("MemAvailable") - SPARE_BYTES, [[]], 0
        for size in self.fitting(sizes, load):
            need = loads.populated_bytes(load, parse_size(size)) * len(self.builds)
            if groups[-1] and used + need > room:
                groups.append([])
                used = 0
            groups[-1].append(size)
            used += need
        return [group for group in groups if group]

    def attempt(self, what, action, failed):
        """One of QEMU's ways, which may fail without spoiling the rest: its result, or None and the reason in `failed`."""
        try:
            return action()
        except CommandFailed as error:
            failed[what] = str(error)
            self.say(f"SKIP {what}: {error}")
            return None

    def nearest_size(self, wanted):
        """`wanted`, or the largest size of this run below it, or its smallest."""
        sizes = sorted(self.args.sizes, key=parse_size)
        return ([size for size in sizes if parse_size(size) <= parse_size(wanted)] or sizes[:1])[-1]
