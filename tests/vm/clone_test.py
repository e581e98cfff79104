#!/usr/bin/env python3
"""Whole VMs with the tiny guest: identity, templates, clones, and what is left of them in the store's table of resources."""

import collections
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import store_memory  # noqa: E402
import vmcp_test  # noqa: E402
from tiny_test import Echo, free_ports  # noqa: E402
from vmcp_test import check, check_equal  # noqa: E402

CLONES = int(os.environ.get("VMCP_TEST_CLONES", "100"))
BATCH = 5
GENERATION_MARK = b"VMCP generation\0"


def table(env):
    """The rows of the table of resources, and of what of the host they name."""
    database = sqlite3.connect(os.path.join(env.store, "catalog.db"))
    database.execute("BEGIN")  # both are of one moment
    rows = database.execute("SELECT vm, type, name, guest, host FROM resources").fetchall()
    hosts = database.execute("SELECT type, host, refs FROM hosts").fetchall()
    database.close()
    for kind, host, refs in hosts:
        check_equal(sum(row[1] == kind and row[4] == host for row in rows), refs, f"references to {kind} {host}")
    return rows


def files_of(env, checkpoint):
    """A hash of all that a checkpoint consists of."""
    names = [os.path.join("checkpoints", checkpoint, one) for one in ("manifest", "state", "index")]
    names += [os.path.join("layers", one) for one in sorted(os.listdir(os.path.join(env.store, "layers")))]
    sums = {}
    for name in names:
        with open(os.path.join(env.store, name), "rb") as file:
            sums[name] = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()
    return sums


def in_memory(env, checkpoint, wanted, count=1):
    """So many pages from number `wanted` on of what a checkpoint has as memory."""
    memory, pages = store_memory.Memory(env.store, checkpoint), bytearray(count * 4096)
    for first, data in memory.runs():
        for page in range(max(first, wanted), min(first + len(data) // 4096, wanted + count)):
            at, place = (page - first) * 4096, (page - wanted) * 4096
            pages[place:place + 4096] = data[at:at + 4096]
    memory.close()
    return bytes(pages)


def generation_in_memory(env, checkpoint):
    page = in_memory(env, checkpoint, vmcp_test.GENERATION_PAGE)
    check_equal(page[:16], GENERATION_MARK, "what the page of the generation id begins with")
    return page[16:32].hex()


def start_origin(env, **kwargs):
    """A guest with a disk and an echo behind a forwarded port, and a checkpoint of it."""
    port = free_ports(1)[0]
    guest = env.start_tiny(memory="64M", cmdline="set=8M rate=2000 disk=1 disk_blocks=64 report=0 net=1", disks=[("data", env.image("disk.qcow2"))],
                           extra=f"vsock_cid = 3\n[net lan]\nmode = user\nforward = udp:{port}:7", **kwargs)
    guest.epoch(7)
    Echo(port).insist("after the boot")
    taken = env.vmcp_json("checkpoint", "--live", "tiny", "--tag", "origin")
    return guest, taken["id"], port


def has_ended(pid):
    """What it has open is closed when the last of its threads has gone, even if nobody waited for it yet."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z" and len(os.listdir(f"/proc/{pid}/task")) == 1
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(what, condition, seconds=30):
    end = time.monotonic() + seconds
    while not (result := condition()):
        check(time.monotonic() < end, f"not within {seconds} s: {what}")
        time.sleep(0.01)
    return result


def kill_9(pid):
    os.kill(pid, signal.SIGKILL)
    wait_for(f"the end of {pid}", lambda: has_ended(pid))


def test_many_clones(env):
    """They all run, each as itself; the template is as it was; of those that are killed nothing is left after gc."""
    _, origin, _ = start_origin(env)
    env.vmcp("template", "origin", "worker")
    before = files_of(env, origin)
    # In batches that are paused: a tiny guest never sleeps, so that a hundred of them would leave nothing for the next one's start.
    clones = []
    vmcp_test.Control(env.store, "tiny").call("vm.pause")
    while len(clones) < CLONES:
        batch = env.vmcp_json("clone", "worker", "--count", min(BATCH, CLONES - len(clones)))["vms"]
        for one in batch:
            vmcp_test.Control(env.store, one["name"]).call("vm.pause")
        clones += batch
    check_equal([one["name"] for one in clones], [f"tiny-{n}" for n in range(1, CLONES + 1)], "names")
    states = {vm["name"]: vm["state"] for vm in env.vmcp_json("ps")["vms"]}
    check_equal([states[one["name"]] for one in clones], ["paused"] * CLONES, "states")
    ports = [[r["host"] for r in one["identity"]["resources"] if r["type"] == "port"] for one in clones]
    macs = [[r["guest"] for r in one["identity"]["resources"] if r["type"] == "mac"] for one in clones]
    for what, values in (("uuids", [one["identity"]["uuid"] for one in clones]), ("generation ids", [one["identity"]["generation_id"] for one in clones]),
                         ("ports", [one[0] for one in ports]), ("addresses", [one[0] for one in macs]), ("pids", [one["pid"] for one in clones])):
        check(all(values), f"{what}: {values}")
        check_equal(len(set(values)), CLONES, f"different {what}")
    starts = sorted(one["clone_ns"] / 1e6 for one in clones)
    print(f"  {CLONES} clones: first instruction after {starts[len(starts) // 2]:.1f} ms, the slowest {starts[-1]:.1f} ms", flush=True)
    rows = table(env)
    check_equal(len({row[0] for row in rows}), CLONES + 1, "VMs that have something")
    vmcp_test.Control(env.store, clones[0]["name"]).call("vm.resume")
    guest = env.attach_tiny(clones[0]["name"])
    guest.check()
    check_equal(guest.ask("status", "status")["epoch"], "7", "the epoch of the checkpoint")
    check_equal(files_of(env, origin).items() & before.items(), before.items(), "files of the template")
    for one in clones[1:]:
        kill_9(one["pid"])
    check_equal(len({row[0] for row in table(env)}), CLONES + 1, "VMs in the table before gc")
    check(env.vmcp_json("gc")["freed_resources"] > 3 * (CLONES - 1), "gc has freed too little")
    check_equal({row[0] for row in table(env)}, {"tiny", clones[0]["name"]}, "VMs in the table after gc")
    # Orderly ends free what there was themselves.
    env.vmcp("kill", "tiny")
    env.vmcp("kill", clones[0]["name"])
    end = time.monotonic() + 60
    while table(env) and time.monotonic() < end:
        time.sleep(0.05)
    check_equal(table(env), [], "the table")


def test_identity(env):
    """Of a VM over boot, revert, start and clone: what stays, what is new, what the guest sees; and clones of clones."""
    guest, origin, port = start_origin(env)
    seen = env.vmcp_json("show", "tiny", "--resources")
    kinds = {(r["type"], r["name"]): r for r in seen["resources"]}
    devices = {name: r["guest"] for (kind, name), r in kinds.items() if kind == "pci"}
    check_equal(sorted(key for key in kinds if key[0] != "pci"),
                [("cid", "vsock"), ("disk", "data"), ("mac", "lan"), ("port", "lan/udp/7"), ("socket", "control"), ("uuid", "vm")], "resources")
    check_equal(devices, {"disk/data": "0000:00:01.0", "net/lan": "0000:00:02.0", "vsock": "0000:00:03.0"}, "PCI devices")
    check_equal((kinds["port", "lan/udp/7"]["guest"], kinds["port", "lan/udp/7"]["host"]), ("udp:7", f"udp:127.0.0.1:{port}"), "the port")
    check_equal((kinds["cid", "vsock"]["guest"], kinds["disk", "data"]["host"]), ("3", env.path("disk.qcow2")), "CID and disk")
    back = {(h["type"], h["host"]): h for h in seen["hosts"]}
    check_equal(back["port", f"udp:127.0.0.1:{port}"]["vms"], [{"vm": "tiny", "name": "lan/udp/7", "guest": "udp:7"}], "the other way")
    text = env.vmcp("show", "tiny", "--resources").out
    check(seen["uuid"] in text and seen["generation_id"] in text and f"udp:127.0.0.1:{port} " in text and "tiny:lan/udp/7" in text, text)
    # The guest's memory has the id; each life gets another one.
    check_equal(generation_in_memory(env, origin), seen["generation_id"], "the generation id in the guest's memory")
    ids = {seen["generation_id"]}
    for _ in range(3):
        env.vmcp("revert", "origin")
        ids.add(env.vmcp_json("show", "tiny", "--resources")["generation_id"])
    check_equal(len(ids), 4, "generation ids after three reverts")
    guest.check()
    clone = env.vmcp_json("clone", "--live", "tiny", "--name", "one")["vms"][0]
    check_equal({r["name"]: r["guest"] for r in clone["identity"]["resources"] if r["type"] == "pci"}, devices, "the clone's PCI devices")
    check_equal(clone["name"], "one", "its name")
    second = env.vmcp_json("checkpoint", "--live", "one", "--tag", "of-one")["id"]
    check_equal(generation_in_memory(env, second), clone["identity"]["generation_id"], "the clone's generation id in its memory")
    deeper = env.vmcp_json("clone", "of-one", "--name", "deep-<N>", "--count", "2", "--clock", "checkpoint")["vms"]
    uuids = [seen["uuid"]] + [one["identity"]["uuid"] for one in [clone] + deeper]
    check_equal(len(set(uuids)), 4, "uuids")
    env.attach_tiny(deeper[1]["name"]).check()
    for one in [clone] + deeper:
        host = next(r["host"] for r in one["identity"]["resources"] if r["type"] == "port")
        Echo(int(host.rsplit(":", 1)[1])).insist(f"{one['name']} at {host}")
    Echo(port).insist("the origin, at its own port")
    # A VM keeps its uuid over its lives; a name that comes anew is another VM.
    env.vmcp("kill", "tiny")
    env.vmcp("kill", "one")
    env.vmcp("revert", "of-one")
    check_equal(env.vmcp_json("show", "one", "--resources")["uuid"], clone["identity"]["uuid"], "its uuid after a start")
    stopped = env.vmcp_json("show", "tiny", "--resources")
    check_equal((stopped["uuid"], stopped["resources"], stopped["generation_id"]), (seen["uuid"], [], None), "of a VM that does not run")


def drawn(env, checkpoint, gpa, kept):
    """The random numbers that a tiny guest had drawn by then (examples/tiny/rng.h), and how many: one more where the next has come, and is not yet taken note of."""
    count, *numbers = struct.unpack(f"<{kept + 1}Q", in_memory(env, checkpoint, gpa // 4096, (kept + 1) * 8 // 4096))
    check(0 < count < kept, f"{count} numbers of {kept}")
    return numbers, count + (numbers[count] != 0)


def test_nothing_random_is_repeated(env):
    """Clones of a template that was made of a clone: none has a generation id, or a random number of its first 40 ms, in common with another, or with where it comes from."""
    guest = env.start_tiny(memory="32M", cmdline="set=4M rate=500 report=0 random=500", extra="rng = yes")
    told = guest.ask("random", "random")
    place = (int(told["gpa"], 16), int(told["kept"]))
    env.vmcp("checkpoint", "--live", "tiny", "--tag", "first")
    env.vmcp("clone", "first", "--name", "one")
    origin = env.vmcp_json("checkpoint", "--live", "one", "--tag", "second")["id"]
    env.vmcp("template", "second", "worker")
    before, first = drawn(env, origin, *place)
    seen, ids = {number for number in before if number}, {generation_in_memory(env, origin)}
    clones = env.vmcp_json("clone", "worker", "--count", "4")["vms"]
    for one in clones:
        guest = env.attach_tiny(one["name"])
        wait_for("numbers of 40 ms, at 500 a second", lambda guest=guest: int(guest.ask("random", "random")["count"]) >= first + 20)
        taken = env.vmcp_json("checkpoint", "--live", one["name"])["id"]
        numbers, count = drawn(env, taken, *place)
        check_equal(numbers[:first], before[:first], f"what {one['name']} has of its origin")
        check(count >= first + 20, f"only {count - first} numbers of {one['name']}")
        check(not seen & set(numbers[first:count]), f"{one['name']} has drawn what another one has")
        seen.update(numbers[first:count])
        check_equal(generation_in_memory(env, taken), one["identity"]["generation_id"], "its generation id")
        ids.add(one["identity"]["generation_id"])
    check_equal(len(ids), len(clones) + 1, "generation ids")
    check(0 not in seen, "a number that was not drawn")


def test_nothing_of_the_host_in_the_guest(env):
    """Ports, paths and sockets of the host are in no state, index or memory that a checkpoint holds."""
    _, origin, port = start_origin(env)
    words = [env.store.encode(), env.dir.encode(), f"127.0.0.1:{port}".encode(), b"vsock.sock", b"control.sock", os.path.basename(env.path("disk.qcow2")).encode()]
    looked = 0
    names = [os.path.join("checkpoints", origin, one) for one in ("state", "index")]
    names += [os.path.join("layers", one) for one in os.listdir(os.path.join(env.store, "layers")) if one.endswith(".mem")]
    for name in names:
        with open(os.path.join(env.store, name), "rb") as file:
            content = file.read()
        looked += len(content)
        for word in words:
            check(word not in content, f"{word} is in {name}")
    check(looked > 1 << 20, f"only {looked} bytes")
    # What is looked for would be found: the manifest names the bindings of the VM.
    with open(os.path.join(env.store, "checkpoints", origin, "manifest"), "rb") as file:
        check(words[2] in file.read(), "the manifest does not name the port")


def ports_of_clones(env, checkpoint, stores, name):
    """Two clones in each store, by commands that run at the same time."""
    argv = [env.vmcp_bin, "--json", "clone", checkpoint, "--count", "2", "--name", name]
    commands = [subprocess.Popen([*argv, "--store", store], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for store in stores]
    said = [(command.communicate(timeout=120), command.returncode) for command in commands]
    check(all(status == 0 for _, status in said), str(said))
    return [r["host"] for (out, _), _ in said for one in json.loads(out)["vms"] for r in one["identity"]["resources"] if r["type"] == "port"]


def test_ports_of_two_stores(env):
    """Commands of two stores that choose ports at the same time choose others, and each clone has its own."""
    _, origin, _ = start_origin(env)
    env.vmcp("kill", "tiny")
    stores = [env.store, env.path("other")]
    shutil.copytree(*stores, ignore=lambda _, names: [name for name in names if name.endswith(".sock")])
    try:
        for turn in range(2):
            ports = ports_of_clones(env, origin, stores, f"t{turn}-<N>")
            check_equal(len(set(ports)), 4, f"different ports: {ports}")
    finally:
        for vm in env.vmcp_json("ps", store=stores[1])["vms"]:
            env.vmcp("kill", vm["name"], status=None, store=stores[1])
    # A number is held as long as a command that chose it is at work.
    free = free_ports(1)[0]
    rules = env.write("one.rules", f"port any allocate {free}-{free}\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as holder:
        holder.bind(f"\0vmcp port udp:{free}")
        refused = env.vmcp("clone", "origin", "--name", "held", "--rules", rules, status=4)
        check("one.rules:1" in refused.err, str(refused))
    env.vmcp("clone", "origin", "--name", "held", "--rules", rules)


def test_rules(env):
    """Bad rules and exhausted pools are refused with line and reason before anything starts; good ones do what they say."""
    _, origin, port = start_origin(env)
    before = (table(env), sorted(vm["name"] for vm in env.vmcp_json("ps")["vms"]))
    free = free_ports(1)[0]
    refused = [("port any loop", 2, ":1:", 1), ("\nport:wan any drop", 2, ":2:", 1), ("port any set 8080", 2, ":1:", 2),
               (f"# pool\nport any allocate {free}-{free}", 2, ":2:", 2), (f"port any set {port}", 4, ":1:", 1), ("disk:data rw share", 2, ":1:", 1)]
    for text, status, where, count in refused:
        rules = env.write("bad.rules", text + "\n")
        done = env.vmcp("clone", "origin", "--count", count, "--rules", rules, status=status)
        check(f"bad.rules{where}" in done.err, f"{text!r}: {done}")
        check_equal((table(env), sorted(vm["name"] for vm in env.vmcp_json("ps")["vms"])), before, f"table and VMs after {text!r}")
    env.vmcp("clone", "origin", "--count", "0", status=2)
    env.vmcp("clone", "origin", "--count", "2", "--name", "same", status=2)
    env.vmcp("clone", "origin", "--name", "tiny", status=4)
    env.vmcp("clone", "nowhere", status=3)
    os.mkdir(env.path("clones"))
    rules = env.write("good.rules", f"port:lan/udp/7 any allocate {free}-{free}\ndisk:data rw copy {env.path('clones')}/<VM>-<N>.qcow2\nmac any share\n")
    env.vmcp("template", "origin", "pool", "--rules", rules, status=2)  # for one clone only: nothing that clones come from
    one = env.vmcp_json("clone", "origin", "--rules", rules)["vms"][0]
    found = {r["type"]: r for r in one["identity"]["resources"]}
    check_equal(found["port"]["host"], f"udp:127.0.0.1:{free}", "its port")
    check_equal(found["disk"]["host"], env.path("clones/tiny-1-1.qcow2"), "its disk")
    check(os.path.exists(env.path("clones/tiny-1-1.qcow2")), "no disk there")
    check_equal(found["mac"]["guest"], next(r["guest"] for r in env.vmcp_json("show", "tiny", "--resources")["resources"] if r["type"] == "mac"), "its address")
    env.attach_tiny("tiny-1").check()
    # The second one cannot start: nothing is left of the first.
    os.makedirs(env.path("own/1"))
    known, rows = sorted(os.listdir(os.path.join(env.store, "vms"))), table(env)
    own = env.write("own.rules", f"disk:data rw copy {env.path('own')}/<N>/data.qcow2\n")
    for _ in range(2):
        done = env.vmcp("clone", "origin", "--name", "other-<N>", "--count", "2", "--rules", own, status=None)
        check(done.status not in (0, 2) and "other-2" in done.err, str(done))
        check_equal((sorted(os.listdir(os.path.join(env.store, "vms"))), table(env), os.listdir(env.path("own/1"))), (known, rows, []), "what is left of the first")
        check("other" not in str(env.vmcp_json("ps")), "a VM that never was is known")
    # A file that is there is nobody's overlay.
    precious = env.write("precious.qcow2", "precious")
    done = env.vmcp("clone", "origin", "--name", "three", "--rules", env.write("place.rules", f"disk:data rw copy {precious}\n"), status=4)
    check("is there already" in done.err and open(precious, encoding="utf-8").read() == "precious", str(done))
    # The only number of the pool has gone: the second one is refused, and leaves nothing.
    rows = table(env)
    done = env.vmcp("clone", "origin", "--rules", rules, status=4)
    check("good.rules:1" in done.err and "none of" in done.err, str(done))
    check_equal(table(env), rows, "the table")
    kill_9(one["pid"])
    two = env.vmcp_json("clone", "origin", "--rules", rules)["vms"][0]
    check_equal(two["name"], "tiny-2", "a name that is known is not used again")


def test_killed_at_allocation_and_release(env):
    """kill -9 of the command and of VMs between allocation or release and its commit, and in the start: nothing stays taken after gc."""
    start_origin(env)
    died = 0
    for fault in [f"360:{count}" for count in range(1, 9)] + ["361:1"]:
        done = env.vmcp("clone", "origin", "--count", "2", status=None, env={"VMCP_FAULT": fault})
        died += done.status != 0
        for vm in env.vmcp_json("ps")["vms"]:
            if vm["name"] != "tiny" and vm["state"] == "running":
                env.vmcp("kill", vm["name"], status=None)
        end = time.monotonic() + 60
        while any(vm["state"] == "running" for vm in env.vmcp_json("ps")["vms"] if vm["name"] != "tiny") and time.monotonic() < end:
            time.sleep(0.02)
        env.vmcp("gc")
        check_equal({row[0] for row in table(env)}, {"tiny"}, f"VMs in the table after a kill at {fault}")
    check(died >= 6, f"only {died} points were passed")
    # All that they had can be had.
    clones = env.vmcp_json("clone", "origin", "--count", "3")["vms"]
    check_equal(len(clones), 3, "clones")


def sockets_of(env):
    """Every socket that lies in the store."""
    return [path for folder, _, names in os.walk(env.store) for path in (os.path.join(folder, name) for name in names) if stat.S_ISSOCK(os.lstat(path).st_mode)]


def living(env):
    return {vm["name"]: vm["pid"] for vm in env.vmcp_json("ps")["vms"] if vm["state"] in ("running", "paused", "suspended")}


def test_random_operations(env):
    """Clones by all sorts of rules, ends, kills, sleep and gc in a random order, commands and VMs killed at random points: the table is right after each, and empty at the end.
    VMCP_TEST_OPERATIONS says how many, VMCP_TEST_SEED in which order."""
    seed = int(os.environ.get("VMCP_TEST_SEED", "1"))
    rng, done = random.Random(seed), collections.Counter()
    shared, pool = free_ports(2)
    env.vmcp("run", "--detach", env.tiny_config(memory="16M", cmdline="set=1M rate=100 report=0 idle=1", extra="vsock_cid = 3\n[net lan]\nmode = user\nforward = tcp:0.0.0.0:%d:80\n"
                                                "[net back]\nmode = group\nnetwork = backend\n" % free_ports(1)[0]))
    env.vmcp("checkpoint", "--live", "tiny", "--tag", "origin")
    rules = ["", f"port any multiplex {shared}:least\n", f"port any allocate {pool}-{pool}\n", "hostname any allocate web:1-3\n", "ip:back any allocate 10.0.0.1-10.0.0.3/24\n"]
    for number in range(int(os.environ.get("VMCP_TEST_OPERATIONS", "40"))):
        vms = living(env)
        vms.pop("tiny", None)
        what = rng.choice(["clone"] * 3 + ["kill", "kill -9", "suspend", "resume", "gc"]) if len(vms) < 5 else rng.choice(["kill", "kill -9"])
        fault = {"VMCP_FAULT": f"{rng.choice((360, 361))}:{rng.randrange(1, 5)}"} if rng.random() < 0.3 else None
        victim = rng.choice(sorted(vms) or ["nobody"])
        if what == "clone":
            words = ["--count", rng.randrange(1, 3), "--rules", env.write("rules", rng.choice(rules))]
            status = env.vmcp("clone", "origin", *words, status=None, env=fault).status
        elif what == "kill -9":
            status = kill_9(vms[victim]) if victim in vms else 3
        else:
            status = env.vmcp(what, *([] if what == "gc" else [victim]), status=None, env=fault).status
        done[what, "well" if not status else "killed" if status == -9 else "not"] += 1
        check(status in (None, 0, 1, 2, 3, 4, -9), f"seed {seed}, operation {number}, {what}: exit status {status}")
        held = {row[0] for row in table(env)}
        check(not {name for name in living(env)} - held, f"seed {seed}, operation {number}, {what}: a VM that runs has nothing")
    print(f"  {dict(sorted((' '.join(key), count) for key, count in done.items()))}", flush=True)
    for number, (name, pid) in enumerate(living(env).items()):
        if number % 2:
            kill_9(pid)
        else:
            env.vmcp("kill", name)
    wait_for("the end of all VMs", lambda: not living(env))
    wait_for("the end of multiplexers", lambda: not multiplexers(env))
    env.vmcp("gc")
    check_equal((table(env), sockets_of(env)[:5]), ([], []), f"seed {seed}: what is left")
    for port in (shared, pool):
        socket.create_server(("127.0.0.1", port)).close()
    env.vmcp("verify")


def multiplexers(env):
    return {one["host"]: one for one in env.vmcp_json("mux")["multiplexers"]}


def call(port, count, first=b""):
    """So many connections: {the client's address: socket}."""
    callers = {}
    for _ in range(count):
        caller = socket.create_connection(("127.0.0.1", port), timeout=30)
        caller.sendall(first)
        callers[f"127.0.0.1:{caller.getsockname()[1]}"] = caller
    return callers


def translation(env, port, callers):
    """{client: VM}, as soon as each caller has one."""
    def told():
        found = {one["client"]: one["vm"] for one in multiplexers(env)[f"127.0.0.1:{port}"]["connections"] if one["client"] in callers}
        return found if len(found) == len(callers) and all(found.values()) else None
    return wait_for("all connections have a VM", told)


def check_reset(callers, what):
    for caller in callers:
        try:
            check(False, f"{what}: no reset but {caller.recv(1)}")
        except ConnectionResetError:
            pass


def check_open(callers, what):
    for caller in callers:
        caller.setblocking(False)
        try:
            check(False, f"{what}: no connection any more: {caller.recv(1)}")
        except BlockingIOError:
            pass
        caller.settimeout(30)


def test_multiplexed_port(env):
    """Clones share a port: by turns; over checkpoints; with resets at a revert and a death; by the name that is asked for; the process ends with the last."""
    own, shared, named = free_ports(3)
    config = env.tiny_config(memory="32M", cmdline="set=4M rate=500 report=0 net=1", extra=f"[net lan]\nmode = user\nforward = tcp:{own}:80\nforward = udp:{free_ports(1)[0]}:7")
    env.vmcp("run", "--detach", config)
    env.vmcp("checkpoint", "--live", "tiny", "--tag", "origin")
    rules = env.write("mux.rules", f"port:lan/tcp/80 any multiplex {shared}\n")
    clones = env.vmcp_json("clone", "origin", "--count", "3", "--rules", rules)["vms"]
    place = f"tcp:127.0.0.1:{shared}:round-robin"
    host = next(h for h in env.vmcp_json("show", "tiny-1", "--resources")["hosts"] if h["type"] == "mux")
    check_equal((host["host"], host["refs"], [vm["vm"] for vm in host["vms"]]), (place, 3, ["tiny-1", "tiny-2", "tiny-3"]), "who shares the port")
    callers = call(shared, 6)
    given = translation(env, shared, callers)
    check_equal(sorted(given.values()), ["tiny-1", "tiny-1", "tiny-2", "tiny-2", "tiny-3", "tiny-3"], "who got the connections")
    text = env.vmcp("mux").out
    check(f"127.0.0.1:{shared}" in text and "round-robin" in text and all(client in text for client in callers), text)
    env.vmcp("checkpoint", "--live", "tiny-1")
    check_open(callers.values(), "after a live checkpoint")
    env.vmcp("revert", "tiny-1")
    check_reset([caller for client, caller in callers.items() if given[client] == "tiny-1"], "of a VM that was reverted")
    check_open([caller for client, caller in callers.items() if given[client] != "tiny-1"], "of others")
    kill_9(clones[1]["pid"])
    check_reset([caller for client, caller in callers.items() if given[client] == "tiny-2"], "of a VM that was killed")
    check_open([caller for client, caller in callers.items() if given[client] == "tiny-3"], "of the third")
    later = call(shared, 4)
    check_equal(sorted(translation(env, shared, later).values()), ["tiny-1", "tiny-1", "tiny-3", "tiny-3"], "who got later ones")
    # Shared otherwise, or somebody else's: refused, and nothing is left of it.
    for number in (shared, own):
        done = env.vmcp("clone", "origin", "--name", "other", "--rules", env.write("bad.rules", f"port:lan/tcp/80 any multiplex {number}:least\n"), status=4)
        check(f"127.0.0.1:{number}" in done.err and "hint: " in done.err, str(done))
        check("other" not in {row[0] for row in table(env)}, "what was refused has something")
        check("other" not in {vm["name"] for vm in env.vmcp_json("ps")["vms"]}, "what was refused is known")
    # By name.
    rules = env.write("named.rules", f"port:lan/tcp/80 any multiplex {named}:name\n")
    env.vmcp("clone", "origin", "--count", "2", "--name", "web-<N>", "--rules", rules)
    asked = {}
    for name in ("web-2.example.org", "web-1:8443", "WEB-2", "nobody"):
        asked[name] = call(named, 1, f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
    check_reset(asked.pop("nobody").values(), "who asks for nobody")
    check_equal({name: list(translation(env, named, one).values())[0] for name, one in asked.items()},
                {"web-2.example.org": "web-2", "web-1:8443": "web-1", "WEB-2": "web-2"}, "whom names lead to")
    # The next VM brings back a multiplexer that was killed, and gc removes what it has left, nothing else.
    told = [path for path in sockets_of(env) if "/mux/" in path]
    kill_9(multiplexers(env)[f"127.0.0.1:{named}"]["pid"])
    check_equal([path for path in sockets_of(env) if "/mux/" in path], told, "sockets of multiplexers")
    env.vmcp("gc")
    check_equal([path for path in sockets_of(env) if "/mux/" in path], [path for path in told if f":{named}:" not in path], "sockets of multiplexers after gc")
    env.vmcp("clone", "origin", "--name", "web-3", "--rules", rules)
    again = call(named, 1, b"GET / HTTP/1.0\r\nhost: web-1\r\n\r\n")
    check_equal(list(translation(env, named, again).values()), ["web-1"], "after a new start")
    # The end of the last one is the end of the process.
    pids = [one["pid"] for one in multiplexers(env).values()]
    check_equal(len(pids), 2, "multiplexers")
    for name in ("tiny-1", "tiny-3", "web-1", "web-2", "web-3"):
        env.vmcp("kill", name)
    check_reset(later.values(), "of VMs that were ended")
    for pid in pids:
        wait_for(f"the end of {pid}", lambda pid=pid: has_ended(pid))
    check_equal(multiplexers(env), {}, "multiplexers")
    socket.create_server(("127.0.0.1", shared)).close()


def agent(env, vm, root, status=0):
    """The agent of a guest, on this side: the folder is the guest's."""
    program = os.path.join(os.path.dirname(env.vmcp_bin), "..", "guest", "vmcp-agent")
    done = subprocess.run([os.path.abspath(program), "--once", "--root", root, "--socket", "vsock.sock_7349"], cwd=os.path.join(env.store, "vms", vm), capture_output=True,
                          timeout=60, check=False)
    check_equal(done.returncode, status, f"the agent of {vm}: {done.stderr.decode()}")
    return wait_for("what the agent said", lambda: env.vmcp_json("stats", vm)["agent"]["event"])


def test_agent(env):
    """What the process of a VM tells an agent, and what becomes of it in a folder: host names by default, rule and pool; another life; no hooks of the host."""
    env.vmcp("run", "--detach", env.tiny_config(memory="32M", cmdline="set=4M rate=500 report=0", extra="vsock_cid = 3"))
    root = env.path("guest")
    os.makedirs(os.path.join(root, "etc"))
    env.write("guest/etc/hostname", "debian\n")
    env.write("guest/etc/machine-id", "\n")
    os.makedirs(os.path.join(root, "dev"))
    env.write("guest/dev/urandom", "")
    check_equal(env.vmcp_json("stats", "tiny")["agent"], {"connected": False, "event": None, "problem": None}, "without an agent")
    check_equal(agent(env, "tiny", root), "first", "in the origin")
    check_equal(open(os.path.join(root, "etc/hostname"), encoding="ascii").read(), "debian\n", "the origin's host name")
    env.vmcp("checkpoint", "--live", "tiny", "--tag", "origin")
    names = {}
    for rule, name in (("", "a_1"), ("hostname any set web-<N>", "b"), ("hostname any allocate pool:7-9", "c"), ("hostname any allocate pool:7-9", "d"), ("hostname any share", "e")):
        clone = env.vmcp_json("clone", "origin", "--name", name, "--rules", env.write("host.rules", rule + "\n"))["vms"][0]
        copy = shutil.copytree(root, env.path(f"guest-{name}"))
        check_equal(agent(env, name, copy), "clone", name)
        check_equal(open(os.path.join(copy, "etc/machine-id"), encoding="ascii").read(), clone["identity"]["uuid"].replace("-", "") + "\n", "machine id")
        names[name] = open(os.path.join(copy, "etc/hostname"), encoding="ascii").read().strip()
        rows = [(row[3], row[4]) for row in table(env) if row[0] == name and row[1] == "hostname"]
        check_equal(rows, [(names[name], names[name])] if name != "e" else [], "its row in the table")
        check_equal([r["guest"] for r in clone["identity"]["resources"] if r["type"] == "hostname"], [row[0] for row in rows], "what clone says")
    check_equal(names, {"a_1": "a-1", "b": "web-1", "c": "pool7", "d": "pool8", "e": "debian"}, "host names")
    done = env.vmcp("clone", "origin", "--count", "2", "--rules", env.write("host.rules", "hostname any set same\n"), status=2)
    check("host.rules:1" in done.err, str(done))
    env.vmcp("revert", "origin", "--vm", "b")
    check_equal(agent(env, "b", env.path("guest-b")), "life", "after a revert")
    # A clone of a clone is called anew.
    env.vmcp("checkpoint", "--live", "b", "--tag", "of-b")
    env.vmcp("clone", "of-b", "--name", "f")
    check_equal(agent(env, "f", env.path("guest-b")), "clone", "a clone of a clone")
    check_equal(open(env.path("guest-b/etc/hostname"), encoding="ascii").read(), "f\n", "its host name")


def test_addresses(env):
    """IP addresses of cards: one VM has each on its network, by itself, rule and pool; a cloned network is another one; what the agent's hooks are told; every way to have none."""
    def clone(rules, *words, **kwargs):
        return env.vmcp("clone", "tiny", *words, "--rules", env.write("ip.rules", rules), **kwargs)

    def addresses():
        return sorted((row[0], row[3], row[4]) for row in table(env) if row[1] == "ip")

    config = env.tiny_config(memory="32M", cmdline="set=4M rate=500 report=0", extra="vsock_cid = 3\n[net out]\nmode = user\n[net lan]\nmode = group\nnetwork = backend\nip = 10.0.0.5/24\n")
    env.vmcp("run", "--detach", config)
    env.vmcp("run", "--detach", env.tiny_config("db", memory="32M", cmdline="set=4M rate=500 report=0", extra="[net lan]\nmode = group\nnetwork = backend\nip = 10.0.0.9/24\n"))
    env.vmcp("checkpoint", "--live", "--group", "tiny", "db", "--tag", "origin")
    origins = [("db", "10.0.0.9/24", "group:backend/10.0.0.9"), ("tiny", "10.0.0.5/24", "group:backend/10.0.0.5")]
    check_equal(addresses(), origins, "the origins'")
    # Who has one keeps it: the rules are to say which the clones get.
    done = env.vmcp("clone", "tiny", status=4)
    check("ip lan: ip group:backend/10.0.0.5: the VM tiny has it" in done.err and "hint: " in done.err, str(done))
    done = env.vmcp("run", "--detach", "--from", "tiny", "--name", "other", status=4)
    check("10.0.0.5: the VM tiny has it" in done.err and "--net lan:KEY=VALUE" in done.err, str(done))
    for rules, status, what in (("ip:lan any set 10.0.0.5/24", 4, "ip.rules:1: ip group:backend/10.0.0.5: the VM tiny has it"),
                                ("\nip:lan any allocate 10.0.0.5-10.0.0.5/24", 4, "ip.rules:2: ip lan: none of group:backend/10.0.0.5 to group:backend/10.0.0.5 is free"),
                                ("ip:lan any set 10.0.0.0/24", 2, "ip.rules:1: --net: ip: '10.0.0.0/24' is no address"),
                                ("ip:out any share", 2, "ip.rules:1: the VM has no ip out"),
                                ("ip any share\nip any set 10.0.0.<N>/24", 2, "ip.rules:2: contradicts line 1")):
        done = clone(rules, status=status)
        check(what in done.err, str(done))
    check_equal(addresses(), origins, "what refused clones left")
    clone("ip:lan any set 10.0.0.1<N>/24", "--count", "2")
    clone("ip any allocate 10.0.0.4-10.0.0.7/24", "--name", "low", "--count", "1")
    clone("ip any allocate 10.0.0.4-10.0.0.7/24", "--name", "high")
    check_equal([row[1] for row in addresses()], ["10.0.0.9/24", "10.0.0.6/24", "10.0.0.4/24", "10.0.0.5/24", "10.0.0.11/24", "10.0.0.12/24"], "by rules")
    env.vmcp("kill", "low")
    clone("ip any allocate 10.0.0.4-10.0.0.7/16", "--name", "again")
    check_equal([row[1:] for row in addresses() if row[0] == "again"], [("10.0.0.4/16", "group:backend/10.0.0.4")], "what is free again")
    # What the guest is told: its card is the second device behind the host bridge.
    root = env.path("guest")
    for folder in ("etc/vmcp/hooks.d", "dev"):
        os.makedirs(os.path.join(root, folder))
    env.write("guest/dev/urandom", "")
    hook = env.write("guest/etc/vmcp/hooks.d/cards", f"#!/bin/sh\necho \"$VMCP_CARDS\" > {root}/cards\n")
    os.chmod(hook, 0o755)
    check_equal(agent(env, "again", root), "first", "the agent")
    said = open(os.path.join(root, "cards"), encoding="ascii").read().split()
    check_equal((said[0][:10], said[2:]), ("0000:00:02", ["10.0.0.4/16"]), "what a hook is told")
    mac = [row[3] for row in table(env) if row[:3] == ("again", "mac", "lan")]
    check_equal([said[1]], mac, "its card")
    # A suspended VM keeps its own.
    env.vmcp("suspend", "again")
    done = clone("ip:lan any set 10.0.0.4/24", status=4)
    check("the VM again has it" in done.err, str(done))
    # A group's network is another one, and all keep what they had.
    env.vmcp("clone", "origin", "--name", "copy-<VM>")
    copies = [row[1:] for row in addresses() if row[0].startswith("copy-")]
    check_equal([row[0] for row in copies], ["10.0.0.9/24", "10.0.0.5/24"], "in a cloned network")
    check(all(re.fullmatch(r"group:backend@[0-9a-f]{8}/10\.0\.0\.[59]", row[1]) for row in copies), f"their network: {copies}")
    check("group:backend/10.0.0.5" in env.vmcp("show", "tiny", "--resources").out, "the table does not show it")


def state_of(env, name="tiny"):
    return next(vm["state"] for vm in env.vmcp_json("ps")["vms"] if vm["name"] == name)


def wait_for_state(env, state):
    end = time.monotonic() + 30
    while state_of(env) != state:
        check(time.monotonic() < end, f"the VM is {state_of(env)}, not {state}")
        time.sleep(0.02)


def test_suspend(env):
    """A suspended VM has nothing of the host but its ports, is what it was when it wakes, and wakes by command, datagram and connection."""
    ports = free_ports(2)
    disk = env.image("disk.qcow2")
    config = env.tiny_config(memory="64M", cmdline="set=8M rate=2000 disk=1 disk_blocks=64 report=0 net=1", disks=[("data", disk)],
                             extra=f"[net lan]\nmode = user\nforward = udp:{ports[0]}:7\nforward = tcp:{ports[1]}:80\n")
    env.vmcp("run", "--detach", config)
    guest, pid = env.attach_tiny("tiny"), env.vmcp_json("ps")["vms"][0]["pid"]
    echo = Echo(ports[0])
    echo.insist("after the boot")
    guest.set("pause")
    before = guest.sum()
    for number, wake in enumerate(("command", "datagram", "connection")):
        taken = env.vmcp_json("suspend", "tiny")
        check_equal(state_of(env), "suspended", "state")
        check_equal(env.vmcp_json("ps")["vms"][0]["last_checkpoint"], taken["id"], "where it stands")
        files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        check(not [file for file in files if "kvm" in file or "memfd" in file or file.endswith((".qcow2", ".mem"))], f"files that are open: {files}")
        check_equal({row[1] for row in table(env)}, {"uuid", "port", "socket"}, "what is left in the table")
        refused = env.vmcp("checkpoint", "tiny", status=4)
        check("is suspended" in refused.err and "hint: " in refused.err, str(refused))
        if wake == "command":
            env.vmcp("resume", "tiny")
        elif wake == "datagram":
            echo.insist("what wakes it")
        else:
            caller = socket.create_connection(("127.0.0.1", ports[1]), timeout=30)
        wait_for_state(env, "running")
        check_equal(env.vmcp_json("ps")["vms"][0]["pid"], pid, "its process")
        check_equal("disk" in {row[1] for row in table(env)}, True, "it has its disk again")
        after = guest.sum()
        check_equal([after[key] for key in ("mem", "disk", "sequence", "epoch")], [before[key] for key in ("mem", "disk", "sequence", "epoch")], f"content after wake {number}")
        echo.insist("after it woke")
    caller.close()
    guest.set("go")
    guest.check()
    # Asleep it can be killed, which loses nothing, and dies without harm.
    env.vmcp("suspend", "tiny")
    env.vmcp("kill", "tiny")
    check_equal((state_of(env), table(env)), ("stopped", []), "state and table after a kill")
    env.vmcp("revert", "tiny")
    env.vmcp("suspend", "tiny")
    kill_9(env.vmcp_json("ps")["vms"][0]["pid"])
    check_equal(state_of(env), "stopped", "state after kill -9")
    env.vmcp("revert", "tiny")
    env.attach_tiny("tiny").check()


if __name__ == "__main__":
    vmcp_test.main(__name__)
