#!/usr/bin/env python3
"""Golden stores: small stores as released versions made them, in tests/golden/. Each must be read, verified and started by this version.

    store-N.tar.xz    the store and its disk, of format N
    store-N.json      what is in it
    store-N.key       its key, if it is encrypted (N is 2)

`golden_test.py --make N` makes those of the present version. Backing files of disk layers are absolute paths, so the store lives at one path, PLACE.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import sys
import tarfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "lib"))
import store_memory  # noqa: E402
import vmcp_test  # noqa: E402
from tiny_test import image_check  # noqa: E402
from vmcp_test import check, check_equal  # noqa: E402

GOLDEN = os.path.join(HERE, "..", "golden")
PLACE = "/tmp/vmcp-golden"
MAKING = "--make" in sys.argv


class Place:
    """PLACE, for one test at a time: a VM's folder and a store in it."""

    def __init__(self, env):
        self.lock = os.open(os.path.dirname(PLACE), os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        shutil.rmtree(PLACE, ignore_errors=True)
        env.store = os.path.join(PLACE, "store")
        self.env = env

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for vm in self.env.vmcp_json("ps", status=None).get("vms", []):
            if vm["pid"]:
                self.env.vmcp("kill", vm["name"], status=None)
        self.env.store = self.env.path("none")
        shutil.rmtree(PLACE, ignore_errors=True)
        os.close(self.lock)

    def unpack(self, number):
        with tarfile.open(os.path.join(GOLDEN, f"store-{number}.tar.xz")) as archive:
            archive.extractall(PLACE)
        with open(os.path.join(GOLDEN, f"store-{number}.json"), encoding="utf-8") as file:
            return json.load(file)


def key_file(number):
    return os.path.join(GOLDEN, f"store-{number}.key")


def key_words(number):
    """For commands that need the key, if there is one."""
    return ("--store-key", key_file(number)) if os.path.exists(key_file(number)) else ()


def memory_sum(store, checkpoint, number=None):
    """number: of the golden store that it is."""
    key = None
    if number and key_words(number):
        with open(key_file(number), "rb") as file:
            key = store_memory.store_key(store, file.read().removesuffix(b"\n"))
    memory = store_memory.Memory(store, checkpoint, key)
    total = hashlib.sha256(memory.contents()).hexdigest()
    memory.close()
    return total


def make(env, number):
    """Three checkpoints, of which two are children of the first, the second after the VM went back to it; a disk; tags. Of format 2: encrypted."""
    if number == 2:
        with open(key_file(number), "w", encoding="ascii") as file:
            file.write("the key of a golden store\n")
    with Place(env):
        os.mkdir(PLACE)
        env.tiny = shutil.copy(env.tiny, PLACE)
        disk = os.path.join(PLACE, "disk.qcow2")
        os.rename(env.image("disk.qcow2", "4M"), disk)
        config = env.tiny_config(memory="16M", cmdline="set=16K rate=5 disk=1 disk_blocks=16 disk_rate=5 disk_sizes=4k qd=1 report=0", disks=[("data", disk)],
                                 extra="cpu_model = x86-64-v1")
        guest = env.spawn_tiny("run", config, *key_words(number))
        told = []
        for epoch, words in ((1, ("--tag", "first", "-m", "the first of all")), (2, ("-m", "a child")), (3, ("--tag", "branch"))):
            if epoch == 3:
                env.vmcp("revert", told[0]["id"])
            guest.epoch(epoch)
            time.sleep(0.1)
            one = env.vmcp_json("checkpoint", "--live", "tiny", *words)
            told.append({"id": one["id"], "parent": one["parent"], "tag": one["tag"], "message": one["message"], "epoch": epoch,
                         "memory": memory_sum(env.store, one["id"], number)})
        env.vmcp("kill", "tiny")
        with open(os.path.join(GOLDEN, f"store-{number}.json"), "w", encoding="utf-8") as file:
            json.dump({"checkpoints": told}, file, indent=2)
            file.write("\n")
        with tarfile.open(os.path.join(GOLDEN, f"store-{number}.tar.xz"), "w:xz", preset=9) as archive:
            for name in ("disk.qcow2", "store"):
                archive.add(os.path.join(PLACE, name), name, filter=lambda info: None if info.name.endswith((".sock", "log", "log.1")) else info)


def numbers():
    return sorted(int(name[6:-7]) for name in os.listdir(GOLDEN) if name.startswith("store-") and name.endswith(".tar.xz"))


def start_each(env, golden, words):
    """Every checkpoint starts, and holds what its guest knew. Not on a processor of another vendor or, where that counts, speed, which must be said."""
    for number, one in enumerate(golden["checkpoints"]):
        name = f"vm{number}"
        done = env.vmcp("run", "--from", one["id"], "--name", name, "--detach", *words, status=None)
        if done.status == 6:
            check(any(words in done.err for words in ("processor", "this host lacks", "the state's TSC runs at")), f"refused: {done}")
            print(f"  SKIP the starts: made on another kind of processor: {done.err.splitlines()[0]}", flush=True)
            return
        check_equal(done.status, 0, f"exit of the start: {done}")
        guest = env.attach_tiny(name)
        check_equal(guest.check()["epoch"], str(one["epoch"]), "epoch")
        guest.epoch(100 + number)
        own = env.vmcp_json("checkpoint", "--live", name)
        check_equal(own["parent"], one["id"], "parent")
        env.vmcp("revert", one["id"], "--vm", name)
        check_equal(guest.check()["epoch"], str(one["epoch"]), "epoch after a revert")
        env.vmcp("kill", name)


def test_golden_stores(env):
    """Read, verified, exported, taken into a store of this version, started; its catalogue made anew."""
    check_equal(numbers(), [1, 2], "golden stores")
    for number in numbers():
        words = key_words(number)
        with Place(env) as place:
            golden = place.unpack(number)
            there = {one["id"]: one for one in env.vmcp_json("log")["checkpoints"]}
            check_equal(sorted(there), sorted(one["id"] for one in golden["checkpoints"]), "checkpoints")
            for one in golden["checkpoints"]:
                shown = env.vmcp_json("show", one["id"])
                for key in ("id", "parent", "tag", "message"):
                    check_equal(shown[key] or "", one[key] or "", f"{key} of {one['id']}")
                check_equal(shown["encrypted"], number == 2, "encrypted")
                check_equal(memory_sum(env.store, one["id"], number), one["memory"], "memory")
            env.vmcp("verify", *words)
            image_check(os.path.join(PLACE, "disk.qcow2"))
            new = env.path(f"new-{number}")
            for one in golden["checkpoints"]:
                file = env.path(f"{one['id']}.vmcp")
                env.vmcp("export", one["id"], file, *words)
                check_equal(env.vmcp_json("import", file, store=new)["id"], one["id"], "id")
                check_equal(memory_sum(new, one["id"]), one["memory"], "memory that was taken in")
            env.vmcp("verify", store=new)
            start_each(env, golden, words)
            os.unlink(os.path.join(env.store, "catalog.db"))
            check(set(there) <= {one["id"] for one in env.vmcp_json("log")["checkpoints"]}, "a catalogue made anew")
            env.vmcp("verify")


def test_a_newer_format_is_refused(env):
    """Layout, catalogue and manifest of a later version: told so, with the way out, and nothing is touched."""
    for number in numbers():
        with Place(env) as place:
            golden = place.unpack(number)
            newer_is_refused(env, golden["checkpoints"][0]["id"], key_words(number))


def newer_is_refused(env, first, words):
    manifest = os.path.join(env.store, "checkpoints", first, "manifest")
    with open(manifest, encoding="utf-8") as file:
        text = file.read()
    with open(manifest, "w", encoding="utf-8") as file:
        file.write(text.replace('"version": 1', '"version": 99'))
    refused = env.vmcp("run", "--from", first, *words, status=1)
    check("newer" in refused.err and "hint: " in refused.err, f"a newer manifest: {refused}")
    with open(manifest, "w", encoding="utf-8") as file:
        file.write(text)
    database = sqlite3.connect(os.path.join(env.store, "catalog.db"))
    version = database.execute("PRAGMA user_version").fetchone()[0]
    for number, good in ((99, False), (version, True)):
        database.execute(f"PRAGMA user_version = {number}")
        database.commit()
        done = env.vmcp("log", status=0 if good else 1)
        check(good or ("newer" in done.err and "hint: " in done.err), f"a newer catalogue: {done}")
    database.close()
    layout = os.path.join(env.store, "format")
    with open(layout, encoding="ascii") as file:
        lines = file.readlines()
    with open(layout, "w", encoding="ascii") as file:
        file.writelines(["vmcp store 99\n", *lines[1:]])
    before = sorted(os.listdir(env.store))
    for command in (("log",), ("gc",), ("run", "--from", first), ("import", "--check", layout)):
        done = env.vmcp(*command, *words, status=None)
        check(done.status == (5 if command[0] == "import" else 1), f"a newer layout: {done}")
        check(command[0] == "import" or ("newer" in done.err and "hint: " in done.err), f"a newer layout: {done}")
    check_equal(sorted(os.listdir(env.store)), before, "files")
    with open(layout, "w", encoding="ascii") as file:
        file.writelines(lines)
    env.vmcp("verify", *words)


if __name__ == "__main__":
    if MAKING:
        os.makedirs(GOLDEN, exist_ok=True)
        env_of_make = vmcp_test.Env("make")
        make(env_of_make, int(sys.argv[sys.argv.index("--make") + 1]))
        env_of_make.close(keep=False)
    else:
        vmcp_test.main(__name__)
