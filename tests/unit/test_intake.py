"""Messages from devices, in every unlucky order: what counts, what is history, what is refused."""

import pytest
from msgspec.structs import replace

from common.errors import InvalidInput
from common.ids import DeviceId
from common.wire import Heartbeat, Presence, ReportedState
from controller.devices import Device
from controller.intake import apply_heartbeat, apply_presence, apply_reported
from tests.simulation.device import CAPABILITIES
from tests.simulation.memory import MemoryTransaction
from tests.unit.fleet import V2, device, saying

NAME = DeviceId("d0")
LATER = 2_000_000.0


@pytest.fixture
def tx() -> MemoryTransaction:
    transaction = MemoryTransaction()
    transaction.devices.put(Device(id=NAME, created_at=0))
    return transaction


def known(tx: MemoryTransaction) -> Device:
    return tx.devices.rows[NAME]


def kinds(tx: MemoryTransaction) -> list[str]:
    return [event.kind for event in tx.journal.events]


def birth(epoch: int = 1) -> Presence:
    return Presence(device=NAME, epoch=epoch, seq=0, sent_at=0, online=True, capabilities=CAPABILITIES)


def death(epoch: int = 1) -> Presence:
    return Presence(device=NAME, epoch=epoch, seq=0, sent_at=0, online=False)


def heartbeat(epoch: int = 1, seq: int = 1) -> Heartbeat:
    return Heartbeat(
        device=NAME,
        epoch=epoch,
        seq=seq,
        sent_at=0,
        uptime_s=1,
        load_1m=0,
        cpu_percent=0,
        memory_bytes=0,
        memory_available_bytes=0,
        disk_bytes=0,
        disk_free_bytes=0,
        generation=0,
        running={},
    )


def report(epoch: int = 1, seq: int = 1, generation: int = 1) -> ReportedState:
    words = saying(device(), generation=generation, running=V2, outcome="succeeded").reported
    assert words is not None
    return replace(words, epoch=epoch, seq=seq)


def test_a_birth_brings_a_device_online_with_what_it_can_do(tx: MemoryTransaction) -> None:
    assert apply_presence(tx.view, NAME, birth(), LATER)
    assert (known(tx).connected, known(tx).epoch, known(tx).last_seen) == (True, 1, LATER)
    assert known(tx).capabilities == CAPABILITIES
    assert kinds(tx) == ["device.online"]


def test_a_birth_that_comes_again_is_no_sign_of_life(tx: MemoryTransaction) -> None:
    apply_presence(tx.view, NAME, birth(), LATER)
    assert not apply_presence(tx.view, NAME, birth(), LATER + 100)
    assert known(tx).last_seen == LATER


def test_a_death_ends_its_own_connection_only(tx: MemoryTransaction) -> None:
    apply_presence(tx.view, NAME, birth(2), LATER)
    assert not apply_presence(tx.view, NAME, death(1), LATER)
    assert known(tx).connected
    assert apply_presence(tx.view, NAME, death(2), LATER)
    assert not known(tx).connected
    assert not apply_presence(tx.view, NAME, death(2), LATER)
    assert kinds(tx) == ["device.online", "device.offline"]


def test_a_birth_that_its_death_has_overtaken_is_history(tx: MemoryTransaction) -> None:
    apply_presence(tx.view, NAME, birth(1), LATER)
    apply_presence(tx.view, NAME, death(2), LATER)
    assert not apply_presence(tx.view, NAME, birth(2), LATER)
    assert not known(tx).connected
    assert apply_presence(tx.view, NAME, birth(3), LATER)
    assert known(tx).connected


def test_a_heartbeat_counts_once_and_in_order(tx: MemoryTransaction) -> None:
    apply_presence(tx.view, NAME, birth(), LATER)
    assert apply_heartbeat(tx.view, NAME, heartbeat(seq=5), LATER + 10)
    assert not apply_heartbeat(tx.view, NAME, heartbeat(seq=5), LATER + 20)
    assert not apply_heartbeat(tx.view, NAME, heartbeat(seq=4), LATER + 20)
    assert known(tx).last_seen == LATER + 10


def test_a_heartbeat_stands_in_for_a_birth_that_was_lost(tx: MemoryTransaction) -> None:
    assert apply_heartbeat(tx.view, NAME, heartbeat(epoch=3), LATER)
    assert (known(tx).connected, known(tx).epoch) == (True, 3)
    assert kinds(tx) == ["device.online"]


def test_a_heartbeat_from_before_a_death_does_not_raise_the_dead(tx: MemoryTransaction) -> None:
    apply_presence(tx.view, NAME, birth(), LATER)
    apply_presence(tx.view, NAME, death(), LATER)
    assert not apply_heartbeat(tx.view, NAME, heartbeat(), LATER + 1)
    assert not known(tx).connected


def test_a_report_counts_once_and_in_order(tx: MemoryTransaction) -> None:
    assert apply_reported(tx.view, NAME, report(seq=2, generation=7), LATER)
    assert not apply_reported(tx.view, NAME, report(seq=2, generation=7), LATER + 9)
    assert not apply_reported(tx.view, NAME, report(seq=1, generation=6), LATER + 9)
    assert known(tx).reported == report(seq=2, generation=7)
    assert known(tx).last_seen == LATER


def test_an_update_that_finished_is_an_event_once(tx: MemoryTransaction) -> None:
    apply_reported(tx.view, NAME, report(seq=1), LATER)
    apply_reported(tx.view, NAME, report(seq=2), LATER)
    apply_reported(tx.view, NAME, report(seq=3, generation=4), LATER)
    assert kinds(tx).count("update.finished") == 2
    finished = tx.journal.events[1]
    assert (finished.data["release"], finished.data["outcome"]) == ("m@2", "succeeded")


def test_a_message_of_another_or_an_unknown_device_is_refused(tx: MemoryTransaction) -> None:
    with pytest.raises(InvalidInput, match="sent a message of 'd0'"):
        apply_presence(tx.view, DeviceId("d9"), birth(), LATER)
    with pytest.raises(InvalidInput, match="unknown device"):
        apply_presence(MemoryTransaction().view, NAME, birth(), LATER)
