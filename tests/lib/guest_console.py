"""Drives a shell on a guest's serial console. Python's standard library only.

    with GuestConsole.spawn(["vmcp", "run", "guest.cfg"]) as guest:
        guest.wait_for("vmcp-guest ready", timeout=60)
        status, output = guest.run("sha256sum /root/file", timeout=10)
        guest.send("poweroff -f\\n")
        guest.wait_exit(timeout=20)

A console is a stream of bytes on which the guest's kernel, our own echo and the command's output mix.
run() therefore encloses the output in markers that carry a number never used before, and sends them in
a spelling (quotes inside) that the echo shows but the shell's output does not: whether the terminal echoes, wraps or colours makes no difference.

Everything received is kept in `transcript` (bytes) and, if asked, written to a log file as it comes.
Not thread-safe. Carriage returns are removed from what wait_for() and run() give back.

As a program, to try things by hand or from a shell script:

    guest_console.py [--timeout S] [--log FILE] [--run CMD]... [--poweroff] -- COMMAND...
    guest_console.py [--timeout S] [--log FILE] [--run CMD]... --socket PATH

starts COMMAND, or connects to a UNIX socket, waits for the ready marker (on a socket: for an answer to a newline), runs each CMD, prints its output,
and exits with the status of the first CMD that failed; 125 if the console itself failed.
"""

import argparse
import errno
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
import tty

READY = "vmcp-guest ready"
MATCH_BYTES = 4096  # no marker is longer


class ConsoleError(Exception):
    """Something went wrong with the console; the message ends with what it showed last."""


class ConsoleTimeout(ConsoleError):
    """What was waited for did not come in time."""


class ConsoleClosed(ConsoleError):
    """The other side is gone: the process ended or the socket was closed."""


class GuestConsole:
    """One console. Made by spawn(), spawn_pty() or connect(), not directly."""

    def __init__(self, read_fd, write_fd, process=None, log=None, keep=None):
        self.process = process      # subprocess.Popen, or None on a socket
        self.transcript = bytearray()
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._keep = keep           # the socket object that owns both descriptors
        self._seen = 0              # the transcript is consumed up to here
        self._closed = False
        self._serial = 0
        self._log = open(log, "ab", buffering=0) if log else None
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)

    # --- making one

    @classmethod
    def spawn(cls, argv, log=None, stderr=None, **popen):
        """Starts a process whose stdin and stdout are the console, over pipes."""
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                                   bufsize=0, start_new_session=True, **popen)
        return cls(process.stdout.fileno(), process.stdin.fileno(), process, log)

    @classmethod
    def spawn_pty(cls, argv, log=None, **popen):
        """The same over a pseudo-terminal in raw mode, for programs that treat a terminal differently."""
        leader, follower = pty.openpty()
        tty.setraw(follower)
        process = subprocess.Popen(argv, stdin=follower, stdout=follower, stderr=follower,
                                   start_new_session=True, **popen)
        os.close(follower)
        return cls(leader, os.dup(leader), process, log)

    @classmethod
    def connect(cls, path, timeout=10, log=None):
        """Connects to a UNIX socket, which may appear within `timeout` seconds. Follow it with sync()."""
        deadline = time.monotonic() + timeout
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(path)
                return cls(sock.fileno(), sock.fileno(), None, log, keep=sock)
            except (FileNotFoundError, ConnectionRefusedError) as error:
                sock.close()
                if time.monotonic() >= deadline:
                    raise ConsoleTimeout(f"no console at {path}: {error.strerror}") from error
                time.sleep(0.02)

    # --- bytes

    def send(self, data, timeout=30):
        """Sends str or bytes as they are. While the guest does not take them, output goes on being read."""
        data = memoryview(data.encode() if isinstance(data, str) else data)
        deadline = time.monotonic() + timeout
        while data:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ConsoleTimeout(self._tell(f"the guest took no input for {timeout} s"))
            readers = [] if self._closed else [self._read_fd]
            readable, writable, _ = select.select(readers, [self._write_fd], [], left)
            if readable:
                self._receive()
            if writable:
                try:
                    data = data[os.write(self._write_fd, data):]
                except BlockingIOError:
                    pass
                except OSError as error:
                    raise ConsoleClosed(self._tell(f"cannot write: {error.strerror}")) from error

    def send_line(self, line, timeout=30):
        self.send(line + "\n", timeout)

    def poll(self, seconds=0):
        """Reads what comes within `seconds` and returns all that is not consumed yet, without consuming it."""
        deadline = time.monotonic() + seconds
        while not self._closed and self._wait_readable(max(0, deadline - time.monotonic())):
            self._receive()
        return self._clean(self.transcript[self._seen:])

    def wait_for(self, marker, timeout=60):
        """Waits until `marker` (a str, or a compiled regular expression over bytes) is seen.

        Consumes the transcript through the marker and returns the text before it. Raises ConsoleTimeout, or ConsoleClosed if the guest ended first."""
        before, _ = self._wait_match(self._pattern(marker), timeout, repr(marker))
        return before

    # --- the shell

    def run(self, command, timeout=60):
        """Runs a shell command and returns (exit status, output). The command may be several lines.

        The shell must be at its prompt. It may not leave the shell (exit) or read the terminal."""
        begin, end = self._new_markers()
        # "'' splits the marker in the echo; eval keeps multi-line commands and syntax errors in one piece.
        quoted = "'" + command.replace("'", "'\\''") + "'"
        self.send_line(f"echo {begin[0]}''{begin[1]}; eval {quoted}; echo {end[0]}''{end[1]} $?", timeout)
        deadline = time.monotonic() + timeout
        self._wait_match(re.compile(("".join(begin) + r"\r*\n").encode()), timeout, f"the start of {command!r}")
        text, match = self._wait_match(re.compile(("".join(end) + r" (\d+)\r*\n").encode()),
                                       deadline - time.monotonic(), f"the end of {command!r}")
        return int(match.group(1)), text

    def check(self, command, timeout=60):
        """As run(), but returns the output alone and raises ConsoleError if the status is not 0."""
        status, output = self.run(command, timeout)
        if status != 0:
            raise ConsoleError(f"{command!r} failed in the guest with status {status}:\n{output}")
        return output

    def sync(self, timeout=30):
        """Finds the shell's prompt on a console in an unknown state, e.g. after connect() or a revert.

        Sends an empty line and a fresh marker until the shell answers; what was on the way is dropped."""
        deadline = time.monotonic() + timeout
        while True:
            begin, _ = self._new_markers()
            self.send_line(f"\necho {begin[0]}''{begin[1]}", timeout)
            left = deadline - time.monotonic()
            try:
                self._wait_match(re.compile(("".join(begin) + r"\r*\n").encode()), min(2.0, max(left, 0.01)), "a prompt")
                return
            except ConsoleTimeout:
                if left <= 0:
                    raise

    # --- the end

    def wait_exit(self, timeout=60):
        """Reads until the process has ended; returns its exit status (-N: killed by signal N)."""
        deadline = time.monotonic() + timeout
        while not self._closed:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ConsoleTimeout(self._tell(f"the process did not end within {timeout} s"))
            if self._wait_readable(left):
                self._receive()
        if self.process is None:
            return None
        try:
            return self.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise ConsoleTimeout(self._tell(f"the process did not end within {timeout} s")) from error

    def close(self):
        """Kills the process, if any still runs, with all it started, and closes the console."""
        if self.process is not None and self.process.poll() is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait()
        if self._log:
            self._log.close()
            self._log = None
        if self._keep is not None:
            self._keep.close()
        elif self.process is not None and self.process.stdout is not None:
            self.process.stdin.close()
            self.process.stdout.close()
        elif self._read_fd >= 0:
            os.close(self._read_fd)
            os.close(self._write_fd)
        self._read_fd = self._write_fd = -1
        self._keep = None
        self._closed = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # --- inside

    def _new_markers(self):
        self._serial += 1
        # The clock keeps markers apart that two runs of a test send to the same guest.
        tag = f"{os.getpid()}x{time.monotonic_ns():x}x{self._serial}"
        return ("GCB", f"EGIN{tag}"), ("GCE", f"ND{tag}")

    @staticmethod
    def _pattern(marker):
        if isinstance(marker, re.Pattern):
            return marker
        return re.compile(re.escape(marker.encode() if isinstance(marker, str) else marker))

    @staticmethod
    def _clean(data):
        return bytes(data).replace(b"\r", b"").decode("utf-8", "replace")

    def _wait_readable(self, timeout):
        return bool(select.select([self._read_fd], [], [], timeout)[0])

    def _receive(self):
        try:
            data = os.read(self._read_fd, 65536)
        except BlockingIOError:
            return
        except OSError as error:
            # A pty gives EIO, a socket ECONNRESET, where a pipe gives the end of the file.
            if error.errno not in (errno.EIO, errno.ECONNRESET):
                raise
            data = b""
        if not data:
            self._closed = True
            return
        self.transcript += data
        if self._log:
            self._log.write(data)

    def _wait_match(self, pattern, timeout, what):
        deadline = time.monotonic() + timeout
        start = self._seen
        while True:
            match = pattern.search(self.transcript, start)
            if match:
                before = self._clean(self.transcript[self._seen:match.start()])
                self._seen = match.end()
                return before, match
            # A match still to come may have begun already, but not further back than this.
            start = max(start, len(self.transcript) - MATCH_BYTES)
            if self._closed:
                raise ConsoleClosed(self._tell(f"the console closed before {what} came"))
            left = deadline - time.monotonic()
            if left <= 0:
                raise ConsoleTimeout(self._tell(f"{what} did not come within {timeout:.1f} s"))
            if self._wait_readable(left):
                self._receive()

    def _tell(self, what):
        lines = self._clean(self.transcript[-2000:]).splitlines()[-15:]
        return what + "; the console's last lines:\n" + "\n".join("    | " + line for line in lines)


def main():
    parser = argparse.ArgumentParser(description="Runs commands on a guest's serial console.")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for the boot and for each command")
    parser.add_argument("--log", help="append all that the console shows to this file")
    parser.add_argument("--socket", help="connect to this UNIX socket instead of starting a process")
    parser.add_argument("--run", action="append", default=[], metavar="CMD", help="a command for the guest's shell")
    parser.add_argument("--poweroff", action="store_true", help="power the guest off at the end")
    parser.add_argument("command", nargs="*", help="what to start")
    args = parser.parse_args()
    if bool(args.socket) == bool(args.command):
        parser.error("either --socket or a command is needed")
    start = time.monotonic()
    try:
        if args.socket:
            guest = GuestConsole.connect(args.socket, log=args.log)
        else:
            guest = GuestConsole.spawn(args.command, log=args.log)
        with guest:
            if args.socket:
                guest.sync(args.timeout)
            else:
                guest.wait_for(READY, args.timeout)
                print(f"guest_console: ready after {time.monotonic() - start:.2f} s", file=sys.stderr)
            for command in args.run:
                status, output = guest.run(command, args.timeout)
                sys.stdout.write(output)
                sys.stdout.flush()
                if status:
                    return status
            if args.poweroff:
                guest.send("poweroff -f\n")
                guest.wait_exit(args.timeout)
    except ConsoleError as error:
        print(f"guest_console: {error}", file=sys.stderr)
        return 125
    return 0


if __name__ == "__main__":
    sys.exit(main())
