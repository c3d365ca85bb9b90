"""The plug-ins of this machine: which there are, what their code is, and getting at it once it is what was asked for.

The code of a plug-in is what its distribution installed, as its RECORD lists it (PyPA, "Recording installed projects"),
without what an installer adds or changes on each machine: `RECORD` itself, scripts outside of the folder of packages,
byte code, and of the `.dist-info` folder everything but `METADATA` and `entry_points.txt`. The bytes are read anew each
time; the digests in RECORD are not believed. What the distribution depends on is not part of it.

The digest says that a device runs the code that the publisher tried. It does not stop somebody who may write to the
agent's environment: that is who decides what Python imports.
"""

import importlib
import threading
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from typing import NamedTuple, cast

from common.artifact.pipeline import BUILT_IN_PREFIX, PipelineStep, code_digest
from common.errors import NotFound
from common.ids import Digest
from common.pipelines.built_in import BUILT_IN
from common.pipelines.step import OpenStep, PluginMissing

GROUP = "edgeferry.pipelines"
FILES_MAX = 10_000
CODE_BYTES_MAX = 512 * 1024 * 1024
"""Of one distribution."""
KEPT_METADATA = frozenset({"METADATA", "entry_points.txt"})

_imported: dict[str, Digest] = {}
"""The code of the distributions that this process has imported; it cannot have another one any more."""
_importing = threading.Lock()


class Plugin(NamedTuple):
    """An entry point, and the distribution that it belongs to."""

    name: str
    entry: EntryPoint
    distribution: Distribution

    @property
    def version(self) -> str:
        return self.distribution.version


def plugins() -> list[Plugin]:
    """The plug-ins that are installed, by name; names that begin as those of the agent's own steps do not count."""
    importlib.invalidate_caches()  # one may have been installed a moment ago
    found = [Plugin(one.name, one, one.dist) for one in entry_points(group=GROUP) if one.dist]
    return sorted((one for one in found if not one.name.startswith(BUILT_IN_PREFIX)), key=lambda one: one.name)


def find_plugin(name: str) -> Plugin:
    """The plug-in `name`; `NotFound` unless there is exactly one."""
    found = [one for one in plugins() if one.name == name]
    if not found:
        raise NotFound(f"there is no plug-in {name!r} in this Python environment", fix="pip install it there")
    if len(found) > 1:
        owners = " and ".join(one.distribution.name for one in found)
        raise NotFound(f"{owners} both bring a plug-in {name!r}", fix="uninstall one of them")
    return found[0]


def digest_of_plugin(plugin: Plugin) -> Digest:
    """The digest of its code (`common.artifact.pipeline.code_digest`); `NotFound` when that cannot be told."""
    return code_digest((path, file.read_bytes()) for path, file in _code(plugin.distribution))


def code_of(step: PipelineStep) -> OpenStep:
    """The function that opens `step`, imported if it is what the step asks for, else `PluginMissing`."""
    if step.built_in:
        return _built_in(step)
    with _importing:
        plugin, digest = _checked(step)
        name = plugin.distribution.name
        if _imported.setdefault(name, digest) != digest:
            fix = "restart the agent"
            raise PluginMissing(f"this process has imported {name} before it was exchanged", field=step.plugin, fix=fix)
        try:
            return cast(OpenStep, plugin.entry.load())
        except ImportError as error:
            fix = "install what it needs; the update goes on by itself"
            raise PluginMissing(f"{name} cannot be imported: {error}", field=step.plugin, fix=fix) from error


def check_installed(step: PipelineStep) -> None:
    """Raise `PluginMissing` unless `code_of` would find the code; nothing is imported."""
    if step.built_in:
        _built_in(step)
    else:
        _checked(step)


def _built_in(step: PipelineStep) -> OpenStep:
    function = BUILT_IN.get((step.plugin, step.version))
    if function is None:
        known = ", ".join(f"{name} {version}" for name, version in sorted(BUILT_IN))
        message = f"this agent has no version {step.version} of it"
        raise PluginMissing(message, field=step.plugin, fix=f"upgrade the agent; it has {known}")
    return function


def _checked(step: PipelineStep) -> tuple[Plugin, Digest]:
    fix = "pip install it into the agent's environment; the update goes on by itself"
    try:
        plugin = find_plugin(step.plugin)
        if plugin.version != step.version:
            message = f"the release needs version {step.version}, installed is {plugin.version}"
            raise PluginMissing(message, field=step.plugin, fix=fix)
        digest = digest_of_plugin(plugin)
        _check_place(plugin)
    except NotFound as error:
        raise PluginMissing(error.message, field=step.plugin, fix=error.fix or fix) from error
    if digest not in step.code:
        message = f"version {step.version} is installed with other code: {digest}, the release allows {step.code[0]}"
        raise PluginMissing(
            message, field=step.plugin, fix="install the very build that the release was published with"
        )
    return plugin, digest


def _code(distribution: Distribution) -> Iterator[tuple[str, Path]]:
    """The files of the code: the path in RECORD and the file."""
    files, total = distribution.files, 0
    if not files or len(files) > FILES_MAX:
        raise NotFound(f"{distribution.name} has no list of its files", fix="install it from a wheel, with pip")
    if any(file.suffix == ".pth" or file.name.startswith("__editable__") for file in files):
        raise NotFound(
            f"{distribution.name} is installed for editing: its code is not in its RECORD", fix="install a wheel"
        )
    for file in files:
        if file.parts[0] == ".." or "__pycache__" in file.parts or file.is_absolute() or "\n" in str(file):
            continue
        if file.parts[0].endswith(".dist-info") and "/".join(file.parts[1:]) not in KEPT_METADATA:
            continue
        path = Path(str(distribution.locate_file(file)))
        try:
            total += path.stat().st_size
        except OSError as error:
            raise NotFound(f"{distribution.name} is not complete: {file}", fix="install it again") from error
        if total > CODE_BYTES_MAX:
            raise NotFound(f"{distribution.name} has more than {CODE_BYTES_MAX} bytes of code")
        yield file.as_posix(), path


def _check_place(plugin: Plugin) -> None:
    """Raise `NotFound` unless Python would import the entry point's module from the distribution's own files."""
    own = {path.resolve() for _, path in _code(plugin.distribution)}
    where: list[str] | None = None
    names = plugin.entry.module.split(".")
    for depth in range(1, len(names) + 1):
        name = ".".join(names[:depth])
        spec = PathFinder.find_spec(name, where)
        if spec is None or (spec.origin and Path(spec.origin).resolve() not in own):
            there = spec.origin if spec else "nowhere"
            message = f"Python finds {name} in {there}, which {plugin.distribution.name} did not install"
            raise NotFound(message, fix="uninstall or rename what is in its way")
        where = list(spec.submodule_search_locations or ())
