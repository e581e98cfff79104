#!/usr/bin/env python3
"""Measures vmcp on this host, side by side with QEMU, and writes a report: text, JSON and plots. Python's standard library only.

docs/benchmarking.md explains every figure. Environment: VMCP_BIN (the program), VMCP_TINY (tiny.elf), VMCP_TMP (a folder on the filesystem to be
measured; default /var/tmp); bench/run.sh sets the first two.
"""

import argparse
import os
import shlex
import sys
import time
import traceback

from vmcp_bench import charts, host, loads, parts, records, text
from vmcp_bench.context import Context
from vmcp_bench.figures import parse_size
from vmcp_bench.vm import Build, CommandFailed, NotInThisBuild

FULL = {"rounds": 20, "sizes": "256M,1G,4G,8G,16G", "loads": "idle,moderate,hot,uniform", "kinds": "root,incremental"}
QUICK = {"rounds": 3, "sizes": "256M,1G", "loads": "idle,hot", "kinds": "root,incremental"}
SMOKE = {"rounds": 1, "sizes": "64M", "loads": "zipf", "kinds": "root,incremental"}
NAMES = [part.NAME for part in parts.ALL]


class Plan:
    """What an estimate of the time needs to know."""

    def __init__(self, args, builds, disk_bytes_per_s):
        self.args, self.builds, self.disk_bytes_per_s = args, builds, disk_bytes_per_s


def words(known):
    def split(value):
        found = [word for word in value.split(",") if word]
        for word in found:
            if word not in known:
                raise argparse.ArgumentTypeError(f"'{word}' is none of {', '.join(known)}")
        return found
    return split


def sizes(value):
    try:
        return sorted((word for word in value.split(",") if parse_size(word)), key=parse_size)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_arguments():
    parser = argparse.ArgumentParser(description="A report of what vmcp's checkpoints cost on this host, side by side with QEMU.")
    parser.add_argument("--quick", action="store_true", help="a run of some minutes: few samples, small guests, two loads")
    parser.add_argument("--smoke", action="store_true", help="one tiny sample of everything: shows that the scripts work, measures nothing")
    parser.add_argument("--parts", type=words(NAMES), default=NAMES, help="of " + ",".join(NAMES))
    parser.add_argument("--sizes", type=sizes, help=f"sizes of guests ({FULL['sizes']}; 16G and more with an idle guest only)")
    parser.add_argument("--loads", type=words(list(loads.LOADS)), help=f"of {','.join(loads.LOADS)} ({FULL['loads']})")
    parser.add_argument("--kinds", type=words(["root", "incremental"]), help="kinds of checkpoints (root,incremental)")
    parser.add_argument("--rounds", type=int, help="samples of each kind (20; 3 with --quick)")
    parser.add_argument("--compare", metavar="PROGRAM", help="another build of vmcp, measured in turns with the first; its figures and the ratios are in the report")
    parser.add_argument("--out", metavar="DIR", help="where report.md, report.json and the plots go (default: build/bench-report)", default=os.path.join("build", "bench-report"))
    parser.add_argument("--json", metavar="FILE", help="write everything, samples included, to FILE too")
    parser.add_argument("--render", metavar="FILE", nargs="+", help="measure nothing: make the report anew from --json files, later ones on top of earlier ones")
    parser.add_argument("--foreign", type=float, default=0.15, help="a sample during which others use more of one CPU is repeated (0.15)")
    parser.add_argument("--tries", type=int, default=5, help="how often it is taken at most (5)")
    parser.add_argument("--wait", type=float, default=60, help="seconds to wait for a quiet moment before each sample (60; 0: none)")
    parser.add_argument("--shield", type=int, default=0, metavar="NICE", help="niceness of each VM's session towards other sessions (0): on a machine "
                        "with other work, -20 keeps that out of the figures")
    parser.add_argument("--max-rate", type=parse_size, default=0, metavar="SIZE", help="in the part `checkpoint`: bytes a second that a checkpoint may write "
                        "(no limit)")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a target is missed")
    args = parser.parse_args()
    preset = SMOKE if args.smoke else QUICK if args.quick else FULL
    args.rounds = args.rounds if args.rounds is not None else preset["rounds"]
    args.sizes = args.sizes or sizes(preset["sizes"])
    args.loads = args.loads or preset["loads"].split(",")
    args.kinds = args.kinds or preset["kinds"].split(",")
    if args.rounds < 1:
        parser.error("--rounds: at least one")
    if args.smoke:
        args.wait, args.tries = 0, 1
    return args


def time_text(seconds):
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{max(1, round(seconds / 60))} min"


def run_parts(context, plan):
    chosen = [part for part in parts.ALL if part.NAME in plan.args.parts]
    estimates = {part.NAME: part.seconds(plan) for part in chosen}
    host.say(f"about {time_text(sum(estimates.values()))} in all: " + ", ".join(f"{name} {time_text(seconds)}" for name, seconds in estimates.items()))
    left = sum(estimates.values())
    for number, part in enumerate(chosen, 1):
        with context.running(part.NAME):
            context.say(f"part {number} of {len(chosen)}: {part.TITLE}; about {time_text(left)} left")
            try:
                part.run(context)
            except NotInThisBuild as why:
                context.say(f"SKIP: not in this build: {why}")
                context.results.lacks(part.NAME, f"not in this build: {why}")
            except (CommandFailed, OSError, RuntimeError, ValueError, KeyError, ArithmeticError) as error:
                # The other parts are worth having all the same; the run fails in the end.
                context.say(f"FAILED: {error}")
                if not isinstance(error, CommandFailed):
                    traceback.print_exc()
                context.results.failures.append({"part": part.NAME, "why": (str(error).splitlines() or [type(error).__name__])[0]})
        left -= estimates[part.NAME]


def measure(args):
    builds = [Build("vmcp", os.environ["VMCP_BIN"])]
    if args.compare:
        builds.append(Build("other", args.compare))
    host.clean_up_at_exit()
    others = host.other_vms()
    if others:
        host.say(f"warning: other VMs run on this host, and spoil the figures: {', '.join(others)}")
    folder = host.scratch_folder()
    disk_bytes = (64 if args.smoke else 1024) << 20
    disk_bytes_per_s = disk_bytes * 1e9 / host.plain_write(folder, disk_bytes)[0]
    need = 3 * max((parse_size(size) for size in args.sizes if parse_size(size) < loads.SPARSE_FROM_BYTES), default=0)
    if host.free_disk_bytes(folder) < need:
        host.say(f"warning: {folder} has {host.free_disk_bytes(folder) >> 30} GiB free, {need >> 30} are wanted; VMCP_TMP names another place")
    results = records.Results({
        "host": host.describe(), "rounds": args.rounds, "sizes": args.sizes, "loads": {load: loads.LOADS[load] for load in args.loads}, "shield": args.shield, "max_rate": args.max_rate,
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "command": "bench/run.sh " + " ".join(map(shlex.quote, sys.argv[1:])), "other_vms": others,
        "disk_bytes_per_s": disk_bytes_per_s, "builds": [{"label": one.label, "path": one.path, "version": one.version} for one in builds]})
    context = Context(args, builds, results, folder)
    began = time.monotonic()
    try:
        run_parts(context, Plan(args, len(builds), disk_bytes_per_s))
    except (SystemExit, KeyboardInterrupt):
        host.clean_up()
        results.meta["command"] += "   # interrupted"
        if results.records:
            write_report(args, results)
        raise
    results.meta["seconds"] = round(time.monotonic() - began)
    return results


def write_report(args, results):
    """report.md, report.json and the plots; the text."""
    os.makedirs(args.out, exist_ok=True)
    # First of all what cannot be had again.
    for path in (os.path.join(args.out, "report.json"), args.json):
        if path:
            results.write(path)
    plots = []
    for file, caption, part, make in charts.ALL:
        svg = make(results)
        path = os.path.join(args.out, file)
        if svg:
            with open(path, "w", encoding="utf-8") as out:
                out.write(svg)
            plots.append((file, caption, part))
        elif os.path.exists(path):
            os.unlink(path)  # of an earlier run
    written = text.report(results, [(part.NAME, part.TITLE) for part in parts.ALL], plots)
    with open(os.path.join(args.out, "report.md"), "w", encoding="utf-8") as out:
        out.write(written)
    return written


def main():
    args = parse_arguments()
    results = records.Results.read(args.render) if args.render else measure(args)
    print(write_report(args, results), end="", flush=True)
    host.say(f"written to {args.out}: report.md, report.json and the plots")
    missed = any(row.met is False for row in text.targets.rows(results))
    return 1 if results.failures or (missed and args.strict) else 0


if __name__ == "__main__":
    sys.exit(main())
