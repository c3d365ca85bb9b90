"""The controller's settings (`common.settings` says how they are filled) and what must agree among them.

`docs/reference/settings.md` and `--help` are made from the descriptions here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from common.errors import InvalidInput
from common.settings import Setting, load, parse_address, settings_of

ENV_PREFIX = "FERRY_"
CONFIG_FILE = "FERRY_CONFIG"
ANY_HOST = frozenset({"0.0.0.0", "::", ""})  # noqa: S104  compared, not bound

Day = 86_400.0


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operator can set."""

    data: Annotated[
        str,
        Meta(
            description="Folder of everything the controller keeps: database, models, keys, the broker's data. One "
            "controller at a time uses it."
        ),
    ] = "ferry-data"
    listen: Annotated[
        str,
        Meta(
            description="Where the HTTP API listens, HOST:PORT. Port 0 takes a free one on the first start and the "
            "same one ever after. There is no TLS here: put a reverse proxy in front of it on an open network."
        ),
    ] = "127.0.0.1:8480"
    public_url: Annotated[
        str,
        Meta(
            description="URL under which devices reach the API; it is part of every join string. Default: `http://` "
            "and `listen`. Needed when `listen` means all interfaces or a proxy stands in front."
        ),
    ] = ""
    broker: Annotated[
        str,
        Meta(
            description="URL of an external MQTT broker for the controller, mqtt(s)://USER:PASSWORD@HOST:PORT. Empty: "
            "an embedded broker. Prefer the variable to the flag, which other users of the machine can see."
        ),
    ] = ""
    broker_listen: Annotated[
        str,
        Meta(description="Where the embedded broker listens, HOST:PORT. Port 0 as for `listen`."),
    ] = "127.0.0.1:1883"
    device_broker: Annotated[
        str,
        Meta(
            description="URL of the broker as devices reach it, mqtt(s)://HOST:PORT. Default: the broker's own "
            "address. Needed when `broker_listen` means all interfaces."
        ),
    ] = ""
    mosquitto_files: Annotated[
        str,
        Meta(
            description="Folder in which to keep `passwords` and `acl` for an external mosquitto. Empty: the users of "
            "an external broker are its operator's business."
        ),
    ] = ""
    database: Annotated[str, Meta(description="URL of the database. Empty: SQLite in the data folder.")] = ""
    blob_bytes_max: Annotated[int, Meta(ge=1, description="Largest file that can be uploaded, in bytes.")] = 4 * 2**30
    heartbeat_s: Annotated[
        float,
        Meta(
            gt=0,
            le=20,
            description="How often devices send a heartbeat, in seconds; told to them when they join. A device is "
            "called offline after 45 s of silence.",
        ),
    ] = 15.0
    poll_s: Annotated[
        float,
        Meta(gt=0, le=86_400, description="How often devices ask over HTTP while MQTT is silent, in seconds."),
    ] = 60.0
    reconcile_s: Annotated[
        float, Meta(gt=0, le=60, description="How often rollouts are looked at when nothing happens, in seconds.")
    ] = 1.0
    patch_workers: Annotated[
        int,
        Meta(
            ge=0,
            le=256,
            description="How many patches are built at the same time, each by a process of its own with low priority. "
            "0: one less than this machine has cores, at least 1.",
        ),
    ] = 0
    patch_cpu_s_per_release: Annotated[
        float,
        Meta(
            ge=0,
            description="CPU seconds to spend on all patches to one file of a release. Those from the bases that most "
            "devices hold are built first; when it is spent, the other devices get the whole file. Patches under way "
            "then are finished. 0: no patches are built.",
        ),
    ] = 3600.0
    patch_build_cpu_s_max: Annotated[
        int,
        Meta(
            ge=1,
            description="CPU seconds that building one patch may take; one that takes longer has failed. A worker that "
            "needs four times as long by the clock, and more than a minute, has failed too.",
        ),
    ] = 600
    patch_disk_bytes_max: Annotated[
        int,
        Meta(
            ge=0,
            description="Most bytes that all patches may take on the disk. A new one takes the place of less useful "
            "ones: first those from a base that no device holds, then the oldest to releases that are not current.",
        ),
    ] = 20 * 2**30
    events_kept_s: Annotated[
        float, Meta(gt=0, description="How long events and answers to repeated requests are kept, in seconds.")
    ] = 7 * Day
    telemetry_kept_s: Annotated[float, Meta(gt=0, description="How long telemetry is kept, in seconds.")] = 30 * Day
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
        for field in ("listen", "broker_listen"):
            parse_address(getattr(self, field), field)
        self._check_what_devices_are_told()

    def _check_what_devices_are_told(self) -> None:
        if not self.public_url and parse_address(self.listen, "listen")[0] in ANY_HOST:
            fix = "say how devices reach this machine, for example --public-url http://ferry.example.org:8480"
            raise InvalidInput(f"is needed with listen = {self.listen!r}", field="public_url", fix=fix)
        if self.public_url and not self.public_url.startswith(("http://", "https://")):
            raise InvalidInput("is not an http or https URL", field="public_url")
        open_broker = not self.broker and parse_address(self.broker_listen, "broker_listen")[0] in ANY_HOST
        if open_broker and not self.device_broker:
            fix = "say how devices reach the broker, for example --device-broker mqtt://ferry.example.org:1883"
            raise InvalidInput(f"is needed with broker_listen = {self.broker_listen!r}", field="device_broker", fix=fix)
        if self.mosquitto_files and not self.broker:
            raise InvalidInput("is for an external broker", field="mosquitto_files", fix="give --broker as well")


def all_settings() -> tuple[Setting, ...]:
    """Every setting, in the order in which they are documented."""
    return settings_of(Settings, ENV_PREFIX)


def load_settings(flags: Mapping[str, str], environment: Mapping[str, str], file: str = "") -> Settings:
    """The settings from `file` (TOML; else the one that FERRY_CONFIG names, if any), `environment` and `flags`.

    Raises `InvalidInput` that names the flag, variable or key with a value that cannot be.
    """
    path = file or environment.get(CONFIG_FILE, "")
    return load(
        Settings,
        ENV_PREFIX,
        flags=flags,
        environment=environment,
        file=Path(path) if path else None,
        reference="docs/reference/settings.md",
    )
