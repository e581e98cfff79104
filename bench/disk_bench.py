#!/usr/bin/env python3
"""The disk engine without a guest against `qemu-img bench`: the same image, the same offsets, one after the other in turn.

    disk_bench.py DISK_BENCH [--rounds N] [--count N] [--folder DIR] [--json FILE]

A row is a median of the time for COUNT requests, with the least and the most, and the ratio of QEMU's median to ours: above 1 we are faster.
4 KiB requests go in steps that jump about the disk, as qemu-img has no random ones. Reads are of written data; `new` writes allocate.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile

MIB = 1 << 20
SIZE = 1 << 30
STEP = 37 * MIB + 20480
CASES = [(f"4 KiB {op} depth {depth}", op, 4096, depth, STEP, False) for op in ("read", "write") for depth in (1, 16, 32)]
CASES += [("4 KiB write depth 16, new", "write", 4096, 16, STEP, True), ("1 MiB read depth 4", "read", MIB, 4, MIB, False),
          ("1 MiB write depth 4", "write", MIB, 4, MIB, False), ("1 MiB write depth 4, new", "write", MIB, 4, MIB, True)]


def run(*argv):
    return subprocess.run([str(a) for a in argv], check=True, capture_output=True, text=True).stdout


def ours(program, image, op, block, depth, step, count):
    out = run(program, image, f"op={op}", f"block={block}", f"depth={depth}", f"step={step}", f"count={count}")
    return int(out.split()[1]) / 1e9


def qemu(image, op, block, depth, step, count):
    out = run("qemu-img", "bench", "-f", "qcow2", "-t", "writeback", "-i", "io_uring", "-c", count, "-d", depth, "-s", block, "-S", step,
              *(["-w", "--pattern", "90"] if op == "write" else []), image)
    return float(re.search(r"in ([0-9.]+) seconds", out).group(1))


def measure(args, case, folder):
    name, op, block, depth, step, new = case
    count = args.count if block == 4096 else min(args.count, SIZE // block)
    image = os.path.join(folder, "full.qcow2")
    samples = {"ours": [], "qemu": []}
    for _ in range(args.rounds):
        for who in ("ours", "qemu"):
            if new:
                image = os.path.join(folder, f"new-{who}.qcow2")
                run("qemu-img", "create", "-q", "-f", "qcow2", image, SIZE)
            arguments = (image, op, block, depth, step, min(count, 16000) if new else count)
            samples[who].append(ours(args.program, *arguments) if who == "ours" else qemu(*arguments))
            if new:
                os.unlink(image)
    medians = {who: statistics.median(values) for who, values in samples.items()}
    print(f"| {name} | {medians['ours']:.3f} ({min(samples['ours']):.3f} to {max(samples['ours']):.3f}) | "
          f"{medians['qemu']:.3f} ({min(samples['qemu']):.3f} to {max(samples['qemu']):.3f}) | {medians['qemu'] / medians['ours']:.2f} |", flush=True)
    return {"case": name, "samples": samples, "ratio": medians["qemu"] / medians["ours"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=50000)
    parser.add_argument("--folder", help="where the images are made: its file system is measured too")
    parser.add_argument("--cases", default="", help="only those whose name holds this")
    parser.add_argument("--json")
    args = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="vmcp-disk-bench-", dir=args.folder)
    try:
        image = os.path.join(folder, "full.qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", image, SIZE)
        run("qemu-io", "-c", f"write -q -P 1 0 {SIZE}", image)
        print(f"| {args.rounds} rounds | ours, s | qemu-img bench, s | ratio |\n|---|---|---|---|")
        rows = [measure(args, case, folder) for case in CASES if args.cases in case[0]]
    finally:
        shutil.rmtree(folder)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
