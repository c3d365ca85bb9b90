"""The load: `wrk`, a C program, so that callers cost little and never count as the server's; see `offer`.

Its Lua script posts one body again and again, on as many connections as there are clients, each with one request at a
time, and prints what came of it as JSON.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.agent.models import Body

SCRIPT: Final = """
local file = io.open(os.getenv("LOAD_BODY"), "rb")
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
for line in string.gmatch(os.getenv("LOAD_HEADERS"), "[^\\n]+") do
  local name, value = string.match(line, "([^:]+): (.*)")
  wrk.headers[name] = value
end
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\nRESULT {"answered": %d, "seconds": %f, "failed": %d, "p50_ms": %f, "p99_ms": %f}\\n',
    summary.requests, summary.duration / 1e6, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


class Load(msgspec.Struct, frozen=True):
    """What came of a load: requests that were answered, in how long a time, and how long callers waited.

    `failed` are refused or broken connections, timeouts, and answers whose status is not 2xx or 3xx.
    """

    answered: int
    seconds: float
    failed: int
    p50_ms: float
    p99_ms: float

    @property
    def per_second(self) -> float:
        """Answers each second that were not failures."""
        return (self.answered - self.failed) / self.seconds


def installed() -> bool:
    """Whether `wrk` is."""
    return shutil.which("wrk") is not None


def offer(url: str, body: Body, clients: int, seconds: float) -> Load:
    """Let `clients` post `body` to `url` for `seconds` (whole ones), each as soon as it has its answer."""
    with tempfile.TemporaryDirectory() as scratch:
        script, data = Path(scratch) / "load.lua", Path(scratch) / "body"
        script.write_text(SCRIPT)
        data.write_bytes(body.data)
        headers = "\n".join(f"{name}: {value}" for name, value in body.headers.items())
        command = ["wrk", "-t1", f"-c{clients}", f"-d{round(seconds)}s", "--timeout", "30s", "-s", str(script), url]
        environment = {**os.environ, "LOAD_BODY": str(data), "LOAD_HEADERS": headers}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return parse(ran.stdout)


def parse(printed: str) -> Load:
    """The result in what `wrk` has printed."""
    (line,) = [line for line in printed.splitlines() if line.startswith("RESULT ")]
    return msgspec.json.decode(line.removeprefix("RESULT "), type=Load)
