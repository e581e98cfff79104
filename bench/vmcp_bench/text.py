"""The report in words and tables: Markdown whose tables are aligned, so that it reads as plain text too."""

from . import targets
from .figures import label_of, parse_size, significant, size_text, unit_of

# Figures of a table: (heading, figure's name, how). how: "median", "spread" (median, and p95 and max in brackets), "max" or "sum".
TABLES = {
    "checkpoint": [
        ("Pause and gap", "ms; median (p95, max)", [("pause", "pause_ns", "spread"), ("longest gap", "gap_ns", "spread"),
         ("at rest", "gap_at_rest_ns", "spread"), ("to captured", "captured_ns", "median"), ("to durable", "durable_ns", "median"),
         ("taken by the hypervisor", "stolen_ns", "median")]),
        ("Parts of the pause, and pages", "medians, ms", [("quiesce", "quiesce_ns", "median"), ("state", "state_ns", "median"),
         ("memory", "memory_ns", "median"), ("disks", "disks_ns", "median"), ("resume", "resume_ns", "median"),
         ("pages in the pause", "armed_again_pages", "median"), ("pages saved", "saved_pages", "median"), ("disturbed", "disturbed", "sum")]),
        ("Write faults", "medians, ms; longest: the longest of all", [("faults", "cow_faults", "median"), ("p50", "cow_fault_p50_ns", "median"),
         ("p99", "cow_fault_p99_ns", "median"), ("p99.9", "cow_fault_p999_ns", "median"), ("longest", "cow_fault_max_ns", "max")]),
        ("The guest's speed", "page writes a second, medians", [("before", "before_writes_per_s", "median"),
         ("during", "during_writes_per_s", "median"), ("after", "after_writes_per_s", "median"), ("during, %", "speed_share", "median")]),
    ],
    "stalls": [
        ("", "ms; median (p95, max)", [("longest stall", "gap_ns", "spread"), ("over 1 ms", "over_1ms", "median"), ("taken by the hypervisor", "stolen_ns", "spread")]),
    ],
    "arming": [
        ("", "ms; median (p95, max)", [("longest gap ahead of the pause", "gap_ns", "spread"), ("at rest", "gap_at_rest_ns", "spread")]),
    ],
    "nth": [
        ("", "ms; median (p95, max)", [("pause", "pause_ns", "spread"), ("longest gap", "gap_ns", "spread"),
         ("to captured", "captured_ns", "median"), ("to durable", "durable_ns", "median"), ("pages saved", "saved_pages", "median")]),
    ],
    "incremental": [
        ("", "ms; median (p95, max)", [("pause", "pause_ns", "spread"), ("to captured", "captured_ns", "spread"),
         ("to durable", "durable_ns", "spread"), ("pages saved", "saved_pages", "median"), ("reached, a second", "checkpoints_per_s", "median"),
         ("longest gap", "series_gap_ns", "median"), ("guest's speed, %", "speed_share", "median")]),
    ],
    "small": [
        ("", "ms; median (p95, max)", [("durable", "durable_ns", "spread"), ("beyond a plain fsync", "durable_beyond_sync_ns", "spread"),
         ("plain write of the same", "plain_ns", "spread"), ("its fsync", "plain_sync_ns", "spread"), ("pages saved", "saved_pages", "median"),
         ("layer to dirty bytes", "layer_ratio", "median"), ("all to dirty bytes", "io_ratio", "median")]),
    ],
    "disk": [
        ("", "ms; median (p95, max)", [("durable", "durable_ns", "spread"), ("plain O_DIRECT writer", "plain_ns", "spread"),
         ("share, %", "plain_share", "spread"), ("written, MiB", "written_bytes", "median"), ("plain, MiB/s", "plain_bytes_per_s", "median")]),
    ],
    "disk_engine": [
        ("", "median (p95, max)", [("requests a second", "requests_per_s", "spread"), ("MiB/s", "data_bytes_per_s", "spread")]),
    ],
    "disk_io": [
        ("", "median (p95, max)", [("requests a second", "requests_per_s", "spread"), ("MiB/s", "data_bytes_per_s", "spread")]),
    ],
    "net_io": [
        ("", "median (p95, max)", [("round trip, ms", "trip_ns", "spread"), ("its p99", "trip_p99_ns", "median"), ("datagrams a second", "datagrams_per_s", "spread"),
         ("MiB/s", "data_bytes_per_s", "median"), ("arrived, %", "arrived_share", "median")]),
    ],
    "peers": [
        ("", "ms; median (p95, max)", [("longest gap", "gap_ns", "spread"), ("whole save", "durable_ns", "median"),
         ("written, MiB", "written_bytes", "median"), ("writes/s before", "before_writes_per_s", "median"),
         ("during", "during_writes_per_s", "median"), ("after", "after_writes_per_s", "median")]),
    ],
    "floor": [
        ("", "ms; median (p95, max)", [("floor", "floor_ns", "spread"), ("kick", "kick_ns", "spread"), ("state", "ioctls_ns", "spread"),
         ("pause, idle", "pause_ns", "spread"), ("pause command", "noop_pause_ns", "median"), ("resume command", "noop_resume_ns", "median"),
         ("the guest's gap of both", "noop_gap_ns", "median")]),
    ],
    "restore": [
        ("", "ms; median (p95, max)", [("to the first progress", "progress_ns", "spread"), ("the program's version", "program_ns", "median"),
         ("writes/s in the half second after", "first_half_second_writes_per_s", "median")]),
    ],
    "reverts": [
        ("", "ms; median (p95, max)", [("revert", "revert_ns", "spread"), ("as the client sees it", "client_ns", "spread"),
         ("pages put back", "restored_pages", "median"), ("back to back, a second", "back_to_back_per_s", "median"),
         ("pages of these", "back_to_back_pages", "median")]),
    ],
    "depth": [
        ("", "ms; median (p95, max)", [("start", "progress_ns", "spread"), ("revert", "revert_ns", "spread"),
         ("pages put back", "restored_pages", "median")]),
    ],
    "clones": [
        ("", "MiB; median (p95, max)", [("VMs", "vms", "median"), ("Pss", "pss_bytes", "spread"), ("private and dirty", "private_bytes", "spread"), ("private, page cache", "page_cache_bytes", "median"),
         ("the guest wrote", "guest_wrote_bytes", "median"), ("beyond that", "beyond_writes_bytes", "spread"),
         ("free memory fell by", "host_each_bytes", "median")]),
    ],
    "clone_start": [
        ("", "ms; median (p95, max)", [("VMs", "vms", "median"), ("to the first instruction", "first_instruction_ns", "spread")]),
    ],
    "every": [
        ("", "ms; median", [("a second", "checkpoints_per_s", "median"), ("seconds", "seconds", "median"), ("longest gap", "gap_ns", "median"),
         ("gaps over 1 ms", "gaps_over_1ms", "median"), ("guest's speed, %", "speed_share", "median"), ("skipped", "skipped", "median"), ("failed", "failed", "median"), ("layers merged", "merged_layers", "median"), ("kept", "kept", "median"),
         ("store, MiB, at most", "store_bytes", "max")]),
    ],
    "backing": [
        ("Pause and gap", "ms; median (p95, max)", [("pause", "pause_ns", "spread"), ("longest gap", "gap_ns", "spread"), ("at rest", "gap_at_rest_ns", "spread"),
         ("to captured", "captured_ns", "median"), ("to durable", "durable_ns", "median"), ("write faults", "cow_faults", "median")]),
        ("The guest", "page writes a second, medians", [("first fill, MiB/s", "filled_bytes_per_s", "median"), ("before", "before_writes_per_s", "median"),
         ("during", "during_writes_per_s", "median"), ("after", "after_writes_per_s", "median")]),
    ],
    "store": [
        ("Histories of small checkpoints", "ms; median (p95, max)", [("log", "log_ns", "spread"), ("log --json", "log_json_ns", "median"),
         ("log --graph", "graph_ns", "median"), ("the list alone", "list_ns", "median"), ("opening", "open_ns", "median"), ("a commit", "commit_ns", "median"),
         ("removal of one", "remove_ns", "spread"), ("written by it, MiB", "remove_written_bytes", "median")]),
        ("From the page cache", "MiB/s; median (p95, max)", [("verify, one processor", "verify_one_bytes_per_s", "spread"), ("all", "verify_all_bytes_per_s", "spread"),
         ("export", "export_bytes_per_s", "spread"), ("zstd -1 -T0", "zstd_bytes_per_s", "spread"), ("export to zstd", "export_to_zstd", "spread")]),
    ],
    "boot": [
        ("", "ms, MiB; median (p95, max)", [("boot, ms", "boot_ns", "spread"), ("resident beyond the guest, idle", "resident_idle_bytes", "spread"),
         ("after a checkpoint", "resident_after_checkpoint_bytes", "spread")]),
    ],
}


def cell(record, name, how):
    if not record.has(name):
        return ""
    divisor = unit_of(name)[0]
    if how == "sum":
        return significant(sum(record.samples[name]))
    if how == "max":
        return significant(record.figure(name, "max") / divisor)
    if how == "spread" and len(record.samples[name]) > 1:
        return "{} ({}, {})".format(*(significant(record.figure(name, part) / divisor) for part in ("median", "p95", "max")))
    return significant(record.figure(name) / divisor)


def table(header, rows):
    """Aligned; a first row of headings."""
    rows = [[str(one).replace("|", "/") for one in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]
    lines = ["| " + " | ".join(one.ljust(width) for one, width in zip(row, widths)) + " |" for row in [header, *rows]]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def case_cell(key, value):
    return size_text(parse_size(value)) if key == "size" and value else str(value)


def part_tables(results, part):
    records = results.find(part)
    out = []
    keys = list(dict.fromkeys(key for one in records for key in one.case))
    engines = len({one.engine for one in records}) > 1
    for title, units, columns in TABLES[part]:
        columns = [column for column in columns if any(one.has(column[1]) for one in records)]
        some = [one for one in records if any(one.has(column[1]) for column in columns)]
        if not columns or not some:
            continue
        header = (["by"] if engines else []) + keys + ["n"] + [column[0] for column in columns]
        rows = [([one.engine] if engines else []) + [case_cell(key, one.case.get(key, "")) for key in keys] +
                [max(len(one.samples.get(column[1], ())) for column in columns)] + [cell(one, name, how) for _, name, how in columns] for one in some]
        out.append(f"{title + ': ' if title else ''}{units}.\n\n" + table(header, rows))
    return out


def host_line(meta):
    host = meta["host"]
    kind = "software KVM" if host["kvm"] == "kvm_pvm" else "KVM"
    return (f"{host['cpus']} CPUs ({host['cpu']}{', virtual' if host.get('virtual') else ''}), {host['memory_bytes'] / 2 ** 30:.0f} GiB, Linux {host['kernel']}, {kind} "
            f"(`{host['kvm']}`), {host.get('filesystem', '?')}"
            + (f", disk {meta['disk_bytes_per_s'] / 2 ** 20:.0f} MiB/s by a plain O_DIRECT writer" if meta.get("disk_bytes_per_s") else ""))


def target_table(results, engine):
    rows = targets.rows(results, engine)
    return rows, table(["figure", "target", "measured", ""], [[row.figure, row.target, row.measured, row.verdict()] for row in rows])


# What two builds are compared by.
COMPARED = ("pause_ns", "gap_ns", "captured_ns", "durable_ns", "cow_fault_p50_ns", "cow_fault_p99_ns", "speed_share", "progress_ns", "revert_ns", "client_ns",
            "back_to_back_per_s", "beyond_writes_bytes", "first_instruction_ns", "boot_ns", "resident_after_checkpoint_bytes", "requests_per_s", "plain_share", "durable_beyond_sync_ns", "checkpoints_per_s")


def comparison(results, one, other):
    """For each case that both builds have: medians and their ratio. A ratio below 1: `one` takes less than `other`."""
    rows = []
    for record in results.records:
        if record.engine != one:
            continue
        pair = next((found for found in results.records if (found.part, found.engine, found.case) == (record.part, other, record.case)), None)
        for name in COMPARED:
            if pair and record.has(name) and pair.has(name):
                new, old = record.figure(name), pair.figure(name)
                rows.append([record.part, targets.case_text(record), label_of(name),
                             significant(new / unit_of(name)[0]), significant(old / unit_of(name)[0]), f"{new / old:.2f}" if old else ""])
    return table(["part", "case", "figure", one, other, f"{one} / {other}"], rows) if rows else ""


def report(results, parts, plots):
    """The whole text. parts: (name, title); plots: (file, title, part)."""
    meta = results.meta
    engines = [one["label"] for one in meta.get("builds", [{"label": "vmcp"}])]
    lines = [f"{host_line(meta)}. Measured {meta.get('date', '')}, {meta.get('rounds', '?')} samples of each kind unless `n` says otherwise"
             + (f"; QEMU {meta['qemu']} of Debian" if meta.get("qemu") else "") + f". {meta.get('checked_guests', 0)} guests checked all of their memory "
             "at the end of their run and found it whole.", ""]
    lines += [f"    {meta['command']}", ""] if meta.get("command") else []
    if meta.get("rounds", 0) < 20:
        lines += [f"This is a short run: {meta.get('rounds')} samples. The targets are meant for medians of 20 or more; p99 is the maximum here.", ""]
    if meta.get("other_vms"):
        lines += [f"Other VMs ran on this host when it began: {', '.join(meta['other_vms'])}. Do not trust the tails.", ""]
    for engine in engines:
        rows, text = target_table(results, engine)
        met, missed = (sum(row.met is value for row in rows) for value in (True, False))
        lines += [f"### Targets{': ' + engine if len(engines) > 1 else ''}: {met} met, {missed} missed, {len(rows) - met - missed} not measured", "", text, ""]
    if len(engines) > 1:
        lines += ["### Two builds side by side, medians", "", *(f"- {one['label']}: `{one['path']}`, {one['version']}" for one in meta["builds"]), "",
                  comparison(results, engines[0], engines[1]), ""]
    for name, title in parts:
        tables, images = part_tables(results, name), [f"![{caption}]({file})" for file, caption, part in plots if part == name]
        notes = [f"- {one['what'] + ': ' if one['what'] else ''}{one['why']}" + (f" ({one['engine']})" if one["engine"] != "vmcp" else "")
                 for one in results.absent if one["part"] == name]
        notes += [f"- FAILED: {one['why']}" for one in results.failures if one["part"] == name]
        if tables or notes:
            lines += [f"### {title[0].upper()}{title[1:]}", ""]
            for one in tables:
                lines += [one, ""]
            lines += [*notes, ""] if notes else []
            lines += ["\n".join(images), ""] if images else []
    return "\n".join(lines).rstrip() + "\n"
