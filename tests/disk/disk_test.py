#!/usr/bin/env python3
"""The disk engine against QEMU's tools: what they make reads the same here, what we write is clean and the same there.

    disk_test.py TOOL GROUP...      groups: see GROUPS at the end

TOOL is disk_tool. Everything is seeded; a failing case says how to run it again. DISK_TEST_SEED changes the seeds, DISK_TEST_SCALE the amount of work.
"""

import filecmp
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time

TOOL = None
SEED = int(os.environ.get("DISK_TEST_SEED", "1"))
SCALE = float(os.environ.get("DISK_TEST_SCALE", "1"))
KILLED = -9
counts = {"checks": 0, "skipped": 0}


class Failed(Exception):
    pass


class Skip(Exception):
    pass


def check(condition, text):
    counts["checks"] += 1
    if not condition:
        raise Failed(text)


def run(*argv, status=0, env=None, timeout=300):
    process = subprocess.run([str(a) for a in argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                             env=dict(os.environ, **(env or {})), timeout=timeout, check=False)
    text = f"{' '.join(map(str, argv))}: exit {process.returncode}, env {env}\n{process.stdout[-2000:]}{process.stderr[-4000:]}"
    for sign in ("AddressSanitizer", "runtime error:", "LeakSanitizer"):
        check(sign not in process.stderr, f"a sanitizer complained: {text}")
    if status is not None:
        check(process.returncode == status, text)
    return process


def tool(*argv, **kwargs):
    return run(TOOL, *argv, **kwargs)


def qemu_check(image, leaks=False):
    """Clean; with leaks, clusters that are counted and not used are forgiven. Our own checker must agree."""
    process = run("qemu-img", "check", "-f", "qcow2", image, status=None)
    check(process.returncode == 0 or (leaks and process.returncode == 3), f"{image}: {process.stdout}{process.stderr}")
    ours = tool("check", image, status=None)
    check(ours.returncode == 0, f"our check of {image}: {ours.stdout}{ours.stderr}")
    check((" leaks 0 " in ours.stdout) == (process.returncode == 0), f"leaks of {image}: {ours.stdout} {process.stdout}")


def is_qcow2(path):
    with open(path, "rb") as file:
        return file.read(4) == b"QFI\xfb"


def same_content(image, raw):
    """Our reading, and QEMU's, are the raw file."""
    tool("read", image, "ours.raw")
    check(filecmp.cmp("ours.raw", raw, shallow=False), f"{image}: our reading differs from {raw}")
    run("qemu-img", "convert", "-O", "raw", image, "qemu.raw")
    check(filecmp.cmp("qemu.raw", raw, shallow=False), f"{image}: QEMU's reading differs from {raw}")


def same_reading(image):
    tool("read", image, "ours.raw")
    run("qemu-img", "convert", "-O", "raw", image, "qemu.raw")
    check(filecmp.cmp("qemu.raw", "ours.raw", shallow=False), f"{image}: we and QEMU read different things")


def qemu_io(image, *commands, fmt="qcow2"):
    argv = ["qemu-io", "-f", fmt]
    for command in commands:
        argv += ["-c", command]
    process = run(*argv, image)
    check("failed" not in process.stdout, process.stdout)


def create(image, size, options, backing=None, backing_format="qcow2"):
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options]
    if backing:
        argv += ["-b", backing, "-F", backing_format]
    run(*argv, image, str(size))


def stress(image, seed, **options):
    """Runs the random workload and returns the path of the top image in the end."""
    fault = options.pop("fault", None)
    status = options.pop("status", 0)
    pairs = [f"{key}={value}" for key, value in options.items()]
    process = tool("stress", image, f"seed={seed}", *pairs, env={"VMCP_FAULT": fault} if fault else None, status=status)
    for line in process.stdout.splitlines():
        if line.startswith("top "):
            return os.path.relpath(line[4:])
    return None


MIB = 1 << 20
BACKINGS = "backings"
CLUSTERS = [512, 1024, 4096, 16384, 65536, 262144, 2 * MIB]


# Reading what QEMU made.

def matrix_images():
    """(name, function that makes the image) for every combination."""
    for cluster in CLUSTERS:
        size = 6 * MIB + 3 * 512
        for compat in ("0.10", "1.1"):
            options = f"compat={compat},cluster_size={cluster}"
            for backing in ("none", "raw", "odd", "qcow2", "short", "long", "absolute", "mixed", "deep"):
                def plain(options=options, size=size, backing=backing):
                    name = make_backing(backing, size)
                    create("top.qcow2", size, options, name, "raw" if backing in ("raw", "odd") else "qcow2")
                    scribble("top.qcow2", size, options)
                yield f"{options} backing {backing}", plain
            for method in ("zlib", "zstd"):
                if method == "zstd" and compat == "0.10":
                    continue
                def packed(options=options, size=size, method=method):
                    tool("pattern", "base.raw", size, 3)
                    extra = ",compression_type=zstd" if method == "zstd" else ""
                    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options + extra, "base.raw", "top.qcow2")
                    qemu_io("top.qcow2", "write -P 7 70000 30000")
                yield f"{options} compressed {method}", packed
        for bits in (1, 2, 4, 8, 32, 64):
            def widths(cluster=cluster, bits=bits, size=size):
                create("top.qcow2", size, f"compat=1.1,cluster_size={cluster},refcount_bits={bits}")
                scribble("top.qcow2", size, "compat=1.1")
            yield f"cluster {cluster} refcount_bits {bits}", widths
        for preallocation in ("metadata", "falloc"):
            def allocated(cluster=cluster, size=size, preallocation=preallocation):
                create("top.qcow2", size, f"compat=1.1,cluster_size={cluster},preallocation={preallocation}")
                scribble("top.qcow2", size, "compat=1.1")
            yield f"cluster {cluster} preallocation {preallocation}", allocated
        def snapshots(cluster=cluster, size=size):
            create("top.qcow2", size, f"compat=1.1,cluster_size={cluster}")
            scribble("top.qcow2", size, "compat=1.1")
            run("qemu-img", "snapshot", "-c", "one", "top.qcow2")
            qemu_io("top.qcow2", "write -P 9 100000 1000000")
        yield f"cluster {cluster} snapshot", snapshots


backings = {}


def make_backing(kind, size):
    """The name of a backing file, made once for a test's folder, as most of the matrix differs in what is above it. None where there is none."""
    if kind == "none":
        return None
    here = os.getcwd()
    if (here, kind) not in backings:
        os.makedirs(f"{BACKINGS}/{kind}")
        os.chdir(f"{BACKINGS}/{kind}")
        backings[here, kind] = build_backing(kind, size)
        os.chdir(here)
    name = f"{BACKINGS}/{kind}/{backings[here, kind]}"
    return os.path.abspath(name) if kind == "absolute" else name


def build_backing(kind, size):
    length = {"short": size // 2 + 512, "long": size + MIB}.get(kind, size)
    tool("pattern", "base.raw", length, 5)
    if kind == "odd":
        os.truncate("base.raw", length // 2 + 100)  # ends within a sector
    if kind in ("raw", "odd"):
        return "base.raw"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "base.raw", "base.qcow2")
    create("middle.qcow2", length, "compat=1.1,cluster_size=4096", "base.qcow2")
    qemu_io("middle.qcow2", "write -P 3 200000 50000", "write -z 300000 90000")
    name = "middle.qcow2"
    for n in range({"mixed": 3, "deep": 12}.get(kind, 0)):
        options = f"compat={'0.10' if n % 2 else '1.1'},cluster_size={[512, MIB, 65536][n % 3]}"
        create(f"deep{n}.qcow2", length, options, name)
        name = f"deep{n}.qcow2"
        qemu_io(name, f"write -P {n + 20} {n * 300 * 1024} 100000", f"discard {n * 200 * 1024} 64k")
    return name


def scribble(image, size, options):
    rng = random.Random(f"{SEED} {options} {size}")
    commands = []
    for n in range(14):
        offset = rng.randrange(size // 512) * 512
        length = min(rng.choice([512, 4096, 65536, 300 * 1024]), size - offset)
        kind = rng.choice(["write -P %d" % (n + 1), "write -P %d" % (n + 1), "write -z", "write -z -u", "discard"])
        commands.append(f"{kind} {offset} {length}")
    qemu_io(image, *commands)


def test_matrix():
    """Every image is read as QEMU reads it."""
    made = 0
    for name, make in matrix_images():
        fresh(keep=BACKINGS)
        make()
        try:
            same_reading("top.qcow2")
        except Failed as failure:
            raise Failed(f"{name}: {failure}") from failure
        made += 1
    check(made >= 200, f"the matrix has only {made} images")
    print(f"matrix: {made} images")


def test_matrix_written():
    """Every image that QEMU made takes our writes: clean, the same, and the snapshots in it untouched."""
    rng = random.Random(SEED)
    images = list(matrix_images())
    for name, make in rng.sample(images, int(len(images) * min(SCALE, 1) / 2)):
        fresh(keep=BACKINGS)
        make()
        snapshot = "snapshot" in name
        if snapshot:
            run("qemu-img", "convert", "-l", "one", "-O", "raw", "top.qcow2", "one.raw")
        tool("write", "top.qcow2", 512 * 777, 512 * 1001)
        tool("write", "top.qcow2", 512 * 5001, 512 * 3)
        qemu_check("top.qcow2")
        same_reading("top.qcow2")
        with open("ours.raw", "rb") as file:
            file.seek(512 * 777)
            check(file.read(512 * 1001) == b"\x5a" * (512 * 1001), f"{name}: what was written is not there")
        if snapshot:
            run("qemu-img", "convert", "-l", "one", "-O", "raw", "top.qcow2", "one-after.raw")
            check(filecmp.cmp("one.raw", "one-after.raw", shallow=False), f"{name}: the snapshot has changed")


# Our writes.

def stress_case(seed, options, initial=None, **kwargs):
    fresh()
    size = 20 * MIB
    start = {}
    if initial:
        tool("pattern", "initial.raw", size, seed)
        start = {"initial": "initial.raw"}
        if initial == "compressed":
            run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "initial.raw", "a.qcow2")
        elif initial == "snapshot":
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", options, "initial.raw", "a.qcow2")
            run("qemu-img", "snapshot", "-c", "one", "a.qcow2")
        elif initial == "raw":
            shutil.copy("initial.raw", "a.qcow2")
        else:
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "initial.raw", "base.qcow2")
            if initial == "raw-backing":
                create("a.qcow2", size, options, "initial.raw", "raw")
            else:
                create("a.qcow2", size, options, "base.qcow2")
    else:
        create("a.qcow2", size, options)
    top = stress("a.qcow2", seed, layers="./l", expect="expect.raw", **start, **kwargs)
    same_content(top, "expect.raw")
    for image in sorted(os.listdir(".")):
        if image.endswith(".qcow2") and is_qcow2(image):
            qemu_check(image)
    if initial == "snapshot":
        run("qemu-img", "convert", "-l", "one", "-O", "raw", "a.qcow2", "one.raw")
        check(filecmp.cmp("one.raw", "initial.raw", shallow=False), "the snapshot has changed")


def test_stress():
    """Random work, compared sector by sector with what was issued."""
    operations = int(2500 * SCALE)
    shapes = [dict(depth=1), dict(depth=16), dict(depth=200, max_sectors=64), dict(depth=64, switch=300),
              dict(depth=200, switch=100, max_sectors=300), dict(depth=32, threads=1, switch=250), dict(depth=16, flush=3)]
    images = ["compat=1.1", "compat=0.10", "compat=1.1,cluster_size=512", "compat=1.1,cluster_size=2M",
              "compat=1.1,cluster_size=4k,refcount_bits=1", "compat=1.1,cluster_size=512,refcount_bits=64",
              "compat=1.1,preallocation=metadata", "compat=1.1,cluster_size=4k,refcount_bits=8"]
    seed = SEED
    for options in images:
        for shape in shapes:
            seed += 1
            stress_case(seed, options, operations=operations, **shape)
    stress_case(seed, images[0], operations=operations, depth=16, switch=20)  # a hundred layers, each looked through when the next comes
    stress_case(seed, images[2], operations=operations, depth=16, switch=40)
    for n in range(6):
        stress_case(seed + n, images[n], operations=operations, depth=32, switch=60, merge=100)


def test_stress_large():
    """Tables that do not fit the cache, rounds that start by themselves, writers held up by too much dirty metadata."""
    for shape in (dict(depth=64, flush=1000000), dict(depth=64, flush=500, switch=9000)):
        fresh()
        create("a.qcow2", 1 << 30, "compat=1.1,cluster_size=512")
        top = stress("a.qcow2", SEED, layers="./l", expect="expect.raw", operations=int(30000 * SCALE), max_sectors=4096, **shape)
        same_content(top, "expect.raw")
        for image in sorted(f for f in os.listdir(".") if f.endswith(".qcow2")):
            qemu_check(image)


def test_stress_initial():
    """The same on images that already hold data: backing files, compressed clusters, snapshots, raw."""
    operations = int(2500 * SCALE)
    seed = SEED + 1000
    for initial in ("qcow2-backing", "raw-backing", "compressed", "snapshot", "raw"):
        for options in ("compat=1.1", "compat=0.10", "compat=1.1,cluster_size=512", "compat=1.1,cluster_size=4k"):
            for shape in (dict(depth=32), dict(depth=100, switch=200, max_sectors=200)):
                seed += 1
                if "0.10" in options and "backing" in initial:
                    shape["no_discard"] = 1  # version 2 above another image cannot forget anything
                stress_case(seed, options, initial=initial, operations=operations, **shape)


# Merges and exports.

def merge_chain(rng, size):
    """A random chain of n0 (perhaps raw) to nK; returns the names."""
    names = []
    for n in range(rng.randrange(2, 7)):
        length = size if rng.random() < 0.7 else rng.randrange(1, size // 512) * 512
        name = f"n{n}.qcow2"
        if n == 0 and rng.random() < 0.4:
            tool("pattern", name, length, rng.randrange(1000))
        else:
            options = rng.choice(["compat=1.1", "compat=0.10"]) + f",cluster_size={rng.choice(CLUSTERS)}"
            backing = (names[-1], "qcow2" if is_qcow2(names[-1]) else "raw") if n else ()
            create(name, length, options, *backing)
            scribble(name, length, f"{n} {rng.random()}")
        names.append(name)
    return names


def test_merge():
    """Runs of layers become one: every layer above and the run's top read as before, what is below is not touched."""
    for n in range(int(60 * SCALE)):
        rng = random.Random(f"merge {SEED} {n}")
        fresh()
        names = merge_chain(rng, 3 * MIB + 512 * rng.randrange(5))
        top = rng.randrange(1, len(names))
        count = rng.randrange(1, top + 2)
        for index in range(top, len(names)):
            run("qemu-img", "convert", "-O", "raw", names[index], f"before{index}")
        below = {name: open(name, "rb").read() for name in names[:top + 1 - count]}
        tool("merge", names[top], count)
        for name in names[top + 1 - count:top]:
            os.unlink(name)  # nobody needs them
        check(not os.path.exists(names[top] + ".vmcp-merge"), "the temporary file is left")
        for index in range(top, len(names)):
            same_content(names[index], f"before{index}")
            if is_qcow2(names[index]):
                qemu_check(names[index])
        for name, content in below.items():
            check(open(name, "rb").read() == content, f"merge {n} changed {name}")


def test_merge_rules():
    fresh()
    create("a.qcow2", 8 * MIB, "compat=1.1")
    os.mkdir("sub")
    qemu_io("a.qcow2", "write -P 1 0 1M", "write -P 2 4M 1M")
    create("sub/b.qcow2", 8 * MIB, "compat=1.1", "../a.qcow2")
    qemu_io("sub/b.qcow2", "write -P 3 512k 1M", "write -z 4M 64k", "discard 4160k 64k", "write -P 0 2M 128k")
    create("c.qcow2", 8 * MIB, "compat=1.1", "sub/b.qcow2")
    qemu_io("c.qcow2", "write -P 4 6M 64k")
    run("qemu-img", "convert", "-O", "raw", "c.qcow2", "before")
    check("3 layers" in tool("merge", "c.qcow2", 4, status=1).stderr, "more layers than there are")
    tool("merge", "c.qcow2", 0, status=2)
    os.chmod("c.qcow2", 0o600)
    tool("merge", "c.qcow2", 2)  # its base is named as seen from another folder
    check(os.stat("c.qcow2").st_mode & 0o777 == 0o600, "mode of the merged file")
    same_content("c.qcow2", "before")
    check("data 1114112\n" in tool("merge", "c.qcow2", 1).stdout, "not sparse: 1 MiB and 64 KiB were data")
    start = time.monotonic()
    tool("merge", "c.qcow2", 2, MIB)
    check(time.monotonic() - start > 1, "2 MiB at 1 MiB/s took less than a second")
    same_content("c.qcow2", "before")
    run("qemu-img", "snapshot", "-c", "s", "c.qcow2")
    check("snapshots" in tool("merge", "c.qcow2", 1, status=1).stderr, "an image with snapshots was merged")
    create("bits.qcow2", MIB, "compat=1.1")
    run("qemu-img", "bitmap", "--add", "bits.qcow2", "b0")
    check("bitmaps" in tool("merge", "bits.qcow2", 1, status=1).stderr, "an image with a bitmap was merged")
    shutil.copy("before", "d.raw")
    check("only a qcow2" in tool("merge", "d.raw", 1, status=1).stderr, "a raw layer was merged")
    # What a merge that died left is removed; what one that lives writes is not.
    create("e.qcow2", MIB, "compat=1.1")
    tool("merge", "e.qcow2", 1, env={"VMCP_FAULT": "119"}, status=KILLED)
    check(os.path.exists("e.qcow2.vmcp-merge"), "no temporary file")
    with Held("e.qcow2.vmcp-merge"):
        tool("merge", "e.qcow2", 1, status=4)
    tool("merge", "e.qcow2", 1)
    with Held("e.qcow2"):
        tool("merge", "e.qcow2", 1, status=4)


def test_export():
    for n in range(int(24 * SCALE)):
        rng = random.Random(f"export {SEED} {n}")
        fresh()
        top = merge_chain(rng, 3 * MIB + 512 * rng.randrange(5))[-1]
        run("qemu-img", "convert", "-O", "raw", top, "before")
        tool("export", top, "out.qcow2", "qcow2", rng.choice(CLUSTERS))
        qemu_check("out.qcow2")
        same_content("out.qcow2", "before")
        tool("export", top, "out.raw", "raw")
        check(filecmp.cmp("out.raw", "before", shallow=False), "the exported raw file")
        check("exists" in tool("export", top, "out.raw", "raw", status=1).stderr, "overwrote a file")


# Repair and resize.

def test_export_of_holes():
    """A raw file of 8 TiB with little in it, as source, as target, and below an overlay: no time for its holes."""
    fresh()
    places = {0: b"first", (4 << 40) + 512: b"middle", (8 << 40) - 512: b"last"}
    with open("sparse.raw", "wb") as file:
        file.truncate(8 << 40)
        for place, words in places.items():
            file.seek(place)
            file.write(words)
    create("over.qcow2", 8 << 40, "compat=1.1", "sparse.raw", "raw")
    for source, target, form in (("sparse.raw", "a.qcow2", "qcow2"), ("a.qcow2", "b.raw", "raw"), ("over.qcow2", "c.raw", "raw"), ("sparse.raw", "d.raw", "raw")):
        tool("export", source, target, form, timeout=120)
    qemu_check("a.qcow2")
    for name in ("b.raw", "c.raw", "d.raw"):
        check(os.stat(name).st_size == 8 << 40 and os.stat(name).st_blocks < 16 << 10, f"{name}: {os.stat(name)}")
        with open(name, "rb") as file:
            for place, words in places.items():
                file.seek(place)
                check(file.read(6)[:len(words)] == words, f"{name}: what is at {place}")


def entries_of(image, offset, count):
    return [int.from_bytes(image[offset + n * 8:offset + n * 8 + 8], "big") for n in range(count)]


def spoil(name, rng):
    """Wrong reference counts, wrong copied flags, marks in the header; what the tables lead to stays."""
    with open(name, "rb") as file:
        image = bytearray(file.read())
    cluster = 1 << int.from_bytes(image[20:24], "big")
    mask = 0x00fffffffffffe00
    for block in entries_of(image, int.from_bytes(image[48:56], "big"), cluster // 8):
        for _ in range(rng.randrange(6) if 0 < block & mask < len(image) else 0):
            at = (block & mask) + rng.randrange(min(cluster, 64))
            image[at] = rng.choice([0, 0, 1, 2, 255])
        if block & mask and rng.random() < 0.1:
            at = int.from_bytes(image[48:56], "big")
            image[at:at + 8] = bytes(8)
    l1 = int.from_bytes(image[40:48], "big")
    for n, entry in enumerate(entries_of(image, l1, int.from_bytes(image[36:40], "big"))):
        if entry and rng.random() < 0.3:
            image[l1 + n * 8] ^= 0x80
        for _ in range(rng.randrange(5) if entry else 0):
            at = (entry & mask) + rng.randrange(cluster // 8) * 8
            if image[at:at + 8] != bytes(8) and not image[at] & 0x40:
                image[at] ^= 0x80
    if int.from_bytes(image[4:8], "big") == 3:
        image[79] |= rng.choice([0, 1, 2])
    with open(name, "wb") as file:
        file.write(image)


def test_repair():
    """Whatever the counts and flags say, after a repair the image is clean and reads as before, its snapshots too."""
    repaired = 0
    for n in range(int(80 * SCALE)):
        rng = random.Random(f"repair {SEED} {n}")
        fresh()
        cluster = rng.choice([512, 4096, 65536])
        options = rng.choice(["compat=0.10", "compat=1.1", "compat=1.1,refcount_bits=64", "compat=1.1,refcount_bits=8"]) + f",cluster_size={cluster}"
        create("a.qcow2", 2 * MIB + 512, options)
        scribble("a.qcow2", 2 * MIB + 512, f"{n}")
        snapshot = rng.random() < 0.5
        if snapshot:
            run("qemu-img", "snapshot", "-c", "s", "a.qcow2")
            scribble("a.qcow2", 2 * MIB + 512, f"again {n}")
            run("qemu-img", "convert", "-l", "s", "-O", "raw", "a.qcow2", "snap.raw")
        run("qemu-img", "convert", "-O", "raw", "a.qcow2", "before.raw")
        spoil("a.qcow2", rng)
        tool("read", "a.qcow2", "ours.raw")
        check(filecmp.cmp("ours.raw", "before.raw", shallow=False), "the test has spoilt more than counts")
        first = tool("repair", "a.qcow2")
        qemu_check("a.qcow2")
        same_content("a.qcow2", "before.raw")
        if snapshot:
            run("qemu-img", "convert", "-l", "s", "-O", "raw", "a.qcow2", "snap-after.raw")
            check(filecmp.cmp("snap.raw", "snap-after.raw", shallow=False), "the snapshot has changed")
        check("before 0 leaks 0 corruptions" in tool("repair", "a.qcow2").stdout, "repaired twice")
        tool("write", "a.qcow2", 0, 512)
        repaired += "before 0 leaks 0 " not in first.stdout
    check(repaired > 40 * SCALE, "hardly anything was to be repaired")
    # What cannot be followed: nothing is freed, and it is said.
    fresh()
    create("a.qcow2", 2 * MIB, "compat=1.1,cluster_size=512")
    qemu_io("a.qcow2", "write -P 1 0 1M")
    with open("a.qcow2", "r+b") as file:
        header = file.read(64)
        l1 = int.from_bytes(header[40:48], "big")
        file.seek(l1)
        first = file.read(8)
        file.seek(l1)
        file.write((1 << 50).to_bytes(8, "big"))
    check(" 1 corruptions" in tool("repair", "a.qcow2", status=5).stdout.split("after")[1], "more than the one entry is wrong")
    with open("a.qcow2", "r+b") as file:
        file.seek(l1)
        file.write(first)
    check(" corruptions 0" in tool("check", "a.qcow2").stdout, "what the lost table led to was freed")


def test_second_opinion():
    """libqcow agrees, wherever it may be asked."""
    asked = 0
    for n in range(int(40 * SCALE)):
        rng = random.Random(f"opinion {SEED} {n}")
        fresh()
        name = merge_chain(rng, MIB + 512 * rng.randrange(5))[-1]
        process = tool("opinion", name, status=None)
        if "without libqcow" in process.stderr:
            raise Skip("built without libqcow")
        check(process.returncode == 0 or (process.returncode == 1 and "no second opinion" in process.stderr), f"{n}: {process.stdout}{process.stderr}")
        asked += process.returncode == 0 and "compared 0 " not in process.stdout
    check(asked > 3 * SCALE, "libqcow was hardly asked anything")
    tool("pattern", "base.raw", MIB, 3)
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "base.raw", "packed.qcow2")
    check("different 0" in tool("opinion", "packed.qcow2").stdout, "compressed")
    create("zero.qcow2", MIB, "compat=1.1")
    qemu_io("zero.qcow2", "write -P 1 0 512k", "write -z 64k 64k")
    check("compared 983040 skipped 65536 " in tool("opinion", "zero.qcow2").stdout, "zero clusters are compared")


def test_images_of_old():
    """qcow of version 1, and AES: written out by libqcow, and what it cannot read refused; damaged ones are an error at worst."""
    def export(source, *words, status=0):
        if os.path.exists("out.raw"):
            os.unlink("out.raw")
        return vmcp("disk", "export", source, "out.raw", "--format", "raw", *words, status=status)

    tool("pattern", "a.raw", 3 * MIB, SEED)
    with open("a.raw", "r+b") as file:
        file.seek(MIB)
        file.write(bytes(MIB))
    with open("key", "w", encoding="ascii") as file:
        file.write("open sesame\n")
    with open("secret", "w", encoding="ascii") as file:
        file.write("open sesame")
    secret = ("--object", "secret,id=key,file=secret")
    aes = "encrypt.format=aes,encrypt.key-secret=key"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow", "a.raw", "plain.qcow")
    first = export("plain.qcow", status=None)
    if "without libqcow" in first.stderr:
        raise Skip("built without libqcow")
    run("qemu-img", "convert", *secret, "-f", "raw", "-O", "qcow", "-o", aes, "a.raw", "aes.qcow")
    run("qemu-img", "convert", *secret, "-f", "raw", "-O", "qcow2", "-o", "compat=0.10," + aes, "a.raw", "aes2.qcow2")
    run("qemu-img", "convert", *secret, "-f", "raw", "-O", "qcow2", "-o", "compat=1.1," + aes, "a.raw", "aes3.qcow2")
    run("qemu-img", "create", "-f", "qcow", "-b", "a.raw", "-F", "raw", "over.qcow")
    for name in ("plain.qcow", "aes.qcow", "aes2.qcow2"):
        words = ("--key-file", "key") if name.startswith("aes") else ()
        export(name, *words)
        check(filecmp.cmp("out.raw", "a.raw", shallow=False), f"{name} came out otherwise")
        vmcp("disk", "export", name, f"new-{name}.qcow2", *words)
        same_content(f"new-{name}.qcow2", "a.raw")
        qemu_check(f"new-{name}.qcow2")
    for name, words, text in (("aes.qcow", (), "it is encrypted"), ("aes3.qcow2", ("--key-file", "key"), "version 3"), ("over.qcow", (), "backing file"),
                              ("plain.qcow", ("--key-file", "gone"), "--key-file")):
        check(text in export(name, *words, status=1 if text != "--key-file" else None).stderr, f"{name}: {text}")
        check(not os.path.exists("out.raw"), f"{name} left something behind")
    check("qcow image of version 1" in vmcp("disk", "info", "plain.qcow", status=1).stderr, "info")
    rng = random.Random(f"old {SEED}")
    with open("plain.qcow", "rb") as file:
        whole = file.read()
    for n in range(max(4, int(60 * SCALE))):
        damaged = bytearray(whole)
        if n % 4 == 0:
            del damaged[rng.randrange(len(damaged)):]
        else:
            for _ in range(rng.randrange(1, 8)):
                damaged[rng.choice([rng.randrange(48), rng.randrange(len(damaged))])] = rng.randrange(256)
        with open("bad.qcow", "wb") as file:
            file.write(damaged)
        done = export("bad.qcow", status=None)
        check(done.returncode in (0, 1, 5), f"{n}: exit {done.returncode}: {done.stderr}")
        check(done.returncode == 0 or not os.path.exists("out.raw"), f"{n}: something is left behind")


def test_resize():
    for n in range(int(48 * SCALE)):
        rng = random.Random(f"resize {SEED} {n}")
        fresh()
        old = MIB + 512 * rng.randrange(2000)
        new = old + 512 * rng.choice([1, 7, 2000, 40000])
        cluster = rng.choice(CLUSTERS)
        longer = old + 512 * rng.randrange(1, 3000)
        backing = rng.choice([None, "qcow2", "raw"])
        if backing:
            tool("pattern", "base.raw", longer, n)
            run("qemu-img", "convert", "-f", "raw", "-O", backing, "base.raw", "base")
        compat = rng.choice(["0.10", "1.1"])
        create("a.qcow2", old, f"compat={compat},cluster_size={cluster}", *(("base", backing) if backing else ()))
        scribble("a.qcow2", old, f"{n}")
        snapshot = compat == "1.1" and rng.random() < 0.3
        if snapshot:
            run("qemu-img", "snapshot", "-c", "s", "a.qcow2")
            scribble("a.qcow2", old, f"again {n}")
        run("qemu-img", "convert", "-O", "raw", "a.qcow2", "before.raw")
        if rng.random() < 0.5:
            process = tool("resize", "a.qcow2", new, env={"VMCP_FAULT": rng.choice(["122", "123"])}, status=None)
            if process.returncode == KILLED:
                wait_unlocked()
                qemu_check("a.qcow2", leaks=True)
                same_content("a.qcow2", "before.raw")
        tool("resize", "a.qcow2", new)
        os.truncate("before.raw", new)
        same_content("a.qcow2", "before.raw")
        qemu_check("a.qcow2", leaks=True)
        tool("write", "a.qcow2", new - 512, 512)
        qemu_check("a.qcow2", leaks=True)
        check("only grow" in tool("resize", "a.qcow2", old, status=2).stderr, "shrunk")
    tool("pattern", "r.raw", MIB, 1)
    tool("resize", "r.raw", 2 * MIB)
    check(os.path.getsize("r.raw") == 2 * MIB, "raw")
    check("raw size 2097152" in tool("info", "r.raw").stdout, "info")


# vmcp disk.

def vmcp(*argv, status=0):
    program = os.path.join(os.path.dirname(TOOL), "..", "..", "cli", "vmcp")
    if not os.path.exists(program):
        raise Skip("no vmcp beside the tests")
    return run(program, "--store", os.path.abspath("nowhere"), *argv, status=status)


def test_cli():
    fresh()
    create("b.qcow2", 10 * MIB, "compat=1.1")
    qemu_io("b.qcow2", "write -P 1 0 1M")
    create("a.qcow2", 10 * MIB, "compat=1.1", "b.qcow2")
    qemu_io("a.qcow2", "write -P 2 512k 1M")
    run("qemu-img", "convert", "-O", "raw", "a.qcow2", "before")
    chain = json.loads(vmcp("disk", "info", "--json", "a.qcow2").stdout)["chain"]
    check([i["path"] for i in chain] == ["a.qcow2", "b.qcow2"] and chain[0]["size_bytes"] == 10 * MIB, f"info: {chain}")
    check(json.loads(vmcp("disk", "check", "--json", "a.qcow2").stdout)["ok"], "check")
    check(vmcp("disk", "export", "a.qcow2", "x.raw", "--format", "raw").returncode == 0, "export")
    check(filecmp.cmp("x.raw", "before", shallow=False), "the exported file differs")
    vmcp("disk", "export", "a.qcow2", "x.qcow2")
    same_content("x.qcow2", "before")
    vmcp("disk", "export", "a.qcow2", "x.qcow2", status=1)
    with Held("a.qcow2"):
        check("another process" in vmcp("disk", "export", "a.qcow2", "y.qcow2", status=4).stderr, "exported while in use")
    vmcp("disk", "resize", "a.qcow2", "20M")
    vmcp("disk", "resize", "a.qcow2", "2M", status=2)
    os.truncate("before", 20 * MIB)
    same_content("a.qcow2", "before")
    vmcp("disk", "info", "nothere", status=3)
    vmcp("disk", "info", "web:root", status=3)
    vmcp("disk", "polish", "a.qcow2", status=2)
    vmcp("disk", "export", "a.qcow2", status=2)
    with open("b.qcow2", "r+b") as file:
        file.seek(int.from_bytes(open("b.qcow2", "rb").read(64)[48:56], "big"))
        block = int.from_bytes(file.read(8), "big")
        file.seek(block + 2 * 6)
        file.write(bytes(4))
    vmcp("disk", "check", "a.qcow2", status=5)
    check(not json.loads(vmcp("disk", "check", "--json", "a.qcow2", status=5).stdout)["ok"], "damage is ok")
    vmcp("disk", "check", "--repair", "b.qcow2")
    vmcp("disk", "check", "a.qcow2")
    same_content("a.qcow2", "before")


# Crashes and errors.

def wait_unlocked():
    """The kernel closes a killed process's files a little later when io_uring used them."""
    for _ in range(200):
        if run("qemu-img", "info", "a.qcow2", status=None).returncode == 0:
            return
        time.sleep(0.02)


def newest_top():
    """The newest image that is whole; an overlay that was being made may not be one yet."""
    images = ["a.qcow2"] + sorted((f for f in os.listdir(".") if f.startswith("l")), key=lambda f: int(f[1:].split(".")[0]))
    whole = [f for f in images if is_qcow2(f)]
    wait_unlocked()
    for image in whole:
        qemu_check(image, leaks=True)
    return [f for f in whole if not f.endswith(".vmcp-merge")][-1]


FAULTS = range(100, 122)
UNREACHED = {103: "needs autoclear bits: see test_autoclear"}


def sampled(cases, seed):
    """As many of the cases as SCALE says; the first is always among them."""
    rest = cases[1:]
    return cases[:1] + random.Random(SEED + seed).sample(rest, round(len(rest) * min(SCALE, 1)))


def test_kill():
    """kill -9 at each fault point: no corruption, and every flushed write is there."""
    reached = set()
    # The first one grows its table of counts soon.
    shapes = ("compat=1.1,cluster_size=512,refcount_bits=64", "compat=1.1,cluster_size=512", "compat=1.1")
    for fault in FAULTS:
        for count, options in sampled([(count, options) for count in (1, 2, 5, 30) for options in shapes], fault):
            seed = SEED + fault * 100 + count
            fresh()
            create("a.qcow2", 20 * MIB, options)
            process = tool("stress", "a.qcow2", f"seed={seed}", "layers=./l", "journal=journal", "switch=400", "merge=500", "operations=2000",
                           env={"VMCP_FAULT": f"{fault}:{count}"}, status=None)
            if process.returncode != KILLED:
                check(process.returncode == 0, f"fault {fault}:{count} {options}: {process.stdout}{process.stderr}")
                continue
            reached.add(fault)
            top = newest_top()
            same_reading(top)
            verdict = tool("verify", "journal", "ours.raw", status=None)
            check(verdict.returncode == 0, f"fault {fault}:{count} {options} seed {seed}: lost a flushed write: {verdict.stderr}")
    missing = set(FAULTS) - reached - set(UNREACHED)
    check(not missing, f"fault points that no run reached: {sorted(missing)}")


def test_kill_random():
    """kill -9 at random instants."""
    for n in range(int(60 * SCALE)):
        rng = random.Random(SEED * 1000 + n)
        fresh()
        create("a.qcow2", 20 * MIB, rng.choice(["compat=1.1", "compat=1.1,cluster_size=512", "compat=1.1,cluster_size=4k"]))
        process = subprocess.Popen([TOOL, "stress", "a.qcow2", f"seed={n}", "layers=./l", "journal=journal", "switch=300", "merge=700",
                                    "operations=1000000", "flush=20"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=0.05 + rng.random() * 0.4)
        except subprocess.TimeoutExpired:
            pass
        process.kill()
        process.wait()
        if not os.path.exists("journal") or os.path.getsize("journal") < 8192:
            continue
        same_reading(newest_top())
        verdict = tool("verify", "journal", "ours.raw", status=None)
        check(verdict.returncode == 0, f"run {n}: lost a flushed write: {verdict.stderr}")


def test_crash_sim():
    """Power cuts, simulated: unsynced writes dropped, torn, turned around. See crash_sim.c."""
    crashes = stable = joined = 0
    images = ["compat=1.1", "compat=0.10,cluster_size=4k", "compat=1.1,cluster_size=512", "compat=1.1,cluster_size=512,refcount_bits=64",
              "compat=1.1,cluster_size=4k,refcount_bits=1", "compat=1.1,cluster_size=4k,preallocation=metadata"]
    shapes = [["depth=16"], ["depth=32", "switch=50"], ["depth=2"], ["depth=8", "switch=200"], ["depth=2", "pairs=1", "switch=100"]]
    for index, options in enumerate(images):
        for number, shape in sampled(list(enumerate(shapes)), index) + [(len(shapes), ["depth=1", "pairs=1"])]:
            fresh()
            os.mkdir("sim")
            create("a.qcow2", 4 * MIB if "refcount_bits=64" in options else MIB, options)
            seed = SEED * 1000000 + index * 10000 + number * 1000
            process = run(os.path.join(os.path.dirname(TOOL), "disk_crash_sim"), "a.qcow2", "sim", seed, max(1, int(2 * SCALE)), 50, *shape)
            words = process.stdout.split()
            crashes, stable, joined = crashes + int(words[1]), stable + int(words[5]), joined + int(words[7])
            for image in os.listdir("sim/crash"):
                qemu_check(f"sim/crash/{image}", leaks=True)
    check(stable > 0, "no write was made stable by itself")
    check(joined > 0, "no write of metadata took its sync with it")
    print(f"crashes: {crashes}, writes that were stable by themselves: {stable}, that took their sync with them: {joined}")


def test_errors():
    """An error at each fault point fails what it hits; the disk goes on, nothing dangles, nothing flushed is lost."""
    for fault in FAULTS:
        for action, count in sampled([(action, count) for action in ("eio", "enospc") for count in (1, 3, 20)], fault):
            fresh()
            create("a.qcow2", 20 * MIB, "compat=1.1,cluster_size=512" if count == 3 else "compat=1.1")
            process = tool("stress", "a.qcow2", f"seed={SEED + fault}", "layers=./l", "journal=journal", "switch=400", "merge=500", "operations=1500",
                           "tolerate=1", env={"VMCP_FAULT": f"{fault}:{count}:{action}"}, status=None)
            check(process.returncode == 0, f"fault {fault}:{count}:{action}: {process.stdout}{process.stderr}")
            top = newest_top()
            same_reading(top)
            verdict = tool("verify", "journal", "ours.raw", status=None)
            check(verdict.returncode == 0, f"fault {fault}:{count}:{action}: lost a flushed write: {verdict.stderr}")


def test_full():
    """A full file system: writes fail with ENOSPC, the image stays whole."""
    fresh()
    os.mkdir("small")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", "small"], capture_output=True, check=False).returncode:
        raise Skip("no permission to mount a small tmpfs")
    try:
        for cluster in (512, 65536):
            create("small/a.qcow2", 20 * MIB, f"compat=1.1,cluster_size={cluster}")
            process = tool("stress", "small/a.qcow2", f"seed={SEED}", "journal=journal", "operations=3000", "tolerate=1", "no_discard=1")
            errors = int(process.stdout.split("errors ")[1].split()[0])
            check(errors > 0, "the file system was not full")
            qemu_check("small/a.qcow2", leaks=True)
            same_reading("small/a.qcow2")
            check(tool("verify", "journal", "ours.raw", status=None).returncode == 0, "lost a flushed write")
            os.unlink("small/a.qcow2")
    finally:
        subprocess.run(["umount", "small"], check=True)


# Locks, refusals, damage.

class Held:
    """An image that another process of ours has open."""

    def __init__(self, *args):
        self.process = subprocess.Popen([TOOL, "hold", *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self):
        check(self.process.stdout.readline() == b"held\n", "could not open the image to hold it")
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def test_locks():
    fresh()
    create("base.qcow2", MIB, "compat=1.1")
    create("top.qcow2", MIB, "compat=1.1", "base.qcow2")
    create("other.qcow2", MIB, "compat=1.1", "base.qcow2")
    with Held("top.qcow2"):
        for argv in (["qemu-img", "info", "top.qcow2"], ["qemu-io", "-c", "write 0 512", "top.qcow2"], ["qemu-img", "check", "top.qcow2"],
                     ["qemu-io", "-c", "write 0 512", "base.qcow2"]):
            process = run(*argv, status=None)
            check(process.returncode != 0 and "lock" in process.stderr, f"{argv} was not refused: {process.stderr}")
        run("qemu-img", "info", "-U", "top.qcow2")
        run("qemu-img", "info", "base.qcow2")
        check("another process" in tool("open", "top.qcow2", "rw", status=4).stderr, "a second writer")
        tool("open", "top.qcow2", status=4)
        tool("open", "base.qcow2", "rw", status=4)
        tool("open", "base.qcow2")
        tool("open", "other.qcow2", "rw")
        run("qemu-io", "-c", "write 0 512", "other.qcow2")
    with Held("top.qcow2", "ro"):
        run("qemu-img", "info", "top.qcow2")
        tool("open", "top.qcow2")
        tool("open", "top.qcow2", "rw", status=4)
        check(run("qemu-io", "-c", "write 0 512", "top.qcow2", status=None).returncode != 0, "QEMU writes what we read")
    holder = subprocess.Popen(["qemu-io", "top.qcow2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        holder.stdin.write(b"write 0 512\n")
        holder.stdin.flush()
        check(b"wrote" in holder.stdout.readline() + holder.stdout.readline(), "qemu-io did not write")
        tool("open", "top.qcow2", "rw", status=4)
        tool("open", "top.qcow2", status=4)
        tool("open", "base.qcow2", "rw", status=4)
        tool("open", "base.qcow2")
    finally:
        holder.stdin.close()
        holder.wait()
    tool("open", "top.qcow2", "rw")


def patched(offset, data, source="good.qcow2"):
    shutil.copy(source, "bad.qcow2")
    with open("bad.qcow2", "r+b") as file:
        file.seek(offset)
        file.write(data)
    return "bad.qcow2"


def refused(image, word, *mode, status=None, hint=None):
    process = tool("open", image, *mode, status=None)
    check(process.returncode in ([status] if status else [1, 3, 5]), f"{word}: exit {process.returncode}: {process.stderr}")
    check(word in process.stderr, f"'{word}' is not in: {process.stderr}")
    if hint:
        check("hint: " in process.stderr and hint in process.stderr, f"no hint '{hint}': {process.stderr}")


def create_luks(name, *secret):
    """qemu-img measures the processor first, and gives up where the clock of its thread stood still meanwhile: on many virtual hosts each second time."""
    for attempt in range(1, 101):
        made = run("qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10", name, MIB,
                   status=0 if attempt == 100 else None)
        if made.returncode == 0:
            return


def test_refusals():
    """What is not supported, or not safe, is refused with its reason and with what to do."""
    fresh()
    create("good.qcow2", 10 * MIB, "compat=1.1")
    qemu_io("good.qcow2", "write -P 1 0 1M")
    # A hint is a way that works: what `vmcp disk export` cannot read either is not sent there.
    refused(patched(32, (1).to_bytes(4, "big")), "encrypted (AES)", hint="qemu-img convert --object")
    refused(patched(32, (2).to_bytes(4, "big")), "encrypted (LUKS)", hint="qemu-img convert --object")
    refused(patched(32, (3).to_bytes(4, "big")), "encrypted (an unknown method)")
    with open("key", "w", encoding="ascii") as file:
        file.write("abc")
    secret = ["--object", "secret,id=k,file=key"]
    create_luks("luks.qcow2", *secret)
    refused("luks.qcow2", "encrypted (LUKS)", hint="encrypt.key-secret=k,file.filename=SRC -O qcow2 DST")
    run("qemu-img", "convert", *secret, "--image-opts", "driver=qcow2,encrypt.key-secret=k,file.filename=luks.qcow2", "-O", "qcow2", "plain.qcow2")
    tool("open", "plain.qcow2")
    run("qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", "compat=0.10,encrypt.format=aes,encrypt.key-secret=k", "aes.qcow2", MIB)
    refused("aes.qcow2", "encrypted (AES)", hint="vmcp disk export SRC DST --key-file FILE")
    create("outside.qcow2", 10 * MIB, "compat=1.1,data_file=data.raw")
    refused("outside.qcow2", "external data file", hint="hint: write it out anew first: qemu-img convert -O qcow2")
    create("extended.qcow2", 10 * MIB, "compat=1.1,extended_l2=on,cluster_size=64k")
    refused("extended.qcow2", "extended L2", hint="hint: write it out anew first: qemu-img convert -O qcow2")
    refused(patched(72, (1 << 40).to_bytes(8, "big")), "unknown incompatible features 0x10000000000", hint="qemu-img convert")
    for bit, word in ((1, "lazy refcounts"), (2, "corrupt")):
        image = patched(72, bit.to_bytes(8, "big"))
        tool("open", image)
        refused(image, word, "rw", status=5, hint="qemu-img check -r all")
    refused(patched(4, (1).to_bytes(4, "big")), "version 1", hint="vmcp disk export SRC DST")
    refused(patched(20, (8).to_bytes(4, "big")), "cluster_bits")
    refused(patched(20, (22).to_bytes(4, "big")), "cluster_bits")
    refused(patched(24, (1 << 62).to_bytes(8, "big")), "L1 table too small")
    refused(patched(36, (0xffffffff).to_bytes(4, "big")), "L1 table larger than 32 MiB")
    refused(patched(40, (1 << 50).to_bytes(8, "big")), "L1 table outside the file")
    refused(patched(48, (12345).to_bytes(8, "big")), "reference count table outside")
    refused(patched(56, (0x7fffffff).to_bytes(4, "big")), "larger than 8 MiB")
    refused(patched(60, (0x7fffffff).to_bytes(4, "big")), "snapshots")
    refused(patched(96, (7).to_bytes(4, "big")), "refcount_order")
    refused(patched(100, (20).to_bytes(4, "big")), "header_length")
    with open("empty.qcow2", "wb") as file:
        file.write(b"QFI\xfb\0\0\0\3")
    refused("empty.qcow2", "ends within it")
    refused("missing.qcow2", "No such file", status=3)
    refused(".", "neither a file" if os.geteuid() else "")
    os.mkfifo("fifo")
    refused("fifo", "neither a file")


def test_chains():
    """Loops, missing and foreign backing files, links, depth."""
    fresh()
    create("one.qcow2", MIB, "compat=1.1")
    create("two.qcow2", MIB, "compat=1.1", "one.qcow2")
    run("qemu-img", "rebase", "-u", "-b", "two.qcow2", "-F", "qcow2", "one.qcow2")
    refused("two.qcow2", "leads back")
    refused("one.qcow2", "leads back", "rw")
    create("self.qcow2", MIB, "compat=1.1")
    run("qemu-img", "rebase", "-u", "-b", "./self.qcow2", "-F", "qcow2", "self.qcow2")
    refused("self.qcow2", "leads back")
    create("lost.qcow2", MIB, "compat=1.1")
    run("qemu-img", "rebase", "-u", "-b", "nowhere.qcow2", "-F", "qcow2", "lost.qcow2")
    refused("lost.qcow2", "nowhere.qcow2", status=3)
    run("qemu-img", "rebase", "-u", "-b", "nbd://localhost/x", "-F", "raw", "lost.qcow2")
    refused("lost.qcow2", "not a local file")
    run("qemu-img", "rebase", "-u", "-b", "x.vmdk", "-F", "vmdk", "lost.qcow2")
    refused("lost.qcow2", "vmdk")
    # A raw file that begins like qcow2 stays raw where the header says so.
    os.makedirs("sub/deeper")
    shutil.copy("good.qcow2" if os.path.exists("good.qcow2") else "self.qcow2", "sub/disk.raw")
    create("sub/top.qcow2", MIB, "compat=1.1", "disk.raw", "raw")
    same_reading("sub/top.qcow2")
    create("sub/deeper/top.qcow2", MIB, "compat=1.1", "../top.qcow2")
    same_reading("sub/deeper/top.qcow2")
    tool("create", "sub/ours.qcow2", 0, 65536, "deeper/top.qcow2", "qcow2")
    qemu_check("sub/ours.qcow2")
    same_reading("sub/ours.qcow2")
    previous = "c0.qcow2"
    create(previous, MIB, "compat=1.1")
    for n in range(1, 150):
        name = f"c{n}.qcow2"
        tool("create", name, MIB, 65536, previous, "qcow2")
        if n % 10 == 0:
            tool("write", name, n * 4096, 4096)
        previous = name
    same_reading(previous)


def test_autoclear():
    """Opening for writing clears autoclear bits that nobody keeps; opening for reading does not; a crash before it harms nothing."""
    fresh()
    create("a.qcow2", MIB, "compat=1.1")
    run("qemu-img", "bitmap", "--add", "a.qcow2", "b0")

    def autoclear():
        with open("a.qcow2", "rb") as file:
            file.seek(88)
            return int.from_bytes(file.read(8), "big")
    check(autoclear() != 0, "the bitmap set no bit")
    qemu_check("a.qcow2")
    tool("read", "a.qcow2", "x.raw")
    check(autoclear() != 0, "reading cleared it")
    tool("write", "a.qcow2", 0, 4096, env={"VMCP_FAULT": "103"}, status=KILLED)
    check(autoclear() != 0, "cleared before the fault point")
    tool("write", "a.qcow2", 0, 4096)
    check(autoclear() == 0, "writing did not clear it")
    # To QEMU, and to our check, the bitmap is one that nobody has kept: its clusters are leaks, and nothing else is wrong.
    qemu_check("a.qcow2", leaks=True)
    same_reading("a.qcow2")


def test_create():
    """What we create is what qemu-img expects, at all sizes."""
    for cluster in CLUSTERS:
        for size in (0, 512, MIB + 512, 3 << 30, 1 << 40, 8 << 40):
            fresh()
            process = tool("create", "a.qcow2", size, cluster, status=None)
            if process.returncode:
                check("too large" in process.stderr and "larger clusters" in process.stderr, process.stderr)
                check(size // cluster * 8 // (cluster // 8) > 30 * MIB, f"refused {size} at {cluster}: {process.stderr}")
                continue
            qemu_check("a.qcow2")
            check(f"virtual size: " in run("qemu-img", "info", "a.qcow2").stdout, "info")
            if size > MIB:
                tool("write", "a.qcow2", size - 512 * 9, 512 * 9)
                tool("write", "a.qcow2", size // 1024 * 512, min(70000 * 512, size // 4 // 512 * 512))
                qemu_check("a.qcow2")
    fresh()
    tool("create", "a.qcow2", MIB, 65536)
    check("exists" in tool("create", "a.qcow2", MIB, 65536, status=1).stderr, "overwrote an image")
    tool("create", "b.qcow2", MIB, 1000, status=2)
    tool("create", "c.qcow2", MIB, 512, "x" * 600, "raw", status=1)
    check(not os.path.exists("c.qcow2"), "a failed creation left a file")


def test_sizes():
    """The largest disks and the smallest: written at both ends, rotated, and each layer holds its own."""
    for size in (8 << 40, 512, 0):
        for kind in ("qcow2", "small clusters", "raw"):
            fresh()
            if kind == "raw":
                with open("a.img", "wb") as file:
                    file.truncate(size)
            elif kind == "small clusters" and size > MIB:
                continue  # refused: see test_create
            else:
                tool("create", "a.img", size, 512 if kind == "small clusters" else 65536)
            if size > MIB:
                qemu_io("a.img", f"write -q -P 1 {size - 4096} 4096", fmt="raw" if kind == "raw" else "qcow2")
            tool("rotate", "a.img", "b.qcow2")
            tool("rotate", "b.qcow2", "c.qcow2")
            for image, byte in (("a.img", 0x11), ("b.qcow2", 0x11), ("c.qcow2", 0x22)):
                if is_qcow2(image):
                    qemu_check(image)
                fmt = "qcow2" if is_qcow2(image) else "raw"
                if size:
                    qemu_io(image, f"read -P {byte} 0 512", f"read -P {byte} {size - 512} 512", fmt=fmt)
                if size > MIB:
                    qemu_io(image, f"read -P 1 {size - 4096} 3584", f"read -P 0 {size // 2} 64k", fmt=fmt)
                process = run("qemu-img", "info", "--output=json", image)
                check(json.loads(process.stdout)["virtual-size"] == size, f"{size} {kind}: {image}: its size")


def test_damage():
    """Truncated and bit-flipped images: an error or data, never a crash, a hang, or memory without bound."""
    runs = int(2000 * SCALE)
    for n in range(runs):
        rng = random.Random(SEED * 100000 + n)
        if n % 100 == 0:
            fresh()
            cluster = rng.choice([512, 4096, 65536])
            create("base.qcow2", 4 * MIB, "compat=1.1")
            qemu_io("base.qcow2", "write -P 5 0 4M")
            create("good.qcow2", 4 * MIB, f"compat={rng.choice(['1.1', '0.10'])},cluster_size={cluster}", "base.qcow2")
            qemu_io("good.qcow2", "write -P 1 0 300k", "write -P 2 1M 200k", "write -z 2M 500k", "discard 100k 100k")
            if rng.random() < 0.5:
                run("qemu-img", "snapshot", "-c", "s", "good.qcow2")
            if rng.random() < 0.5:
                run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"cluster_size={cluster}", "good.qcow2", "packed.qcow2")
                os.replace("packed.qcow2", "good.qcow2")
            with open("good.qcow2", "rb") as file:
                good = file.read()
            tables = interesting(good)
        data = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            kind = rng.random()
            at = rng.choice(tables) + rng.randrange(64) if kind < 0.7 else rng.randrange(len(data))
            at = min(at, len(data) - 1)
            if rng.random() < 0.5:
                data[at] ^= 1 << rng.randrange(8)
            else:
                data[at] = rng.randrange(256)
        if rng.random() < 0.2:
            data = data[:rng.randrange(len(data))]
        with open("bad.qcow2", "wb") as file:
            file.write(data)
        process = run("bash", "-c", f"ulimit -f 4194304; {LIMIT_MEMORY}exec timeout 60 {TOOL} poke bad.qcow2 {n}", status=None)
        check(process.returncode in (0, 1, 2, 3, 4, 5), f"damage {n}: exit {process.returncode}: {process.stderr[-3000:]}")
        process = run("timeout", "60", TOOL, "check", "bad.qcow2", status=None)
        check(process.returncode in (0, 1, 2, 3, 4, 5), f"damage {n}: check: exit {process.returncode}: {process.stderr[-3000:]}")
    print(f"damage: {runs} images")


LIMIT_MEMORY = ""  # set where no sanitizer reserves address space


def interesting(image):
    """Where the tables are: header, L1, reference counts, L2."""
    cluster = 1 << int.from_bytes(image[20:24], "big")
    l1 = int.from_bytes(image[40:48], "big")
    reftable = int.from_bytes(image[48:56], "big")
    places = [0, 0, 64, l1, reftable]
    for table in (l1, reftable):
        for n in range(4):
            offset = int.from_bytes(image[table + n * 8:table + n * 8 + 8], "big") & 0x00fffffffffffe00
            if offset and offset < len(image):
                places += [offset, offset + min(cluster, 64) // 2]
    return places


def fresh(keep=""):
    for name in os.listdir("."):
        if name == keep:
            continue
        if os.path.isdir(name) and not os.path.islink(name):
            shutil.rmtree(name)
        else:
            os.unlink(name)


GROUPS = {
    "matrix": [test_matrix, test_matrix_written],
    "stress": [test_stress, test_stress_large],
    "initial": [test_stress_initial],
    "merge": [test_merge, test_merge_rules, test_export, test_export_of_holes],
    "repair": [test_repair, test_second_opinion, test_images_of_old, test_resize, test_cli],
    "sim": [test_crash_sim],
    "crash": [test_kill, test_kill_random],
    "errors": [test_errors, test_full],
    "rules": [test_locks, test_refusals, test_chains, test_autoclear, test_create, test_sizes],
    "damage": [test_damage],
}


def main():
    global TOOL, LIMIT_MEMORY
    TOOL = os.path.abspath(sys.argv[1])
    with open(TOOL, "rb") as file:
        program = file.read()
        if b"__asan_init" not in program and b"__tsan_init" not in program:
            LIMIT_MEMORY = "ulimit -v 1048576; "
    failed = passed = 0
    home = os.environ.get("VMCP_TMP") or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    for group in sys.argv[2:]:
        for test in GROUPS[group]:
            folder = tempfile.mkdtemp(prefix="vmcp-disk-", dir=home)
            os.chdir(folder)
            try:
                test()
                passed += 1
                print(f"ok   {test.__name__}", flush=True)
            except Skip as skip:
                counts["skipped"] += 1
                print(f"SKIP {test.__name__}: {skip}", flush=True)
            except (Failed, subprocess.TimeoutExpired) as failure:
                failed += 1
                print(f"FAIL {test.__name__}: {failure}\nits files: {folder}", flush=True)
                continue
            os.chdir("/")
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{passed} passed, {failed} failed, {counts['skipped']} skipped; {counts['checks']} checks")
    return 0 if failed == 0 and passed > 0 and counts["checks"] > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
