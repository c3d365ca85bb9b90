"""Makes the versions of MiniLM that pairs consist of, by really training it: `make_pairs MODEL_FOLDER OUT_FOLDER`.

Runs in an environment of its own that has torch, and imports nothing of the project but `minilm`. The task is to tell
from which package of Python's standard library a few lines of source come: real text, real gradients, on any machine.
Seeds and the number of threads are fixed, so one machine makes the same bytes each time. A version that is on disk is
not made again; each is one file, OUT_FOLDER/VERSION.safetensors.
"""

import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch

from benchmarks.delta.minilm import HEAD_BIAS, HEAD_WEIGHT, WORDS, Weights, WordPiece, load, logits, save
from benchmarks.delta.minilm_shape import HIDDEN

PACKAGES = (
    "asyncio",
    "email",
    "encodings",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "xml",
)
LINES_PER_SAMPLE = 6
TOKENS_MAX = 48
BATCH = 16
SEED = 20
THREADS = 2
STEPS_MAX = 100
RANK = 8
LORA_SCALE = 2.0
QUANTISED_MAX = 127

Optimiser: TypeAlias = torch.optim.Optimizer
Batches = Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
Save = Callable[[str, Weights], None]


def main() -> None:
    model_folder, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    words = WordPiece(model_folder / "vocab.txt")
    base = _with_head(load(model_folder / "model.safetensors"), len(PACKAGES))
    _Versions(folder, base, words).make()


class _Versions:
    """The versions on disk; makes those that are missing."""

    def __init__(self, folder: Path, base: Weights, words: WordPiece) -> None:
        self._folder = folder
        self._base = base
        self._words = words

    def make(self) -> None:
        self._keep("base", self._base)
        if self._missing("base-metadata"):
            save(self._base, self._path("base-metadata"), {"version": "1.0.1", "licence": "Apache-2.0"})
        self._train()
        for version in ("base", "adam-10", "adam-100"):
            for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
                self._derive(f"{version}-{name}", version, partial(_cast, dtype=dtype))
            self._derive(f"{version}-int8-tensor", version, lambda weights: _quantised(weights, per_channel=False))
            self._derive(f"{version}-int8-channel", version, lambda weights: _quantised(weights, per_channel=True))
        self._derive("base-pruned", "base", _pruned)
        self._derive("base-class-appended", "base", _with_class)

    def _train(self) -> None:
        base, words, keep = self._base, self._words, self._keep
        if self._missing("adam-1", "adam-10", "adam-100"):
            _fine_tune(base, words, lambda some: torch.optim.Adam(some, lr=2e-5), {1, 10, 100}, "adam", keep)
        if self._missing("adamw-10"):
            decaying = partial(torch.optim.AdamW, lr=2e-5, weight_decay=0.01)
            _fine_tune(base, words, decaying, {10}, "adamw", keep)
        if self._missing("sgd-10"):
            _fine_tune(base, words, lambda some: torch.optim.SGD(some, lr=1e-2, momentum=0.9), {10}, "sgd", keep)
        if self._missing("head-10"):
            head = {HEAD_WEIGHT, HEAD_BIAS}
            _fine_tune(base, words, lambda some: torch.optim.Adam(some, lr=1e-3), {10}, "head", keep, trained=head)
        if self._missing("lora-20"):
            keep("lora-20", _low_rank(base, words, steps=20))

    def _derive(self, version: str, source: str, change: Callable[[Weights], Weights]) -> None:
        if self._missing(version):
            self._keep(version, change(load(self._path(source))))

    def _keep(self, version: str, weights: Weights) -> None:
        if self._missing(version):
            save(weights, self._path(version))
            print(f"made {version}", flush=True)

    def _missing(self, *versions: str) -> bool:
        return not all(self._path(version).exists() for version in versions)

    def _path(self, version: str) -> Path:
        return self._folder / f"{version}.safetensors"


def _fine_tune(
    base: Weights,
    words: WordPiece,
    optimiser: Callable[[list[torch.Tensor]], Optimiser],
    kept: set[int],
    name: str,
    keep: Save,
    *,
    trained: set[str] | None = None,
) -> None:
    """Train (all floats, or `trained` only) and keep the weights after each number of steps in `kept`."""
    weights = {key: tensor.clone() for key, tensor in base.items()}
    names = trained or {key for key, tensor in weights.items() if tensor.is_floating_point()}
    some = [weights[key].requires_grad_() for key in sorted(names)]
    step = optimiser(some)
    for number, (tokens, mask, labels) in zip(range(1, max(kept) + 1), _batches(words), strict=False):
        step.zero_grad()
        torch.nn.functional.cross_entropy(logits(weights, tokens, mask), labels).backward()
        step.step()
        if number in kept:
            keep(f"{name}-{number}", weights)


def _low_rank(base: Weights, words: WordPiece, steps: int) -> Weights:
    """Train LoRA adapters (Hu et al., 2021) on the attention's queries and values, and merge them in float32."""
    torch.manual_seed(SEED)
    names = [name for name in sorted(base) if name.endswith((".query.weight", ".value.weight"))]
    downs = {name: (torch.randn(RANK, HIDDEN) / HIDDEN**0.5).requires_grad_() for name in names}
    ups = {name: torch.zeros(HIDDEN, RANK).requires_grad_() for name in names}
    step = torch.optim.Adam([*downs.values(), *ups.values()], lr=1e-3)
    merged = dict(base)
    for _, (tokens, mask, labels) in zip(range(steps), _batches(words), strict=False):
        step.zero_grad()
        merged.update({name: base[name] + LORA_SCALE * (ups[name] @ downs[name]) for name in names})
        torch.nn.functional.cross_entropy(logits(merged, tokens, mask), labels).backward()
        step.step()
    merged.update({name: base[name] + LORA_SCALE * (ups[name] @ downs[name]) for name in names})
    return merged


def _batches(words: WordPiece) -> Batches:
    """The same `STEPS_MAX` batches each time: tokens and mask int64 [BATCH, length], labels int64 [BATCH]."""
    chance = random.Random(SEED)
    samples = [_samples(package) for package in PACKAGES]
    for _ in range(STEPS_MAX):
        labels = [chance.randrange(len(PACKAGES)) for _ in range(BATCH)]
        rows = [words.encode(chance.choice(samples[label]), TOKENS_MAX) for label in labels]
        length = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        yield tokens, mask, torch.tensor(labels)


def _samples(package: str) -> list[str]:
    """The package's source in runs of a few lines."""
    folder = Path(sysconfig.get_path("stdlib")) / package
    samples = []
    for path in sorted(folder.rglob("*.py")):
        lines = [line for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        samples += ["\n".join(lines[at : at + LINES_PER_SAMPLE]) for at in range(0, len(lines), LINES_PER_SAMPLE)]
    return samples


def _with_head(weights: Weights, classes: int) -> Weights:
    torch.manual_seed(SEED)
    head = torch.randn(classes, HIDDEN) * 0.02
    return {**weights, HEAD_WEIGHT: head, HEAD_BIAS: torch.zeros(classes)}


def _cast(weights: Weights, dtype: torch.dtype) -> Weights:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def _quantised(weights: Weights, *, per_channel: bool) -> Weights:
    """Symmetric int8 of every matrix, its float32 scale (one, or one per row) beside it."""
    quantised: Weights = {}
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.ndim == 2:
            largest = tensor.abs().amax(1, keepdim=True) if per_channel else tensor.abs().max()
            scale = (largest / QUANTISED_MAX).clamp_min(torch.finfo(torch.float32).tiny)
            quantised[name] = (tensor / scale).round().to(torch.int8)
            quantised[f"{name}_scale"] = scale.flatten()
        else:
            quantised[name] = tensor
    return quantised


def _pruned(weights: Weights) -> Weights:
    """The smaller half of each matrix set to zero."""
    pruned = dict(weights)
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.ndim == 2:
            threshold = tensor.abs().flatten().kthvalue(tensor.numel() // 2).values
            pruned[name] = torch.where(tensor.abs() <= threshold, 0.0, tensor)
    return pruned


def _with_class(weights: Weights) -> Weights:
    """One more class, one more word: a row more in the head and in the embeddings, all else as it was."""
    torch.manual_seed(SEED + 1)
    grown = dict(weights)
    for name in (HEAD_WEIGHT, WORDS):
        grown[name] = torch.cat([weights[name], torch.randn(1, HIDDEN) * 0.02])
    grown[HEAD_BIAS] = torch.cat([weights[HEAD_BIAS], torch.zeros(1)])
    return grown


if __name__ == "__main__":
    main()
