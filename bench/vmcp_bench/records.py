"""What was measured. Everything that the report says is made from this, and nothing else; it is what --json writes.

A record belongs to one part, one engine (a build of vmcp, or one of QEMU's ways) and one case (size, load, kind, ...), and has columns of samples by the
figure's name, whose ending is its unit (figures.UNITS). Columns need not be of one length: not every build tells everything.
"""

import json

from . import figures

FORMAT = "vmcp-bench-2"


class Record:
    def __init__(self, part, engine, case, samples=None, notes=None):
        self.part, self.engine, self.case = part, engine, dict(case)
        self.samples = samples if samples is not None else {}
        self.notes = notes if notes is not None else []

    def add(self, **values):
        """One sample; what is None was not told."""
        for name, value in values.items():
            if value is not None:
                self.samples.setdefault(name, []).append(value)

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)

    def has(self, name):
        return bool(self.samples.get(name))

    def figure(self, name, part="median"):
        """None if there is no such sample."""
        return figures.summary(self.samples[name])[part] if self.has(name) else None

    def count(self):
        return max((len(values) for values in self.samples.values()), default=0)

    def matches(self, part, engine, case):
        return self.part == part and (engine is None or self.engine == engine) and all(self.case.get(key) == value for key, value in case.items())


class Results:
    def __init__(self, meta=None):
        self.meta = meta if meta is not None else {}
        self.records = []
        self.absent = []  # {"part", "engine", "what", "why"}: not in this build, or not possible on this host
        self.failures = []  # {"part", "why"}: went wrong; the report fails

    def record(self, part, engine, **case):
        """The record of this case; made if it is new."""
        for one in self.records:
            if one.part == part and one.engine == engine and one.case == case:
                return one
        self.records.append(Record(part, engine, case))
        return self.records[-1]

    def find(self, part, engine=None, **case):
        """Records with samples whose case has at least these values, in the order in which they were made."""
        return [one for one in self.records if one.count() and one.matches(part, engine, case)]

    def one(self, part, engine=None, **case):
        found = self.find(part, engine, **case)
        return found[0] if found else None

    def lacks(self, part, why, engine="vmcp", what=""):
        entry = {"part": part, "engine": engine, "what": what, "why": str(why).strip().splitlines()[0] if str(why).strip() else "unknown"}
        if entry not in self.absent:
            self.absent.append(entry)

    def why_absent(self, part):
        """Why a part has no figures, or None."""
        reasons = [one["why"] for one in self.absent if one["part"] == part and one["engine"] == "vmcp"]
        reasons += [f"failed: {one['why']}" for one in self.failures if one["part"] == part]
        return reasons[0] if reasons else None

    def document(self):
        return {"format": FORMAT, "meta": self.meta, "absent": self.absent, "failures": self.failures,
                "records": [{"part": one.part, "engine": one.engine, "case": one.case, "notes": one.notes, "samples": one.samples,
                             "figures": {name: figures.summary(values) for name, values in one.samples.items() if values}} for one in self.records]}

    def write(self, path):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.document(), file, indent=1)
            file.write("\n")

    @classmethod
    def read(cls, paths):
        """Several runs become one: a record in a later file takes the place of the same one in an earlier."""
        results = cls()
        for path in paths:
            with open(path, encoding="utf-8") as file:
                document = json.load(file)
            if document.get("format") != FORMAT:
                raise ValueError(f"{path}: not a file of this report's --json ({FORMAT})")
            results.meta = {**results.meta, **document["meta"]}
            results.absent += [one for one in document["absent"] if one not in results.absent]
            results.failures += [one for one in document["failures"] if one not in results.failures]
            for one in document["records"]:
                record = Record(one["part"], one["engine"], one["case"], one["samples"], one["notes"])
                results.records = [old for old in results.records if (old.part, old.engine, old.case) != (record.part, record.engine, record.case)]
                results.records.append(record)
        return results
