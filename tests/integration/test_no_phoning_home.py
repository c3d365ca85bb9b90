"""The runtime's own telemetry, on by default in its official builds, stays off on a device.

It shows itself by a session file in the temporary folder before anything is sent; the test runs without the variables
that would hide it from a developer or a CI machine.
"""

import os
import subprocess
import sys
from pathlib import Path

LOAD = """
import sys
from pathlib import Path
from edge_agent.inference.ort import OrtEngine
OrtEngine().load(Path(sys.argv[1])).close()
"""
HIDING = {"CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS"}


def test_loading_a_model_starts_no_telemetry(real_models: tuple[Path, Path], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in HIDING} | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", LOAD, str(real_models[0])], env=environment, check=True, timeout=60)
    assert [entry.name for entry in tmp_path.iterdir()] == []
