"""Which requests to one release are sampled for drift, and what is copied of them.

At most one request each `interval_s` is sampled: a bounded number of its elements is copied before the caller has the
answer, because the caller may write into its arrays then; counting them is for whoever cuts the telemetry window. A
request that asked for a part of the outputs only is passed over.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from common.artifact import TensorSpec, digest_of
from common.artifact.tensors import Array
from common.errors import IntegrityFailure, InvalidInput
from common.monitoring.reference import REFERENCE_BYTES_MAX, Reference, check_reference, decode_reference
from common.monitoring.sketching import Sampled, pick

logger = logging.getLogger(__name__)

NEVER_S = float("inf")
"""Between two samples, to take none."""


class Watch:
    """Samples the requests to one release. Threads may race for one: then two are taken, which does no harm."""

    def __init__(self, reference: Reference, named: str, interval_s: float) -> None:
        self._reference = reference
        self._named = named
        self._interval_s = interval_s
        self._next_at = 0.0
        self._outputs = {feature.tensor for feature in reference.features if feature.side == "output"}

    def sample(self, now: float, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> Sampled | None:
        """What is to be counted of a request that is answered at `now` (monotonic seconds), if it is sampled."""
        if now < self._next_at or not self._outputs <= outputs.keys():
            return None
        self._next_at = now + self._interval_s
        tensors = {"input": feeds, "output": outputs}
        picked = tuple(pick(one, tensors[one.side][one.tensor]) for one in self._reference.features)
        return Sampled(self._reference, self._named, picked)


class WatchTerms(NamedTuple):
    """Where the reference lies that a release is watched by, if it has one, and how often it is looked at."""

    path: Path | None = None
    interval_s: float = NEVER_S


def open_watch(terms: WatchTerms, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Watch | None:
    """The watch of a model with these tensors, or None where nothing is to be sampled.

    A file that is of no use is no reason not to serve.
    """
    if terms.path is None or terms.interval_s == NEVER_S:
        return None
    try:
        with terms.path.open("rb") as file:
            data = file.read(REFERENCE_BYTES_MAX + 1)
        reference = decode_reference(data)
        check_reference(reference, inputs, outputs)
        return Watch(reference, digest_of(data), terms.interval_s)
    except (OSError, IntegrityFailure, InvalidInput) as error:
        logger.warning("no drift is looked for: %s", error, extra={"path": str(terms.path)})
        return None
