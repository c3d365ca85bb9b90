"""What a tensor is declared as; arrays are held against it in `common.artifact.tensors`."""

import msgspec


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output; `datatype` as in the Open Inference Protocol V2 (`FP32`...), -1 for an open axis."""

    name: str
    datatype: str
    shape: tuple[int, ...]
