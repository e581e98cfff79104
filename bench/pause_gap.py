#!/usr/bin/env python3
"""What a live checkpoint costs the guest, how fast a VM boots, and how much memory the VMM takes. Python's standard library only.

    bench/pause_gap.py [--rounds N] [--json FILE] [--sizes 256M,4G] [--loads busy,zipf] [--parts checkpoint,boot,qemu]

docs/benchmarking.md explains every figure. Environment: VMCP_BIN (the program), VMCP_TINY (tiny.elf), VMCP_TMP (a folder on the filesystem
to be measured, with room for twice the largest guest and 2 GiB more); bench/run.sh sets them.
"""

import argparse
import glob
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "lib"))
import vmcp_test  # noqa: E402
from guest_console import ConsoleError, GuestConsole  # noqa: E402

# What the guest fills at boot, and which of it it writes then, at full speed where no rate is given.
LOADS = {
    "busy": "set=64M mode=uniform",           # 64 MiB, each page as likely
    "zipf": "set=all mode=zipf rate=100000",  # all memory, page k about 1/k as likely
    "uniform": "set=all mode=uniform",        # all memory, each page as likely
    "hot": "set=all mode=hot hot=4096",       # 9 of 10 writes go to 4096 pages (16 MiB) that lie all over the memory
}
TINY_OPTIONS = "report=0"
# Of all memory, as the first checkpoint of a tree is, and of what was written since the one before.
KINDS = {"root": ["--full"], "incremental": []}
TICK = os.sysconf("SC_CLK_TCK")
TARGET_GAP_NS, TARGET_BOOT_NS, TARGET_RESIDENT_BYTES = 2_000_000, 20_000_000, 10 << 20


# --- figures

def percentile(values, percent):
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * percent // 100) - 1))]


def summary(values):
    return {"n": len(values), "median": statistics.median(values), "min": min(values), "max": max(values), "p95": percentile(values, 95)}


def milliseconds(nanoseconds):
    return f"{nanoseconds / 1e6:.3f}" if nanoseconds < 100e6 else f"{nanoseconds / 1e6:.0f}"


def print_table(title, header, rows):
    print(f"\n{title}\n")
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths)) + " |")
    sys.stdout.flush()


def print_progress(text):
    print(text, file=sys.stderr, flush=True)


# --- the host

def cpu_busy_ticks():
    """Time that CPUs were busy, and time that the hypervisor below us took away."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return user + nice + system + irq + softirq + steal


def process_ticks(pid):
    """Of a process with its threads, and of the children that it waited for."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(map(int, fields[11:15]))


class Foreign:
    """The share of one CPU that was used by others than us and the VM (`pids`) since it was made."""

    def __init__(self, *pids):
        self.pids = [os.getpid(), *pids]
        self.began, self.busy, self.ours = time.monotonic(), cpu_busy_ticks(), self.ticks()

    def ticks(self):
        return sum(map(process_ticks, self.pids))

    def share(self):
        ticks = cpu_busy_ticks() - self.busy - (self.ticks() - self.ours)
        return max(0.0, ticks / TICK / (time.monotonic() - self.began))


def wait_for_quiet(limit, seconds, *pids):
    """Until others use less than `limit` of one CPU, or for `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        foreign = Foreign(*pids)
        time.sleep(0.5)
        if foreign.share() <= limit or time.monotonic() > deadline:
            return


def shield_session(pid, nice):
    """Against other sessions: the niceness of a session's autogroup, where the kernel schedules by these. Within the VM's session nothing changes."""
    if nice != 0:
        with open(f"/proc/{pid}/autogroup", "w", encoding="ascii") as file:
            file.write(str(nice))


def describe_host():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine())
    with open("/proc/meminfo", encoding="ascii") as file:
        memory = int(file.readline().split()[1])
    kind = next((name for name in ("kvm_intel", "kvm_amd", "kvm_pvm") if os.path.isdir(f"/sys/module/{name}")), "kvm")
    return {"cpu": model, "cpus": os.cpu_count(), "memory_bytes": memory * 1024, "kernel": platform.release().split("-")[0], "kvm": kind}


# --- guests

class VmcpGuest:
    """A VM of vmcp in a store of its own, its console on pipes."""

    name = "vmcp"

    def __init__(self, folder, size, load, shield):
        self.folder, self.store = folder, os.path.join(folder, "store")
        os.makedirs(folder)
        config = os.path.join(folder, "guest.cfg")
        with open(config, "w", encoding="utf-8") as file:
            file.write(f"[vm]\nname = bench\nmemory = {size}\ncpus = 1\nkernel = {os.environ['VMCP_TINY']}\n"
                       f"cmdline = {LOADS[load]} {TINY_OPTIONS}\n")
        self.stderr = open(os.path.join(folder, "stderr"), "ab")
        self.console = GuestConsole.spawn([os.environ["VMCP_BIN"], "--store", self.store, "run", config], stderr=self.stderr)
        self.tiny = vmcp_test.Tiny(self.console)
        self.pid = self.console.process.pid
        shield_session(self.pid, shield)
        self.tiny.ready(600)

    def vmcp(self, *words):
        return subprocess.run([os.environ["VMCP_BIN"], "--store", self.store, "--json", *words], stdin=subprocess.DEVNULL, capture_output=True,
                              check=True, timeout=600).stdout

    def hold(self):
        self.vmcp("pause", "bench")
        # Nobody goes back to these checkpoints, so their memory need not take space.
        for path in glob.glob(os.path.join(self.store, "layers", "*")):
            os.unlink(path)

    def go(self):
        self.vmcp("resume", "bench")

    def checkpoint(self, kind):
        result = json.loads(self.vmcp("checkpoint", "--live", *KINDS[kind], "bench"))
        if result["durability"] != "durable":
            raise RuntimeError(f"the checkpoint is not durable: {result}")
        return {**result, **result["pause"], **result["memory"]}

    def close(self):
        self.console.close()
        self.stderr.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class QemuGuest:
    """The same guest file under Debian's QEMU, with a QMP socket and a qcow2 image for its state."""

    name = "qemu"

    def __init__(self, folder, size, load, shield):
        self.folder = folder
        os.makedirs(folder)
        qmp_path, self.image, self.state = (os.path.join(folder, name) for name in ("qmp", "state.qcow2", "state"))
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", self.image, "1G"], check=True)
        self.stderr = open(os.path.join(folder, "stderr"), "ab")
        self.console = GuestConsole.spawn(
            ["qemu-system-x86_64", "-accel", "kvm", "-m", size, "-nodefaults", "-nographic", "-no-reboot", "-kernel", os.environ["VMCP_TINY"],
             "-append", f"{LOADS[load]} {TINY_OPTIONS}", "-serial", "stdio", "-qmp", f"unix:{qmp_path},server=on,wait=off",
             "-drive", f"file={self.image},if=none,id=state,cache=none,aio=io_uring", "-device", "virtio-blk-pci,drive=state"], stderr=self.stderr)
        self.pid = self.console.process.pid
        shield_session(self.pid, shield)
        self.tiny = vmcp_test.Tiny(self.console)
        self.tiny.ready(600)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(qmp_path)
        self.lines = self.socket.makefile("rw", encoding="utf-8")
        self.lines.readline()
        self.qmp("qmp_capabilities")

    def qmp(self, command, **arguments):
        self.lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.lines.flush()
        while True:
            answer = json.loads(self.lines.readline())
            if "error" in answer:
                raise RuntimeError(f"QEMU: {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def hold(self):
        self.qmp("stop")

    def go(self):
        self.qmp("cont")

    def background_snapshot(self):
        self.qmp("migrate-set-capabilities", capabilities=[{"capability": "background-snapshot", "state": True}])
        self.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self.qmp("migrate", uri=f"exec:cat >{self.state}")
        while True:
            status = self.qmp("query-migrate")
            if status["status"] == "completed":
                break
            if status["status"] in ("failed", "cancelled"):
                raise RuntimeError(f"QEMU: migrate: {status}")
            time.sleep(0.05)
        os.unlink(self.state)

    def savevm(self):
        for command in ("savevm bench", "delvm bench"):
            text = self.qmp("human-monitor-command", **{"command-line": command})
            if text.strip():
                raise RuntimeError(f"QEMU: {command}: {text.strip()}")

    def close(self):
        self.console.close()
        self.stderr.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def take_gap(tiny):
    """The guest's figures since it was asked last."""
    return {key: int(value) for key, value in tiny.ask("gap", "gap").items()}


# --- checkpoint

def measure_gap(guest, action):
    """What the guest saw while `action` ran, and what action returned."""
    before = int(guest.tiny.ask("status", "status")["writes"])
    take_gap(guest.tiny)
    began = time.monotonic_ns()
    result = action()
    took = time.monotonic_ns() - began
    gap = take_gap(guest.tiny)
    gap["writes"] = int(guest.tiny.ask("status", "status")["writes"]) - before
    return {"gap": gap, "took_ns": took, "result": result}


def quiet_sample(args, guest, action):
    """A sample during which others left the CPUs alone; the last try counts in any case, and says so."""
    for attempt in range(args.tries):
        wait_for_quiet(args.foreign, args.wait, guest.pid)
        foreign = Foreign(guest.pid)
        sample = measure_gap(guest, action)
        sample["foreign"] = foreign.share()
        sample["disturbed"] = sample["foreign"] > args.foreign
        if not sample["disturbed"]:
            break
        print_progress(f"  disturbed (others used {sample['foreign']:.0%} of a CPU), try {attempt + 1}: "
                       f"gap {milliseconds(sample['gap']['max_ns'])} ms")
    return sample


def sample_checkpoint(args, guest, kind, durations):
    """The guest runs only while it is measured: it is never idle, and would disturb the other one's samples."""
    guest.go()
    try:
        seconds = durations.get((guest, kind), 0.5)
        rest = quiet_sample(args, guest, lambda: time.sleep(seconds))
        taken = quiet_sample(args, guest, lambda: guest.checkpoint(kind))
        durations[guest, kind] = taken["took_ns"] / 1e9
    finally:
        guest.hold()
    taken["rest"] = rest
    return taken


PAUSE_PARTS = ("quiesce_ns", "state_ns", "memory_ns", "disks_ns", "resume_ns")
FIGURES = ("pause_ns", *PAUSE_PARTS, "captured_ns", "durable_ns", "cow_faults", "cow_fault_p50_ns", "cow_fault_p99_ns", "cow_fault_max_ns",
           "armed_again_pages", "saved_pages")


def figures(samples):
    """The columns of a list of samples of vmcp."""
    columns = {key: [sample["result"][key] for sample in samples if key in sample["result"]] for key in FIGURES}
    columns["gap_ns"] = [sample["gap"]["max_ns"] for sample in samples]
    columns["gap_at_rest_ns"] = [sample["rest"]["gap"]["max_ns"] for sample in samples]
    columns["over_2ms"] = [sum(sample["gap"][key] for key in ("over_2ms",)) for sample in samples]
    columns["writes_per_s"] = [sample["gap"]["writes"] * 1e9 / sample["took_ns"] for sample in samples]
    columns["writes_per_s_at_rest"] = [sample["rest"]["gap"]["writes"] * 1e9 / sample["rest"]["took_ns"] for sample in samples]
    return {key: summary(values) for key, values in columns.items() if values}


def run_checkpoints(args, folder):
    out = []
    for load in args.loads:
        guests, samples, durations = {}, {(size, kind): [] for size in args.sizes for kind in args.kinds}, {}
        try:
            for size in args.sizes:
                print_progress(f"checkpoint, {load}: filling a guest of {size}")
                guests[size] = VmcpGuest(os.path.join(folder, f"vmcp-{load}-{size}"), size, load, args.shield)
                guests[size].hold()
            for number in range(args.rounds + 1):
                for size, kind in samples:
                    sample = sample_checkpoint(args, guests[size], kind, durations)
                    print_progress(f"checkpoint, {load}, {size}, {kind}, {number}: pause {milliseconds(sample['result']['pause_ns'])} ms, gap "
                                   f"{milliseconds(sample['gap']['max_ns'])} ms (at rest {milliseconds(sample['rest']['gap']['max_ns'])} ms)")
                    if number > 0:  # the first one of each warms up
                        samples[size, kind].append(sample)
            for size, guest in guests.items():
                guest.go()
                fields = guest.tiny.ask("check", "check", 600)
                if "ok" not in fields:
                    raise RuntimeError(f"the guest of {size} did not survive its checkpoints: {fields}")
                guest.hold()
        finally:
            for guest in guests.values():
                guest.close()
        for (size, kind), some in samples.items():
            out.append({"load": load, "kind": kind, "size": size, "figures": figures(some), "disturbed": sum(one["disturbed"] for one in some), "samples": some})
    return out


def print_checkpoints(out):
    rows = []
    for one in out:
        for name, key in (("pause", "pause_ns"), ("longest gap", "gap_ns"), ("longest gap at rest", "gap_at_rest_ns"),
                          ("to captured", "captured_ns"), ("to durable", "durable_ns"), ("write fault, p50", "cow_fault_p50_ns"),
                          ("write fault, p99", "cow_fault_p99_ns"), ("write fault, longest", "cow_fault_max_ns")):
            if key in one["figures"]:
                figure = one["figures"][key]
                rows.append([one["load"], one["kind"], one["size"], name, *(milliseconds(figure[part]) for part in ("median", "min", "p95", "max"))])
    print_table("Live checkpoint, times in ms", ["load", "kind", "guest", "what", "median", "min", "p95", "max"], rows)
    rows = []
    for one in out:
        parts = [milliseconds(one["figures"][part]["median"]) for part in PAUSE_PARTS if part in one["figures"]]
        rows.append([one["load"], one["kind"], one["size"], *parts, *(f"{one['figures'][key]['median']:.0f}" for key in
                     ("armed_again_pages", "cow_faults", "writes_per_s_at_rest", "writes_per_s")), one["disturbed"]])
    print_table("Parts of the pause (medians, ms) and the guest's work", ["load", "kind", "guest", "quiesce", "state", "memory", "disks", "resume",
                "pages in the pause", "write faults", "writes/s at rest", "writes/s meanwhile", "disturbed samples"], rows)
    rows = []
    for load, kind in dict.fromkeys((one["load"], one["kind"]) for one in out):
        some = [one for one in out if (one["load"], one["kind"]) == (load, kind)]
        small, large = some[0], some[-1]
        if small is not large:
            rows.append([load, kind, f"{large['size']} : {small['size']}", *(f"{large['figures'][key]['median'] / small['figures'][key]['median']:.2f}"
                                                                       for key in ("pause_ns", "gap_ns"))])
    print_table("Ratio of medians", ["load", "kind", "sizes", "pause", "longest gap"], rows)


# --- QEMU

def run_qemu(args, folder):
    """QEMU's own ways to save a VM, at the smallest size: the guest's gap and the time of the whole."""
    size, load = args.sizes[0], args.loads[0]
    try:
        guest = QemuGuest(os.path.join(folder, "qemu"), size, load, args.shield)
    except (OSError, ConsoleError) as error:
        print_progress(f"SKIP QEMU: {str(error).splitlines()[0]}")
        return []
    guest.hold()
    version = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout.split()[3]
    samples = {"background-snapshot": [], "savevm": []}
    failed = {}
    try:
        for number in range(args.rounds + 1):
            for how, action in (("background-snapshot", guest.background_snapshot), ("savevm", guest.savevm)):
                if how in failed:
                    continue
                guest.go()
                if how == "savevm":
                    guest.qmp("migrate-set-capabilities", capabilities=[{"capability": "background-snapshot", "state": False}])
                try:
                    sample = quiet_sample(args, guest, action)
                except RuntimeError as error:
                    print_progress(f"SKIP {how}: {error}")
                    failed[how] = str(error)
                    continue
                finally:
                    guest.hold()
                print_progress(f"QEMU {how}, {size}, {number}: gap {milliseconds(sample['gap']['max_ns'])} ms")
                if number > 0:
                    samples[how].append(sample)
    finally:
        guest.close()
    return [{"how": how, "version": version, "size": size, "load": load, "gap_ns": summary([one["gap"]["max_ns"] for one in some]),
             "took_ns": summary([one["took_ns"] for one in some]), "disturbed": sum(one["disturbed"] for one in some), "samples": some}
            for how, some in samples.items() if some]


def print_qemu(out, checkpoints):
    rows = []
    for one in checkpoints:
        if out and (one["size"], one["load"]) == (out[0]["size"], out[0]["load"]):
            gap = one["figures"]["gap_ns"]
            rows.append([f"vmcp checkpoint --live, {one['kind']}", *(milliseconds(gap[part]) for part in ("median", "min", "p95", "max")),
                         milliseconds(one["figures"]["durable_ns"]["median"])])
    for one in out:
        rows.append([f"QEMU {one['version']} {one['how']}", *(milliseconds(one["gap_ns"][part]) for part in ("median", "min", "p95", "max")),
                     milliseconds(one["took_ns"]["median"])])
    if rows and out:
        print_table(f"The longest gap that the guest sees ({out[0]['size']}, {out[0]['load']}), ms; the last column: until the save is done",
                    ["how", "median", "min", "p95", "max", "whole save"], rows)


# --- boot and memory

def resident_bytes(pid):
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


def run_boot(args, folder):
    boots, idle, after = [], [], []
    base = os.path.join(folder, "boot")
    os.makedirs(base)
    config = os.path.join(base, "guest.cfg")
    with open(config, "w", encoding="utf-8") as file:
        file.write(f"[vm]\nname = boot\nmemory = 512M\ncpus = 1\nkernel = {os.environ['VMCP_TINY']}\ncmdline = set=16M rate=1000 report=0\n")

    def vmcp(*words):
        return subprocess.run([os.environ["VMCP_BIN"], "--store", os.path.join(base, "store"), "--json", *words], stdin=subprocess.DEVNULL,
                              capture_output=True, check=True, timeout=120).stdout

    for number in range(args.rounds + 1):
        wait_for_quiet(args.foreign, args.wait)
        started = json.loads(vmcp("run", "--detach", config))
        if number > 0:
            boots.append(started["boot_ns"])
        if number in (1, 2, 3):
            time.sleep(1)
            idle.append(resident_bytes(started["pid"]))
            vmcp("checkpoint", "--live", "boot")
            time.sleep(0.2)
            after.append(resident_bytes(started["pid"]))
        vmcp("kill", "boot")
    shutil.rmtree(base, ignore_errors=True)
    return {"boot_ns": summary(boots), "resident_idle_bytes": summary(idle), "resident_after_checkpoint_bytes": summary(after)}


def print_boot(out):
    rows = [["command to first guest instruction, ms", *(milliseconds(out["boot_ns"][part]) for part in ("median", "min", "p95", "max"))]]
    for name, key in (("resident beyond guest memory, idle, MiB", "resident_idle_bytes"),
                      ("resident beyond guest memory, after a checkpoint, MiB", "resident_after_checkpoint_bytes")):
        rows.append([name, *(f"{out[key][part] / (1 << 20):.1f}" for part in ("median", "min", "p95", "max"))])
    print_table("Boot and memory, guest of 512 MiB", ["what", "median", "min", "p95", "max"], rows)


# --- all

def judge(out):
    """The targets, one line each; False if one is missed."""
    targets = [(f"longest gap, {one['load']}, {one['size']}", one["figures"]["gap_ns"]["median"], TARGET_GAP_NS, "ms", 1e6)
               for one in out.get("checkpoint", [])]
    if "boot" in out:
        targets += [("boot", out["boot"]["boot_ns"]["median"], TARGET_BOOT_NS, "ms", 1e6),
                    ("resident, idle", out["boot"]["resident_idle_bytes"]["median"], TARGET_RESIDENT_BYTES, "MiB", 1 << 20),
                    ("resident, after a checkpoint", out["boot"]["resident_after_checkpoint_bytes"]["median"], TARGET_RESIDENT_BYTES, "MiB", 1 << 20)]
    print_table("Targets (medians)", ["what", "measured", "target", ""],
                [[name, f"{value / unit_size:.2f} {unit}", f"{target / unit_size:.0f} {unit}", "met" if value <= target else "MISSED"]
                 for name, value, target, unit, unit_size in targets])
    return all(value <= target for _, value, target, _, _ in targets)


def main():
    parser = argparse.ArgumentParser(description="Pause and longest gap of a live checkpoint, boot time, memory of the VMM.")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each kind (20)")
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=["256M", "4G"], help="guest sizes, smallest first (256M,4G)")
    parser.add_argument("--loads", type=lambda text: text.split(","), default=["busy", "zipf"], help="of " + ", ".join(LOADS))
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS), help="of " + ", ".join(KINDS))
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["checkpoint", "qemu", "boot"], help="checkpoint,qemu,boot")
    parser.add_argument("--json", metavar="FILE", help="write everything, samples included, to FILE")
    parser.add_argument("--foreign", type=float, default=0.15, help="a sample during which others use more of one CPU is repeated (0.15)")
    parser.add_argument("--tries", type=int, default=5, help="how often it is taken at most (5)")
    parser.add_argument("--wait", type=float, default=60, help="seconds to wait for a quiet moment before each sample (60)")
    parser.add_argument("--shield", type=int, default=0, metavar="NICE", help="niceness of each VM's session towards other sessions (0): "
                        "on a machine with other work, -20 keeps that out of the figures")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a target is missed")
    args = parser.parse_args()
    folder = os.path.join(os.environ.get("VMCP_TMP", "/var/tmp"), f"vmcp-bench-{os.getpid()}")
    out = {"host": describe_host(), "rounds": args.rounds, "shield": args.shield, "tiny": TINY_OPTIONS, "loads": {load: LOADS[load] for load in args.loads}}
    os.makedirs(folder)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    signal.signal(signal.SIGINT, lambda number, _: sys.exit(128 + number))
    try:
        if "boot" in args.parts:
            out["boot"] = run_boot(args, folder)
        if "checkpoint" in args.parts:
            out["checkpoint"] = run_checkpoints(args, folder)
        if "qemu" in args.parts:
            out["qemu"] = run_qemu(args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    host = out["host"]
    print(f"{host['cpus']} CPUs, {host['cpu']}, {host['memory_bytes'] >> 30} GiB, Linux {host['kernel']}, {host['kvm']}; {args.rounds} samples of each kind")
    if "checkpoint" in out:
        print_checkpoints(out["checkpoint"])
    if out.get("qemu"):
        print_qemu(out["qemu"], out.get("checkpoint", []))
    if "boot" in out:
        print_boot(out["boot"])
    met = judge(out)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(out, file, indent=1)
    return 0 if met or not args.strict else 1


if __name__ == "__main__":
    sys.exit(main())
