#!/usr/bin/env python3
"""Encrypted stores, with the tiny guest: nothing of memory and state is in a file as it is, who has the key finds all of it, and nobody else gets anywhere."""

import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import store_memory  # noqa: E402
import vmcp_test  # noqa: E402
from vmcp_test import check, check_equal  # noqa: E402

SECRET = "a passphrase"


def core_memory(env, one, *words, store=None):
    """What `vmcp dump` says is in the guest's memory, below 3 GiB."""
    core = env.path("core")
    env.vmcp("dump", one, core, *words, store=store)
    with open(core, "rb") as file:
        elf = file.read()
    os.unlink(core)
    start = int.from_bytes(elf[64 + 56 + 8:64 + 56 + 16], "little")
    return elf[start:]


def memory_of(store, one, key=None):
    memory = store_memory.Memory(store, one, key)
    try:
        return memory.contents()
    finally:
        memory.close()


def samples(memory):
    """What is in pages, but for what is in very many, as a key for a search."""
    pages = [memory[at:at + 4096] for at in range(0, len(memory), 4096)]
    found = {page[1024:1056] for page in pages if len(set(page[1024:1056])) > 8}
    check(len(found) > 100, f"only {len(found)} pages to look for")
    return sorted(found)[::max(1, len(found) // 24)]


def look_for(folder, texts):
    """Of these texts those that are in some file, but for disks, below the folder."""
    seen = []
    for path, _, names in os.walk(folder):
        for name in names:
            if name.endswith((".qcow2", ".raw")) or not os.path.isfile(os.path.join(path, name)):
                continue
            with open(os.path.join(path, name), "rb") as file:
                data = file.read()
            seen += [(name, text) for text in texts if text in data]
    return seen


def take_all(env, guest):
    """One of each way to hold memory."""
    ids = []
    for number, words in enumerate((("--live",), ("--live",), ("--live", "--full", "--instant", "settled"), ())):
        guest.epoch(10 + number)
        ids.append(env.vmcp_json("checkpoint", *words, "tiny")["id"])
    return ids


def encrypted(env):
    """A VM with a store that its start makes, and four checkpoints. The words that name the key."""
    words = ("--store-key", env.write("key", SECRET + "\n"))
    config = env.tiny_config(memory="32M", cmdline="set=12M rate=2000 disk=1 disk_blocks=64 disk_rate=200 report=0", disks=[("data", env.image("disk.qcow2", "8M"))])
    guest = env.spawn_tiny("run", config, *words)
    return words, guest, take_all(env, guest)


def test_what_is_in_the_files(env):
    """By docs/format.md alone: memory and state are in the files, and to be read with the key only."""
    words, guest, ids = encrypted(env)
    for one in (ids[0], ids[2], ids[3], ids[1]):
        env.vmcp("revert", one)
        guest.check()
    key = store_memory.store_key(env.store, SECRET.encode())
    for one in ids:
        plain = memory_of(env.store, one, key)
        check(plain == core_memory(env, one, *words), f"memory of {one}: the dump has another")
        state = store_memory.read_state(env.store, one, key)
        check_equal(state[1:12], b"\x6avmcp-state", "the state")
    registers = next(state[at:at + 32] for at in range(20, len(state) - 32) if len(set(state[at:at + 32])) > 24)
    check_equal(look_for(env.store, samples(plain) + [b"vmcp-state", registers, key]), [], "what of it is in the store's files")
    for wrong in (b"another", SECRET.encode() + b"\n"):
        try:
            store_memory.store_key(env.store, wrong)
        except AssertionError as error:
            check("the tag does not fit" in str(error), f"another key: {error}")
        else:
            check(False, "another key opens it")
    differing = env.vmcp_json("diff", ids[0], ids[1], *words)["memory"]["differing_pages"]
    check(0 < differing < len(plain) // 4096, f"pages that differ: {differing}")
    env.vmcp("kill", "tiny")
    # It starts from there, without mapping anything; checkpoints go on.
    for one in ids[1:]:
        guest = env.spawn_tiny("run", "--from", one, *words, ready=False)
        guest.check()
        env.vmcp("checkpoint", "--live", "tiny")
        guest.check()
        env.vmcp("kill", "tiny")
    env.vmcp("clone", ids[1], "--count", "2", "--name", "copy-<N>", env={"VMCP_STORE_KEY": words[1]})
    for name in ("copy-1", "copy-2"):
        env.attach_tiny(name).check()
        env.vmcp("kill", name)
    check_equal(look_for(env.store, samples(plain)), [], "what of it is in the store's files now")
    env.vmcp("verify", *words)


def test_keys(env):
    """Another key, none, one too many: told at once, with the way out. What needs no key works without."""
    words, _, ids = encrypted(env)
    wrong = ("--store-key", env.write("wrong", "another\n"))
    env.vmcp("kill", "tiny")
    for command in (("run", "--from", ids[0], "--detach"), ("run", env.path("tiny.cfg"), "--detach"), ("dump", ids[0], env.path("core")), ("diff", ids[0], ids[1]),
                    ("export", ids[0], env.path("x.vmcp")), ("clone", ids[0]), ("revert", ids[0])):
        done = env.vmcp(*command, status=2)
        check("it is encrypted, and no key was named" in done.err and "hint: " in done.err, f"without the key: {done}")
        done = env.vmcp(*command, *wrong, status=1)
        check("the key does not fit" in done.err and "hint: " in done.err, f"with another key: {done}")
        check_equal(len(done.err.splitlines()), 2, f"lines of {done}")
    env.vmcp("dump", ids[0], env.path("core"), "--store-key", env.path("nothere"), status=3)
    env.vmcp("dump", ids[0], env.path("core"), "--store-key", env.write("empty", "\n"), status=2)
    check(not os.path.exists(env.path("core")) and not os.path.exists(env.path("x.vmcp")), "something was written")
    # No key is needed.
    check_equal(env.vmcp_json("show", ids[0])["encrypted"], True, "show")
    check("encrypted   memory and state; not its disks" in env.vmcp("show", ids[0]).out, "show in words")
    check(any(one["what"] == "encryption" and "disks" in one["value"] for one in env.vmcp_json("doctor")["findings"]), "doctor")
    env.vmcp("tag", ids[0], "kept")
    env.vmcp("rm", ids[1])
    env.vmcp("gc")
    env.vmcp("gc", "--rebuild")
    check_equal([one["id"] for one in env.vmcp_json("log")["checkpoints"]], [ids[0], ids[2], ids[3]], "log")
    env.vmcp("verify")
    # Damage is found, with the key and without it.
    layer = env.vmcp_json("show", ids[0])["memory"]["layer"]
    place = store_memory.read_places(os.path.join(env.store, "layers", layer + ".sums"))
    for path, offset in ((f"layers/{layer}.mem", max(place.values()) * 4096 + 9), (f"checkpoints/{ids[0]}/state", 100), (f"checkpoints/{ids[0]}/state", 20)):
        with open(os.path.join(env.store, path), "r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            for value, status in ((byte ^ 4, 5), (byte, 0)):
                file.seek(offset)
                file.write(bytes([value]))
                file.flush()
                env.vmcp("verify", status=status)
                env.vmcp("verify", *words, status=status)
                env.vmcp("dump", ids[0], env.path("core"), *words, status=status)
    # A store that is not encrypted stays so.
    plain = env.path("plain")
    env.vmcp("export", ids[0], env.path("x.vmcp"), *words)
    env.vmcp("import", env.path("x.vmcp"), store=plain)
    for command in (("import", env.path("x.vmcp")), ("run", "--from", ids[0], "--detach"), ("dump", ids[0], env.path("core"))):
        done = env.vmcp(*command, *words, status=4, store=plain)
        check("it is not encrypted" in done.err and "hint: export" in done.err, f"a key for a plain store: {done}")
    check_equal(env.vmcp_json("show", ids[0], store=plain)["encrypted"], False, "show of the plain store")


def test_rekey(env):
    """The key changes below a VM that runs: it runs on, the old key opens nothing any more, and the new one all, what was taken before and after."""
    words, guest, ids = encrypted(env)
    new = env.write("new", "another\n")
    master = store_memory.store_key(env.store, SECRET.encode())
    contents = core_memory(env, ids[0], *words)
    for given, status, says in (((), 2, "no key was named"), (("--store-key", new), 1, "the key does not fit"), (("--store-key", env.path("nothere")), 3, "nothere")):
        done = env.vmcp("rekey", new, *given, status=status)
        check(says in done.err and len(done.err.splitlines()) <= 2, f"what is said: {done}")
    env.vmcp("rekey", env.write("empty", "\n"), *words, status=2)
    check("it is not encrypted" in env.vmcp("rekey", new, status=4, store=plain_store(env)).err, "a plain store")
    check_equal(env.vmcp_json("rekey", new, *words), {"store": os.path.realpath(env.store), "key_file": new}, "what it says")
    check_equal(store_memory.store_key(env.store, b"another"), master, "the store's own key")
    check_equal([name for name in os.listdir(env.store) if name.startswith(".tmp-")], [], "temporaries")
    # It runs on, and needs to be told nothing.
    guest.check()
    guest.epoch(50)
    ids.append(env.vmcp_json("checkpoint", "--live", "tiny")["id"])
    guest.epoch(51)
    env.vmcp("revert", ids[-1])
    check_equal(guest.check()["epoch"], "50", "epoch after a revert")
    check("others use this store" in env.vmcp("gc", "--rebuild", status=4).err, "a catalogue made anew beside it")
    env.vmcp("kill", "tiny")
    for command in (("run", "--from", ids[0], "--detach"), ("dump", ids[0], env.path("core")), ("rekey", new), ("verify",)):
        check("the key does not fit" in env.vmcp(*command, *words, status=1).err, f"{command} with the old key")
    words = ("--store-key", new)
    env.vmcp("verify", *words)
    check(core_memory(env, ids[0], *words) == contents, "memory of before")
    for one in (ids[1], ids[-1]):
        guest = env.spawn_tiny("run", "--from", one, *words, ready=False)
        guest.check()
        env.vmcp("checkpoint", "--live", "tiny")
        env.vmcp("kill", "tiny")
    env.vmcp("gc", "--rebuild")
    # And back again, without a word.
    check_equal(env.vmcp("rekey", env.path("key"), "-q", env={"VMCP_STORE_KEY": new}).out, "", "with -q")
    env.vmcp("verify", "--store-key", env.path("key"))


def plain_store(env):
    """An empty one."""
    store = env.path("plain")
    os.makedirs(store, exist_ok=True)
    with open(os.path.join(store, "format"), "w", encoding="ascii") as file:
        file.write("vmcp store 1\n")
    return store


def test_between_stores(env):
    """Whole exports and increments go from an encrypted store to a plain one, to one with another key, and back: all have the same memory."""
    words, guest, ids = encrypted(env)
    other = ("--store-key", env.write("other.key", "another\n"))
    places = [(env.path("plain"), ()), (env.path("sealed"), other)]
    whole, more = env.path("whole.vmcp"), env.path("more.vmcp")
    env.vmcp("export", ids[0], whole, *words)
    env.vmcp("export", ids[1], more, "--since", ids[0], *words)
    contents = [core_memory(env, one, *words) for one in ids[:2]]
    env.vmcp("kill", "tiny")
    for store, key in places:
        for path, one, content in ((whole, ids[0], contents[0]), (more, ids[1], contents[1])):
            check_equal(env.vmcp("import", path, *key, store=store).out.strip(), one, "what an import prints")
            check(core_memory(env, one, *key, store=store) == content, f"memory of {one} in {store}")
            check_equal(env.vmcp_json("import", path, *key, store=store)["present"], True, "once more")
        env.vmcp("verify", *key, store=store)
    check(memory_of(places[0][0], ids[1]) == memory_of(places[1][0], ids[1], store_memory.store_key(places[1][0], b"another")) == contents[1], "by the format")
    check_equal(look_for(places[1][0], samples(contents[1])), [], "what of it is in the encrypted store's files")
    # What comes from a plain store fits to what came from the encrypted one.
    back = env.path("back.vmcp")
    env.vmcp("export", ids[1], back, "--since", ids[0], store=places[0][0])
    check_equal(env.vmcp_json("import", back, *words)["present"], True, "back home")
    env.vmcp("rm", ids[2], ids[3])
    env.store, source = places[1][0], env.store
    guest = env.spawn_tiny("run", "--from", ids[1], *other, ready=False)
    guest.check()
    env.vmcp("kill", "tiny")
    env.store = source


def test_consolidation(env):
    """Periodic checkpoints, of which old ones go: what is left of their layers is encrypted anew."""
    words, guest, _ = encrypted(env)
    env.vmcp("kill", "tiny")
    guest = env.spawn_tiny("run", env.path("tiny.cfg"), "--every", "50ms", "--keep", "3", *words)
    deadline = time.monotonic() + 60
    while env.vmcp_json("stats", "tiny")["periodic"]["consolidations"] < 1 or env.vmcp_json("stats", "tiny")["periodic"]["removed"] < 20:
        check(time.monotonic() < deadline, f"no consolidation: {env.vmcp_json('stats', 'tiny')['periodic']}")
        time.sleep(0.1)
    guest.check()
    env.vmcp("kill", "tiny")
    env.vmcp("verify", *words)
    newest = env.vmcp_json("log")["checkpoints"][-1]["id"]
    plain = memory_of(env.store, newest, store_memory.store_key(env.store, SECRET.encode()))
    check(plain == core_memory(env, newest, *words), "memory of the newest one")
    check_equal(look_for(env.store, samples(plain)), [], "what of it is in the store's files")
    guest = env.spawn_tiny("run", "--from", newest, *words, ready=False)
    guest.check()


if __name__ == "__main__":
    vmcp_test.main(__name__)
