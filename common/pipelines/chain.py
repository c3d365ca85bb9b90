"""Steps one after another: which tensors go through them, and what is held against what they declare.

A chain is opened with the tensors at its beginning; each step is opened with those at its place. Nothing that a step
does is trusted: it may raise, answer other tensors than it declared, or not answer at all, and each of these is
`StepFailed` that names the step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from common.artifact.pipeline import PipelineStep
from common.artifact.tensor_spec import TensorSpec
from common.artifact.tensors import DTYPES, Array, accepts, datatype_of, describe, in_words
from common.errors import InvalidInput
from common.pipelines.step import OpenStep, PluginMissing, Step, StepFailed
from common.pipelines.stopping import Guard

T = TypeVar("T")

Find = Callable[[PipelineStep], OpenStep]
"""The code of a step, or `PluginMissing`."""


class Chain:
    """Open steps; `inputs` go in, `outputs` come out."""

    def __init__(
        self, links: Sequence["_Link"], inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        self._links = tuple(links)
        self.inputs = inputs
        self.outputs = outputs

    @property
    def row_wise(self) -> bool:
        """Whether all steps treat rows one by one."""
        return all(getattr(link.step, "row_wise", False) is True for link in self._links)

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """What comes out for `arrays`. Raises `InvalidInput` (the caller's fault) and `StepFailed`."""
        there = {name: _sealed(array) for name, array in arrays.items()}
        for link in self._links:
            there = link.run(there)
        return there

    def example(self) -> dict[str, Array]:
        """Valid arrays for those of `inputs` for which a step has some."""
        names, found = {spec.name for spec in self.inputs}, dict[str, Array]()
        for link in reversed(self._links):
            found |= {name: array for name, array in link.example().items() if name in names}
        return found


def open_chain(steps: Sequence[PipelineStep], inputs: tuple[TensorSpec, ...], find: Find, guard: Guard) -> Chain:
    """The steps, open, the first with the tensors `inputs`. Raises `StepFailed` and what `find` raises."""
    specs, links = inputs, list[_Link]()
    for step in steps:
        link = _opened(step, specs, find, guard)
        links.append(link)
        specs = link.after(specs)
    return Chain(links, inputs, specs)


class _Link:
    """A step in its place."""

    def __init__(self, name: str, step: Step, guard: Guard) -> None:
        self.step = step
        self._name = name
        self._guard = guard
        self._inputs = _specs(step.inputs, f"{name}: inputs")
        self._outputs = _specs(step.outputs, f"{name}: outputs")

    def after(self, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        """The tensors behind it, if there are `specs` before it."""
        known = {spec.name: spec for spec in specs}
        for spec in self._inputs:
            if known.get(spec.name) != spec:
                there = ", ".join(f"{one.name} {describe(one)}" for one in specs)
                raise StepFailed(f"{self._name} takes {spec.name} {describe(spec)}; there is {there}")
        taken = {spec.name for spec in self._inputs}
        passing = tuple(spec for spec in specs if spec.name not in taken)
        behind = (*self._outputs, *passing)
        if len({spec.name for spec in behind}) != len(behind):
            raise StepFailed(f"{self._name} puts a tensor where there is one of its name", fix="give it another name")
        return behind

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        taken = {spec.name: arrays[spec.name] for spec in self._inputs}
        found = _tried(self._guard, lambda: self.step.apply(taken), self._name)
        rest = {name: array for name, array in arrays.items() if name not in taken}
        return {spec.name: self._checked(found, spec) for spec in self._outputs} | rest

    def example(self) -> Mapping[str, Array]:
        given = getattr(self.step, "example", None)
        found = _tried(self._guard, given, f"the example of {self._name}") if given else {}
        return {spec.name: self._checked(found, spec) for spec in self._inputs if spec.name in found}

    def _checked(self, found: Mapping[str, Array], spec: TensorSpec) -> Array:
        array = found.get(spec.name) if isinstance(found, Mapping) else None
        if not isinstance(array, np.ndarray):
            raise StepFailed(f"{self._name} answered without an array {spec.name!r}")
        if not accepts(spec, array):
            got = f"{datatype_of(array)} {list(array.shape)}"
            raise StepFailed(f"{self._name} answered {got} as {spec.name!r}, declared is {describe(spec)}")
        if array.dtype.kind == "O" and not all(isinstance(text, str) for text in array.flat):
            raise StepFailed(f"{self._name} answered other things than strings as {spec.name!r}")
        return _sealed(array)


def _opened(step: PipelineStep, specs: tuple[TensorSpec, ...], find: Find, guard: Guard) -> _Link:
    name = f"step {step.plugin} {step.version}"
    function = _tried(guard, lambda: find(step), name)

    def open_it() -> Step:
        try:
            return function(dict(step.parameters), specs)
        except ImportError as error:
            fix = "install what it needs; the update goes on by itself"
            raise PluginMissing(f"it needs more than is installed: {error}", field=step.plugin, fix=fix) from error

    try:
        opened = _tried(guard, open_it, name)
    except InvalidInput as error:
        raise StepFailed(f"{name}: {error}") from error
    if not callable(getattr(opened, "apply", None)):
        raise StepFailed(f"{name} has no apply()")
    return _Link(name, opened, guard)


def _tried(guard: Guard, work: Callable[[], T], name: str) -> T:
    try:
        return guard.run(work, name)
    except (InvalidInput, PluginMissing, StepFailed):
        raise
    except Exception as error:  # a plug-in may raise anything
        raise StepFailed(f"{name} raised {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _specs(declared: Any, what: str) -> tuple[TensorSpec, ...]:
    """As they are declared, whatever class a plug-in uses for them."""
    try:
        specs = tuple(
            TensorSpec(str(one.name), one.datatype, tuple(int(axis) for axis in one.shape)) for one in declared
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise StepFailed(f"{what} are not declared as specs with name, datatype and shape") from error
    for spec in specs:
        if spec.datatype not in DTYPES:
            raise StepFailed(f"{what}: {spec.name!r} has type {spec.datatype}", fix=f"use one of {in_words(DTYPES)}")
    return specs


def _sealed(array: Array) -> Array:
    """The array, read-only: another release may be asked the same."""
    view = array.view()
    view.flags.writeable = False
    return view
