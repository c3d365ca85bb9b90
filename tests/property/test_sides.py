"""Who answers while requests are split: the share is kept, callers stay where they are, and wishes count."""

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.wire import Split
from edge_agent.inference.sides import NO_WISH, Wish, place, to_candidate, wish_in

SALT = "kinds@2"
KEYS = st.text(max_size=20).filter(bool)
SHARES = st.floats(0, 1, exclude_min=True)
DRAWS = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 1.0])
def test_the_candidate_gets_its_share_of_the_requests(share: float) -> None:
    chance = random.Random(1)
    got = sum(to_candidate(Split(share=share), NO_WISH, chance.random(), SALT) for _ in range(20_000))
    assert got / 20_000 == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 1.0])
def test_the_candidate_gets_its_share_of_the_callers(share: float) -> None:
    got = sum(to_candidate(Split(share=share), Wish(key=f"user-{n}"), 0.0, SALT) for n in range(20_000))
    assert got / 20_000 == pytest.approx(share, abs=0.01)


@given(key=KEYS, share=SHARES, draws=st.lists(DRAWS, min_size=2, max_size=5))
def test_a_caller_stays_on_its_side(key: str, share: float, draws: list[float]) -> None:
    assert len({to_candidate(Split(share=share), Wish(key=key), draw, SALT) for draw in draws}) == 1


@given(key=KEYS, share=SHARES, more=SHARES)
def test_a_wider_share_keeps_the_callers_that_it_has(key: str, share: float, more: float) -> None:
    narrow, wide = sorted((share, more))
    had = to_candidate(Split(share=narrow), Wish(key=key), 0.0, SALT)
    assert not had or to_candidate(Split(share=wide), Wish(key=key), 0.0, SALT)


def test_another_trial_draws_its_callers_anew() -> None:
    here, there = ({n for n in range(1000) if place(salt, str(n)) < 0.1} for salt in ("kinds@2", "kinds@3"))
    assert len(here & there) < 30


@given(share=SHARES, key=st.text(max_size=5), draw=DRAWS)
def test_who_says_which_side_gets_it(share: float, key: str, draw: float) -> None:
    split = Split(share=share, header="x-model")
    assert to_candidate(split, Wish("candidate", key), draw, SALT)
    assert not to_candidate(split, Wish("stable", key), draw, SALT)


@given(word=st.text(max_size=10).filter(lambda word: word not in {"candidate", "stable"}), share=SHARES, draw=DRAWS)
def test_what_is_no_side_is_no_wish(word: str, share: float, draw: float) -> None:
    split = Split(share=share)
    assert to_candidate(split, Wish(side=word), draw, SALT) == to_candidate(split, NO_WISH, draw, SALT)


def test_only_what_the_order_names_is_looked_at() -> None:
    said = {"x-model": "stable", "x-user": "7"}.get
    look = lambda name: said(name) or ""  # noqa: E731
    assert wish_in(Split(share=0.5), look) == NO_WISH
    assert wish_in(Split(share=0.5, header="x-model"), look) == Wish("stable")
    assert wish_in(Split(share=0.5, header="x-other", key="x-user"), look) == Wish(key="7")


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"share": 1.5}, "share"),
        ({"share": -0.1}, "share"),
        ({"share": 0}, "lets nobody reach"),
        ({"share": 0.5, "header": "x model"}, "header"),
        ({"share": 0.5, "key": "k" * 65}, "key"),
    ],
)
def test_a_split_that_cannot_be_is_refused_by_name(terms: dict[str, object], words: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=words):
        msgspec.convert(terms, Split)
