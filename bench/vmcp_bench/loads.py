"""What the guest does: words of its command line (examples/tiny/README.md)."""

from .figures import parse_size

# Fill, and which of it is written. No rate: at full speed.
LOADS = {
    "idle": "set=all paused=1",                          # memory full of data, nothing is written
    "sparse": "set=64M paused=1",                        # 64 MiB of data, nothing is written
    "moderate": "set=all mode=zipf rate=10000",          # 10,000 writes a second, page k about 1/k as likely
    "hot": "set=all mode=hot hot=4096",                  # full speed: 9 of 10 writes to 4096 pages (16 MiB) that lie all over the memory
    "uniform": "set=all mode=uniform",                   # full speed: each page as likely as any other
    "busy": "set=64M mode=uniform",                      # full speed over 64 MiB
    "zipf": "set=all mode=zipf rate=100000",             # 100,000 writes a second, page k about 1/k as likely
}
WRITE_HEAVY = ("hot", "uniform", "busy", "zipf")
# From this size on the guest's memory is mostly not there, in the idle load: hosts have an end.
SPARSE_FROM_BYTES = 16 << 30
FIXED = "report=0"


def words(load, size_bytes):
    """The command line of a load; `load` may also be such words themselves."""
    if load == "idle" and size_bytes >= SPARSE_FROM_BYTES:
        load = "sparse"
    return f"{LOADS.get(load, load)} {FIXED}"


def populated_bytes(load, size_bytes):
    """About how much of the guest's memory is there."""
    for word in words(load, size_bytes).split():
        if word.startswith("set=") and word != "set=all":
            return min(size_bytes, parse_size(word[4:]) + (8 << 20))
    return size_bytes


def writes(load):
    return "paused=1" not in LOADS.get(load, load)
