"""How long things usually take, from disturbed times."""

import random

from edge_agent.inference.scheduling import Usual
from edge_agent.inference.scheduling.usual import KINDS_MAX


def test_disturbed_times_hardly_count_and_a_faster_one_does_at_once() -> None:
    usual, chance = Usual(), random.Random(1)
    for _ in range(500):
        usual.learn("kind", 0.0002 * (1 + chance.random() / 10) + (0.005 if chance.random() < 0.05 else 0.0))
    assert 0.0002 < (usual.of("kind") or 0.0) < 0.0003
    for _ in range(10):
        usual.learn("kind", 0.0001)
    assert (usual.of("kind") or 1.0) < 0.00011


def test_what_has_become_slower_is_known_after_a_while() -> None:
    usual = Usual()
    usual.learn("kind", 0.001)
    for _ in range(1000):
        usual.learn("kind", 0.010)
    assert (usual.of("kind") or 0.0) > 0.009


def test_only_so_many_kinds_are_known() -> None:
    usual = Usual()
    for kind in range(3 * KINDS_MAX + 1):
        usual.learn(kind, 1.0)
    assert sum(usual.of(kind) is not None for kind in range(3 * KINDS_MAX + 1)) <= KINDS_MAX
    assert usual.of(3 * KINDS_MAX) == 1.0
