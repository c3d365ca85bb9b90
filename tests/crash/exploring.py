"""Which crashes of a story are tried, and what came of them.

Every operation is a crash point, once for a killed process and once for each kind of power cut. Pairs are too many to
try all: the recoveries from some crashes, drawn from the seed, are recorded and crashed in their turn at operations
drawn from it too. A `Share` of less than one takes that part of all, drawn as well.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from tests.crash import invariants
from tests.crash.disk import Loss
from tests.crash.invariants import Case
from tests.crash.stories import Story
from tests.crash.survey import Crash, Recording, Survey, crash, points

RESTARTS = 5
"""Each so many-th crash is followed by one more restart, to see that it changes nothing."""


class Share(NamedTuple):
    """How much is tried: the share of all kills, of all power cuts of each kind; of so many recoveries (`recovered`),
    `pairs` crashes each.
    """

    kills: float = 1.0
    power_cuts: float = 1.0
    recovered: int = 0
    pairs: int = 0


class Violation(msgspec.Struct, frozen=True):
    """What did not hold, and where: `python -m tests.crash STORY WHERE SEED` tries it again."""

    story: str
    where: str
    seed: int
    what: str


class Findings(msgspec.Struct, frozen=True):
    """A story's figures: operations in the undisturbed run, crashes and pairs tried, and what did not hold."""

    story: str
    operations: int
    crashes: dict[str, int]
    pairs: int
    violations: tuple[Violation, ...]


async def explore(survey: Survey, story: Story, share: Share, seed: int) -> Findings:
    """Record the story once and crash it."""
    recording = await survey.record(story)
    chance = random.Random(f"{seed} {story.name}")
    violations: list[Violation] = []
    crashes = dict.fromkeys(Loss, 0)
    for number, (index, loss) in enumerate(_drawn(recording, share, chance)):
        crashes[loss] += 1
        found, _ = await attempt(survey, story, crash(recording, index, loss, seed), restarts=number % RESTARTS == 0)
        violations += [Violation(story.name, f"{index} {loss}", seed, what) for what in found]
    pairs = 0
    for index in chance.sample(points(recording), min(share.recovered, len(points(recording)))):
        first = crash(recording, index, Loss.KILLED, seed)
        _, recovery = await attempt(survey, story, first, recorded=True)
        if recovery is None:
            continue
        for second in sorted(chance.sample(points(recovery), min(share.pairs, len(points(recovery))))):
            loss = chance.choice(tuple(Loss))
            pairs += 1
            found, _ = await attempt(survey, story, crash(recovery, second, loss, seed, first))
            violations += [Violation(story.name, f"{index} killed, {second} {loss}", seed, what) for what in found]
    operations = sum(op.kind != "mark" for op in recording.ops)
    return Findings(
        story.name, operations, {str(loss): count for loss, count in crashes.items()}, pairs, tuple(violations)
    )


def _drawn(recording: Recording, share: Share, chance: random.Random) -> Iterator[tuple[int, Loss]]:
    for loss in Loss:
        part = share.kills if loss is Loss.KILLED else share.power_cuts
        for index in points(recording):
            if chance.random() < part:
                yield index, loss


async def attempt(
    survey: Survey, story: Story, left: Crash, *, recorded: bool = False, restarts: bool = False
) -> tuple[list[str], Recording | None]:
    """Recover from one crash: what did not hold, and the recording if that was asked for."""
    try:
        seen, recovery = await survey.recover(story, left, recorded=recorded, restarts=restarts)
    except Exception as error:  # whatever it is, the device did not come up again
        liveness = invariants.the_story_ends_as_it_does_without_a_crash.__name__
        return [f"{liveness}: the device did not recover: {type(error).__name__}: {error}"], None
    return invariants.violations(Case(story, left, seen, survey.desk.blobs)), recovery
