"""What the patches of each kind of pair should reach, and whether they do: figures of a run in, rows out. Pure.

A goal that some tool or pair of the run has no figures for is judged on what there is; without any it is left out.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from benchmarks.delta.figures import BSDIFF4, HDIFFPATCH, OURS, PEERS, XDELTA3, ZSTD_FULL, ZSTD_PATCH, PairFigures
from benchmarks.report import Row, at_least, at_most, figure

COMMAND = "make bench-delta"
SLACK_BYTES = 64
RSS_MB_MAX = 50
CREATE_CPU_S_MAX = 3
OVER_BOUND_MAX = 1.02
APPLY_SPEED_MIN = 4
JUDGED_BYTES_MIN = 10_000_000
"""The speed on smaller files is mostly that of starting a process."""
CPU_TICK_S = 0.01
"""The finest CPU time that every kernel tells."""

FINE_TUNES = (
    *(
        f"minilm-{name}"
        for name in ("adam-1", "adam-10", "adam-100", "adamw-10", "sgd-10", "onnx-10", "external-weights")
    ),
    *(f"minilm-{name}" for name in ("fp16-10", "fp16-100", "bf16-10", "bf16-100")),
)
TIMES_SMALLER = {
    "minilm-adam-1": 5,
    "minilm-adam-10": 1.3,
    "minilm-adam-100": 1.3,
    "minilm-bf16-10": 1.7,
    "minilm-lora-20": 10,
    "minilm-pruned": 1000,
    "minilm-int8-tensor": 1.1,
    "minilm-int8-channel": 1.1,
    "magika-retrain": 1,
    "nudenet-retrain": 1,
}
SAME_WEIGHTS = (
    *("ddddocr-fp32", "ddddocr-int8", "minilm-metadata", "nudenet-metadata"),
    *("nudenet-graph-only", "nudenet-re-export"),
)
GENERIC = (ZSTD_PATCH, XDELTA3, BSDIFF4, HDIFFPATCH)
SIMPLE = (ZSTD_FULL, ZSTD_PATCH, BSDIFF4)


def goals(figures: Sequence[PairFigures]) -> list[Row]:
    """One row for each pair of a goal, or for the worst pair where a goal is for all."""
    pairs = {each.name: each for each in figures}
    tunes = [pairs[name] for name in FINE_TUNES if name in pairs]
    others = [each for each in figures if each.name not in FINE_TUNES]
    return [
        *_each(tunes, "ours over the bound", "times", _over_bound, lambda _: OVER_BOUND_MAX, at_most),
        *_each(
            [pairs[name] for name in TIMES_SMALLER if name in pairs],
            "smaller than the best peer",
            "times",
            _times_smaller,
            lambda pair: TIMES_SMALLER[pair.name],
            at_least,
        ),
        *_each(
            [pairs[name] for name in SAME_WEIGHTS if name in pairs],
            "larger than the best generic peer",
            "bytes",
            lambda pair: _larger(pair, GENERIC),
            lambda _: SLACK_BYTES,
            at_most,
        ),
        *_worst(figures, "larger than the best simple way", "bytes", _over_simple, SLACK_BYTES, at_most),
        *_worst(tunes, "apply, fine-tunes, faster than xdelta3", "times", _apply_speed, APPLY_SPEED_MIN, at_least),
        *_worst(others, "apply, other pairs, faster than xdelta3", "times", _apply_speed, APPLY_SPEED_MIN, at_least),
        *_worst(figures, "peak memory to apply", "MB RSS", _apply_mb, RSS_MB_MAX, at_most),
        *_worst(tunes, "create, fine-tunes", "CPU s", _create_s, CREATE_CPU_S_MAX, at_most),
    ]


def all_figures(figures: Iterable[PairFigures]) -> Iterator[Row]:
    """Everything that was measured, a row each, named `PAIR: TOOL, ACT`."""
    for pair in figures:
        yield figure(f"{pair.name}: new file", measured=pair.new_bytes, unit="bytes", command=COMMAND)
        if pair.bound_bytes is not None:
            yield figure(f"{pair.name}: bound", measured=round(pair.bound_bytes), unit="bytes", command=COMMAND)
        for outcome in pair.outcomes:
            what = f"{pair.name}: {outcome.tool}"
            if outcome.patch_bytes is not None:
                yield figure(what, measured=outcome.patch_bytes, unit="bytes", command=COMMAND)
            for act, cost in (("create", outcome.create), ("apply", outcome.apply)):
                if cost is not None:
                    yield figure(f"{what}, {act}", measured=cost.cpu_s, unit="CPU s", command=COMMAND)
                    yield figure(f"{what}, {act}", measured=cost.peak_mb, unit="MB RSS", command=COMMAND)


Measure = Callable[[PairFigures], float | None]
Judge = Callable[..., Row]


def _each(
    pairs: Iterable[PairFigures],
    what: str,
    unit: str,
    measure: Measure,
    limit: Callable[[PairFigures], float],
    judge: Judge,
) -> Iterator[Row]:
    for pair in pairs:
        if (measured := measure(pair)) is not None:
            yield judge(f"{pair.name}: {what}", limit(pair), measured=measured, unit=unit, command=COMMAND)


def _worst(
    pairs: Iterable[PairFigures], what: str, unit: str, measure: Measure, limit: float, judge: Judge
) -> Iterator[Row]:
    measures = [(measured, pair.name) for pair in pairs if (measured := measure(pair)) is not None]
    if measures:
        measured, name = max(measures) if judge is at_most else min(measures)
        yield judge(f"{what}, worst pair ({name})", limit, measured=measured, unit=unit, command=COMMAND)


def _over_bound(pair: PairFigures) -> float | None:
    ours = pair.bytes_of(OURS)
    return None if ours is None or not pair.bound_bytes else ours / pair.bound_bytes


def _times_smaller(pair: PairFigures) -> float | None:
    ours, best = pair.bytes_of(OURS), pair.best_of(PEERS)
    return None if ours is None or best is None else best / ours


def _larger(pair: PairFigures, tools: Sequence[str]) -> float | None:
    ours, best = pair.bytes_of(OURS), pair.best_of(tools)
    return None if ours is None or best is None else ours - best


def _over_simple(pair: PairFigures) -> float | None:
    return _larger(pair, SIMPLE)


def _apply_speed(pair: PairFigures) -> float | None:
    ours, peer = pair.of(OURS), pair.of(XDELTA3)
    if pair.new_bytes < JUDGED_BYTES_MIN or not (ours and peer and ours.apply and peer.apply):
        return None
    return peer.apply.cpu_s / max(ours.apply.cpu_s, CPU_TICK_S)


def _apply_mb(pair: PairFigures) -> float | None:
    ours = pair.of(OURS)
    return ours.apply.peak_mb if ours and ours.apply else None


def _create_s(pair: PairFigures) -> float | None:
    ours = pair.of(OURS)
    return ours.create.cpu_s if ours and ours.create else None
