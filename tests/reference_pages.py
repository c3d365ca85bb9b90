"""Makes the reference pages that describe code: `python -m tests.reference_pages` writes them, a test checks them.

The settings come from the struct that reads them, the wire from the structs, the limits and the topic grammar of
`common.wire`. What a struct says of itself and of its fields in the source is what the page says.
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec

from common.artifact import manifest
from common.monitoring import sketch
from common.settings import Setting
from common.wire import codec, messages, topics, traffic
from controller.config import all_settings

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
PARTS = (messages, traffic)
"""The modules that messages are described in."""
HOW_MADE = "<!-- Generated from the code: change it there, then run `python -m tests.reference_pages`. -->"


def pages() -> dict[Path, str]:
    """Every generated page and what it should hold."""
    return {REFERENCE / "settings.md": settings_page(), REFERENCE / "wire.md": wire_page()}


# Settings


def settings_page() -> str:
    """All settings of the controller."""
    intro = (
        "Settings of `ferry-controller serve`. Each can be given as a flag, as a variable, or as a key of a TOML file "
        "named by `--config` or `FERRY_CONFIG`; a flag wins over a variable, a variable over the file. An unknown key "
        "or a value that cannot be is an error that names where it came from, and nothing starts.\n\n"
        "`--ready-file FILE` is a flag only: once the controller serves, it writes where (`url`, `broker_url`, "
        "`admin_token_file`, `pid`) to FILE as JSON.\n\n"
        "The settings of an agent are listed by `ferry-agent run --help`."
    )
    return "\n".join(("# Settings", "", HOW_MADE, "", intro, "", *(_setting(setting) for setting in all_settings())))


def _setting(setting: Setting) -> str:
    default = "empty" if setting.default == "" else f"`{setting.default}`"
    kind = _kind(setting.type)
    return (
        f"## {setting.name}\n\n{setting.description}\n\n"
        f"`{setting.flag}` · `{setting.variable}` · {kind} · default {default}\n"
    )


def _kind(annotated: Any) -> str:
    inner, meta = get_args(annotated)[:2]
    if get_args(inner):
        return "one of " + ", ".join(f"`{choice}`" for choice in get_args(inner))
    bounds = {"> ": meta.gt, "≥ ": meta.ge, "≤ ": meta.le}
    limits = [f"{sign}{value}" for sign, value in bounds.items() if value is not None]
    return ", ".join(({"str": "text", "int": "whole number", "float": "number"}[inner.__name__], *limits))


# The wire


def wire_page() -> str:
    """Topics, messages and limits."""
    sent = list(codec.BYTES_MAX)
    parts: list[type[msgspec.Struct]] = [messages.Message, messages.Sequenced, *sent, *_parts(sent)]
    return "\n".join(
        (
            "# The wire",
            "",
            HOW_MADE,
            "",
            f"This page describes protocol version {messages.PROTOCOL_VERSION}, over MQTT 3.1.1.",
            "",
            inspect.cleandoc(inspect.getdoc(sys.modules["common.wire"]) or ""),
            "",
            inspect.getdoc(messages) or "",
            "",
            "## Topics",
            "",
            inspect.getdoc(topics) or "",
            "",
            "The controller subscribes to "
            + ", ".join(f"`{topic}`" for topic in topics.filters_for_controller())
            + "; a device to its own `desired` and `dl`. The payload type of the envelope on `desired` is "
            + f"`{messages.DESIRED_PAYLOAD_TYPE}`.",
            "",
            "## Size limits",
            "",
            "| message | at most, bytes |",
            "| --- | --- |",
            *(f"| `{message.__name__}` | {limit:,} |" for message, limit in codec.BYTES_MAX.items()),
            "",
            "| limit | value |",
            "| --- | --- |",
            *(f"| `{name}` | {value:,} |" for name, value in _limits()),
            "",
            "## Types",
            "",
            "| name | is |",
            "| --- | --- |",
            *(f"| `{name}` | {_cell(text)} |" for name, text in _aliases()),
            "",
            "`Digest` is `sha256:` and 64 lower-case hex digits. The histogram's bounds, `LATENCY_BOUNDS_S`, are "
            + ", ".join(f"{bound:g}" for bound in messages.LATENCY_BOUNDS_S)
            + " seconds; those of rows in a run, `RUN_ROWS_BOUNDS`, are "
            + ", ".join(map(str, messages.RUN_ROWS_BOUNDS))
            + ".",
            "",
            "## Messages",
            "",
            *(_struct(part) for part in parts),
        )
    )


def _parts(sent: list[type[messages.Message]]) -> list[type[msgspec.Struct]]:
    """The structs inside the messages, in the order of the source."""
    everything = [*vars(messages).values(), manifest.ArtifactRef, sketch.FeatureCounts]
    structs = [entry for entry in everything if inspect.isclass(entry) and issubclass(entry, msgspec.Struct)]
    known = {messages.Message, messages.Sequenced, *sent}
    return list(dict.fromkeys(entry for entry in structs if entry not in known and entry is not msgspec.Struct))


def _struct(struct: type[msgspec.Struct]) -> str:
    base = struct.__mro__[1]
    extends = f"Has the fields of `{base.__name__}`, and:\n\n" if base is not msgspec.Struct else ""
    rows = [f"| `{name}` | {_cell(kind)} | {_cell(default)} | {doc} |" for name, kind, default, doc in _fields(struct)]
    table = "\n".join(("| field | type | default | |", "| --- | --- | --- | --- |", *rows)) if rows else ""
    return f"### {struct.__name__}\n\n{inspect.getdoc(struct)}\n\n{extends if rows else ''}{table}\n"


def _fields(struct: type[msgspec.Struct]) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and description of the fields that the struct itself declares, from its source."""
    (declared,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(struct))).body
    assert isinstance(declared, ast.ClassDef)
    for entry, following in zip(declared.body, [*declared.body[1:], None], strict=True):
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
            default = ast.unparse(entry.value) if entry.value else ""
            yield entry.target.id, ast.unparse(entry.annotation), default, _text(following)


def _text(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split()).replace("|", "\\|")
    return ""


def _limits() -> Iterator[tuple[str, int]]:
    return ((name, value) for module in PARTS for name, value in vars(module).items() if name.endswith("_MAX"))


def _aliases() -> Iterator[tuple[str, str]]:
    for entry in (entry for module in PARTS for entry in ast.parse(inspect.getsource(module)).body):
        if isinstance(entry, ast.Assign) and isinstance(entry.value, ast.Subscript):
            (name,) = entry.targets
            yield ast.unparse(name), ast.unparse(entry.value)


def _cell(code: str) -> str:
    return "`" + code.replace("|", "\\|") + "`" if code else ""


def main() -> None:
    """Write the pages."""
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
