"""Percentiles, and numbers as people read them. Pure functions."""

import re
import statistics

SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def percentile(values, percent):
    """Nearest rank: the smallest value that is no less than `percent` of all."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[min(len(ordered), max(1, int(rank))) - 1]


def summary(values):
    """What a table says about some samples. p99 of fewer than 100 samples is their maximum."""
    return {"n": len(values), "median": statistics.median(values), "min": min(values), "p95": percentile(values, 95),
            "p99": percentile(values, 99), "max": max(values)}


def parse_size(text):
    """Bytes of "256M", "4G"; powers of 1024."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.strip().upper())
    if not match or int(match.group(1)) == 0:
        raise ValueError(f"'{text}' is no size such as 256M or 4G")
    return int(match.group(1)) * SIZE_UNITS[match.group(2)]


def size_text(number):
    """The shortest exact way to write a size: 1073741824 is 1 GiB."""
    for unit in ("T", "G", "M", "K"):
        if number >= SIZE_UNITS[unit] and number % SIZE_UNITS[unit] == 0:
            return f"{number // SIZE_UNITS[unit]} {unit}iB"
    return f"{number} B"


def significant(value, digits=3):
    """`digits` digits that count, never in powers of ten: 0.0123, 1.23, 123, 12345."""
    if value == 0:
        return "0"
    size = abs(value)
    decimals = digits - 1
    while size >= 10 and decimals > 0:
        size /= 10
        decimals -= 1
    while 0 < size < 1 and decimals < 6:
        size *= 10
        decimals += 1
    text = f"{value:.{decimals}f}"
    # 9.996 becomes "10.00", one digit too many.
    return f"{value:.{decimals - 1}f}" if decimals > 0 and len(text.replace("-", "").replace(".", "").lstrip("0")) > digits else text


# What a number of this kind is divided by, and the unit that is shown then; by the ending of its name.
UNITS = {"_ns": (1e6, "ms"), "_us": (1e3, "ms"), "_bytes_per_s": (1 << 20, "MiB/s"), "_bytes": (1 << 20, "MiB"), "_share": (0.01, "%"), "_per_s": (1, "/s"), "_pages": (1, "pages")}


def unit_of(name):
    """(divisor, unit) for a figure of this name."""
    for ending, unit in UNITS.items():
        if name.endswith(ending):
            return unit
    return 1, ""


def label_of(name):
    """A figure's name for people: `durable_beyond_sync_ns` is "durable beyond sync, ms"."""
    ending = next((one for one in UNITS if name.endswith(one)), "")
    words, unit = name.removesuffix(ending).replace("_", " "), unit_of(name)[1]
    return f"{words}, {unit}" if unit else words
