"""A real agent with a real controller, killed with SIGKILL at random moments while it updates and answers.

`tests/e2e/killing.py` has the chase and says what is looked at after each kill; `bench_crash` has the crashes at every
single operation. `QUICK=1` makes few kills, `KILLS=n` so many. `SEED=n` draws other moments.
"""

import os
import sys
import tempfile
from pathlib import Path

from benchmarks.report import Row, at_most, figure, quick, write
from tests.e2e.killing import Chase, Outcome
from tests.e2e.world import World

COMMAND = f"KILLS={os.environ['KILLS']} make bench-kills" if os.environ.get("KILLS") else "make bench-kills"
KILLS, SOME_KILLS = 300, 5

INTRO = """
Release after release is rolled out to a real `ferry-agent` process by a real controller, somebody keeps asking it, and
it is killed with SIGKILL at random moments, also while it starts. After each kill the releases that the journal names
must be complete on the disk and the generation must not be lower; each answer must be from the release that it names,
and that release the old or the new one. In the end, in peace, the last rollout must succeed.
"""


def main() -> None:
    kills = int(os.environ.get("KILLS", str(SOME_KILLS if quick() else KILLS)))
    outcome = _chased(kills, int(os.environ.get("SEED", "1")))
    for broken in outcome.broken:
        print(broken, file=sys.stderr)
    write("kills", "Kills", _rows(outcome), INTRO)


def _chased(kills: int, seed: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        try:
            world.start()
            return Chase(world, Path(folder) / "releases", seed).run(kills)
        finally:
            world.stop()


def _rows(outcome: Outcome) -> list[Row]:
    return [
        figure("kills under traffic", measured=outcome.kills, unit="", command=COMMAND),
        figure("of them before the agent answered", measured=outcome.starts, unit="", command=COMMAND),
        figure("releases rolled out meanwhile", measured=outcome.rollouts, unit="", command=COMMAND),
        figure("answers checked", measured=outcome.answers, unit="", command=COMMAND),
        at_most("promises broken", 0, measured=len(outcome.broken), unit="", command=COMMAND),
    ]


if __name__ == "__main__":
    main()
