"""Drives VMs of vmcp: one process each, the guest's console on pipes, everything else over the control socket (docs/control.md)."""

import glob
import itertools
import json
import os
import select
import socket
import subprocess
import sys
import time

from . import host, loads
from .figures import parse_size

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "tests", "lib"))
import vmcp_test  # noqa: E402
from guest_console import ConsoleError, GuestConsole  # noqa: E402, F401

CHECK_SECONDS = 900
FILL_SECONDS = 900
ANSWER_SECONDS = 900  # a save of 8 GiB on a slow disk takes long, but not that long


class NotInThisBuild(Exception):
    """What a part needs is not there; the text says what."""


class CommandFailed(Exception):
    """A command of vmcp or a method of its socket failed."""

    def __init__(self, what, message, code=""):
        super().__init__(f"{what}: {message}")
        self.code = code


class Build:
    """A program that is measured, and what it is called in the report."""

    def __init__(self, label, path):
        self.label, self.path = label, os.path.abspath(path)
        done = subprocess.run([self.path, "version"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CommandFailed(f"{self.path} version", done.stderr.strip() or f"exit {done.returncode}")
        self.version = done.stdout.strip()

    def command(self, store, *words, timeout=600):
        """A command with --json: its document. Failure raises CommandFailed, or NotInThisBuild for a usage that it does not know."""
        done = subprocess.run([self.path, "--store", store, "--json", *map(str, words)], stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=timeout, check=False)
        if done.returncode == 2:
            raise NotInThisBuild(f"`vmcp {' '.join(map(str, words))}`: {first_line(done.stderr)}")
        if done.returncode != 0:
            raise CommandFailed(f"vmcp {words[0]}", first_line(done.stderr))
        return json.loads(done.stdout) if done.stdout.strip() else {}


def first_line(text):
    return (text.strip().splitlines() or ["no message"])[0]


class Control:
    """A connection to a VM's socket. Requests one after the other; send() and receive() apart where something is to happen between them."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(ANSWER_SECONDS)
        folder = os.open(os.path.dirname(path), os.O_PATH)
        try:  # a socket's own path may be too long
            self.socket.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
        finally:
            os.close(folder)
        self.lines = self.socket.makefile("rb")
        self.serial = 0

    def send(self, method, **params):
        self.serial += 1
        self.method = method
        self.socket.sendall(json.dumps({"jsonrpc": "2.0", "id": self.serial, "method": method, "params": params}).encode() + b"\n")

    def receive(self):
        while True:
            try:
                line = self.lines.readline()
            except TimeoutError as error:
                raise CommandFailed(self.method, f"no answer within {ANSWER_SECONDS} s") from error
            if not line:
                raise CommandFailed(self.method, "the VM's process is gone")
            answer = json.loads(line)
            if answer.get("id") != self.serial:
                continue  # news of progress
            if "error" in answer:
                if answer["error"]["code"] == -32601:
                    raise NotInThisBuild(f"the method {self.method}")
                data = answer["error"].get("data", {})
                raise CommandFailed(self.method, answer["error"]["message"], data.get("code", ""))
            return answer["result"]

    def call(self, method, **params):
        self.send(method, **params)
        return self.receive()

    def close(self):
        self.lines.close()
        self.socket.close()


class Guest:
    """What the samplers need of a guest, whoever runs it: `tiny`, `pid`, `engine`, hold(), go() and close()."""

    def check(self):
        """The guest compares all that it has with what it must have."""
        try:
            fields = self.tiny.ask("check", "check", CHECK_SECONDS)
        except ConsoleError as error:
            raise CommandFailed(f"{self.engine}: the guest's check of itself", str(error)) from error
        if "ok" not in fields:
            raise CommandFailed(f"{self.engine}: the guest's check of itself", f"FAILED: {fields}")
        return fields


class VmcpGuest(Guest):
    """Made by boot() or start()."""

    serial = itertools.count(1)

    def __init__(self, build, store, name, process, stderr):
        self.build, self.engine, self.store, self.name = build, build.label, store, name
        self.process, self.pid, self.stderr_path = process, process.pid, stderr
        self.console = GuestConsole(process.stdout.fileno(), process.stdin.fileno(), process)
        self.tiny = vmcp_test.Tiny(self.console)
        self.control = None
        self.held = False

    @staticmethod
    def _spawn(build, store, words, safe=True):
        """`safe`: ends even if we are killed. That costs a fork that copies us, which is in the way where starting is what is measured."""
        stderr = os.path.join(os.path.dirname(store), f"stderr-{next(VmcpGuest.serial)}")
        with open(stderr, "ab") as errors:
            return host.own(subprocess.Popen([build.path, "--store", store, "run", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                                             bufsize=0, start_new_session=True, preexec_fn=host.die_with_us if safe else None)), stderr

    @classmethod
    def boot(cls, build, folder, size, load, shield=0, name="bench", config=""):
        """Boots the tiny guest in a store of its own and waits until it has filled its memory."""
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"{name}.cfg")
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"[vm]\nname = {name}\nmemory = {size}\ncpus = 1\nkernel = {os.environ['VMCP_TINY']}\n"
                       f"cmdline = {loads.words(load, parse_size(size))}\n{config}")
        store = os.path.join(folder, "store")
        process, stderr = cls._spawn(build, store, [path])
        guest = cls(build, store, name, process, stderr)
        host.shield_session(guest.pid, shield)
        try:
            guest.tiny.ready(FILL_SECONDS)
        except ConsoleError as error:
            told = guest.stderr_text()
            guest.close()
            if "supported" in told or "unknown key" in told:
                raise NotInThisBuild(first_line(told).removeprefix(f"vmcp: {path}:")) from error
            raise CommandFailed(f"{build.label}: booting a guest of {size}", first_line(told) if told.strip() else str(error)) from error
        guest.connect()
        return guest

    @classmethod
    def start(cls, build, store, checkpoint, name, shield=0, timeout=120):
        """`run --from`: the guest, and the time from before the process is made until the first byte of the guest's console, which a
        guest with `report 1` sends without an end, so that it is the first thing that shows that the guest runs."""
        began = time.monotonic_ns()
        process, stderr = cls._spawn(build, store, ["--from", checkpoint, "--name", name], safe=False)
        readable = select.select([process.stdout], [], [], timeout)[0]
        progress_ns = time.monotonic_ns() - began
        guest = cls(build, store, name, process, stderr)
        if not readable or not select.select([process.stdout], [], [], 0)[0] or process.poll() is not None:
            told = guest.stderr_text()
            guest.close()
            raise CommandFailed(f"{build.label}: run --from", first_line(told))
        host.shield_session(guest.pid, shield)
        guest.connect()
        return guest, progress_ns

    @classmethod
    def start_silent(cls, build, store, checkpoint, name, shield=0):
        """The same of a guest that says nothing by itself: when it answers, it runs."""
        process, stderr = cls._spawn(build, store, ["--from", checkpoint, "--name", name])
        guest = cls(build, store, name, process, stderr)
        host.shield_session(guest.pid, shield)
        try:
            guest.tiny.console.send_line("")
            guest.tiny.ask("status", "status", 120)
            guest.connect()
        except (ConsoleError, OSError) as error:
            told = guest.stderr_text()
            guest.close()
            raise CommandFailed(f"{build.label}: run --from", first_line(told) if told.strip() else str(error)) from error
        return guest

    def stderr_text(self):
        with open(self.stderr_path, encoding="utf-8", errors="replace") as file:
            return file.read()

    def connect(self, timeout=20):
        path = os.path.join(self.store, "vms", self.name, "control.sock")
        deadline = time.monotonic() + timeout
        while self.control is None:
            try:
                self.control = Control(path)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def hold(self):
        """Stands still: a guest never idles, and would disturb those that are measured."""
        if not self.held:
            self.control.call("vm.pause")
            self.held = True

    def go(self):
        if self.held:
            self.control.call("vm.resume")
            self.held = False

    def checkpoint(self, live=True, wait="durable", **params):
        """The result as docs/control.md has it, with the parts of the pause and of the memory beside the rest."""
        result = self.control.call("checkpoint.take", live=live, wait=wait, **params)
        if wait == "durable" and result["durability"] != "durable":
            raise CommandFailed("checkpoint.take", f"it is not durable: {result}")
        return {**result, **result["pause"], **result["memory"]}

    def revert(self, checkpoint):
        return self.control.call("vm.revert", id=checkpoint)

    def wait_durable(self, checkpoint, timeout=600):
        """Until a checkpoint that was only captured is in the store."""
        path = os.path.join(self.store, "checkpoints", checkpoint, "manifest")
        deadline = time.monotonic() + timeout
        while not os.path.exists(path):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise CommandFailed(self.engine, f"the checkpoint {checkpoint} does not become durable")
            time.sleep(0.01)
        time.sleep(0.02)  # the catalogue, and the end of the checkpoint's threads

    def discard_layers(self):
        """Nobody goes back to the checkpoints of this VM, so their memory need not take space."""
        for path in glob.glob(os.path.join(self.store, "layers", "*.mem")):
            os.unlink(path)

    def close(self):
        if self.control:
            self.control.close()
        host.end(self.process)
        self.console.close()
