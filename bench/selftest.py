#!/usr/bin/env python3
"""Tests of the benchmark's pure parts: figures, records, tables, targets, charts. No VM is run. Exit status 0: all is well."""

import json
import os
import tempfile
import unittest
import xml.etree.ElementTree

from vmcp_bench import charts, figures, loads, parts, records, svg, targets, text

MS = 1_000_000
SVG = "{http://www.w3.org/2000/svg}"


class Figures(unittest.TestCase):
    def test_percentile_is_nearest_rank(self):
        values = list(range(1, 101))
        self.assertEqual([figures.percentile(values, percent) for percent in (0, 1, 50, 95, 99, 100)], [1, 1, 50, 95, 99, 100])
        self.assertEqual(figures.percentile([30, 10, 20], 50), 20)
        self.assertEqual(figures.percentile([7], 99), 7)
        self.assertEqual(figures.percentile(list(range(20)), 99), 19)  # the maximum, below 100 samples
        self.assertEqual(figures.percentile(list(range(1, 21)), 95), 19)

    def test_summary(self):
        one = figures.summary([4, 1, 3, 2])
        self.assertEqual((one["n"], one["median"], one["min"], one["max"], one["p95"]), (4, 2.5, 1, 4, 4))

    def test_sizes(self):
        self.assertEqual([figures.parse_size(size) for size in ("256M", "4g", "512K", "7")], [256 << 20, 4 << 30, 512 << 10, 7])
        for wrong in ("", "M", "4 G", "-1M", "0G", "4GB"):
            with self.assertRaises(ValueError):
                figures.parse_size(wrong)
        self.assertEqual([figures.size_text(size) for size in (256 << 20, 1 << 30, 1536 << 20, 4096, 10)], ["256 MiB", "1 GiB", "1536 MiB", "4 KiB", "10 B"])

    def test_significant(self):
        for value, want in ((0, "0"), (0.01234, "0.0123"), (0.9996, "1.00"), (1.2345, "1.23"), (9.996, "10.0"), (12.345, "12.3"), (123.4, "123"), (99.97, "100"),
                            (54321, "54321"), (-0.5, "-0.500"), (0.000012, "0.000012")):
            self.assertEqual(figures.significant(value), want, value)

    def test_units(self):
        self.assertEqual(figures.label_of("durable_beyond_sync_ns"), "durable beyond sync, ms")
        self.assertEqual(figures.label_of("back_to_back_per_s"), "back to back, /s")
        self.assertEqual(figures.label_of("layer_ratio"), "layer ratio")
        self.assertEqual(figures.unit_of("speed_share"), (0.01, "%"))
        self.assertEqual(figures.unit_of("plain_bytes_per_s")[1], "MiB/s")
        self.assertEqual(figures.unit_of("during_writes_per_s")[1], "/s")


class Loads(unittest.TestCase):
    def test_words(self):
        self.assertIn("set=all", loads.words("idle", 8 << 30))
        self.assertIn("set=64M", loads.words("idle", 16 << 30))
        self.assertIn("report=0", loads.words("hot", 1 << 30))
        self.assertEqual(loads.words("set=4K mode=seq", 1 << 30), "set=4K mode=seq report=0")
        self.assertEqual(loads.populated_bytes("hot", 4 << 30), 4 << 30)
        self.assertLess(loads.populated_bytes("idle", 16 << 30), 1 << 30)
        self.assertFalse(loads.writes("idle"))
        self.assertTrue(loads.writes("hot"))


def made_results():
    """Two sizes, two builds, QEMU, and a part that was not possible."""
    results = records.Results({"host": {"cpu": "A & B <CPU>", "cpus": 2, "memory_bytes": 24 << 30, "kernel": "6.18", "kvm": "kvm_pvm", "virtual": True, "filesystem": "ext4"},
                               "rounds": 20, "builds": [{"label": "vmcp", "path": "/x/vmcp", "version": "vmcp 1"}, {"label": "other", "path": "/y", "version": "vmcp 0"}]})
    for engine, factor in (("vmcp", 1), ("other", 2)):
        for size, pause in (("256M", 0.2), ("8G", 0.35)):
            for kind in ("root", "incremental"):
                for number in range(20):
                    results.record("checkpoint", engine, load="hot", size=size, kind=kind).add(
                        pause_ns=pause * factor * MS, gap_ns=(0.5 + number / 100) * factor * MS, gap_at_rest_ns=0.2 * MS, captured_ns=100 * MS, durable_ns=500 * MS,
                        cow_faults=1000, cow_fault_p50_ns=9000, cow_fault_p99_ns=90000, cow_fault_max_ns=200000, before_writes_per_s=1000000,
                        during_writes_per_s=900000, after_writes_per_s=1000000, speed_share=0.9, disturbed=0)
        results.record("reverts", engine, size="1G", pages=256).add(revert_ns=0.8 * factor * MS, client_ns=MS, restored_pages=260)
        results.record("reverts", engine, size="1G", pages=16).add(revert_ns=0.2 * factor * MS, client_ns=0.4 * factor * MS, restored_pages=20, back_to_back_per_s=900, back_to_back_pages=8)
    for way, gap in (("background-snapshot", 40), ("stop+migrate", 400)):
        results.record("peers", "QEMU", load="hot", size="256M", way=way).add(gap_ns=gap * MS, durable_ns=900 * MS, written_bytes=256 << 20, before_writes_per_s=1000000,
                                                                              during_writes_per_s=400000, after_writes_per_s=1000000)
    results.record("floor", "kvm_floor").add(floor_ns=0.15 * MS, kick_ns=0.05 * MS, ioctls_ns=0.1 * MS)
    results.record("floor", "vmcp", size="256M").add(floor_ns=0.2 * MS, pause_ns=0.25 * MS)
    for engine, factor in (("vmcp", 1.2), ("other", 0.5), ("QEMU none", 0.1), ("QEMU writeback", 1)):
        for depth in (1, 32):
            results.record("disk_io", engine, what="4 KiB write", depth=depth, state="new").add(requests_per_s=50000 * factor * depth)
    results.record("disk_io", "vmcp", what="4 KiB write", depth=1, state="copy-up").add(requests_per_s=50000)
    for engine, rate in (("vmcp", 300000), ("other", 400000), ("qemu-img", 240000)):
        results.record("disk_engine", engine, what="4 KiB write", depth=16, state="written").add(requests_per_s=rate)
    results.record("store", "vmcp", what="10000 checkpoints").add(log_ns=60 * MS, list_ns=40 * MS)
    results.record("store", "vmcp", what="1000 checkpoints").add(list_ns=4 * MS, remove_ns=MS, remove_written_bytes=45 << 10)
    results.record("store", "vmcp", what="memory", size="1G").add(verify_one_bytes_per_s=1.5e9, export_bytes_per_s=4e8, zstd_bytes_per_s=5e8, export_to_zstd=0.8)
    for engine, factor in (("vmcp", 1.5), ("other", 0.5), ("QEMU", 1)):
        for backend in ("user", "tap"):
            results.record("net_io", engine, what="round trip, 100 bytes", backend=backend).add(trip_ns=80000 / factor, trip_p99_ns=90000)
            results.record("net_io", engine, what="host to guest", backend=backend).add(data_bytes_per_s=50000 * factor)
    results.lacks("every", "not in this build: 'every': not supported yet | really")
    return results


class Targets(unittest.TestCase):
    def setUp(self):
        self.rows = {row.figure: row for row in targets.rows(made_results())}

    def row(self, words):
        return next(row for figure, row in self.rows.items() if words in figure)

    def test_met(self):
        self.assertIs(self.row("root checkpoint, median").met, True)
        self.assertIs(self.row("longest gap during a whole live checkpoint, median").met, True)
        self.assertIs(self.row("revert in place, 256 pages").met, True)
        self.assertIs(self.row("reverts a second").met, True)  # 1000 / 0.4

    def test_missed(self):
        row = self.row("largest to smallest")
        self.assertIs(row.met, False)
        self.assertIn("1.75", row.measured)
        slow = {row.figure: row for row in targets.rows(made_results(), "other")}
        self.assertIs(next(row for figure, row in slow.items() if "root checkpoint, median" in figure).met, False)

    def test_network(self):
        self.assertIs(self.row("network, round trip").met, True)
        self.assertIn("0.67", self.row("network, round trip").measured)
        self.assertIs(self.row("network, throughput").met, True)
        slow = {row.figure: row for row in targets.rows(made_results(), "other")}
        for words, ratio in (("network, round trip", "2.00"), ("network, throughput", "0.50")):
            row = next(row for figure, row in slow.items() if words in figure)
            self.assertIs(row.met, False)
            self.assertIn(ratio, row.measured)

    def test_floor_without_vmcp_counts_first(self):
        row = self.row("idle VM, to the floor")
        self.assertIs(row.met, True)
        self.assertIn("1.67 x", row.measured)
        self.assertIn("kvm_floor", row.figure)

    def test_worst_case_counts(self):
        results = made_results()
        results.record("checkpoint", "vmcp", load="uniform", size="1G", kind="root").add(pause_ns=3 * MS, gap_ns=MS)
        row = targets.rows(results)[0]
        self.assertIs(row.met, False)
        self.assertIn("3.00 ms (uniform, 1 GiB, root)", row.measured)
        self.assertIn("2 of 3 cases meet it", row.measured)

    def test_idle_guests_are_not_write_heavy(self):
        results = made_results()
        results.record("checkpoint", "vmcp", load="idle", size="16G", kind="root").add(pause_ns=30 * MS, gap_ns=30 * MS)
        self.assertIs(targets.rows(results)[0].met, True)

    def test_what_was_not_measured_says_why(self):
        self.assertIsNone(self.row("every 50 ms").met)
        self.assertIn("not in this build", self.row("every 50 ms").measured)
        self.assertIn("was not run", self.row("50 VMs").measured)
        self.assertTrue(all(row.measured for row in self.rows.values()))

    def test_disks_against_both_of_qemus_caches(self):
        row = self.row("disk, depth 1")
        self.assertIs(row.met, True)
        self.assertIn("1.20 (4 KiB write, depth 1, new; QEMU writeback); 2 of 2", row.measured)
        row = self.row("disk, depth 32")
        self.assertIs(row.met, False)
        self.assertIn("1 of 2 cases meet it", row.measured)
        self.assertIn("1.20 (4 KiB write, depth 1, copy-up); 1 of 1", self.row("first write after").measured)
        self.assertIs(self.row("without a guest, depth 16").met, False)
        self.assertIn("1.25 (4 KiB write, depth 16, written; qemu-img); 0 of 1", self.row("without a guest, depth 16").measured)
        self.assertIs(self.row("first write after").met, True)
        slow = {row.figure: row for row in targets.rows(made_results(), "other")}
        self.assertIs(next(row for figure, row in slow.items() if "disk, depth 1" in figure).met, False)
        self.assertIs(slow["the disk engine without a guest, depth 16: times qemu-img's speed"].met, True)

    def test_the_store(self):
        self.assertEqual([self.row(words).met for words in ("`log` of", "removal of one", "`verify`", "export, to")], [True, True, True, False])
        self.assertIn("45 KiB in 1.00 ms", self.row("removal of one").measured)
        self.assertIn("1.50 GB/s", self.row("`verify`").measured)
        self.assertIn("0.80 x", self.row("export, to").measured)

    def test_nothing_measured(self):
        self.assertTrue(all(row.met is None and row.measured for row in targets.rows(records.Results({}))))

    def test_another_size_proves_nothing(self):
        results = made_results()
        for size, want in (("1G", None), ("4G", True)):
            results.record("disk", "vmcp", load="hot", size=size).add(plain_share=0.9)
            row = next(row for row in targets.rows(results) if "plain O_DIRECT writer" in row.figure)
            self.assertIs(row.met, want)
            self.assertIn("90%", row.measured)

    def test_p999_where_it_is_not_told(self):
        self.assertIs(self.row("fault, p99.9").met, True)  # the longest is below
        self.assertIn("not told", self.row("fault, p99.9").measured)


class Records(unittest.TestCase):
    def test_read_back_and_merge(self):
        with tempfile.TemporaryDirectory() as folder:
            paths = [os.path.join(folder, name) for name in ("a", "b")]
            made_results().write(paths[0])
            newer = records.Results({"rounds": 5})
            newer.record("reverts", "vmcp", size="1G", pages=256).add(revert_ns=7 * MS)
            newer.write(paths[1])
            merged = records.Results.read(paths)
            self.assertEqual(merged.one("reverts", "vmcp", pages=256).samples["revert_ns"], [7 * MS])
            self.assertEqual(merged.meta["rounds"], 5)
            self.assertEqual(merged.one("checkpoint", "vmcp", size="8G").count(), 20)
            with open(paths[0], "w", encoding="utf-8") as file:
                json.dump({"format": "else"}, file)
            with self.assertRaises(ValueError):
                records.Results.read(paths)

    def test_find_leaves_out_what_has_no_samples(self):
        results = records.Results({})
        results.record("depth", "vmcp", depth=1)
        self.assertEqual(results.find("depth"), [])


class Text(unittest.TestCase):
    def test_table_is_aligned(self):
        lines = text.table(["a", "long heading"], [["x|y", 1], ["", "22"]]).splitlines()
        self.assertEqual(len({len(line) for line in lines}), 1)
        self.assertTrue(all(line.count("|") == 3 for line in lines))

    def test_report(self):
        results = made_results()
        written = text.report(results, [(part.NAME, part.TITLE) for part in parts.ALL], [("root_pause.svg", "caption", "checkpoint")])
        for want in ("### Targets: vmcp", "Two builds side by side", "| 0.50 ", "QEMU", "not supported yet", "![caption](root_pause.svg)", "256 MiB", "0.350"):
            self.assertIn(want, written)
        for line in written.splitlines():
            if line.startswith("|"):
                self.assertTrue(line.endswith("|"), line)

    def test_every_part_has_a_table(self):
        self.assertEqual({part.NAME for part in parts.ALL}, set(text.TABLES))
        self.assertTrue({part for _, _, part, _ in charts.ALL} <= set(text.TABLES))


class Charts(unittest.TestCase):
    def parsed(self, written):
        root = xml.etree.ElementTree.fromstring(written)
        self.assertEqual(root.tag, SVG + "svg")
        self.assertNotIn("nan", written)
        width, height = float(root.get("width")), float(root.get("height"))
        for element in root.iter(SVG + "text"):
            self.assertTrue(0 <= float(element.get("x")) <= width and 0 <= float(element.get("y")) <= height, element.text)
        return root

    def texts(self, root):
        return [element.text for element in root.iter(SVG + "text")]

    def test_all_are_well_formed(self):
        results, made = made_results(), 0
        for file, _, _, make in charts.ALL:
            written = make(results)
            if written:
                self.parsed(written)
                made += 1
            self.assertIsNone(make(records.Results({})), file)
        self.assertGreater(made, 5)

    def test_line_chart(self):
        root = self.parsed(svg.line_chart("a < b & c", "size", "ms", [("one & two", [(1, 0.5, 0.4, 0.9), (10, 2, None, None)]), ("flat", [(1, 2, 2, 2)]), ("none", [])],
                                          references=[(0.4, "target <")]))
        for want in ("a < b & c", "one & two", "flat", "target <", "ms", "size"):
            self.assertIn(want, self.texts(root))
        self.assertEqual(len(root.findall(SVG + "polyline")), 2)
        self.assertNotIn("none", self.texts(root))

    def test_values_that_a_logarithm_cannot_show(self):
        self.assertIsNone(svg.line_chart("t", "x", "y", [("a", [(1, 0, 0, 0)])]))
        self.parsed(svg.bar_chart("t", "x", [("g", "a", 0, 0, 0, 0), ("g", "b", 5, 0, 9, 1)]))
        self.parsed(svg.bar_chart("t", "x", [("", "a", 0, 0, 0, 0), ("", "b", -1, None, None, 1)], log=False))

    def test_labels_do_not_overlap(self):
        root = self.parsed(svg.line_chart("t", "x", "y", [(f"series {i}", [(1, 1 + i / 1000, None, None)]) for i in range(10)]))
        heights = sorted(float(element.get("y")) for element in root.iter(SVG + "text") if (element.text or "").startswith("series"))
        self.assertTrue(all(b - a >= 15 for a, b in zip(heights, heights[1:])), heights)

    def test_cdf(self):
        self.parsed(svg.cdf_chart("t", "ms", [("a", [3, 1, 2]), ("b", [1])], references=[(2, "limit")]))

    def test_ticks(self):
        for values, log in (([0.2, 90], True), ([1, 1.1], True), ([0.001, 5000], True), ([0, 3], False), ([1e6], False)):
            scale = svg.Scale(values, 0, 100, log)
            ticks = scale.ticks()
            self.assertTrue(3 <= len(ticks) <= 9, (values, ticks))
            self.assertTrue(all(-0.01 <= scale.place(tick) <= 100.01 for tick in ticks))
        self.assertEqual([svg.tick_text(value) for value in (0, 0.05, 2.0, 1500, 20000)], ["0", "0.05", "2", "1500", "20\u202f000"])


if __name__ == "__main__":
    unittest.main(verbosity=1)
