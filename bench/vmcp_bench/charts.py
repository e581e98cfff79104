"""The report's plots: which figures, of which records. Each function returns SVG text, or None where there is nothing to show."""

from .figures import parse_size, size_text
from .svg import bar_chart, cdf_chart, line_chart

MS = 1e6
MEDIAN_P95 = "medians; thin line: smallest to p95"


def point(record, x, name, divisor=MS):
    return (x, record.figure(name) / divisor, record.figure(name, "min") / divisor, record.figure(name, "p95") / divisor)


def sizes_axis(records):
    sizes = sorted({parse_size(one.case["size"]) for one in records})
    return [(size, size_text(size)) for size in sizes]


def by_size(results, part, name, key, title, y_label, references=(), text=str, **case):
    """A line for each value of the case's `key`, over the size of the guest."""
    records = [one for one in results.find(part, **case) if one.has(name)]
    series = []
    engines = len({one.engine for one in records}) > 1
    for engine, value in dict.fromkeys((one.engine, one.case.get(key)) for one in records):
        some = sorted((one for one in records if (one.engine, one.case.get(key)) == (engine, value)), key=lambda one: parse_size(one.case["size"]))
        series.append((f"{engine + ' ' if engines else ''}{text(value)}", [point(one, parse_size(one.case["size"]), name) for one in some]))
    return line_chart(title, "guest memory", y_label, series, subtitle=MEDIAN_P95, x_ticks=sizes_axis(records), references=references)


def peers_gap(results):
    """Of the largest size that QEMU was measured at in full, for each load."""
    rows, colours = [], {}
    records = results.find("peers")
    for load in dict.fromkeys(one.case["load"] for one in records):
        some = [one for one in records if one.case["load"] == load]
        size = min((one.case["size"] for one in some), key=parse_size)
        for one in (one for one in some if one.case["size"] == size):
            name = f"{one.engine} {one.case['way']}"
            colour = colours.setdefault(name, len(colours))
            rows.append((f"{load}, {size_text(parse_size(size))}", name, *(one.figure("gap_ns", part) / MS for part in ("median", "min", "p95")), colour))
    return bar_chart("Longest gap that the guest sees while it is saved", "ms, logarithmic", rows, subtitle="medians; whisker: smallest to p95",
                     references=[(1, "target 1 ms")])


def peers_speed(results):
    rows = []
    records = [one for one in results.find("peers") if one.has("during_writes_per_s")]
    load = next((one.case["load"] for one in records if one.case["load"] == "hot"), records[0].case["load"] if records else None)
    some = [one for one in records if one.case["load"] == load]
    size = min((one.case["size"] for one in some), key=parse_size, default=None)
    for one in (one for one in some if one.case["size"] == size):
        for colour, when in enumerate(("before", "during", "after")):
            rows.append((f"{one.engine} {one.case['way']}", when, one.figure(f"{when}_writes_per_s") / 1000, None, None, colour))
    title = f"The guest's speed around a save ({load}, {size_text(parse_size(size))})" if rows else ""
    return bar_chart(title, "thousand page writes a second", rows, subtitle="medians", log=False)


def peers_durable(results):
    return by_size(results, "peers", "durable_ns", "way", "Request to the end of the save, hot", "ms, logarithmic", load="hot")


def gap_cdf(results):
    """Every sample of the write-heavy load at the largest size, with and without a checkpoint, and QEMU's best."""
    records = [one for one in results.find("checkpoint", load="hot") if parse_size(one.case["size"]) <= 8 << 30]
    records = sorted(records, key=lambda one: parse_size(one.case["size"]))
    if not records:
        return None
    series = []
    for one in dict.fromkeys((records[0], records[-1])):
        size = size_text(parse_size(one.case["size"]))
        for other in (other for other in records if other.case["size"] == one.case["size"]):
            series.append((f"{other.engine}, {size} {other.case['kind']}", [value / MS for value in other.samples["gap_ns"]]))
    series.append((f"at rest, {size}", [value / MS for value in records[-1].samples["gap_at_rest_ns"]]))
    qemu = results.find("peers", "QEMU", load="hot", way="background-snapshot")
    if qemu:
        series.append((f"QEMU background-snapshot, {size_text(parse_size(qemu[0].case['size']))}", [value / MS for value in qemu[0].samples["gap_ns"]]))
    return cdf_chart("Longest gap in each checkpoint of a write-heavy guest", "ms, logarithmic", series, subtitle="hot: full speed, hot set of 16 MiB",
                     references=[(1, "median < 1"), (2, "p99 < 2")])


def fault_tail(results):
    rows = []
    records = [one for one in results.find("checkpoint", kind="root") if one.has("cow_faults") and one.figure("cow_faults") > 0]
    ends = {load: sorted((one for one in records if one.case["load"] == load), key=lambda one: parse_size(one.case["size"]))
            for load in dict.fromkeys(one.case["load"] for one in records)}
    for load, some in ends.items():  # the smallest and the largest guest of each load
        for one in [one for one in some if one.case["size"] in (some[0].case["size"], some[-1].case["size"])]:
            for colour, (label, name) in enumerate((("p50", "cow_fault_p50_ns"), ("p99", "cow_fault_p99_ns"), ("p99.9", "cow_fault_p999_ns"), ("longest", "cow_fault_max_ns"))):
                if one.has(name):
                    rows.append((f"{load}, {size_text(parse_size(one.case['size']))}", label, one.figure(name) / 1000, None, None, colour))
    return bar_chart("Copy-on-write faults of root checkpoints", "microseconds, logarithmic", rows, subtitle="medians over the checkpoints of each one's figure",
                     references=[(40, "p50 < 40"), (300, "p99.9 < 300")])


def incremental_pause(results):
    records = results.find("incremental")
    series = []
    engines = len({one.engine for one in records}) > 1
    for engine, size, hz in dict.fromkeys((one.engine, one.case["size"], one.case["per_second"]) for one in records):
        some = results.find("incremental", engine, size=size, per_second=hz)
        series.append((f"{engine + ' ' if engines else ''}{size_text(parse_size(size))}, {hz} a second", [point(one, one.case["rate"], "pause_ns") for one in some]))
    return line_chart("Pause of incremental checkpoints", "pages written a second by the guest", "ms, logarithmic", series, subtitle=MEDIAN_P95,
                      x_ticks=[(rate, f"{rate:,}".replace(",", "\u202f")) for rate in sorted({one.case["rate"] for one in records})], references=[(0.3, "target 0.3 ms")])


def nth(results):
    records = results.find("nth")
    if not records:
        return None
    series = []
    for name, figure in (("longest gap", "gap_ns"), ("pause", "pause_ns"), ("to durable", "durable_ns")):
        for engine in dict.fromkeys(one.engine for one in records):
            some = results.find("nth", engine)
            series.append((f"{engine + ' ' if len({one.engine for one in records}) > 1 else ''}{name}", [point(one, one.case["nth"], figure) for one in some]))
    return line_chart("The first ten checkpoints of a VM", "number of the checkpoint", "ms, logarithmic", series, subtitle=MEDIAN_P95, x_log=False,
                      x_ticks=[(number, str(number)) for number in sorted({one.case["nth"] for one in records})])


def disk(results):
    rows = []
    for one in results.find("disk"):
        group = f"{one.case['load']}, {size_text(parse_size(one.case['size']))}"
        rows.append((group, f"{one.engine} checkpoint", *(one.figure("durable_ns", part) / MS for part in ("median", "min", "p95")), 0))
        rows.append((group, "plain O_DIRECT writer", *(one.figure("plain_ns", part) / MS for part in ("median", "min", "p95")), 1))
    return bar_chart("Full checkpoint to durable, and a plain writer of the same bytes", "ms", rows, subtitle="medians; whisker: smallest to p95", log=False)


def restore(results):
    return by_size(results, "restore", "progress_ns", "cache", "Start of the process to the first guest progress", "ms, logarithmic",
                   references=[(15, "target 15 ms")], text=lambda value: f"{value} cache")


def reverts(results):
    records = results.find("reverts")
    series = [(engine, [point(one, one.case["pages"], "revert_ns") for one in results.find("reverts", engine)])
              for engine in dict.fromkeys(one.engine for one in records)]
    return line_chart("Reverts in place", "pages written since the checkpoint", "ms, logarithmic", series, subtitle=MEDIAN_P95,
                      x_ticks=[(pages, str(pages)) for pages in sorted({one.case["pages"] for one in records})], references=[(1, "target 1 ms at 256 pages")])


def clones(results):
    rows = []
    for one in results.find("clones"):
        for label, name, colour in (("private memory", "private_bytes", 0), ("of it written by the guest", "guest_wrote_bytes", 2), ("beyond that", "beyond_writes_bytes", 1)):
            rows.append((f"{one.engine}, {one.figure('vms'):.0f} VMs", label, *(one.figure(name, part) / 2 ** 20 for part in ("median", "min", "p95")), colour))
    return bar_chart("Memory of each VM of one checkpoint of 512 MiB", "MiB", rows, subtitle="medians; whisker: smallest to p95", log=False,
                     references=[(6, "target: 6 MiB beyond")])


# (file, caption, part, what makes it)
ALL = (
    ("root_pause.svg", "Pause of a root checkpoint by size", "checkpoint",
     lambda results: by_size(results, "checkpoint", "pause_ns", "load", "Pause of a root checkpoint", "ms, logarithmic", [(0.4, "target 0.4 ms")], kind="root")),
    ("gap_cdf.svg", "Longest gap, every sample", "checkpoint", gap_cdf),
    ("fault_tail.svg", "Fault latency", "checkpoint", fault_tail),
    ("root_durable.svg", "Time to durable by size", "checkpoint",
     lambda results: by_size(results, "checkpoint", "durable_ns", "load", "Root checkpoint, request to durable", "ms, logarithmic", kind="root")),
    ("nth.svg", "First to tenth checkpoint", "nth", nth),
    ("incremental_pause.svg", "Pause of incremental checkpoints", "incremental", incremental_pause),
    ("disk.svg", "Time to durable against a plain writer", "disk", disk),
    ("peers_gap.svg", "Longest gap, vmcp and QEMU", "peers", peers_gap),
    ("peers_speed.svg", "Guest speed before, during and after", "peers", peers_speed),
    ("peers_durable.svg", "Whole save, vmcp and QEMU", "peers", peers_durable),
    ("restore.svg", "Start to first progress", "restore", restore),
    ("reverts.svg", "Reverts in place", "reverts", reverts),
    ("clones.svg", "Memory per clone", "clones", clones),
)
