"""What a release does to a request before its model and to the answer after it: named steps, each code of a plug-in.

A step names the plug-in, its exact version, the digest of its code and its parameters. All of that is part of the
manifest, so it is signed; the code itself is not part of the release, it is installed on the device. Steps whose names
begin with `edgeferry.` are part of the agent: their version is that of what they do and their code has no digest.

This module says what a pipeline is and what the digest of a plug-in's code is. Finding and running plug-ins is the
business of `common.pipelines`.

    >>> code_digest([("acme/__init__.py", b"")])
    'sha256:6da8605f24391d11b2dba92a75d6398e098a6f5a7ba27f4bae0dfc1e2d42311c'
"""

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from common.artifact.digest import digest_of, hex_of
from common.artifact.tensor_spec import TensorSpec
from common.ids import Digest

STEPS_MAX = 8
"""Before the model, and after it."""
CODES_MAX = 16
"""Digests of one step's code: a plug-in with native code has one for each kind of machine."""
PARAMETERS_BYTES_MAX = 64 * 1024
"""Of one step's parameters, as JSON: the names of a thousand classes fit."""
BUILT_IN_PREFIX = "edgeferry."
PLUGIN_NAME = r"^[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?$(?!\n)"
PLUGIN_VERSION = r"^[A-Za-z0-9][A-Za-z0-9.!+_-]{0,62}$(?!\n)"
CODE_HEADER = b"edgeferry plug-in code 1\n"

CodeDigest = Annotated[Digest, Meta(pattern=r"^sha256:[0-9a-f]{64}$")]


class PipelineStep(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step: `plugin` in exactly this `version`, whose code has one of the digests `code`, opened with `parameters`
    (any JSON object).
    """

    plugin: Annotated[str, Meta(pattern=PLUGIN_NAME)]
    version: Annotated[str, Meta(pattern=PLUGIN_VERSION)]
    code: Annotated[tuple[CodeDigest, ...], Meta(max_length=CODES_MAX)] = ()
    parameters: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if self.built_in and self.code:
            raise ValueError(f"{self.plugin} is part of the agent and has no code of its own")
        if not self.built_in and not self.code:
            raise ValueError(f"the digest of the code of {self.plugin} is missing")
        size = len(msgspec.json.encode(self.parameters))
        if size > PARAMETERS_BYTES_MAX:
            raise ValueError(f"the parameters of {self.plugin} take {size} bytes, at most {PARAMETERS_BYTES_MAX}")

    @property
    def built_in(self) -> bool:
        """Whether it is part of the agent."""
        return self.plugin.startswith(BUILT_IN_PREFIX)


Steps = Annotated[tuple[PipelineStep, ...], Meta(max_length=STEPS_MAX)]


class Pipeline(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The steps `before` and `after` the model, in order, and the tensors of the model itself; those that callers see
    are the variant's.
    """

    model_inputs: tuple[TensorSpec, ...]
    model_outputs: tuple[TensorSpec, ...]
    before: Steps = ()
    after: Steps = ()

    def __post_init__(self) -> None:
        if not self.before and not self.after:
            raise ValueError("a pipeline without a step")

    @property
    def steps(self) -> tuple[PipelineStep, ...]:
        """All steps, in order."""
        return (*self.before, *self.after)


def code_digest(files: Iterable[tuple[str, bytes]]) -> Digest:
    """The digest of code that consists of these files: SHA-256 over a header and, for each path (with forward slashes,
    in the order of their UTF-8 bytes), a line with the SHA-256 of its bytes in hex, its length, and the path, which has
    no line break.
    """
    lines = sorted((path.encode(), f"{hex_of(digest_of(data))} {len(data)} ".encode()) for path, data in files)
    return digest_of(CODE_HEADER + b"".join(facts + path + b"\n" for path, facts in lines))
