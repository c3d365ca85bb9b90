"""What the device remembers of one model, exactly as the journal keeps it.

Up to three releases are named: `installed` answers requests and is proven; `candidate` is complete and verified in the
other slot, and is being tried; `previous` is what that other slot held before, kept as a base for patches and as a way
back. Two slots exist, so `previous` and `candidate` are never there together. A release is named here only after its
slot is complete, verified and on the disk.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from common.artifact import ArtifactRef, TensorSpec, digest_of
from common.artifact.pipeline import Pipeline
from common.artifact.selftest import SelfTest
from common.artifact.serving import ServingTerms
from common.ids import Digest, ModelName, Version
from common.wire import DesiredModel, ShadowReport, SplitReport, Strategy, Transport, UpdateReport

Slot = Literal["a", "b"]

MANIFEST_FILE = "manifest.json"
"""The file of a slot that holds the release's signed manifest; no file of a release may have this name."""

QUARANTINE_MAX = 16
"""Failed releases remembered per model; the oldest is forgotten first."""


class Stage(StrEnum):
    """Where an update stands. What a restart does in each is in `machine.resume` and docs/explanation."""

    IDLE = "idle"
    """The order is carried out, or there was none yet."""
    FETCHING = "fetching"
    """Manifest and bytes are on their way."""
    VERIFYING = "verifying"
    """The files are being rebuilt in the idle slot and their digests checked."""
    WARMING = "warming"
    """The candidate is being loaded and tried with made-up inputs and its samples; the installed release serves."""
    SHADOWING = "shadowing"
    """The candidate answers live requests too, and only the device sees what; the installed release serves."""
    REPLACING = "replacing"
    """Memory is too short for both: the installed release was taken out of it, and the candidate is being loaded in its
    place. Nothing answers meanwhile.
    """
    SWITCHING = "switching"
    """The candidate is about to answer requests, or just began to."""
    PROBATION = "probation"
    """The candidate answers, the installed release stands behind it."""
    FAILED = "failed"
    """The order could not be carried out; nothing is tried until a newer one comes."""
    RETIRED = "retired"
    """The model left the order and is out of service."""


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """A complete, verified release in a slot: all of `files`, of which `onnx_file` is the one to load, one has the
    samples of `self_test` and one is the `reference` for drift, if it carries them, and some are libraries with
    `custom_ops`. `serving` is how the release wants to be served.
    """

    slot: Slot
    version: Version
    variant: str
    files: dict[str, ArtifactRef]
    onnx_file: str
    manifest: ArtifactRef
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    self_test: SelfTest | None = None
    pipeline: Pipeline | UnsetType = UNSET
    custom_ops: tuple[str, ...] | UnsetType = UNSET
    """Not written for releases that have none, so that what the journal says of those stays the same."""
    serving: ServingTerms | None = None
    reference: str | None = None
    activated_at: float | None = None

    @property
    def artifact(self) -> ArtifactRef:
        """The ONNX file."""
        return self.files[self.onnx_file]

    @property
    def identity(self) -> Digest:
        """One name for all of its bytes, whatever the release is called."""
        return _identity(self.files)

    def name_of(self, digest: Digest) -> str | None:
        """The name of the file with that digest; None when there is none."""
        return next((name for name, ref in self.files.items() if ref.digest == digest), None)


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """What an update has cost so far: the bytes that crossed the network for each of its downloads.

    Counted by download, so that after a crash it can be told which bytes on the disk nobody has counted yet.
    """

    strategy: Strategy = "none"
    transport: Transport = "none"
    downloads: dict[Digest, int] = {}
    resumed_bytes: int = 0

    @property
    def bytes_transferred(self) -> int:
        """All downloads together."""
        return sum(self.downloads.values())

    def plus(self, spent: "Tally") -> "Tally":
        """This and `spent`, which came later: its way of getting the bytes is the one that counts."""
        names = self.downloads | spent.downloads
        return Tally(
            strategy=spent.strategy if spent.strategy != "none" else self.strategy,
            transport=spent.transport if spent.transport != "none" else self.transport,
            downloads={name: self.downloads.get(name, 0) + spent.downloads.get(name, 0) for name in names},
            resumed_bytes=self.resumed_bytes + spent.resumed_bytes,
        )

    def uncounted(self, here: Mapping[Digest, int]) -> dict[Digest, int]:
        """What of the bytes on the disk (`here`, by download) crossed the network without being counted."""
        return {
            name: size - self.downloads.get(name, 0)
            for name, size in here.items()
            if size > self.downloads.get(name, 0)
        }


class Quarantined(msgspec.Struct, frozen=True, kw_only=True):
    """Files (`fingerprint`) that failed here under `order`; only an order with a higher number may try them again."""

    files: Digest
    version: Version
    order: int
    reason: str


class ModelState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about one model. `order` is the newest order for it that was taken up."""

    model: ModelName
    stage: Stage = Stage.IDLE
    order: int = 0
    target: DesiredModel | None = None
    traceparent: str | None = None
    installed: Installed | None = None
    candidate: Installed | None = None
    previous: Installed | None = None
    tally: Tally = Tally()
    attempt: int = 0
    """Transient failures since the last progress: the exponent of the backoff."""
    redownloads: int = 0
    """Times the bytes came whole and wrong."""
    slow_tries: int = 0
    """Times the candidate was slower than its self-test allows."""
    replacements: int = 0
    """Times the installed release was taken out of memory for this candidate."""
    strikes: int = 0
    """Times the program died while the candidate was loaded or served."""
    refused: tuple[Digest, ...] = ()
    """Patches and indexes on offer that turned out to be of no use for this update."""
    refusal: str = ""
    """Why the last of them was refused, as a sentence."""
    shadow: ShadowReport | None = None
    """What was found before the switch; a candidate is not put through that twice."""
    split: SplitReport | None = None
    """How both releases did in probation, at the last look."""
    run_s: float | None = None
    """Median seconds of a run of the candidate, if the order asked for that."""
    trouble: str = ""
    """What the update is waiting for, as a sentence; empty while it moves."""
    started_at: float = 0.0
    quarantine: tuple[Quarantined, ...] = ()
    last_update: UpdateReport | None = None


def idle_slot(state: ModelState) -> Slot:
    """The slot that may be written: not the installed release's."""
    return "b" if state.installed is not None and state.installed.slot == "a" else "a"


def is_release(installed: Installed | None, target: DesiredModel) -> bool:
    """Whether `installed` is exactly what `target` asks for, manifest included."""
    return installed is not None and (
        (installed.version, installed.variant, installed.files, installed.manifest)
        == (target.version, target.variant, files_of(target), target.manifest)
    )


def same_release(one: DesiredModel | None, other: DesiredModel) -> bool:
    """Whether two orders ask for the same release, whatever ways to it they offer."""
    return one is not None and (
        (one.version, one.variant, files_of(one), one.manifest)
        == (other.version, other.variant, files_of(other), other.manifest)
    )


def is_quarantined(state: ModelState, target: DesiredModel) -> bool:
    """Whether these bytes failed here under this order or a newer one."""
    files = fingerprint(target)
    return any(entry.files == files and entry.order >= target.order for entry in state.quarantine)


def files_of(target: DesiredModel) -> dict[str, ArtifactRef]:
    """The files that `target` asks for, by name."""
    return {file.name: file.artifact for file in target.files}


def fingerprint(target: DesiredModel) -> Digest:
    """One name for all bytes that `target` asks for, whatever the release is called."""
    return _identity(files_of(target))


def _identity(files: Mapping[str, ArtifactRef]) -> Digest:
    lines = sorted(f"{ref.digest} {name}" for name, ref in files.items())
    return digest_of("\n".join(lines).encode())
