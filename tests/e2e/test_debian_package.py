"""The Debian package from its build to its purge: in a clean root, and on a machine that its own systemd runs."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from controller.resources import CreateJoinToken
from tests.e2e import debian
from tests.e2e.debian import Machine, Root
from tests.e2e.world import World, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900), pytest.mark.xdist_group("debian")]

DEVICE = "cam-1"
STATE = "var/lib/ferry-agent"
SETTINGS = "etc/ferry-agent/agent.toml"
CONTENT = Path(__file__).read_bytes()
EXPOSURE_MAX = 2.0
"""Of 10, as `systemd-analyze security` counts; a service without any hardening has 9.6."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where the roots are. Not below pytest's own folder, which keeps what it holds for days."""
    debian.need("debootstrap")
    with tempfile.TemporaryDirectory(prefix="ferry-debian-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def packages(folder: Path) -> tuple[Path, Path]:
    """The package, and a later version of it."""
    first = debian.build_package(folder, folder / "tree", "1.0")
    return first, debian.build_package(folder, folder / "tree", "1.1")


@pytest.fixture(scope="module")
def clean(folder: Path) -> Root:
    return debian.bootstrap(folder / "clean")


@pytest.fixture(scope="module")
def installed(clean: Root, packages: tuple[Path, Path], folder: Path) -> Root:
    """A root with the package, not to be changed."""
    root = clean.copy(folder / "installed")
    root.install(packages[0])
    return root


@pytest.fixture
def root(installed: Root, folder: Path) -> Iterator[Root]:
    """A root with the package."""
    copy = installed.copy(folder / "machine")
    yield copy
    shutil.rmtree(copy.folder)


def listen_on_a_free_port(machine: Root | Machine) -> str:
    """As the device's owner would say it; returns the URL."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    (machine.folder / SETTINGS).write_text(f'inference_listen = "127.0.0.1:{port}"\n')
    return f"http://127.0.0.1:{port}"


def join(world: World, machine: Root | Machine) -> None:
    machine.run("ferry-agent", "join", world.client.create_join_token(CreateJoinToken()).join_string, "--name", DEVICE)


def live(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v2/health/live").status_code == 200
    except httpx.TransportError:
        return False


def test_in_a_clean_root_it_brings_what_it_needs_and_answers_as_its_own_user(
    root: Root, world: World, real_models: tuple[Path, Path]
) -> None:
    assert root.run("ferry-agent", "--version").startswith("ferry-agent ")
    assert "ferry-agent join" in root.run("ferry-agent", "status", ok=False)
    assert root.run("systemctl", "is-enabled", "ferry-agent").strip() == "enabled"
    assert not (root.folder / "opt/edgeferry/lib/python3.11/site-packages/controller").exists()

    url = world.urls[DEVICE] = listen_on_a_free_port(root)
    join(world, root)
    owners = root.run("stat", "--format", "%U %a", f"/{STATE}", f"/{STATE}/identity.json").split("\n")
    assert owners[:2] == ["ferry-agent 700", "ferry-agent 600"], "joined by root, owned by the service's user"

    as_its_user = ("setpriv", "--reuid=ferry-agent", "--regid=ferry-agent", "--clear-groups")
    command = root.command(*as_its_user, "ferry-agent", "run")
    with subprocess.Popen(command, env=debian.environment(), stderr=subprocess.DEVNULL) as agent:
        try:
            until(lambda: live(url), "it answers", world)
            world.roll_out("1", real_models[0])
            assert world.answer(DEVICE, CONTENT).version == "1"
            assert "content-type  1" in root.run("ferry-agent", "status")
        finally:
            agent.send_signal(signal.SIGTERM)
    assert agent.returncode == 0


def test_removing_keeps_the_state_and_purging_deletes_it(root: Root) -> None:
    (root.folder / STATE / "identity.json").write_text("who we are")
    (root.folder / SETTINGS).write_text("poll_s = 7\n")

    root.run("apt-get", "remove", "-y", "-qq", "edgeferry-agent")

    assert not (root.folder / "opt/edgeferry").exists()
    assert not os.path.lexists(root.folder / "usr/bin/ferry-agent")
    assert (root.folder / STATE / "identity.json").read_text() == "who we are"
    assert (root.folder / SETTINGS).read_text() == "poll_s = 7\n"

    root.run("apt-get", "purge", "-y", "-qq", "edgeferry-agent")

    assert not (root.folder / STATE).exists()
    assert not (root.folder / "etc/ferry-agent").exists()
    left = root.run("find", "/etc/systemd", "/usr/lib/systemd", "-name", "ferry-agent*").split()
    assert left == []


def test_under_systemd_it_serves_survives_a_hang_and_an_upgrade_and_stops_when_removed(
    root: Root, world: World, packages: tuple[Path, Path], real_models: tuple[Path, Path]
) -> None:
    """The unit's sandbox is on: what the agent may not do there, it does not need."""
    override = root.folder / "etc/systemd/system/ferry-agent.service.d/sooner.conf"
    override.parent.mkdir()
    override.write_text("[Service]\nWatchdogSec=2\nRestartSec=1\n")
    with root.booted() as machine:
        assert machine.property("ActiveState") == "inactive", "it has no fleet yet"
        url = world.urls[DEVICE] = listen_on_a_free_port(machine)
        join(world, machine)
        machine.run("systemctl", "start", "ferry-agent")
        assert live(url), "systemctl returns when it serves"
        world.roll_out("1", real_models[0])
        until(lambda: machine.property("StatusText") == f"{DEVICE} serves content-type@1; connected", "it says so")

        machine.run("systemctl", "kill", "--signal=STOP", "ferry-agent")
        until(lambda: machine.property("NRestarts") == "1", "the watchdog has it restarted", world)
        until(lambda: live(url), "it answers again", world)
        assert world.answer(DEVICE, CONTENT).version == "1"

        before = machine.property("MainPID")
        machine.install(packages[1])
        until(lambda: machine.property("MainPID") not in {before, "0"} and live(url), "the new agent answers", world)
        assert world.answer(DEVICE, CONTENT).version == "1", "with what the old one had installed"
        assert url.removeprefix("http://") in (machine.folder / SETTINGS).read_text(), "settings are the owner's"
        world.roll_out("2", real_models[1])
        assert world.answer(DEVICE, CONTENT).version == "2"

        machine.run("apt-get", "purge", "-y", "-qq", "edgeferry-agent")
        assert not live(url)
        assert not (machine.folder / STATE).exists()


def test_the_unit_is_sound_and_gives_little_away(root: Root) -> None:
    debian.need("systemd-analyze")
    unit = ("ferry-agent.service", f"--root={root.folder}")
    assert debian.checked("systemd-analyze", "verify", *unit) == ""
    told = debian.checked("systemd-analyze", "security", "--offline=true", *unit)
    exposure = float(told.rpartition("exposure level for ferry-agent.service:")[2].split()[0])
    assert exposure <= EXPOSURE_MAX, told
