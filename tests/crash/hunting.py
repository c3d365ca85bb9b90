"""Looking for a crash that shows what is wrong with a mutant: drawn from a seed, one after another, until one does."""

import itertools
import random
from collections.abc import Iterator
from unittest.mock import patch

from tests.crash import device
from tests.crash.disk import Loss
from tests.crash.exploring import attempt
from tests.crash.mutants import Mutant
from tests.crash.stories import Story
from tests.crash.survey import Crash, Recording, Survey, crash, points

PATIENCE_S = 2.0
"""A mutant may wait for what never comes. What is to be crashed is waited for as long as anywhere else."""


async def hunt(survey: Survey, mutant: Mutant, seed: int, tries_max: int) -> str:
    """What caught the mutant; empty if nothing did in so many crashes."""
    names = tuple(check.__name__ for check in mutant.caught_by)
    story, chance = survey.author().stories()[mutant.story](), random.Random(seed)
    with mutant.wrong():
        recording = await survey.record(story)
        for first in itertools.islice(_drawn(recording, mutant, chance), tries_max):
            left = await _second(survey, story, first, chance) if mutant.twice else first
            if left is None:
                continue
            with patch.object(device, "PATIENCE_S", PATIENCE_S):
                found, _ = await attempt(survey, story, left, restarts=True)
            if caught := next((what for what in found if what.startswith(names)), ""):
                return caught
    return ""


def _drawn(recording: Recording, mutant: Mutant, chance: random.Random) -> Iterator[Crash]:
    """Every place once in any order, then all of them again with other losses."""
    ops = recording.ops
    places = [
        index for index in points(recording) if not mutant.at or (index < len(ops) and mutant.at in ops[index].path)
    ]
    while True:
        for index in chance.sample(places, len(places)):
            yield crash(recording, index, chance.choice(mutant.losses), chance.randrange(1000))


async def _second(survey: Survey, story: Story, first: Crash, chance: random.Random) -> Crash | None:
    """A crash while the device recovers from the first one; None if it does not."""
    _, recovery = await attempt(survey, story, first, recorded=True)
    if recovery is None:
        return None
    return crash(recovery, chance.choice(points(recovery)), Loss.KILLED, 0, first)
