"""Reads the memory of checkpoints from a store's files, by docs/format.md and nothing else. Python's standard library only, and libcrypto for encrypted stores."""

import ctypes
import ctypes.util
import hashlib
import hmac
import os
import struct

PAGE_BYTES = 4096


def libcrypto():
    library = ctypes.CDLL(ctypes.util.find_library("crypto"))
    for name in ("EVP_CIPHER_CTX_new", "EVP_aes_256_gcm", "EVP_aes_256_xts"):
        getattr(library, name).restype = ctypes.c_void_p
    return library


class Decryption:
    """AES-256 in one of libcrypto's modes."""

    def __init__(self, mode, key):
        self.library = libcrypto()
        self.context = ctypes.c_void_p(self.library.EVP_CIPHER_CTX_new())
        mode = ctypes.c_void_p(getattr(self.library, f"EVP_aes_256_{mode}")())
        assert self.library.EVP_DecryptInit_ex(self.context, mode, None, key, None) == 1, "libcrypto: key"

    def decrypt(self, start, data, extra=b"", tag=None):
        """start: nonce or tweak. With a tag: AssertionError if it does not fit."""
        out, n = ctypes.create_string_buffer(len(data)), ctypes.c_int()
        assert self.library.EVP_DecryptInit_ex(self.context, None, None, None, start) == 1, "libcrypto: start"
        if extra:
            assert self.library.EVP_DecryptUpdate(self.context, None, ctypes.byref(n), extra, len(extra)) == 1, "libcrypto: extra"
        assert self.library.EVP_DecryptUpdate(self.context, out, ctypes.byref(n), data, len(data)) == 1, "libcrypto: data"
        if tag:
            self.library.EVP_CIPHER_CTX_ctrl(self.context, 0x11, len(tag), tag)
            assert self.library.EVP_DecryptFinal_ex(self.context, ctypes.create_string_buffer(16), ctypes.byref(n)) == 1, "the tag does not fit"
        return out.raw


def store_key(store, secret):
    """The key of an encrypted store, by its file `format` and the user's key."""
    with open(os.path.join(store, "format"), "rb") as file:
        text = file.read()
    first, second = text.decode("ascii").splitlines()
    word, log_n, r, p, salt, wrapped = second.split(" ")
    assert (first, word) == ("vmcp store 2", "key"), "no encrypted store"
    key = hashlib.scrypt(secret, salt=bytes.fromhex(salt), n=1 << int(log_n), r=int(r), p=int(p), dklen=32, maxmem=1 << 28)
    wrapped = bytes.fromhex(wrapped)
    return Decryption("gcm", key).decrypt(bytes(12), wrapped[:32], text[:text.rindex(b" ") + 1], wrapped[32:])


def derive(key, what, name):
    return hmac.new(key, f"vmcp {what} {name}".encode(), "sha512").digest()


def read_state(store, checkpoint, key):
    """The state of a checkpoint of an encrypted store."""
    with open(os.path.join(store, "checkpoints", checkpoint, "state"), "rb") as file:
        data = file.read()
    assert data[:16] == b"vmcpenc\n" + bytes([1]) + bytes(7) and data[28:32] == bytes(4), "no encrypted state"
    return Decryption("gcm", derive(key, "state", checkpoint)[:32]).decrypt(data[16:28], data[48:], data[:32], data[32:48])


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
    """The memory of one checkpoint: page numbers to contents, through its index. key: the store's, if it is encrypted."""

    def __init__(self, store, checkpoint, key=None):
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
        self.ciphers = [Decryption("xts", derive(key, "layer", name)) for name in names] if key else []
        self.files = [open(os.path.join(store, "layers", f"{name}.mem"), "rb") for name in names]
        self.places = [read_places(os.path.join(store, "layers", f"{name}.sums")) for name in names]

    def runs(self):
        """(first page, contents) of stretches in order, at most 256 pages each."""
        for first, count, layer in self.extents:
            for page in range(first, first + count, 256):
                length = min(256, first + count - page) * PAGE_BYTES
                if layer:
                    yield page, self.decrypt(layer, page, os.pread(self.files[layer - 1].fileno(), length, self.places[layer - 1][page] * PAGE_BYTES))
                else:
                    yield page, bytes(length)

    def decrypt(self, layer, first, data):
        if not self.ciphers:
            return data
        pages = range(len(data) // PAGE_BYTES)
        return b"".join(self.ciphers[layer - 1].decrypt((first + i).to_bytes(16, "little"), data[i * PAGE_BYTES:(i + 1) * PAGE_BYTES]) for i in pages)

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
