"""The real models that serving is measured with, one request to each, and that request as every server wants it.

All come from wheels on PyPI. The shapes are those that give about 0.1, 5 and 15 ms on one core of a laptop.
"""

import base64
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np

from benchmarks.report import ROOT
from common.artifact import TensorSpec
from common.artifact.tensors import Array, datatype_of
from edge_agent.inference.http import HEADER_LENGTH

FOLDER: Final = ROOT / ".demo" / "bench-models"
MAGIKA: Final = ROOT / ".demo" / "models" / "magika-0.6.3" / "magika" / "models" / "standard_v3_3" / "model.onnx"
MAGIKA_BEFORE: Final = ROOT / ".demo" / "models" / "magika-0.6.1" / "magika" / "models" / "standard_v3_2" / "model.onnx"


class Body(NamedTuple):
    """A request body, and the headers that go with it."""

    data: bytes
    headers: Mapping[str, str]


class BenchModel:
    """A model file and the inputs of one request to it; `rows`, whether its requests may share a batch."""

    def __init__(self, name: str, about: str, path: Path, feeds: Mapping[str, Array], *, rows: bool = True) -> None:
        self.name = name
        self.about = about
        self.path = path
        self.feeds = dict(feeds)
        self.rows = rows

    @cached_property
    def tensors(self) -> list[dict[str, object]]:
        """The inputs as Open Inference Protocol V2 describes them, in the order of `feeds`."""
        return [
            {"name": name, "shape": list(array.shape), "datatype": datatype_of(array)}
            for name, array in self.feeds.items()
        ]

    @property
    def declared(self) -> tuple[TensorSpec, ...]:
        """The inputs as a publisher declares them: with the shapes of `feeds`, and any number of rows."""
        return tuple(
            TensorSpec(name, datatype_of(array), (-1, *array.shape[1:]) if self.rows else array.shape)
            for name, array in self.feeds.items()
        )

    def v2_binary(self) -> Body:
        """V2 with binary tensors, answered in the same way."""
        inputs = [
            {**tensor, "parameters": {"binary_data_size": array.nbytes}}
            for tensor, array in zip(self.tensors, self.feeds.values(), strict=True)
        ]
        header = msgspec.json.encode({"inputs": inputs, "parameters": {"binary_data_output": True}})
        return Body(header + self.bare().data, {HEADER_LENGTH: str(len(header))})

    def v2_json(self) -> Body:
        """V2 with numbers in JSON."""
        inputs = [
            {**tensor, "data": array.ravel().tolist()}
            for tensor, array in zip(self.tensors, self.feeds.values(), strict=True)
        ]
        return Body(msgspec.json.encode({"inputs": inputs}), {"Content-Type": "application/json"})

    def bare(self) -> Body:
        """The bytes of the tensors, one after another, for a server that knows their shapes."""
        data = b"".join(array.tobytes() for array in self.feeds.values())
        return Body(data, {"Content-Type": "application/octet-stream"})

    def base64_json(self) -> Body:
        """`bare`, in a JSON document, for a server that takes nothing else."""
        data = base64.b64encode(self.bare().data).decode()
        return Body(msgspec.json.encode({"data": data}), {"Content-Type": "application/json"})


def models() -> tuple[BenchModel, BenchModel, BenchModel]:
    """The small, the middle and the large one."""
    chance = np.random.default_rng(1)
    speech: dict[str, Array] = {
        "input": chance.normal(0, 0.1, (1, 512)).astype(np.float32),
        "sr": np.array(16_000, np.int64),
        "state": np.zeros((2, 1, 128), np.float32),
    }
    picture: dict[str, Array] = {"x": chance.normal(0, 1, (1, 3, 96, 96)).astype(np.float32)}
    text: dict[str, Array] = {"bytes": chance.integers(0, 257, (1, 2048), np.int32)}
    return (
        BenchModel("silero-vad", "voice activity, 3 kB", _silero(), speech, rows=False),
        BenchModel("PP-OCR det", "text detection, 96 x 96, 111 kB", _paddle_det(), picture),
        BenchModel("magika", "content type, 8 kB", MAGIKA, text),
    )


def batched() -> tuple[BenchModel, ...]:
    """Models whose rows may share a batch: the two larger ones and another of PP-OCR that gains nothing from it."""
    line = {"x": np.random.default_rng(2).normal(0, 1, (1, 3, 48, 192)).astype(np.float32)}
    cls = _paddle() / "ch_ppocr_mobile_v2.0_cls_infer.onnx"
    return (BenchModel("PP-OCR cls", "text direction, 48 x 192, 111 kB", cls, line), *models()[1:])


def _silero() -> Path:
    return FOLDER / "silero_vad" / "silero_vad" / "data" / "silero_vad_op18_ifless.onnx"


def _paddle() -> Path:
    return FOLDER / "rapidocr_onnxruntime" / "rapidocr_onnxruntime" / "models"


def _paddle_det() -> Path:
    return _paddle() / "ch_PP-OCRv4_det_infer.onnx"
