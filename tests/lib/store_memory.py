"""Reads the memory of checkpoints from a store's files, by docs/format.md and nothing else. Python's standard library only."""

import os
import struct

PAGE_BYTES = 4096


def read_places(path):
    """Page numbers to places in the layer's file, by its file of checksums."""
    with open(path, "rb") as file:
        data = file.read()
    magic, version, _, count, _ = struct.unpack_from("<8sIIQQ", data)
    assert (magic, version) == (b"vmcpsum\n", 2), "no page checksums"
    assert len(data) == 32 + 16 * count, "length of the page checksums"
    return {page: place for page, place, _ in struct.iter_unpack("<IIQ", data[32:])}


def read_number(data, at):
    """A number of 7 bits a byte, the lowest first, and where the next one begins."""
    value = shift = 0
    while True:
        value |= (data[at] & 0x7f) << shift
        shift += 7
        at += 1
        if not data[at - 1] & 0x80:
            return value, at


class Memory:
    """The memory of one checkpoint: page numbers to contents, through its index."""

    def __init__(self, store, checkpoint):
        with open(os.path.join(store, "checkpoints", checkpoint, "index"), "rb") as file:
            index = file.read()
        magic, version, page_bytes, self.pages, layers, _, extents, extent_bytes = struct.unpack_from("<8sIIQIIQQ", index)
        assert (magic, version, page_bytes) == (b"vmcpidx\n", 2, PAGE_BYTES), "no index"
        names = [index[48 + 32 * i:80 + 32 * i].decode("ascii") for i in range(layers)]
        at = 48 + 32 * layers
        assert len(index) == at + extent_bytes, "length of the index"
        self.extents, first = [], 0
        for _ in range(extents):
            count, at = read_number(index, at)
            layer, at = read_number(index, at)
            self.extents.append((first, count, layer))
            first += count
        self.layers = names
        self.files = [open(os.path.join(store, "layers", f"{name}.mem"), "rb") for name in names]
        self.places = [read_places(os.path.join(store, "layers", f"{name}.sums")) for name in names]

    def runs(self):
        """(first page, contents) of stretches in order, at most 256 pages each."""
        for first, count, layer in self.extents:
            for page in range(first, first + count, 256):
                length = min(256, first + count - page) * PAGE_BYTES
                if layer:
                    yield page, os.pread(self.files[layer - 1].fileno(), length, self.places[layer - 1][page] * PAGE_BYTES)
                else:
                    yield page, bytes(length)

    def contents(self):
        return b"".join(data for _, data in self.runs())

    def close(self):
        for file in self.files:
            file.close()


def layers(store, checkpoint):
    """Names of the layers that a checkpoint's index names."""
    memory = Memory(store, checkpoint)
    memory.close()
    return memory.layers


def differences(store, a, b):
    """Numbers of the pages in which two checkpoints differ."""
    memories = [Memory(store, one) for one in (a, b)]
    one, other = (memory.contents() for memory in memories)
    for memory in memories:
        memory.close()
    assert len(one) == len(other) == memories[0].pages * PAGE_BYTES, "lengths of memory"
    if one == other:
        return []
    return [page for page in range(memories[0].pages) if one[page * PAGE_BYTES:(page + 1) * PAGE_BYTES] != other[page * PAGE_BYTES:(page + 1) * PAGE_BYTES]]
