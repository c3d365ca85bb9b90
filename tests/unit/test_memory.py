"""Whether memory holds one more session is decided from what is available, what is needed, and what can be freed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.ids import ModelName
from edge_agent.inference.memory import MIB, Memory, Room, Took, needed, room_for
from edge_agent.meminfo import available_bytes, used_bytes

MODEL = ModelName("kinds")
BYTES = st.integers(0, 10**12)


@given(BYTES, BYTES, BYTES, BYTES)
def test_more_memory_never_makes_less_room(need: int, available: int, reserve: int, freed: int) -> None:
    order = [Room.NONE, Room.INSTEAD, Room.BESIDE]
    less = room_for(need=need, available=available, reserve=reserve, freed=freed)
    more = room_for(need=need, available=available + 1, reserve=reserve, freed=freed)
    assert order.index(more) >= order.index(less)
    assert less is not Room.INSTEAD or freed > 0
    if less is Room.BESIDE:
        assert available - need >= reserve


def test_what_the_last_release_took_counts_for_the_next() -> None:
    size = 90 * MIB
    assert needed(size, None) > needed(size, Took(size, 60 * MIB))
    assert needed(size, Took(size, 400 * MIB)) > needed(size, None)
    used = [100 * MIB]
    memory = Memory(lambda: 300 * MIB, lambda: used[0], reserve_bytes=64 * MIB)
    assert memory.room(MODEL, size, serving=0) is Room.NONE
    before = memory.used()
    used[0] += 60 * MIB
    memory.learn(MODEL, size, before)
    assert memory.room(MODEL, size, serving=size) is Room.BESIDE
    assert "300 MiB are available" in memory.in_words(MODEL, size)


def test_a_tiny_release_does_not_make_its_successor_look_huge() -> None:
    tiny = Took(size=102, resident=10 * MIB)
    assert needed(4 * MIB, tiny) == needed(4 * MIB, None)
    assert needed(4 * MIB, tiny) < 64 * MIB
    assert needed(102, tiny) > tiny.resident, "the same one again takes what it took"


def test_nothing_is_refused_where_nobody_knows() -> None:
    assert Memory(lambda: None, lambda: None, reserve_bytes=0).room(MODEL, 10**15, serving=0) is Room.BESIDE


@pytest.mark.parametrize(
    ("limit", "stat", "left"),
    [("1000000", "inactive_file 0", 400_000), ("1000000", "inactive_file 50000", 450_000), ("max", "", 2_048_000)],
)
def test_the_tightest_limit_counts(tmp_path: Path, limit: str, stat: str, left: int) -> None:
    meminfo, own, inner = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "groups/outer/inner"
    meminfo.write_text("MemTotal:       9000 kB\nMemAvailable:       2000 kB\n")
    own.write_text("1:name=systemd:/x\n0::/outer/inner\n")
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("1\n")
    (inner.parent / "memory.max").write_text(limit + "\n")
    (inner.parent / "memory.current").write_text("600000\n")
    (inner.parent / "memory.stat").write_text(f"anon 5\n{stat}".strip() + "\n")
    assert available_bytes(meminfo, own, tmp_path / "groups") == left


def test_this_machine_tells_something(tmp_path: Path) -> None:
    available = available_bytes()
    assert available is None or available > 0
    assert used_bytes() > 0
    assert available_bytes(tmp_path / "none", tmp_path / "none", tmp_path) is None
