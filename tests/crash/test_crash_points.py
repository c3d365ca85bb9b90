"""No crash breaks a promise, and a wrong agent is found out: a share of all crashes; `make bench-crash` tries all."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.crash import recording
from tests.crash.exploring import Share, explore
from tests.crash.hunting import hunt
from tests.crash.invariants import ALL
from tests.crash.mutants import MUTANTS, Mutant
from tests.crash.recording import Recorder
from tests.crash.stories import NAMES
from tests.crash.survey import Survey

SEED = 1
SHARE = Share(kills=0.01, power_cuts=0.01, recovered=1, pairs=1)
TRIES_MAX = 150
"""Crashes until a mutant must have been caught; most take fewer than ten."""

pytestmark = pytest.mark.skipif(bool(recording.available()), reason=recording.available() or "FUSE works")


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    with Recorder(tmp_path_factory.mktemp("crash")) as recorder:
        yield recorder


@pytest.fixture
async def survey(recorder: Recorder, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Survey]:
    async with Survey(tmp_path / "survey", recorder, run_s=getattr(request, "param", 0.0)).open() as survey:
        yield survey


@pytest.mark.parametrize("name", NAMES)
async def test_no_crash_breaks_a_promise(survey: Survey, name: str) -> None:
    findings = await explore(survey, survey.author().stories()[name](), SHARE, SEED)
    assert sum(findings.crashes.values()) > 0
    assert not findings.violations, "try one again: python -m tests.crash STORY WHERE SEED"


@pytest.mark.parametrize(
    ("survey", "mutant"), [pytest.param(one.run_s, one, id=one.name) for one in MUTANTS], indirect=["survey"]
)
async def test_a_wrong_agent_is_found_out(survey: Survey, mutant: Mutant) -> None:
    assert await hunt(survey, mutant, SEED, TRIES_MAX), f"nobody noticed an agent that {mutant.name}"


def test_every_invariant_has_a_mutant_that_it_catches() -> None:
    missed = set(ALL) - {check for mutant in MUTANTS for check in mutant.caught_by}
    assert not missed, f"write a mutant for {', '.join(sorted(check.__name__ for check in missed))}"
