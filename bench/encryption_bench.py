#!/usr/bin/env python3
"""What an encrypted store costs: the same VM with a plain store and with an encrypted one, in turns, with the tiny guest.

    VMCP_BIN=... VMCP_TINY=... bench/encryption_bench.py [--rounds N] [--memory MIB] [--folder DIR]

A row is the median of what one thing took in ms, least and most in brackets, with the plain store and with the encrypted one, and the ratio of the medians.
"""

import argparse
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "lib"))
import vmcp_test  # noqa: E402

ROWS = ["first checkpoint: pause", "first checkpoint: durable", "first checkpoint: write fault, p99", "next checkpoint: pause", "next checkpoint: durable",
        "revert in place", "dump of all memory", "verify", "clone: to its first instruction", "clone of a guest that sleeps: to its first instruction", "start: to its first instruction", "start: until the guest has checked all its memory"]


def timed(function):
    begin = time.monotonic()
    function()
    return (time.monotonic() - begin) * 1e3


def clone_ms(env, checkpoint, *words):
    """The third of three, all running: from the start of its process to its first instruction."""
    clones = env.vmcp_json("clone", checkpoint, "--count", "3", *words)["vms"]
    for one in clones:
        env.vmcp("kill", one["name"])
    return clones[2]["clone_ns"] / 1e6


def sleeper(env, memory, *words):
    """A checkpoint of a guest that sleeps between its work, whose VM has ended."""
    env.spawn_tiny("run", env.tiny_config(name="sleeper", memory=f"{memory}M", cmdline=f"set={memory // 2}M rate=100 idle=1 report=0"), *words)
    taken = env.vmcp_json("checkpoint", "--live", "sleeper")
    env.vmcp("kill", "sleeper")
    return taken


def measure(env, encrypted, memory):
    """One value, in ms, for each row."""
    words = ("--store-key", env.write("key", "a passphrase\n")) if encrypted else ()
    env.store = env.path("encrypted" if encrypted else "plain")
    config = env.tiny_config(memory=f"{memory}M", cmdline=f"set={memory // 2}M rate=5000 report=0")
    guest = env.spawn_tiny("run", config, *words)
    first = env.vmcp_json("checkpoint", "--live", "tiny")
    guest.epoch(2)
    following = env.vmcp_json("checkpoint", "--live", "tiny")
    guest.epoch(3)
    reverts = [env.vmcp_json("revert", first["id"])["revert_ns"] / 1e6 for _ in range(5)]
    env.vmcp("kill", "tiny")
    core = env.path("core")
    dump = timed(lambda: env.vmcp("dump", first["id"], core, *words))
    os.unlink(core)
    verify = timed(lambda: env.vmcp("verify", *words))
    clone = clone_ms(env, first["id"], *words)
    sleeping = sleeper(env, memory, *words)
    clone_of_sleeper = clone_ms(env, sleeping["id"], *words)
    start = env.vmcp_json("run", "--from", first["id"], "--detach", *words)["boot_ns"] / 1e6
    guest = env.attach_tiny("tiny")
    check = timed(guest.check)
    env.vmcp("kill", "tiny")
    for one in (first, following, sleeping):
        env.vmcp("rm", one["id"], status=None)
    return [first["pause_ns"] / 1e6, first["durable_ns"] / 1e6, first["memory"]["cow_fault_p99_ns"] / 1e6, following["pause_ns"] / 1e6, following["durable_ns"] / 1e6,
            statistics.median(reverts), dump, verify, clone, clone_of_sleeper, start, check]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, default=512)
    parser.add_argument("--folder", help="where the stores are made")
    args = parser.parse_args()
    if args.folder:
        os.environ["VMCP_TMP"] = args.folder
    env = vmcp_test.Env("encryption")
    samples = {False: [], True: []}
    try:
        for round_number in range(args.rounds):
            for encrypted in (False, True) if round_number % 2 == 0 else (True, False):
                samples[encrypted].append(measure(env, encrypted, args.memory))
    finally:
        env.close(keep=False)
    print(f"| {args.memory} MiB, {args.rounds} rounds, ms | plain | encrypted | ratio |\n|---|---|---|---|")
    for i, name in enumerate(ROWS):
        columns = [[row[i] for row in samples[encrypted]] for encrypted in (False, True)]
        medians = [statistics.median(column) for column in columns]
        text = " | ".join(f"{median:.2f} ({min(column):.2f} to {max(column):.2f})" for median, column in zip(medians, columns))
        print(f"| {name} | {text} | {medians[1] / medians[0]:.2f} |" if medians[0] else f"| {name} | {text} | |", flush=True)


if __name__ == "__main__":
    main()
