"""Tries one crash again: `python -m tests.crash STORY WHERE SEED`, as a violation names it.

WHERE is `OPERATION LOSS`, or `OPERATION killed, OPERATION LOSS` for a crash during the recovery from another one.
Threads take turns as they like, so the same operation may stand at another number in another run; the neighbours are
tried too.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from tests.crash.disk import Loss
from tests.crash.exploring import attempt
from tests.crash.recording import Recorder
from tests.crash.survey import Survey, crash

NEIGHBOURS = 3


async def main(name: str, where: str, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder, Recorder(Path(folder)) as recorder:
        async with Survey(Path(folder) / "survey", recorder).open() as survey:
            story = survey.author().stories()[name]()
            recording, before = await survey.record(story), None
            *firsts, last = [part.split() for part in where.split(", ")]
            for index, loss in firsts:
                before = crash(recording, int(index), Loss(loss), seed)
                _, again = await attempt(survey, story, before, recorded=True)
                assert again is not None
                recording = again
            for place in range(int(last[0]) - NEIGHBOURS, int(last[0]) + NEIGHBOURS + 1):
                if 0 <= place <= len(recording.ops):
                    op = recording.ops[place] if place < len(recording.ops) else None
                    left = crash(recording, place, Loss(last[1]), seed, before)
                    found, _ = await attempt(survey, story, left, restarts=True)
                    where = f"{op.kind} {op.path}" if op else "the end"
                    sys.stdout.write(f"{place} {where}: {'; '.join(found) or 'holds'}\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
