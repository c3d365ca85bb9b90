"""The agent's memory: on the disk when a method returns, readable by this build or gone back from, never going back."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlite_utils import Database

from common.artifact import ArtifactRef, digest_of
from common.errors import Conflict
from common.ids import ModelName, Version
from common.wire import UpdateReport
from edge_agent.journal import AcceptedOrder, Journal
from edge_agent.update import Installed, ModelState, Quarantined, Stage, Tally
from tests.property.update_world import WAYS, target_of

MODEL = ModelName("kinds")
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
    database = Database(tmp_path / "journal.db")
    old, new = change.split("->")
    database.execute("UPDATE models SET state = replace(state, ?, ?)", [old, new])
    database.conn.commit()
    database.close()
    (salvaged,) = journal.load().values()
    assert salvaged == ModelState(model=MODEL, installed=state.installed)


def test_journals_of_the_first_release_are_read_for_ever(journal: Journal, tmp_path: Path) -> None:
    journal.save(ModelState(model=MODEL))
    database = Database(tmp_path / "journal.db")
    database.execute("UPDATE models SET state = ?", [GOLDEN.read_text()])
    database.conn.commit()
    database.close()
    assert journal.load() == {MODEL: full_state()}


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
