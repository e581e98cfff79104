"""What the whole-VM tests share: running vmcp, driving the tiny guest, and a runner that cannot pass by doing nothing.

A test file defines functions named test_*, each taking an Env, and ends with `vmcp_test.main(__name__)`. A function that returns has passed, one that raises
has failed; `raise Skip("why")` skips. The last line is "N passed, N failed, N skipped"; no passed test is a failure.

Environment: VMCP_BIN (the program), VMCP_TINY (tiny.elf), VMCP_TMP (where stores and images go; default: a folder below $TMPDIR).
"""

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import json_fields  # noqa: E402
from guest_console import ConsoleError, GuestConsole  # noqa: E402

MIB = 1 << 20
GENERATION_PAGE = 0xff  # of guest memory: holds the generation id, another one in each life of a VM (vmm/acpi.h)


class Skip(Exception):
    """The test cannot run here; the text says why."""


class Failed(Exception):
    """A check did not hold."""


def check(condition, text):
    if not condition:
        raise Failed(text)


def check_equal(got, want, what):
    if got != want:
        raise Failed(f"{what}: got {got!r}, want {want!r}")


@functools.lru_cache(maxsize=None)
def fields_of(vmcp_bin, command):
    """What the command's table says of its document; None: nothing."""
    done = subprocess.run([vmcp_bin, "help", command, "--json"], stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=True)
    return json.loads(done.stdout).get("json")


class CommandResult:
    def __init__(self, argv, process):
        self.argv, self.status = argv, process.returncode
        self.out, self.err = process.stdout.decode("utf-8", "replace"), process.stderr.decode("utf-8", "replace")

    @property
    def json(self):
        return json.loads(self.out)

    def __str__(self):
        return f"{' '.join(self.argv)}: exit {self.status}\nstdout: {self.out}\nstderr: {self.err}"


class Env:
    """A folder and a store of one test; everything that runs in it is ended by close()."""

    def __init__(self, name):
        self.vmcp_bin = os.environ["VMCP_BIN"]
        self.tiny = os.environ.get("VMCP_TINY", "")
        self.dir = tempfile.mkdtemp(prefix=f"vmcp-{name}-", dir=os.environ.get("VMCP_TMP"))
        self.store = os.path.join(self.dir, "store")
        self.consoles = []

    def path(self, name):
        return os.path.join(self.dir, name)

    def write(self, name, text):
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(text)
        return self.path(name)

    def vmcp(self, *args, status=0, timeout=120, env=None, store=None):
        """Runs a command of vmcp; its exit status must be `status` (None: any)."""
        argv = [self.vmcp_bin, "--store", store or self.store, *map(str, args)]
        environment = dict(os.environ, **(env or {}))
        process = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, env=environment, check=False)
        result = CommandResult(argv, process)
        check(status is None or result.status == status, f"want exit {status}: {result}")
        return result

    def vmcp_json(self, *args, complete=False, **kwargs):
        """The document, which has the fields that the command's table says; with `complete` no others."""
        result = self.vmcp("--json", *args, **kwargs)
        if result.status == 0:
            command = next(word for word in map(str, args) if not word.startswith("-"))
            fields = fields_of(self.vmcp_bin, command)
            try:
                if fields:
                    json_fields.compare(result.json, fields, complete)
            except json_fields.Mismatch as error:
                raise Failed(f"{command} --json: {error}: {result}") from error
        return result.json

    def image(self, name, size="64M", fmt="qcow2", *options):
        subprocess.run(["qemu-img", "create", "-q", "-f", fmt, *options, self.path(name), size], check=True)
        return self.path(name)

    def tiny_config(self, name="tiny", memory="256M", cpus=1, cmdline="", disks=(), extra=""):
        text = f"[vm]\nname = {name}\nmemory = {memory}\ncpus = {cpus}\nkernel = {self.tiny}\ncmdline = {cmdline}\n{extra}\n"
        for disk, file in disks:
            text += f"[disk {disk}]\npath = {file}\n"
        return self.write(f"{name}.cfg", text)

    def start_tiny(self, *args, **kwargs):
        """Boots the tiny guest in the foreground, console on pipes; waits until it is ready."""
        config = self.tiny_config(*args, **kwargs)
        return self.spawn_tiny("run", config)

    def spawn_tiny(self, *args, env=None, ready=True):
        console = GuestConsole.spawn([self.vmcp_bin, "--store", self.store, *map(str, args)], log=self.path("console.log"),
                                     stderr=open(self.path("stderr.log"), "ab"), env=dict(os.environ, **(env or {})))
        self.consoles.append(console)
        guest = Tiny(console)
        if ready:
            guest.ready()
        return guest

    def attach_tiny(self, vm):
        console = GuestConsole.spawn([self.vmcp_bin, "--store", self.store, "console", vm], log=self.path("console.log"))
        self.consoles.append(console)
        return Tiny(console)

    def stderr_text(self):
        try:
            with open(self.path("stderr.log"), encoding="utf-8", errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def close(self, keep):
        if os.path.isdir(self.store):
            for vm in self.vmcp_json("ps", status=None).get("vms", []):
                if vm["pid"]:
                    self.vmcp("kill", vm["name"], status=None)
        for console in self.consoles:
            console.close()
        if not keep:
            shutil.rmtree(self.dir, ignore_errors=True)


class Tiny:
    """The tiny guest's line protocol (examples/tiny/README.md)."""

    def __init__(self, console):
        self.console = console

    def ready(self, timeout=60):
        return self.line("ready", timeout)

    def line(self, word, timeout=60):
        """Waits for a line `tiny: WORD key=value ...` and returns its fields; what stands alone has the value ''."""
        pattern = re.compile(rb"tiny: (" + word.encode() + rb")([^\r\n]*)\r*\n")
        _, match = self.console._wait_match(pattern, timeout, f"a line 'tiny: {word}'")
        return dict(([*field.split("=", 1), ""])[:2] for field in match.group(2).decode().split())

    def ask(self, command, word, timeout=60):
        self.console.send_line("\n" + command)
        return self.line(word, timeout)

    def check(self, timeout=120):
        """The guest checks all of its memory and disk; anything but ok is a failure."""
        fields = self.ask("check", "check", timeout)
        check("ok" in fields, f"the guest's check of itself failed: {fields}")
        return fields

    def set(self, command, timeout=60):
        self.console.send_line("\n" + command)
        return self.line("ok", timeout)

    def epoch(self, number):
        """A new epoch: after a revert the guest must not make the same choices again."""
        self.set(f"epoch {number}")

    def sum(self):
        return self.ask("sum", "sum")


class Control:
    """A connection to a running VM's control socket, for what is too fast for a command each: JSON-RPC 2.0, one document a line."""

    def __init__(self, store, vm):
        self.socket = socket.socket(socket.AF_UNIX)
        folder = os.open(os.path.join(store, "vms", vm), os.O_RDONLY)
        try:
            self.socket.connect(f"/proc/self/fd/{folder}/control.sock")  # a socket's path may have 107 bytes only
        finally:
            os.close(folder)
        self.lines = self.socket.makefile("rwb")
        self.number = 0

    def call(self, method, **params):
        self.number += 1
        self.lines.write(json.dumps({"jsonrpc": "2.0", "id": self.number, "method": method, "params": params}).encode() + b"\n")
        self.lines.flush()
        while True:
            line = self.lines.readline()
            check(line, f"{method}: the VM's process closed the connection")
            answer = json.loads(line)
            if answer.get("id") == self.number:
                check("error" not in answer, f"{method}: {answer}")
                return answer["result"]

    def close(self):
        self.lines.close()
        self.socket.close()


def run_one(name, function):
    started = time.monotonic()
    env = Env(name)
    outcome = "failed"
    try:
        function(env)
        outcome = "passed"
        print(f"ok {name} ({time.monotonic() - started:.1f} s)", flush=True)
    except Skip as why:
        outcome = "skipped"
        print(f"SKIP {name}: {why}", flush=True)
    except Exception as error:  # a test's failure must not end the others
        print(f"FAIL {name} ({time.monotonic() - started:.1f} s): {error}", flush=True)
        if not isinstance(error, (Failed, ConsoleError)):
            traceback.print_exc(file=sys.stdout)
        stderr = env.stderr_text()
        if stderr:
            print("  stderr of vmcp:\n    " + stderr.strip()[-2000:].replace("\n", "\n    "), flush=True)
        print(f"  kept: {env.dir}", flush=True)
    finally:
        try:
            env.close(keep=outcome == "failed")
        except Exception as error:
            print(f"FAIL {name}: while ending it: {error}", flush=True)
            outcome = "failed"
    return outcome


def main(module_name):
    module = sys.modules[module_name]
    names = [name for name in vars(module) if name.startswith("test_")]
    wanted = sys.argv[1:]
    if wanted:
        names = [name for name in names if any(word in name for word in wanted)]
    outcomes = [run_one(name, getattr(module, name)) for name in names]
    counts = [outcomes.count(kind) for kind in ("passed", "failed", "skipped")]
    print(f"{counts[0]} passed, {counts[1]} failed, {counts[2]} skipped", flush=True)
    if counts[0] == 0:
        print("no test passed: a suite that ran nothing fails", flush=True)
    sys.exit(1 if counts[1] or counts[0] == 0 else 0)
