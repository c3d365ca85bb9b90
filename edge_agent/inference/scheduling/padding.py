"""Requests of different lengths as one batch: which are near enough, how they are made as long as the longest, and how
their answers are cut back. Pure.

A release says which inputs may be longer, along which axis, and what to fill them with (`common.artifact.serving`); all
of them have one length in a request. Which outputs grow along, and along which axis, the signature does not say: it is
seen on requests that were answered alone and padded (`cuts_of`), and so is whether the padding changes the answer.

    >>> padder = Padder({"ids": Padding(axis=1, value=0, mask="mask")})
    >>> short = {"ids": np.array([[5, 6]]), "mask": np.array([[1, 1]])}
    >>> padder.length_of(short)
    2
    >>> padder.padded(short, 3)["mask"].tolist()
    [[1, 1, 0]]
"""

import math
from collections.abc import Hashable, Mapping
from typing import Final

import numpy as np

from common.artifact.serving import Padding
from common.artifact.tensors import Array

STRETCH_MAX: Final = 1.25
"""Requests whose lengths differ by more than this factor from the first one's do not go with it."""

Cuts = dict[str, int | None]
"""For each output the axis that is as long as the request; None if it has none."""


def near(one: int, other: int) -> bool:
    """Whether requests of these lengths may go together."""
    return max(one, other) <= STRETCH_MAX * min(one, other)


def length_class(length: int) -> int:
    """A number that lengths have in common which cost about the same; 0 for requests without a length."""
    return math.ceil(math.log(length, STRETCH_MAX)) + 1 if length else 0


class Padder:
    """The padding that a release allows."""

    def __init__(self, padding: Mapping[str, Padding]) -> None:
        self._fill: dict[str, tuple[int, bool | float | str]] = {}
        for name, one in padding.items():
            self._fill[name] = one.axis, one.value
            if one.mask is not None:
                self._fill[one.mask] = one.axis, 0

    def length_of(self, feeds: Mapping[str, Array]) -> int:
        """The length that all padded inputs have; 0 if they have different ones."""
        lengths = {feeds[name].shape[axis] for name, (axis, _) in self._fill.items()}
        return lengths.pop() if len(lengths) == 1 else 0

    def shape_of(self, feeds: Mapping[str, Array]) -> Hashable:
        """What inputs of any length have in common that may go together."""
        return tuple([(name, self._open(name, feeds[name].shape[1:])) for name in sorted(feeds)])

    def padded(self, feeds: Mapping[str, Array], length: int) -> dict[str, Array]:
        """The inputs, made `length` long; each costs a copy unless it is so long already."""
        return {name: self._fill_up(name, array, length) for name, array in feeds.items()}

    def _open(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        fill = self._fill.get(name)
        return shape if fill is None else (*shape[: fill[0] - 1], -1, *shape[fill[0] :])

    def _fill_up(self, name: str, array: Array, length: int) -> Array:
        fill = self._fill.get(name)
        if fill is None or array.shape[fill[0]] == length:
            return array
        axis, value = fill
        longer = np.full((*array.shape[:axis], length, *array.shape[axis + 1 :]), value, array.dtype)
        longer[(slice(None),) * axis + (slice(array.shape[axis]),)] = array
        return longer


def cuts_of(alone: Mapping[str, Array], padded: Mapping[str, Array], length: int, longest: int) -> Cuts | None:
    """How the outputs of a request of `length` that was padded to `longest` (more than that) are to be cut to what came
    out alone; None if the shapes differ in any other way.
    """
    cuts: Cuts = {}
    for name, array in padded.items():
        other = alone[name].shape
        axes = [axis for axis, (one, two) in enumerate(zip(array.shape, other, strict=False)) if one != two]
        if not axes and array.shape == other:
            cuts[name] = None
        elif len(axes) == 1 and axes[0] > 0 and (array.shape[axes[0]], other[axes[0]]) == (longest, length):
            cuts[name] = axes[0]
        else:
            return None
    return cuts


def cut_back(outputs: Mapping[str, Array], cuts: Cuts, length: int) -> dict[str, Array]:
    """The outputs of a padded request as it would have got them alone."""
    return {
        name: array if (axis := cuts.get(name)) is None else array[(slice(None),) * axis + (slice(length),)]
        for name, array in outputs.items()
    }
