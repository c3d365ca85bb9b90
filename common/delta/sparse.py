"""Differences that are mostly zero, as what is not: runs of bytes, and how many zeros come before each.

zstd spends about two bytes on every interruption of a run of zeros. Gaps, lengths and values put into columns of their
own are each of one kind and compress by a fifth better (bzip2, which bsdiff uses, gets as much from the zeros).

The packed form: the number of runs (varint), the low bytes of all gaps, their high bytes, the lengths, then the values
of all runs. A gap has 16 bits and a length 8, so longer ones take several runs, with lengths or gaps of zero. Zeros
after the last run are not mentioned.
"""

import numpy as np
from numpy.typing import NDArray

from common.delta.varint import Cursor, varint
from common.errors import IntegrityFailure

JOINED_ZEROS_MAX = 3
"""So few zeros between two bytes are cheaper as values than as a gap."""
GAP_MAX, LENGTH_MAX = 0xFFFF, 0xFF
COLUMN_BYTES = 3
RUNS_AT_ONCE = 4096
"""How many runs are unpacked at a time."""

Bytes = NDArray[np.uint8]
Counts = NDArray[np.int64]


def pack(dense: bytes) -> bytes:
    """`dense` as runs; at least as long as `dense` where few bytes are zero."""
    data = np.frombuffer(dense, np.uint8)
    starts, ends = _runs(data)
    gaps = starts - np.concatenate(([0], ends[:-1]))[: len(starts)]
    gaps, lengths = _split(gaps, ends - starts)
    columns = (gaps & 0xFF, gaps >> 8, lengths)
    values = data[_inside(starts, ends - starts)]
    return varint(len(gaps)) + b"".join(column.astype(np.uint8).tobytes() for column in columns) + values.tobytes()


def unpack(packed: bytes, size: int) -> bytes:
    """The `size` bytes that `packed` stands for; `IntegrityFailure` when it is not what `pack` writes for so many.

    Takes no more memory than packed and dense bytes together, however many runs a stranger makes of them.
    """
    cursor = Cursor(packed)
    count = cursor.varint()
    columns = np.frombuffer(packed, np.uint8, offset=cursor.place)
    if COLUMN_BYTES * count > len(columns):
        raise _unfit()
    low, high, lengths = columns[: COLUMN_BYTES * count].reshape(COLUMN_BYTES, count)
    cursor.place += COLUMN_BYTES * count
    dense = bytearray(size)
    place = 0
    for begin in range(0, count, RUNS_AT_ONCE):
        chosen = slice(begin, begin + RUNS_AT_ONCE)
        counts = np.stack((low[chosen] + (high[chosen].astype(np.int64) << 8), lengths[chosen]), axis=1).reshape(-1)
        end = place + int(counts.sum())
        values = cursor.take(int(counts[1::2].sum()))
        if end > size:
            raise _unfit()
        changed = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        np.frombuffer(dense, np.uint8)[place:end][changed] = np.frombuffer(values, np.uint8)
        place = end
    if not cursor.ended():
        raise _unfit()
    return bytes(dense)


def _unfit() -> IntegrityFailure:
    return IntegrityFailure("the packed differences of the patch do not fit their section")


def _runs(data: Bytes) -> tuple[Counts, Counts]:
    """Where runs with at most `JOINED_ZEROS_MAX` zeros in a row begin and end."""
    places = np.flatnonzero(data)
    if not len(places):
        return places, places
    breaks = np.flatnonzero(np.diff(places) > JOINED_ZEROS_MAX + 1)
    return places[np.concatenate(([0], breaks + 1))], places[np.concatenate((breaks, [len(places) - 1]))] + 1


def _split(gaps: Counts, lengths: Counts) -> tuple[Counts, Counts]:
    """The same runs with no gap and no length over its maximum."""
    extra_gaps = gaps // GAP_MAX
    pieces = np.maximum(-(-lengths // LENGTH_MAX), 1)
    totals = extra_gaps + pieces
    ends = np.cumsum(totals)
    out_gaps = np.zeros(int(totals.sum()), np.int64)
    out_lengths = np.zeros_like(out_gaps)
    out_gaps[_inside(ends - totals, extra_gaps)] = GAP_MAX
    out_gaps[ends - pieces] = gaps - extra_gaps * GAP_MAX
    out_lengths[_inside(ends - pieces, pieces)] = LENGTH_MAX
    out_lengths[ends - 1] = lengths - (pieces - 1) * LENGTH_MAX
    return out_gaps, out_lengths


def _inside(starts: Counts, lengths: Counts) -> Counts:
    """All places in the runs, in order."""
    firsts = starts - (np.cumsum(lengths) - lengths)
    places: Counts = np.repeat(firsts, lengths) + np.arange(int(lengths.sum()))
    return places
