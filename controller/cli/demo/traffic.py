"""The application on each device: a client that keeps asking the agent, counts every failure and times every answer.

One thread per agent sends real files over the Open Inference Protocol V2 (binary tensors) at a steady pace. A request
fails when there is no answer, when the answer is an error, or when a number in it is not finite: nothing is retried.
While an agent is dead on purpose its thread pauses, and says so in the figures.
"""

import json
import math
import struct
import threading
import time
from collections.abc import Sequence

import httpx
import msgspec

from controller.cli.demo import features
from controller.cli.demo.corpus import LabelledFile

MODEL = "content-type"
INPUT = "bytes"
OUTPUT = "target_label"
REQUESTS_PER_S = 5.0
REQUEST_TIMEOUT_S = 10.0
HEADER_LENGTH = "Inference-Header-Content-Length"


class Sample(msgspec.Struct, frozen=True):
    """One request: when it was sent (Unix seconds), how long it took (seconds), who answered, and what went wrong."""

    sent_at: float
    latency_s: float
    version: str
    error: str = ""


class Answer(msgspec.Struct, frozen=True):
    """The probabilities of one file's types, and the release that gave them."""

    version: str
    probabilities: tuple[float, ...]


class Application:
    """Keeps one agent busy."""

    def __init__(self, device: str, url: str, files: Sequence[LabelledFile]) -> None:
        self.device = device
        self.url = url
        self.samples: list[Sample] = []
        self._bodies = [request_body(file.content) for file in files]
        self._running = threading.Event()
        self._idle = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"traffic-{device}", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._running.set()
        self._thread.start()

    def pause(self) -> None:
        """Send no more until `resume`; returns when the last request has been answered."""
        self._running.clear()
        self._idle.wait()

    def resume(self, url: str) -> None:
        """Go on, at an address that may have changed."""
        self.url = url
        self._idle.clear()
        self._running.set()

    def stop(self) -> None:
        """Send no more; returns when the last request has been answered."""
        self._stopped.set()
        self._running.set()
        if self._thread.ident is not None:
            self._thread.join()

    def failures(self) -> list[Sample]:
        """The requests that failed so far."""
        return [sample for sample in self.samples if sample.error]

    def _run(self) -> None:
        with httpx.Client(timeout=REQUEST_TIMEOUT_S) as http:
            number = 0
            while not self._stopped.is_set():
                if not self._running.is_set():
                    self._idle.set()
                    self._running.wait()
                    continue
                began = time.monotonic()
                self.samples.append(self._send(http, self._bodies[number % len(self._bodies)]))
                number += 1
                self._stopped.wait(max(0.0, 1 / REQUESTS_PER_S - (time.monotonic() - began)))

    def _send(self, http: httpx.Client, body: tuple[bytes, int]) -> Sample:
        sent_at, began = time.time(), time.perf_counter()
        version, error = "", ""
        try:
            answer = infer(http, self.url, body)
            version = answer.version
            if not all(math.isfinite(value) for value in answer.probabilities):
                error = "the answer is not finite"
        except (httpx.HTTPError, ValueError, KeyError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        return Sample(sent_at, time.perf_counter() - began, version, error)


def request_body(content: bytes) -> tuple[bytes, int]:
    """A V2 infer request for one file, and the length of its JSON part (the binary tensor extension)."""
    data = features.tensor(content)
    header = {
        "inputs": [
            {
                "name": INPUT,
                "shape": [1, features.TOKENS],
                "datatype": "INT32",
                "parameters": {"binary_data_size": len(data)},
            }
        ],
        "outputs": [{"name": OUTPUT, "parameters": {"binary_data": True}}],
    }
    encoded = json.dumps(header).encode()
    return encoded + data, len(encoded)


def infer(http: httpx.Client, url: str, body: tuple[bytes, int]) -> Answer:
    """Ask the agent at `url`; raises `httpx.HTTPError` or `ValueError` when it does not answer properly."""
    payload, header_length = body
    response = http.post(
        f"{url}/v2/models/{MODEL}/infer",
        content=payload,
        headers={HEADER_LENGTH: str(header_length), "Content-Type": "application/octet-stream"},
    )
    response.raise_for_status()
    split = int(response.headers[HEADER_LENGTH])
    described = json.loads(response.content[:split])
    values = struct.unpack(f"<{(len(response.content) - split) // 4}f", response.content[split:])
    return Answer(described["model_version"], values)


def quantile(latencies_s: Sequence[float], share: float) -> float:
    """The nearest-rank quantile; NaN of nothing."""
    ordered = sorted(latencies_s)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan
