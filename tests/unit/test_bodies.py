"""Request bodies as they come in: what is counted, and what they take in memory."""

import tracemalloc

import pytest

from common.errors import TooLarge
from edge_agent.inference.bodies import Bodies, BodyLimits, Overfull

MIB = 1024 * 1024


def test_a_body_in_the_smallest_pieces_takes_little_more_than_its_bytes() -> None:
    body = Bodies(BodyLimits()).begin("", "")
    pieces = [bytes([number % 251, number % 241]) for number in range(MIB // 2)]
    tracemalloc.start()
    try:
        for piece in pieces:
            body.add(piece)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert body.whole() == b"".join(pieces)
    assert held < 1.5 * MIB


def test_pieces_count_together_and_are_given_back_together() -> None:
    bodies = Bodies(BodyLimits(body_bytes_max=3 * MIB, bodies_bytes_max=4 * MIB))
    one, other = bodies.begin("", ""), bodies.begin("", "")
    for _ in range(3):
        one.add(bytes(MIB))
    with pytest.raises(TooLarge):
        one.add(b"x")
    other.add(bytes(MIB))
    with pytest.raises(Overfull):
        other.add(b"x")
    one.release()
    one.release()
    other.add(bytes(MIB))
    assert len(other.whole()) == 2 * MIB
    other.release()
    assert bodies._held == 0
