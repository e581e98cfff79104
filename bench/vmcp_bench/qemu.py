"""The same guest file under Debian's QEMU, and QEMU's own ways to save a VM, by QMP."""

import json
import os
import select
import socket
import subprocess
import time

from . import host, loads
from .figures import parse_size
from .vm import FILL_SECONDS, CommandFailed, Guest
from .vm import ConsoleError, GuestConsole, vmcp_test

# What is given up: a live migration of a guest that writes faster than it is saved goes on for ever.
SAVE_SECONDS = 60


class DoesNotEnd(Exception):
    """The save did not end in SAVE_SECONDS, and was cancelled."""


# How the host's page cache is used for a disk: words for -blockdev.
CACHES = {"none": "cache.direct=on", "writeback": "cache.direct=off"}


def argv(size, cmdline, folder, disk=None, cache="none"):
    """The VM's only disk: `disk`, with a thread of its own, or the one that make_image() has made."""
    device = ["-object", "iothread,id=io", "-device", "virtio-blk-pci,drive=state,iothread=io"] if disk else ["-device", "virtio-blk-pci,drive=state"]
    return ["qemu-system-x86_64", "-accel", "kvm", "-m", size.upper(), "-nodefaults", "-nographic", "-no-reboot", "-kernel", os.environ["VMCP_TINY"],
            "-append", cmdline, "-serial", "stdio", "-qmp", f"unix:{folder}/qmp,server=on,wait=off",
            "-blockdev", f"driver=file,node-name=file,filename={disk or f'{folder}/state.qcow2'},{CACHES[cache]},aio=io_uring",
            "-blockdev", f"driver=qcow2,node-name=state,file=file,{CACHES[cache]}", *device]


def make_image(folder, size):
    """For snapshot-save: the VM's only disk, on which its memory is stored."""
    os.makedirs(folder, exist_ok=True)
    room = parse_size(size) + (1 << 30)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", f"{folder}/state.qcow2", str(room)], check=True)


class QemuGuest(Guest):
    """Made by boot() or incoming()."""

    engine = "QEMU"

    def __init__(self, folder, process):
        self.folder, self.process, self.pid = folder, process, process.pid
        self.state = os.path.join(folder, "saved")
        self.console = GuestConsole(process.stdout.fileno(), process.stdin.fileno(), process)
        self.tiny = vmcp_test.Tiny(self.console)
        self.socket, self.lines, self.held, self.jobs = None, None, False, 0

    @staticmethod
    def _spawn(words, folder, safe=True):
        with open(os.path.join(folder, "stderr"), "ab") as errors:
            return host.own(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0, start_new_session=True,
                                             preexec_fn=host.die_with_us if safe else None))

    @classmethod
    def boot(cls, folder, size, load, shield=0, disk=None, cache="none", devices=()):
        if not disk:
            make_image(folder, size)
        guest = cls(folder, cls._spawn([*argv(size, loads.words(load, parse_size(size)), folder, disk, cache), *devices], folder))
        host.shield_session(guest.pid, shield)
        try:
            guest.tiny.ready(FILL_SECONDS)
        except ConsoleError as error:
            guest.close()
            raise CommandFailed("QEMU: boot", guest.stderr_text() or str(error)) from error
        guest.connect()
        return guest

    @classmethod
    def incoming(cls, folder, size, load, saved, timeout=120):
        """-incoming from a file: the guest, and the time from before the process is made to the first byte of its console (VmcpGuest.start)."""
        make_image(folder, size)
        words = [*argv(size, loads.words(load, parse_size(size)), folder), "-incoming", f"exec:cat {saved}"]
        began = time.monotonic_ns()
        process = cls._spawn(words, folder, safe=False)
        readable = select.select([process.stdout], [], [], timeout)[0]
        progress_ns = time.monotonic_ns() - began
        guest = cls(folder, process)
        if not readable or process.poll() is not None:
            guest.close()
            raise CommandFailed("QEMU: -incoming", guest.stderr_text())
        guest.connect()
        return guest, progress_ns

    def stderr_text(self):
        with open(os.path.join(self.folder, "stderr"), encoding="utf-8", errors="replace") as file:
            return file.read()

    def connect(self):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(os.path.join(self.folder, "qmp"))
        self.lines = self.socket.makefile("rw", encoding="utf-8")
        self.lines.readline()
        self.qmp("qmp_capabilities")

    def qmp(self, command, **arguments):
        self.lines.write(json.dumps({"execute": command, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}) + "\n")
        self.lines.flush()
        while True:
            line = self.lines.readline()
            if not line:
                raise CommandFailed(f"QEMU: {command}", "it is gone")
            answer = json.loads(line)
            if "error" in answer:
                raise CommandFailed(f"QEMU: {command}", answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]

    def hold(self):
        if not self.held:
            self.qmp("stop")
            self.held = True

    def go(self):
        if self.held:
            self.qmp("cont")
            self.held = False

    # --- QEMU's ways; each returns the bytes that it wrote and what it calls its downtime, or raises DoesNotEnd

    def migrate(self, background):
        self.qmp("migrate-set-capabilities", capabilities=[{"capability": "background-snapshot", "state": background}])
        self.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
        self.qmp("migrate", uri=f"exec:cat >{self.state}")
        deadline, cancelled = time.monotonic() + SAVE_SECONDS, False
        while True:
            status = self.qmp("query-migrate")
            if status["status"] == "completed":
                return {"written_bytes": os.path.getsize(self.state), "pause_ns": status.get("downtime", 0) * 1_000_000 or None}
            if status["status"] == "cancelled":
                raise DoesNotEnd(f"not done after {SAVE_SECONDS} s: the guest writes faster than it is saved")
            if status["status"] == "failed":
                raise CommandFailed("QEMU: migrate", status.get("error-desc", "failed"))
            if time.monotonic() > deadline and not cancelled:
                self.qmp("migrate_cancel")
                cancelled = True
            time.sleep(0.005)

    def background_snapshot(self):
        return self.migrate(True)

    def migrate_live(self):
        """The guest runs while memory is saved, again and again where it was written, and stands at the end, until it is told to go on."""
        done = self.migrate(False)
        self.qmp("cont")
        return done

    def stop_and_migrate(self):
        self.qmp("stop")
        try:
            done = self.migrate(False)
        finally:
            self.qmp("cont")
        return {**done, "pause_ns": None}

    def snapshot_save(self):
        before = host.written_bytes(self.pid)
        self.job("snapshot-save", tag="bench", vmstate="state", devices=["state"])
        return {"written_bytes": (host.written_bytes(self.pid) or 0) - (before or 0), "pause_ns": None}

    def job(self, command, **arguments):
        self.jobs += 1
        name = f"job{self.jobs}"
        self.qmp(command, job_id=name, **arguments)
        while True:
            job = next(one for one in self.qmp("query-jobs") if one["id"] == name)
            if job["status"] == "concluded":
                self.qmp("job-dismiss", id=name)
                if job.get("error"):
                    raise CommandFailed(f"QEMU: {command}", job["error"])
                return
            time.sleep(0.005)

    def discard(self):
        """What the last save made, outside of what is measured."""
        if os.path.exists(self.state):
            os.unlink(self.state)

    def discard_snapshot(self):
        self.job("snapshot-delete", tag="bench", devices=["state"])

    def close(self):
        if self.socket:
            self.lines.close()
            self.socket.close()
        host.end(self.process)
        self.console.close()


WAYS = {"background-snapshot": QemuGuest.background_snapshot, "migrate live": QemuGuest.migrate_live,
        "stop+migrate": QemuGuest.stop_and_migrate, "snapshot-save": QemuGuest.snapshot_save}
