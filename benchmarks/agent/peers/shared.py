"""What every peer runs: the ONNX file in PEER_MODEL, as fast as ONNX Runtime alone does it.

These modules run in the peers' own environments and import nothing of ours. The model's options are those of our
engine: one thread inside an operator, no spinning. PEER_TENSORS describes the inputs (name, shape, dtype), so that a
body can be the bare bytes of the tensors, one after another, and so can the answer.
"""

import json
import math
import os

import numpy as np
import onnxruntime

CORES = len(os.sched_getaffinity(0))
PORT = int(os.environ.get("PEER_PORT", "0"))


def load() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(os.environ["PEER_MODEL"], options, providers=["CPUExecutionProvider"])


class BareModel:
    """Bytes in, bytes out."""

    def __init__(self) -> None:
        self.session = load()
        self._tensors = [(t["name"], t["shape"], np.dtype(t["dtype"])) for t in json.loads(os.environ["PEER_TENSORS"])]

    def run(self, body: bytes) -> bytes:
        feeds, offset = {}, 0
        for name, shape, dtype in self._tensors:
            count = math.prod(shape)
            feeds[name] = np.frombuffer(body, dtype, count, offset).reshape(shape)
            offset += count * dtype.itemsize
        return b"".join(np.ascontiguousarray(output).tobytes() for output in self.session.run(None, feeds))
