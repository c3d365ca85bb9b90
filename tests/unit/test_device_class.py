"""Devices are of one class when nothing that decides how fast a model runs differs, and say so in a short text."""

from pathlib import Path

import pytest

from common.wire import Capabilities
from common.wire.messages import TEXT_CHARS_MAX
from edge_agent.machine import device_class

INTEL = "processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\nflags\t\t: avx avx2\n\nprocessor\t: 1\nmodel name\t: Other"
PI = "processor\t: 0\nBogoMIPS\t: 108.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd08\nModel\t\t: Raspberry Pi 4 Model B"
BIG_LITTLE = "CPU implementer\t: 0x41\nCPU part\t: 0xd05\nCPU implementer\t: 0x41\nCPU part\t: 0xd0a\n"
CPU = ("CPUExecutionProvider",)


@pytest.fixture
def cpu_info(tmp_path: Path) -> Path:
    (tmp_path / "cpuinfo").write_text(INTEL)
    return tmp_path / "cpuinfo"


def test_it_is_the_same_from_start_to_start_and_readable(cpu_info: Path) -> None:
    first = device_class("1.24.1", "setup", CPU, cpu_info)
    assert first == device_class("1.24.1", "setup", CPU, cpu_info)
    assert "Some CPU @ 2.00GHz" in first
    assert "onnxruntime 1.24.1, CPU, " in first


@pytest.mark.parametrize("other", [("1.25.0", "setup", CPU), ("1.24.1", "other flags", CPU), ("1.24.1", "setup", ())])
def test_another_runtime_processor_or_provider_is_another_class(
    cpu_info: Path, other: tuple[str, str, tuple[str, ...]]
) -> None:
    assert device_class(*other, cpu_info) != device_class("1.24.1", "setup", CPU, cpu_info)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (PI, "Raspberry Pi 4 Model B"),
        (BIG_LITTLE, "CPU implementer 0x41 CPU part 0xd05 CPU part 0xd0a"),
        ("", "processor unknown"),
    ],
)
def test_processors_without_a_name_are_told_apart_as_far_as_the_kernel_can(
    cpu_info: Path, text: str, name: str
) -> None:
    cpu_info.write_text(text)
    assert f", {name}, " in device_class("1", "setup", CPU, cpu_info)


def test_it_fits_its_field_whatever_the_kernel_says(cpu_info: Path) -> None:
    cpu_info.write_text("model name : " + "x" * 10_000)
    many = tuple(f"{number}ExecutionProvider" for number in range(1000))
    assert len(device_class("1", "setup", many, cpu_info)) < TEXT_CHARS_MAX


def test_no_cpu_info_is_no_trouble(tmp_path: Path) -> None:
    assert "processor unknown" in device_class("1", "setup", CPU, tmp_path / "none")
    assert Capabilities(agent_version="1", device_class=device_class("1", "s", CPU))
