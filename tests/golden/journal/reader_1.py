"""How the first release of the agent reads a row of the journal: its structs, copied and never changed.

An agent that is updated keeps its old program until the new one has proven itself, and the old one must be able to take
over again. So what the new one writes must be readable with these.
"""

from typing import Literal

import msgspec


class Ref(msgspec.Struct, frozen=True):
    digest: str
    size: int


class Spec(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: tuple[int, ...]


class Patch(msgspec.Struct, frozen=True):
    base: str
    target: Ref
    patch: Ref
    codec: str


class Parts(msgspec.Struct, frozen=True):
    base: str
    base_index: Ref
    index: Ref
    bytes: int


class File(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    artifact: Ref
    patches: tuple[Patch, ...] = ()
    parts: tuple[Parts, ...] = ()


class Target(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    version: str
    variant: str
    manifest: Ref
    files: tuple[File, ...]
    order: int
    probation_s: float = 30.0
    max_bytes: int | None = None
    on_exceed: Literal["defer", "fail"] = "defer"


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    slot: Literal["a", "b"]
    version: str
    variant: str
    files: dict[str, Ref]
    onnx_file: str
    manifest: Ref
    inputs: tuple[Spec, ...] = ()
    outputs: tuple[Spec, ...] = ()
    activated_at: float | None = None


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    strategy: Literal["none", "delta", "incremental", "full"] = "none"
    transport: Literal["none", "http", "mqtt"] = "none"
    downloads: dict[str, int] = {}
    resumed_bytes: int = 0


class Quarantined(msgspec.Struct, frozen=True, kw_only=True):
    files: str
    version: str
    order: int
    reason: str


class Update(msgspec.Struct, frozen=True, kw_only=True):
    generation: int
    version: str
    outcome: Literal["succeeded", "failed", "rolled_back", "rejected"]
    reason: str = ""
    detail: str = ""
    strategy: Literal["none", "delta", "incremental", "full"] = "none"
    transport: Literal["none", "http", "mqtt"] = "none"
    bytes_transferred: int = 0
    full_bytes: int = 0
    resumed_bytes: int = 0
    started_at: float = 0.0
    activated_at: float | None = None
    finished_at: float = 0.0


class State(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    stage: Literal["idle", "fetching", "verifying", "warming", "switching", "probation", "failed", "retired"] = "idle"
    order: int = 0
    target: Target | None = None
    traceparent: str | None = None
    installed: Installed | None = None
    candidate: Installed | None = None
    previous: Installed | None = None
    tally: Tally = Tally()
    attempt: int = 0
    redownloads: int = 0
    strikes: int = 0
    refused: tuple[str, ...] = ()
    refusal: str = ""
    trouble: str = ""
    started_at: float = 0.0
    quarantine: tuple[Quarantined, ...] = ()
    last_update: Update | None = None
