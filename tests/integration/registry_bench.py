"""A registry with everything real, for the tests of releases, patches and garbage collection."""

from collections.abc import AsyncIterator
from pathlib import Path

from common.artifact.manifest import ArtifactRef
from common.ids import DeviceId, ModelName, Version
from common.trust import Signer
from common.wire import Capabilities, ReportedModel, ReportedState
from controller.devices import Device
from controller.registry.blobs import LocalBlobs
from controller.registry.releases import Releases
from controller.store import open_store
from controller.store.port import Event, Release, Store

MODEL = ModelName("magika")
FILE = "model.onnx"


class TurnedClock:
    """A clock that a test turns by hand."""

    def __init__(self, now: float) -> None:
        self.time = now

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time


class Bench:
    """The parts, and what a publisher does with them."""

    def __init__(self, store: Store, blobs: LocalBlobs, clock: TurnedClock) -> None:
        self.store = store
        self.blobs = blobs
        self.clock = clock
        self.signer = Signer.generate()
        self.releases = Releases(store, blobs, self.signer, clock)

    async def upload(self, data: bytes) -> ArtifactRef:
        """As the API does it: the bytes, then the row."""
        artifact = self.blobs.put_bytes(data)
        await self.store.write(lambda tx: tx.artifacts.put(artifact, self.clock.now()))
        return artifact

    async def publish(self, version: str, artifact: ArtifactRef) -> tuple[Release, bool]:
        return await self.releases.publish(MODEL, Version(version), {"default": {FILE: artifact.digest}}, "ada")

    async def join(self, name: str, runs: ArtifactRef, codecs: tuple[str, ...], version: str = "1.0") -> None:
        """A device that reports that it runs this artifact."""
        entry = ReportedModel(model=MODEL, running=Version(version), artifact=runs.digest, phase="idle", generation=1)
        reported = ReportedState(
            device=DeviceId(name), epoch=1, seq=1, sent_at=1.0, generation=1, models=(entry,), held=(runs.digest,)
        )
        capabilities = Capabilities(agent_version="1", patch_codecs=codecs)
        device = Device(id=DeviceId(name), created_at=1.0, capabilities=capabilities, reported=reported)
        await self.store.write(lambda tx: tx.devices.put(device))

    async def row_of(self, artifact: ArtifactRef) -> ArtifactRef | None:
        return await self.store.read(lambda tx: tx.artifacts.get(artifact.digest))

    async def events(self, kind: str) -> list[Event]:
        everything = await self.store.read(lambda tx: tx.journal.events_after(0, 10_000))
        return [event for event in everything if event.kind == kind]


async def open_bench(folder: Path, now: float, blobs: LocalBlobs | None = None) -> AsyncIterator[Bench]:
    """For a fixture: everything in `folder`, closed afterwards."""
    clock = TurnedClock(now)
    store = await open_store(f"sqlite:///{folder}/ferry.db", clock)
    yield Bench(store, blobs or LocalBlobs(folder / "blobs"), clock)
    await store.close()
