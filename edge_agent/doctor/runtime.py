"""Whether ONNX Runtime works here: `python -m edge_agent.doctor.runtime` prints its version, or dies trying.

It runs in a process of its own because a runtime that was built for another processor ends its process (SIGILL), and
the doctor wants to live to tell.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from common.durable import write_file

DOUBLER = bytes.fromhex(
    "08083a350a0e0a01780a017812017922034164641201675a0f0a0178120a0a08080112040a020802620f0a0179120a0a08080112040a0208"
    "0242040a001011"
)
"""An ONNX model of one node: y = x + x, for two numbers."""


def main() -> None:
    """Run the model once."""
    from edge_agent.inference.ort import OrtEngine  # first: it keeps the runtime from telling its vendor

    import onnxruntime  # isort: skip

    with TemporaryDirectory() as folder:
        path = Path(folder) / "doubler.onnx"
        write_file(path, DOUBLER)
        session = OrtEngine().load(path)
        answer = session.run({"x": np.array([1, 2], np.float32)}, ["y"])["y"]
    if answer.tolist() != [2.0, 4.0]:
        raise SystemExit(f"1 + 1 and 2 + 2 are {answer.tolist()} here")
    sys.stdout.write(onnxruntime.__version__)


if __name__ == "__main__":
    main()
