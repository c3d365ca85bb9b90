"""`edgeferry.image` 1: JPEG and PNG files become the array that a model of images takes. Needs Pillow.

The tensor `input` is one file, as UINT8 [any], or several, as BYTES [any] in base64 (the inference protocol carries
text there). In its place comes `output`, FP32 or UINT8 [images, channels, height, width] (or `nhwc`): the picture,
turned as its EXIF data say, in `mode` RGB or L, resized (bilinear) to `width` by `height` whatever its proportions are,
then (value * scale - mean) / std for each channel, in FP32. Rows are independent, where several files may come.
"""

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from common.artifact.tensor_spec import TensorSpec
from common.artifact.tensors import Array
from common.errors import InvalidInput
from common.pipelines.parameters import parse, pick

SIDE_MAX = 8192
"""Of the array, in pixels."""
PIXELS_MAX = 64 * 1024 * 1024
"""Of a file that is decoded: a small file may say that it is huge."""
FORMATS = ("JPEG", "PNG")

Side = Annotated[int, Meta(ge=1, le=SIDE_MAX)]
Channels = Annotated[tuple[float, ...], Meta(min_length=1, max_length=3)]


class ImageParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`mean` and `std` have one number for each channel, or one for all; with UINT8 there is no arithmetic."""

    width: Side
    height: Side
    output: str
    input: str = ""
    mode: Literal["RGB", "L"] = "RGB"
    layout: Literal["nchw", "nhwc"] = "nchw"
    datatype: Literal["FP32", "UINT8"] = "FP32"
    scale: float = 1 / 255
    mean: Channels = (0.0,)
    std: Channels = (1.0,)

    @property
    def channels(self) -> int:
        return 3 if self.mode == "RGB" else 1


class Image:
    """The open step."""

    def __init__(self, spec: TensorSpec, parameters: ImageParameters) -> None:
        self._wanted = parameters
        self._mean, self._std = (np.array(one, np.float32) for one in (parameters.mean, parameters.std))
        count = 1 if spec.datatype == "UINT8" else -1
        planes = (parameters.height, parameters.width)
        shape = (parameters.channels, *planes) if parameters.layout == "nchw" else (*planes, parameters.channels)
        self.inputs: tuple[TensorSpec, ...] = (spec,)
        self.outputs: tuple[TensorSpec, ...] = (TensorSpec(parameters.output, parameters.datatype, (count, *shape)),)
        self.row_wise = spec.datatype == "BYTES"

    def apply(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """See `common.pipelines.Step.apply`."""
        given = arrays[self.inputs[0].name]
        files = [given.tobytes()] if given.dtype == np.uint8 else [_from_base64(text) for text in given]
        shape = self.outputs[0].shape[1:]
        rows = [self._row(data) for data in files]
        return {self._wanted.output: np.stack(rows) if rows else np.empty((0, *shape), np.dtype(self._dtype))}

    def example(self) -> dict[str, Array]:
        """One black pixel."""
        from PIL import Image as Pillow

        file = io.BytesIO()
        Pillow.new("RGB", (1, 1)).save(file, "PNG")
        data = file.getvalue()
        spec = self.inputs[0]
        if spec.datatype == "UINT8":
            return {spec.name: np.frombuffer(data, np.uint8)}
        return {spec.name: np.array([base64.b64encode(data).decode()], object)}

    @property
    def _dtype(self) -> str:
        return "float32" if self._wanted.datatype == "FP32" else "uint8"

    def _row(self, data: bytes) -> Array:
        wanted = self._wanted
        pixels = _decoded(data, wanted)
        if wanted.datatype == "FP32":
            pixels = (pixels.astype(np.float32) * np.float32(wanted.scale) - self._mean) / self._std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if wanted.layout == "nchw" else pixels


def open_image(parameters: Mapping[str, Any], inputs: tuple[TensorSpec, ...]) -> Image:
    """See `common.pipelines.step.OpenStep`. Raises `ImportError` where Pillow is not installed."""
    import PIL.Image  # noqa: F401 (found out now and not at the first request)

    wanted = parse(ImageParameters, parameters)
    spec = pick(inputs, wanted.input)
    if (spec.datatype, spec.shape) not in {("UINT8", (-1,)), ("BYTES", (-1,))}:
        raise InvalidInput(
            f"{spec.name} is no file", field="parameters.input", fix="declare it as UINT8 [-1] or BYTES [-1]"
        )
    for name, numbers in (("mean", wanted.mean), ("std", wanted.std)):
        if len(numbers) not in {1, wanted.channels}:
            fix = f"give 1 or {wanted.channels}"
            raise InvalidInput(f"{len(numbers)} numbers", field=f"parameters.{name}", fix=fix)
    if 0.0 in wanted.std:
        raise InvalidInput("divides by zero", field="parameters.std")
    return Image(spec, wanted)


def _decoded(data: bytes, wanted: ImageParameters) -> Array:
    """The picture as UINT8 [height, width, channels]; `InvalidInput` when the file is none."""
    from PIL import Image as Pillow
    from PIL import ImageOps

    try:
        with Pillow.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > PIXELS_MAX:
                raise InvalidInput(
                    f"{picture.width} x {picture.height} pixels", field="inputs", fix="send a smaller one"
                )
            upright = ImageOps.exif_transpose(picture).convert(wanted.mode)
            resized = upright.resize((wanted.width, wanted.height), Pillow.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
        fix = f"send {' or '.join(FORMATS)}"
        raise InvalidInput(f"the file cannot be decoded: {error}", field="inputs", fix=fix) from error
    pixels: Array = np.asarray(resized, np.uint8).reshape(wanted.height, wanted.width, wanted.channels)
    return pixels


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput("a file is not base64", field="inputs", fix="encode each file as base64") from error
