"""Heads of requests and answers that come again and again: most callers send the same JSON before other bytes.

What `protocol` found in a head once is used for the next request with an equal one, if all of its tensors are binary
numbers. Everything else, and everything that is wrong, goes through `protocol`. Safe for threads: at worst, two learn
the same. Nothing is kept of requests with an `id`, whose heads differ.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from common.artifact.tensors import Array
from common.ids import ModelName, Version
from edge_agent.inference.protocol import Body, InferRequest, as_bytes, decode_request, encode_response

HEAD_BYTES_MAX: Final = 4096
"""Longer ones are not kept."""
HEADS_MAX: Final = 256
"""Of requests, and as many of answers; when there are more, all are forgotten."""


class _Place(NamedTuple):
    """Where a tensor lies behind the head."""

    name: str
    dtype: np.dtype[Any]
    elements: int
    offset: int
    shape: tuple[int, ...]


class _Plan(NamedTuple):
    """What an equal head means. `size` is the length of the whole body."""

    request: InferRequest
    places: tuple[_Place, ...]
    size: int


class Repeated:
    """`decode_request` and `encode_response`, with a memory."""

    def __init__(self) -> None:
        self._plans: dict[bytes, _Plan] = {}
        self._answers: dict[tuple[Any, ...], bytes] = {}

    def decode(self, body: bytes, header_length: int | None) -> InferRequest:
        """As `decode_request`."""
        if header_length is None or header_length > HEAD_BYTES_MAX:
            return decode_request(body, header_length)
        head = body[:header_length]
        plan = self._plans.get(head)
        if plan is None or plan.size != len(body):
            request = decode_request(body, header_length)
            self._learn(head, request, len(body))
            return request
        feeds: dict[str, Array] = {}
        for name, dtype, elements, offset, shape in plan.places:
            array = np.frombuffer(body, dtype, elements, offset)
            feeds[name] = (array if array.flags.aligned else array.copy()).reshape(shape)
        same = plan.request
        return InferRequest(
            same.id,
            feeds,
            same.outputs,
            same.binary,
            same.binary_by_default,
            same.priority,
            same.timeout_s,
            same.parameters,
        )

    def encode(self, model: ModelName, version: Version, request: InferRequest, outputs: Mapping[str, Array]) -> Body:
        """As `encode_response`."""
        if request.id or not _all_binary(request, outputs):
            return encode_response(model, version, request, dict(outputs))
        key = (model, version, *((name, array.dtype.char, array.shape) for name, array in outputs.items()))
        head = self._answers.get(key)
        if head is not None:
            return Body(b"".join([head, *map(as_bytes, outputs.values())]), len(head))
        body = encode_response(model, version, request, dict(outputs))
        if body.header_length is not None and body.header_length <= HEAD_BYTES_MAX:
            _keep(self._answers, key, body.data[: body.header_length])
        return body

    def _learn(self, head: bytes, request: InferRequest, size: int) -> None:
        places, offset = [], len(head)
        for name, array in request.feeds.items():
            if array.dtype == np.object_ or not array.size:
                return
            places.append(_Place(name, array.dtype, array.size, offset, array.shape))
            offset += array.nbytes
        if offset == size and not request.id:  # else a tensor was in the head itself
            _keep(self._plans, head, _Plan(request._replace(feeds={}), tuple(places), size))


def _all_binary(request: InferRequest, outputs: Mapping[str, Array]) -> bool:
    """Whether all outputs are wanted as the bytes of numbers."""
    wanted = request.binary.issuperset(outputs) if request.outputs else request.binary_by_default
    return wanted and "O" not in [array.dtype.char for array in outputs.values()]


def _keep(memory: dict[Any, Any], key: Any, value: Any) -> None:
    if len(memory) >= HEADS_MAX:
        memory.clear()
    memory[key] = value
