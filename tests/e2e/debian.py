"""Debian machines for tests: a root from debootstrap to install into, and the same root booted with its own systemd.

Both share this machine's network, so a controller on 127.0.0.1 can be joined from inside. What cannot be had here
(no root, no debootstrap, a kernel that lets no second systemd run) is a skip that says what is missing.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND_S = 600.0
BOOT_S = 60.0
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
PROXIES = ("http_proxy", "https_proxy", "no_proxy")
IN_NAMESPACES = ("--mount", "--pid", "--uts", "--ipc", "--root", "--wd=/")


def need(*programs: str) -> None:
    """Skip unless this is root on a machine with these programs."""
    if os.geteuid() != 0:
        pytest.skip("only root may make a Debian root")
    for program in programs:
        if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
            pytest.skip(f"{program} is not installed here")


def checked(*command: str | Path, environment: dict[str, str] | None = None, ok: bool = True) -> str:
    """Run a command to its end; its output. The test fails unless it ends as said: well, or (`ok=False`) not."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment,
        timeout=COMMAND_S,
        check=False,
    )
    if (done.returncode == 0) != ok:
        pytest.fail(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def build_package(output: Path, tree: Path, version: str) -> Path:
    """`make deb`; a `tree` that is there already is packed again."""
    command = (sys.executable, ROOT / "deploy/debian/build.py", "--tree", tree, "--version", version)
    return Path(checked(*command, "--output", output).strip().rpartition("\n")[2])


def bootstrap(folder: Path) -> "Root":
    """A minimal Debian of this machine's own release, from this machine's own mirror, without Python."""
    need("debootstrap", "apt-get", "unshare")
    form = ("--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages", "Component: main", "Origin: Debian")
    listed = checked("apt-get", "indextargets", *form).split("\n")
    release = checked("sh", "-c", ". /etc/os-release; echo $VERSION_CODENAME").strip()
    mirrors = [uri for uri, _, codename in (line.partition(" ") for line in listed) if codename == release]
    if not mirrors:
        pytest.skip("apt knows no mirror of Debian here")
    # In mounts of its own: one that is interrupted leaves no /proc behind for whoever removes the folder.
    alone = ("unshare", "--mount", "debootstrap", "--variant=minbase", "--include=systemd-sysv")
    checked(*alone, release, folder, mirrors[0])
    (folder / "etc/dpkg/dpkg.cfg.d/in-a-hurry").write_text("force-unsafe-io\n")
    root = Root(folder)
    offered = root.run("sh", "-c", "apt-get update -qq && apt-cache depends python3 | head -3")
    if f"python3.{sys.version_info[1]}" not in offered:
        pytest.skip(f"this Python builds packages for another Debian than {release}")
    return root


class Root:
    """The file system of a machine that does not run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def command(self, *command: str | Path) -> list[str]:
        """The words that run `command` inside, with a /proc of its own."""
        inside = 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
        return [*map(str, ("unshare", "--mount", "sh", "-c", inside, self.folder, *command))]

    def run(self, *command: str | Path, ok: bool = True) -> str:
        """Run a command inside, as root; see `checked`."""
        return checked(*self.command(*command), environment=environment(), ok=ok)

    def install(self, package: Path) -> str:
        """As `apt install ./package.deb` does, what it needs included."""
        return _install(self, package)

    @contextmanager
    def booted(self) -> Iterator["Machine"]:
        """The machine runs, with its systemd as its first process."""
        need("systemd-nspawn", "nsenter")
        log = self.folder.with_name(f"{self.folder.name}.boot.log")
        boot = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot", "-D", str(self.folder)]
        with log.open("wb") as out, subprocess.Popen(boot, stdin=subprocess.DEVNULL, stdout=out, stderr=out) as nspawn:
            try:
                yield Machine(self.folder, _first_process(nspawn, log))
            finally:
                for leader in _children(nspawn):  # the kernel ends everything inside with its first process
                    os.kill(leader, signal.SIGKILL)
                nspawn.terminate()


class Machine:
    """A machine that runs; `leader` is its first process, as seen from here."""

    def __init__(self, folder: Path, leader: int) -> None:
        self.folder = folder
        self._leader = leader

    def run(self, *command: str | Path, ok: bool = True) -> str:
        """Run a command inside, as root; see `checked`."""
        inside = ("nsenter", "--target", str(self._leader), *IN_NAMESPACES)
        return checked(*inside, *command, environment=environment(), ok=ok)

    def install(self, package: Path) -> str:
        """As `Root.install`."""
        return _install(self, package)

    def property(self, name: str) -> str:
        """A property of the agent's unit."""
        return self.run("systemctl", "show", "--value", "--property", name, "ferry-agent").strip()


def environment() -> dict[str, str]:
    """For commands inside: nothing of ours but how the network is reached."""
    return ENVIRONMENT | {name: os.environ[name] for name in PROXIES if name in os.environ}


def _install(machine: Root | Machine, package: Path) -> str:
    inside = machine.folder / "var/tmp" / package.name
    shutil.copy(package, inside)
    try:
        return machine.run("apt-get", "install", "-y", "-qq", f"/var/tmp/{package.name}")
    finally:
        inside.unlink()


def _children(process: "subprocess.Popen[bytes]") -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout
    return [int(pid) for pid in found.split()]


def _first_process(nspawn: "subprocess.Popen[bytes]", log: Path) -> int:
    """Wait until the systemd inside is up."""
    deadline = time.monotonic() + BOOT_S
    while nspawn.poll() is None and time.monotonic() < deadline:
        for leader in _children(nspawn):
            inside = ("nsenter", "--target", str(leader), *IN_NAMESPACES, "systemctl", "is-system-running", "--wait")
            state = subprocess.run(inside, capture_output=True, text=True, timeout=BOOT_S, check=False).stdout
            if state.strip() in {"running", "degraded"}:
                return leader
        time.sleep(0.2)
    pytest.skip(f"systemd does not boot in a container here: {log.read_text(errors='replace')[-500:]}")
