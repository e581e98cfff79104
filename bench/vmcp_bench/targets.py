"""The table of targets: what must be reached, what was measured, and whether that is enough. Pure functions of the results."""

from .figures import parse_size, significant, size_text
from .loads import WRITE_HEAVY

MS = 1e6


class Row:
    """met: True, False, or None where nothing can be said; then `measured` says why."""

    def __init__(self, figure, target, measured, met, part):
        self.figure, self.target, self.measured, self.met, self.part = figure, target, measured, met, part

    def verdict(self):
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]


def case_text(record):
    words = []
    for key, value in record.case.items():
        if key == "size":
            words.append(size_text(parse_size(value)))
        elif key == "per_second":
            words.append(f"{value}/s")
        elif key == "rate":
            words.append(f"{value:,} pages/s".replace(",", " "))
        elif key in ("load", "kind", "cache", "way", "what", "state", "backend"):
            words.append(str(value))
        else:
            words.append(f"{key} {value}")
    return ", ".join(words)


def in_ms(value):
    return f"{significant(value / MS)} ms"


def absent(results, part, otherwise="the part was not run"):
    return results.why_absent(part) or otherwise


def worst(results, records, figure, target, name, limit, part, statistic="median", text=in_ms, larger_is_worse=True):
    """One row from several cases: the one farthest from the target counts, and how many of them miss it."""
    found = [(one.figure(name, statistic), one) for one in records if one.has(name)]
    if not found:
        return Row(figure, target, absent(results, part), None, part)
    value, record = (max if larger_is_worse else min)(found, key=lambda pair: pair[0])
    missed = [one for one, _ in found if (one > limit if larger_is_worse else one < limit)]
    best = (min if larger_is_worse else max)(one for one, _ in found)
    measured = f"{text(value)} ({case_text(record)})"
    if len(found) > 1:
        measured += f"; best case {text(best)}; {len(found) - len(missed)} of {len(found)} cases meet it"
    return Row(figure, target, measured, not missed, part)


def at_size(row, records, size):
    """A row that is about guests of one size says nothing for or against where only others were measured."""
    if row.met is not None and not any(parse_size(one.case["size"]) == parse_size(size) for one in records):
        row.met, row.measured = None, f"not at this size; {row.measured}"
    return row


def ratio_row(results, figure, target, small, large, name, limit, part):
    if not small or not large or not small.has(name) or not large.has(name):
        return Row(figure, target, absent(results, part, "one of the two was not measured"), None, part)
    ratio = large.figure(name) / small.figure(name)
    return Row(figure, target, f"{ratio:.2f} ({in_ms(small.figure(name))} and {in_ms(large.figure(name))})", ratio <= limit, part)


def by_size(records):
    return sorted(records, key=lambda one: parse_size(one.case["size"]))


def floor_of(results, engine):
    """The floor of a pause in ns and where it is from, or (None, "")."""
    own = results.one("floor", "kvm_floor")
    if own and own.has("floor_ns"):
        return own.figure("floor_ns"), "bench/kvm_floor"
    ours = by_size(results.find("floor", engine))
    return (ours[0].figure("floor_ns"), "quiesce and state of an idle VM's checkpoint") if ours else (None, "")


def root_rows(results, engine):
    part = "checkpoint"
    records = [one for one in results.find(part, engine, kind="root") if one.case["load"] in WRITE_HEAVY and parse_size(one.case["size"]) <= 8 << 30]
    rows = [worst(results, records, "pause of a root checkpoint, median, 256 MiB to 8 GiB", "< 0.4 ms", "pause_ns", 0.4 * MS, part),
            worst(results, records, "pause of a root checkpoint, p99", "< 1 ms", "pause_ns", MS, part, "p99")]
    ratios = []
    for load in dict.fromkeys(one.case["load"] for one in records):
        some = by_size(one for one in records if one.case["load"] == load)
        if len(some) > 1:
            ratios.append((some[-1].figure("pause_ns") / some[0].figure("pause_ns"), load, some[0].case["size"], some[-1].case["size"]))
    figure, target = "pause of a root checkpoint, largest to smallest guest", "<= 1.5 x"
    if ratios:
        ratio, load, small, large = max(ratios)
        rows.append(Row(figure, target, f"{ratio:.2f} ({large} to {small}, {load})", ratio <= 1.5, part))
    else:
        rows.append(Row(figure, target, absent(results, part, "one size only"), None, part))
    return rows


def incremental_rows(results, engine):
    part = "incremental"
    records = results.find(part, engine)
    rows = [worst(results, records, "pause of an incremental checkpoint, median, 10 and 100 a second", "< 0.3 ms", "pause_ns", 0.3 * MS, part)]
    floor, source = floor_of(results, engine)
    figure, target = "the same, to the floor", "<= 1.3 x"
    if floor and records:
        rows.append(worst(results, records, f"{figure} ({in_ms(floor)}, {source})", target, "pause_ns", 1.3 * floor, part,
                          text=lambda value: f"{value / floor:.2f} x"))
    else:
        rows.append(Row(figure, target, absent(results, part if not records else "floor"), None, part))
    rows.append(worst(results, [one for one in records if one.case["per_second"] == 10], "the guest's speed at 10 a second", ">= 85 %", "speed_share", 0.85,
                      part, text=lambda value: f"{value:.0%}", larger_is_worse=False))
    return rows


def captured_rows(results, engine):
    root = [one for one in results.find("checkpoint", engine, kind="root") if one.case["load"] in WRITE_HEAVY]
    exact = [one for one in root if parse_size(one.case["size"]) == 4 << 30] or by_size(root)[-1:]
    return [at_size(worst(results, exact, "request to captured, root, 4 GiB", "< 150 ms", "captured_ns", 150 * MS, "checkpoint"), exact, "4G"),
            worst(results, results.find("incremental", engine), "request to captured, incremental", "< 20 ms", "captured_ns", 20 * MS, "incremental")]


def stall_text(results):
    """What the host does by itself while its disk is written, to be read beside a gap."""
    own = results.one("stalls", "host", what="plain writer, all processors busy")
    return f" (the host alone, beside a plain writer: {in_ms(own.figure('gap_ns'))})" if own else ""


def gap_rows(results, engine):
    records = [one for one in results.find("checkpoint", engine) if one.case["load"] in WRITE_HEAVY]
    figure = "longest gap during a whole live checkpoint"
    return [worst(results, results.find("arming", engine), "longest gap while arming ahead of the pause", "< 0.3 ms", "gap_ns", 0.3 * MS, "arming"),
            worst(results, records, f"{figure}, median{stall_text(results)}", "< 1 ms", "gap_ns", MS, "checkpoint"),
            worst(results, records, f"{figure}, p99", "< 2 ms", "gap_ns", 2 * MS, "checkpoint", "p99")]


def floor_rows(results, engine):
    figure, target, records = "pause of an idle VM, to the floor", "<= 2 x", results.find("floor", engine)
    floor, source = floor_of(results, engine)
    if not floor or not records:
        return [Row(figure, target, absent(results, "floor"), None, "floor")]
    return [worst(results, records, f"{figure} ({in_ms(floor)}, {source})", target, "pause_ns", 2 * floor, "floor",
                  text=lambda value: f"{value / floor:.2f} x, {in_ms(value)}")]


def fault_rows(results, engine):
    part, us = "checkpoint", (lambda value: f"{significant(value / 1e3)} us")
    records = [one for one in results.find(part, engine) if one.case["load"] in WRITE_HEAVY and one.has("cow_faults") and one.figure("cow_faults") > 0]
    rows = [worst(results, records, "copy-on-write fault, median", "< 40 us", "cow_fault_p50_ns", 40e3, part, text=us)]
    figure, target = "copy-on-write fault, p99.9", "< 300 us"
    if any(one.has("cow_fault_p999_ns") for one in records):
        rows.append(worst(results, records, figure, target, "cow_fault_p999_ns", 300e3, part, text=us))
    elif records:
        p99, longest = (max(one.figure(name) for one in records) for name in ("cow_fault_p99_ns", "cow_fault_max_ns"))
        rows.append(Row(figure, target, f"not told by this build; worst case p99 {us(p99)}, longest {us(longest)}",
                        True if longest < 300e3 else False if p99 > 300e3 else None, part))
    else:
        rows.append(Row(figure, target, absent(results, part), None, part))
    name = next((key for key in ("throttled_faults", "throttled") if any(one.has(key) for one in records)), None)
    figure, target = "copy-on-write faults that waited for storage", "none"
    if name:
        count = sum(sum(one.samples[name]) for one in records if one.has(name))
        rows.append(Row(figure, target, f"{count} in all", count == 0, part))
    else:
        rows.append(Row(figure, target, absent(results, part, "not told by this build"), None, part))
    return rows


def disk_rows(results, engine):
    small, full = results.one("small", engine), results.find("disk", engine)
    rows = [at_size(worst(results, full, "time to durable, 4 GiB, full: share of a plain O_DIRECT writer", ">= 65 %", "plain_share", 0.65,
                          "disk", text=lambda value: f"{value:.0%}", larger_is_worse=False), full, "4G"),
            at_size(worst(results, [small] if small else [], "incremental, 1000 pages of 4 GiB: durable, beyond a plain writer's fsync", "< 20 ms",
                          "durable_beyond_sync_ns", 20 * MS, "small"), [small], "4G")]
    figure, target = "the same: bytes written", "<= 1.1 x the dirty bytes"
    if small:
        ratio = small.figure("layer_ratio")
        everything = f"; with metadata and catalogue {small.figure('io_ratio'):.2f} x" if small.has("io_ratio") else ""
        rows.append(Row(figure, target, f"{ratio:.2f} x in the layer{everything} ({small.figure('saved_pages'):.0f} pages)", ratio <= 1.1, "small"))
    else:
        rows.append(Row(figure, target, absent(results, "small"), None, "small"))
    return rows


def to_qemu_row(results, engine, part, figure, name, limit, counts=lambda case: True, smaller_is_better=False):
    """A figure as a multiple of QEMU's: the worst of the cases that count."""
    target, found = f"{'<=' if smaller_is_better else '>='} {limit} x", []
    for one in results.find(part, engine):
        for peer in results.find(part, **one.case):
            if peer.engine.lower().startswith("qemu") and counts(one.case) and one.has(name) and peer.has(name):
                found.append((one.figure(name) / peer.figure(name), one, peer))
    if not found:
        return Row(figure, target, absent(results, part), None, part)
    ratio, one, peer = (max if smaller_is_better else min)(found, key=lambda item: item[0])
    met = sum(item[0] <= limit if smaller_is_better else item[0] >= limit for item in found)
    return Row(figure, target, f"{ratio:.2f} ({case_text(one)}; {peer.engine}); {met} of {len(found)} cases meet it", met == len(found), part)


def disk_speed_row(results, engine, part, figure, limit, depths):
    return to_qemu_row(results, engine, part, figure, "requests_per_s", limit, lambda case: case["depth"] in depths)


def network_rows(results, engine):
    return [to_qemu_row(results, engine, "net_io", "the guest's network, round trip: times QEMU's", "trip_ns", 1.0, smaller_is_better=True),
            to_qemu_row(results, engine, "net_io", "the guest's network, throughput: times QEMU's", "data_bytes_per_s", 1.0)]


def first_write_row(results, engine, part, where):
    """Copying up against allocating, by time: the worst case."""
    pairs = [(new.figure("requests_per_s") / one.figure("requests_per_s"), one) for one in results.find(part, engine, state="copy-up")
             for new in results.find(part, engine, **{**one.case, "state": "new"})]
    figure, target = f"first write after a checkpoint, to an allocating one{where}", "<= 1.5 x"
    if not pairs:
        return Row(figure, target, absent(results, part), None, part)
    ratio, one = max(pairs, key=lambda pair: pair[0])
    met = sum(item[0] <= 1.5 for item in pairs)
    return Row(figure, target, f"{ratio:.2f} ({case_text(one)}); {met} of {len(pairs)} cases meet it", met == len(pairs), part)


def guest_disk_rows(results, engine):
    return [disk_speed_row(results, engine, "disk_io", "the guest's disk, depth 1, and in sequence: times QEMU's speed", 1.0, (1, 4)),
            disk_speed_row(results, engine, "disk_io", "the guest's disk, depth 32: times QEMU's speed", 1.3, (32,)),
            first_write_row(results, engine, "disk_io", ""),
            disk_speed_row(results, engine, "disk_engine", "the disk engine without a guest, depth 16: times qemu-img's speed", 1.5, (16,)),
            first_write_row(results, engine, "disk_engine", ", without a guest")]


def revert_rows(results, engine):
    middle, few = (results.one("reverts", engine, pages=pages) for pages in (256, 16))
    rows = [worst(results, [middle] if middle else [], "revert in place, 256 pages", "< 1 ms", "revert_ns", MS, "reverts")]
    figure, target = "reverts a second, 16 pages", "> 1000"
    if few:
        rate, pages = few.figure("back_to_back_per_s"), few.figure("back_to_back_pages")
        waiting = 1e9 / few.figure("client_ns")
        rows.append(Row(figure, target, f"{waiting:.0f} by the time of each ({few.figure('restored_pages'):.0f} pages), {rate:.0f} back to back "
                        f"({pages:.0f} pages)", waiting > 1000, "reverts"))
    else:
        rows.append(Row(figure, target, absent(results, "reverts"), None, "reverts"))
    return rows


def start_rows(results, engine):
    part, rows = "restore", []
    records = by_size(results.find(part, engine, cache="warm"))
    exact = [one for one in results.find(part, engine) if parse_size(one.case["size"]) == 4 << 30] or [one for one in results.find(part, engine)][-2:]
    for state in ("warm", "cold"):
        some = [one for one in exact if one.case["cache"] == state]
        rows.append(at_size(worst(results, some, f"start from 4 GiB to the first guest progress, {state} page cache", "< 15 ms", "progress_ns", 15 * MS, part),
                            some, "4G"))
    rows.append(ratio_row(results, "the same, largest to smallest guest (independent of size: 1.5 x is taken as that)", "<= 1.5 x", records[0] if records else None,
                          records[-1] if len(records) > 1 else None, "progress_ns", 1.5, part))
    one = results.one("clones", engine)
    figure, target = "50 VMs from one 512 MiB checkpoint: each, beyond the pages it wrote", "< 6 MiB"
    if one:
        value, count = one.figure("beyond_writes_bytes", "max"), one.figure("vms")
        rows.append(Row(figure, target, f"{value / 2 ** 20:.1f} MiB at most ({count:.0f} VMs; the host's free memory fell by "
                        f"{one.figure('host_each_bytes') / 2 ** 20:.1f} MiB each)", value < 6 << 20 and count >= 50, "clones"))
    else:
        rows.append(Row(figure, target, absent(results, "clones"), None, "clones"))
    for guests in ("sleeping", "never idle"):
        rows.append(worst(results, results.find("clone_start", engine, guests=guests), f"clones by one command, guests that are {guests}: start of the process to the first "
                          "instruction, p95", "< 15 ms", "first_instruction_ns", 15 * MS, "clone_start", "p95"))
    deep = sorted(results.find("depth", engine), key=lambda record: record.case["depth"])
    for name, what in (("progress_ns", "start"), ("revert_ns", "revert")):
        depth = deep[-1].case["depth"] if deep else 100
        rows.append(ratio_row(results, f"tree depth {depth}: {what} against depth 1", "<= 1.3 x", deep[0] if deep else None,
                              deep[-1] if len(deep) > 1 else None, name, 1.3, "depth"))
    return rows


def other_rows(results, engine):
    boot, rows = results.one("boot", engine), []
    rows.append(worst(results, results.find("boot", engine), "boot to the first guest instruction, 512 MiB", "< 20 ms", "boot_ns", 20 * MS, "boot"))
    figure, target = "resident beyond guest memory", "< 10 MiB"
    if boot and boot.has("resident_after_checkpoint_bytes"):
        value = boot.figure("resident_after_checkpoint_bytes", "max")
        rows.append(Row(figure, target, f"{value / 2 ** 20:.1f} MiB after a checkpoint", value < 10 << 20, "boot"))
    else:
        rows.append(Row(figure, target, absent(results, "boot"), None, "boot"))
    one, figure, target = results.one("every", engine), "every 50 ms, 1000 pages each", "20 a second, store bounded"
    if one:
        rate, growth = one.figure("checkpoints_per_s"), one.figure("store_growth_bytes")
        largest = one.figure("store_bytes", "max")
        rows.append(Row(figure, target, f"{rate:.1f} a second for {one.figure('seconds'):.0f} s; store at most {largest / 2 ** 20:.0f} MiB, in the second half "
                        f"{growth / 2 ** 20:+.0f} MiB", rate >= 19 and growth < largest * 0.1, "every"))
    else:
        rows.append(Row(figure, target, absent(results, "every"), None, "every"))
    return rows


def store_rows(results, engine):
    part = "store"
    out = [worst(results, results.find(part, engine, what="10000 checkpoints"), "`log` of 10,000 checkpoints", "< 100 ms", "log_ns", 100 * MS, part)]
    removal = results.one(part, engine, what="1000 checkpoints")
    figure, target = "removal of one of 1,000 checkpoints: written", "< 256 KiB"
    if removal:
        written = removal.figure("remove_written_bytes", "max")
        out.append(Row(figure, target, f"{written / 1024:.0f} KiB in {in_ms(removal.figure('remove_ns'))}", written < 256 << 10, part))
    else:
        out.append(Row(figure, target, absent(results, part), None, part))
    reading = results.find(part, engine)
    out.append(worst(results, reading, "`verify` from the page cache, one processor", "> 1 GB/s", "verify_one_bytes_per_s", 1e9, part,
                     text=lambda value: f"{value / 1e9:.2f} GB/s", larger_is_worse=False))
    out.append(worst(results, reading, "export, to the speed of `zstd -1` on all processors", ">= 1 x", "export_to_zstd", 1, part, text=lambda value: f"{value:.2f} x",
                     larger_is_worse=False))
    return out


def rows(results, engine="vmcp"):
    out = []
    for make in (root_rows, incremental_rows, captured_rows, gap_rows, floor_rows, fault_rows, disk_rows, guest_disk_rows, network_rows, revert_rows, start_rows, other_rows, store_rows):
        out += make(results, engine)
    return out
