"""The agent's settings: one struct, filled from a TOML file, then `FERRY_AGENT_*` variables, then flags.

Each field is a key of the file, a variable (`inference_listen`: `FERRY_AGENT_INFERENCE_LISTEN`) and a flag of
`ferry-agent run` (`--inference-listen`); later sources win. The field's type checks the value and its description is
the documentation. The file is the one that `--config` or FERRY_AGENT_CONFIG names, else `agent.toml` in the data folder
if there is one. A bad value is an `InvalidInput` that names where it came from.

What the device is (its id, its credentials, its controller) is no setting: see `edge_agent.identity`.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from common.errors import InvalidInput
from edge_agent.fetch import FetchLimits

ENV_PREFIX = "FERRY_AGENT_"
CONFIG_VARIABLE = "FERRY_AGENT_CONFIG"
CONFIG_FILE = "agent.toml"
SYSTEM_DATA = Path("/var/lib/ferry-agent")
PORT_MAX = 65_535

MIB = 1024 * 1024


def default_data(environment: Mapping[str, str] = os.environ) -> Path:
    """Where an agent keeps its files unless told: the system's state folder for root, else the user's."""
    if os.geteuid() == 0:
        return SYSTEM_DATA
    state = environment.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(state) / "ferry-agent"


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device's owner can set."""

    data: Annotated[
        Path,
        Meta(
            description="Folder of everything the agent keeps: identity, models, journal, telemetry. One agent at a "
            "time uses it. Default: `/var/lib/ferry-agent` for root, else `~/.local/state/ferry-agent`."
        ),
    ] = msgspec.field(default_factory=default_data)
    inference_listen: Annotated[
        str,
        Meta(
            description="Where the inference API (Open Inference Protocol V2) listens, HOST:PORT; port 0 takes a free "
            "one. There is no access control here: keep it on this machine or behind a proxy."
        ),
    ] = "127.0.0.1:8100"
    variants: Annotated[
        tuple[str, ...],
        Meta(
            min_length=1,
            description="Builds of a release that this device prefers, best first; `default` is tried last anyway. A "
            "list in the file, separated by commas elsewhere.",
        ),
    ] = ("default",)
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
    ca_file: Annotated[
        Path | None,
        Meta(description="PEM file with CA certificates to trust besides the system's, for https and mqtts."),
    ] = None
    otlp_endpoint: Annotated[
        str,
        Meta(
            description="Base URL of an OpenTelemetry collector (OTLP over HTTP) for traces. Empty: "
            "`OTEL_EXPORTER_OTLP_ENDPOINT`; if that is empty too, nothing is sent."
        ),
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="The least severe log lines to write.")
    ] = "info"

    def __post_init__(self) -> None:
        parse_listen(self.inference_listen)

    def fetch_limits(self) -> FetchLimits:
        """The limits that downloads keep to."""
        return FetchLimits(
            idle_s=self.download_idle_s,
            total_s=self.download_total_s,
            rate_bytes_per_s=self.download_rate_bytes_per_s,
            mqtt_bytes_max=self.mqtt_bytes_max,
        )


class Setting(msgspec.Struct, frozen=True):
    """One field of `AgentSettings`, described."""

    name: str
    type: Any
    description: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()


def all_settings() -> tuple[Setting, ...]:
    """Every setting, in the order in which they are documented."""
    fields = msgspec.structs.fields(AgentSettings)
    return tuple(Setting(field.name, field.type, _description(field.type)) for field in fields)


def load_settings(flags: Mapping[str, str | None], environment: Mapping[str, str], file: str = "") -> AgentSettings:
    """The settings from the file, `environment` and `flags` (by name of the setting; None is not given).

    Raises `InvalidInput` that names the flag, variable or key with a value that cannot be.
    """
    path = _config_path(flags, environment, file)
    in_file = _read_file(path) if path else {}
    values: dict[str, Any] = {}
    for setting in all_settings():
        sources = (
            (f"{path}: {setting.name}", in_file.get(setting.name)),
            (setting.variable, environment.get(setting.variable)),
            (setting.flag, flags.get(setting.name)),
        )
        for source, value in sources:
            if value is not None:
                values[setting.name] = _converted(value, setting, source)
    return AgentSettings(**values)


def parse_listen(text: str) -> tuple[str, int]:
    """`HOST:PORT` as a pair; IPv6 in brackets. `InvalidInput` for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and int(port) <= PORT_MAX):
        fix = "write HOST:PORT, for example 127.0.0.1:8100"
        raise InvalidInput(f"{text[:80]!r} is not HOST:PORT", field="inference_listen", fix=fix)
    return host.removeprefix("[").removesuffix("]"), int(port)


def _config_path(flags: Mapping[str, str | None], environment: Mapping[str, str], file: str) -> Path | None:
    if named := file or environment.get(CONFIG_VARIABLE, ""):
        return Path(named)
    data = flags.get("data") or environment.get(f"{ENV_PREFIX}DATA")
    usual = (Path(data) if data else default_data(environment)) / CONFIG_FILE
    return usual if usual.is_file() else None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}", field="config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not TOML: {error}", field="config") from error
    known = [setting.name for setting in all_settings()]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            fix = f"did you mean {near[0]!r}?" if near else "see docs/reference/agent.md"
            raise InvalidInput(f"unknown setting {name!r}", field=str(path), fix=fix)
    return values


def _converted(value: Any, setting: Setting, source: str) -> Any:
    is_text = isinstance(value, str)
    if is_text and get_origin(get_args(setting.type)[0]) is tuple:
        value = [part.strip() for part in value.split(",")]
    try:
        return msgspec.convert(value, type=setting.type, strict=not is_text, dec_hook=_as_path)
    except msgspec.ValidationError as error:
        raise InvalidInput(str(error), field=source, fix=setting.description) from error


def _as_path(_type: type, value: Any) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError("Expected the path of a file or folder")
    return Path(value).expanduser()


def _description(annotated: Any) -> str:
    (meta,) = (part for part in get_args(annotated) if isinstance(part, Meta))
    return meta.description or ""
