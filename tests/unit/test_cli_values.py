"""What people type and what they see, as pure functions."""

from io import StringIO

import click
import pytest
from msgspec.structs import replace
from rich.console import Console

from common.artifact import ArtifactRef, ReleaseManifest, TensorSpec, Variant, digest_of
from common.errors import InvalidInput
from common.ids import DeviceId, ModelName, ReleaseRef, Version
from controller.api.views import rollout_view
from controller.cli.comparison import compare, comparison_rows, tensor_rows
from controller.cli.output import share, size, table
from controller.cli.values import byte_count, duration, parse_labels, parse_phases
from controller.cli.watching import picture, summary
from controller.resources import PatchView, ReleaseView, RolloutAction
from controller.rollouts import commands
from controller.rollouts.model import (
    Execution,
    ExecutionState,
    Phase,
    PhaseSpec,
    PhaseState,
    Rollout,
    RolloutSpec,
)

X, Y = TensorSpec("x", "FP32", (-1, 4)), TensorSpec("y", "FP32", (-1, 2))


def release(version: str, file: bytes, outputs: tuple[TensorSpec, ...], variant: str = "default") -> ReleaseView:
    artifact = ArtifactRef(digest_of(file), len(file))
    manifest = ReleaseManifest(
        ModelName("m"), Version(version), {variant: Variant({"m.onnx": artifact}, "m.onnx", (X,), outputs)}
    )
    return ReleaseView(
        model=manifest.model,
        version=manifest.version,
        manifest=manifest,
        envelope=artifact,
        published_at=0,
        published_by="admin:x",
    )


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1.5h", 5400), ("10 m", 600), ("2d", 172_800), ("0s", 0)])
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "count"),
    [("7", 7), ("200kB", 200_000), ("1.5 mb", 1_500_000), ("2GB", 2_000_000_000), ("64KiB", 65_536), ("1 B", 1)],
)
def test_byte_counts(text: str, count: int) -> None:
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "-1", "1k", "kB", "1 kBs", "1e3", "1,5MB"])
def test_what_is_no_byte_count_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="not a number of bytes"):
        byte_count(text)


@pytest.mark.parametrize("text", ["", "-1", "1w", "h", "1h30m"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="not a duration"):
        duration(text)


def test_phases_are_percentages_or_counts() -> None:
    assert parse_phases("1%, 2.5%,7,100%") == (
        PhaseSpec(percent=1),
        PhaseSpec(percent=2.5),
        PhaseSpec(count=7),
        PhaseSpec(percent=100),
    )


@pytest.mark.parametrize("text", ["", "1%,", "x", "1.5", "-3", "1%;2%"])
def test_what_is_no_phase_is_refused_by_its_place(text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_phases(text)
    assert refused.value.field is not None
    assert refused.value.field.startswith("phases[")


def test_labels_are_set_and_removed() -> None:
    assert parse_labels(["a=1", "b=", "c-"], removable=True) == {"a": "1", "b": "", "c": None}
    with pytest.raises(InvalidInput):
        parse_labels(["c-"])


def test_sizes_and_shares_read_well() -> None:
    assert [size(number) for number in (0, 999, 1000, 3_163_737, 200_000_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "3.2 MB",
        "200 MB",
    ]
    assert (share(1, 3), share(1, 0)) == ("33.3 %", "-")
    assert table([["A", "BB"], ["long", "x"]]) == "A     BB\nlong  x"


def test_two_releases_differ_by_file_tensor_and_variant() -> None:
    old = release("1", b"old", (Y,))
    new = release("2", b"newer", (TensorSpec("y", "FP32", (-1, 3)),))
    base, target = digest_of(b"old"), digest_of(b"newer")
    known = PatchView(
        base=base, target=target, codec="c.1", state="ready", created_at=0, patch=ArtifactRef(digest_of(b"p"), 1)
    )
    unrelated = PatchView(base=digest_of(b"other"), target=target, codec="c.1", state="pending", created_at=0)
    comparison = compare(old, new, [known, unrelated])
    (variant,) = comparison.variants
    assert variant.files[0].patches == (known,)
    assert comparison_rows(comparison)[1][4:] == ["changed", "1 B (20.0 %)"]
    assert tensor_rows(comparison)[1:] == [["default", "out y", "FP32 [-1, 2]", "FP32 [-1, 3]"]]


def test_a_variant_that_only_one_release_has_is_shown() -> None:
    comparison = compare(release("1", b"a", (Y,)), release("2", b"a", (Y,), "int8"), [])
    assert [(one.variant, one.files[0].old is None, one.files[0].new is None) for one in comparison.variants] == [
        ("default", False, True),
        ("int8", True, False),
    ]


def test_files_are_compared_with_those_that_play_the_same_part() -> None:
    def view(version: str, **files: bytes) -> ReleaseView:
        plain = release(version, b"", ())
        references = {name.replace("_", "."): ArtifactRef(digest_of(data), len(data)) for name, data in files.items()}
        model = next(name for name in references if name.endswith(".onnx"))
        manifest = replace(plain.manifest, variants={"default": Variant(references, model, (), ())})
        return replace(plain, manifest=manifest)

    old = view("1", old_data=b"weights", old_onnx=b"graph", zz=b"gone")
    new = view("2", a_data=b"weights", z_onnx=b"graph 2")
    rows = comparison_rows(compare(old, new, []))[1:]
    assert [(row[1], row[4]) for row in rows] == [("z.onnx", "changed"), ("a.data", "identical"), ("zz", "changed")]


def test_the_api_offers_exactly_the_actions_that_there_are() -> None:
    assert RolloutAction == commands.Action


def test_the_picture_of_a_rollout_shows_its_phases_and_takes_no_text_for_markup() -> None:
    spec = RolloutSpec(release=ReleaseRef.parse("m@1"), phases=(PhaseSpec(count=1), PhaseSpec(percent=100)))
    rollout = Rollout(
        id="r1",
        spec=spec,
        salt="s",
        created_at=0,
        created_by="admin:x",
        phases=(Phase(index=0, state=PhaseState.FAILED, reason="1 of [red]1"), Phase(index=1)),
        reason="[/nonsense] stopped",
    )
    executions = [
        Execution(device=DeviceId("a"), phase=0, state=ExecutionState.FAILED),
        Execution(device=DeviceId("b"), phase=1),
    ]
    view = rollout_view(rollout, executions)
    console = Console(file=StringIO(), width=200)
    console.print(picture(view))
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "[/nonsense] stopped" in text
    assert "1 of [red]1" in text
    assert "100 %" in text
    assert "phase 1/2 (1) failed" in summary(view)
