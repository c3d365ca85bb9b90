"""True labels for answers of a while ago: what was predicted is remembered by the request's id, compared, and counted.

An application that finds out later what was right (somebody sorted the parcel again) says so, and the release that gave
the answer gets a labelled request, correct or not. Remembered is not the answer but what it said: for an output of
floats [rows, classes] the place of the largest of each row, for integers, booleans and text the values, for other
floats the values too, which are right within a tolerance that the label names. The memory is bounded in answers, bytes
and time and is gone after a restart. Several labels come all or not at all; an answer is counted once, however often it
is labelled.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Final, NamedTuple, Protocol

import msgspec
import numpy as np
from msgspec import Meta

from common.artifact.tensors import Array, in_words
from common.clock import Clock
from common.errors import InvalidInput, NotFound
from common.ids import ModelName, Version
from edge_agent.inference.requests import Inference
from edge_agent.inference.tensors import bytes_of

ANSWERS_MAX: Final = 4096
"""Answers that are remembered; the oldest goes first."""
BYTES_MAX: Final = 8 * 1024 * 1024
"""Of what they said, all together; a text that alone is larger is not remembered."""
KEPT_S: Final = 3600.0
ROWS_MAX: Final = 64
"""An output with more rows, or more elements that are no scores, is not remembered."""
LABELS_MAX: Final = 1000
ID_CHARS_MAX: Final = 128
"""Answers to longer ids are not remembered."""

Scalar = bool | int | float | str


class Label(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was right for the request `id`: one value, or one for each row. `output` may be left out where only one
    could be meant. `tolerance` is how far off a number may be that is no class.
    """

    id: Annotated[str, Meta(min_length=1)]
    label: Scalar | Annotated[tuple[Scalar, ...], Meta(max_length=ROWS_MAX)]
    output: str = ""
    tolerance: Annotated[float, Meta(ge=0)] | None = None


class Labelled(msgspec.Struct, frozen=True):
    """How many rows were `labelled`, how many of them `correct`, and how many labels were `repeated`, for nothing."""

    labelled: int
    correct: int
    repeated: int


class LabelRecorder(Protocol):
    """Where the counts go."""

    def labelled(self, model: ModelName, version: Version, count: int, correct: int) -> None:
        """`count` rows of answers of this release were labelled."""
        ...


class _Predicted(NamedTuple):
    """What one output said. `exact`: it is a class or text, not a number that may be nearly right."""

    values: Array
    exact: bool


class _Answer:
    """An answer that can be labelled until `until` (monotonic seconds)."""

    __slots__ = ("labelled", "model", "predicted", "size", "until", "version")

    def __init__(self, given: Inference, until: float, predicted: dict[str, _Predicted]) -> None:
        self.model, self.version = given.model, given.version
        self.until = until
        self.predicted = predicted
        self.size = bytes_of(one.values for one in predicted.values())
        self.labelled = False


class Labels:
    """The memory. Safe for threads; `kept_s` 0 remembers nothing."""

    def __init__(self, recorder: LabelRecorder, clock: Clock, kept_s: float = KEPT_S) -> None:
        self._recorder = recorder
        self._clock = clock
        self._kept_s = kept_s
        self._lock = threading.Lock()
        self._answers: OrderedDict[tuple[ModelName, str], _Answer] = OrderedDict()
        self._bytes = 0

    def remember(self, model: ModelName, request_id: str, given: Inference) -> None:
        """The request `request_id` to `model` was answered so, perhaps by another model that a rule handed it on to; of
        two answers with one id the newer counts.
        """
        if not request_id or len(request_id) > ID_CHARS_MAX or not self._kept_s:
            return
        predicted = {name: one for name, array in given.outputs.items() if (one := _predicted(array)) is not None}
        answer = _Answer(given, self._clock.monotonic() + self._kept_s, predicted)
        with self._lock:
            self._forget(self._answers.pop((model, request_id), None))
            if answer.size > BYTES_MAX:
                return
            self._answers[model, request_id] = answer
            self._bytes += answer.size
            while len(self._answers) > ANSWERS_MAX or self._bytes > BYTES_MAX:
                self._forget(self._answers.popitem(last=False)[1])

    def label(self, model: ModelName, version: Version | None, labels: Sequence[Label]) -> Labelled:
        """Count the labels of answers of `model` (with `version`: of that release).

        Raises `NotFound` for an answer that is not remembered (any more) and `InvalidInput` for a label that cannot be
        compared with it; then nothing is counted.
        """
        if len(labels) > LABELS_MAX:
            raise InvalidInput(f"{len(labels)} labels", field="labels", fix=f"send at most {LABELS_MAX} at once")
        with self._lock:
            found = [self._find(model, version, label, f"labels[{place}]") for place, label in enumerate(labels)]
            compared = [
                _compared(answer, label, f"labels[{place}]")
                for place, (answer, label) in enumerate(zip(found, labels, strict=True))
            ]
            counted: list[tuple[_Answer, list[bool]]] = []
            for answer, right in zip(found, compared, strict=True):
                if not answer.labelled:
                    answer.labelled = True
                    counted.append((answer, right))
        for answer, right in counted:
            self._recorder.labelled(answer.model, answer.version, len(right), sum(right))
        rights = [one for _, right in counted for one in right]
        return Labelled(len(rights), sum(rights), len(labels) - len(counted))

    def _forget(self, answer: _Answer | None) -> None:
        self._bytes -= answer.size if answer is not None else 0

    def _find(self, model: ModelName, version: Version | None, label: Label, field: str) -> _Answer:
        answer = self._answers.get((model, label.id))
        if answer is None:
            fix = f"give requests an id, and label within {self._kept_s:g} s, {ANSWERS_MAX} answers, {BYTES_MAX} bytes"
            message = f"no answer to the request {label.id[:80]!r} is remembered"
            raise NotFound(message, field=f"{field}.id", fix=fix)
        if answer.until < self._clock.monotonic():
            fix = "label sooner, or raise label_s_max"
            raise NotFound(f"the answer to {label.id[:80]!r} is older than {self._kept_s:g} s", field=field, fix=fix)
        if version is not None and answer.version != version:
            fix = "leave the version out, or name that one"
            raise NotFound(f"{label.id[:80]!r} was answered by version {answer.version}", field=field, fix=fix)
        return answer


def _predicted(array: Array) -> _Predicted | None:
    """What there is to compare with a label; None for what is no prediction of some rows."""
    if array.dtype.kind != "f":
        return _Predicted(array.flatten(), exact=True) if array.size <= ROWS_MAX else None
    if array.ndim == 2 and array.shape[1] > 1:
        return _Predicted(np.argmax(array, axis=1), exact=True) if len(array) <= ROWS_MAX else None
    return _Predicted(array.flatten(), exact=False) if array.size <= ROWS_MAX else None


def _compared(answer: _Answer, label: Label, field: str) -> list[bool]:
    """For each row whether the label says the same."""
    predicted = _output(answer, label, field)
    wanted = label.label if isinstance(label.label, tuple) else (label.label,)
    if len(wanted) != len(predicted.values):
        fix = f"give one for each row: {len(predicted.values)}"
        raise InvalidInput(f"{len(wanted)} values", field=f"{field}.label", fix=fix)
    if predicted.exact:
        return [_same(found, value, field) for found, value in zip(predicted.values.tolist(), wanted, strict=True)]
    if label.tolerance is None:
        fix = "say how far off a right answer may be"
        raise InvalidInput("the answer is a number and no class", field=f"{field}.tolerance", fix=fix)
    if any(isinstance(value, str | bool) for value in wanted):
        raise InvalidInput("the answer is a number", field=f"{field}.label", fix="give a number")
    try:
        numbers = [float(value) for value in wanted]
    except OverflowError:  # an integer of JSON may have any length
        raise InvalidInput("an integer of over 308 digits", field=f"{field}.label", fix="give a number") from None
    return [
        abs(found - value) <= label.tolerance for found, value in zip(predicted.values.tolist(), numbers, strict=True)
    ]


def _same(found: object, value: Scalar, field: str) -> bool:
    kind = "text" if isinstance(found, str) else "a class, which is an integer"
    if isinstance(value, str) != isinstance(found, str) or isinstance(value, float):
        raise InvalidInput(f"{value!r:.80}", field=f"{field}.label", fix=f"the answer is {kind}")
    return found == value


def _output(answer: _Answer, label: Label, field: str) -> _Predicted:
    known = answer.predicted
    if label.output in known:
        return known[label.output]
    if not label.output and len(known) == 1:
        return next(iter(known.values()))
    if not known:
        fix = f"labels are for at most {ROWS_MAX} rows of classes, numbers or text"
        raise InvalidInput("the answer has no output that can be labelled", field=f"{field}.output", fix=fix)
    fix = f"name one of {in_words(known)}"
    raise InvalidInput(f"{label.output[:80]!r} is no output to label", field=f"{field}.output", fix=fix)
