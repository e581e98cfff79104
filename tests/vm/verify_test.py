#!/usr/bin/env python3
"""Whole VMs with the tiny guest: what `verify` finds, what other commands do with damage, and what is read out of checkpoints (diff, dump).

VMCP_TEST_FLIPS sets how many bytes are flipped (350), VMCP_TEST_SEED where."""

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import store_memory  # noqa: E402
import vmcp_test  # noqa: E402
from vmcp_test import check, check_equal  # noqa: E402


def take(env, guest, count, **options):
    """Checkpoints in a row, the guest at work in between: ids, and what the guest said of itself at each."""
    ids, sums = [], {}
    for number in range(count):
        guest.epoch(100 + number)
        time.sleep(0.05)
        guest.set("pause")
        state = {key: value for key, value in guest.sum().items() if key in ("mem", "disk", "sequence", "epoch")}
        one = env.vmcp_json("checkpoint", "--live", "tiny")["id"]
        guest.set("go")
        ids.append(one)
        sums[one] = state
    return ids, sums


def verify(env, *args, status=0):
    report = env.vmcp_json("verify", *args, status=status)
    return {one["id"]: one["errors"] for one in report["checkpoints"]}, report


class Flipped:
    """A byte of a file, flipped inside `with`."""

    def __init__(self, path, offset, mask=0x10):
        self.path, self.offset, self.mask = path, offset, mask

    def write(self):
        file = os.open(self.path, os.O_RDWR)
        try:
            byte = os.pread(file, 1, self.offset)
            os.pwrite(file, bytes([byte[0] ^ self.mask]), self.offset)
        finally:
            os.close(file)

    __enter__ = write

    def __exit__(self, *_):
        self.write()


def index_pages(env, one):
    """{layer: set of pages} that a checkpoint takes from layers, by the format's description alone."""
    memory = store_memory.Memory(env.store, one)
    pages = {}
    for first, count, layer in memory.extents:
        if layer:
            pages.setdefault(memory.layers[layer - 1], set()).update(range(first, first + count))
    memory.close()
    return pages


def test_verify_names_damage_and_sharers(env):
    """While the VM runs: all are whole; each kind of damage is named with file and range, and told of exactly those that share it."""
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(memory="64M", cmdline="set=8M rate=4000 disk=1 disk_blocks=256 qd=4 report=0", disks=[("data", disk)])
    ids, _ = take(env, guest, 5)
    errors, report = verify(env)
    check_equal(errors, {one: [] for one in ids}, "a whole store")
    check(report["catalog"]["ok"] and report["read_bytes"] > 8 << 20, f"what was read: {report}")
    check_equal(set(verify(env, ids[1][:8], ids[3])[0]), {ids[1], ids[3]}, "those that were named")
    layers = os.path.join(env.store, "layers")

    # A page that some of them take from the first layer, and others have from later ones.
    root = env.vmcp_json("show", ids[0])["memory"]["layer"]
    takers = {one: index_pages(env, one).get(root, set()) for one in ids}
    page = max(page for page in takers[ids[0]] if any(page not in takers[one] for one in ids) and page in takers[ids[1]])
    place = store_memory.read_places(os.path.join(layers, root + ".sums"))[page]
    with Flipped(os.path.join(layers, root + ".mem"), place * 4096 + 77):
        errors, report = verify(env, status=5)
        sharers = {one for one in ids if page in takers[one]}
        check_equal({one for one in ids if errors[one]}, sharers, "who shares the damaged page")
        damage, = report["damages"]
        check_equal((damage["file"], damage["offset_bytes"], damage["length_bytes"], set(damage["checkpoints"])),
                    (f"layers/{root}.mem", place * 4096, 4096, sharers), "the damage")
        text = env.vmcp("verify", status=5)
        check(f"layers/{root}.mem: bytes {place * 4096} to " in text.out and "vmcp: verify: " in text.err, f"the report: {text}")
    check_equal(verify(env)[0], {one: [] for one in ids}, "mended again")

    # A disk layer in the middle: those above stand on it.
    image = env.vmcp_json("show", ids[2])["disks"][0]["layer"]
    with Flipped(os.path.join(layers, image + ".qcow2"), os.path.getsize(os.path.join(layers, image + ".qcow2")) // 2):
        errors, report = verify(env, status=5)
        check_equal({one for one in ids if errors[one]}, set(ids[2:]), "who stands on the damaged disk layer")
        check(image in report["damages"][0]["file"], f"the damage: {report['damages']}")
    os.rename(os.path.join(layers, image + ".qcow2"), os.path.join(layers, "away"))
    errors, _ = verify(env, status=5)
    check_equal({one for one in ids if errors[one]}, set(ids[2:]), "who stands on the missing disk layer")
    os.rename(os.path.join(layers, "away"), os.path.join(layers, image + ".qcow2"))

    # Cut off: found when a VM goes back to it, or starts from it, before anything is touched.
    last = env.vmcp_json("show", ids[3])["disks"][0]["layer"]
    path = os.path.join(layers, last + ".qcow2")
    with open(path, "rb") as file:
        whole = file.read()
    guest.set("disk 0")  # it reads that layer
    time.sleep(0.2)
    os.truncate(path, len(whole) - 512)
    for words in (["revert", ids[3]], ["run", "--from", ids[3], "--name", "other", "--detach"]):
        refused = env.vmcp(*words, status=5)
        check("is cut off" in refused.err and last in refused.err, f"a start from a layer that is cut off: {refused}")
    with open(path, "r+b") as file:
        file.write(whole)
    guest.set("disk 1")
    guest.check()
    check_equal(verify(env)[0], {one: [] for one in ids}, "mended again")

    # Its checkpoint is removed: others stand on the layer, and it is still checked.
    env.vmcp("rm", ids[2])
    check_equal(verify(env)[1]["unrecorded"], [], "files without a checksum")
    with Flipped(os.path.join(layers, image + ".qcow2"), 4097):
        errors, _ = verify(env, status=5)
        check_equal({one for one in errors if errors[one]}, set(ids[3:]), "who stands on a damaged disk layer that no checkpoint names")
    ids.remove(ids[2])

    for name in ("manifest", "state", "index"):
        with Flipped(os.path.join(env.store, "checkpoints", ids[2], name), 40):
            errors, _ = verify(env, status=5)
            check_equal([one for one in ids if errors[one]], [ids[2]], f"a damaged {name} is one checkpoint's")
            check(f"checkpoints/{ids[2]}/{name}" in errors[ids[2]][0], f"it names the file: {errors[ids[2]]}")
    guest.check()
    check_equal(verify(env)[0], {one: [] for one in ids}, "at the end")


def test_verify_beside_removals(env):
    """Checkpoints come and go while they are verified: none is taken for damaged."""
    guest = env.start_tiny(memory="64M", cmdline="set=16M rate=20000 report=0")
    take(env, guest, 6)
    deadline, rounds = time.monotonic() + 6, 0
    remover = subprocess.Popen(["bash", "-c", f"""
        while :; do
            {env.vmcp_bin} --store {env.store} checkpoint --live -q tiny >/dev/null 2>&1
            {env.vmcp_bin} --store {env.store} rm tiny~3 tiny~2 >/dev/null 2>&1
        done"""])
    try:
        while time.monotonic() < deadline:
            errors, _ = verify(env)
            check(errors, "nothing was looked at")
            rounds += 1
    finally:
        remover.kill()
        remover.wait()
    check(rounds > 10, f"only {rounds} rounds")
    guest.check()


def memory_pages(env, one):
    """Page contents of a checkpoint's memory, by the format's description alone."""
    memory = store_memory.Memory(env.store, one)
    data = b"".join(data for _, data in memory.runs())
    memory.close()
    return data


def test_diff_is_exact(env):
    """What diff says of memory and disk, against both read whole by other means."""
    disk = env.image("disk.qcow2")
    guest = env.start_tiny(memory="64M", cmdline="set=4M rate=2000 disk=1 disk_blocks=256 qd=4 report=0", disks=[("data", disk)])
    ids, _ = take(env, guest, 3)
    for a, b in ((ids[0], ids[2]), (ids[2], ids[1]), (ids[1], ids[1])):
        diff = env.vmcp_json("diff", a, b)
        one, other = memory_pages(env, a), memory_pages(env, b)
        want = {page for page in range(0, len(one), 4096) if one[page:page + 4096] != other[page:page + 4096]}
        told = {page for part in diff["memory"]["ranges"] for page in range(part["gpa"], part["gpa"] + part["length_bytes"], 4096)}
        check_equal(told, want, f"pages in which {a} and {b} differ")
        check_equal(diff["memory"]["differing_pages"], len(want), "their number")
        raws = []
        for number, name in enumerate((a, b)):
            raws.append(env.path(f"{number}.raw"))
            env.vmcp("disk", "export", f"{name}:data", raws[-1], "--format", "raw")
        with open(raws[0], "rb") as first, open(raws[1], "rb") as second:
            one, other = first.read(), second.read()
        want = {at for at in range(0, len(one), 512) if one[at:at + 512] != other[at:at + 512]}
        told = {at for part in diff["disks"][0]["ranges"] for at in range(part["offset_bytes"], part["offset_bytes"] + part["length_bytes"], 512)}
        check_equal(told, want, f"sectors in which {a} and {b} differ")
        for raw in raws:
            os.unlink(raw)
    text = env.vmcp("diff", ids[0], ids[2]).out
    check("pages differ" in text and "disk data  differs" in text, f"in words: {text}")


def make_filesystem(env, name, partitioned):
    """A raw image with ext4 on it, on a partition if asked for: its path and the filesystem's offset."""
    path, offset = env.path(name), (1 << 20) if partitioned else 0
    with open(path, "wb") as file:
        file.truncate(64 << 20)
        if partitioned:
            file.seek(446)
            file.write(struct.pack("<BBBBBBBBII", 0, 0, 0, 0, 0x83, 0, 0, 0, offset // 512, (60 << 20) // 512) + bytes(48) + b"\x55\xaa")
    subprocess.run(["mkfs.ext4", "-q", "-F", "-b", "1024", "-E", f"offset={offset}", path, "60000"], check=True)
    return path, offset


def write_file(path, data):
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def test_diff_of_files(env):
    """Files added, removed, rewritten in place and renamed, of a filesystem that was copied while it was mounted: its journal has what its tables have not."""
    for partitioned in (False, True):
        raw, offset = make_filesystem(env, "fs.raw", partitioned)
        mount = env.path("mnt")
        os.makedirs(mount, exist_ok=True)
        mounted = subprocess.run(["mount", "-o", f"loop,offset={offset},data=ordered", raw, mount], capture_output=True, text=True, check=False)
        if mounted.returncode:
            raise vmcp_test.Skip(f"no ext4 can be mounted here: {mounted.stderr.strip()}")
        try:
            os.makedirs(os.path.join(mount, "etc/deep/er"))
            for name, data in (("etc/same", b"same" * 5000), ("etc/rewritten", b"a" * 70000), ("etc/removed", b"x"), ("etc/deep/er/old", b"old" * 400)):
                write_file(os.path.join(mount, name), data)
            os.sync()
            shutil.copy(raw, env.path("a.raw"))
            with open(os.path.join(mount, "etc/rewritten"), "r+b") as file:
                file.seek(33000)
                file.write(b"B")
                os.fsync(file.fileno())
            os.unlink(os.path.join(mount, "etc/removed"))
            os.rename(os.path.join(mount, "etc/deep/er/old"), os.path.join(mount, "etc/deep/new"))
            write_file(os.path.join(mount, "etc/added"), b"n" * 12345)
            shutil.copy(raw, env.path("b.raw"))
        finally:
            subprocess.run(["umount", mount], check=True)
        if not partitioned:
            plain = subprocess.run(["debugfs", "-R", "stat /etc/added", env.path("b.raw")], capture_output=True, text=True, check=False)
            check("not found" in plain.stderr, f"without its journal the filesystem does not have the file yet: {plain}")
        ids = []
        for name in ("a", "b"):
            config = env.tiny_config(name=f"{name}{int(partitioned)}", memory="16M", cmdline="set=1M rate=10 report=0", disks=[("root", env.path(name + ".raw"))])
            guest = env.spawn_tiny("run", config)
            ids.append(env.vmcp_json("checkpoint", "--live", f"{name}{int(partitioned)}")["id"])
            env.vmcp("kill", f"{name}{int(partitioned)}")
            guest.console.close()
        diff = env.vmcp_json("diff", *ids, "--files")
        prefix = "p1:" if partitioned else ""
        told = {one["path"][len(prefix):]: one["change"] for one in diff["disks"][0]["files"] if one["path"].startswith(prefix)}
        folders = {"/etc", "/etc/deep", "/etc/deep/er"}
        check_equal({path: change for path, change in told.items() if path not in folders},
                    {"/etc/rewritten": "changed", "/etc/removed": "removed", "/etc/deep/er/old": "removed", "/etc/deep/new": "added", "/etc/added": "added"},
                    "files that changed")
        check(folders <= set(told), f"folders that changed: {told}")
        sizes = {one["path"]: one["size_bytes"] for one in diff["disks"][0]["files"]}
        check_equal(sizes[prefix + "/etc/added"], 12345, "the size of a file")
        text = env.vmcp("diff", *ids, "--files").out
        check("added       12K  " + prefix + "/etc/added" in text, f"in words: {text}")
        check_equal(env.vmcp_json("diff", ids[0], ids[0], "--files")["disks"][0]["files"], [], "files of one and the same")


def test_dump_is_read_by_gdb(env):
    """A core file that gdb reads: registers as they were saved, memory below and above the hole byte by byte; refusals leave nothing."""
    guest = env.start_tiny(memory="3328M", cmdline="set=2M rate=1000 report=0")
    one = env.vmcp_json("checkpoint", "--live", "tiny")["id"]
    guest.check()
    core = env.write("core", "an old file")
    result = env.vmcp_json("dump", one, core)
    check_equal((result["cpus"], result["memory_bytes"]), (1, 3328 << 20), "what dump says")
    check(os.stat(core).st_blocks * 512 < 64 << 20, "zero pages are holes")
    memory = store_memory.Memory(env.store, one)
    stored = {page for first, count, layer in memory.extents if layer for page in range(first, first + count)}
    pages = {first + i: data[i * 4096:(i + 1) * 4096] for first, data in memory.runs() for i in range(len(data) // 4096) if first + i in stored}
    memory.close()
    with open(core, "rb") as file:
        elf = file.read(64 + 3 * 56)
        check_equal(elf[:4] + elf[16:20], b"\x7fELF" + bytes([4, 0, 62, 0]), "an ELF core of x86-64")
        loads = [struct.unpack_from("<IIQQQQQQ", elf, 64 + 56 * i) for i in range(1, 3)]
        check_equal([(load[4], load[5]) for load in loads], [(0, 3 << 30), (4 << 30, 256 << 20)], "ranges of physical memory")
        for page, data in pages.items():
            file.seek(loads[0][2] + page * 4096)
            check_equal(file.read(4096), data, f"page {page} of the core")
    for arguments, status in (((one, "-"), 2), ((one, env.dir), 2), ((one, env.path("no/core")), 3)):
        env.vmcp("dump", *arguments, status=status)
    layer = env.vmcp_json("show", one)["memory"]["layer"]
    place = store_memory.read_places(os.path.join(env.store, "layers", layer + ".sums"))[max(pages)]
    with Flipped(os.path.join(env.store, "layers", layer + ".mem"), place * 4096):
        env.vmcp("dump", one, env.path("bad"), status=5)
    check_equal([name for name in os.listdir(env.dir) if name.startswith("bad")], [], "a refused dump leaves nothing")
    if not shutil.which("gdb"):
        raise vmcp_test.Skip("gdb is not installed: the file was read by this test alone")
    page = next(page for page in pages if page * 4096 >= 1 << 20 and any(pages[page][:8]))
    word = struct.unpack_from("<Q", pages[page])[0]
    out = subprocess.run(["gdb", "-batch", "-nx", "-ex", "info registers rip cs", "-ex", f"x/1xg {page * 4096}", env.tiny, core],
                         capture_output=True, text=True, check=True, timeout=60).stdout
    check(re.search(r"^rip +0x10[0-9a-f]{4} ", out, re.M) and re.search(r"^cs +0x", out, re.M), f"registers, at CPL 3 in the guest's code: {out}")
    check(f"0x{word:016x}" in out, f"memory as gdb reads it: {out}")


def test_layers_are_what_their_names_say(env):
    """A raw layer that begins like a qcow2 image, which a guest of QEMU can make it do, is one nowhere; and one of qcow2 that does not begin so any more stands on what it stood on."""
    plain, disk = env.path("plain.raw"), env.image("disk.qcow2")
    with open(plain, "wb") as file:
        file.truncate(1 << 20)
    guest = env.start_tiny(memory="64M", cmdline="set=8M rate=1000 disk=1 disk_blocks=256 report=0", disks=[("data", disk), ("plain", plain)])
    ids, _ = take(env, guest, 3)
    layers = os.path.join(env.store, "layers")
    disks = {name: [{one["name"]: one for one in env.vmcp_json("show", one)["disks"]}[name]["layer"] for one in ids] for name in ("data", "plain")}

    raw = os.path.join(layers, disks["plain"][0] + ".raw")
    header = env.path("header.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", env.path("secret"), "-F", "raw", header, "1M"], check=True)
    with open(header, "rb") as file, open(raw, "r+b") as layer:
        layer.write(file.read())
    with open(env.path("secret"), "wb") as file:
        file.write(b"s" * (1 << 20))
    errors, report = verify(env, status=5)
    check_equal([damage["file"] for damage in report["damages"]], [f"layers/{disks['plain'][0]}.raw"], "what is damaged")
    check("do not match the checksum" in errors[ids[0]][0], f"how: {errors}")
    chain = env.vmcp_json("disk", "info", f"{ids[0]}:plain")["chain"]
    check_equal([(image["format"], image["backing"]) for image in chain], [("raw", None)], "the chain of a raw layer")
    check(env.vmcp_json("disk", "check", f"{ids[0]}:plain")["ok"], "a raw layer has nothing to check")
    env.vmcp("disk", "check", "--second-opinion", f"{ids[0]}:plain", status=1)
    (difference,) = [one for one in env.vmcp_json("diff", ids[0], ids[2])["disks"] if one["name"] == "plain"]
    check_equal(difference["differing_bytes"], 0, "what a raw layer and the overlays on it have different")
    os.truncate(raw, 0)
    os.truncate(raw, 1 << 20)

    env.vmcp("rm", ids[0])
    below = os.path.join(layers, disks["data"][0] + ".qcow2")
    with Flipped(os.path.join(layers, disks["data"][1] + ".qcow2"), 1):
        kept = env.vmcp("gc", status=5)
        check("no disk layer is removed" in kept.err and os.path.exists(below), f"what stands below a damaged layer: {kept}")
        errors, _ = verify(env, status=5)
        check(all(disks["data"][1] in errors[one][0] for one in ids[1:]), f"the damage: {errors}")
    check_equal(verify(env)[0], {one: [] for one in ids[1:]}, "mended again")
    guest.check()


def test_levels_of_durability(env):
    """A checkpoint is seen in log and show before it is durable, as captured and as written; --wait waits for each; --timeout cancels."""
    config = env.tiny_config(memory="64M", cmdline="set=8M rate=1000 report=0")
    for point, level, wait in ((217, "captured", "captured"), (220, "written", "written")):
        guest = env.spawn_tiny("run", config, env={"VMCP_FAULT": f"{point}:2:sleep=4000"})
        env.vmcp_json("checkpoint", "--live", "tiny")
        before = [one["id"] for one in env.vmcp_json("log")["checkpoints"]]
        taken = env.vmcp_json("checkpoint", "--live", "tiny", "--wait", wait)
        check_equal((taken["durability"], taken["durable_ns"]), (level, None), f"what --wait {wait} says")
        seen = {one["id"]: one["durability"] for one in env.vmcp_json("log")["checkpoints"]}
        check_equal(seen, {**{one: "durable" for one in before}, taken["id"]: level}, "levels in the log")
        check_equal(env.vmcp_json("show", taken["id"][:8])["durability"], level, "its level in show")
        check(level in env.vmcp("log").out and level in env.vmcp("show", taken["id"]).out, "in words")
        deadline = time.monotonic() + 60
        while env.vmcp_json("show", taken["id"])["durability"] != "durable" and time.monotonic() < deadline:
            time.sleep(0.1)
        check_equal({one["durability"] for one in env.vmcp_json("log")["checkpoints"]}, {"durable"}, "in the end")
        check_equal(env.vmcp_json("checkpoint", "--live", "tiny", "--wait", "durable", "--timeout", 60)["durability"], "durable", "the next one")
        guest.check()
        env.vmcp("kill", "tiny")
        guest.console.close()
    guest = env.spawn_tiny("run", config, env={"VMCP_FAULT": "217:2:sleep=4000"})
    env.vmcp_json("checkpoint", "--live", "tiny")
    before = env.vmcp_json("log")["checkpoints"]
    late = env.vmcp("checkpoint", "--live", "tiny", "--timeout", 1, status=1)
    check("not done in time" in late.err, f"a late checkpoint: {late}")
    check_equal(env.vmcp_json("log")["checkpoints"], before, "after a late checkpoint")
    check_equal(os.listdir(os.path.join(env.store, "staging")), [], "what a late checkpoint leaves")
    env.vmcp("checkpoint", "tiny", "--timeout", 0, status=2)
    guest.check()
    env.vmcp("checkpoint", "--live", "tiny", "--timeout", 60)
    check_equal({one: [] for one in verify(env)[0]}, verify(env)[0], "all are whole")


# --- flipped bytes ---

KINDS = ("manifest", "state", "index", "mem", "sums", "qcow2", "catalog")


def files_of(env, ids):
    layers = os.path.join(env.store, "layers")
    files = {kind: [os.path.join(env.store, "checkpoints", one, kind) for one in ids] for kind in ("manifest", "state", "index")}
    for kind in ("mem", "sums", "qcow2"):
        files[kind] = sorted(os.path.join(layers, name) for name in os.listdir(layers) if name.endswith("." + kind))
    files["catalog"] = [os.path.join(env.store, "catalog.db")]
    return files


def json_or_none(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError:
        return None


def layer_needs(env, ids):
    """{layer: pages that any of the checkpoints takes from it}."""
    needs = {}
    for one in ids:
        for layer, pages in index_pages(env, one).items():
            needs.setdefault(layer, set()).update(pages)
    return needs


def matters(kind, path, offset, needs, places, manifest):
    """Whether a checkpoint reads otherwise for the flip, by the format's description. None: it may, or may not."""
    layer = os.path.basename(path).split(".")[0]
    if kind == "manifest":
        return json_or_none(path) != manifest
    if kind in ("state", "index", "qcow2"):
        return True
    if kind == "mem":
        return offset // 4096 in {places[layer][page] for page in needs.get(layer, ())}
    if kind == "sums":
        pages = list(places[layer])
        return True if offset < 32 or pages[(offset - 32) // 16] in needs.get(layer, ()) else None
    return None


def try_start(env, one, want):
    """A start from a damaged store refuses, ends with an error, or the guest is what it was."""
    started = env.vmcp("run", "--from", one, "--name", "again", "--detach", status=None)
    check(started.status in (0, 1, 4, 5), f"a start: {started}")
    if started.status != 0:
        check(started.err.startswith("vmcp: "), f"a refusal says why: {started}")
        return "refused"
    guest = env.attach_tiny("again")
    try:
        guest.set("pause", timeout=20)
        got = {key: value for key, value in guest.sum().items() if key in want}
    except Exception:
        # It may say anything before its memory is checked to the end.
        deadline = time.monotonic() + 60
        while (state := next(vm["state"] for vm in env.vmcp_json("ps")["vms"] if vm["name"] == "again")) not in ("crashed", "stopped"):
            check(time.monotonic() < deadline, f"the VM neither answers nor ends: {state}")
            time.sleep(0.05)
        return "ended"
    finally:
        guest.console.close()
        env.vmcp("kill", "again", status=None)
    check_equal(got, want, "what the guest is after a start")
    return "right"


class Catalog:
    """The catalogue as it was, to be put back."""

    def __init__(self, env):
        self.env, self.path = env, os.path.join(env.store, "catalog.db")
        self.log = env.vmcp_json("log")
        with open(self.path, "rb") as file:
            self.bytes = file.read()

    def put_back(self):
        for suffix in ("-wal", "-shm"):
            if os.path.exists(self.path + suffix):
                os.unlink(self.path + suffix)
        with open(self.path, "wb") as file:
            file.write(self.bytes)

    def check_flipped(self, ids, where, thorough):
        """No command crashes; what the log says of checkpoints is right, or verify finds the damage, or it is an error; --rebuild mends it."""
        result = self.env.vmcp("verify", "--json", status=None)
        check(result.status in (0, 1, 5), f"{where}: {result}")
        log = self.env.vmcp("log", "--json", status=None)
        check(log.status in (0, 1, 5), f"{where}: {log}")
        if result.status == 0:
            check_equal(log.json["checkpoints"], self.log["checkpoints"], f"{where}: the log")
        if thorough:
            mended = self.env.vmcp("gc", "--rebuild", status=None)
            # 1: what only the old catalogue knew (VMs, tags, images) may be lost with it, and it says so. Checkpoints are not.
            check(mended.status == 0 or (mended.status == 1 and "could not be read to its end" in mended.err), f"{where}: {mended}")
            check_equal({one["id"] for one in self.env.vmcp_json("log")["checkpoints"]}, set(ids), f"{where}: rebuilt: {mended}")
            check_equal(verify(self.env)[0], {one: [] for one in ids}, f"{where}: rebuilt")
        return result.status != 0


def test_flipped_bytes(env):
    """Bytes flipped at random places of every kind of file: verify finds each that matters, starts refuse or are right, nothing crashes."""
    seed = int(os.environ.get("VMCP_TEST_SEED", "5"))
    total = int(os.environ.get("VMCP_TEST_FLIPS", "350"))
    rng = random.Random(seed)
    disk = env.image("disk.qcow2", "8M")
    guest = env.start_tiny(memory="16M", cmdline="set=2M rate=4000 disk=1 disk_blocks=128 qd=4 report=0", disks=[("data", disk)])
    ids, sums = take(env, guest, 6)
    env.vmcp("tag", ids[2], "second")
    env.vmcp("kill", "tiny")
    files = files_of(env, ids)
    needs = layer_needs(env, ids)
    places = {os.path.basename(path).split(".")[0]: store_memory.read_places(path) for path in files["sums"]}
    check(all(files.values()), f"a kind of file is missing: {files}")
    catalog = Catalog(env)
    counts = {kind: [0, 0, 0] for kind in KINDS}  # flipped, found, of no matter
    starts = {}
    for number in range(total):
        kind = KINDS[number % len(KINDS)]
        path = rng.choice(files[kind])
        offset, mask = rng.randrange(os.path.getsize(path)), rng.randrange(1, 256)
        manifest = json_or_none(path) if kind == "manifest" else None
        with Flipped(path, offset, mask):
            where = f"seed {seed} number {number}: {path} offset {offset} mask {mask:#x}"
            if kind == "catalog":
                found = catalog.check_flipped(ids, where, number % 5 == 0)
                counts[kind][1 if found else 2] += 1
            else:
                must = matters(kind, path, offset, needs, places, manifest)
                result = env.vmcp("verify", *ids, "--json", status=None)
                check(result.status == 5 if must else result.status == 0 if must is False else result.status in (0, 5), f"{where}: {must}: {result}")
                counts[kind][1 if result.status == 5 else 2] += 1
                if number % 25 == 0 and kind != "qcow2":
                    one = rng.choice(ids)
                    got = try_start(env, one, sums[one])
                    starts[got] = starts.get(got, 0) + 1
        counts[kind][0] += 1
        if kind == "catalog":
            catalog.put_back()
    for kind, (flipped, found, harmless) in counts.items():
        print(f"  {kind}: {flipped} flipped, {found} found, {harmless} of no matter")
    print(f"  starts beside damage: {starts}")
    check_equal(set(verify(env, *ids)[0]), set(ids), "mended, all are whole")


if __name__ == "__main__":
    vmcp_test.main(__name__)
