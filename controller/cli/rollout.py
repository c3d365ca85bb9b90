"""`ferry rollout`: plan, create, look, steer."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from common.errors import InvalidInput
from common.ids import ReleaseRef
from controller.cli.connection import connected
from controller.cli.output import Output, share, size, table, when
from controller.cli.traffic import TRAFFIC_OPTIONS, shadow_of, split_of, traffic_columns
from controller.cli.values import byte_count, duration, parse_phases
from controller.rollouts.model import OnFailure, PhaseSpec, RolloutSpec

if TYPE_CHECKING:
    from controller.client import FerryClient
    from controller.rollouts.model import Execution, Preview

S = TypeVar("S", bound=msgspec.Struct)

SPEC_BYTES_MAX = 256 * 1024


@click.group("rollout")
def rollout() -> None:
    """Bring a release to the fleet step by step."""


def _spec_options(command: Any) -> Any:
    for option in reversed(
        (
            click.argument("release", required=False, metavar="[NAME@VERSION]"),
            click.option("--selector", metavar="EXPR", help="Which devices (default: all)."),
            click.option(
                "--phases", metavar="LIST", help="Cumulative, e.g. 1%,10%,50%,100% or 1,5,100% (default 100%)."
            ),
            click.option("--approve-each", is_flag=True, help="Every phase after the first waits for `approve`."),
            click.option("--bake", type=duration, help="Watch a phase this long before the next."),
            click.option("--probation", type=duration, help="Each device watches itself this long."),
            click.option("--silence", type=duration, help="A device silent for so long after the swap has failed."),
            click.option("--straggler", type=duration, help="Do not wait longer for devices that have not begun."),
            click.option(
                "--max-bytes", type=byte_count, metavar="SIZE", help="Move no more to each device, e.g. 200kB or 5MB."
            ),
            click.option(
                "--on-exceed",
                type=click.Choice(["defer", "fail"]),
                help="A device that cannot keep to --max-bytes waits for a cheaper way, or fails (default defer).",
            ),
            *TRAFFIC_OPTIONS,
            click.option("--max-failures", type=int, metavar="N", help="Failed devices that a phase tolerates."),
            click.option(
                "--max-failures-percent", type=float, metavar="P", help="The same as a share of resolved ones."
            ),
            click.option("--on-failure", type=click.Choice([one.value for one in OnFailure]), help="What to do then."),
            click.option(
                "-f",
                "--file",
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                help="A rollout spec in YAML or JSON, as in the API; options override it.",
            ),
        )
    ):
        command = option(command)
    return command


@rollout.command("plan")
@_spec_options
@connected
def plan(ferry: "FerryClient", output: Output, **options: Any) -> None:
    """Say what a rollout would do: devices and bytes per phase. Changes nothing."""
    preview = ferry.plan_rollout(spec_of(**options))
    if output.is_table:
        click.echo(table(_plan_rows(preview)))
    else:
        output.item(preview, {}, lambda one: str(one.devices))


@rollout.command("create")
@_spec_options
@click.option("--watch", "watching", is_flag=True, help="Stay and watch.")
@connected
def create(ferry: "FerryClient", output: Output, watching: bool, **options: Any) -> None:
    """Start a rollout."""
    view = ferry.create_rollout(spec_of(**options))
    click.echo(f"rollout {view.id} of {view.release} to {view.devices} devices has begun", err=True)
    if watching:
        _watch(ferry, output, view.id)
    else:
        output.item(view, _COLUMNS, lambda one: one.name)


@rollout.command("list")
@connected
def list_(ferry: "FerryClient", output: Output) -> None:
    """List rollouts, newest first."""
    output.items(ferry.rollouts(), _COLUMNS, lambda one: one.name)


@rollout.command("show")
@click.argument("name", metavar="ROLLOUT")
@click.option("--devices", is_flag=True, help="Show what each device does.")
@connected
def show(ferry: "FerryClient", output: Output, name: str, devices: bool) -> None:
    """Show a rollout: its phases, their counts, and why it is where it is."""
    if devices:
        columns = {
            "DEVICE": lambda one: one.device,
            "PHASE": lambda one: str(one.phase + 1),
            "STATE": lambda one: one.state.value,
            "VARIANT": lambda one: one.chosen.variant if one.chosen else "-",
            "PREVIOUS": lambda one: one.previous or "-",
            "ACTIVATED": lambda one: when(one.activated_at),
            "REASON": _reason,
        }
        output.items(ferry.executions(name), columns, lambda one: one.device)
        return
    view = ferry.rollout(name)
    output.item(view, {**_COLUMNS, **traffic_columns(view.spec)}, lambda one: one.name)
    if output.is_table:
        from controller.cli.phases import phase_rows

        click.echo()
        click.echo(table(phase_rows(view)))


@rollout.command("watch")
@click.argument("name", metavar="ROLLOUT")
@connected
def watch(ferry: "FerryClient", output: Output, name: str) -> None:
    """Follow a rollout until it ends: exit code 0 if it succeeded, 1 if not. -o json prints a line per change."""
    _watch(ferry, output, name)


def _action(name: str, text: str) -> None:
    @rollout.command(name, help=text)
    @click.argument("rollout_id", metavar="ROLLOUT")
    @connected
    def act(ferry: "FerryClient", output: Output, rollout_id: str) -> None:
        from controller.resources import RolloutAction

        action: RolloutAction = msgspec.convert(name, RolloutAction)
        output.item(ferry.act(rollout_id, action), _COLUMNS, lambda one: one.name)


_action("approve", "Let the phase that waits for approval begin.")
_action("pause", "Tell no more devices until it is resumed.")
_action("resume", "Go on after a pause.")
_action("advance", "Go on to the next phase now, without waiting for the present one.")
_action("abort", "Stop for good; devices stay as they are.")
_action("rollback", "Give every device back what it ran before.")
_action("retry", "Tell the failed devices again.")


def spec_of(
    *,
    release: str | None,
    selector: str | None,
    phases: str | None,
    approve_each: bool,
    bake: float | None,
    probation: float | None,
    silence: float | None,
    straggler: float | None,
    max_bytes: int | None,
    on_exceed: str | None,
    max_failures: int | None,
    max_failures_percent: float | None,
    on_failure: str | None,
    file: Path | None,
    **traffic: Any,
) -> RolloutSpec:
    """What the options add up to, on top of the file if there is one; `traffic` are those of `TRAFFIC_OPTIONS`."""
    if file is not None:
        base = _read_spec(file, release)
    elif release is not None:
        base = RolloutSpec(release=ReleaseRef.parse(release))
    else:
        raise InvalidInput("is missing", field="release", fix="name NAME@VERSION, or a file with -f")
    budget = {"count": max_failures, "percent": max_failures_percent}
    changes: dict[str, Any] = {
        "release": ReleaseRef.parse(release) if release else None,
        "selector": selector,
        "phases": parse_phases(phases) if phases else None,
        "bake_s": bake,
        "probation_s": probation,
        "silence_s": silence,
        "straggler_s": straggler,
        "max_bytes": max_bytes,
        "on_exceed": on_exceed,
        "shadow": shadow_of(base.shadow, traffic),
        "split": split_of(base.split, traffic),
        "on_failure": OnFailure(on_failure) if on_failure else None,
        "error_budget": _replaced(base.error_budget, budget) if any(budget.values()) else None,
    }
    spec = _replaced(base, changes)
    if spec.on_exceed == "fail" and spec.max_bytes is None:
        raise InvalidInput("needs --max-bytes", field="on_exceed", fix="say how many bytes are too many")
    return msgspec.structs.replace(spec, phases=_approved_one_by_one(spec.phases)) if approve_each else spec


_COLUMNS = {
    "ROLLOUT": lambda one: one.name,
    "RELEASE": lambda one: one.release,
    "STATE": lambda one: one.state.value,
    "PHASE": lambda one: f"{sum(phase.state.value == 'passed' for phase in one.phases)}/{len(one.phases)} passed",
    "DEVICES": lambda one: ", ".join(f"{number} {state.value}" for state, number in one.counts.items()),
    "CREATED": lambda one: when(one.created_at),
    "REASON": lambda one: one.reason or "-",
}


def _reason(one: "Execution") -> str:
    """Why the device's part is as it is; if there is nothing to say of that, why it has its variant."""
    return " ".join(filter(None, (one.reason, one.detail))) or (one.chosen.because if one.chosen else "") or "-"


def _watch(ferry: "FerryClient", output: Output, name: str) -> None:
    from controller.cli.watching import watch_rollout

    click.get_current_context().exit(watch_rollout(ferry, output, name))


def _plan_rows(preview: "Preview") -> list[list[str]]:
    numbered = ["DEVICES", "ONLINE", "UNCHANGED", "PATCH", "FULL", "UNDECIDED", "UNFIT", "OVER BUDGET"]
    rows = [["PHASE", *numbered, "BYTES", "OF FULL"]]
    for phase in preview.phases:
        numbers = (
            phase.devices,
            phase.online,
            phase.unchanged,
            phase.patched,
            phase.full,
            phase.undecided,
            phase.unfit,
            phase.over_budget,
        )
        cost = [size(phase.bytes), share(phase.bytes, phase.full_bytes)]
        rows.append([str(phase.index + 1), *map(str, numbers), *cost])
    sums = [str(preview.devices), str(preview.online), *["" for _ in numbered[2:]]]
    rows.append(["all", *sums, size(preview.bytes), share(preview.bytes, preview.full_bytes)])
    return rows


def _read_spec(file: Path, release: str | None) -> RolloutSpec:
    import yaml

    try:
        with file.open("rb") as source:
            document = yaml.safe_load(source.read(SPEC_BYTES_MAX))
    except (OSError, yaml.YAMLError) as error:
        raise InvalidInput(f"cannot read {file}: {error}", field="file") from error
    if not isinstance(document, dict):
        raise InvalidInput(f"{file} holds no mapping", field="file", fix="write the fields of a rollout spec")
    given = release or document.get("release")
    if isinstance(given, str):
        document["release"] = msgspec.to_builtins(ReleaseRef.parse(given))
    try:
        return msgspec.convert(document, RolloutSpec)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{file}: {error}", field="file", fix="see docs/reference/api.md") from error


def _replaced(struct: S, changes: dict[str, Any]) -> S:
    return msgspec.structs.replace(struct, **{name: value for name, value in changes.items() if value is not None})


def _approved_one_by_one(phases: tuple[PhaseSpec, ...]) -> tuple[PhaseSpec, ...]:
    return tuple(msgspec.structs.replace(phase, approval=index > 0) for index, phase in enumerate(phases))
