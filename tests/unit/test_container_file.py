"""The container file, as far as it can be checked without an engine: what it copies exists, what it names is ours."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from edge_agent.__main__ import make_parser
from edge_agent.config import ENV_PREFIX, SYSTEM_DATA, all_settings, load_settings

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "deploy/container/Containerfile"
LINES = [
    line.strip()
    for line in re.sub(r"\\\n", " ", FILE.read_text()).splitlines()
    if line.strip() and not line.startswith("#")
]


def arguments(instruction: str) -> list[list[str]]:
    """The words after each such instruction, in order."""
    return [shlex.split(line)[1:] for line in LINES if line.split()[0] == instruction]


def variables() -> dict[str, str]:
    return dict(word.split("=", 1) for words in arguments("ENV") for word in words)


def test_what_is_copied_exists_and_is_all_that_the_build_needs() -> None:
    copied = [words[:-1] for words in arguments("COPY") if not words[0].startswith("--")]
    sources = {source for words in copied for source in words}
    assert [source for source in sources if not (ROOT / source).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert needed | set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == sources


def test_later_stages_copy_from_earlier_ones() -> None:
    stages = [words[2] for words in arguments("FROM") if "AS" in words]
    used = [word.partition("=")[2] for words in arguments("COPY") for word in words if word.startswith("--from=")]
    assert used
    assert set(used) <= set(stages)


def test_its_variables_are_settings_of_the_agent() -> None:
    ours = {name: value for name, value in variables().items() if name.startswith(ENV_PREFIX)}
    assert set(ours) <= {setting.variable for setting in all_settings()}
    settings = load_settings({}, ours)
    assert settings.data == SYSTEM_DATA
    assert [words[0] for words in arguments("VOLUME")] == [str(settings.data)]
    port = settings.inference_listen.rpartition(":")[2]
    assert arguments("EXPOSE") == [[port]]
    (check,) = (line for line in LINES if line.startswith("HEALTHCHECK"))
    assert f"127.0.0.1:{port}/v2/health/live" in check


def test_it_runs_a_command_that_there_is_as_a_user_that_is_not_root() -> None:
    (program,), (command,) = (re.findall(r'"([^"]+)"', line) for line in LINES if line.startswith(("ENTRY", "CMD")))
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert program in scripts
    assert make_parser().parse_args([command])
    ((user,),) = arguments("USER")
    assert user != "root"
    assert user in next(line for line in LINES if "useradd" in line)


@pytest.mark.parametrize("instruction", ["FROM", "COPY", "USER", "ENTRYPOINT"])
def test_the_parser_of_these_tests_sees_the_instructions(instruction: str) -> None:
    assert any(line.split()[0] == instruction for line in LINES)
