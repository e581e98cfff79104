#!/usr/bin/env python3
"""A stock Debian guest on a KVM that can run one: run by tests/with-kvm. VMCP_GUEST names the folder that examples/debian-guest/build.sh made."""

import concurrent.futures
import os
import re
import socket
import subprocess
import sys
import tarfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import vmcp_test  # noqa: E402
from debian_guest import attach, boot, check_log, fsck, said  # noqa: E402
from vmcp_test import check, check_equal  # noqa: E402

ROUNDS = int(os.environ.get("VMCP_TEST_DEBIAN_ROUNDS", "20"))


def test_boot_smp(env):
    """1, 2 and 4 vCPUs; every device is found; the power button and poweroff work."""
    for cpus in (1, 2, 4):
        console = boot(env, cpus=cpus, name=f"smp{cpus}")
        check_equal(said(console, "nproc"), str(cpus), "nproc")
        check_equal(console.check("cat /sys/devices/system/clocksource/clocksource0/current_clocksource").strip() in ("kvm-clock", "tsc"), True, "clocksource")
        check("virtio_rng" in console.check("cat /sys/class/misc/hw_random/rng_current"), "no virtio rng")
        check_log(console, f"{cpus} vCPUs")
        if cpus == 2:
            result = env.vmcp_json("stop", f"smp{cpus}", "--timeout", "60", timeout=90)
            check_equal(result["how"], "powered off", "how it stopped")
        else:
            console.send_line("sync; poweroff -f")
        check_equal(console.wait_exit(60), 0, "exit status")


def test_cpu_model(env):
    """A stock kernel on a named level: it has the features of that, and not the ones above; a checkpoint goes back in place and starts."""
    console = boot(env, extra="cpu_model = x86-64-v2")
    flags = set(console.check("grep -m1 ^flags /proc/cpuinfo").split())
    check({"sse4_2", "ssse3", "popcnt", "cx16", "nx", "lm"} <= flags, f"features that are missing: {flags}")
    check(not {"xsave", "avx", "aes", "rdrand", "bmi1", "smep"} & flags, f"features that should not be there: {flags}")
    env.vmcp("checkpoint", "--live", "--tag", "good", "debian", timeout=120)
    console.check("echo damage > /dev/shm/after")
    env.vmcp("revert", "good", timeout=120)
    console.sync(60)
    check(console.run("test -e /dev/shm/after")[0] != 0, "not where it was")
    check_log(console, "after the revert in place")
    env.vmcp("kill", "debian")
    env.vmcp("revert", "good", timeout=120)
    console = attach(env)
    check_equal(console.check("grep -c avx /proc/cpuinfo || true").strip(), "0", "processors with avx")
    check_log(console, "after the start from a checkpoint")
    env.vmcp("kill", "debian")


def test_checkpoint_damage_revert(env):
    """The main job: a live checkpoint while files are written, damage, a crash, back; files, processes and memory are there."""
    console = boot(env)
    console.check("mkdir -p /data /dev/shm/mem && for i in $(seq 50); do head -c 20000 /dev/urandom > /data/$i; done; "
                  "head -c 3000000 /dev/urandom > /dev/shm/mem/secret; sync", 120)
    sums = said(console, "sha256sum /data/* /dev/shm/mem/secret | sha256sum")
    console.check("(i=0; while :; do i=$((i+1)); echo $i >> /var/log/counter; done) & echo $! > /run/pid; sleep 1")
    taken = env.vmcp_json("checkpoint", "--live", "--tag", "good", timeout=120)
    uptime = float(console.check("cat /proc/uptime").split()[0])
    console.check("rm -rf /data /dev/shm/mem /usr/sbin /etc/passwd; sync")
    console.send_line("kill $(cat /run/pid); echo c > /proc/sysrq-trigger")
    console.wait_for(re.compile(rb"Kernel panic|sysrq: Trigger a crash"), 60)
    env.vmcp_json("revert", "good", timeout=120)
    console.sync(60)
    check_equal(said(console, "sha256sum /data/* /dev/shm/mem/secret | sha256sum"), sums, "content after the revert")
    last = "tail -n 2 /var/log/counter | head -n 1"  # the line written last may still be in the making
    first = int(console.check(last))
    check(int(console.check("sleep 1; " + last)) > first, "the process does not go on")
    check_equal(console.run("kill -0 $(cat /run/pid)")[0], 0, "the process is gone")
    after = float(console.check("cat /proc/uptime").split()[0])
    check(abs(after - uptime) < 60, f"the guest's clock jumped: {uptime} -> {after}")
    check_log(console, "after the revert in place")
    fsck(env, taken["id"], "checkpoint")
    # The same once more with the VM's process gone.
    env.vmcp("kill", "debian")
    back = env.vmcp_json("revert", "good", timeout=120)
    check_equal(back["mode"], "started", "mode")
    console = attach(env)
    check_equal(said(console, "sha256sum /data/* /dev/shm/mem/secret | sha256sum"), sums, "content after the start")
    check_log(console, "after the start from a checkpoint")
    env.vmcp("kill", "debian")


def test_balloon(env):
    """The stock driver reports free pages and follows the balloon's size; what comes back after a revert is what was there."""
    console = boot(env, extra="balloon = yes")
    check("virtio_balloon" in console.check("ls -l /sys/bus/virtio/devices/*/driver"), "the guest has no driver for the balloon")

    def stats():
        return env.vmcp_json("stats", "debian")

    def wait_for(what, condition):
        deadline = time.monotonic() + 120
        while not condition(stats()):
            check(time.monotonic() < deadline, f"not within 120 s: {what}: {stats()}")
            time.sleep(0.5)

    # All of memory is used once, and then free.
    console.check("head -c 150M /dev/zero | tr '\\0' x > /dev/shm/used", 180)
    used = stats()["memory_allocated_bytes"]
    console.check("rm /dev/shm/used")
    wait_for(f"free pages given back of {used} bytes", lambda s: s["memory_allocated_bytes"] < used - (100 << 20))
    check(stats()["reported_bytes"] > 100 << 20, f"too few pages were reported: {stats()}")
    env.vmcp("balloon", "debian", "256M")
    wait_for("the balloon's size", lambda s: s["balloon_bytes"] == 128 << 20 and s["balloon_pending_bytes"] == 0)
    console.check("head -c 10M /dev/urandom > /dev/shm/secret")
    secret = said(console, "sha256sum /dev/shm/secret")
    env.vmcp_json("checkpoint", "--live", "--tag", "small", timeout=120)
    env.vmcp("balloon", "debian", "384M")
    wait_for("the balloon's end", lambda s: s["balloon_bytes"] == 0)
    console.check("rm /dev/shm/secret; head -c 150M /dev/zero | tr '\\0' y > /dev/shm/used", 180)
    env.vmcp_json("checkpoint", "--live", "debian", timeout=120)
    env.vmcp_json("revert", "small", timeout=120)
    console.sync(60)
    check_equal(stats()["balloon_bytes"], 128 << 20, "the balloon after the revert")
    check_equal(said(console, "sha256sum /dev/shm/secret"), secret, "content after the revert")
    env.vmcp("balloon", "debian", "384M")
    wait_for("the balloon's end after the revert", lambda s: s["balloon_bytes"] == 0)
    console.check("head -c 150M /dev/zero | tr '\\0' x > /dev/shm/used; rm /dev/shm/used", 180)
    check_equal(said(console, "sha256sum /dev/shm/secret"), secret, "content at the end")
    check_log(console, "with a balloon")
    env.vmcp("kill", "debian")


DHCP = r"""printf '#!/bin/sh\n[ "$1" = bound ] && ip addr add $ip/24 dev $interface && ip route add default via $router\nexit 0\n' > /var/tmp/dhcp
chmod +x /var/tmp/dhcp; busybox ip link set eth0 up; sed -i 's/ip /busybox ip /g' /var/tmp/dhcp; busybox udhcpc -i eth0 -n -q -t 30 -T 1 -s /var/tmp/dhcp"""
# A server that answers lines, and a client that writes down how its connection ended (no job of the console's shell, which would tell of its end).
SERVER = """perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => 8080, Listen => 8, ReuseAddr => 1) or die;
while ($c = $s->accept) { if (!fork) { $c->autoflush(1); while (<$c>) { print $c "echo $_" } exit } }' > /run/server 2>&1 &"""
CLIENT = """(perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(PeerAddr => "10.0.2.2:%d") or die; open(F, ">/run/ended"); $n = sysread($s, $b, 1);
print F defined $n ? "end" : "error: $!"; close F' > /run/client 2>&1 &)"""

# Lines from the host to the socket device, answered: AF_VSOCK is 40, any CID all ones.
VSOCK_SERVER = """perl -e 'socket(S, 40, 1, 0) or die "$!"; bind(S, pack("SSLLx4", 40, 0, 5000, 0xffffffff)) or die "$!"; listen(S, 5);
while (accept(C, S)) { if (!fork) { select(C); $| = 1; while (<C>) { print "vsock $_" } exit } }' > /run/vserver 2>&1 &"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Caller:
    """A connection from the host to the guest's server."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)

    def echo(self, text):
        self.socket.sendall(f"{text}\n".encode())
        answer = b""
        while not answer.endswith(b"\n"):
            got = self.socket.recv(100)
            check(got, "the connection ended")
            answer += got
        check_equal(answer.decode(), f"echo {text}\n", "answer")

    def is_reset(self):
        try:
            return self.socket.recv(1) == b"never"
        except ConnectionResetError:
            return True


class VsockCaller:
    def __init__(self, env, name, port):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(os.path.join(env.store, "vms", name, "vsock.sock"))
        self.socket.sendall(f"CONNECT {port}\n".encode())
        self.file = self.socket.makefile("rwb", buffering=0)
        answer = self.file.readline()
        check(answer.startswith(b"OK "), f"CONNECT {port} of {name}: {answer}")

    def echo(self, text):
        self.file.write(f"{text}\n".encode())
        check_equal(self.file.readline().decode(), f"vsock {text}\n", "answer over vsock")


def first_vsock_caller(env):
    """Its server may not listen yet; later ones are answered at once."""
    end = time.monotonic() + 60
    while True:
        try:
            return VsockCaller(env, "debian", 5000)
        except vmcp_test.Failed:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def told_of_lives(env, name, console):
    """How often the kernel's ACPI was told of a new generation id since it booted; what it finds there is what vmcp says. (Debian's kernel lacks vmgenid.)"""
    console.check("ls -d /sys/bus/acpi/devices/VMCP0002:00 /sys/bus/platform/drivers/acpi-ged/ACPI0013:00")
    found = said(console, "dd if=/dev/mem bs=16 skip=$((0xff010 / 16)) count=1 2> /dev/null | od -An -tx1 | tr -d ' '")
    check_equal(found, env.vmcp_json("show", name, "--resources")["generation_id"], "the generation id in the guest")
    return sum(int(count) for count in console.check("grep ACPI:Ged /proc/interrupts").split() if count.isdigit())


def check_pci(env, name, console):
    """The devices are at the addresses that the table of resources has."""
    table = {one["name"]: one["guest"] for one in env.vmcp_json("show", name, "--resources")["resources"] if one["type"] == "pci"}
    check({"disk/root", "vsock", "net/lan"} <= set(table), f"{sorted(table)}")
    devices = console.check("for d in /sys/bus/pci/devices/*/virtio*; do echo $(basename $(dirname $d)) $(cat $d/device) $(cat $d/block/*/serial 2> /dev/null) $(ls $d/net 2> /dev/null); done")
    kinds = {"0x0001": "net/lan", "0x0004": "rng", "0x0005": "balloon", "0x0013": "vsock"}
    found = {}
    for address, kind, *more in (line.split() for line in devices.splitlines() if line.startswith("0000:")):
        found[f"disk/{more[0]}" if kind == "0x0002" else kinds[kind]] = address
    check_equal(found, table, "PCI addresses in the guest and in the table")


def wait_ended(console):
    """How the guest's client lost its connection, which was open at the checkpoint."""
    return console.check("for i in $(seq 60); do [ -s /run/ended ] && break; sleep 0.5; done; cat /run/ended", 120).strip()


def test_network(env):
    """DHCP; a service behind a forwarded port before, during and after a checkpoint, a revert and a start; connections of another life are reset."""
    port, other = free_port(), free_port()
    net = f"vsock_cid = 3\n[net lan]\nmode = user\nforward = tcp:{port}:8080"
    console = boot(env, extra=net)
    console.check(DHCP, 90)
    check("10.0.2.15/24" in console.check("busybox ip addr show eth0"), "no address")
    check("52:56:" in console.check("cat /sys/class/net/eth0/address"), "the address is not the VM's own")
    check_pci(env, "debian", console)
    console.check(SERVER + "\n" + VSOCK_SERVER + " sleep 2")
    console.check("for i in $(seq 120); do grep -q ':1F90 ' /proc/net/tcp && break; sleep 0.5; done; grep ':1F90 ' /proc/net/tcp || ! cat /run/server /run/vserver", 90)
    Caller(port).echo("first")
    listener = socket.create_server(("127.0.0.1", 0))
    console.check(CLIENT % listener.getsockname()[1])
    accepted, _ = listener.accept()
    caller = Caller(port)
    caller.echo("before")
    vsock = first_vsock_caller(env)
    vsock.echo("before")
    taken = env.vmcp_json("checkpoint", "--live", "--tag", "good", timeout=120)
    caller.echo("after the checkpoint")
    vsock.echo("after the checkpoint")
    check_equal(console.run("test -s /run/ended")[0], 1, "the guest's client has lost its connection at the checkpoint")

    env.vmcp_json("revert", "good", timeout=120)
    check(caller.is_reset(), "the host's end of an old connection is no reset")
    accepted.settimeout(60)
    try:
        check(accepted.recv(1) == b"never", "the other one's neither")
    except ConnectionResetError:
        pass
    console.sync(60)
    check_equal(wait_ended(console), "error: Connection reset by peer", "the guest's end")
    Caller(port).echo("after the revert")
    try:
        check_equal(vsock.socket.recv(1), b"", "the old connection over vsock")
    except ConnectionResetError:
        pass
    VsockCaller(env, "debian", 5000).echo("after the revert")
    with open(os.path.join(env.store, "checkpoints", taken["id"], "manifest"), encoding="utf-8") as manifest:
        check("mac = 52:56" in manifest.read(), "the address is not in the manifest")

    # The port is taken as long as the VM runs; another one does.
    result = env.vmcp("run", "--detach", "--from", "good", "--name", "two", status=4, timeout=120)
    check(f"127.0.0.1:{port}" in result.err and "hint:" in result.err, str(result))
    env.vmcp("run", "--detach", "--from", "good", "--name", "two", "--net", f"lan:forward=tcp:{other}:8080", timeout=120)
    second = attach(env, "two")
    Caller(other).echo("the second")
    VsockCaller(env, "two", 5000).echo("the second")
    check_equal(told_of_lives(env, "debian", console), 1, "lives of the first since the checkpoint, as its kernel was told")
    check_equal(told_of_lives(env, "two", second), 1, "lives of the second")
    Caller(port).echo("the first")
    check_equal(wait_ended(second), "error: Connection reset by peer", "the second's old connection")
    env.vmcp("kill", "two")

    env.vmcp("kill", "debian")
    back = env.vmcp_json("revert", "good", timeout=120)
    check_equal(back["mode"], "started", "mode")
    console = attach(env)
    Caller(port).echo("after the start")
    VsockCaller(env, "debian", 5000).echo("after the start")
    nets = env.vmcp_json("stats", "debian")["nets"]
    check(nets[0]["received_frames"] > 0 and nets[0]["sent_frames"] > 0 and nets[0]["mode"] == "user", f"stats: {nets}")
    check_log(console, "with a network card")
    env.vmcp("kill", "debian")


# What `ethtool -l eth0` says, after `ethtool -L eth0 combined N` where a number is given: how many pairs of queues are used, of how many.
CHANNELS = r"""perl -e 'socket(S, 2, 2, 0) or die "$!"; $d = pack("L9", 0x3c); $r = pack("a16P36", "eth0", $d); ioctl(S, 0x8946, $r) or die "$!";
@c = unpack("L9", $d); if (@ARGV) { @c[0, 8] = (0x3d, @ARGV); $d = pack("L9", @c); $r = pack("a16P36", "eth0", $d); ioctl(S, 0x8946, $r) or die "$!" } print "$c[8] of $c[4]\n"' """


def check_queues(console, port, pairs, what):
    """By these pairs of queues, and no others, come the frames of new connections: 12 of them, or more where a queue had none of these."""
    def interrupts():
        lines = [line.split() for line in said(console, "grep -- '-input[.]' /proc/interrupts").splitlines()]
        return {line[-1].rsplit(".", 1)[1]: sum(int(count) for count in line[1:3]) for line in lines}

    before, used, callers = interrupts(), [], []
    while len(used) < pairs and len(callers) < 72:
        callers += [Caller(port) for _ in range(12)]
        for number, caller in enumerate(callers[-12:]):
            caller.echo(f"flow {number}")
        used = [queue for queue, count in sorted(interrupts().items()) if count > before[queue]]
    check_equal(used, ["0", "1", "2", "3"][:pairs], f"queues with traffic {what}")


def test_network_queues(env):
    """A card of four pairs of queues, of which a guest of two processors takes two; another number of them; traffic by all over a live checkpoint, a revert and a start."""
    port = free_port()
    console = boot(env, cpus=2, extra=f"[net lan]\nmode = user\nqueues = 4\nforward = tcp:{port}:8080")
    console.check(DHCP, 90)
    console.check(SERVER + " sleep 2")
    console.check("for i in $(seq 120); do grep -q ':1F90 ' /proc/net/tcp && break; sleep 0.5; done; grep ':1F90 ' /proc/net/tcp || ! cat /run/server", 90)
    count = "ls -d /sys/class/net/eth0/queues/rx-* | wc -l"
    check_equal(said(console, CHANNELS), "2 of 4", "pairs of queues")
    check_equal(said(console, count), "2", "receive queues")
    check_queues(console, port, 2, "at first")
    caller = Caller(port)
    env.vmcp_json("checkpoint", "--live", "--tag", "good", timeout=120)
    caller.echo("after the checkpoint")
    check_queues(console, port, 2, "after the checkpoint")
    check_equal(said(console, CHANNELS + "1"), "1 of 4", "pairs of queues, set to one")
    check_equal(said(console, count), "1", "receive queues, set to one")
    check_queues(console, port, 1, "set to one")
    check_equal(said(console, CHANNELS + "4"), "4 of 4", "pairs of queues, set to four")
    check_queues(console, port, 4, "set to four")
    env.vmcp_json("checkpoint", "--live", "--tag", "four", timeout=120)
    for tag, pairs in (("good", 2), ("four", 4)):
        env.vmcp_json("revert", tag, timeout=120)
        console.sync(60)
        check_equal(said(console, CHANNELS), f"{pairs} of 4", f"pairs of queues after the revert to {tag}")
        check_queues(console, port, pairs, f"after the revert to {tag}")
    check_log(console, "with queues")
    env.vmcp("kill", "debian")
    check_equal(env.vmcp_json("revert", "four", timeout=120)["mode"], "started", "mode")
    console = attach(env)
    check_queues(console, port, 4, "after the start")
    env.vmcp("kill", "debian")


# Says who it is to whoever connects.
WHO = """perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => 80, Listen => 8, ReuseAddr => 1) or die;
while ($c = $s->accept) { open(F, "/proc/sys/kernel/hostname"); print $c <F>; close F; close $c }' > /run/who 2>&1 &"""


def tools(env):
    """A disk that is a tar of the agent, its shell variant, and the host's ssh-keygen with its library, as the guest has none."""
    build = os.path.join(os.path.dirname(os.path.abspath(env.vmcp_bin)), "..", "guest")
    libraries = subprocess.run(["ldd", "/usr/bin/ssh-keygen"], capture_output=True, check=True, text=True).stdout
    files = [os.path.join(build, "vmcp-agent"), os.path.join(os.path.dirname(__file__), "..", "..", "guest", "vmcp-agent.sh"), "/usr/bin/ssh-keygen",
             *re.findall(r"=> (\S+/lib(?:crypto|z)\S+)", libraries)]
    with tarfile.open(env.path("tools.tar"), "w") as tar:
        for file in files:
            tar.add(os.path.realpath(file), arcname=os.path.basename(file))
    return env.path("tools.tar")


def whoami(port):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as caller:
        return caller.makefile().read().strip()


def test_agent(env):
    """The agent in a stock guest: clones are other machines at once, as seen inside and through one port for all of them; a revert is another life."""
    own, shared = free_port(), free_port()
    console = boot(env, extra=f"vsock_cid = 3\n[net lan]\nmode = user\nforward = tcp:{own}:80\n[net back]\nmode = group\nnetwork = back\nip = 10.9.0.1/24", disks=[f"[disk tools]\npath = {tools(env)}\nreadonly = yes"])
    console.check(DHCP, 90)
    console.check("mkdir /opt/tools && tar -xf /dev/vdb -C /opt/tools && mv /opt/tools/lib* /usr/lib/x86_64-linux-gnu/ && ldconfig; mv /opt/tools/ssh-keygen /usr/bin/", 120)
    console.check("mkdir -p /etc/ssh /etc/vmcp/hooks.d; ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key; "
                  "printf '#!/bin/sh\\necho \"$1 $VMCP_NAME\" >> /run/events\\n' > /etc/vmcp/hooks.d/note; chmod +x /etc/vmcp/hooks.d/note", 120)
    console.check(WHO + "\n(/opt/tools/vmcp-agent > /run/agent 2>&1 &)")

    def wait_agent(name, event):
        end = time.monotonic() + 120
        while (seen := env.vmcp_json("stats", name)["agent"])["event"] != event or not seen["connected"]:
            check(time.monotonic() < end, f"the agent of {name} is {seen}, not {event}")
            time.sleep(0.2)
        check_equal(seen["problem"], None, f"problem of {name}")

    wait_agent("debian", "first")
    everything = "cat /etc/hostname /proc/sys/kernel/hostname /etc/machine-id /etc/ssh/ssh_host_ed25519_key.pub; grep -c debian /etc/hosts; cat /run/events"
    before = said(console, everything).splitlines()
    check_equal((before[:2], before[-1]), (["debian", "debian"], "first debian"), "the origin")
    address = "busybox ip -4 addr show dev eth1 | grep -o 'inet [0-9./]*'; cat /sys/class/net/eth1/address"
    check_equal(said(console, address).splitlines()[0], "inet 10.9.0.1/24", "the address of the card that has one in guest.cfg")
    console.check("ln -s /bin/busybox /usr/local/sbin/ip; busybox ip route add 10.10.0.0/16 via 10.9.0.200 dev eth1")
    env.vmcp("checkpoint", "--live", "--tag", "good", "debian", timeout=120)
    env.vmcp("pause", "debian")
    rules = env.write("web.rules", f"port:lan/tcp/80 any multiplex {shared}\nhostname any set web-<N>\nip:back any allocate 10.9.0.11-10.9.0.99/24\n")
    clones = env.vmcp_json("clone", "good", "--count", "2", "--rules", rules, timeout=120)["vms"]
    seen, consoles = [], []
    for number, clone in enumerate(clones, 1):
        wait_agent(clone["name"], "clone")
        consoles.append(attach(env, clone["name"]))
        inside = said(consoles[-1], everything).splitlines()
        check_equal((inside[:2], inside[2]), ([f"web-{number}"] * 2, clone["identity"]["uuid"].replace("-", "")), "who it is")
        mac = next(one["guest"] for one in clone["identity"]["resources"] if (one["type"], one["name"]) == ("mac", "back"))
        check_equal(said(consoles[-1], address).splitlines(), [f"inet 10.9.0.{10 + number}/24", mac], "its addresses")
        check("via 10.9.0.200" in said(consoles[-1], "busybox ip route"), "the route by a gateway is gone")
        check(inside[3].endswith(f" root@web-{number}") and inside[3] != before[2], f"its key: {inside}")
        check_equal((inside[-3], inside[-1]), ("0", f"clone {clone['name']}"), "/etc/hosts and hooks")
        seen.append(inside[3].split()[1])
    check(len(set(seen)) == 2, f"the clones have the same key: {seen}")
    for one, other in zip(consoles, (12, 11)):
        one.check(f"busybox ping -c 1 -W 20 10.9.0.{other}", 60)
    check_equal(sorted(whoami(shared) for _ in range(4)), ["web-1", "web-1", "web-2", "web-2"], "who answers at the port that they share")
    env.vmcp("revert", "good", "--vm", clones[0]["name"], timeout=120)
    wait_agent(clones[0]["name"], "clone")  # the checkpoint is the origin's
    env.vmcp("kill", clones[0]["name"])
    check_equal([whoami(shared) for _ in range(2)], ["web-2"] * 2, "who answers when the other one has gone")
    # The shell variant, in a machine whose agent knows it.
    second = consoles[1]  # who attaches beside it may only watch
    second.check("kill $(pidof vmcp-agent); rm /run/events; busybox ip addr flush dev eth1; busybox ip addr add 10.9.0.77/16 dev eth1; "
                 "busybox ip route add 10.10.0.0/16 via 10.9.0.200 dev eth1; busybox ip link set eth1 address 52:54:00:00:00:01; (/opt/tools/vmcp-agent.sh > /run/agent 2>&1 &)")
    wait_agent(clones[1]["name"], "life")
    check_equal(said(second, "cat /run/events"), f"life {clones[1]['name']}", "hooks of the shell variant")
    check_equal(said(second, address).splitlines(), ["inet 10.9.0.12/24", mac], "addresses by the shell variant")
    check("via 10.9.0.200" in said(second, "busybox ip route"), "the route by a gateway is gone")
    env.vmcp("kill", clones[1]["name"])
    env.vmcp("kill", "debian")


def ssh(port, command, timeout=300):
    """What a command in the guest prints; sshd may still be starting."""
    end = time.monotonic() + timeout
    while True:
        done = subprocess.run(["ssh", "-p", str(port), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=60",
                               "-o", "BatchMode=yes", "root@127.0.0.1", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode != 255:  # that is ssh's own
            check_equal(done.returncode, 0, f"ssh: {command}: {done.stdout}{done.stderr}: exit status")
            return done.stdout.strip()
        check(time.monotonic() < end, f"ssh at port {port}: {done.stderr}")
        time.sleep(1)


def test_systemd(env):
    """A Debian with systemd, reached by ssh over the user network: through a checkpoint, a wreck and a revert, and a branch beside it."""
    port, other = free_port(), free_port()
    console = boot(env, memory="512M", extra=f"[net lan]\nmode = user\nforward = tcp:{port}:22", boot_s=500)
    check_equal(ssh(port, "cat /proc/1/comm"), "systemd", "init")
    check_equal(ssh(port, "systemctl is-system-running --wait; systemctl --failed --plain --no-legend"), "running", "the system's state")
    ssh(port, "echo good > /root/state; sync")
    env.vmcp("checkpoint", "--live", "--tag", "good", "debian", timeout=120)
    ssh(port, "rm -rf /root/state /usr/lib/systemd /etc; sync")
    console.send_line("echo c > /proc/sysrq-trigger")
    console.wait_for("Kernel panic", 120)
    env.vmcp("revert", "good", timeout=120)
    check_equal(ssh(port, "cat /root/state; systemctl is-active ssh systemd-networkd"), "good\nactive\nactive", "after the revert")
    env.vmcp("run", "--detach", "--from", "good", "--name", "two", "--net", f"lan:forward=tcp:{other}:22", timeout=120)
    ssh(other, "echo branched > /root/state")
    check_equal((ssh(port, "cat /root/state"), ssh(other, "cat /root/state")), ("good", "branched"), "the two")
    check_log(console, "systemd")
    env.vmcp("kill", "two")
    result = env.vmcp_json("stop", "debian", "--timeout", "200", timeout=240)
    check_equal(result["how"], "powered off", "how it stopped")


def test_stress_smp(env):
    """2 vCPUs under stress-ng survive rounds of live checkpoint and revert; the disk as of every checkpoint is clean."""
    console = boot(env, cpus=2, memory="256M")
    console.check("cd /var/tmp && (stress-ng --cpu 1 --vm 1 --vm-bytes 32M --hdd 1 --hdd-bytes 16M --switch 1 --timer 1 --quiet --timeout 0 & echo $! > /run/stress); sleep 3", 60)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        checks = []
        for number in range(ROUNDS):
            started = time.monotonic()
            taken = env.vmcp_json("checkpoint", "--live", "debian", timeout=180)
            time.sleep(0.3)
            env.vmcp_json("revert", taken["id"], timeout=120)
            checks.append(pool.submit(fsck, env, taken["id"], f"round {number}"))
            print(f"  round {number}: {time.monotonic() - started:.1f} s, of which until durable {taken['durable_ns'] / 1e9:.1f} s; "
                  f"pause {taken['pause_ns'] / 1e6:.2f} ms, {taken['memory']['cow_faults']} faults", flush=True)
        for done in checks:
            done.result()
    console.sync(120)
    check_equal(console.run("kill -0 $(cat /run/stress)")[0], 0, "stress-ng is gone")
    console.check("kill $(cat /run/stress); wait; sync", 120)
    check_log(console, f"after {ROUNDS} rounds")
    env.vmcp("kill", "debian")


if __name__ == "__main__":
    vmcp_test.main(__name__)
