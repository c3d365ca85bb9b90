"""docs/reference/agent.md names every command, option, setting and file of the agent, in the code's own words."""

import argparse
from pathlib import Path

import msgspec
import pytest

from common.settings import Setting
from edge_agent.__main__ import make_parser
from edge_agent.config import CONFIG_FILE, AgentSettings, all_settings
from edge_agent.enrol import PENDING_FILE
from edge_agent.identity import FILE_NAME as IDENTITY_FILE
from edge_agent.inference.provider_memory import FILE_NAME as PROVIDERS_FILE
from edge_agent.journal import FILE_NAME as JOURNAL_FILE
from edge_agent.running import LOCK_FILE, RUN_FILE
from edge_agent.slots import MADE_SUFFIX, NEW_SUFFIX, OLD_SUFFIX, PART_SUFFIX
from edge_agent.status import Status
from edge_agent.telemetry.spool import FILE_NAME as SPOOL_FILE
from edge_agent.update import MANIFEST_FILE

PAGE = (Path(__file__).parent.parent.parent / "docs/reference/agent.md").read_text()
FILES = (
    IDENTITY_FILE, PENDING_FILE, CONFIG_FILE, LOCK_FILE, RUN_FILE, JOURNAL_FILE, SPOOL_FILE, MANIFEST_FILE,
    PROVIDERS_FILE, NEW_SUFFIX, OLD_SUFFIX, PART_SUFFIX, MADE_SUFFIX,
)  # fmt: skip


def row(setting: Setting) -> str:
    """How the page describes a setting."""
    default = getattr(AgentSettings(), setting.name)
    shown = ",".join(default) if isinstance(default, tuple) else str(default if default is not None else "")
    code = "see text" if setting.name == "data" else f"`{shown}`" if shown else "empty"
    return f"| `{setting.name}` | {code} | {setting.description} |"


def commands() -> dict[str, argparse.ArgumentParser]:
    (subparsers,) = (action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(subparsers.choices)


def section(command: str) -> str:
    return PAGE.partition(f"## ferry-agent {command}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("setting", all_settings(), ids=lambda setting: setting.name)
def test_every_setting_is_described_as_in_the_code(setting: Setting) -> None:
    assert row(setting) in PAGE.splitlines()


@pytest.mark.parametrize("command", commands())
def test_every_command_and_its_own_options_are_described(command: str) -> None:
    settings = {setting.flag for setting in all_settings()}
    options = [flag for action in commands()[command]._actions for flag in action.option_strings]
    own = [flag for flag in options if flag not in settings and flag not in {"-h", "--help"}]
    assert section(command)
    assert [flag for flag in own if f"`{flag}" not in section(command) and f", {flag}" not in section(command)] == []


@pytest.mark.parametrize("file", FILES)
def test_every_file_is_described(file: str) -> None:
    assert file in PAGE.partition("## Files")[2]


def test_every_field_of_the_status_is_described() -> None:
    fields = [field.name for field in msgspec.structs.fields(Status)]
    assert [name for name in fields if f"`{name}`" not in section("status")] == []
