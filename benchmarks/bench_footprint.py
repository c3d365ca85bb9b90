"""What an agent takes of a device: disk, memory and CPU while nobody asks, and how long it takes to its first answer.

The agent is installed as a user does it, `pip install "edgeferry[agent]"` into a fresh virtual environment, joins a
real controller, and is given a model of a few bytes, so that what is measured is the agent. Memory is PSS
(`/proc/PID/smaps_rollup`): its own pages and its share of those that other processes have mapped too. CPU is the
process's time over a minute in which it is connected, sends heartbeats and telemetry, and polls.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import psutil
from onnx import TensorProto, helper, save_model

from benchmarks.report import ROOT, Row, at_most, figure, quick, write
from common.artifact.manifest import DEFAULT_VARIANT
from common.ids import ReleaseRef
from controller.cli.demo.fleet import Fleet
from controller.client import FerryClient
from controller.resources import CreateJoinToken
from controller.rollouts.model import PhaseSpec, RolloutSpec, RolloutState
from edge_agent.running import RUN_FILE, Run

COMMAND = "make bench-footprint"
DEVICE, MODEL = "device", "doubler"
MB = 1e6
SETTLE_S = 5.0
IDLE_S = 15.0 if quick() else 60.0
STARTS = 3 if quick() else 9
WITHIN_S = 120.0
LARGEST = 8
"""As many packages are named in the table."""

_INTRO = """
An agent that was installed with `pip install "edgeferry[agent]"`, joined to a real controller, with a model of one
node.
`byte code` is what Python makes of the sources of what it imports and pip of all of them; the Debian package leaves out
what a device does not need. Memory is PSS. A start is measured from the start of the process to the first answered
inference, with the installed model verified and loaded on the way; the CPU figure beside it does not depend on how busy
the machine was.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        program = install(folder / "venv")
        rows = [*sizes(folder / "venv"), package_size(folder)]
        with joined(folder) as data:
            rows += idle(program, data)
            rows += starts(program, data)
    write("footprint", "What an agent takes of a device", rows, _INTRO)


def install(venv: Path) -> Path:
    """A fresh environment with the agent in it; returns the program."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin/python"), "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", f"{ROOT}[agent]"], check=True, stderr=subprocess.DEVNULL)
    return venv / "bin/ferry-agent"


def sizes(venv: Path) -> list[Row]:
    """Bytes of the files, in all and of the largest packages."""
    (packages,) = venv.glob("lib/python3.*/site-packages")
    every = sum_of(venv)
    compiled = sum(sum_of(folder) for folder in venv.rglob("__pycache__"))
    largest = sorted(((sum_of(entry), entry.name) for entry in packages.iterdir()), reverse=True)[:LARGEST]
    return [
        at_most(
            "installed by pip, without byte code", 170, measured=(every - compiled) / MB, unit="MB", command=COMMAND
        ),
        figure("installed by pip, with byte code", measured=every / MB, unit="MB", command=COMMAND),
        *(figure(f"of that {name}", measured=size / MB, unit="MB", command=COMMAND) for size, name in largest),
    ]


def package_size(folder: Path) -> Row:
    """Bytes that the Debian package takes once it is unpacked."""
    tree = folder / "tree"
    build = [sys.executable, str(ROOT / "deploy/debian/build.py"), "--tree", str(tree), "--output", str(folder)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return at_most("Debian package, with byte code", 170, measured=sum_of(tree) / MB, unit="MB", command=COMMAND)


def sum_of(path: Path) -> int:
    """Bytes of the files at or below `path`; links are not followed."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir() or file.is_symlink())


@contextmanager
def joined(folder: Path) -> Iterator[Path]:
    """A data folder of a device that runs the model, and its controller, which goes on running meanwhile."""
    fleet = Fleet(folder / "fleet", (DEVICE,), "", 0)
    fleet.folder.mkdir()
    try:
        endpoint = fleet.start_controller()
        client = FerryClient(endpoint.url, endpoint.token)
        fleet.join(DEVICE, client.create_join_token(CreateJoinToken()).join_string)
        fleet.start_agent(DEVICE)
        client.publish(MODEL, "1", {DEFAULT_VARIANT: doubler(folder / "doubler.onnx")})
        release = ReleaseRef.parse(f"{MODEL}@1")
        spec = RolloutSpec(release=release, phases=(PhaseSpec(percent=100),), probation_s=0.5, bake_s=0.2)
        rollout = client.create_rollout(spec).id
        until(lambda: client.rollout(rollout).state is RolloutState.SUCCEEDED)
        fleet.agents[DEVICE].stop()
        yield fleet.data_of(DEVICE)
    finally:
        fleet.stop()


def doubler(path: Path) -> Path:
    """y = x + x, for two numbers."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", [x], [y])
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def idle(program: Path, data: Path) -> list[Row]:
    """Memory and CPU of a connected agent that nobody asks anything."""
    with agent(program, data) as process:
        until(lambda: httpx.get(f"{url(data)}/status").json()["connected"])
        time.sleep(SETTLE_S)
        before, began = cpu_s(process), time.monotonic()
        time.sleep(IDLE_S)
        busy = (cpu_s(process) - before) / (time.monotonic() - began)
        pss = pss_bytes(process.pid)
    return [
        at_most("memory while idle (PSS)", 85, measured=pss / MB, unit="MB", command=COMMAND),
        at_most("CPU while idle", 1, measured=busy * 100, unit="% of a core", command=COMMAND),
    ]


def starts(program: Path, data: Path) -> list[Row]:
    """From the start of the process to its first answer, again and again; the medians."""
    took_s, spent_s = [], []
    for _ in range(STARTS):
        began = time.monotonic()
        with agent(program, data) as process:
            until(lambda: answers(data), poll_s=0.005)
            took_s.append(time.monotonic() - began)
            spent_s.append(cpu_s(process))
    return [
        at_most("start to first answer", 1.5, measured=statistics.median(took_s), unit="s", command=COMMAND),
        figure("CPU time of it", measured=statistics.median(spent_s), unit="s", command=COMMAND),
    ]


@contextmanager
def agent(program: Path, data: Path) -> Iterator[psutil.Process]:
    """A running agent, for the time of the block."""
    command = [str(program), "run", "--data", str(data), "--inference-listen", "127.0.0.1:0"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("FERRY_", "PYTHON"))}
    with subprocess.Popen(command, env=clean, stderr=subprocess.DEVNULL) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)


def answers(data: Path) -> bool:
    """Whether the model answers now."""
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}
    try:
        answer = httpx.post(f"{url(data)}/v2/models/{MODEL}/infer", json=body)
    except (FileNotFoundError, httpx.TransportError):
        return False
    return answer.status_code == 200 and answer.json()["outputs"][0]["data"] == [2, 4]


def url(data: Path) -> str:
    """Where the agent on the folder answers; FileNotFoundError while it does not."""
    return msgspec.json.decode((data / RUN_FILE).read_bytes(), type=Run).inference_url


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def pss_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("Pss:"))
    return int(kilobytes) * 1024


def until(condition: Callable[[], object], poll_s: float = 0.1) -> None:
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + WITHIN_S
    while True:
        try:
            if condition():
                return
        except (FileNotFoundError, httpx.TransportError):
            pass  # it does not listen yet
        if time.monotonic() > deadline:
            raise TimeoutError("it did not come about")
        time.sleep(poll_s)


if __name__ == "__main__":
    main()
