#!/usr/bin/env python3
"""Every numbered fault point of base/fault_points.def: kill -9, EIO and ENOSPC, what was claimed, and what is there afterwards.

Each row is one operation that passes one point, and one line of output: per action how the operation ended, and what the store had then. Behind every case

  - every checkpoint that was reported durable, and not removed since, is listed and passes `vmcp verify`; none half-exists, none is there that was not claimed
  - the disks of all older checkpoints read as before, images are clean, the present disk opens, and reads as before where nobody wrote to it
  - nothing is staged, and `gc` leaves exactly the layers that something needs
  - the operation, done again without the fault, works

A point that no row reaches, and no other test names, is a failure. VMCP_TEST_FAULTS=NUMBER[,NUMBER...] takes some points only.
"""

import concurrent.futures
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import store_memory  # noqa: E402
import vmcp_test  # noqa: E402
from vmcp_test import check, check_equal  # noqa: E402

ACTIONS = ("kill", "eio", "enospc")
GUEST = "set=1M rate=200 disk=1 disk_blocks=64 disk_rate=400 report=0"
WORKERS = 2


def fault_points():
    """Numbers, names and meanings from base/fault_points.def."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "base", "fault_points.def")
    with open(path, encoding="utf-8") as file:
        return {int(number): name for number, name in re.findall(r"^FAULT_POINT\((\d+), (\w+),", file.read(), re.M)}


class Ended:
    """How an operation under a fault ended: `died` by the fault, `failed` with an error, or done; and the checkpoints that it reported durable, or removed."""

    def __init__(self, died=False, failed=False, reported=(), removed=()):
        self.died, self.failed, self.reported, self.removed = died, failed, set(reported), set(removed)

    def __str__(self):
        return "died" if self.died else "failed" if self.failed else "done"


class World:
    """A VM that does not run, its disks, and a store with checkpoints 0, 4, 5 of it, three layers below 4 that no checkpoint names, and an export of 5."""

    def __init__(self, name):
        self.env = env = vmcp_test.Env(name)
        self.disk = env.image("disk.qcow2", "8M")
        self.config = env.tiny_config(memory="32M", cmdline=GUEST, disks=[("data", self.disk)])
        seed = env.image("seed.qcow2", "1M")
        with open(self.config, "a", encoding="utf-8") as file:
            file.write(f"[disk seed]\npath = {seed}\nreadonly = yes\n")
        guest = env.spawn_tiny("run", self.config)
        taken = []
        for number in range(6):
            guest.epoch(10 + number)
            time.sleep(0.02)
            taken.append(env.vmcp_json("checkpoint", "--live", "tiny")["id"])
        env.vmcp("kill", "tiny")
        for one in taken[1:4]:
            env.vmcp("rm", one, env={"VMCP_FAULT": "320:1:eio"})  # without its merge
        self.ids = [taken[0], taken[4], taken[5]]
        env.vmcp("tag", self.ids[2], "good")
        env.vmcp("export", "good", env.path("good.vmcp"))
        self.contents = self.read_disks(self.ids)
        self.present = self.read(self.disk)
        env.consoles.clear()
        self.saved = env.dir + ".saved"
        subprocess.run(["cp", "-a", "--reflink=auto", env.dir, self.saved], check=True)

    def restore(self):
        shutil.rmtree(self.env.dir)
        subprocess.run(["cp", "-a", "--reflink=auto", self.saved, self.env.dir], check=True)

    def close(self):
        self.env.close(keep=False)
        shutil.rmtree(self.saved, ignore_errors=True)

    def read(self, source, store=None):
        file = self.env.path("content.raw")
        self.env.vmcp("disk", "export", source, file, "--format", "raw", store=store)
        with open(file, "rb") as data:
            total = hashlib.sha256(data.read()).hexdigest()
        os.unlink(file)
        return total

    def read_disks(self, ids):
        return {one: self.read(f"{one}:data") for one in ids}


# --- operations: each takes a world and VMCP_FAULT's value ("" for none), and says how it ended ---

def command(world, fault, *words, store=None):
    done = world.env.vmcp(*words, status=None, store=store, env={"VMCP_FAULT": fault} if fault else None)
    check(done.status in (0, 1, 3, 4, 5, 6, -9), f"exit status: {done}")
    return done, Ended(died=done.status == -9, failed=done.status > 0)


def remove(world, fault):
    _, ended = command(world, fault, "rm", world.ids[0])
    there = os.path.exists(os.path.join(world.env.store, "checkpoints", world.ids[0]))
    if not there or not (ended.died or ended.failed):
        ended.removed = {world.ids[0]}
    return ended


def collect(world, fault):
    return command(world, fault, "gc")[1]


def rebuild(world, fault):
    return command(world, fault, "gc", "--rebuild")[1]


def export(world, fault):
    path = world.env.path("again.vmcp")
    if os.path.exists(path):
        os.unlink(path)
    _, ended = command(world, fault, "export", "good", path)
    check_equal(os.path.exists(path), not (ended.died or ended.failed), "the exported file is there")
    if os.path.exists(path):
        world.env.vmcp("import", "--check", path)
    elif ended.died:
        os.unlink(path + ".part")
    return ended


def tag(world, fault):
    """Another tag's checkpoint keeps its own."""
    _, ended = command(world, fault, "tag", world.ids[1], "again")
    tags = {one["id"]: one["tag"] for one in world.env.vmcp_json("log")["checkpoints"]}
    check(tags[world.ids[1]] == "again" or (tags[world.ids[1]] is None and (ended.died or ended.failed)), f"tags: {tags}")
    check_equal(tags[world.ids[2]], "good", "the tag of another one")
    return ended


def bring_in(world, fault, *words):
    """Into a store of its own, which comes into being with it."""
    other = world.env.path("other")
    _, ended = command(world, fault, "import", world.env.path("good.vmcp"), *words, store=other)
    if not os.path.isdir(os.path.join(other, "staging")):
        return ended  # not yet a store
    there = [one["id"] for one in world.env.vmcp_json("log", store=other)["checkpoints"]]
    check(there in ([], [world.ids[2]]), f"checkpoints of the other store: {there}")
    check(there or ended.died or ended.failed, "the import has ended well, and nothing is there")
    check_equal(os.listdir(os.path.join(other, "staging")), [], "staging of the other store")
    world.env.vmcp("verify", store=other)
    world.env.vmcp("gc", store=other)
    layers = os.listdir(os.path.join(other, "layers"))
    check_equal(sorted(name.split(".")[1] for name in layers), ["mem", "qcow2", "sums"] if there else [], "layers of the other store")
    if there:
        check_equal(world.read(f"{world.ids[2]}:data", other), world.contents[world.ids[2]], "the imported disk")
    return ended


def bring_in_encrypted(world, fault):
    """The same, and the store is encrypted."""
    return bring_in(world, fault, "--store-key", world.env.write("key", "a passphrase\n"))


def rekey(world, fault):
    """Of that store: one of both keys opens it afterwards, the new one if that was reported."""
    env, other = world.env, world.env.path("other")
    keys = [env.write(f"key{number}", f"passphrase {number}\n") for number in range(2)]
    if not os.path.exists(other):
        env.vmcp("import", env.path("good.vmcp"), "--store-key", keys[0], store=other)

    def present():
        opened = [key for key in keys if env.vmcp("verify", "--store-key", key, store=other, status=None).status == 0]
        check_equal(len(opened), 1, "keys that open the store")
        return opened[0]

    old = present()
    new = keys[1 - keys.index(old)]
    _, ended = command(world, fault, "rekey", new, "--store-key", old, store=other)
    check(present() == new or ended.died or ended.failed, "the change has ended well, and the old key opens the store")
    check(present() == old or fault[:4] not in ("1:1:", "2:1:", "352:"), f"{fault}: it has changed the key")
    return ended


def resize(world, fault):
    """Of an image of the user's own, which has a feature that a writer has to clear first."""
    path = world.env.image("own.qcow2", "1M", "qcow2", "-o", "cluster_size=512")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", path], check=True, capture_output=True)
    with open(path, "r+b") as file:
        file.seek(88)
        file.write((1 << 40).to_bytes(8, "big"))  # autoclear features: one that nobody knows
    _, ended = command(world, fault, "disk", "resize", path, "64M")
    read = subprocess.run(["qemu-io", "-f", "qcow2", "-r", "-c", "read -P 7 0 1M", path], capture_output=True, check=False)
    check(read.returncode == 0 and b"verification failed" not in read.stdout, f"the resized image: {read.stdout}{read.stderr}")
    size = int(re.search(r'"virtual-size": (\d+)', subprocess.run(["qemu-img", "info", "--output=json", path], check=True, capture_output=True,
                                                                  text=True).stdout).group(1))
    check(size in (1 << 20, 64 << 20) and (size == 64 << 20 or ended.died or ended.failed), f"size: {size}")
    image_check(path)
    return ended


def guest_disk(world, fault):
    """What a guest's writes pass, by the same engine without a guest (tests/disk): with a journal of what was flushed."""
    tool = os.path.join(os.path.dirname(world.env.vmcp_bin), "..", "tests", "disk", "disk_tool")
    for name in os.listdir(world.env.dir):
        if re.fullmatch(r"l\d+\.qcow2.*|journal", name):
            os.unlink(world.env.path(name))
    image = world.env.image("own.qcow2", "20M", "qcow2", "-o", "cluster_size=512,refcount_bits=64")
    journal, raw = world.env.path("journal"), world.env.path("ours.raw")
    words = [tool, "stress", image, "seed=1", f"layers={world.env.path('l')}", f"journal={journal}", "switch=200", "merge=250", "operations=600", "tolerate=1"]
    done = subprocess.run(words, env=dict(os.environ, VMCP_FAULT=fault) if fault else None, capture_output=True, check=False)
    check(done.returncode in (0, -9), f"{words}: {done}")
    tops = [image] + sorted((world.env.path(name) for name in os.listdir(world.env.dir) if re.fullmatch(r"l\d+\.qcow2", name)),
                            key=lambda path: int(re.search(r"(\d+)\.qcow2$", path).group(1)))
    tops = [path for path in tops if open(path, "rb").read(4) == b"QFI\xfb"]
    for path in tops:
        image_check(path)
    subprocess.run([tool, "read", tops[-1], raw], check=True, capture_output=True)
    verdict = subprocess.run([tool, "verify", journal, raw], capture_output=True, check=False)
    check(verdict.returncode == 0, f"a flushed write is lost: {verdict.stderr.decode()}")
    return Ended(died=done.returncode == -9)


def begin(world, fault, *words, ready=True):
    """The VM's own process. None, and how that ended: it does not come to be, by the fault."""
    guest = world.env.spawn_tiny(*words, env={"VMCP_FAULT": fault} if fault else None, ready=False)
    try:
        if ready:
            guest.ready(60)
    except vmcp_test.ConsoleError:
        return None, end(world, guest, Ended(failed=True), fault)
    return guest, None


def end(world, guest, ended, fault):
    """The VM's process may be dying just now, which takes a busy host its time; what it does not do by itself `kill` does."""
    process = guest.console.process
    deadline = time.monotonic() + (10 if fault.endswith(":kill") else 0.2 if ended.failed else 0)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    ended.died = process.poll() == -9
    if process.poll() is None:
        world.env.vmcp("kill", "tiny", status=None)
        process.wait(60)
    guest.console.close()
    return ended


def take(world, reported):
    done = world.env.vmcp("--json", "checkpoint", "--live", "tiny", status=None)
    if done.status == 0:
        reported.append(done.json["id"])
    # After a layer that could not be made durable there are no more checkpoints of that disk: nobody knows what of it is there.
    return done.status == 0 or (done.status == 4 and "could not make its layer durable" in done.err)


def checkpoint(world, fault):
    """Two, as the second one is incremental; one that fails does no harm to the next."""
    reported, good = [], []
    guest, early = begin(world, fault, "run", world.config)
    if early:
        return early
    for _ in range(2):
        good.append(take(world, reported))
        if guest.console.process.poll() is not None:
            break
    if fault and not fault.endswith(":kill"):
        guest.check()
        check(all(good) or take(world, reported), "the checkpoint after the one that failed")
    return end(world, guest, Ended(failed=not all(good), reported=reported), fault)


def revert(world, fault):
    reported = []
    guest, early = begin(world, fault, "run", world.config)
    if early:
        return early
    take(world, reported)
    done = world.env.vmcp("revert", "tiny", status=None) if reported else None
    if done and done.status == 0 and fault:
        guest.check()
    return end(world, guest, Ended(failed=not done or done.status != 0, reported=reported), fault)


def start(world, fault):
    """From a checkpoint."""
    guest, early = begin(world, fault, "run", "--from", "good", ready=False)
    if early:
        return early
    try:
        guest.check(60)
    except vmcp_test.ConsoleError:
        return end(world, guest, Ended(failed=True), fault)
    return end(world, guest, Ended(), fault)


def cancel(world, fault):
    """Of a checkpoint behind its instant: the disk's overlay is undone."""
    reported = []
    guest, early = begin(world, fault, "run", world.config)
    if early:
        return early
    take(world, reported)
    world.env.vmcp("checkpoint", "--live", "--full", "--wait", "captured", "--max-rate", "64K", "tiny", status=None)  # which it is not done with by then
    world.env.vmcp("cancel", "tiny", status=None)
    deadline = time.monotonic() + 60
    while guest.console.process.poll() is None and time.monotonic() < deadline:
        if "under way" not in world.env.vmcp("checkpoint", "--live", "--tag", "good", "tiny", status=None).err:
            break
        time.sleep(0.02)
    return end(world, guest, Ended(failed=guest.console.process.poll() is not None, reported=reported), fault)


def rotation(world, fault):
    """Periodic checkpoints of which some are let go, their layers consolidated and merged. Which ones are left, nobody has claimed."""
    seen = f"fault point {fault.split(':')[0]}"
    guest, early = begin(world, fault, "run", world.config, "--every", "50ms", "--keep", "3")
    if early:
        return early
    deadline = time.monotonic() + 60
    while guest.console.process.poll() is None and seen not in world.env.stderr_text():
        check(time.monotonic() < deadline, f"{fault} is not reached")
        if not fault and world.env.vmcp_json("stats", "tiny")["periodic"]["removed"] >= 3:
            break
        time.sleep(0.05)
    failed = guest.console.process.poll() is None and bool(fault)
    if failed:
        guest.check()
        before = world.env.vmcp_json("stats", "tiny")["periodic"]["taken"]
        while world.env.vmcp_json("stats", "tiny")["periodic"]["taken"] < before + 2:
            check(time.monotonic() < deadline, "no checkpoints after the one that failed")
            time.sleep(0.05)
    ended = end(world, guest, Ended(failed=failed), fault)
    ended.open = True
    return ended


# Which operation reaches which points.
ROWS = [
    (bring_in, [1, 2, 3, 317, 300, 301, 100, 101, 332, 333, 334, 335, 336, 308, 303, 304, 305, 337]),
    (bring_in_encrypted, [350]),
    (rekey, [1, 2, 3, 352, 353]),
    (tag, [351]),
    (checkpoint, [*range(200, 222), *range(300, 307), 308, 100, 101, 102, 116, 117]),
    (revert, [*range(230, 239)]),
    (start, [239]),
    (cancel, [250, 251]),
    (rotation, [240, 241, 242, 307, 243, *range(310, 316), 121]),
    (remove, [*range(310, 316)]),
    (collect, [320, 118, 119, 120, 321, 316]),
    (rebuild, [318, 319]),
    (export, [330, 331]),
    (resize, [103, 122, 123]),
    (guest_disk, [*range(104, 118)]),
]
# These write nothing to the world's own store: they look after what they did themselves.
ELSEWHERE = (bring_in, bring_in_encrypted, rekey, export, resize, guest_disk)
# What died there has made a checkpoint all the same: behind the commit point.
COMMITTED = {"checkpoint": {221, 304, 305}}


def image_check(path):
    done = subprocess.run(["qemu-img", "check", "-U", path], capture_output=True, check=False)
    check(done.returncode in (0, 3), f"qemu-img check {path}: {done.stdout.decode()}{done.stderr.decode()}")


def judge_layers(env, ids, what):
    """After gc: what is in layers/ is what the checkpoints, and the present disk, stand on."""
    needed = set()
    for one in ids:
        shown = env.vmcp_json("show", one)
        needed.add(shown["memory"]["layer"])
        needed.update(store_memory.layers(env.store, one))
        needed.update(disk["layer"] for disk in shown["disks"])
    names = os.listdir(os.path.join(env.store, "layers"))
    strange = [name for name in names if not re.fullmatch(r"[0-9a-f]{32}\.(mem|sums|(qcow2|raw)(\.sum)?)", name)]
    check(not strange, f"{what}: left over: {strange}")
    memory = {name[:32] for name in names if name.endswith((".mem", ".sums"))}
    check_equal(memory, {name for name in needed if os.path.exists(os.path.join(env.store, "layers", name + ".mem"))}, f"{what}: memory layers")
    again = env.vmcp_json("gc")
    check_equal((again["memory_layers"], again["disk_layers"], again["merged_layers"]), (0, 0, 0), f"{what}: what a second gc finds")


def judge(world, ended, operation, point, action, what):
    env = world.env
    ids = [one["id"] for one in env.vmcp_json("log")["checkpoints"]]
    check_equal(os.listdir(os.path.join(env.store, "staging")), [], f"{what}: staging")
    check_equal(sorted(os.listdir(os.path.join(env.store, "checkpoints"))), sorted(ids), f"{what}: folders of checkpoints")
    must = (set(world.ids) | ended.reported) - ended.removed
    check(must <= set(ids), f"{what}: lost: {must - set(ids)}")
    check(not ended.removed & set(ids), f"{what}: removed, and there: {ended.removed & set(ids)}")
    if not hasattr(ended, "open"):
        more = len(set(ids) - must)
        want = 1 if action == "kill" and point in COMMITTED.get(operation.__name__, ()) else 0
        check(more == want, f"{what}: {more} checkpoints that nobody was told of, not {want}")
    if operation in ELSEWHERE:
        return len(ids)
    env.vmcp("verify")
    image_check(world.disk)
    present = world.read(world.disk)
    if operation in (tag, remove, collect, rebuild):
        check_equal(present, world.present, f"{what}: the present disk")
    env.vmcp("gc")
    judge_layers(env, ids, what)
    old = [one for one in world.ids if one in ids]
    check_equal((world.read_disks(old), world.read(world.disk)), ({one: world.contents[one] for one in old}, present), f"{what}: disks")
    return len(ids)


def case(world, operation, point, action):
    what = f"{operation.__name__} {point}:{action}"
    world.restore()
    try:
        ended = operation(world, f"{point}:1:{action}")
        if action == "kill" and not ended.died:
            return None
        left = judge(world, ended, operation, point, action, what)
        again = operation(world, "")
        check(not (again.died or again.failed) or (operation is remove and ended.removed), f"{what}: the operation done again: {again}")
        return f"{ended}, {left} checkpoints"
    finally:
        for console in world.env.consoles:
            console.close()
        world.env.consoles.clear()


def tested_elsewhere(numbers):
    """Points of other operations than those of the store: in tests of their own, that set VMCP_FAULT to them."""
    found, folder = {}, os.path.dirname(os.path.abspath(__file__))
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
            text = file.read() if name.endswith("_test.py") else ""
        if "VMCP_FAULT" in text:
            found.update({number: name for number in numbers if re.search(rf"\b{number}\b", text)})
    return found


def actions_of(operation):
    """A rotation takes seconds until it comes to the point, and what it does there is what `rm` and `gc` do."""
    return ACTIONS[:2] if operation is rotation else ACTIONS


def row(worlds, operation, point):
    """The actions at one point. None: it is not passed."""
    world = worlds.pop()
    try:
        results = []
        for action in actions_of(operation):
            result = case(world, operation, point, action)
            if result is None:
                return None
            results.append(f"{action}: {result}")
        return "; ".join(results)
    except Exception as error:  # one row's failure must not end the others
        return error
    finally:
        worlds.append(world)


def test_every_fault_point(_):
    names = fault_points()
    wanted = [int(word) for word in os.environ.get("VMCP_TEST_FAULTS", "").split(",") if word]
    worlds = [World(f"table{number}") for number in range(WORKERS)]
    reached, problems, cases = set(), [], 0
    try:
        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            todo = [(operation, point) for operation, points in ROWS for point in points if not wanted or point in wanted]
            results = pool.map(lambda one: row(worlds, *one), todo)
            for (operation, point), result in zip(todo, results):
                if isinstance(result, Exception):
                    problems.append(f"{operation.__name__} {point} {names[point]}: {result}")
                elif result is None:
                    problems.append(f"{operation.__name__} {point} {names[point]}: not passed on this way")
                else:
                    reached.add(point)
                    cases += len(actions_of(operation))
                print(f"  {point:3} {names[point]:28} {operation.__name__:11} {result}", flush=True)
    finally:
        for world in worlds:
            world.close()
    others = tested_elsewhere(set(names) - {point for _, points in ROWS for point in points})
    for number, file in others.items():
        print(f"  {number:3} {names[number]:28} in {file}", flush=True)
    untested = [f"{number} {name}" for number, name in names.items()
                if number not in reached and number not in others and (not wanted or number in wanted)]
    print(f"  {len(reached)} fault points, {cases} cases", flush=True)
    check(not problems and not untested, f"{len(problems)} of the rows: {problems[:5]}; points that no row reached: {untested}")
    check(wanted or len(reached) >= 60, f"only {len(reached)} points")


if __name__ == "__main__":
    vmcp_test.main(__name__)
