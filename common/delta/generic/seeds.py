"""Where short runs of bytes, seeds, occur in a base file: the index from which every alignment of two files grows.

Every `step`-th offset of the base is entered with the hash of the `width` bytes there; the target is looked up at every
offset. So each run of `width + step - 1` equal bytes is found, shorter ones often are. An entry is one 64-bit key, the
hash in the high bits and the entry's number in the low ones: sorting the keys sorts the occurrences of a hash by place,
and one binary search finds the occurrence nearest to where it is expected. A hash that collides costs time, never
correctness, for whoever asks compares the bytes.

The idea of anchors at every offset of one file against blocks of the other is rsync's (Tridgell 1999), the polynomial
hash that of Karp and Rabin (1987).

Memory: 8 bytes per entry, at most `ENTRIES_MAX` entries, and a filter of at most 16 MiB.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.artifact.protobuf import Span
from common.artifact.source import PIECE_BYTES, ByteSource

ENTRIES_MAX = 1 << 21
ORDINAL_BITS = 21
WORD_BYTES = 8
FILTER_BITS_MIN, FILTER_BITS_MAX = 12, 24
MULTIPLIER = 0x9E37_79B9_7F4A_7C15
"""Odd, without pattern: 2^64 divided by the golden ratio (Knuth, TAOCP 6.4)."""
_MASK = (1 << 64) - 1

Hashes = NDArray[np.uint64]
Offsets = NDArray[np.int64]


class SeedIndex:
    """The seeds of the given spans of `base`."""

    def __init__(self, base: ByteSource, spans: Sequence[Span], *, width: int, step: int) -> None:
        self.width, self.step = width, step
        whole = [span for span in spans if (span.end - span.start) >= width]
        counts = [((span.end - span.start) - width) // step + 1 for span in whole]
        self._firsts = np.cumsum([0, *counts])
        self._starts = np.array([span.start for span in whole], np.int64)
        self._keys = np.empty(int(self._firsts[-1]), np.uint64)
        if len(self._keys) > ENTRIES_MAX:
            raise ValueError(f"{len(self._keys)} seeds; a wider step is needed")
        for span, first, count in zip(whole, self._firsts, counts, strict=False):
            self._enter(base, span, int(first), count)
        self._keys.sort()
        bits = len(self._keys).bit_length() + 4
        self._filter_shift = np.uint64(64 - min(max(bits, FILTER_BITS_MIN), FILTER_BITS_MAX))
        self._filter = np.zeros(1 << (64 - int(self._filter_shift)), np.bool_)
        self._filter[self._keys >> self._filter_shift] = True

    def __len__(self) -> int:
        return len(self._keys)

    def places(self, hashes: Hashes) -> Offsets:
        """Indices into `hashes` that (very likely) occur in the base, ascending."""
        maybe = np.flatnonzero(self._filter[hashes >> self._filter_shift])
        wanted = hashes[maybe] >> np.uint64(ORDINAL_BITS)
        at = np.searchsorted(self._keys, wanted << np.uint64(ORDINAL_BITS))
        at[at == len(self._keys)] = 0
        found: Offsets = maybe[self._keys[at] >> np.uint64(ORDINAL_BITS) == wanted] if len(self) else maybe[:0]
        return found

    def nearest(self, hashes: Hashes, expected: Offsets) -> Offsets:
        """The base offset of the occurrence of each hash, all known to occur, that is nearest to the one expected."""
        ordinals = self._ordinals(expected)
        wanted = hashes >> np.uint64(ORDINAL_BITS)
        at = np.searchsorted(self._keys, wanted << np.uint64(ORDINAL_BITS) | ordinals.astype(np.uint64))
        after, before = np.minimum(at, len(self) - 1), np.maximum(at - 1, 0)
        offset_after, offset_before = self._offsets(after), self._offsets(before)
        real_after = self._keys[after] >> np.uint64(ORDINAL_BITS) == wanted
        real_before = self._keys[before] >> np.uint64(ORDINAL_BITS) == wanted
        nearer = np.abs(offset_before - expected) < np.abs(offset_after - expected)
        return np.where(real_before & (nearer | ~real_after), offset_before, offset_after)

    def _enter(self, base: ByteSource, span: Span, first: int, count: int) -> None:
        per_piece = max(PIECE_BYTES // self.step, 1)
        for done in range(0, count, per_piece):
            taken = min(per_piece, count - done)
            data = base.read_at(span.start + done * self.step, (taken - 1) * self.step + self.width)
            hashes = seed_hashes(data, self.width, self.step)
            ordinals = np.arange(first + done, first + done + taken, dtype=np.uint64)
            self._keys[first + done : first + done + taken] = (
                hashes >> np.uint64(ORDINAL_BITS) << np.uint64(ORDINAL_BITS) | ordinals
            )

    def _offsets(self, at: Offsets) -> Offsets:
        ordinals = (self._keys[at] & np.uint64((1 << ORDINAL_BITS) - 1)).astype(np.int64)
        span = np.searchsorted(self._firsts, ordinals, side="right") - 1
        offsets: Offsets = self._starts[span] + (ordinals - self._firsts[span]) * self.step
        return offsets

    def _ordinals(self, offsets: Offsets) -> Offsets:
        """The number of the entry at or before each offset."""
        span = np.maximum(np.searchsorted(self._starts, offsets, side="right") - 1, 0)
        inside = np.clip(
            (offsets - self._starts[span]) // self.step, 0, self._firsts[span + 1] - 1 - self._firsts[span]
        )
        ordinals: Offsets = self._firsts[span] + inside
        return ordinals


def seed_hashes(data: bytes, width: int, step: int = 1) -> Hashes:
    """The hash of the `width` bytes (at most 8, or 8 times a power of two) at every `step`-th offset where they fit."""
    count = (len(data) - width) // step + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    padded = data + bytes(max(WORD_BYTES - width, 0))
    words_per_seed = max(width // WORD_BYTES, 1)
    if step >= width:
        words: Hashes = np.ndarray((count, words_per_seed), "<u8", padded, 0, (step, WORD_BYTES))
        return _joined(_hashes_of(words, width))
    words = np.ndarray((len(padded) - WORD_BYTES + 1,), "<u8", padded, 0, (1,))
    hashes, reach, power = _hashes_of(words, width), WORD_BYTES, MULTIPLIER
    while reach < width:
        hashes = hashes[:-reach] * np.uint64(power) + hashes[reach:]
        reach, power = reach * 2, power * power & _MASK
    return hashes[::step]


def _hashes_of(words: Hashes, width: int) -> Hashes:
    kept = words & np.uint64((1 << 8 * min(width, WORD_BYTES)) - 1)
    hashes: Hashes = (kept ^ kept >> np.uint64(29)) * np.uint64(MULTIPLIER)
    return hashes


def _joined(hashes: Hashes) -> Hashes:
    """One hash per row from those of its words; the same as for overlapping seeds."""
    power = MULTIPLIER
    while hashes.shape[1] > 1:
        hashes = hashes[:, 0::2] * np.uint64(power) + hashes[:, 1::2]
        power = power * power & _MASK
    return hashes[:, 0]
