"""MiniLM as plain functions over a dict of tensors: read it, run it forward, save it. Needs torch.

The network is BERT under the names that its safetensors file gives the weights, with a linear classification head on
the mean of the last layer. There is no dropout: a fine-tune must be the same each time.

Knows nothing of training, and nothing of what a pair of models is.
"""

import ctypes
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.delta.minilm_shape import HEADS, HIDDEN, LAYER_NORM_EPSILON, LAYERS

HEAD_WEIGHT, HEAD_BIAS = "classifier.weight", "classifier.bias"
WORDS = "embeddings.word_embeddings.weight"

Weights = dict[str, torch.Tensor]

_DTYPES = {
    "I64": torch.int64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def load(path: Path) -> Weights:
    """All tensors of a safetensors file."""
    data = bytearray(path.read_bytes())
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    weights = {}
    for name, entry in header.items():
        start, end = (8 + header_bytes + place for place in entry["data_offsets"])
        flat = torch.frombuffer(data[start:end], dtype=_DTYPES[entry["dtype"]])
        weights[name] = flat.reshape(entry["shape"])
    return weights


def save(weights: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file as the library of that name does: widest dtype first, then by name."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    names = sorted(weights, key=lambda name: (-weights[name].element_size(), name))
    place = 0
    for name in names:
        end = place + weights[name].numel() * weights[name].element_size()
        shape, dtype = list(weights[name].shape), _NAMES[weights[name].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, end]}
        place = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in names:
            tensor = weights[name].detach().contiguous()
            file.write(ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size()))
    unfinished.replace(path)


def logits(weights: Weights, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`tokens` and `mask` (1 for a token, 0 for padding): int64 [batch, length]. Answers float32 [batch, classes]."""
    length = tokens.shape[1]
    hidden = (
        weights[WORDS][tokens]
        + weights["embeddings.position_embeddings.weight"][:length]
        + weights["embeddings.token_type_embeddings.weight"][0]
    )
    hidden = _normed(weights, "embeddings.LayerNorm", hidden)
    for layer in range(LAYERS):
        hidden = _layer(weights, f"encoder.layer.{layer}", hidden, mask)
    kept = mask.unsqueeze(-1).to(hidden.dtype)
    pooled = (hidden * kept).sum(1) / kept.sum(1)
    return pooled @ weights[HEAD_WEIGHT].T + weights[HEAD_BIAS]


def _layer(weights: Weights, prefix: str, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    attended = _attention(weights, f"{prefix}.attention.self", hidden, mask)
    attended = _linear(weights, f"{prefix}.attention.output.dense", attended)
    hidden = _normed(weights, f"{prefix}.attention.output.LayerNorm", hidden + attended)
    inner = torch.nn.functional.gelu(_linear(weights, f"{prefix}.intermediate.dense", hidden))
    return _normed(weights, f"{prefix}.output.LayerNorm", hidden + _linear(weights, f"{prefix}.output.dense", inner))


def _attention(weights: Weights, prefix: str, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    batch, length, _ = hidden.shape
    query, key, value = (
        _linear(weights, f"{prefix}.{part}", hidden).reshape(batch, length, HEADS, -1).transpose(1, 2)
        for part in ("query", "key", "value")
    )
    scores = query @ key.transpose(2, 3) / math.sqrt(HIDDEN // HEADS)
    scores = scores.masked_fill(mask[:, None, None, :] == 0, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, HIDDEN)


def _linear(weights: Weights, name: str, hidden: torch.Tensor) -> torch.Tensor:
    return hidden @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _normed(weights: Weights, name: str, hidden: torch.Tensor) -> torch.Tensor:
    scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return torch.nn.functional.layer_norm(hidden, (HIDDEN,), scale, shift, LAYER_NORM_EPSILON)


class WordPiece:
    """Text to token numbers with the model's vocabulary: lower case, greedy longest match (Wu et al., 2016)."""

    def __init__(self, vocabulary: Path) -> None:
        self._numbers = {word: number for number, word in enumerate(vocabulary.read_text("utf-8").split("\n"))}

    def encode(self, text: str, length: int) -> list[int]:
        """At most `length` numbers, `[CLS]` and `[SEP]` included."""
        pieces = [piece for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower()) for piece in self._pieces(word)]
        return [self._numbers["[CLS]"], *pieces[: length - 2], self._numbers["[SEP]"]]

    def _pieces(self, word: str) -> Sequence[int]:
        pieces: list[int] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in self._numbers)
            end = next(ends, 0)
            if not end:
                return [self._numbers["[UNK]"]]
            pieces.append(self._numbers[prefix + word[start:end]])
            start = end
        return pieces
