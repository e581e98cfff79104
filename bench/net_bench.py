#!/usr/bin/env python3
"""net_bench.py - the network card side by side with QEMU's, on the same backends, with the tiny guest's UDP echo

  bench/net_bench.py [--rounds N] [--seconds S]

One datagram of 100 bytes at a time: round trips; 32 datagrams of 1400 bytes under way: echoes a second. User networking (libslirp in both) and a tap device
(without vhost), in turns. The client's own time is in both. VMCP_BIN, VMCP_TINY: the program and the guest. Needs root, for a network namespace of its own.
"""

import argparse
import ctypes
import os
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

GUEST_WORDS = "set=16M rate=1000 report=0 net=1"
ADDRESS = {"user": "127.0.0.1", "tap": "10.0.2.15"}


def free_port():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def vmcp_argv(folder, backend, port):
    card = f"mode = user\nforward = udp:{port}:7" if backend == "user" else "mode = tap\ntap = vmtap0"
    config = os.path.join(folder, "guest.cfg")
    with open(config, "w", encoding="utf-8") as f:
        f.write(f"[vm]\nname = bench\nmemory = 256M\nkernel = {os.environ['VMCP_TINY']}\ncmdline = {GUEST_WORDS}\n[net lan]\n{card}\n")
    return [os.environ["VMCP_BIN"], "--store", os.path.join(folder, "store"), "run", config]


def qemu_argv(_folder, backend, port):
    card = f"user,id=n,hostfwd=udp:127.0.0.1:{port}-:7" if backend == "user" else "tap,id=n,ifname=vmtap0,script=no,downscript=no,vhost=off"
    return ["qemu-system-x86_64", "-accel", "kvm", "-m", "256", "-nodefaults", "-display", "none", "-serial", "stdio", "-kernel",
            os.environ["VMCP_TINY"], "-append", GUEST_WORDS, "-netdev", card, "-device", "virtio-net-pci,netdev=n,disable-legacy=on,romfile="]


def wait_answer(client):
    deadline = time.monotonic() + 30
    client.settimeout(0.2)
    while time.monotonic() < deadline:
        try:
            client.send(b"hello")
            client.recv(100)
            break
        except OSError:
            time.sleep(0.05)
    else:
        sys.exit("net_bench: the guest does not answer")
    client.settimeout(1)
    while True:  # late answers to the questions before
        try:
            client.recv(100)
        except TimeoutError:
            return
        except ConnectionRefusedError:
            pass  # of a question before the port was there


def round_trips(client, seconds):
    took, end = [], time.monotonic() + seconds
    client.settimeout(1)
    while time.monotonic() < end:
        message = str(len(took)).encode().ljust(100)
        started = time.perf_counter_ns()
        client.send(message)
        got = client.recv(200)
        if got != message:
            sys.exit(f"net_bench: {message[:8]} was answered with {got[:8]}")
        took.append(time.perf_counter_ns() - started)
    return sorted(took)


def echoes_per_second(client, seconds):
    """32 under way; one that is lost is found missing after a quarter of a second without any answer, and sent again."""
    message, under_way, done = b"x" * 1400, 0, 0
    client.setblocking(False)
    started = time.monotonic()
    while time.monotonic() < started + seconds:
        while under_way < 32:
            client.send(message)
            under_way += 1
        if not select.select([client], [], [], 0.25)[0]:
            under_way = 0
            continue
        try:
            while client.recv(2000):
                under_way -= 1
                done += 1
        except BlockingIOError:
            pass
    return done / (time.monotonic() - started)


def measure(make_argv, backend, seconds):
    folder, port = tempfile.mkdtemp(prefix="net_bench-"), free_port()
    guest = subprocess.Popen(make_argv(folder, backend, port), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client.connect((ADDRESS[backend], port if backend == "user" else 7))
        wait_answer(client)
        took = round_trips(client, seconds)
        return took[len(took) // 2] / 1000, took[len(took) * 99 // 100] / 1000, echoes_per_second(client, seconds)
    finally:
        guest.kill()
        guest.wait()
        shutil.rmtree(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    args = parser.parse_args()
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000) != 0:
        sys.exit("net_bench: no network namespace of its own: run it as root")
    for words in ("link set lo up", "tuntap add vmtap0 mode tap", "addr add 10.0.2.1/24 dev vmtap0", "link set vmtap0 up"):
        subprocess.run(["ip", *words.split()], check=True)
    programs = {"vmcp": vmcp_argv, "qemu": qemu_argv}
    print(f"{'':12} {'round trip us':>14} {'p99 us':>10} {'echoes/s':>10}   medians of {args.rounds}")
    for backend in ADDRESS:
        found = {name: [] for name in programs}
        for _ in range(args.rounds):
            for name, make_argv in programs.items():
                found[name].append(measure(make_argv, backend, args.seconds))
        for name, samples in found.items():
            trip, p99, rate = (statistics.median(column) for column in zip(*samples))
            print(f"{backend:4} {name:7} {trip:14.0f} {p99:10.0f} {rate:10.0f}")


if __name__ == "__main__":
    main()
