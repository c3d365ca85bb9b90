"""A few kills at random moments; `make bench-kills` makes hundreds."""

from pathlib import Path

import pytest

from tests.e2e.killing import Chase
from tests.e2e.world import World

pytestmark = pytest.mark.e2e

KILLS = 5
SEED = 7


@pytest.mark.timeout(600)
def test_an_agent_killed_at_any_moment_serves_the_old_or_the_new(world: World, tmp_path: Path) -> None:
    outcome = Chase(world, tmp_path / "releases", SEED).run(KILLS)
    assert not outcome.broken
    assert outcome.answers > KILLS
