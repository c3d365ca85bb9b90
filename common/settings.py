"""Settings of a program: one struct, filled from a TOML file, then environment variables, then flags.

Each field of the struct is a key of the file, a variable (`listen`: `FERRY_LISTEN` with the prefix `FERRY_`) and a flag
(`--listen`); later sources win. The field's type checks the value and its `Meta(description=...)` is the documentation,
so a setting is described once: help texts and reference pages are made from here. A bad value is an `InvalidInput` that
names where it came from. Reading the file is the only IO; what is set, and by whom, is the caller's.
"""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

from common.errors import InvalidInput

PORT_MAX = 65_535

S = TypeVar("S", bound=msgspec.Struct)


class Setting(msgspec.Struct, frozen=True):
    """One field of a settings struct, described."""

    name: str
    type: Any
    default: Any
    description: str
    prefix: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return self.prefix + self.name.upper()


def settings_of(struct: type[msgspec.Struct], prefix: str) -> tuple[Setting, ...]:
    """Every setting, in the order in which they are documented."""
    fields = msgspec.structs.fields(struct)
    return tuple(Setting(one.name, one.type, one.default, _description(one.type), prefix) for one in fields)


def load(
    struct: type[S],
    prefix: str,
    *,
    flags: Mapping[str, str | None],
    environment: Mapping[str, str],
    file: Path | None,
    reference: str,
) -> S:
    """The settings from `file`, `environment` and `flags` (by name of the setting; None is not given).

    Raises `InvalidInput` that names the flag, variable or key with a value that cannot be; `reference` is the page that
    an unknown key is answered with.
    """
    known = settings_of(struct, prefix)
    in_file = _read_file(file, known, reference) if file else {}
    values: dict[str, Any] = {}
    for setting in known:
        sources = (
            (f"{file}: {setting.name}", in_file.get(setting.name)),
            (setting.variable, environment.get(setting.variable)),
            (setting.flag, flags.get(setting.name)),
        )
        for source, value in sources:
            if value is not None:
                values[setting.name] = _converted(value, setting, source)
    return struct(**values)


def parse_address(text: str, field: str) -> tuple[str, int]:
    """`HOST:PORT` as a pair; IPv6 in brackets. `InvalidInput` for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit() and int(port) <= PORT_MAX):
        raise InvalidInput(f"{text[:80]!r} is not HOST:PORT", field=field, fix="for example 127.0.0.1:8480")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _description(annotated: Any) -> str:
    (meta,) = (part for part in get_args(annotated) if isinstance(part, Meta))
    return meta.description or ""


def _read_file(path: Path, known: tuple[Setting, ...], reference: str) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}", field="config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not TOML: {error}", field="config") from error
    names = [setting.name for setting in known]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            fix = f"did you mean {near[0]!r}?" if near else f"see {reference}"
            raise InvalidInput(f"unknown setting {name!r}", field=str(path), fix=fix)
    return values


def _converted(value: Any, setting: Setting, source: str) -> Any:
    is_text = isinstance(value, str)
    kind = get_origin(get_args(setting.type)[0])
    if is_text and kind is tuple:
        value = [part.strip() for part in value.split(",")]
    try:
        if is_text and kind is dict:
            return msgspec.json.decode(value, type=setting.type)
        return msgspec.convert(value, type=setting.type, strict=not is_text, dec_hook=_as_path)
    except msgspec.DecodeError as error:
        raise InvalidInput(str(error), field=source, fix=setting.description) from error


def _as_path(_type: type, value: Any) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError("Expected the path of a file or folder")
    return Path(value).expanduser()
