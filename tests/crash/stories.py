"""The updates that are crashed: each a device to begin with, and orders that it then gets.

Version n of the model adds n to what it is asked, so an answer tells which release really gave it. `broken` releases
answer nothing but NaN as soon as somebody asks, `nonsense` ones even for the made-up inputs of the warm-up.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from common.artifact.protobuf import Span
from common.ids import Digest
from common.wire import DesiredModel, Shadow, Split
from edge_agent.inference.memory import needed
from edge_agent.update import Stage
from edge_agent.update.choice import ranges_name
from tests.crash.device import Device
from tests.integration.release_desk import ReleaseDesk
from tests.integration.small_models import WEIGHTS_FILE, always_nan, nan_unless_zero, raises_unless_zero, weighted

PROBATION_S = 0.02
SHADOW_S = 0.02
TENSOR_BYTES = 64 * 1024
LARGE_TENSORS = 10
"""Makes a download of three blocks."""

NAMES = (
    "first install",
    "full",
    "patch",
    "chain",
    "parts",
    "back and forth",
    "rollback",
    "refused by the engine",
    "wrong bytes",
    "retire",
    "change while fetching",
    "change in probation",
    "compared and shared",
    "one at a time",
)

Condition = Callable[[Device], object]


class Step(NamedTuple):
    """An order, and when the story goes on. `target` is None when the order names no model."""

    envelope: bytes
    target: DesiredModel | None
    outcome: str
    """How the order ends; empty where the story does not wait for that."""
    until: Condition
    what: str


class Story(NamedTuple):
    """`before` is carried out first and not crashed."""

    name: str
    before: tuple[Step, ...]
    steps: tuple[Step, ...]
    made: Mapping[Digest, tuple[Digest, bytes]]
    """Downloads that are no artifact: by name, the artifact they come from and what they must be."""
    tampered: frozenset[Digest]
    """Blobs that always come with their last byte wrong."""
    room_bytes: int | None = None
    """See `Device`."""


class Author:
    """Publishes releases on a desk and writes stories with them."""

    def __init__(self, desk: ReleaseDesk, folder: Path) -> None:
        self._desk = desk
        self._folder = folder
        self._made: dict[Digest, tuple[Digest, bytes]] = {}

    def stories(self) -> dict[str, Callable[[], Story]]:
        """All of them, by name."""
        made: dict[str, Callable[[], Story]] = {
            "first install": lambda: self._story([], [self.install(1, tensors=LARGE_TENSORS)]),
            "full": lambda: self._story([self.install(1)], [self.install(2, tensors=LARGE_TENSORS)]),
            "patch": lambda: self._story([self.install(1)], [self.patched(2, 1)]),
            "chain": lambda: self._story([self.install(1)], [self.chained(4, 1)]),
            "parts": lambda: self._story([self.install(1)], [self.in_parts(2, 1)]),
            "back and forth": lambda: self._story(
                [self.install(1), self.install(2)], [self.install(1), self.install(2)]
            ),
            "rollback": self.rollback,
            "refused by the engine": self.refused,
            "wrong bytes": self.wrong_bytes,
            "retire": lambda: self._story([self.install(1)], [self.retire(), self.install(2)]),
            "change while fetching": self.change_while_fetching,
            "change in probation": self.change_in_probation,
            "compared and shared": self.compared_and_shared,
            "one at a time": self.one_at_a_time,
        }
        return {name: lambda make=make, name=name: make()._replace(name=name) for name, make in made.items()}  # type: ignore[misc]  # mypy does not infer a lambda's defaults

    # Steps.

    def install(self, version: int, *, tensors: int = 3, **changes: Any) -> Step:
        return self._until_done(self._release(version, tensors=tensors, **changes))

    def patched(self, version: int, base: int) -> Step:
        offer = self._desk.patch(self._weights(base), self._weights(version))
        return self._until_done(self._release(version, patches=[offer]))

    def chained(self, version: int, base: int) -> Step:
        files = [self._weights(number) for number in range(base, version + 1)]
        offers = [self._desk.patch(old, new) for old, new in itertools.pairwise(files)]
        return self._until_done(self._release(version, patches=offers))

    def in_parts(self, version: int, base: int) -> Step:
        old, new = self._weights(base), self._weights(version)
        spans = [Span(at, min(at + TENSOR_BYTES, len(new))) for at in range(0, len(new), TENSOR_BYTES)]
        offer = self._desk.parts(old, new, spans)
        release = self._release(version, parts=[offer])
        whole = next(file.artifact.digest for file in release.files if file.name == WEIGHTS_FILE)
        self._made[ranges_name(offer)] = whole, new[spans[-1].start :]
        return self._until_done(release)

    def retire(self) -> Step:
        gone = lambda device: device.state.stage is Stage.RETIRED or device.state.target is None  # noqa: E731
        return Step(self._desk.order(), None, "", gone, "retired")

    # Stories that need more than one thing to happen.

    def rollback(self) -> Story:
        before = [self.install(1)]
        bad = self._desk.release("2", nan_unless_zero(self._folder / "broken.onnx").read_bytes(), probation_s=60.0)
        first = self._until_done(bad, "rolled_back")
        again = self._until_done(bad, "rolled_back")  # a newer order of the fleet that says the same of this model
        newer = self._until_done(msgspec.structs.replace(bad, order=self._desk.generation + 1), "rolled_back")
        return self._story(before, [first, again, newer, self.install(3)])

    def refused(self) -> Story:
        before = [self.install(1)]
        bad = self._desk.release("2", always_nan(self._folder / "nonsense.onnx").read_bytes())
        return self._story(before, [self._until_done(bad, "failed"), self.install(3)])

    def wrong_bytes(self) -> Story:
        before = [self.install(1)]
        release = self._release(9, tensors=LARGE_TENSORS)
        self._desk.faults[release.files[-1].artifact.digest] = "tamper"
        return self._story(before, [self._until_done(release, "failed"), self.install(3)])

    def change_while_fetching(self) -> Story:
        before = [self.install(1)]
        release = self._release(2, tensors=LARGE_TENSORS)
        begun = lambda device: device.state.order >= release.order and _began(device)  # noqa: E731
        first = Step(self._desk.order(release), release, "", begun, "fetching")
        return self._story(before, [first, self.install(3)])

    def change_in_probation(self) -> Story:
        before = [self.install(1)]
        release = self._release(2, probation_s=60.0)

        def tried(device: Device) -> object:
            return device.state.stage in {Stage.PROBATION, Stage.FAILED}

        first = Step(self._desk.order(release), release, "", tried, "in probation")
        return self._story(before, [first, self.install(3)])

    def compared_and_shared(self) -> Story:
        """Nobody asks, so nothing can be compared: the first order goes on without, the second one fails for it."""
        before = [self.install(1)]
        first = self.install(2, shadow=Shadow(for_s=SHADOW_S), split=Split(share=0.5))
        strict = Shadow(for_s=SHADOW_S, agreement_min=1.0, on_few="fail")
        second = self._until_done(self._release(3, shadow=strict), "failed")
        return self._story(before, [first, second, self.install(4)])

    def one_at_a_time(self) -> Story:
        """Memory holds one release: the old one leaves it for the new one. An order that must compare fails.

        A bad release is taken back with nothing behind it.
        """
        before = [self.install(1)]
        first = self.install(2, shadow=Shadow(for_s=SHADOW_S), split=Split(share=0.5))
        strict = Shadow(for_s=SHADOW_S, on_few="fail")
        second = self._until_done(self._release(3, shadow=strict), "failed")
        broken = raises_unless_zero(self._folder / "raising.onnx").read_bytes()
        bad = self._desk.release("5", broken, weights={WEIGHTS_FILE: self._weights(5)}, probation_s=60.0)
        third = self._until_done(bad, "rolled_back")
        story = self._story(before, [first, second, third, self.install(4)])
        size = sum(map(len, self._files(2, 3)))
        return story._replace(room_bytes=needed(size, None) - size // 2)

    def _story(self, before: list[Step], steps: list[Step]) -> Story:
        made, self._made = self._made, {}
        return Story("", tuple(before), tuple(steps), made, frozenset(self._desk.faults))

    def _until_done(self, target: DesiredModel, outcome: str = "succeeded") -> Step:
        def done(device: Device) -> object:
            update = device.state.last_update
            settled = device.state.stage in {Stage.IDLE, Stage.FAILED}
            return settled and update is not None and update.generation == target.order

        return Step(self._desk.order(target), target, outcome, done, f"done with order {target.order}")

    def _release(self, version: int, *, tensors: int = 3, **changes: Any) -> DesiredModel:
        model, weights = self._files(version, tensors)
        fields = {"probation_s": PROBATION_S} | changes
        return self._desk.release(str(version), model, weights={WEIGHTS_FILE: weights}, **fields)

    def _weights(self, version: int) -> bytes:
        return self._files(version, 3)[1]

    def _files(self, version: int, tensors: int) -> tuple[bytes, bytes]:
        return weighted(self._folder / "made", 0, version, tensors)


def _began(device: Device) -> bool:
    return device.state.stage is not Stage.FETCHING or device.executor.standing().models[0].phase == "fetching"
