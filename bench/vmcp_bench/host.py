"""The host: what it is, who else uses it, its disk, and every process that we started."""

import atexit
import ctypes
import mmap
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

TICK = os.sysconf("SC_CLK_TCK")
PAGE = 4096


def say(text):
    print(text, file=sys.stderr, flush=True)


# --- what it is

def describe():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine())
    kind = next((name for name in ("kvm_intel", "kvm_amd", "kvm_pvm") if os.path.isdir(f"/sys/module/{name}")), "kvm")
    return {"cpu": model, "cpus": os.cpu_count(), "memory_bytes": meminfo("MemTotal"), "kernel": platform.release().split("-")[0], "kvm": kind,
            "virtual": "hypervisor" in cpu_flags(), "filesystem": filesystem(folder_for_images())}


def cpu_flags():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((line.split(":", 1)[1].split() for line in file if line.startswith("flags")), [])


def filesystem(folder):
    """The type of the filesystem below a folder, by the longest mount point that leads to it."""
    best = ("", "unknown")
    with open("/proc/self/mounts", encoding="utf-8") as file:
        for line in file:
            _, point, kind = line.split()[:3]
            if os.path.realpath(folder).startswith(point) and len(point) >= len(best[0]):
                best = (point, kind)
    return best[1]


def meminfo(key):
    """In bytes, or a count where the kernel tells one."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * (1024 if line.endswith("kB\n") else 1) for line in file if line.startswith(key + ":"))


def folder_for_images():
    return os.environ.get("VMCP_TMP") or "/var/tmp"


def free_disk_bytes(folder):
    return shutil.disk_usage(folder).free


def other_vms():
    """Processes of vmcp and QEMU that we did not start: their names and ids."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                name = file.read().strip()
        except OSError:
            continue
        if (name == "vmcp" or name.startswith("qemu-system")) and int(pid) not in _started:
            found.append(f"{name} {pid}")
    return found


# --- who else uses it

def cpu_busy_ticks():
    """Time that CPUs were busy, and time that the hypervisor below us took away."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return user + nice + system + irq + softirq + steal


def stolen_ns():
    """Processor time that the hypervisor below us took away, of all processors since the start; it counts in hundredths of a second."""
    with open("/proc/stat", encoding="ascii") as file:
        return int(file.readline().split()[8]) * 1000000000 // TICK


def process_ticks(pid):
    """Of a process with its threads, and of the children that it waited for."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(map(int, fields[11:15]))


class Foreign:
    """The share of one CPU that was used by others than us and the VMs (`pids`) since it was made."""

    def __init__(self, *pids):
        self.pids = [os.getpid(), *pids]
        self.began, self.busy, self.ours = time.monotonic(), cpu_busy_ticks(), self.ticks()

    def ticks(self):
        return sum(map(process_ticks, self.pids))

    def share(self):
        ticks = cpu_busy_ticks() - self.busy - (self.ticks() - self.ours)
        return max(0.0, ticks / TICK / max(0.01, time.monotonic() - self.began))


def wait_for_quiet(limit, seconds, *pids):
    """Until others use less than `limit` of one CPU, or for `seconds`."""
    deadline = time.monotonic() + seconds
    while seconds > 0:
        foreign = Foreign(*pids)
        time.sleep(0.25)
        if foreign.share() <= limit or time.monotonic() > deadline:
            return


def shield_session(pid, nice):
    """Against other sessions: the niceness of a session's autogroup, where the kernel schedules by these. Within the VM's session nothing changes."""
    if nice != 0:
        with open(f"/proc/{pid}/autogroup", "w", encoding="ascii") as file:
            file.write(str(nice))


# --- processes and folders

_started = {}  # pid -> Popen
_folders = set()
_libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1


def die_with_us():
    """Runs in a child before exec: no VM outlives a benchmark that was killed."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def own(process):
    """The process is ended with us, however we end."""
    _started[process.pid] = process
    return process


def end(process):
    """Kills what own() was told of, with all that it started in its session."""
    _started.pop(process.pid, None)
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
    process.wait()


def scratch_folder():
    """A new folder on the filesystem that is measured; it goes with us."""
    where = folder_for_images()
    for name in os.listdir(where):  # what a run left that was killed
        fields = name.split("-")
        if name.startswith("vmcp-bench-") and fields[2].isdigit() and not os.path.isdir(f"/proc/{fields[2]}"):
            remove(os.path.join(where, name))
    folder = tempfile.mkdtemp(prefix=f"vmcp-bench-{os.getpid()}-", dir=where)
    _folders.add(folder)
    return folder


def clean_up():
    for process in list(_started.values()):
        end(process)
    for folder in list(_folders):
        shutil.rmtree(folder, ignore_errors=True)
        _folders.discard(folder)


def clean_up_at_exit():
    """At exit and on Ctrl-C, SIGTERM and SIGHUP nothing of ours is left."""
    atexit.register(clean_up)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))


# --- the disk

def drop_caches():
    """Empties the page cache; needs root. False where that is not allowed."""
    os.sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
            file.write("3\n")
    except OSError:
        return False
    return True


def _write_blocks(fd, total, block, threads):
    """Parallel writers, each its next block; the kernel lets go of the interpreter's lock."""
    state, lock = {"next": 0, "error": None}, threading.Lock()

    def work():
        buffer = mmap.mmap(-1, block)
        buffer.write(os.urandom(block))
        while state["error"] is None:
            with lock:
                offset = state["next"]
                state["next"] += block
            if offset >= total:
                return
            try:
                os.pwrite(fd, memoryview(buffer)[:min(block, total - offset)], offset)
            except OSError as error:
                state["error"] = error

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if state["error"]:
        raise state["error"]


def plain_write(folder, total, threads=4, block=1 << 20):
    """What the disk takes: `total` bytes, not compressible, into a new preallocated file, O_DIRECT where the filesystem can, then fsync, rename and the
    folder's fsync. Returns (all of it, the syncs and the rename alone), both ns."""
    total = -(-total // PAGE) * PAGE
    path = os.path.join(folder, "plain")
    try:
        fd = os.open(path + ".new", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
    except OSError:
        fd = os.open(path + ".new", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        began = time.monotonic_ns()
        os.posix_fallocate(fd, 0, total)
        _write_blocks(fd, total, block, threads)
        written = time.monotonic_ns()
        os.fsync(fd)
        os.rename(path + ".new", path)
        os.fsync(folder_fd)
        ended = time.monotonic_ns()
    finally:
        os.close(fd)
        os.close(folder_fd)
        for name in (path, path + ".new"):
            if os.path.exists(name):
                os.unlink(name)
    return ended - began, ended - written


def written_bytes(pid):
    """What a process has sent to storage so far, its metadata and its catalogue included."""
    try:
        with open(f"/proc/{pid}/io", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("write_bytes:"))
    except (OSError, StopIteration):
        return None


# --- memory of a process

def memory_of(pid):
    """Bytes by the keys of smaps_rollup, and the page tables."""
    found = {}
    with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
        for line in file:
            fields = line.split()
            if len(fields) == 3 and fields[2] == "kB":
                found[fields[0].rstrip(":")] = int(fields[1]) * 1024
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        found["VmPTE"] = next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmPTE:")), 0)
    return found


def resident_beyond_guest(pid):
    """All that is resident but guest memory, which is the one memfd."""
    total, counts = 0, False
    with open(f"/proc/{pid}/smaps", encoding="utf-8") as file:
        for line in file:
            key = line.split(None, 1)[0]
            if not key.endswith(":"):
                counts = "/memfd:" not in line
            elif key == "Rss:" and counts:
                total += int(line.split()[1]) * 1024
    return total


def qemu_version():
    """Of Debian's QEMU, or None."""
    try:
        done = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.split()[3]


def remove(folder):
    shutil.rmtree(folder, ignore_errors=True)


def program(name, vmcp=None):
    """A program of bench/ beside a build, by default the one that is measured, or None."""
    path = os.path.join(os.path.dirname(vmcp or os.environ["VMCP_BIN"]), "..", "bench", name)
    return path if os.access(path, os.X_OK) else None
