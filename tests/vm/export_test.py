#!/usr/bin/env python3
"""Whole VMs with the tiny guest: exports, imports, and going on in another store."""

import filecmp
import glob
import hashlib
import os
import random
import shutil
import socket
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import store_memory  # noqa: E402
import vmcp_test  # noqa: E402
from tiny_test import compare_images, free_ports, image_check, ip, own_network  # noqa: E402
from vmcp_test import check, check_equal  # noqa: E402

LOAD = "set=32M rate=5000 disk=1 disk_blocks=1024 qd=4 report=0"


def memory_sum(store, checkpoint):
    memory = store_memory.Memory(store, checkpoint)
    total = hashlib.sha256(memory.contents()).hexdigest()
    memory.close()
    return total


def tree(folder):
    """Every file below a folder and what is in it, but for the catalogue, which SQLite may tidy, and locks."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            if not name.startswith("catalog.db") and name != "lock" and os.path.isfile(path):
                with open(path, "rb") as file:
                    found[os.path.relpath(path, folder)] = hashlib.sha256(file.read()).hexdigest()
    return found


def whole(env, store, ids, vms):
    """What the store has, by its own telling and by its files: these checkpoints, these VMs, nothing left over."""
    log = env.vmcp_json("log", store=store)
    check_equal(sorted(one["id"] for one in log["checkpoints"]), sorted(ids), "checkpoints")
    check_equal(sorted(one["name"] for one in log["vms"]), sorted(vms), "VMs")
    check_equal(os.listdir(os.path.join(store, "staging")), [], "staging")
    needed = set()
    for one in ids:
        shown = env.vmcp_json("show", one, store=store)
        needed.update(disk["layer"] for disk in shown["disks"])
        needed.update(store_memory.layers(store, one))
        needed.add(shown["memory"]["layer"])
    there = {name.split(".")[0] for name in os.listdir(os.path.join(store, "layers"))}
    check(there <= needed, f"layers that nobody needs: {there - needed}")
    env.vmcp("verify", store=store)


def taken(env, **options):
    """A guest with a disk, under load; a checkpoint, tagged; what the guest says of itself then; the guest is ended."""
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(memory="128M", cmdline=LOAD, disks=[("data", disk)], **options)
    guest.epoch(3)
    time.sleep(0.2)
    one = env.vmcp_json("checkpoint", "--live", "--tag", "first", "-m", "before the move", "tiny")["id"]
    return guest, one


def netns():
    """Two network namespaces with a cable between them, or None where that cannot be."""
    names = (f"vmcpa{os.getpid()}", f"vmcpb{os.getpid()}")

    def run(*words):
        return subprocess.run(words, capture_output=True, check=False).returncode == 0

    if os.geteuid() != 0 or shutil.which("ip") is None or not all(run("ip", "netns", "add", name) for name in names):
        return None
    cable = run("ip", "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
    for number, name in enumerate(names):
        cable = cable and run("ip", "-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "cable") and \
            run("ip", "-n", name, "link", "set", "cable", "up")
    if not cable:
        drop_netns(names)
        return None
    return names


def drop_netns(names):
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


SEND = "import socket,sys,time\nfor _ in range(100):\n  try: s=socket.create_connection(('10.77.0.2',7777)); break\n  except OSError: time.sleep(0.1)\n" \
       "while d:=sys.stdin.buffer.read1(1<<16): s.sendall(d)\ns.shutdown(1); s.recv(1)"
RECEIVE = "import socket,sys\nl=socket.create_server(('10.77.0.2',7777)); c,_=l.accept()\n" \
          "while d:=c.recv(1<<16): sys.stdout.buffer.write(d)\nsys.stdout.buffer.flush()"


def through(env, names, words, other):
    """vmcp export WORDS -  |  cable  |  vmcp import -"""
    inside = [["ip", "netns", "exec", name] if names else [] for name in (names or ("", ""))]
    out = subprocess.Popen([*inside[0], env.vmcp_bin, "--store", env.store, "export", *words, "-"], stdout=subprocess.PIPE)
    source, helpers = out.stdout, []
    if names:
        receive = subprocess.Popen([*inside[1], sys.executable, "-c", RECEIVE], stdout=subprocess.PIPE)
        send = subprocess.Popen([*inside[0], sys.executable, "-c", SEND], stdin=out.stdout)
        source, helpers = receive.stdout, [receive, send]
    into = subprocess.run([*inside[1], env.vmcp_bin, "--store", other, "import", "-"], stdin=source, capture_output=True, timeout=300, check=False)
    source.close()
    for one in (out, *helpers):
        check_equal(one.wait(60), 0, f"exit of {one.args}")
    check_equal(into.returncode, 0, f"exit of import: {into.stderr}")
    return into.stdout.decode().strip()


def start_there(env, other, *words):
    source, env.store = env.store, other
    guest = env.spawn_tiny("run", *words, ready=False)
    env.store = source
    return guest


def test_move_to_another_host(env):
    """Export through a pipe, import in another store; the first store and its images are gone; the guest goes on there and finds all as it
    was, goes back, takes checkpoints; what it made since comes back as an increment."""
    names = netns()
    if not names:
        print("  no network namespaces here: through a plain pipe", flush=True)
    guest, one = taken(env)
    other = env.path("other")
    try:
        check_equal(through(env, names, [one], other), one, "id")
        state = guest.sum()
        env.vmcp("kill", "tiny")
        check_equal(memory_sum(other, one), memory_sum(env.store, one), "memory")
        shown = env.vmcp_json("show", "first", store=other)
        check_equal((shown["id"], shown["message"], shown["vm"]), (one, "before the move", "tiny"), "what is told of it")
        whole(env, other, [one], ["tiny"])
        check_equal(env.vmcp_json("ps", store=other)["vms"][0]["state"], "stopped", "state")
        os.rename(env.path("disk.qcow2"), env.path("gone.qcow2"))
        os.rename(env.store, env.path("away"))
        guest = start_there(env, other, "--from", "tiny")
        check_equal(guest.check()["epoch"], "3", "epoch")
        guest.epoch(4)
        second = env.vmcp_json("checkpoint", "--live", "tiny", store=other)
        check_equal(second["parent"], one, "parent")
        check(second["memory"]["parent_pages"] > 0, "not incremental")
        env.vmcp_json("revert", one, store=other)
        check_equal(guest.check()["epoch"], "3", "epoch after the revert")
        guest.epoch(5)
        env.vmcp_json("revert", second["id"], store=other)
        check_equal(guest.check()["epoch"], "4", "epoch")
        check(state["epoch"] == "3", "the source went on")
        env.vmcp("kill", "tiny", store=other)
        # And back, as an increment.
        os.rename(env.path("away"), env.store)
        os.rename(env.path("gone.qcow2"), env.path("disk.qcow2"))
        back, forth = env.store, other
        env.store = forth
        check_equal(through(env, names, [second["id"], "--since", one], back), second["id"], "id")
        env.store = back
        check_equal(memory_sum(back, second["id"]), memory_sum(other, second["id"]), "memory that came back")
        check_equal(env.vmcp_json("show", second["id"])["parent"], one, "parent")
        whole_guest = start_there(env, back, "--from", second["id"])
        check_equal(whole_guest.check()["epoch"], "4", "epoch")
        env.vmcp("kill", "tiny")
        image_check(env.path("disk.qcow2"))
    finally:
        if names:
            drop_netns(names)


def streamed():
    """What the guest's TCP service sends, and the address that the host knows it by."""
    end = time.monotonic() + 60
    while True:
        try:
            with socket.create_connection(("10.0.2.15", 5002), timeout=5) as caller:
                got = caller.recv(65536)
        except OSError:
            check(time.monotonic() < end, "the guest's service does not answer")
            time.sleep(0.2)
            continue
        said = subprocess.run(["ip", "neigh", "show", "10.0.2.15"], capture_output=True, check=True, text=True).stdout.split()
        return len(got), said[said.index("lladdr") + 1]


def test_a_clone_moves_to_another_network(env):
    """A checkpoint of a clone, in another store in another network namespace, with a tap device of another name and another port: its TCP service answers, and is who it was."""
    ports = free_ports(3)
    rules = env.write("rules", f"tap:lan rw set vmtap1\nport:out any set {ports[1]}\n")
    with own_network():
        ip("link set lo up")
        ip("tuntap add vmtap1 mode tap")
        ip("addr add 10.0.2.1/24 dev vmtap1")
        env.start_tiny(memory="32M", cmdline="set=4M rate=500 report=0 net=1",
                       extra=f"[net lan]\nmode = tap\ntap = vmtap0\n[net out]\nmode = user\nforward = tcp:{ports[0]}:80\n")
        env.vmcp("checkpoint", "--live", "tiny", "--tag", "origin")
        clone = env.vmcp_json("clone", "origin", "--name", "one", "--rules", rules)["vms"][0]
        env.attach_tiny("one").epoch(9)
        size, mac = streamed()
        check(size > 0, "nothing came")
        taken_of_it = env.vmcp_json("checkpoint", "--live", "one")["id"]
        env.vmcp("export", taken_of_it, env.path("one.vmcp"))
        for name in ("tiny", "one"):
            env.vmcp("kill", name)
    with own_network():
        ip("link set lo up")
        ip("tuntap add elsewhere mode tap")
        ip("addr add 10.0.2.1/24 dev elsewhere")
        env.store = env.path("other")
        env.vmcp("import", env.path("one.vmcp"))
        env.vmcp("run", "--detach", "--from", taken_of_it, "--name", "moved", "--net", f"lan:mode=tap,lan:tap=elsewhere,out:forward=tcp:{ports[2]}:80")
        check_equal(streamed()[1], mac, "whom the service's host is")
        check_equal(env.attach_tiny("moved").check()["epoch"], "9", "its epoch")
        bound = {(one["type"], one["name"]): one["host"] for one in env.vmcp_json("show", "moved", "--resources")["resources"]}
        check_equal((bound["tap", "lan"], bound["port", "out/tcp/80"]), ("elsewhere", f"tcp:127.0.0.1:{ports[2]}"), "what it has of this host")
        known = {one["name"]: one["guest"] for one in clone["identity"]["resources"] if one["type"] == "mac"}
        check_equal({one["name"]: one["guest"] for one in env.vmcp_json("show", "moved", "--resources")["resources"] if one["type"] == "mac"}, known, "addresses of its cards")
        env.vmcp("kill", "moved")


def contents(env, store, reference, name):
    """A checkpoint's disk as raw bytes."""
    path = env.path(f"content-{name}.raw")
    if os.path.exists(path):
        os.unlink(path)
    env.vmcp("disk", "export", reference, path, "--format", "raw", store=store)
    return path


def test_every_kind_of_disk(env):
    """A disk with a base, a raw one, a read-only one: all come along, flattened, and start where none of their files is."""
    rng = random.Random(5)
    base = env.image("base.qcow2", "32M")
    for where in range(0, 32, 4):
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P {where + 1} {where}M 200k", base], check=True, capture_output=True)
    with open(env.path("plain.raw"), "wb") as file:
        file.truncate(16 << 20)
        for _ in range(20):
            file.seek(rng.randrange(0, 16 << 20, 512))
            file.write(rng.randbytes(512))
    seed = env.image("seed.qcow2", "8M")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 1M", seed], check=True, capture_output=True)
    config = env.tiny_config(memory="64M", cmdline="set=8M rate=1000 disk=1 disk_blocks=512 report=0", disks=[("data", env.image("disk.qcow2"))])
    with open(config, "a", encoding="utf-8") as file:
        file.write(f"[disk based]\nbase = {base}\n[disk plain]\npath = {env.path('plain.raw')}\n[disk seed]\npath = {seed}\nreadonly = yes\n")
    guest = env.spawn_tiny("run", config)
    one = env.vmcp_json("checkpoint", "--live", "tiny")["id"]
    guest.epoch(2)
    two = env.vmcp_json("checkpoint", "--live", "tiny")["id"]
    env.vmcp("kill", "tiny")
    disks = {name: contents(env, env.store, f"{one}:{name}", name) for name in ("data", "based", "plain")}
    shutil.copy(seed, env.path("seed.copy"))
    exported = env.vmcp_json("export", one, env.path("one.vmcp"))
    check_equal(exported["file_bytes"], os.path.getsize(env.path("one.vmcp")), "bytes")
    env.vmcp("export", two, env.path("two.vmcp"))
    delta = env.vmcp_json("export", two, env.path("delta.vmcp"), "--since", one)
    check(delta["file_bytes"] < exported["file_bytes"], f"the increment is no smaller: {delta} {exported}")
    for name in ("base.qcow2", "plain.raw", "seed.qcow2", "disk.qcow2", "store"):
        os.rename(env.path(name), env.path(f"away-{name}"))
    for how in ("two.vmcp", "delta.vmcp"):
        other = env.path(f"other-{how}")
        check_equal(env.vmcp_json("import", env.path("one.vmcp"), store=other)["id"], one, "id")
        for name, want in disks.items():
            check(filecmp.cmp(contents(env, other, f"{one}:{name}", "imported"), want, shallow=False), f"disk {name} came out differently")
        again = env.vmcp_json("import", env.path("one.vmcp"), store=other)
        check(again["present"], f"imported twice: {again}")
        more = env.vmcp_json("import", env.path(how), store=other)
        check_equal(more["id"], two, "id")
        whole(env, other, [one, two], ["tiny"])
        with open(os.path.join(other, "checkpoints", one, "manifest"), encoding="utf-8") as file:
            told = file.read()
        check("kernel" not in told and "base.qcow2" not in told and "plain.raw" not in told, f"a path of the other host: {told}")
        needs = env.vmcp_json("show", two, store=other)["needs"]
        check_equal([line.split(": ")[0] for line in needs], ["processor", "features", "msrs", "kvm", "components"], "what a host must have")
        check("virtio-blk 3" in needs[4] and needs[4] in env.vmcp("-v", "show", two, store=other).out, f"what is said of it: {needs}")
        check_equal(needs, env.vmcp_json("show", two, store=env.path("away-store"))["needs"], "what it needed where it was taken")
        if how == "two.vmcp":
            check(more["shared_pages"] > more["pages"] // 2, f"its parent is here, yet little is shared: {more}")
        check_equal(memory_sum(other, two), memory_sum(env.path("away-store"), two), "memory")
        folder = os.path.join(other, "vms", "tiny")
        compare_images(env.path("seed.copy"), os.path.join(folder, f"seed@{one[:8]}.qcow2"))
        for name in os.listdir(os.path.join(other, "layers")):
            if name.endswith(".qcow2"):
                image_check(os.path.join(other, "layers", name))
        guest = start_there(env, other, "--from", two)
        check_equal(guest.check()["epoch"], "2", "epoch")
        env.vmcp("revert", one, store=other)
        check_equal(guest.check()["epoch"], "0", "epoch")
        env.vmcp("kill", "tiny", store=other)
    # Backwards: the parent, of which the child is here, shares with that; and stands without it.
    other = env.path("other-backwards")
    env.vmcp("import", env.path("two.vmcp"), store=other)
    more = env.vmcp_json("import", env.path("one.vmcp"), store=other)
    check(more["shared_pages"] > more["pages"] // 2, f"another checkpoint of the VM is here, yet little is shared: {more}")
    whole(env, other, [one, two], ["tiny"])
    env.vmcp("rm", two, store=other)
    env.vmcp("verify", store=other)
    check_equal(memory_sum(other, one), memory_sum(env.path("away-store"), one), "memory")
    for name, want in disks.items():
        check(filecmp.cmp(contents(env, other, f"{one}:{name}", "imported"), want, shallow=False), f"disk {name} came out differently")
    check_equal(start_there(env, other, "--from", one).check()["epoch"], "0", "epoch")
    env.vmcp("kill", "tiny", store=other)
    # What is here and damaged, at its header or anywhere, is not stood on: what was imported is whole.
    for place in ("beginning", "end"):
        other = env.path(f"other-damaged-{place}")
        env.vmcp("import", env.path("two.vmcp"), store=other)
        for layer in glob.glob(os.path.join(other, "layers", "*.qcow2")):
            with open(layer, "r+b") as file:
                file.seek(0 if place == "beginning" else os.path.getsize(layer) - 4)
                file.write(b"none")
        told = env.vmcp("import", env.path("one.vmcp"), store=other)
        check_equal(told.err.count("is not shared with what is here"), len(disks), f"what is said: {told.err}")
        env.vmcp("verify", two, store=other, status=5)
        env.vmcp("verify", one, store=other)
        for name, want in disks.items():
            check(filecmp.cmp(contents(env, other, f"{one}:{name}", "imported"), want, shallow=False), f"disk {name} came out differently")
    # A raw layer is one whatever it begins with, which may be a guest's choice.
    for layer in glob.glob(env.path("away-store/layers/*.raw")):
        with open(layer, "r+b") as file:
            file.write(b"QFI\xfb")
    with open(contents(env, env.path("away-store"), f"{one}:plain", "raw"), "rb") as file:
        check_equal(file.read(4), b"QFI\xfb", "the beginning of a raw disk")
    # The increment alone is of no use, and says so; another VM's name is another VM's.
    refused = env.vmcp("import", env.path("delta.vmcp"), status=3)
    check("which is not here" in refused.err and "import that one first" in refused.err, f"what is said: {refused.err}")
    whole(env, env.store, [], [])
    check_equal(env.vmcp_json("import", "--name", "else", env.path("one.vmcp"))["vm"], "else", "name")
    check_equal(start_there(env, env.store, "--from", "else").check()["epoch"], "0", "epoch")
    env.vmcp("kill", "else")


def test_damage_is_not_exported(env):
    """A page or a disk layer that is damaged in the store: no export of it."""
    disk = env.image("disk.qcow2", "8M")
    env.start_tiny(memory="32M", cmdline="set=1M rate=100 disk=1 disk_blocks=128 report=0", disks=[("data", disk)])
    one = env.vmcp_json("checkpoint", "--live", "tiny")
    env.vmcp("kill", "tiny")
    layers = os.path.join(env.store, "layers")
    for name in (f"{one['disks'][0]['layer']}.qcow2", f"{store_memory.layers(env.store, one['id'])[0]}.mem"):
        with open(os.path.join(layers, name), "r+b") as file:
            place = store_memory.read_places(os.path.join(layers, name.replace(".mem", ".sums"))) if name.endswith(".mem") else {0: 80}
            file.seek(max(place.values()) * 4096 + 1)
            was = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([was[0] ^ 4]))
            file.flush()
            refused = env.vmcp("export", one["id"], env.path("bad.vmcp"), status=5)
            check(name.split(".")[0] in refused.err, f"what is said: {refused.err}")
            check(not os.path.exists(env.path("bad.vmcp")) and not os.path.exists(env.path("bad.vmcp.part")), "a file is left")
            file.seek(-1, 1)
            file.write(was)
    env.vmcp("export", one["id"], env.path("good.vmcp"))


def small_export(env):
    """A small checkpoint of a guest without load, in a file."""
    disk = env.image("disk.qcow2", "8M")
    guest = env.start_tiny(memory="32M", cmdline="set=1M rate=100 disk=1 disk_blocks=128 report=0", disks=[("data", disk)])
    one = env.vmcp_json("checkpoint", "--live", "tiny")["id"]
    guest.epoch(2)
    env.vmcp("kill", "tiny")
    env.vmcp("export", one, env.path("good.vmcp"))
    subprocess.run(["zstd", "-q", "-t", env.path("good.vmcp")], check=True)
    with open(env.path("good.vmcp"), "rb") as file:
        return one, file.read()


def frames(data):
    """Where each chunk, its two frames, begins; and the table at the end."""
    at, found = 24, []
    while data[at:at + 4] == b"\x51\x2a\x4d\x18":
        found.append(at)
        at += 32 + int.from_bytes(data[at + 20:at + 24], "little")
    return [*found, at]


def test_damaged_files(env):
    """Cut off, flipped, swapped, doubled, with more behind: one clear error each, and the store is as it was."""
    rng = random.Random(11)
    _, good = small_export(env)
    at = frames(good)
    bad = [good[:n] for n in (0, 1, 23, 24, 40, at[1], at[-2], at[-1], len(good) - 1, *(rng.randrange(len(good)) for _ in range(20)))]
    bad.append(good + b"x")
    for _ in range(120):
        where = rng.randrange(len(good))
        bad.append(good[:where] + bytes([good[where] ^ 1 << rng.randrange(8)]) + good[where + 1:])
    for where in (*range(24), *range(at[0], at[0] + 32), *range(len(good) - 9, len(good))):
        bad.append(good[:where] + bytes([good[where] ^ 0x10]) + good[where + 1:])
    for one, other in ((0, 1), (1, 2), (2, 3), (len(at) - 3, len(at) - 2)):
        first, second = good[at[one]:at[one + 1]], good[at[other]:at[other + 1]]
        bad.append(good[:at[one]] + second + first + good[at[other + 1]:])
        bad.append(good[:at[one]] + first + good[at[one]:])  # twice
        bad.append(good[:at[one]] + good[at[one + 1]:])  # missing
    other = env.path("other")
    env.vmcp("import", env.path("good.vmcp"), store=other)
    env.vmcp("rm", "tiny", store=other)
    env.vmcp("gc", store=other)
    before = tree(other)
    for number, data in enumerate(bad):
        with open(env.path("bad.vmcp"), "wb") as file:
            file.write(data)
        refused = env.vmcp("import", env.path("bad.vmcp"), status=None, store=other)
        versions = data[20:24] != good[20:24] and data[:20] == good[:20]
        check(refused.status in ((1, 5) if versions else (5,)), f"number {number}: {refused}")
        lines = [line for line in refused.err.splitlines() if not line.startswith("vmcp: import:")]
        check(lines and lines[0].startswith("vmcp: ") and all(line.startswith("hint: ") for line in lines[1:]), f"number {number}: {refused}")
        check_equal(tree(other), before, f"the store after number {number}")
    whole(env, other, [], ["tiny"])


def fault_points(first, last):
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "base", "fault_points.def")
    with open(path, encoding="utf-8") as file:
        numbers = [int(line[12:].split(",")[0]) for line in file if line.startswith("FAULT_POINT(")]
    return [number for number in numbers if first <= number <= last]


def test_death_at_every_point(env):
    """kill -9, an error of a device, and a full disk at every fault point that an import or export passes: all or nothing, and then it works."""
    seed = env.image("seed.qcow2", "1M")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 9 0 1M", seed], check=True, capture_output=True)
    config = env.tiny_config(memory="32M", cmdline="set=1M rate=100 disk=1 disk_blocks=128 report=0", disks=[("data", env.image("disk.qcow2", "8M"))])
    with open(config, "a", encoding="utf-8") as file:
        file.write(f"[disk seed]\npath = {seed}\nreadonly = yes\n")
    env.spawn_tiny("run", config)
    one = env.vmcp_json("checkpoint", "--live", "--tag", "good", "tiny")["id"]
    env.vmcp("kill", "tiny")
    env.vmcp("export", one, env.path("good.vmcp"))
    passed = []
    for point in [300, *fault_points(301, 308), *fault_points(100, 117), *fault_points(332, 339)]:
        for action in ("kill", "eio", "enospc"):
            if action != "kill" and point not in passed:
                continue
            other = env.path("other")
            shutil.rmtree(other, ignore_errors=True)
            env.vmcp("import", env.path("good.vmcp"), "--check")
            done = env.vmcp("import", env.path("good.vmcp"), status=None, store=other, env={"VMCP_FAULT": f"{point}:{action}"})
            if action == "kill" and done.status == -9:
                passed.append(point)
            there = env.vmcp_json("log", store=other)["checkpoints"]
            check(len(there) <= 1, f"point {point} {action}: {there}")
            whole(env, other, [one] * len(there), ["tiny"] * len(there))
            check(done.status != 0 or there, f"point {point} {action}: done, but nothing is there")
            if action != "kill" and done.status != 0:
                check(done.status in (1, 5) and not there, f"point {point} {action}: {done} {there}")
            check_equal(env.vmcp_json("import", env.path("good.vmcp"), store=other)["present"], bool(there), f"point {point} {action}: present")
            check_equal(env.vmcp_json("show", "good", store=other)["id"], one, "its tag")
            compare_images(seed, os.path.join(other, "vms", "tiny", f"seed@{one[:8]}.qcow2"))
            whole(env, other, [one], ["tiny"])
    check_equal(start_there(env, other, "--from", one).check()["epoch"], "0", "epoch")
    env.vmcp("kill", "tiny", store=other)
    print(f"  fault points reached by an import: {passed}", flush=True)
    check(set(fault_points(332, 337)) <= set(passed) and {303, 304, 305, 308} <= set(passed), f"points not reached: {passed}")


def test_interrupted_exports(env):
    """Death, errors and Ctrl-C leave no file; what --resume keeps is gone on with, and only for the same checkpoint."""
    _, good = small_export(env)
    path, part = env.path("again.vmcp"), env.path("again.vmcp.part")
    for point, action in ((330, "kill"), (331, "kill"), (330, "eio"), (331, "enospc")):
        done = env.vmcp("export", "tiny", path, status=None, env={"VMCP_FAULT": f"{point}:{action}"})
        check(done.status == (-9 if action == "kill" else 1), f"{point}:{action}: {done}")
        check(not os.path.exists(path), f"{point}:{action}: a file is there")
        check_equal(os.path.exists(part), action == "kill", f"{point}:{action}: the part is there")
    for count in range(1, len(frames(good))):
        env.vmcp("export", "tiny", path, "--resume", status=-9, env={"VMCP_FAULT": f"330:{count}"})
        size = os.path.getsize(part)
        check_equal(env.vmcp("export", "tiny", path, "--resume", status=1, env={"VMCP_FAULT": "331:eio"}).status, 1, "exit")
        check(os.path.getsize(part) >= size, "the part is shorter")
        with open(part, "ab") as file:
            file.write(b"half a chunk")
        resumed = env.vmcp_json("export", "tiny", path, "--resume")
        check(resumed["resumed_bytes"] > 0, f"from the beginning: {resumed}")
        check_equal(env.vmcp_json("import", "--check", path)["id"], resumed["id"], "id")
        refused = env.vmcp("export", "tiny", path, status=4)
        check("there is a file already" in refused.err, f"what is said: {refused.err}")
        os.unlink(path)
    # What is there is of another checkpoint, or is damaged.
    env.vmcp("export", "tiny", path, "--resume", status=-9, env={"VMCP_FAULT": "331:kill"})
    env.vmcp("tag", "tiny", "named")
    check_equal(env.vmcp_json("export", "tiny", path, "--resume")["resumed_bytes"], 0, "another head")
    os.unlink(path)
    env.vmcp("export", "tiny", path, "--resume", status=-9, env={"VMCP_FAULT": "331:kill"})
    with open(part, "r+b") as file:
        file.seek(frames(good)[3] + 40)
        file.write(b"damage")
    env.vmcp("export", "tiny", path, "--resume")
    env.vmcp("import", "--check", path)
    os.unlink(path)
    # Ctrl-C, at a rate that gives it time.
    for words, left in (([], False), (["--resume"], True)):
        running = subprocess.Popen([env.vmcp_bin, "--store", env.store, "export", "tiny", path, "--max-rate", "20K", *words], stderr=subprocess.PIPE)
        time.sleep(1)
        running.send_signal(2)
        _, said = running.communicate(timeout=60)
        check(running.returncode == 1 and b"cancelled" in said, f"exit {running.returncode}: {said}")
        check_equal((os.path.exists(path), os.path.exists(part)), (False, left), "files")
    # An import that hears nothing more.
    into = subprocess.Popen([env.vmcp_bin, "--store", env.path("other"), "import", "-"], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    into.stdin.write(good[:len(good) // 2])
    into.stdin.flush()
    time.sleep(0.5)
    into.send_signal(2)
    said = into.stderr.read()
    check(into.wait(60) == 1 and b"cancelled" in said, f"exit {into.returncode}: {said}")
    into.stdin.close()
    whole(env, env.path("other"), [], [])


def segments(data):
    """Of an encrypted export: for each start where it begins, its salt, and where its pieces begin."""
    at, found = 0, []
    while at < len(data):
        check_equal((data[at:at + 12], data[at + 12]), (b"vmcp-sealed\n", 2), f"the start at {at}")
        found.append((at, data[at + 16:at + 32], []))
        at += 56
        while at < len(data) and data[at:at + 4] != b"\0\0\0\x40":
            found[-1][2].append(at)
            at += 20 + (int.from_bytes(data[at:at + 4], "little") & 0x7fffffff)
        at += 4 if at < len(data) else 0
    return found


def test_interrupted_encrypted_exports(env):
    """Each attempt goes on behind what is whole, with a key of its own; what comes of it is one export. Nothing is written twice with one key."""
    raw, disk = env.path("random.raw"), env.path("disk.qcow2")
    with open(raw, "wb") as file:
        file.write(random.Random(7).randbytes(12 << 20))
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, disk], check=True)
    env.start_tiny(memory="32M", cmdline="set=1M rate=100 report=0", disks=[("data", disk)])
    one = env.vmcp_json("checkpoint", "--live", "tiny")["id"]
    env.vmcp("kill", "tiny")
    key, wrong = env.write("key", "a passphrase\n"), env.write("wrong", "another\n")
    path, part, other = env.path("sealed.vmcp"), env.path("sealed.vmcp.part"), env.path("other")
    words = ("export", one, path, "--key-file", key, "--resume")
    sizes, parts = [], []
    for count in (6, 2, 2):
        env.vmcp(*words, status=-9, env={"VMCP_FAULT": f"330:{count}:kill"})
        sizes.append(os.path.getsize(part))
        with open(part, "rb") as file:
            parts.append(file.read())
        with open(part, "ab") as file:
            file.write(random.Random(count).randbytes(300))  # half a piece
    check(sizes[0] < sizes[1] < sizes[2], f"sizes of the part: {sizes}")
    refused = env.vmcp("export", one, path, "--key-file", wrong, "--resume", status=1)
    check("the key does not fit" in refused.err and "hint: " in refused.err, f"another key: {refused}")
    forgotten = env.vmcp("export", one, path, "--resume", status=2)
    check("it is encrypted" in forgotten.err and "--key-file" in forgotten.err, f"no key: {forgotten}")
    check_equal(os.path.getsize(part), sizes[2] + 300, "the part, of which nothing may be gone")
    resumed = env.vmcp_json(*words)
    check(resumed["resumed_bytes"] > sizes[0] // 2, f"from the beginning: {resumed}")
    with open(path, "rb") as file:
        good = file.read()
    check_equal(resumed["file_bytes"], len(good), "bytes of the file")
    found = segments(good)
    check_equal((len(found), len({salt for _, salt, _ in found})), (4, 4), "starts, and their salts")
    for (at, _, pieces), before in zip(found, parts):
        check(good[:at + 56] == before[:at + 56], f"the start at {at} is not the one that was written")
        end = pieces[-1] + 20 + 262144
        check(good[:end] == before[:end], f"pieces behind {at} are not those that were written")
    # By the format alone: the plain text is an export.
    plain = unseal(good, b"a passphrase")
    with open(env.path("plain.vmcp"), "wb") as file:
        file.write(plain)
    subprocess.run(["zstd", "-q", "-t", env.path("plain.vmcp")], check=True)
    check_equal(env.vmcp("import", "--check", env.path("plain.vmcp")).out.strip(), one, "the plain text")
    # A part whose end is cut off behind a start, and one that ends in one, are no exports.
    for end in (found[1][0] + 56, found[1][0] + 20, found[1][0], found[2][2][0] + 3):
        with open(env.path("bad.vmcp"), "wb") as file:
            file.write(good[:end])
        check("ends too early" in env.vmcp("import", env.path("bad.vmcp"), "--key-file", key, status=5, store=other).err, f"cut off at {end}")
    env.vmcp("import", path, "--key-file", wrong, status=1, store=other)
    check_equal(env.vmcp("import", path, "--key-file", key, store=other).out.strip(), one, "what the import prints")
    whole(env, other, [one], ["tiny"])
    check_equal(memory_sum(other, one), memory_sum(env.store, one), "memory")
    # One that was not to be gone on with, a plain one, and one that was complete but for its name.
    os.unlink(path)
    env.vmcp(*words[:-1], status=-9, env={"VMCP_FAULT": "331:kill"})
    check_equal(env.vmcp_json(*words)["resumed_bytes"], 0, "version 1")
    os.unlink(path)
    env.vmcp("export", one, path, "--resume", status=-9, env={"VMCP_FAULT": "331:kill"})
    check_equal(env.vmcp_json(*words)["resumed_bytes"], 0, "a plain one")
    os.unlink(path)
    env.vmcp(*words, status=-9, env={"VMCP_FAULT": "331:kill"})
    check(env.vmcp_json(*words)["resumed_bytes"] > len(good) // 2, "a complete one")
    env.vmcp("import", "--check", path, "--key-file", key)


def unseal(data, secret):
    """The plain text of an encrypted export, by docs/format.md."""
    text, before = b"", b""
    for at, salt, pieces in segments(data):
        start = data[at:at + 56]
        key = hashlib.scrypt(secret, salt=salt, n=1 << start[32], r=start[33], p=start[34], dklen=32, maxmem=1 << 28)
        gcm = store_memory.Decryption("gcm", key)
        gcm.decrypt((2 ** 64 - 1).to_bytes(8, "little") + bytes(4), b"", start[:40] + before, start[40:])
        for number, piece in enumerate(pieces):
            length = int.from_bytes(data[piece:piece + 4], "little")
            end = piece + 4 + (length & 0x7fffffff)
            before = data[end:end + 16]
            text += gcm.decrypt(number.to_bytes(8, "little") + bytes(3) + bytes([length >> 31]), data[piece + 4:end], data[piece:piece + 4], before)
    return text


def test_encrypted(env):
    """Who has the key gets what was exported; nobody else reads or changes a byte of it. Errors are one line each, and leave nothing."""
    rng = random.Random(5)
    one, plain = small_export(env)
    key, wrong, empty = env.write("key", "a passphrase\n"), env.write("wrong", "another passphrase\n"), env.write("empty", "\n")
    bare = env.write("bare", "a passphrase")
    sealed, other = env.path("sealed.vmcp"), env.path("other")
    env.vmcp("export", one, sealed, "--key-file", key)
    with open(sealed, "rb") as file:
        good = file.read()
    for text in (b"vmcp-export", plain[60:100], b"\x28\xb5\x2f\xfd"):
        check(text in plain and text not in good[56:], f"in the encrypted file: {text}")
    check(len(plain) < len(good) < len(plain) + 100 + 30 * (len(plain) // 262144 + 1), f"{len(plain)} bytes became {len(good)}")

    def refused(path, *words, status=5, says=""):
        done = env.vmcp("import", path, *words, status=status, store=other)
        lines = [line for line in done.err.splitlines() if not line.startswith("vmcp: import:")]
        check(says in lines[0] and len(lines) <= 2 and not done.out, f"what is said: {done}")
        whole(env, other, [], [])

    check_equal(env.vmcp("import", "--check", sealed, "--key-file", bare, store=other).out.strip(), one, "what a check prints")
    refused(sealed, "--key-file", wrong, status=1, says="the key does not fit")
    refused(sealed, status=2, says="it is encrypted")
    refused(env.path("good.vmcp"), "--key-file", key, status=2, says="it is not encrypted")
    refused(sealed, "--key-file", empty, status=2, says="is empty")
    refused(sealed, "--key-file", env.path("nothere"), status=3, says="nothere")
    pieces = [56]
    while pieces[-1] < len(good):
        pieces.append(pieces[-1] + 20 + (int.from_bytes(good[pieces[-1]:pieces[-1] + 4], "little") & 0x7fffffff))
    check_equal(pieces[-1], len(good), "the end of the last piece")
    bad = [good[:n] for n in (20, 50, 58, pieces[-2], len(good) - 1)] + [good + b"x", good[:pieces[-2]] + good[pieces[-2]:] * 2]
    if len(pieces) > 3:
        bad.append(good[:56] + good[pieces[1]:pieces[2]] + good[56:pieces[1]] + good[pieces[2]:])
        bad.append(good[:56] + good[pieces[1]:])
    for where in (57, 59, 60, len(good) - 1, *(rng.randrange(56, len(good)) for _ in range(6))):
        bad.append(good[:where] + bytes([good[where] ^ 1 << rng.randrange(8)]) + good[where + 1:])
    for data in bad:
        with open(env.path("bad.vmcp"), "wb") as file:
            file.write(data)
        refused(env.path("bad.vmcp"), "--key-file", key)
    # Through a pipe, and there it goes on.
    shutil.rmtree(other)
    out = subprocess.Popen([env.vmcp_bin, "--store", env.store, "export", one, "-", "--key-file", key], stdout=subprocess.PIPE)
    subprocess.run([env.vmcp_bin, "--store", other, "import", "-", "--key-file", bare], stdin=out.stdout, check=True, stdout=subprocess.DEVNULL)
    check_equal(out.wait(60), 0, "exit of the export")
    whole(env, other, [one], ["tiny"])
    check_equal(memory_sum(other, one), memory_sum(env.store, one), "memory")
    start_there(env, other, "--from", one).check()
    env.vmcp("kill", "tiny", store=other)


if __name__ == "__main__":
    vmcp_test.main(__name__)
