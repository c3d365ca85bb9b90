"""The agent's memory: on the disk when a method returns, readable by this build or gone back from, never going back."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from common.artifact import ArtifactRef, digest_of
from common.errors import Conflict
from common.ids import ModelName, Version
from common.wire import Outcome, UpdateReport
from edge_agent.journal import AcceptedOrder, Journal
from edge_agent.update import Installed, ModelState, Quarantined, Stage, Tally
from tests.golden.journal import reader_1
from tests.property.update_world import WAYS, target_of

MODEL = ModelName("kinds")
V1 = Version("1")
GOLDEN = Path(__file__).parents[1] / "golden/journal/state-1.json"

CHILD = """
import sys
from pathlib import Path
from edge_agent.journal import AcceptedOrder, Journal
from edge_agent.update import ModelState

journal = Journal(Path(sys.argv[1]))
journal.begin_run()
number = journal.generation
while True:
    number += 1
    journal.accept(AcceptedOrder(generation=number, etag=f"sha256:{number}", envelope=b"x" * 4096))
    journal.save(ModelState(model="kinds", order=number))
    print(number, journal.count("epoch"), flush=True)
"""


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.db")
    yield journal
    journal.close()


def full_state() -> ModelState:
    """A state with everything in it."""
    ref = ArtifactRef(digest_of(b"model"), 5)
    installed = Installed(
        slot="a",
        version=Version("1"),
        variant="default",
        files={"model.onnx": ref, "weights.bin": ref},
        onnx_file="model.onnx",
        manifest=ref,
        activated_at=2.0,
    )
    return ModelState(
        model=MODEL,
        stage=Stage.FETCHING,
        order=7,
        target=target_of(2, 7, base=1, ways=WAYS, max_bytes=9000, on_exceed="fail"),
        traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01",
        installed=installed,
        previous=installed,
        tally=Tally(strategy="delta", transport="mqtt", downloads={ref.digest: 9}, resumed_bytes=1),
        attempt=2,
        redownloads=1,
        strikes=1,
        refused=(digest_of(b"patch"),),
        refusal="patch not used: it is damaged",
        trouble="unavailable: no network",
        started_at=3.0,
        quarantine=(Quarantined(files=ref.digest, version=Version("0"), order=3, reason="unhealthy"),),
        last_update=UpdateReport(generation=6, version=Version("1"), outcome="succeeded"),
    )


def test_what_was_saved_is_loaded(journal: Journal) -> None:
    state = full_state()
    journal.save(ModelState(model=MODEL))
    journal.save(state)
    journal.save(ModelState(model=ModelName("other")))
    journal.forget(ModelName("other"))
    assert journal.load() == {MODEL: state}


def test_generations_never_go_back(journal: Journal) -> None:
    order = AcceptedOrder(generation=5, etag="sha256:5", envelope=b"five")
    journal.accept(order)
    for generation in (5, 4):
        with pytest.raises(Conflict):
            journal.accept(AcceptedOrder(generation=generation, etag="", envelope=b"older"))
    assert (journal.order, journal.generation) == (order, 5)


def test_a_run_that_was_not_ended_is_unclean(tmp_path: Path) -> None:
    verdicts = []
    for ends_well in (True, False, True):
        journal = Journal(tmp_path / "journal.db")
        verdicts.append(journal.begin_run().clean)
        if ends_well:
            journal.end_run()
        journal.close()
    assert verdicts == [True, True, False]


@pytest.mark.parametrize(
    "change", ['"stage":"fetching"->"stage":"teleporting"', '"order":7->"order":"seven"'], ids=["stage", "field"]
)
def test_a_row_of_a_newer_build_goes_back_to_the_installed_release(
    journal: Journal, tmp_path: Path, change: str
) -> None:
    state = full_state()
    journal.save(state)
    database = sqlite3.connect(tmp_path / "journal.db")
    old, new = change.split("->")
    database.execute("UPDATE models SET state = replace(state, ?, ?)", [old, new])
    database.commit()
    database.close()
    (salvaged,) = journal.load().values()
    assert salvaged == ModelState(model=MODEL, installed=state.installed)


def test_journals_of_the_first_release_are_read_for_ever(journal: Journal, tmp_path: Path) -> None:
    journal.save(ModelState(model=MODEL))
    database = sqlite3.connect(tmp_path / "journal.db")
    database.execute("UPDATE models SET state = ?", [GOLDEN.read_text()])
    database.commit()
    database.close()
    assert journal.load() == {MODEL: full_state()}


@pytest.mark.parametrize("dump", sorted(GOLDEN.parent.glob("journal-*.sql")), ids=lambda path: path.stem)
def test_whole_journals_of_every_format_are_read_for_ever(tmp_path: Path, dump: Path) -> None:
    connection = sqlite3.connect(tmp_path / "journal.db")
    connection.executescript(dump.read_text())
    connection.close()
    journal = Journal(tmp_path / "journal.db")
    assert journal.load() == {MODEL: full_state()}
    assert (journal.generation, journal.number("epoch")) == (7, 3)
    assert journal.order == AcceptedOrder(generation=7, etag="sha256:" + "0" * 64, envelope=b"{}")
    assert not journal.begin_run(boot=1).clean
    journal.close()


LATER_STAGES = (Stage.SHADOWING, Stage.REPLACING)
"""The first release of the agent did not have them."""


def states_of_every_kind() -> list[ModelState]:
    full = full_state()
    outcomes: tuple[Outcome, ...] = ("succeeded", "failed", "rolled_back", "rejected")
    reports = [replace(full, last_update=UpdateReport(generation=1, version=V1, outcome=one)) for one in outcomes]
    candidate = replace(full, stage=Stage.WARMING, candidate=full.installed)
    stages = [stage for stage in Stage if stage not in LATER_STAGES]
    return [*(replace(full, stage=stage) for stage in stages), *reports, candidate, ModelState(model=MODEL)]


@pytest.mark.parametrize("state", states_of_every_kind(), ids=lambda state: state.stage.value)
def test_the_first_release_of_the_agent_reads_what_this_one_writes(state: ModelState) -> None:
    """Until an update of the agent itself is committed, the old program may have to take over again."""
    read = msgspec.json.decode(msgspec.json.encode(state), type=reader_1.State)
    assert _is_part(msgspec.to_builtins(read), msgspec.to_builtins(state)), "nothing that it knew means something else"


@pytest.mark.parametrize("stage", LATER_STAGES)
def test_the_first_release_of_the_agent_cannot_take_a_stage_for_another_one(stage: Stage) -> None:
    """It goes back from a stage that it does not know, as any build does (see above)."""
    later = msgspec.json.encode(replace(full_state(), stage=stage))
    with pytest.raises(msgspec.ValidationError, match="stage"):
        msgspec.json.decode(later, type=reader_1.State)


def _is_part(known: object, whole: object) -> bool:
    """Whether `whole` says everything that `known` does, and perhaps more."""
    if isinstance(known, dict) and isinstance(whole, dict):
        return all(name in whole and _is_part(value, whole[name]) for name, value in known.items())
    if isinstance(known, list | tuple) and isinstance(whole, list | tuple):
        return len(known) == len(whole) and all(map(_is_part, known, whole))
    return known == whole


def test_what_a_later_format_adds_is_skipped(journal: Journal, tmp_path: Path) -> None:
    """Fields at every level, a table, a column and a version: all that a later build may add."""
    state = full_state()
    journal.save(state)
    database = sqlite3.connect(tmp_path / "journal.db")
    (text,) = database.execute("SELECT state FROM models").fetchone()
    objects = re.compile(r'(?<!"files":)(?<!"downloads":){')  # those two are maps
    database.execute("UPDATE models SET state = ?", [objects.sub('{"later":{"a":[1,null]},', text)])
    database.execute("CREATE TABLE later (x)")
    database.execute("ALTER TABLE orders ADD COLUMN later TEXT")
    database.execute("PRAGMA user_version = 9")
    database.commit()
    database.close()
    reopened = Journal(tmp_path / "journal.db")
    (read,) = reopened.load().values()
    reopened.close()
    assert read == state


def test_what_was_acknowledged_survives_being_killed(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    for lines in (1, 7, 20, 3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout
        for _ in range(lines):
            generation, epoch = map(int, child.stdout.readline().split())
        os.kill(child.pid, signal.SIGKILL)
        child.stdout.close()
        child.wait()
        journal = Journal(path)
        assert not journal.begin_run().clean
        order = journal.order
        assert order
        assert order.etag == f"sha256:{order.generation}"
        assert order.generation == journal.generation >= generation
        assert generation <= journal.load()[MODEL].order <= order.generation
        assert journal.number("epoch") >= epoch
        journal.close()
