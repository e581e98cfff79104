#!/usr/bin/env python3
"""Whole VMs with the tiny guest: groups. One cut of several VMs, all or none, brought back together, cloned with a network of their own.

The guests send numbered frames to everybody (beat=N, examples/tiny/README.md), and count those whose number is not above all that had come of that sender: it is in no consistent
cut that a machine has got a frame which its sender has not sent.
"""

import os
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import vmcp_test  # noqa: E402
from tiny_test import free_ports  # noqa: E402
from vmcp_test import check, check_equal  # noqa: E402

NET = "[net lan]\nmode = group\nnetwork = backend\n"
WORK = "set=4M rate=2000 report=0 net=1 beat=1000"


def start(env, name, fault="", network=NET, **kwargs):
    config = env.tiny_config(name, memory="32M", cmdline=WORK, extra=network, **kwargs)
    return env.spawn_tiny("run", config, env={"VMCP_FAULT": fault} if fault else None)


def net(guest):
    return {key: int(value) for key, value in guest.ask("net", "net").items()}


def hears(guest):
    """True figures of a moment at which more frames come than before."""
    first, end = net(guest)["heard"], time.monotonic() + 60
    while (now := net(guest))["heard"] < first + 20:
        check(time.monotonic() < end, f"nothing comes: {now}")
    return now


def take(env, *words, **kwargs):
    return env.vmcp_json("checkpoint", "--live", "--group", *words, **kwargs)


def ids(env):
    return {one["id"] for one in env.vmcp_json("log")["checkpoints"]}


def expect_nothing_staged(env):
    check_equal(os.listdir(os.path.join(env.store, "staging")), [], "staging")


def test_the_cut_is_consistent(env):
    guests = [start(env, "web", disks=[("data", env.image("web.qcow2", "8M"))]), start(env, "db")]
    for guest in guests:
        hears(guest)
    pauses, waits, groups = [], [], []
    for number in range(6):
        result = take(env, "web", "db", *(["--tag", "first"] if number == 0 else []))
        check_equal([one["vm"] for one in result["checkpoints"]], ["web", "db"], "members")
        check_equal({one["group"] for one in result["checkpoints"]}, {result["group"]}, "their group")
        for one in result["checkpoints"]:
            parts = sum(one["pause"].values())
            check(one["pause_ns"] <= result["pause_ns"] and parts <= one["pause_ns"], f"pause: {result}")
        starts = [one["pause_start_ns"] for one in result["checkpoints"]]
        ends = [one["pause_start_ns"] + one["pause_ns"] for one in result["checkpoints"]]
        check(max(starts) < min(ends), f"one went on before all stood: {result}")
        pauses.append(result["pause_ns"])
        waits.append(max(one["pause_ns"] for one in result["checkpoints"]))
        groups.append(result["group"])
    print(f"  pause of the group {sorted(pauses)[3] / 1e6:.2f} ms (median of 6; {max(pauses) / 1e6:.2f} at most), of a VM at most {max(waits) / 1e6:.2f} ms")
    for group in (groups[-1], groups[0][:10], "first", groups[3]):
        back = env.vmcp_json("revert", group)
        check_equal([one["mode"] for one in back["vms"]], ["in-place", "in-place"], "how they came back")
        for guest in guests:
            guest.console.send_line("")
            check_equal(hears(guest)["behind"], 0, "frames that were got before they were sent")
    shown = env.vmcp_json("show", "first")
    check(shown["whole"] and shown["group"] == groups[0] and [one["vm"] for one in shown["checkpoints"]] == ["web", "db"], f"{shown}")
    listed = env.vmcp_json("log")["checkpoints"]
    check_equal({one["group"] for one in listed}, set(groups), "groups in the log")
    check("group" in env.vmcp("log").out and groups[0][:8] in env.vmcp("log").out, "the log shows groups")
    check_equal(env.vmcp("export", "first", env.path("x"), status=None).status, 3, "a group is no checkpoint to export")
    env.vmcp("export", shown["checkpoints"][0]["id"], env.path("one.vmcp"))
    env.vmcp("verify")
    # The check can fail: two moments are no cut.
    one = env.vmcp_json("checkpoint", "--live", "db")["id"]
    hears(guests[0])
    other = env.vmcp_json("checkpoint", "--live", "web")["id"]
    for name in ("web", "db"):
        env.vmcp("pause", name)
    env.vmcp("revert", one)
    env.vmcp("revert", other)
    for name in ("web", "db"):
        env.vmcp("resume", name)
    guests[0].console.send_line("")
    check(hears(guests[0])["behind"] > 0, "two checkpoints of two moments look like one cut")
    for guest in guests:
        guest.check()
    env.vmcp("rm", groups[1])
    check_equal(env.vmcp("show", groups[1], status=None).status, 3, "a group that was removed")
    env.vmcp("rm", env.vmcp_json("show", groups[2])["checkpoints"][1]["id"])
    failed = env.vmcp("revert", groups[2], status=4)
    check("db" in failed.err and "not whole" in failed.err, f"{failed}")


def expect_all_go_on(guests):
    for guest in guests:
        guest.console.send_line("")
        hears(guest)


# Who fails, where, how, and whether the group is there all the same.
FAILURES = [
    ("member", "213:1:eio", False),
    ("member", "340:1:eio", False),
    ("member", "341:1:eio", False),
    ("member", "340:1:kill", False),
    ("member", "341:1:kill", False),
    ("member", "344:1:kill", True),
    ("member", "344:1:eio", True),
    ("leader", "342:1:eio", False),
    ("leader", "342:1:kill", False),
    ("leader", "343:1:kill", True),
]


def test_all_or_none(env):
    others = [start(env, "a"), start(env, "b")]
    for number, (who, fault, there) in enumerate(FAILURES):
        name, what = f"c{number}", f"{who} {fault}"
        member = start(env, name, fault if who == "member" else "")
        before = ids(env)
        done = env.vmcp("--json", "checkpoint", "--live", "--group", "a", "b", name, status=None, env={"VMCP_FAULT": fault} if who == "leader" else None)
        killed = fault.endswith("kill")
        expect_all_go_on(others + ([] if killed and who == "member" else [member]))
        if who == "leader" and killed:
            check_equal(done.status, -9, what)
        else:
            check_equal(done.status == 0, there, f"{what}: {done}")
        end = time.monotonic() + 60  # what was killed may be dying still
        while killed and (len(ids(env)) != len(before) + (3 if there else 0) or os.listdir(os.path.join(env.store, "staging"))):
            check(time.monotonic() < end, f"{what}: {ids(env) - before}")
        if not there and done.status > 0:
            check(len(done.json["error"]["message"]) > 10, f"{what}: no reason: {done}")
        new = ids(env) - before
        expect_nothing_staged(env)
        check_equal(len(new), 3 if there else 0, f"{what}: checkpoints")
        groups = {one["group"] for one in env.vmcp_json("log")["checkpoints"] if one["id"] in new}
        check_equal(len(groups), 1 if there else 0, f"{what}: groups")
        if there:
            check(env.vmcp_json("show", groups.pop())["whole"], f"{what}: it is whole")
            env.vmcp("verify", *new)
        # Nobody is in the way of the next.
        take(env, "a", "b")
        env.vmcp("kill", name, status=None)
    check_equal(env.vmcp("checkpoint", "--live", "--group", "a", "gone", status=None).status, 3, "no such VM")
    check_equal(env.vmcp("checkpoint", "--live", "--group", "a", "a", status=None).status, 2, "the same one twice")
    check_equal(env.vmcp("checkpoint", "--live", "a", "b", status=None).status, 2, "two VMs, and no group")
    expect_all_go_on(others)


def test_nobody_is_held(env):
    """Who leads dies, or is silent, while VMs stand still and wait for the last one."""
    first = start(env, "a")
    for number, sign in enumerate((signal.SIGKILL, signal.SIGSTOP)):
        name, told = f"slow{number}", env.stderr_text().count("fault point 340")
        guests = [first, start(env, name, "340:1:sleep=1000")]
        leader = subprocess.Popen([env.vmcp_bin, "--store", env.store, "checkpoint", "--live", "--group", "a", name], stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while env.stderr_text().count("fault point 340") == told:  # said as the sleep begins
            check(time.monotonic() < end, "the member does not come to its meeting place")
            time.sleep(0.005)
        leader.send_signal(sign)
        expect_all_go_on(guests)
        check(leader.poll() is None or sign == signal.SIGKILL, "the one who leads was to be silent")
        end = time.monotonic() + 60
        while os.listdir(os.path.join(env.store, "staging")):
            check(time.monotonic() < end, "a checkpoint of the group is still under way")
            time.sleep(0.02)
        leader.kill()
        leader.wait()
        check_equal(ids(env), set(), "checkpoints")
    take(env, "a", "slow1")
    expect_all_go_on(guests)


def test_back_from_nothing_and_clones(env):
    guests = [start(env, "web"), start(env, "db")]
    for guest in guests:
        hears(guest)
    group = take(env, "web", "db", "--tag", "both")["group"]
    env.vmcp("kill", "db")
    guests[1].console.process.wait(60)
    back = env.vmcp_json("revert", "both")
    check_equal({one["vm"]: one["mode"] for one in back["vms"]}, {"web": "in-place", "db": "started"}, "how they came back")
    guests = [guests[0], env.attach_tiny("db")]
    expect_all_go_on(guests)
    for guest in guests:
        check_equal(net(guest)["behind"], 0, "frames that were got before they were sent")
    # Twice each, beside the originals, with the same addresses.
    clones = env.vmcp_json("clone", "both", "--count", "2")["vms"]
    check_equal(sorted(one["name"] for one in clones), ["db-1", "db-2", "web-1", "web-2"], "clones")
    macs = {name: env.vmcp_json("stats", name)["nets"][0]["mac"] for name in ("web", "web-1", "web-2", "db", "db-1", "db-2")}
    check_equal((macs["web-1"], macs["web-2"], macs["db-1"], macs["db-2"]), (macs["web"], macs["web"], macs["db"], macs["db"]), "addresses")
    check_equal(len(os.listdir(os.path.join(env.store, "networks"))), 4, "the lock and three networks")
    consoles = {name: env.attach_tiny(name) for name in ("web-1", "web-2", "db-1", "db-2")}
    everybody = guests + list(consoles.values())
    expect_all_go_on(everybody)
    for guest in everybody:
        check_equal(net(guest)["behind"], 0, "frames of another group, or from another time")
    check_equal({one["state"] for one in env.vmcp_json("ps")["vms"]}, {"running"}, "states")
    # A clone's group is a group like any other.
    again = take(env, "web-1", "db-1")["group"]
    env.vmcp("revert", again)
    expect_all_go_on([consoles["web-1"], consoles["db-1"]])
    for name in ("web-1", "db-1"):
        check_equal(net(consoles[name])["behind"], 0, "frames that were got before they were sent")
    # One cannot: none is changed, and none is left.
    env.vmcp("kill", "db")
    layer = env.vmcp_json("show", [one["id"] for one in env.vmcp_json("show", group)["checkpoints"] if one["vm"] == "db"][0])
    state = os.path.join(env.store, "checkpoints", layer["id"], "state")
    os.rename(state, state + ".away")
    before = net(guests[0])["beats"]
    failed = env.vmcp("revert", "both", status=None)
    check(failed.status != 0 and "db" in failed.err, f"{failed}")
    check(net(guests[0])["beats"] > before, "the other one went back")
    check(env.vmcp("clone", "both", "--name", "late-<VM>", status=None).status != 0, "a clone of what is damaged")
    os.rename(state + ".away", state)
    check_equal([one["name"] for one in env.vmcp_json("ps")["vms"] if one["name"].startswith("late") and one["state"] == "running"], [], "half a group")
    env.vmcp("revert", "both")
    check_equal(hears(env.attach_tiny("db"))["behind"], 0, "frames that were got before they were sent")


def resources(env, vm, kind):
    return [one for one in env.vmcp_json("show", vm, "--resources")["resources"] if one["type"] == kind]


def test_copies_of_a_group(env):
    """Those of one copy have one number and one network; rules are about all of the group; what is refused is refused before anything starts."""
    port, other, shared = free_ports(3)
    start(env, "web", network=NET + f"[net out]\nmode = user\nforward = tcp:{port}:80\n")
    start(env, "db")
    take(env, "web", "db", "--tag", "both")
    single = env.vmcp_json("show", "both")["checkpoints"][1]["id"]
    env.vmcp("clone", single, "--name", "db-2")
    for name in ("web", "db", "db-2"):
        env.vmcp("kill", name)
    known = sorted(one["name"] for one in env.vmcp_json("ps")["vms"])
    # The second member's, or the second copy's, turn to fail.
    for text, count, status, what in ((f"port:out any set {other}\n", 2, 2, "rules:1: port out/tcp/80"), ("port:out any drop\nport:in any drop\n", 1, 2, "rules:2: the VM has no port in"),
                                      ("bridge:lan any share\n", 1, 2, "rules:1: the VM has no bridge lan"),
                                      ("hostname any set <VM>\n", 1, 2, "rules:1: nobody would tell the guest"),
                                      (f"port any allocate {other}-{other}\n", 2, 2, "rules:1: the pool"), ("mac any set 52:54:00:00:00:0<N>\n", 10, 2, "rules:1")):
        done = env.vmcp("clone", "both", "--count", count, "--rules", env.write("rules", text), status=status)
        check(what in done.err, f"{text!r}: {done}")
        check_equal(sorted(one["name"] for one in env.vmcp_json("ps")["vms"]), known, f"what {text!r} has left")
    env.vmcp("clone", "both", "--name", "db-2-<VM>", "--count", "2", status=2)
    env.vmcp("clone", "both", "--name", "same", status=4)  # for both members
    check_equal(sorted(one["name"] for one in env.vmcp_json("ps")["vms"]), known, "known VMs")
    # The second number has gone for one of them: it has gone for both.
    rules = env.write("rules", f"port:out/tcp/80 any multiplex {shared}\n")
    clones = env.vmcp_json("clone", "both", "--count", "2", "--rules", rules)["vms"]
    check_equal([one["name"] for one in clones], ["web-1", "web-3", "db-1", "db-3"], "names")
    networks = {one["name"]: resources(env, one["name"], "network")[0]["host"] for one in clones}
    check_equal((networks["web-1"], networks["web-3"]), (networks["db-1"], networks["db-3"]), "networks")
    check(networks["web-1"] != networks["web-3"], f"one network for two copies: {networks}")
    check_equal([one["host"] for name in ("web-1", "web-3") for one in resources(env, name, "mux")], [f"tcp:127.0.0.1:{shared}:round-robin"] * 2, "what is multiplexed")
    expect_all_go_on([env.attach_tiny(one["name"]) for one in clones])


if __name__ == "__main__":
    vmcp_test.main(__name__)
