"""`python -m benchmarks.agent.ours FILE INPUTS PORT`: serves one ONNX file as the agent does, with the agent's parts.

INPUTS are its declared inputs (`TensorSpec`s as JSON).

It is the agent without a controller: the same engine, queue, HTTP API and event loop.
"""

import asyncio
import sys
from pathlib import Path

import msgspec

from common.artifact import TensorSpec
from common.clock import SystemClock
from common.ids import ModelName, Version
from edge_agent.inference.http import inference_app
from edge_agent.inference.listening import listen
from edge_agent.inference.ort import OrtEngine
from edge_agent.inference.serving import ModelServer
from edge_agent.telemetry.recorder import Recorder

MODEL = ModelName("model")


async def serve(path: Path, inputs: tuple[TensorSpec, ...], port: int) -> None:
    """Serve until the process is ended."""
    clock = SystemClock()
    server = ModelServer(OrtEngine(), Recorder(clock.now()), clock)
    await place(server, path, inputs, "1")
    await listen(inference_app(server), "127.0.0.1", port)
    await asyncio.Event().wait()


async def place(server: ModelServer, path: Path, inputs: tuple[TensorSpec, ...], version: str) -> None:
    """Let `server` answer with the file at `path` from now on."""
    outputs = OrtEngine().load(path).outputs
    server.switch(await server.prepare(MODEL, Version(version), path, inputs, outputs))
    await server.commit(MODEL)


if __name__ == "__main__":
    declared = msgspec.json.decode(sys.argv[2], type=tuple[TensorSpec, ...])
    asyncio.run(serve(Path(sys.argv[1]), declared, int(sys.argv[3])))
