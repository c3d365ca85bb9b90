"""What fuzzing once found stays mended: each kept input ends well or with a named error. The valid inputs that fuzzing
starts from are read to their end, so that it does start behind the first checks.
"""

import pytest

from common.delta.tensors import Method
from tests.fuzz.targets import TARGETS, fuzzed, kept

KEPT = {what: (name, data) for name in TARGETS for what, data in kept(name).items()}


@pytest.mark.parametrize(("name", "data"), KEPT.values(), ids=KEPT)
def test_what_was_found_by_fuzzing_stays_mended(name: str, data: bytes) -> None:
    fuzzed(TARGETS[name].run, data)


@pytest.mark.parametrize("name", TARGETS)
def test_fuzzing_starts_from_valid_inputs(name: str) -> None:
    seeds = list(TARGETS[name].seeds())
    assert seeds
    for seed in seeds:
        TARGETS[name].run(seed)


def test_fuzzing_of_payloads_starts_from_every_method() -> None:
    assert {seed[0] for seed in TARGETS["decode"].seeds()} == set(Method)
