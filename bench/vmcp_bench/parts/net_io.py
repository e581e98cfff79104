"""The guest's network card: vmcp and QEMU's virtio-net, the same guest with the same driver on the same backends, in turns.

Backends: `user`, libslirp in both; `tap`, a tap device, without vhost, as root only; `pair`, two VMs whose frames are UNIX datagrams: vmcp's mode `group`, QEMU's
`-netdev dgram`. The client is this program, and its own time is in every figure.
"""

import contextlib
import ctypes
import errno
import os
import select
import socket
import subprocess
import threading
import time

from .. import host
from ..figures import percentile, significant
from ..qemu import QemuGuest
from ..vm import CommandFailed, VmcpGuest

NAME = "net_io"
TITLE = "the guest's network card, side by side with QEMU"
LOAD = "set=4M paused=1 net=1"
MEMORY = "64M"
ADDRESS = {"user": "127.0.0.1", "tap": "10.0.2.15"}
ECHO, SINK, STREAM = 7, 9, 19  # ports of the guest
TCP_SINK, TCP_SOURCE = 5001, 5002
DATAGRAM_BYTES, FRAME_BYTES, UNDER_WAY = 1400, 1514, 32
CLONE_NEWNET = 0x40000000


def seconds_each(args):
    return 0.1 if args.smoke else 1.0


def datagrams(args):
    return 1000 if args.smoke else 30000


def seconds(plan):
    return (plan.args.rounds + 1) * (plan.builds + 1) * (2 * (6 * seconds_each(plan.args) + 2) + 3)


# --- guests

def protocol(port):
    return "tcp" if port in (TCP_SINK, TCP_SOURCE) else "udp"


def free_ports():
    """One of the host for each of the guest."""
    with contextlib.ExitStack() as stack:
        found = {}
        for port in (ECHO, SINK, STREAM, TCP_SINK, TCP_SOURCE):
            one = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM if protocol(port) == "tcp" else socket.SOCK_DGRAM))
            one.bind(("127.0.0.1", 0))
            found[port] = one.getsockname()[1]
        return found


def boot_vmcp(context, build, name, card, load=LOAD, folder=None):
    folder = folder or context.new_folder(f"{build.label}-net")
    guest = VmcpGuest.boot(build, folder, MEMORY, load, context.args.shield, name=name, config=f"[net lan]\n{card}\n")
    context.stack.callback(guest.close)
    return guest


def boot_qemu(context, card, mac="52:54:00:00:00:01", load=LOAD):
    devices = ("-netdev", card, "-device", f"virtio-net-pci,netdev=n,disable-legacy=on,romfile=,mac={mac}")
    guest = QemuGuest.boot(context.new_folder("qemu-net"), MEMORY, load, context.args.shield, devices=devices)
    context.stack.callback(guest.close)
    return guest


def boot(context, build, backend, ports):
    """`build` None: QEMU."""
    if build and backend == "user":
        return boot_vmcp(context, build, "bench", "mode = user\n" + "\n".join(f"forward = {protocol(port)}:{at}:{port}" for port, at in ports.items()))
    if build:
        return boot_vmcp(context, build, "bench", "mode = tap\ntap = vmtap0")
    if backend == "user":
        return boot_qemu(context, "user,id=n" + "".join(f",hostfwd={protocol(port)}:127.0.0.1:{at}-:{port}" for port, at in ports.items()))
    return boot_qemu(context, "tap,id=n,ifname=vmtap0,script=no,downscript=no,vhost=off")


def boot_pair(context, build):
    """Two guests that hear each other ten times a second."""
    load = f"{LOAD} beat=10"
    if build:
        folder = context.new_folder(f"{build.label}-pair")
        return [boot_vmcp(context, build, name, "mode = group\nnetwork = bench", load, folder) for name in ("a", "b")]
    folder = context.new_folder("pair")
    cards = [f"dgram,id=n,local.type=unix,local.path={folder}/{own},remote.type=unix,remote.path={folder}/{other}" for own, other in ("ab", "ba")]
    return [boot_qemu(context, card, f"52:54:00:00:00:0{number}", load) for number, card in enumerate(cards)]


# --- the client

def client_of(context, backend, port, ports):
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM if protocol(port) == "tcp" else socket.SOCK_DGRAM)
    context.stack.callback(client.close)
    if protocol(port) == "udp":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    client.settimeout(20)
    client.connect((ADDRESS[backend], ports[port] if backend == "user" else port))
    return client


def drain(client):
    """Late answers to the questions before."""
    client.settimeout(0.3)
    while True:
        try:
            client.recv(2000)
        except TimeoutError:
            return
        except ConnectionRefusedError:
            pass  # of a question before the port was there


def wait_answer(guest, client):
    deadline = time.monotonic() + 30
    client.settimeout(0.2)
    while True:
        try:
            client.send(b"hello")
            client.recv(100)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise CommandFailed(f"{guest.engine}: the guest's network", "it does not answer") from error
            time.sleep(0.05)
    drain(client)


def round_trips(client, seconds):
    """Of one datagram of 100 bytes at a time, in ns."""
    took, end = [], time.monotonic() + seconds
    client.settimeout(2)
    while time.monotonic() < end:
        message = str(len(took)).encode().ljust(100)
        began = time.perf_counter_ns()
        client.send(message)
        got = client.recv(200)
        took.append(time.perf_counter_ns() - began)
        if got != message:
            raise CommandFailed("the guest's network", f"{message[:8]} was answered with {got[:8]}")
    return took


def echoes_per_second(client, seconds):
    """32 under way; one that is lost is found missing after a quarter of a second without any answer, and sent again."""
    message, under_way, done = b"x" * DATAGRAM_BYTES, 0, 0
    client.setblocking(False)
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        while under_way < UNDER_WAY:
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
    return done / (time.monotonic() - began)


def counters(guest):
    return {key: int(value) for key, value in guest.tiny.ask("net", "net", 120).items()}


def to_guest(guest, client, seconds):
    """What comes of all that the host can send, a second."""
    message, before = b"x" * DATAGRAM_BYTES, counters(guest)["sunk"]
    client.setblocking(False)
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        try:
            client.send(message)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOBUFS):
                raise
    took = time.monotonic() - began
    time.sleep(0.1)
    return (counters(guest)["sunk"] - before) / took


def from_guest(client, count):
    """Of so many that the guest sends in one go, those that come, a second. It is asked again where the question is lost."""
    client.settimeout(0.5)
    came, began, last = 0, 0, 0
    for _ in range(40):
        client.send(str(count).encode().ljust(DATAGRAM_BYTES))
        if select.select([client], [], [], 0.5)[0]:
            break
    while came < count:
        try:
            client.recv(2000)
        except TimeoutError:
            break
        last = time.perf_counter_ns()
        began = began or last
        came += 1
    if came < 2:
        raise CommandFailed("the guest's network", "nothing comes of what the guest sends")
    return (came - 1) * 1e9 / (last - began), came / count


def stream_to_guest(guest, client, seconds):
    """Bytes a second over TCP, by what the guest has taken."""
    data, before, began = bytes(1 << 18), counters(guest)["taken"], time.monotonic()
    while time.monotonic() < began + seconds:
        client.sendall(data)
    took = time.monotonic() - began
    return (counters(guest)["taken"] - before) / took


def stream_from_guest(client, seconds):
    room, came, began = bytearray(1 << 18), 0, time.monotonic()
    while time.monotonic() < began + seconds:
        came += client.recv_into(room)
    return came / (time.monotonic() - began)


def pair_rate(context, guests):
    """Frames a second from one guest to the other, by what came, until all was sent and nothing more comes."""
    count, deadline = datagrams(context.args), time.monotonic() + 30
    for guest in guests:
        while counters(guest)["heard"] == 0:
            if time.monotonic() > deadline:
                raise CommandFailed(f"{guest.engine}: two VMs", "they do not hear each other")
            time.sleep(0.05)
    began, looks = time.perf_counter_ns(), []
    guests[0].tiny.ask(f"stream {count}", "ok")
    while len(looks) < 3 or looks[-1][1] != looks[-3][1] or counters(guests[0])["left"]:
        time.sleep(0.03)
        looks.append((time.perf_counter_ns(), counters(guests[1])["sunk"]))
    came = looks[-1][1]
    ended = next(at for at, sunk in looks if sunk == came)
    if not came:
        raise CommandFailed(f"{guests[0].engine}: two VMs", "nothing comes of what is sent")
    return came * 1e9 / (ended - began), came / count


# --- samples

def add(record, number, **values):
    if number > 0:
        record.add(**values)


def sample(context, label, build, backend, number):
    ports, every = free_ports(), seconds_each(context.args)
    with context.guests():
        guest = boot(context, build, backend, ports)
        clients = {port: client_of(context, backend, port, ports) for port in (ECHO, SINK, STREAM)}
        wait_answer(guest, clients[ECHO])
        context.quiet(guest.pid)
        record = lambda what: context.results.record(NAME, label, what=what, backend=backend)  # noqa: E731
        took = round_trips(clients[ECHO], every)
        add(record("round trip, 100 bytes"), number, trip_ns=percentile(took, 50), trip_p99_ns=percentile(took, 99))
        rate = echoes_per_second(clients[ECHO], every)
        add(record("32 echoes under way"), number, datagrams_per_s=rate, data_bytes_per_s=rate * DATAGRAM_BYTES)
        rate = to_guest(guest, clients[SINK], every)
        add(record("host to guest"), number, datagrams_per_s=rate, data_bytes_per_s=rate * DATAGRAM_BYTES)
        rate, share = from_guest(clients[STREAM], datagrams(context.args))
        add(record("guest to host"), number, datagrams_per_s=rate, data_bytes_per_s=rate * DATAGRAM_BYTES, arrived_share=share)
        add(record("TCP, host to guest"), number, data_bytes_per_s=stream_to_guest(guest, client_of(context, backend, TCP_SINK, ports), every))
        add(record("TCP, guest to host"), number, data_bytes_per_s=stream_from_guest(client_of(context, backend, TCP_SOURCE, ports), every))
        context.check(guest)


def sample_pair(context, label, build, number):
    with context.guests():
        guests = boot_pair(context, build)
        context.quiet(*(guest.pid for guest in guests))
        rate, share = pair_rate(context, guests)
        record = context.results.record(NAME, label, what="guest to guest", backend="pair")
        add(record, number, datagrams_per_s=rate, data_bytes_per_s=rate * FRAME_BYTES, arrived_share=share)
        for guest in guests:
            context.check(guest)


def tell(context):
    for one in context.results.find(NAME):
        value, unit = (one.figure("trip_ns") / 1e3, "us") if one.has("trip_ns") else (one.figure("data_bytes_per_s") / (1 << 20), "MiB/s")
        context.say(f"{one.case['backend']}: {one.case['what']}, {one.engine}: {significant(value)} {unit}")


def run_in_namespace(context, has_tap):
    engines = [(build.label, build) for build in context.builds]
    if context.results.meta["qemu"]:
        engines.append(("QEMU", None))
    for number in range(context.rounds + 1):
        for backend in ("user", "tap") if has_tap else ("user",):
            for label, build in engines:
                sample(context, label, build, backend, number)
        for label, build in engines:
            sample_pair(context, label, build, number)
    tell(context)


def enter_namespace():
    """A network namespace of this thread's own, with a tap device, gone with it. False: that is not allowed."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        return False
    for words in ("link set lo up", "tuntap add vmtap0 mode tap", "addr add 10.0.2.1/24 dev vmtap0", "link set vmtap0 up"):
        subprocess.run(["ip", *words.split()], check=True)
    return True


def run(context):
    context.results.meta["qemu"] = host.qemu_version()
    if not context.results.meta["qemu"]:
        context.results.lacks(NAME, "qemu-system-x86_64 is not installed (scripts/setup.sh bench)", engine="QEMU")
    failed = []

    def body():
        try:
            has_tap = os.geteuid() == 0 and enter_namespace()
            if not has_tap:
                context.results.lacks(NAME, "no network namespace of its own: not root", engine="tap")
            run_in_namespace(context, has_tap)
        except BaseException as error:  # noqa: BLE001 - it is raised again, in the other thread
            failed.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
