"""A fleet, a controller and a bad network in simulated time: one heap of events, one `random.Random`.

Messages are lost, repeated and delayed past each other; devices reboot, are away for long, come back late; transfers
break; patches take their time; the controller is deaf for a while and then begins to listen again. Everything that
decides is the real code: intake, planner, commit, orders. The same seed gives the same run.
"""

import heapq
import random
from collections.abc import Callable

import msgspec
from msgspec.structs import replace

from common.artifact import ArtifactRef, ReleaseManifest, Variant, digest_of
from common.delta import CODECS
from common.ids import DeviceId, ModelName, ReleaseRef, Version
from common.trust import Signer
from common.wire import Heartbeat, Presence, ReportedState
from controller.devices import Device
from controller.intake import apply_heartbeat, apply_presence, apply_reported
from controller.operations import commit, create_rollout, load_snapshot
from controller.orders import decode_order, first_order
from controller.rollouts.model import Execution, Rollout, RolloutSpec
from controller.rollouts.planner import Action, Snapshot, plan
from controller.store.port import Patch, Release
from tests.simulation.device import Flaw, Kind, SimulatedDevice
from tests.simulation.memory import MemoryTransaction

MODEL = ModelName("m")
V1, V2, V3 = Version("1"), Version("2"), Version("3")
PLAN_EVERY_S = 5.0
HEARTBEAT_EVERY_S = 30.0
WORK_EVERY_S = 12.0
SIGNER = Signer.generate()

Planner = Callable[[Snapshot, float], list[Action]]
Watcher = Callable[["World", Rollout, list[Action]], None]
Message = Presence | Heartbeat | ReportedState


class Weather(msgspec.Struct, frozen=True, kw_only=True):
    """How bad the network and the devices are: chances per message, and devices of each kind."""

    lost: float = 0.1
    repeated: float = 0.1
    delay_s: float = 10.0
    transfer_broke: float = 0.2
    reboot: float = 0.01
    away: float = 0.1
    """Share of devices that are offline at first and come back long after everybody else."""
    back_after_s: float = 3000.0
    deaf_at_s: tuple[float, ...] = ()
    deaf_for_s: float = 400.0


class World:
    """See the module. `watch` sees every plan before it is committed."""

    def __init__(
        self,
        seed: int,
        *,
        devices: int = 50,
        weather: Weather = Weather(),  # noqa: B008 - frozen
        flaws: dict[Version, Flaw] | None = None,
        planner: Planner = plan,
        watch: Watcher = lambda _world, _rollout, _actions: None,
        kinds: tuple[Kind, ...] = (),
        variants: tuple[str, ...] = ("default",),
    ) -> None:
        self.chance = random.Random(seed)
        self.weather = weather
        self.planner = planner
        self.watch = watch
        self.now = 1_000_000.0
        self.listening_since: float | None = self.now
        self.store = MemoryTransaction()
        self.rollouts_created = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        for version in (V1, V2, V3):
            self._publish(version, variants)
        self.fleet: dict[DeviceId, SimulatedDevice] = {}
        for number in range(devices):
            self._join(DeviceId(f"d{number:02}"), flaws or {}, kinds[number % len(kinds)] if kinds else None)
        for moment in weather.deaf_at_s:
            self.after(moment, self._go_deaf)
        self.after(0, self._plan_forever)

    # What tests do

    def create(self, spec: RolloutSpec) -> str:
        self.rollouts_created += 1
        name = f"r{self.rollouts_created}"
        create_rollout(self.store.view, spec, id=name, salt=f"{name}{self.chance.random()}", actor="test", now=self.now)
        return name

    def build(self, base: Version, target: Version, size: int) -> None:
        """A patch is there now, of `size` bytes."""
        ends = [self.store.releases.rows[ReleaseRef(MODEL, one)].manifest for one in (base, target)]
        old, new = (one.variants["default"].artifact for one in ends)
        patch = ArtifactRef(digest_of(old.digest.encode() + new.digest.encode()), size)
        made = Patch(base=old.digest, target=new.digest, codec=CODECS[0], state="ready", created_at=0, patch=patch)
        self.store.patches.put(made)

    def run(self, until: Callable[[], bool], within_s: float) -> bool:
        """Let time pass until the condition holds; whether it did within simulated `within_s` seconds."""
        end = self.now + within_s
        while self._heap and self._heap[0][0] <= end:
            self.now, _, happen = heapq.heappop(self._heap)
            happen()
            if until():
                return True
        self.now = max(self.now, end)
        return until()

    def rollout(self, name: str) -> Rollout:
        return self.store.rollouts.rows[name]

    def executions(self, name: str) -> list[Execution]:
        return self.store.rollouts.executions(name)

    def after(self, delay_s: float, happen: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._count, happen))

    # The controller

    def _plan_forever(self) -> None:
        self.after(PLAN_EVERY_S, self._plan_forever)
        for patch in list(self.store.patches.rows.values()):
            if patch.state == "pending" and self.chance.random() < 0.1:
                self.store.patches.put(replace(patch, state="not_worth"))
        if self.listening_since is None:
            return
        for rollout in list(self.store.rollouts.rows.values()):  # those that have ended too: devices come back late
            self._plan(rollout)

    def _plan(self, rollout: Rollout) -> None:
        snapshot = load_snapshot(self.store.view, rollout, self.listening_since)
        actions = self.planner(snapshot, self.now)
        self.watch(self, rollout, actions)
        if actions:
            commit(self.store.view, rollout, actions, signer=SIGNER, now=self.now, traceparent=None)

    def _go_deaf(self) -> None:
        self.listening_since = None
        self.after(self.weather.deaf_for_s, self._listen)

    def _listen(self) -> None:
        self.listening_since = self.now

    def _publish(self, version: Version, variants: tuple[str, ...]) -> None:
        files = {name: ArtifactRef(digest_of(f"{version} {name}".encode()), 1000) for name in variants}
        builds = {name: Variant({"model.onnx": file}, "model.onnx", (), ()) for name, file in files.items()}
        manifest = ReleaseManifest(MODEL, version, builds)
        envelope = ArtifactRef(digest_of(b"envelope of " + version.encode()), 300)
        ref = ReleaseRef(MODEL, version)
        self.store.releases.rows[ref] = Release(
            ref=ref, manifest=manifest, envelope=envelope, published_at=self.now, published_by="test"
        )

    # The devices

    def _join(self, name: DeviceId, flaws: dict[Version, Flaw], kind: Kind | None) -> None:
        device = SimulatedDevice(name, flaws, kind)
        self.fleet[name] = device
        stored = Device(id=name, created_at=self.now, assigned={MODEL: V1}, capabilities=device.capabilities)
        first_order(self.store.view, stored, SIGNER, self.now)
        device.follow(decode_order(self.store.orders.rows[name]))
        while device.running != V1 or device.target is not None:
            device.step(self.now)
        # Everybody has been seen before; those who are away have left since.
        apply_presence(self.store.view, name, device.birth(self.now), self.now)
        apply_reported(self.store.view, name, device.report(self.now), self.now)
        if self.chance.random() < self.weather.away:
            device.online = False
            apply_presence(self.store.view, name, device.death(self.now), self.now)
            self.after(self.weather.back_after_s * (1 + self.chance.random()), lambda: self._connect(device))
        self.after(self.chance.random() * HEARTBEAT_EVERY_S, lambda: self._beat(device))
        self.after(self.chance.random() * WORK_EVERY_S, lambda: self._work(device))

    def _connect(self, device: SimulatedDevice) -> None:
        if not device.dead:
            self._send(device, device.birth(self.now))
            self._send(device, device.report(self.now))

    def _beat(self, device: SimulatedDevice) -> None:
        self.after(HEARTBEAT_EVERY_S * (0.9 + 0.2 * self.chance.random()), lambda: self._beat(device))
        if not device.online:
            return
        if self.chance.random() < self.weather.reboot:
            self._send(device, device.death(self.now))
            device.reboot()
            self.after(20 + 40 * self.chance.random(), lambda: self._connect(device))
            return
        self._send(device, device.heartbeat(self.now))
        # Reports are repeated now and then, so that a lost one is made good (a real agent's are retained).
        self._send(device, device.report(self.now))

    def _work(self, device: SimulatedDevice) -> None:
        self.after(WORK_EVERY_S * (0.5 + self.chance.random()), lambda: self._work(device))
        if not device.online:
            return
        if self.chance.random() > self.weather.lost:
            device.follow(decode_order(self.store.orders.rows[device.id]))
        before = device.entry
        device.step(self.now, transfer_broke=self.chance.random() < self.weather.transfer_broke)
        if device.dead:
            self._send(device, device.death(self.now))
        elif device.entry != before:
            self._send(device, device.report(self.now))

    def _send(self, device: SimulatedDevice, message: Message) -> None:
        copies = 1 + (self.chance.random() < self.weather.repeated) - (self.chance.random() < self.weather.lost)
        for _ in range(copies):
            self.after(self.chance.random() * self.weather.delay_s, lambda: self._arrive(device.id, message))

    def _arrive(self, name: DeviceId, message: Message) -> None:
        if self.listening_since is None:
            return
        match message:
            case Presence():
                apply_presence(self.store.view, name, message, self.now)
            case Heartbeat():
                apply_heartbeat(self.store.view, name, message, self.now)
            case ReportedState():
                apply_reported(self.store.view, name, message, self.now)
