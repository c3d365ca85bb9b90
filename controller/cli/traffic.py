"""The options of a rollout that say which requests a new release gets while devices try it, and how they are shown."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click
import msgspec

from common.errors import InvalidInput
from common.wire.traffic import Shadow, Split
from controller.cli.values import duration, fraction
from controller.rollouts.model import RolloutSpec, ShadowSpec, SplitSpec

S = TypeVar("S", bound=msgspec.Struct)

TRAFFIC_OPTIONS = (
    click.option(
        "--shadow", type=duration, metavar="DURATION", help="Compare the release on live requests for so long first."
    ),
    click.option("--shadow-share", type=fraction, metavar="SHARE", help="Of how many requests (default all)."),
    click.option(
        "--shadow-agreement", type=fraction, metavar="SHARE", help="Refuse the release where fewer answers agree."
    ),
    click.option(
        "--shadow-agree",
        type=click.Choice(["close", "top1"]),
        help="Answers agree when floats are near, or when the largest one is the same (default close).",
    ),
    click.option("--shadow-samples", type=int, metavar="N", help="Comparisons that a judgement takes (default 20)."),
    click.option(
        "--shadow-on-few",
        type=click.Choice(["go_on", "fail"]),
        help="What a device does that saw fewer: go on, which is the default, or fail.",
    ),
    click.option("--split", type=fraction, metavar="SHARE", help="In probation the release answers only this share."),
    click.option(
        "--split-header", metavar="NAME", help="Requests with this header or parameter say: candidate or stable."
    ),
    click.option("--split-key", metavar="NAME", help="Requests with the same value of this header get the same side."),
)


def shadow_of(base: ShadowSpec | None, options: Mapping[str, Any]) -> ShadowSpec | None:
    """What the options make of the shadow terms in the file, if there are some; None: nothing."""
    given = {
        "for_s": options.get("shadow"),
        "share": options.get("shadow_share"),
        "agreement_min": options.get("shadow_agreement"),
        "agree": options.get("shadow_agree"),
        "samples_min": options.get("shadow_samples"),
        "on_few": options.get("shadow_on_few"),
    }
    return _merged(ShadowSpec, base, given, "shadow", "say for how long, e.g. --shadow 10m")


def split_of(base: SplitSpec | None, options: Mapping[str, Any]) -> SplitSpec | None:
    """What the options make of the split in the file, if there is one; None: nothing."""
    given = {
        "share": options.get("split"),
        "header": options.get("split_header"),
        "key": options.get("split_key"),
    }
    return _merged(SplitSpec, base, given, "split", "say how many, e.g. --split 10%")


def traffic_columns(spec: RolloutSpec) -> dict[str, Callable[[object], str]]:
    """Rows for the terms that a rollout has."""
    texts = {
        "SHADOW": _shadow_in_words(spec.shadow) if spec.shadow else "",
        "SPLIT": _split_in_words(spec.split) if spec.split else "",
    }
    return {heading: lambda _, text=text: text for heading, text in texts.items() if text}  # type: ignore[misc]  # a lambda's default


def _shadow_in_words(terms: Shadow) -> str:
    asked = f", {terms.agreement_min:.1%} must agree" if terms.agreement_min is not None else ""
    few = f"with fewer than {terms.samples_min}: {'fail' if terms.on_few == 'fail' else 'go on'}"
    return f"{terms.for_s:g} s, {terms.share:.1%} of the requests ({terms.agree}{asked}; {few})"


def _split_in_words(terms: Split) -> str:
    by = [f"{what} {name}" for what, name in (("header", terms.header), ("key", terms.key)) if name]
    return f"{terms.share:.1%} of the requests" + (f" ({', '.join(by)})" if by else "")


def _merged(kind: type[S], base: S | None, given: Mapping[str, Any], field: str, fix: str) -> S | None:
    """`base` with what is given; the first of `given` is what there must be."""
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        return None
    if base is None and next(iter(given)) not in changes:
        raise InvalidInput(f"needs --{field}", field=f"{field}_{min(changes)}", fix=fix)
    fields = msgspec.to_builtins(base) if base is not None else {}
    try:
        return msgspec.convert(fields | changes, kind)
    except msgspec.ValidationError as error:
        raise InvalidInput(str(error), field=field, fix="see ferry rollout create --help") from error
