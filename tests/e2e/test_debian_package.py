"""The Debian package from its build to its purge: in a clean root, and on a machine that its own systemd runs."""

import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from controller.resources import CreateJoinToken
from tests.e2e import debian
from tests.e2e.debian import Root
from tests.e2e.world import World, until

pytestmark = [pytest.mark.e2e, pytest.mark.package, pytest.mark.timeout(1500), pytest.mark.xdist_group("debian")]

DEVICE = "cam-1"
STATE = "var/lib/ferry-agent"
SETTINGS = "etc/ferry-agent/agent.toml"
CONTENT = Path(__file__).read_bytes()
EXPOSURE_MAX = 2.0
"""Of 10, as `systemd-analyze security` counts; a service without any hardening has 9.6."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where the machine is. Not below pytest's own folder, which keeps what it holds for days."""
    debian.need("debootstrap")
    with tempfile.TemporaryDirectory(prefix="ferry-debian-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def made(folder: Path) -> tuple[Root, Path, Path]:
    """A clean root, the package, and a later version of it. Root and package are made at the same time."""
    with ThreadPoolExecutor(1) as beside:
        clean = beside.submit(debian.bootstrap, folder / "machine")
        first = debian.build_package(folder, folder / "tree", "1.0")
        later = debian.build_package(folder, folder / "tree", "1.1")
        return clean.result(), first, later


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    without_patches = {"FERRY_PATCH_CPU_S_PER_RELEASE": "0"}  # they take long to build, and are not the matter here
    world = World(tmp_path_factory.mktemp("fleet"), without_patches)
    try:
        world.start()
        yield world
    finally:
        world.stop()


@pytest.fixture(scope="module")
def root(made: tuple[Root, Path, Path]) -> Root:
    """The machine of all tests here, in the order of its life."""
    root, package, _ = made
    root.install(package)
    return root


@pytest.fixture(scope="module")
def joined(root: Root, fleet: World) -> Root:
    """The machine, in a fleet; the agent has a port of its own."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    (root.folder / SETTINGS).write_text(f'inference_listen = "127.0.0.1:{port}"\n')
    fleet.urls[DEVICE] = f"http://127.0.0.1:{port}"
    root.run("ferry-agent", "join", fleet.client.create_join_token(CreateJoinToken()).join_string, "--name", DEVICE)
    return root


def live(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v2/health/live").status_code == 200
    except httpx.TransportError:
        return False


def test_in_a_clean_root_it_brings_what_it_needs(root: Root) -> None:
    assert root.run("ferry-agent", "--version").startswith("ferry-agent ")
    told = root.run("ferry-agent", "doctor", ok=False)
    assert "this device has not joined a fleet" in told
    assert "do: run `ferry-agent join" in told
    assert "ok       runtime      ONNX Runtime" in told
    assert root.run("systemctl", "is-enabled", "ferry-agent").strip() == "enabled"
    assert not list((root.folder / "opt/edgeferry").glob("lib/*/site-packages/controller"))


def test_the_unit_is_sound_and_gives_little_away(root: Root) -> None:
    debian.need("systemd-analyze")
    unit = ("ferry-agent.service", f"--root={root.folder}")
    assert debian.checked("systemd-analyze", "verify", *unit) == ""
    told = debian.checked("systemd-analyze", "security", "--offline=true", *unit)
    exposure = float(told.rpartition("exposure level for ferry-agent.service:")[2].split()[0])
    assert exposure <= EXPOSURE_MAX, told


def test_joined_by_root_it_answers_as_its_own_user(joined: Root, fleet: World, real_models: tuple[Path, Path]) -> None:
    owners = joined.run("stat", "--format", "%U %a", f"/{STATE}", f"/{STATE}/identity.json").split("\n")
    assert owners[:2] == ["ferry-agent 700", "ferry-agent 600"]

    as_its_user = ("setpriv", "--reuid=ferry-agent", "--regid=ferry-agent", "--clear-groups")
    command = joined.command(*as_its_user, "ferry-agent", "run")
    with subprocess.Popen(command, env=debian.environment(), stderr=subprocess.DEVNULL) as agent:
        try:
            until(lambda: live(fleet.urls[DEVICE]), "it answers", fleet)
            fleet.roll_out("1", real_models[0])
            assert fleet.answer(DEVICE, CONTENT).version == "1"
            joined.run("ferry-agent", "doctor")
            assert "content-type  1" in joined.run("ferry-agent", "status")
        finally:
            agent.send_signal(signal.SIGTERM)
    assert agent.returncode == 0


def test_under_systemd_it_serves_from_the_boot_and_survives_a_hang_and_an_upgrade(
    joined: Root, fleet: World, made: tuple[Root, Path, Path], real_models: tuple[Path, Path]
) -> None:
    """The unit's sandbox is on: what the agent may not do there, it does not need."""
    url = fleet.urls[DEVICE]
    override = joined.folder / "etc/systemd/system/ferry-agent.service.d/sooner.conf"
    override.parent.mkdir()
    override.write_text("[Service]\nWatchdogSec=5\nRestartSec=1\n")
    with joined.booted() as machine:
        assert machine.property("ActiveState") == "active", "the boot is over when it serves"
        assert live(url)
        fleet.roll_out("1", real_models[0])
        until(lambda: machine.property("StatusText") == f"{DEVICE} serves content-type@1; connected", "it says so")

        machine.run("systemctl", "kill", "--signal=STOP", "ferry-agent")
        until(lambda: machine.property("NRestarts") != "0", "the watchdog has it restarted", fleet)
        until(lambda: live(url), "it answers again", fleet)
        assert fleet.answer(DEVICE, CONTENT).version == "1"

        before = machine.property("MainPID")
        machine.install(made[2])
        until(lambda: machine.property("MainPID") not in {before, "0"} and live(url), "the new agent answers", fleet)
        assert fleet.answer(DEVICE, CONTENT).version == "1", "with what the old one had installed"
        fleet.roll_out("2", real_models[1])
        assert fleet.answer(DEVICE, CONTENT).version == "2"

        machine.run("apt-get", "remove", "-y", "-qq", "edgeferry-agent")
        assert not live(url)
        machine.install(made[1])
        until(lambda: live(url), "installed again, it is the same device", fleet)
        assert fleet.answer(DEVICE, CONTENT).version == "2"


def test_upgrading_and_removing_keep_state_and_settings_and_purging_deletes_them(
    joined: Root, made: tuple[Root, Path, Path]
) -> None:
    identity, settings = joined.folder / STATE / "identity.json", joined.folder / SETTINGS
    before = identity.read_bytes(), settings.read_bytes()
    joined.install(made[2])
    assert "1.1" in joined.run("dpkg-query", "--show", "edgeferry-agent")
    assert (identity.read_bytes(), settings.read_bytes()) == before

    joined.run("apt-get", "remove", "-y", "-qq", "edgeferry-agent")
    assert not (joined.folder / "opt/edgeferry").exists()
    assert not os.path.lexists(joined.folder / "usr/bin/ferry-agent")
    assert (identity.read_bytes(), settings.read_bytes()) == before

    joined.run("apt-get", "purge", "-y", "-qq", "edgeferry-agent")
    assert not (joined.folder / STATE).exists()
    assert not (joined.folder / "etc/ferry-agent").exists()
    found = ("find", "/etc/systemd", "/usr/lib/systemd", "/var/lib/systemd", "-name", "ferry-agent.service*")
    assert joined.run(*found, "-not", "-type", "d").split() == []
