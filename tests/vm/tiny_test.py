#!/usr/bin/env python3
"""Whole VMs with the tiny guest, on any KVM. The guest checks its own memory and disk against what it did."""

import contextlib
import ctypes
import filecmp
import hashlib
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import store_memory  # noqa: E402
import vmcp_test  # noqa: E402
from vmcp_test import Failed, Skip, check, check_equal  # noqa: E402

BUSY = "set=64M rate=20000 disk=1 disk_blocks=2048 qd=8 report=0"
ROUNDS = int(os.environ.get("VMCP_TEST_ROUNDS", "100"))


def image_check(path):
    done = subprocess.run(["qemu-img", "check", "-U", path], capture_output=True, check=False)
    check(done.returncode in (0, 3), f"qemu-img check {path}: {done.stdout.decode()}{done.stderr.decode()}")


def compare_images(a, b):
    done = subprocess.run(["qemu-img", "compare", "-U", a, b], capture_output=True, check=False)
    check(done.returncode == 0, f"qemu-img compare {a} {b}: {done.stdout.decode()}{done.stderr.decode()}")


def test_boot_sizes(env):
    """The hole below 4 GiB is right: all memory can be used and holds what was written."""
    for memory, cpus, pages in (("128M", 1, "all"), ("3G", 2, "all"), ("3074M", 1, "all"), ("5G", 4, "all"), ("16G", 1, "64M")):
        guest = env.start_tiny(memory=memory, cpus=cpus, name=f"m{memory}", cmdline=f"set={pages} report=0 rate=1000")
        guest.check(timeout=180)
        env.vmcp("kill", f"m{memory}")


def test_checkpoint_and_revert(env):
    """Rounds of live checkpoint under memory and disk writes, more writes, revert in place, self-check."""
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(cmdline=BUSY, disks=[("data", disk)])
    for number in range(ROUNDS):
        taken = env.vmcp_json("checkpoint", "--live", "tiny")
        check_equal(taken["durability"], "durable", "durability")
        time.sleep(0.02)
        back = env.vmcp_json("revert", taken["id"])
        check_equal((back["mode"], back["checkpoint"]), ("in-place", taken["id"]), "revert")
        guest.check()
        guest.epoch(number + 1)
    env.vmcp("kill", "tiny")
    image_check(disk)


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Echo:
    """Asks the tiny guest's UDP echo."""

    def __init__(self, port, address="127.0.0.1"):
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.connect((address, port))
        self.number = 0

    def ask(self, seconds, size=100):
        """Whether an answer comes; late answers to older questions are left out."""
        self.number += 1
        text = f"{self.number} ".encode().ljust(size, b"x")
        try:
            self.socket.settimeout(seconds)
            self.socket.send(text)
            while self.socket.recv(65536) != text:
                pass
            return True
        except (TimeoutError, ConnectionRefusedError):
            return False

    def insist(self, what):
        deadline = time.monotonic() + 30
        while not self.ask(0.2):
            check(time.monotonic() < deadline, f"{what}: no answer for 30 s")
            time.sleep(0.01)


def test_network(env):
    """The guest's echo answers before, during and after live checkpoints and reverts, and where it starts from one; what is bound on the host is bound anew."""
    port, other = free_ports(2)
    net = f"vsock_cid = 3\n[net lan]\nmode = user\nforward = udp:{port}:7\n"
    guest = env.start_tiny(cmdline="set=64M rate=20000 report=0 net=1", extra=net)
    echo = Echo(port)
    echo.insist("after the boot")
    check(echo.ask(5, 1400), "a large datagram is lost")
    asked = lost = 0
    for number in range(10):
        taking = subprocess.Popen([env.vmcp_bin, "--store", env.store, "-q", "checkpoint", "--live", "tiny", "--tag", f"c{number}"], stdout=subprocess.DEVNULL)
        while taking.poll() is None:
            asked += 1
            lost += not echo.ask(2)
        check_equal(taking.returncode, 0, "checkpoint")
    check(asked >= 10 and lost == 0, f"{lost} of {asked} answers were lost during live checkpoints")
    check(all(echo.ask(2) for _ in range(100)), "an answer was lost with nothing under way")
    answered = int(guest.ask("net", "net")["datagrams"])
    check(answered >= asked, f"the guest answered {answered} of {asked}")
    caller = socket.socket(socket.AF_UNIX)  # the guest has no driver for its socket device: nobody answers, and a revert ends it
    caller.settimeout(10)
    caller.connect(os.path.join(env.store, "vms/tiny/vsock.sock"))
    caller.send(b"CONNECT 5\n")
    for number in range(20):
        back = env.vmcp_json("revert", f"c{number % 10}")
        check_equal(back["mode"], "in-place", "mode")
        echo.insist(f"after revert {number}")
        check(int(guest.ask("net", "net")["datagrams"]) < answered - 50, "the guest did not go back")
    guest.check()
    check_equal(caller.recv(10), b"", "what a connection to the guest's sockets gets at a revert")

    # The port is the running VM's; another one does.
    result = env.vmcp("run", "--detach", "--from", "c9", "--name", "two", status=4)
    check(f"port udp:127.0.0.1:{port}: the VM tiny has it" in result.err and "--net lan:" in result.err, str(result))
    result = env.vmcp("run", "--detach", "--from", "c9", "--name", "two", "--net", "wan:forward=udp:1:7", status=2)
    check("no [net wan]" in result.err and "[net lan]" in result.err, str(result))
    env.vmcp("run", "--detach", "--from", "c9", "--name", "two", "--net", f"lan:forward=udp:{other}:7")
    Echo(other).insist("the second VM")
    echo.insist("the first VM beside it")
    mac = env.vmcp_json("stats", "tiny")["nets"][0]["mac"]
    check(mac.startswith("52:56:"), mac)
    check_equal(env.vmcp_json("stats", "two")["nets"][0]["mac"], mac, "a VM from a checkpoint keeps the card's address")
    env.vmcp("kill", "two")
    env.vmcp("kill", "tiny")
    check_equal(env.vmcp_json("revert", "c3")["mode"], "started", "mode")
    echo.insist("after a start")
    nets = env.vmcp_json("stats", "tiny")["nets"]
    check(nets[0]["sent_frames"] > 0 and nets[0]["received_frames"] > 0 and nets[0]["send_errors"] == 0, f"{nets}")
    env.vmcp("kill", "tiny")


def checkpoints_beside(env, count, work):
    """Calls `work` again and again while live checkpoints are taken."""
    for _ in range(count):
        taking = subprocess.Popen([env.vmcp_bin, "--store", env.store, "-q", "checkpoint", "--live", "tiny"], stdout=subprocess.DEVNULL)
        while taking.poll() is None:
            work()
        check_equal(taking.returncode, 0, "checkpoint")


def test_streams(env):
    """TCP from the guest, in segments that the card cuts, and to it, over live checkpoints: no byte is lost; a revert ends it with a reset."""
    source, sink = free_ports(2)
    net = f"[net lan]\nmode = user\nforward = tcp:{source}:5002\nforward = tcp:{sink}:5001\n"
    guest = env.start_tiny(cmdline="set=64M rate=20000 report=0 net=1", extra=net)
    came = 0

    def read():
        nonlocal came
        data = stream.recv(1 << 18)
        check(data and not data.strip(b"\x5a"), f"not what the guest sends: {len(data)} bytes")
        came += len(data)

    with socket.create_connection(("127.0.0.1", source), timeout=60) as stream:
        checkpoints_beside(env, 5, read)
        before = env.vmcp_json("stats", "tiny")["nets"][0]
        check(came > 1 << 20 and before["sent_bytes"] >= came, f"{came} bytes came: {before}")
        check(before["sent_bytes"] / before["sent_frames"] > 2000, f"no long segments: {before}")
        env.vmcp("revert", "tiny~2")
        try:
            while stream.recv(1 << 18):
                pass
            raise Failed("the stream ended without a reset")
        except ConnectionResetError:
            pass
    sent, data = 0, bytes(1 << 16)

    def write():
        nonlocal sent
        stream.sendall(data)
        sent += len(data)

    begun = int(guest.ask("net", "net")["taken"])
    with socket.create_connection(("127.0.0.1", sink), timeout=60) as stream:
        checkpoints_beside(env, 5, write)
        wait_until(lambda: int(guest.ask("net", "net")["taken"]) - begun >= sent, "all that was sent")
        check_equal(int(guest.ask("net", "net")["taken"]) - begun, sent, "what the guest took")
    guest.check()


@contextlib.contextmanager
def own_network():
    """A network namespace of the test's own, for whatever is started in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net", encoding="ascii") as before:
        if libc.unshare(0x40000000) != 0:  # CLONE_NEWNET
            raise Skip(f"no network namespace of its own: {os.strerror(ctypes.get_errno())}")
        try:
            tried = subprocess.run(["ip", "tuntap", "add", "vmtap0", "mode", "tap"], capture_output=True, check=False)
            if tried.returncode != 0 or not os.path.exists("/dev/net/tun"):
                raise Skip(f"no tap devices: {tried.stderr.decode().strip()}")
            yield
        finally:
            check_equal(libc.setns(before.fileno(), 0), 0, "setns")


def ip(words):
    subprocess.run(["ip", *words.split()], check=True)


def start_in_a_bridge(env, tap):
    """Ends the VM `tiny` and starts its checkpoint in a bridge, which has the host's address from then on."""
    ip(f"addr del 10.0.2.1/24 dev {tap}")
    ip("link add br0 type bridge")
    ip("link set br0 up")
    ip("addr add 10.0.2.1/24 dev br0")
    env.vmcp("kill", "tiny")
    env.vmcp("run", "--detach", "--from", "tapped", "--name", "two", "--net", "lan:mode=bridge,lan:bridge=br0")


def revert_announced(env, tag, interface):
    """The VM says where it is: by a RARP, and by an ARP for its address."""
    listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    listener.bind((interface, 0))
    listener.settimeout(10)
    env.vmcp_json("revert", tag)
    mac = bytes.fromhex(env.vmcp_json("stats", "tiny")["nets"][0]["mac"].replace(":", ""))
    kinds = set()
    while not {b"\x80\x35", b"\x08\x06"} <= kinds:
        frame = listener.recv(2000)
        if frame[:12] == b"\xff" * 6 + mac:
            kinds.add(frame[12:14])
            check(frame[12:14] != b"\x08\x06" or frame[28:32] == frame[38:42] == bytes((10, 0, 2, 15)), "the announcement names another address")


def test_network_tap_and_bridge(env):
    """The same on a tap device and in a bridge of the host's; the VM announces itself after a revert; a tap device that is in use is told."""
    with own_network():
        ip("addr add 10.0.2.1/24 dev vmtap0")
        ip("link set vmtap0 up")
        guest = env.start_tiny(cmdline="set=16M rate=1000 report=0 net=1", extra="[net lan]\nmode = tap\ntap = vmtap0\n")
        echo = Echo(7, "10.0.2.15")
        echo.insist("on a tap device")
        env.vmcp_json("checkpoint", "--live", "tiny", "--tag", "tapped")
        check(echo.ask(5, 1400), "nothing comes back after the checkpoint")
        revert_announced(env, "tapped", "vmtap0")
        echo.insist("after the revert")
        guest.check()
        result = env.vmcp("run", "--detach", "--from", "tapped", "--name", "two", status=4)
        check("tap vmtap0: the VM tiny has it" in result.err and "--net lan:" in result.err, str(result))
        start_in_a_bridge(env, "vmtap0")
        echo.insist("in a bridge, from a checkpoint taken on a tap device")
        card = env.vmcp_json("stats", "two")["nets"][0]
        check(card["mode"] == "bridge" and card["interface"].startswith("vmcp"), f"{card}")
        env.vmcp("kill", "two")
        deadline = time.monotonic() + 60
        while card["interface"] in subprocess.run(["ip", "link"], capture_output=True, check=True).stdout.decode():
            check(time.monotonic() < deadline, f"{card['interface']} is left")
            time.sleep(0.05)


def pair_counts(guest):
    said = guest.ask("net", "net")
    return [int(said[key]) for key in sorted(said) if key.startswith("pair")]


def insist_on_all_pairs(guest, echoes, pairs):
    """Every flow is answered, and each pair of queues has its share: of 64 flows one of four pairs gets none once in 10^7 times."""
    before = pair_counts(guest)
    check_equal(len(before), pairs, "pairs of queues")
    for number, echo in enumerate(echoes):
        echo.insist(f"flow {number}")
    now = pair_counts(guest)
    check(all(now[i] > before[i] for i in range(pairs)), f"a pair of queues got nothing: {before}, {now}")


def echoes_at(port):
    return [Echo(port) for _ in range(64)]


def test_network_queues(env):
    """A card of four pairs of queues: flows by all of them, over live checkpoints, reverts, starts and a clone. Another number of pairs is refused, and a driver of one pair works."""
    port, other = free_ports(2)
    guest = env.start_tiny(cmdline="set=16M rate=20000 report=0 net=4", extra=f"[net lan]\nmode = user\nqueues = 4\nforward = udp:{port}:7\n")
    echoes = echoes_at(port)
    insist_on_all_pairs(guest, echoes, 4)
    for number in range(5):
        taking = subprocess.Popen([env.vmcp_bin, "--store", env.store, "-q", "checkpoint", "--live", "tiny", "--tag", f"c{number}"], stdout=subprocess.DEVNULL)
        asked = lost = 0
        while taking.poll() is None:
            lost += not echoes[asked % 64].ask(2)
            asked += 1
        check_equal((taking.returncode, lost), (0, 0), "checkpoint, answers lost")
    for number in range(5):
        check_equal(env.vmcp_json("revert", f"c{number}")["mode"], "in-place", "mode")
        insist_on_all_pairs(guest, echoes, 4)
    guest.check()
    env.vmcp("run", "--detach", "--from", "c4", "--name", "two", "--net", f"lan:forward=udp:{other}:7")
    insist_on_all_pairs(env.attach_tiny("two"), echoes_at(other), 4)
    env.vmcp("kill", "two")
    clone = env.vmcp_json("clone", "c4", "--count", "1", "--name", "branch")["vms"][0]
    own_port = next(r["host"] for r in clone["identity"]["resources"] if r["type"] == "port").rsplit(":", 1)[1]
    insist_on_all_pairs(env.attach_tiny(clone["name"]), echoes_at(int(own_port)), 4)
    env.vmcp("kill", clone["name"])
    result = env.vmcp("run", "--detach", "--from", "c4", "--name", "three", "--net", f"lan:forward=udp:{other}:7,lan:queues=2", status=4)
    check("has 4 pairs of queues, this one has 2" in result.err and "`queues = 4`" in result.err, str(result))
    env.vmcp("kill", "tiny")
    check_equal(env.vmcp_json("revert", "c0")["mode"], "started", "mode")
    insist_on_all_pairs(env.attach_tiny("tiny"), echoes, 4)
    env.vmcp("kill", "tiny")
    guest = env.start_tiny(cmdline="set=16M rate=20000 report=0 net=1", name="one", extra=f"[net lan]\nmode = user\nqueues = 16\nforward = udp:{port}:7\n")
    insist_on_all_pairs(guest, echoes, 1)
    env.vmcp_json("checkpoint", "--live", "one", "--tag", "d")
    env.vmcp("revert", "d")
    insist_on_all_pairs(guest, echoes, 1)
    env.vmcp("kill", "one")


def test_network_queues_of_taps(env):
    """The same on a tap device of several queues, and in a bridge. A device of one queue is refused, and one that another has."""
    with own_network():
        ip("tuntap add many mode tap multi_queue")
        ip("addr add 10.0.2.1/24 dev many")
        ip("link set many up")
        card = "[net lan]\nmode = tap\ntap = {}\nqueues = 4\n"
        result = env.vmcp("run", "--detach", env.tiny_config(extra=card.format("vmtap0")), status=4)
        check("interface vmtap0 is no tap device of several queues" in result.err and "multi_queue" in result.err, str(result))
        guest = env.start_tiny(cmdline="set=16M rate=1000 report=0 net=4", extra=card.format("many"))
        echoes = [Echo(7, "10.0.2.15") for _ in range(64)]
        insist_on_all_pairs(guest, echoes, 4)
        env.vmcp_json("checkpoint", "--live", "tiny", "--tag", "tapped")
        insist_on_all_pairs(guest, echoes, 4)
        for _ in range(3):
            revert_announced(env, "tapped", "many")
            insist_on_all_pairs(guest, echoes, 4)
        guest.check()
        stranger = env.path("stranger")  # a store that knows nothing of this one's VMs
        result = env.vmcp("run", "--detach", env.tiny_config(name="two", extra=card.format("many")), status=4, store=stranger)
        check("tap device many is in use by another process" in result.err, str(result))
        start_in_a_bridge(env, "many")
        insist_on_all_pairs(env.attach_tiny("two"), echoes, 4)
        env.vmcp("kill", "two")


def test_network_errors(env):
    """One clear error each, before anything runs."""
    for text, status, words in (("mode = tap\ntap = nosuch0", 3, "there is no tap device nosuch0"),
                                ("mode = bridge\nbridge = nosuch0", 3, "there is no bridge nosuch0"),
                                ("mode = libvirt", 2, "network: is missing"),
                                ("mode = user\nqueues = 17", 2, "queues: '17' is no number of queues"),
                                ("mode = user\nqueues = 0", 2, "queues: '0' is no number of queues"),
                                ("mode = user\nforward = tcp:8.8.8.8:8080:80", 1, "listening at 8.8.8.8:8080")):
        result = env.vmcp("run", "--detach", env.tiny_config(extra=f"[net lan]\n{text}\n"), status=status)
        check(words in result.err and "hint: " in result.err, str(result))


def test_checkpoints_under_way(env):
    """A checkpoint leaves a guest that never stops writing whole, again and again, also at full speed."""
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(memory="512M", cmdline="set=256M mode=zipf disk=1 disk_blocks=4096 qd=32 report=0", disks=[("data", disk)])
    for _ in range(5):
        env.vmcp_json("checkpoint", "--live", "tiny")
        guest.check()
    env.vmcp("kill", "tiny")
    image_check(disk)


def test_revert_of_a_vm_that_is_gone(env):
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(cmdline=BUSY, disks=[("data", disk)])
    guest.epoch(7)
    taken = env.vmcp_json("checkpoint", "--live", "--tag", "good")
    time.sleep(0.1)
    env.vmcp("kill", "tiny")
    back = env.vmcp_json("revert", "good")
    check_equal((back["mode"], back["restored_pages"]), ("started", 0), "mode, and pages put back")
    guest = env.attach_tiny("tiny")
    check_equal(guest.check()["epoch"], "7", "epoch")
    guest.epoch(8)
    # From a reverted state on: another checkpoint, a kill -9, and back.
    second = env.vmcp_json("checkpoint", "--live", "tiny")
    check_equal(second["parent"], taken["id"], "parent")
    pid = next(vm["pid"] for vm in env.vmcp_json("ps")["vms"])
    os.kill(pid, 9)
    wait_until(lambda: env.vmcp_json("ps")["vms"][0]["state"] == "crashed", "state 'crashed' after kill -9")
    env.vmcp_json("revert", second["id"])
    check_equal(env.attach_tiny("tiny").check()["epoch"], "8", "epoch")
    env.vmcp("kill", "tiny")
    image_check(disk)


def test_cpu_models(env):
    """Each level that this host has boots, is checkpointed, and starts and goes back as that; one that it has not is refused with the list."""
    started = 0
    for model in ("x86-64-v1", "x86-64-v2", "x86-64-v3"):
        name = model.replace("x86-64-", "")
        config = env.tiny_config(memory="64M", name=name, cmdline="set=8M rate=1000 report=0", extra=f"cpu_model = {model}")
        done = env.vmcp("run", "--detach", config, status=None)
        if done.status != 0:
            check(done.status == 6 and f"cpu_model = {model}: this host lacks " in done.err and "hint: " in done.err, f"refused: {done}")
            print(f"  {done.err.splitlines()[0]}", flush=True)
            continue
        guest = env.attach_tiny(name)
        guest.epoch(5)
        one = env.vmcp_json("checkpoint", "--live", name)["id"]
        guest.epoch(6)
        env.vmcp("revert", one)
        check_equal(guest.check()["epoch"], "5", "epoch")
        env.vmcp("kill", name)
        env.vmcp("revert", one)
        check_equal(env.attach_tiny(name).check()["epoch"], "5", "epoch")
        env.vmcp("kill", name)
        started += 1
    check(started > 0, "no level at all")


def wait_until(condition, what, timeout=60):
    until = time.monotonic() + timeout
    while not condition():
        check(time.monotonic() < until, f"no {what} within {timeout} s")
        time.sleep(0.05)


def layer_bytes(env, checkpoint):
    """What the files of a checkpoint's memory hold, to see that nobody changes them."""
    memory = store_memory.Memory(env.store, checkpoint)
    contents = memory.contents()
    memory.close()
    return hashlib.sha256(contents).hexdigest()


def test_start_from_a_checkpoint(env):
    """A started VM runs on mapped layers: two at once from one checkpoint, with checkpoints, reverts and starts of their own."""
    guest = env.start_tiny(memory="512M", cmdline="set=64M rate=20000 report=0")
    guest.epoch(1)
    base = env.vmcp_json("checkpoint", "--live", "tiny")["id"]
    before = layer_bytes(env, base)
    env.vmcp("kill", "tiny")
    starts = [env.spawn_tiny("run", "--from", base, "--name", name, ready=False) for name in ("one", "two")]
    for number, (name, started) in enumerate(zip(("one", "two"), starts)):
        check_equal(started.check()["epoch"], "1", "epoch")
        started.epoch(10 + number)
        own = env.vmcp_json("checkpoint", "--live", name)
        check(own["memory"]["parent_pages"] > own["memory"]["total_pages"] // 2, f"not incremental: {own['memory']}")
        check_equal(own["parent"], base, "parent")
        full = env.vmcp_json("checkpoint", "--live", "--full", name)
        check_equal((full["memory"]["plan"], full["memory"]["parent_pages"]), ("settle-all", 0), "a full one")
        for back, epoch in ((own["id"], 10 + number), (base, 1), (full["id"], 10 + number)):
            env.vmcp_json("revert", back, "--vm", name)
            check_equal(started.check()["epoch"], str(epoch), f"epoch at {back}")
        started.epoch(20 + number)
    wait_until(lambda: os.path.exists(os.path.join(env.store, "checkpoints", base, "working-set")), "a working set")
    for name in ("one", "two"):
        env.vmcp("kill", name)
    check_equal(layer_bytes(env, base), before, "memory of the checkpoint")
    # With the recorded working set, and with one that is damaged.
    for damage in (False, True):
        if damage:
            with open(os.path.join(env.store, "checkpoints", base, "working-set"), "r+b") as file:
                file.seek(45)
                file.write(b"damage")
        check_equal(env.spawn_tiny("run", "--from", base, "--name", "one", ready=False).check()["epoch"], "1", "epoch")
        env.vmcp("kill", "one")


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_start_from_damaged_memory(env):
    """A page that is not what was saved ends the VM with one error that names it, whether it was cut off or changed, before the start or later."""
    guest = env.start_tiny(memory="256M", cmdline="set=64M rate=20000 report=0")
    taken = env.vmcp_json("checkpoint", "--live", "tiny")["id"]
    env.vmcp("kill", "tiny")
    memory = store_memory.Memory(env.store, taken)
    name = max(os.listdir(os.path.join(env.store, "layers")), key=lambda n: n.endswith(".mem"))
    path = os.path.join(env.store, "layers", name)
    page = max((count, first) for first, count, layer in memory.extents if layer)[1] + 7
    shutil.copy(path, env.path("good"))
    for damage in ("changed", "cut before", "cut while it runs"):
        if damage == "changed":
            flip(path, page * store_memory.PAGE_BYTES + 100)
        elif damage == "cut before":
            os.truncate(path, page * store_memory.PAGE_BYTES)
        guest = env.spawn_tiny("run", "--from", taken, ready=False)
        if damage == "cut while it runs":
            guest.check()
            os.truncate(path, page * store_memory.PAGE_BYTES)
            try:
                guest.check(timeout=10)
            except Exception:  # pylint: disable=broad-except
                pass
        status = guest.console.wait_exit(timeout=60)
        check(status not in (0, None), f"{damage}: exit status {status}")
        text = env.stderr_text()
        check("memory" in text, f"{damage}: the error does not name the memory: {text}")
        if damage != "cut while it runs":
            check(name.split(".")[0] in text, f"{damage}: the error does not name the layer: {text}")
        check(env.vmcp_json("ps")["vms"][0]["state"] in ("crashed", "stopped"), "state")
        open(env.path("stderr.log"), "wb").close()
        shutil.copy(env.path("good"), path)
    check_equal(env.spawn_tiny("run", "--from", taken, ready=False).check()["epoch"], "0", "mended")


def test_tree(env):
    """A tree of 10: a revert to any node gives that node's content, memory and disk."""
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(cmdline=BUSY, disks=[("data", disk)])
    parents = [None, 0, 1, 1, 0, 4, 4, 5, 3, 8]
    nodes, sums = [], []
    for number, parent in enumerate(parents):
        if parent is not None:
            env.vmcp_json("revert", nodes[parent])
        guest.epoch(100 + number)
        time.sleep(0.05)
        guest.set("pause")
        sums.append({key: value for key, value in guest.sum().items() if key in ("mem", "disk", "sequence", "epoch")})
        nodes.append(env.vmcp_json("checkpoint", "--live", "tiny")["id"])
        guest.set("go")
    log = env.vmcp_json("log")
    by_id = {one["id"]: one for one in log["checkpoints"]}
    for number, parent in enumerate(parents):
        check_equal(by_id[nodes[number]]["parent"], None if parent is None else nodes[parent], f"parent of node {number}")
    for number in (3, 9, 0, 7, 2, 5, 1, 8, 4, 6):
        env.vmcp_json("revert", nodes[number])
        got = {key: value for key, value in guest.sum().items() if key in sums[number]}
        check_equal(got, sums[number], f"content of node {number}")
        check_equal(guest.check()["epoch"], str(100 + number), f"epoch of node {number}")
    env.vmcp("kill", "tiny")
    image_check(disk)


def same_as(env, id):
    """The VM, paused, goes back to a checkpoint: a checkpoint of it is the same, byte by byte, but for the generation id."""
    env.vmcp("pause", "tiny")
    env.vmcp_json("revert", id)
    again = env.vmcp_json("checkpoint", "--full", "tiny")
    wrong = store_memory.differences(env.store, id, again["id"])
    check_equal(wrong[:20], [vmcp_test.GENERATION_PAGE], f"pages that differ from those of {id}")
    states = [os.path.join(env.store, "checkpoints", one, "state") for one in (id, again["id"])]
    check(filecmp.cmp(*states, shallow=False), f"state differs: {states}")
    a, b = (env.vmcp_json("show", one) for one in (id, again["id"]))
    for one, other in zip(a["disks"], b["disks"]):
        compare_images(*(os.path.join(env.store, "layers", disk["layer"] + ".qcow2") for disk in (one, other)))
    env.vmcp("resume", "tiny")
    return again["id"]


def test_reverts_in_a_row(env):
    """Hundreds of reverts to one node, then to and fro between two, with checkpoints in between, disk still and busy: all of it is back each time."""
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(cmdline=BUSY, disks=[("data", disk)])
    nodes = []
    for number, busy in enumerate((0, 1)):
        guest.set(f"disk {busy}")
        guest.epoch(50 + number)
        time.sleep(0.1)
        env.vmcp("pause", "tiny")
        nodes.append(env.vmcp_json("checkpoint", *(["--live"] if busy else []), "tiny")["id"])
        env.vmcp("resume", "tiny")
    control = vmcp_test.Control(env.store, "tiny")
    for number, node in enumerate(nodes):
        for turn in range(150):
            back = control.call("vm.revert", id=node)
            check_equal((back["mode"], back["checkpoint"]), ("in-place", node), "revert")
            check(back["revert_ns"] >= sum(back["parts"].values()), f"the parts of a revert are larger than it: {back}")
            time.sleep(0.01 * (turn % 3) if turn % 10 == 0 else 0)
        check_equal(guest.check()["epoch"], str(50 + number), "epoch")
        check_equal(env.vmcp_json("log")["vms"][0]["at"], node, "position")
    # Requests in flight end meanwhile where the disk is busy, so only the other one can be compared.
    nodes.append(same_as(env, nodes[0]))
    for turn in range(60):
        number = (turn * turn + turn // 7) % 3
        control.call("vm.revert", id=nodes[number])
        if turn % 15 == 14:
            check_equal(guest.check()["epoch"], str(50 + number % 2), "epoch")
            control.call("checkpoint.take", live=True)
    for node in (nodes[0], nodes[2], nodes[0]):
        same_as(env, node)
        guest.check()
    control.close()
    env.vmcp("kill", "tiny")
    image_check(disk)


def pair_of_one_instant(env, live_words, stopped_words):
    """A live checkpoint and a stopped one of a VM that stands still, with no request to a disk under way: that would end between them."""
    for attempt in range(8):
        env.vmcp("pause", "tiny")
        time.sleep(0.1 * 2 ** attempt)
        live = env.vmcp_json("checkpoint", "--live", *live_words, "tiny")
        stopped = env.vmcp_json("checkpoint", *stopped_words, "tiny")
        env.vmcp("resume", "tiny")
        if not any(disk["inflight_writes"] or disk["inflight_reads"] for disk in live["disks"]):
            return live, stopped
    raise vmcp_test.Failed(f"the disk does not come to rest: {live}")


def test_oracle(env):
    """A live checkpoint and a stopped one of the same instant are the same, byte by byte: all of memory, or what was written since the parent."""
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(cmdline=BUSY, disks=[("data", disk)])
    for full in ([], ["--full"]), (["--full"], []), ([], ["--full"]), (["--full"], ["--full"]):
        live, stopped = pair_of_one_instant(env, *full)
        a, b = (env.vmcp_json("show", one["id"]) for one in (live, stopped))
        wrong = store_memory.differences(env.store, live["id"], stopped["id"])
        check(not wrong, f"memory differs: pages {wrong[:20]}")
        states = [os.path.join(env.store, "checkpoints", one["id"], "state") for one in (a, b)]
        check(filecmp.cmp(*states, shallow=False), f"state differs: {states}")
        layers = [os.path.join(env.store, "layers", one["disks"][0]["layer"] + ".qcow2") for one in (a, b)]
        compare_images(*layers)
        guest.check()
    env.vmcp("kill", "tiny")


def test_each_way_to_hold_the_instant(env):
    """Checkpoints of what was written since the parent, staged, protected and stopped, go back to what they show."""
    guest = env.start_tiny(memory="512M", cmdline="set=256M rate=500 report=0")
    taken = []
    # How fast the guest writes, for how long, and the plan that this must lead to. At full speed (0) it goes on during the checkpoint, and outruns staging.
    for rate, seconds, how, plan in ((500, 0, ["--live"], "protect-all"), (500, 0.5, ["--live"], "stage"), (0, 4, ["--live"], "protect"),
                                     (500, 0.5, [], "stopped"), (500, 0.5, ["--live"], "stage"), (500, 0.5, ["--full"], "stopped-all"),
                                     (500, 0.5, ["--live", "--full", "--instant", "settled"], "settle-all"),
                                     (0, 4, ["--live", "--instant", "settled"], "settle")):
        guest.ask(f"rate {rate}", "ok")
        time.sleep(seconds)
        if plan != "protect":
            guest.ask("rate 500", "ok")
        one = env.vmcp_json("checkpoint", *how, "tiny")
        for _ in range(5):
            if plan != "protect" or one["memory"]["plan"] == plan:
                break
            one = env.vmcp_json("checkpoint", *how, "tiny")  # a busy host held the guest up
        guest.ask("rate 500", "ok")
        memory = one["memory"]
        check(memory["plan_reason"] and memory["planner"]["copy_page_ns"] > 0, f"why this plan: {memory}")
        check_equal((memory["plan"], memory["saved_pages"] + memory["zero_pages"] + memory["parent_pages"]), (plan, memory["total_pages"]), "plan")
        check((memory["parent_pages"] == 0) == plan.endswith("all"), f"pages of the parent: {memory}")
        taken.append(one["id"])
        guest.check()
    for number, one in enumerate(reversed(taken)):
        env.vmcp_json("revert", one)
        guest.check()
        guest.epoch(number + 10)
    env.vmcp("kill", "tiny")


def shmem_bytes(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssShmem:"))


def wait_for(what, condition, timeout=60):
    deadline = time.monotonic() + timeout
    while not condition():
        check(time.monotonic() < deadline, f"not within {timeout} s: {what}")
        time.sleep(0.05)


def test_balloon(env):
    """What the guest gives back the host has; a revert takes the balloon back to its size at the checkpoint."""
    guest = env.start_tiny(cmdline="set=64M rate=2000 report=0 balloon=1 spare=64M", extra="balloon = yes")
    pid = env.vmcp_json("ps")["vms"][0]["pid"]

    def size(mib):
        env.vmcp("balloon", "tiny", f"{mib}M")
        wait_for("the balloon's size", lambda: env.vmcp_json("stats", "tiny")["balloon_bytes"] == (256 - mib) << 20)
        wait_for("pages given back", lambda: env.vmcp_json("stats", "tiny")["balloon_pending_bytes"] == 0)

    before = shmem_bytes(pid)
    size(208)
    check(shmem_bytes(pid) < before - (47 << 20), f"the process shrank from {before} to {shmem_bytes(pid)} bytes only")
    guest.check()
    taken = env.vmcp_json("checkpoint", "--live", "tiny")
    size(256)
    guest.check()
    check(int(guest.ask("balloon", "balloon")["zeroed"]) > 0, "no page came back as zero")
    # Chunks are filled and reported by turns, at random: half of the spare area is filled, twice of what is out of the balloon, and the revert has to take it away.
    guest.set("report_rate 2000")
    wait_for("pages held", lambda: int(guest.ask("balloon", "balloon")["held"]) > 7500)
    guest.set("report_rate 0")
    later = env.vmcp_json("checkpoint", "--live", "tiny")
    for one, out in (taken, 48 << 20), (later, 0), (taken, 48 << 20):
        grown = shmem_bytes(pid)
        env.vmcp_json("revert", one["id"])
        guest.check()
        check_equal(env.vmcp_json("stats", "tiny")["balloon_bytes"], out, "the balloon after a revert")
    check(shmem_bytes(pid) < grown - (8 << 20), f"after the revert the process has {shmem_bytes(pid)} of {grown} bytes")
    env.vmcp("kill", "tiny")
    env.vmcp_json("run", "--from", taken["id"], "--detach")
    guest = env.attach_tiny("tiny")
    guest.check()
    size(256)
    guest.check()
    refused = env.vmcp("balloon", "tiny", "257M", status=2)
    check("make do" in refused.err, f"a size above the memory: {refused}")
    env.vmcp("kill", "tiny")


def test_pages_given_back_under_checkpoints(env):
    """Free pages are reported all the time, and the balloon changes: through every way to hold the instant, cancels and reverts."""
    guest = env.start_tiny(cmdline="set=16M rate=2000 report=0 balloon=1 spare=64M report_rate=150", extra="balloon = yes")
    taken, plans = [], set()
    for number, how in enumerate((["--live"], ["--live"], ["--live", "--full"], [], ["--live", "--full", "--instant", "settled"], ["--live"], ["--full"],
                                  ["--live", "--full", "--max-rate", "64M"], ["--live"], ["--live"])):
        env.vmcp("balloon", "tiny", ("256M", "208M", "240M")[number % 3])
        time.sleep(0.3)
        one = env.vmcp_json("checkpoint", *how, "tiny")
        plans.add(one["memory"]["plan"])
        taken.append(one["id"])
        guest.check()
        if number % 3 == 1:
            env.vmcp("checkpoint", "--live", "--full", "--wait", "captured", "--max-rate", "1M", "tiny")
            time.sleep(0.3)
            env.vmcp("cancel", "tiny")
            guest.check()
    check({"protect-all", "stage", "settle-all", "stopped", "stopped-all"} <= plans, f"plans: {plans}")
    stats = env.vmcp_json("stats", "tiny")
    check(stats["reported_bytes"] > 10 << 20 and stats["balloon_given_back_bytes"] > 0 and stats["reported_kept_bytes"] > 0, f"too little happened: {stats}")
    for number, one in enumerate(taken[::-1]):
        env.vmcp_json("revert", one)
        guest.check()
        guest.epoch(number + 10)
        time.sleep(0.2)
        guest.check()
    # The oracle: live and stopped of one instant.
    for full in ([], ["--full"]), (["--full"], []):
        guest.set("pause")
        live, stopped = pair_of_one_instant(env, *full)
        wrong = store_memory.differences(env.store, live["id"], stopped["id"])
        check(not wrong, f"memory differs: pages {wrong[:20]}")
        guest.set("go")
        time.sleep(0.3)
    guest.check()
    env.vmcp("kill", "tiny")


POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB/"
THP = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"


def read_text(path):
    with open(path, encoding="ascii") as file:
        return file.read().strip()


def write_text(path, text):
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


@contextlib.contextmanager
def huge_pages(count):
    """`count` free huge pages in the pool; what had to be added is taken away afterwards."""
    try:
        before, free = int(read_text(POOL + "nr_hugepages")), int(read_text(POOL + "free_hugepages")) - int(read_text(POOL + "resv_hugepages"))
        added = max(0, count - free)
        if added:
            write_text(POOL + "nr_hugepages", str(before + added))
    except OSError as error:
        raise Skip(f"no huge pages can be reserved here: {error}") from error
    try:
        if int(read_text(POOL + "nr_hugepages")) < before + added:
            raise Skip(f"this host has no {count} huge pages of 2 MiB left")
        yield
    finally:
        if added:
            write_text(POOL + "nr_hugepages", str(max(0, int(read_text(POOL + "nr_hugepages")) - added)))


@contextlib.contextmanager
def transparent_huge_pages():
    try:
        before = re.search(r"\[(\w+)\]", read_text(THP)).group(1)
        write_text(THP, "advise")
    except OSError as error:
        raise Skip(f"transparent huge pages cannot be switched on for memfds here: {error}") from error
    try:
        yield
    finally:
        write_text(THP, before)


def check_backing(env, backing, held):
    """`held`: how memory is held where there is too much to stage. What memory_backing must not change: live checkpoints in every way, damage, reverts, the oracle, a start from a checkpoint."""
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(cmdline=BUSY.replace("rate=20000", "rate=2000"), disks=[("data", disk)], extra=f"memory_backing = {backing}")
    check_equal(env.vmcp_json("stats", "tiny")["memory_backing"], backing, "the backing in use")
    taken = []
    for number, (how, plans) in enumerate(((["--live"], [f"{held}-all"]), (["--live"], ["stage", held]), ([], ["stopped"]), (["--live", "--full"], [f"{held}-all"]),
                                           (["--full"], ["stopped-all"]), (["--live", "--full", "--instant", "settled"], ["settle-all"]), (["--live"], ["stage", held]))):
        time.sleep(0.3)
        one = env.vmcp_json("checkpoint", *how, "tiny")
        check(one["memory"]["plan"] in plans, f"plan of {how}: {one['memory']['plan']}, want one of {plans}")
        taken.append(one["id"])
        guest.check()
        guest.epoch(number + 1)
    for number, one in enumerate(reversed(taken)):
        env.vmcp_json("revert", one)
        guest.check()
        guest.epoch(number + 10)
    for full in ([], ["--full"]), (["--full"], []):
        live, stopped = pair_of_one_instant(env, *full)
        wrong = store_memory.differences(env.store, live["id"], stopped["id"])
        check(not wrong, f"memory differs: pages {wrong[:20]}")
    guest.check()
    env.vmcp("kill", "tiny")
    env.vmcp_json("revert", taken[1])
    guest = env.attach_tiny("tiny")
    check_equal(guest.check()["epoch"], "1", "epoch")
    env.vmcp_json("checkpoint", "--live", "tiny")
    env.vmcp_json("revert", taken[3])
    guest.check()
    env.vmcp("kill", "tiny")
    image_check(disk)
    env.vmcp("run", "--from", taken[2], "--memory-backing", "small", "--detach")
    check_equal(env.vmcp_json("stats", "tiny")["memory_backing"], "small", "the backing chosen at the start")
    env.attach_tiny("tiny").check()
    env.vmcp("kill", "tiny")


def test_huge_pages_of_the_pool(env):
    with huge_pages(128):
        check_backing(env, "hugetlb", "settle")
    config = env.tiny_config(name="greedy", memory="1024G", extra="memory_backing = hugetlb")
    refused = env.vmcp("run", "--detach", config, status=6)
    check("huge pages" in refused.err and "vm.nr_hugepages" in refused.err, f"too few huge pages: {refused}")


def test_transparent_huge_pages(env):
    with transparent_huge_pages():
        check_backing(env, "thp", "protect")


def test_transparent_huge_pages_that_are_off(env):
    """A warning, and small pages."""
    if "[never]" not in read_text(THP):
        raise Skip("this host has them on")
    guest = env.start_tiny(cmdline="report=0", extra="memory_backing = thp")
    check_equal(env.vmcp_json("stats", "tiny")["memory_backing"], "small", "the backing in use")
    check("shmem_enabled" in env.stderr_text(), f"no warning: {env.stderr_text()}")
    guest.check()
    env.vmcp("kill", "tiny")


def test_max_rate(env):
    """The cap on the writer holds, and is lifted by a cancel."""
    guest = env.start_tiny(memory="256M", cmdline="set=64M rate=1000 report=0")
    began = time.monotonic()
    taken = env.vmcp_json("checkpoint", "--live", "--max-rate", "32M", "tiny")
    took = time.monotonic() - began
    least = taken["memory"]["written_bytes"] / (32 << 20) * 0.9
    check(took >= least, f"{taken['memory']['written_bytes']} bytes in {took:.2f} s")
    guest.check()
    slow = env.vmcp_json("checkpoint", "--live", "--full", "--wait", "captured", "--max-rate", "1M", "tiny")
    env.vmcp("cancel", "tiny")
    env.vmcp("checkpoint", "--live", "tiny")
    check(env.vmcp("show", slow["id"], status=None).status == 3, "a cancelled checkpoint is there")
    guest.check()


def test_disk_that_is_slower_than_the_guest(env):
    """Where memory cannot be protected, or is to settle, what is left of it after some passes is copied: at the price of a longer pause."""
    guest = env.start_tiny(memory="128M", cmdline="set=64M report=0")
    first = env.vmcp_json("checkpoint", "--live", "--full", "--instant", "settled", "--max-rate", "64M", "tiny")
    check_equal(first["memory"]["plan"], "settle-all", "plan")
    guest.check()
    env.vmcp("kill", "tiny")
    guest = env.spawn_tiny("run", "--from", first["id"], ready=False)
    guest.check()
    for words in ([], [], ["--instant", "settled"]):
        taken = env.vmcp_json("checkpoint", "--live", "--max-rate", "64M", *words, "tiny")
        check(taken["memory"]["plan"] in ("stage", "settle"), f"plan: {taken['memory']}")
        guest.epoch(7)
        env.vmcp_json("revert", taken["id"])
        guest.check()


def test_captured(env):
    """--wait captured returns early; the checkpoint becomes durable all the same."""
    guest = env.start_tiny(memory="512M", cmdline="set=256M rate=50000 report=0")
    taken = env.vmcp_json("checkpoint", "--live", "--wait", "captured", "tiny")
    check(taken["durability"] in ("captured", "durable"), "durability")
    deadline = time.monotonic() + 60
    while env.vmcp_json("show", taken["id"])["durability"] != "durable":
        check(time.monotonic() < deadline, "the checkpoint does not become durable")
        time.sleep(0.05)
    env.vmcp_json("revert", taken["id"])
    guest.check()


def test_raw_and_base_disks(env):
    """A raw path disk becomes the raw base at its first checkpoint; a base disk's own layer lives in the store."""
    raw = env.image("raw.img", "32M", "raw")
    guest = env.start_tiny(cmdline=BUSY, disks=[("data", raw)])
    taken = env.vmcp_json("checkpoint", "--live", "tiny")
    guest.check()
    env.vmcp_json("revert", taken["id"])
    guest.check()
    env.vmcp("kill", "tiny")
    image_check(raw)
    base = env.image("base.qcow2", "32M")
    before = os.stat(base).st_mtime_ns
    config = env.write("based.cfg", f"[vm]\nname = based\nmemory = 128M\nkernel = {env.tiny}\ncmdline = {BUSY}\n[disk data]\nbase = {base}\n")
    guest = env.spawn_tiny("run", config)
    taken = env.vmcp_json("checkpoint", "--live", "based")
    env.vmcp_json("revert", taken["id"])
    guest.check()
    env.vmcp("kill", "based")
    check_equal(os.stat(base).st_mtime_ns, before, "the base was written to")
    for source in ("based:data", taken["id"] + ":data"):
        check(env.vmcp_json("disk", "check", source)["ok"], f"{source} is damaged")
        check_equal(env.vmcp_json("disk", "info", source)["chain"][-1]["path"], base, f"the base of {source}")
    env.vmcp("disk", "resize", taken["id"] + ":data", "64M", status=4)
    env.vmcp("disk", "info", "based:nothing", status=3)
    flat = env.path("flat.raw")
    env.vmcp("disk", "export", taken["id"] + ":data", flat, "--format", "raw")
    check_equal(os.path.getsize(flat), 32 << 20, "the exported file")


def test_second_vm_from_a_checkpoint(env):
    """run --from with another name: a VM of its own beside the first one, disks apart."""
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(cmdline=BUSY, disks=[("data", disk)])
    guest.epoch(3)
    taken = env.vmcp_json("checkpoint", "--live", "tiny")
    started = env.vmcp_json("run", "--from", taken["id"], "--name", "twin", "--detach")
    check(started["boot_ns"] > 0 and started["pid"] > 0, f"run --detach --json: {started}")
    twin = env.attach_tiny("twin")
    check_equal(twin.check()["epoch"], "3", "epoch of the twin")
    twin.epoch(4)
    time.sleep(0.1)
    twin.check()
    check_equal(guest.check()["epoch"], "3", "epoch of the first VM")


def processor_ticks(pid):
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
        return sum(map(int, stat.read().rsplit(")", 1)[1].split()[11:13]))


def test_guest_that_sleeps(env):
    """A vCPU that is halted until the timer's next interrupt wakes up in time after a checkpoint, a revert, a start and in a clone."""
    guest = env.start_tiny(memory="64M", cmdline="set=8M rate=100 report=0 idle=1")
    guest.epoch(1)
    taken = env.vmcp_json("checkpoint", "--live", "tiny")["id"]
    guest.epoch(2)
    env.vmcp_json("revert", taken)
    check_equal(guest.check()["epoch"], "1", "epoch")
    env.vmcp("kill", "tiny")
    env.vmcp_json("revert", taken)
    clone = env.vmcp_json("clone", taken)["vms"][0]
    for name in ("tiny", clone["name"]):
        started = env.attach_tiny(name)
        before = int(started.ask("status", "status")["writes"])
        time.sleep(0.2)
        check(int(started.ask("status", "status")["writes"]) > before, f"{name}: the guest works no more")
        check_equal(started.check()["epoch"], "1", "epoch")
    ticks = processor_ticks(clone["pid"])
    time.sleep(1)
    ticks = processor_ticks(clone["pid"]) - ticks
    check(ticks < 50, f"it does not sleep: in a second the clone's process took {ticks} hundredths of one")


def test_guest_powers_off(env):
    guest = env.start_tiny(cmdline="report=0")
    guest.console.send_line("\nquit")
    check_equal(guest.console.wait_exit(60), 0, "exit status")
    check_equal(env.vmcp_json("ps")["vms"][0]["state"], "stopped", "state")


def test_guest_powers_off_during_a_revert(env):
    """The revert wins: it brings the guest back from before it powered off, and the VM lives on."""
    config = env.tiny_config(cmdline="set=16M rate=1000 report=0")
    guest = env.spawn_tiny("run", config, env={"VMCP_FAULT": "230:1:sleep=1500"})  # revert-checked: the VM still runs
    taken = env.vmcp_json("checkpoint", "--live", "tiny")
    argv = [env.vmcp_bin, "--store", env.store, "revert", taken["id"]]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        wait_until(lambda: "sleeping" in env.stderr_text(), "revert under way")
        guest.console.send_line("\nquit")
        _, err = running.communicate(timeout=60)
    check_equal(running.returncode, 0, f"exit status of the revert: {err.decode()}")
    time.sleep(0.5)
    check_equal(env.vmcp_json("ps")["vms"][0]["state"], "running", "state")
    guest.check()


def test_captured_and_powered_off(env):
    """A checkpoint that was captured becomes durable although its guest powers off meanwhile."""
    config = env.tiny_config(cmdline="set=16M rate=1000 report=0")
    guest = env.spawn_tiny("run", config, env={"VMCP_FAULT": "217:1:sleep=1500"})  # memory-saved
    taken = env.vmcp_json("checkpoint", "--live", "--wait", "captured", "tiny")
    guest.console.send_line("\nquit")
    check_equal(guest.console.wait_exit(60), 0, "exit status")
    env.vmcp("show", taken["id"])
    env.vmcp_json("revert", taken["id"])
    env.attach_tiny("tiny").check()


def test_revert_fails_half_way(env):
    """A machine that is neither here nor there does not run until another revert succeeds, and says so."""
    config = env.tiny_config(cmdline="set=16M rate=1000 report=0")
    guest = env.spawn_tiny("run", config, env={"VMCP_FAULT": "233:1:eio"})  # revert-memory: behind the point of no return
    taken = env.vmcp_json("checkpoint", "--live", "tiny")
    env.vmcp("revert", taken["id"], status=1)
    for command in ("pause", "resume", "checkpoint"):
        refused = env.vmcp(command, "tiny", status=1)
        check("half way" in refused.err, f"{command}: {refused}")
    env.vmcp_json("revert", taken["id"])
    guest.check()


def test_detach_lets_go(env):
    """A detached VM holds none of its caller's descriptors: who reads the caller's pipes sees their end."""
    config = env.tiny_config(cmdline="report=0")
    ours, theirs = os.pipe()
    argv = [env.vmcp_bin, "--store", env.store, "run", "--detach", config]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, pass_fds=[theirs], check=True)
    check_equal(done.stdout, b"tiny\n", "stdout")
    os.close(theirs)
    check(select.select([ours], [], [], 30)[0], "the VM holds a pipe of its caller")
    check_equal(os.read(ours, 1), b"", "what comes from the pipe")
    os.close(ours)


def niceness_of(pid):
    """Of its threads, but for the one that answers write faults, and of its session."""
    found = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/stat", encoding="utf-8") as stat:
            name, fields = stat.read().split("(", 1)[1].rsplit(")", 1)
        if name != "vmcp-fault":
            found.add(int(fields.split()[16]))
    if os.path.exists(f"/proc/{pid}/autogroup"):
        with open(f"/proc/{pid}/autogroup", encoding="utf-8") as group:
            found.add(int(group.read().split()[-1]))
    return found


def test_start_goes_before_others_only_until_it_runs(env):
    """Whoever started it: no thread, and not its session, keeps the priority of the start; nor is a niceness lost that the user chose."""
    config = env.tiny_config(cmdline="paused=1 report=0")
    for nice in (0, 7):
        argv = ["nice", "-n", str(nice), env.vmcp_bin, "--store", env.store, "--json", "run", "--detach", config]
        pid = json.loads(subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True).stdout)["pid"]
        wait_until(lambda: min(niceness_of(pid)) >= 0, "the end of the start's priority")
        check(nice in niceness_of(pid), f"niceness {niceness_of(pid)}, not {nice}")
        env.vmcp("kill", "tiny")


def test_json_contract(env):
    """The fields that others rely on."""
    disk = env.image("disk.qcow2")
    config = env.tiny_config(cmdline=BUSY, disks=[("data", disk)])
    started = env.vmcp_json("run", "--detach", config)
    check_equal(sorted(started), ["boot_ns", "pid", "socket", "vm"], "run --detach")
    env.attach_tiny("tiny").check()
    taken = env.vmcp_json("checkpoint", "--live", "-m", "a note", "--tag", "first")
    for key in ("id", "vm", "parent", "tag", "message", "created", "live", "durability", "pause_ns", "pause", "memory", "disks", "durable_ns"):
        check(key in taken, f"checkpoint: no field {key}")
    check_equal(sorted(taken["pause"]), ["disks_ns", "memory_ns", "quiesce_ns", "resume_ns", "state_ns"], "pause")
    for key in ("total_pages", "saved_pages", "zero_pages", "parent_pages", "cow_faults", "cow_fault_p50_ns", "cow_fault_p99_ns",
                "cow_fault_p999_ns", "cow_fault_max_ns", "throttled", "throttled_ns", "written_bytes"):
        check(isinstance(taken["memory"][key], int), f"checkpoint: memory.{key}")
    check_equal(taken["memory"]["total_pages"], 65536, "total_pages")
    check_equal(sorted(taken["disks"][0]), ["inflight_reads", "inflight_writes", "layer", "name"], "disks")
    check(taken["pause_ns"] >= sum(taken["pause"].values()) * 0.9, f"the parts of the pause are larger than it: {taken['pause']}")
    stats = env.vmcp_json("stats", "tiny")
    check_equal((stats["pause"]["count"], stats["pause"]["max_ns"]), (1, taken["pause_ns"]), "stats: the pauses so far")
    check_equal(stats["cow_fault"]["count"], taken["memory"]["cow_faults"], "stats: the write faults so far")
    lines = [line.split() for line in env.vmcp("stats", "tiny").out.splitlines()]
    check(["pause.max_ns", str(taken["pause_ns"])] in lines, f"stats as text: {lines}")
    back = env.vmcp_json("revert", "first")
    check_equal(sorted(back), ["checkpoint", "mode", "parts", "restored_pages", "revert_ns", "vm"], "revert")
    check_equal(sorted(back["parts"]), ["check_ns", "disks_ns", "drain_ns", "memory_ns", "pages_ns", "resume_ns", "state_ns", "stop_ns"], "revert: parts")
    log = env.vmcp_json("log", "tiny")
    check_equal(sorted(log["checkpoints"][0]),
                ["children", "created", "durability", "group", "id", "message", "parent", "periodic", "size_bytes", "tag", "vm"], "log")
    check_equal(log["vms"], [{"name": "tiny", "state": "running", "at": taken["id"]}], "log: vms")
    vm = env.vmcp_json("ps")["vms"][0]
    for key in ("name", "state", "pid", "memory_bytes", "cpus", "last_checkpoint"):
        check(key in vm, f"ps: no field {key}")
    check_equal(env.vmcp("checkpoint", "--live", "--tag", "first", status=4).err.count("\n"), 2, "lines of an error")
    error = env.vmcp("--json", "show", "nosuch", status=3).json
    check_equal(sorted(error["error"]), ["code", "hint", "message"], "error")


def test_json_documents(env):
    """Documents have the fields that the commands' tables tell of, and no others; these tables are in manual pages too."""
    def told(*words, **how):
        return env.vmcp_json(*words, complete=True, **how)

    disk = env.image("disk.qcow2", "16M")
    config = env.tiny_config(memory="32M", cmdline="set=8M rate=500 disk=1 disk_blocks=256 report=0", disks=[("data", disk)])
    told("version")
    told("doctor")
    told("config", "init", env.path("new.cfg"))
    told("run", "--dry-run", config)
    told("run", "--detach", config)
    env.attach_tiny("tiny").check()
    first, second = told("checkpoint", "--live", "--tag", "first")["id"], told("checkpoint", "tiny", "-m", "second")["id"]
    for words in (["ps"], ["top", "--interval", "100ms"], ["stats", "tiny"], ["log"], ["show", first], ["show", "tiny", "--resources"], ["tag", second, "second"],
                  ["pause", "tiny"], ["resume", "tiny"], ["revert", first], ["diff", first, second], ["verify"], ["export", first, env.path("one.vmcp")],
                  ["import", "--check", env.path("one.vmcp")], ["dump", first, env.path("core")], ["disk", "info", f"{first}:data"],
                  ["disk", "check", f"{first}:data"], ["disk", "export", f"{first}:data", env.path("flat.qcow2")], ["disk", "resize", env.path("flat.qcow2"), "32M"],
                  ["template", first, "origin"], ["clone", "origin", "--name", "twin"], ["kill", "twin"], ["stop", "tiny", "--timeout", "1"],
                  ["revert", first], ["suspend", "tiny"], ["kill", "tiny"], ["tag", "--delete", "second"], ["config", "export", "--libvirt", "tiny"],
                  ["disk", "check", "--repair", "tiny:data"], ["rm", second], ["gc"], ["gc", "--rebuild"]):
        told(*words)


def test_cancel(env):
    """A checkpoint that is cancelled leaves nothing behind, and the VM unharmed."""
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(memory="1G", cmdline="set=900M rate=1000 disk=1 disk_blocks=1024 report=0", disks=[("data", disk)])
    before = sorted(os.listdir(os.path.join(env.store, "layers")))
    argv = [env.vmcp_bin, "--store", env.store, "checkpoint", "--live", "tiny"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        while (cancel := env.vmcp("--json", "cancel", "tiny", status=None)).status != 0:
            if running.poll() is not None:
                raise Skip("the checkpoint was faster than the cancel")
            time.sleep(0.005)
        check_equal(cancel.json["vm"], "tiny", "VM of the cancelled checkpoint")
        check(len(cancel.json["id"]) in (0, 32), f"id of the cancelled checkpoint: {cancel.json['id']}")
        check(cancel.json["phase"] in ("stage", "pause", "memory", "in-flight I/O", "disks"), f"its phase: {cancel.json['phase']}")
        _, err = running.communicate(timeout=60)
        check_equal(running.returncode, 1, f"exit status of the cancelled checkpoint: {err.decode()}")
    check_equal(env.vmcp_json("log")["checkpoints"], [], "checkpoints")
    left = [name for name in sorted(os.listdir(os.path.join(env.store, "layers"))) if name not in before and not name.endswith("qcow2")]
    check_equal(left, [], "memory layers left")
    guest.check()
    taken = env.vmcp_json("checkpoint", "--live", "tiny")
    env.vmcp_json("revert", taken["id"])
    guest.check()
    env.vmcp("kill", "tiny")
    image_check(disk)


if __name__ == "__main__":
    vmcp_test.main(__name__)
