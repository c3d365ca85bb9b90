"""The agent inside an application: the same updates and the same engine, without HTTP in between.

`Device` runs a joined device's agent on a thread of its own and answers requests in the caller's process. `infer` runs
on the caller's thread when a core is free; `infer_async` is for coroutines on any loop. The inference API listens as
well, for other programs. One program at a time uses a data folder, so a device has either `ferry-agent run` or this.

    with Device() as device:
        answer = device.infer("magika", {"bytes": rows})
        print(answer.version, answer.outputs["target_label"])
"""

import asyncio
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from common.artifact.tensors import Array
from common.errors import Conflict
from common.ids import ModelName, Version
from edge_agent.app import Agent
from edge_agent.config import AgentSettings, load_settings
from edge_agent.identity import load_identity
from edge_agent.inference.labels import Label, Labelled, Scalar
from edge_agent.inference.requests import Inference, Terms
from edge_agent.inference.serving import ModelServer, Served
from edge_agent.inference.sides import Wish
from edge_agent.running import sole_user


class Device:
    """The agent of the device whose files are in `data`, joined with `ferry-agent join`.

    `settings` are those of docs/reference/agent.md, as strings; environment and file count as for `ferry-agent run`.
    All methods may be called from any thread, between `start` and `close`.
    """

    def __init__(self, data: Path | str | None = None, **settings: str) -> None:
        flags = {**settings, "data": None if data is None else str(data)}
        self._settings: AgentSettings = load_settings(flags, os.environ)
        self._agent: Agent | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Serve what is installed and connect. Raises what keeps the agent from starting: `NotFound` for a device that
        has not joined, `Conflict` when another program uses the folder, `Unavailable` when a port is taken.
        """
        if self._thread:
            raise Conflict("this device runs already", fix="close it first")
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="ferry-agent", daemon=True)
        self._thread.start()
        try:
            started.result()
        except BaseException:
            self._thread.join()
            self._thread = None
            raise

    def close(self) -> None:
        """Answer what is under way, then stop. Nothing to do when it does not run."""
        if self._thread and self._loop:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
        self._thread = self._loop = self._agent = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        version: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        parameters: Mapping[str, Any] | None = None,
        side: Literal["", "candidate", "stable"] = "",
        key: str = "",
        request_id: str = "",
    ) -> Inference:
        """The answer to `inputs` (name to array of the declared type and shape), with the version that gave it.

        `outputs` picks some by name; `priority` is 1 (first) to 9, 0 the default; a request that could not be started
        within `timeout_s` never is; `parameters` are for the rules of the release; with a `request_id` the answer can
        be given its `label` later. While an update splits the requests, `side` says who shall answer this one, and all
        with the same `key` are answered by the same side.

        Raises `NotFound`, `InvalidInput`, `Overloaded`, `DeadlineExceeded` and `EngineFailure`, as `ModelServer.infer`
        does.
        """
        named = ModelName(model), Version(version) if version else None
        terms = Terms(priority, timeout_s, parameters or {}, Wish(side, key))
        answer = self._server().infer_here(*named, inputs, outputs, terms)
        self._running().labels.remember(named[0], request_id, answer)
        return answer

    async def infer_async(
        self,
        model: str,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        version: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        parameters: Mapping[str, Any] | None = None,
        side: Literal["", "candidate", "stable"] = "",
        key: str = "",
        request_id: str = "",
    ) -> Inference:
        """`infer` for coroutines, on any event loop. Cancelling it takes a request that waits along."""
        named = ModelName(model), Version(version) if version else None
        terms = Terms(priority, timeout_s, parameters or {}, Wish(side, key))
        answer = await asyncio.wrap_future(self._server().submit(*named, inputs, outputs, terms))
        self._running().labels.remember(named[0], request_id, answer)
        return answer

    def label(
        self,
        model: str,
        request_id: str,
        label: Scalar | Sequence[Scalar],
        *,
        output: str = "",
        tolerance: float | None = None,
        version: str | None = None,
    ) -> Labelled:
        """Say what was right for the request `request_id`: the class, the text or the number, one or one for each row.

        `output` may be left out where only one could be meant; a number is right within `tolerance`. Labelling again
        counts nothing. Raises `NotFound` for an answer that is not remembered (any more), or that another release than
        `version` gave, and `InvalidInput` for a label that cannot be compared with it.
        """
        one_or_many = label if isinstance(label, Scalar) else tuple(label)
        given = Label(id=request_id, label=one_or_many, output=output, tolerance=tolerance)
        only = Version(version) if version else None
        return self._running().labels.label(ModelName(model), only, [given])

    def models(self) -> tuple[Served, ...]:
        """Every release that can answer, by model name, the current one first."""
        return self._server().models()

    def status(self) -> dict[str, Any]:
        """What `GET /status` tells."""
        return self._running().status()

    @property
    def inference_url(self) -> str:
        """Where the inference API listens for other programs."""
        return self._running().inference_url

    def _running(self) -> Agent:
        if self._agent is None:
            raise Conflict("this device does not run", fix="call start(), or use it in a with block")
        return self._agent

    def _server(self) -> ModelServer:
        return self._running().server

    def _run(self, started: "Future[None]") -> None:
        try:
            identity = load_identity(self._settings.data)
            with sole_user(self._settings.data):
                asyncio.run(self._serve(Agent(self._settings, identity), started))
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    async def _serve(self, agent: Agent, started: "Future[None]") -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await agent.start()
        self._agent = agent
        started.set_result(None)
        try:
            await self._stop.wait()
        finally:
            await agent.stop()
