"""The agent's settings; `common.settings` says how they are filled.

The file is the one that `--config` or FERRY_AGENT_CONFIG names, else `agent.toml` in the data folder if there is one,
else, for the system's own agent, the one in /etc/ferry-agent that the Debian package brings.
What the device is (its id, its credentials, its controller) is no setting: see `edge_agent.identity`.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from common.artifact.manifest import MEASURED_VARIANT
from common.artifact.serving import ServingChanges
from common.errors import InvalidInput
from common.ids import MODEL_NAME, ModelName
from common.settings import Setting, load, parse_address, settings_of
from edge_agent.fetch import FetchLimits

ENV_PREFIX = "FERRY_AGENT_"
CONFIG_VARIABLE = "FERRY_AGENT_CONFIG"
CONFIG_FILE = "agent.toml"
SYSTEM_DATA = Path("/var/lib/ferry-agent")
SYSTEM_CONFIG = Path("/etc/ferry-agent") / CONFIG_FILE

MIB = 1024 * 1024

ColdStartMode = Literal["resident", "prewarmed", "lazy"]


def default_data(environment: Mapping[str, str] = os.environ) -> Path:
    """Where an agent keeps its files unless told: the system's state folder for root and its owner, else the user's."""
    if os.geteuid() == 0 or _owner(SYSTEM_DATA) == os.geteuid():
        return SYSTEM_DATA
    state = environment.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(state) / "ferry-agent"


class ModelSettings(ServingChanges, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the owner sets for one model: a table `[models.NAME]` of the file."""

    cold_start: ColdStartMode | UnsetType = UNSET
    idle_s: Annotated[float, Meta(gt=0)] | UnsetType = UNSET


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device's owner can set."""

    data: Annotated[
        Path,
        Meta(
            description="Folder of everything the agent keeps: identity, models, journal, telemetry. One agent at a "
            "time uses it. Default: `/var/lib/ferry-agent` for root and for the user who owns that, else "
            "`~/.local/state/ferry-agent`."
        ),
    ] = msgspec.field(default_factory=default_data)
    inference_listen: Annotated[
        str,
        Meta(
            description="Where the inference API (Open Inference Protocol V2) listens, HOST:PORT; port 0 takes a free "
            "one. There is no access control here: keep it on this machine or behind a proxy."
        ),
    ] = "127.0.0.1:8100"
    inference_socket: Annotated[
        Path | None,
        Meta(
            description="Where the inference API listens too: the path of a Unix socket, which the agent's user and "
            "group may connect to."
        ),
    ] = None
    inference_s_max: Annotated[
        float,
        Meta(
            gt=0,
            description="Most seconds that the engine may take for one request; a model that loops for ever on an "
            "input is stopped then, and the request fails.",
        ),
    ] = 60.0
    variants: Annotated[
        tuple[str, ...],
        Meta(
            min_length=1,
            description="Builds of a release that this device prefers, best first; `default` is tried last anyway. "
            "`auto`, which is the last if it is there, leaves the choice to the controller: the build that devices "
            "like this one have measured to be the fastest. A list in the file, separated by commas elsewhere.",
        ),
    ] = ("default",)
    custom_ops: Annotated[
        Literal["allow", "refuse"],
        Meta(
            description="Whether releases may bring shared libraries with operators of their own. That is native code "
            "that runs with all rights of the agent; `refuse` rejects such releases."
        ),
    ] = "refuse"
    batch_bytes_max: Annotated[
        int,
        Meta(
            ge=0,
            description="Most bytes of inputs and answers of requests that run together as one batch; a larger request "
            "runs alone. What the engine needs beside them is in proportion.",
        ),
    ] = 16 * MIB
    cache_bytes_max: Annotated[
        int,
        Meta(
            ge=0,
            description="Most bytes of answers that are kept in memory for equal requests, of all models together; "
            "only those models keep any whose release asks for it. 0: none.",
        ),
    ] = 64 * MIB
    models: Annotated[
        dict[Annotated[ModelName, Meta(pattern=f"^{MODEL_NAME.pattern}$")], ModelSettings],
        Meta(
            description="What holds for single models: `cache_bytes`, `routes` and `padding` otherwise than a release "
            "says (docs/reference/serving-file.md), `cold_start` and `idle_s` otherwise than these settings. A table "
            "`[models.NAME]` in the file, JSON elsewhere."
        ),
    ] = {}
    providers: Annotated[
        tuple[str, ...],
        Meta(
            min_length=1,
            description="Execution providers of ONNX Runtime that releases may run on. With more than the CPU's, each "
            "new release is tried on all that this runtime has, and runs on the fastest that answers as the CPU does. "
            "A list in the file, separated by commas elsewhere.",
        ),
    ] = ("CPUExecutionProvider",)
    heartbeat_s: Annotated[
        float, Meta(ge=0, le=20, description="Seconds between heartbeats. 0: as the controller said at the join.")
    ] = 0.0
    poll_s: Annotated[
        float,
        Meta(
            ge=0,
            le=86_400,
            description="Seconds between polls for orders over HTTP while MQTT is silent. 0: as the controller said at "
            "the join.",
        ),
    ] = 0.0
    telemetry_s: Annotated[
        float,
        Meta(gt=0, le=3600, description="Length of a telemetry window, and how often windows are sent, in seconds."),
    ] = 10.0
    telemetry_bytes_max: Annotated[
        int,
        Meta(
            ge=64 * 1024, description="Most telemetry kept on the disk while offline, in bytes; the oldest goes first."
        ),
    ] = 8 * MIB
    drift_requests_max: Annotated[
        int,
        Meta(
            ge=0,
            le=256,
            description="Most requests of a telemetry window, to each release that carries a reference, of which "
            "numbers are counted to find drift; only the counts are sent. 0: none.",
        ),
    ] = 64
    label_s_max: Annotated[
        float,
        Meta(
            ge=0,
            le=86_400,
            description="How long after an answer its true label may be reported, in seconds; what was predicted is "
            "kept in memory until then. 0: no labels.",
        ),
    ] = 3600.0
    mqtt_bytes_max: Annotated[
        int, Meta(ge=0, description="Largest artifact that is fetched over MQTT, in bytes; 0: all over HTTP.")
    ] = MIB
    download_rate_bytes_per_s: Annotated[
        int, Meta(ge=0, description="Download no faster than this, for metered or shared links; 0: as fast as it goes.")
    ] = 0
    download_idle_s: Annotated[
        float, Meta(gt=0, description="Break a download off after so many seconds without a byte; it is resumed later.")
    ] = 30.0
    download_total_s: Annotated[
        float, Meta(gt=0, description="Break a download off after so many seconds in all; it is resumed later.")
    ] = 3600.0
    disk_reserve_bytes: Annotated[
        int, Meta(ge=0, description="Room on the disk that an update leaves free, in bytes.")
    ] = 16 * MIB
    optimised_bytes_max: Annotated[
        int,
        Meta(
            ge=0,
            description="Most disk for optimised models, in bytes: what the engine makes of a model's graph is kept, "
            "so that the next load takes less time and memory. 0: every load is a plain one.",
        ),
    ] = 512 * MIB
    memory_reserve_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="Memory that loading a release leaves to other programs, in bytes. When a new release does not "
            "fit beside the one that serves, that one is stopped first; requests get 503 until the new one answers.",
        ),
    ] = 64 * MIB
    models_max: Annotated[
        int, Meta(ge=0, description="Most models served at one time; one more waits. 0: as many as memory holds.")
    ] = 0
    defer_cpu_percent: Annotated[
        float,
        Meta(
            gt=0, le=100, description="CPU load of the machine, in percent, at which loading a new release is put off."
        ),
    ] = 85.0
    defer_latency_s: Annotated[
        float,
        Meta(gt=0, description="Mean latency of answers, in seconds, at which loading a new release is put off."),
    ] = 0.5
    defer_s_max: Annotated[
        float,
        Meta(ge=0, description="Longest that a new release waits for a quieter moment, in seconds. 0: it never waits."),
    ] = 60.0
    cold_start: Annotated[
        ColdStartMode,
        Meta(
            description="When a model is in memory. `resident`: as long as it is installed. `prewarmed`: its optimised "
            "graph is made and checked, and the first request loads it. `lazy`: nothing happens before the first "
            "request. The last two leave the memory after `idle_s` without a request."
        ),
    ] = "resident"
    idle_s: Annotated[
        float, Meta(gt=0, description="Seconds without a request after which such a model leaves the memory.")
    ] = 300.0
    scrub_interval_s: Annotated[
        float,
        Meta(
            ge=0,
            description="Seconds between two looks at whether the installed files are still what they were; what went "
            "bad is mended. 0: never but at the start.",
        ),
    ] = 86_400.0
    scrub_bytes_per_s: Annotated[
        int, Meta(ge=64 * 1024, description="Most that such a look reads from the disk, in bytes a second.")
    ] = 4 * MIB
    ca_file: Annotated[
        Path | None,
        Meta(description="PEM file with CA certificates to trust besides the system's, for https and mqtts."),
    ] = None
    otlp_endpoint: Annotated[
        str,
        Meta(
            description="Base URL of an OpenTelemetry collector (OTLP over HTTP) for traces and metrics. Empty: "
            "`OTEL_EXPORTER_OTLP_ENDPOINT`; if that is empty too, nothing is sent."
        ),
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="The least severe log lines to write.")
    ] = "info"

    def __post_init__(self) -> None:
        parse_address(self.inference_listen, "inference_listen")
        if MEASURED_VARIANT in self.variants[:-1]:
            taken = f"{MEASURED_VARIANT!r} always finds a build, so nothing after it is ever taken"
            raise InvalidInput(taken, field="variants", fix=f"put {MEASURED_VARIANT!r} last")

    @property
    def sample_interval_s(self) -> float:
        """Between two requests to a release that are sampled for drift: they are spread over the window."""
        return self.telemetry_s / self.drift_requests_max if self.drift_requests_max else math.inf

    def fetch_limits(self) -> FetchLimits:
        """The limits that downloads keep to."""
        return FetchLimits(
            idle_s=self.download_idle_s,
            total_s=self.download_total_s,
            rate_bytes_per_s=self.download_rate_bytes_per_s,
            mqtt_bytes_max=self.mqtt_bytes_max,
        )


def all_settings() -> tuple[Setting, ...]:
    """Every setting, in the order in which they are documented."""
    return settings_of(AgentSettings, ENV_PREFIX)


def load_settings(flags: Mapping[str, str | None], environment: Mapping[str, str], file: str = "") -> AgentSettings:
    """The settings from the file, `environment` and `flags` (by name of the setting; None is not given).

    Raises `InvalidInput` that names the flag, variable or key with a value that cannot be.
    """
    return load(
        AgentSettings,
        ENV_PREFIX,
        flags=flags,
        environment=environment,
        file=_config_path(flags, environment, file),
        reference="docs/reference/agent.md",
    )


def _config_path(flags: Mapping[str, str | None], environment: Mapping[str, str], file: str) -> Path | None:
    if named := file or environment.get(CONFIG_VARIABLE, ""):
        return Path(named)
    data = flags.get("data") or environment.get(f"{ENV_PREFIX}DATA")
    folder = Path(data) if data else default_data(environment)
    usual = [folder / CONFIG_FILE, *([SYSTEM_CONFIG] if folder == SYSTEM_DATA else [])]
    return next((file for file in usual if _is_file(file)), None)


def _is_file(path: Path) -> bool:
    """Whether there is such a file; in a folder that this user may not enter there is none for it."""
    try:
        return path.is_file()
    except PermissionError:
        return False


def _owner(path: Path) -> int | None:
    try:
        return path.stat().st_uid
    except OSError:
        return None
