"""A simulated device around the real update machine: a disk, a process that may die anywhere, a network that may fail.

The world carries effects out as the executor does (save, then act) and dies after a chosen number of small steps. It
keeps its own books (what is on the disk, what was proven, what failed under which order), so that the invariants in
`check` do not take the machine's word. `MUTANTS` are machines that are wrong on purpose: each breaks one invariant.
"""

from collections import Counter
from collections.abc import Callable

from msgspec.structs import replace

from common.artifact import ArtifactRef, digest_of
from common.delta import CODECS
from common.ids import Digest, ModelName, Version
from common.wire import DesiredModel, PatchOffer
from edge_agent.update import Installed, ModelState, Slot, Stage, step
from edge_agent.update import events as ev
from edge_agent.update.outcomes import REDOWNLOADS_MAX, STRIKES_MAX, Step

MODEL = ModelName("kinds")
Machine = Callable[[ModelState, ev.Event], Step]


class Died(Exception):
    """The process is gone."""


def ref_of(text: str) -> ArtifactRef:
    return ArtifactRef(digest_of(text.encode()), 1000)


def target_of(version: int, order: int, *, base: int | None = None) -> DesiredModel:
    """An order for release `version`, with a patch from `base` on offer."""
    offers = (
        ()
        if base is None
        else (PatchOffer(ref_of(f"model {base}").digest, ArtifactRef(digest_of(b"patch"), 10), CODECS[0]),)
    )
    return DesiredModel(
        model=MODEL,
        version=Version(str(version)),
        variant="default",
        manifest=ref_of(f"manifest {version}"),
        artifact=ref_of(f"model {version}"),
        patches=offers,
        order=order,
        probation_s=10.0,
    )


class World:
    """One device. `pending` is the effect whose work is under way in the living process."""

    def __init__(self, machine: Machine = step) -> None:
        self._machine = machine
        self.journal = ModelState(model=MODEL)
        self.disk: dict[Slot, Digest] = {}
        self.serving: Digest | None = None
        self.fallback: Digest | None = None
        self.pending: ev.Effect | None = None
        self.now = 0.0
        self.fuse: int | None = None
        """Small steps until the process dies; None: it lives."""
        self.proven: set[Digest] = set()
        self.convicted: dict[Digest, int] = {}
        self.wrong_downloads: Counter[float] = Counter()
        self.deaths: Counter[float] = Counter()
        """Both by the moment at which the update began."""
        self.unloadable: set[Digest] = set()
        """What the engine of this device refuses (any more)."""
        self.arrows: set[tuple[Stage, type[ev.Event], Stage]] = set()
        """Every move that was seen."""
        self._orders_seen = 0

    # What happens.

    def happen(self, make: Callable[[float], ev.Event]) -> None:
        """One event and what follows from it at once; the process may die on the way and comes back."""
        self.now += 1.0
        convicted, wrong, proven = dict(self.convicted), self.wrong_downloads.copy(), set(self.proven)
        try:
            event = make(self.now)
            if self.fuse == 0:  # it dies before it can write down what happened: nobody will ever know
                self.convicted, self.wrong_downloads, self.proven = convicted, wrong, proven
            self._handle(event)
        except Died:
            self.die()
        self.check()

    def die(self, *, clean: bool = False) -> None:
        """The process ends and is started again. Memory is lost, the disk is not."""
        trying = self.journal.stage in {Stage.WARMING, Stage.SWITCHING, Stage.PROBATION}
        self.deaths[self.journal.started_at] += trying and not clean
        if self.deaths[self.journal.started_at] == STRIKES_MAX:
            self._convict()
        self.fuse = self.serving = self.fallback = self.pending = None
        previous = self.journal.previous
        if previous is not None and self.disk.get(previous.slot) != previous.artifact.digest:
            self._handle(ev.SlotLost(at=self.now, slot=previous.slot))
        self.happen(lambda at: ev.Restarted(at=at, clean=clean))

    def rot(self, slot: Slot) -> None:
        """A slot's files go bad on the disk, and the program is started anew."""
        if slot in self.disk:
            self.disk[slot] = Digest("rotten")
            self.die(clean=True)

    def change_engine(self, version: int) -> None:
        """The program is started anew with an engine that refuses a release."""
        self.unloadable.add(ref_of(f"model {version}").digest)
        self.die(clean=True)

    def finish_work(self, outcome: str) -> None:
        """The work under way ends: `good`, or in the way that `outcome` names where that applies."""
        effect, self.pending = self.pending, None
        if effect is not None:
            self.happen(lambda at: self._end_of(effect, outcome, at))

    def _end_of(self, effect: ev.Effect, outcome: str, at: float) -> ev.Event:
        target = self.journal.target
        assert target is not None
        if outcome == "transient" and not isinstance(effect, ev.Wait | ev.Watch | ev.Probe):
            return ev.Interrupted(at=at, code="unavailable", detail="the network is down")
        match effect:
            case ev.Wait():
                return ev.RetryDue(at=at)
            case ev.Fetch(source=source):
                if outcome == "manifest":
                    self._convict()
                    return ev.ManifestRefused(at=at, code="integrity_failure", detail="")
                if outcome == "wrong":
                    return self._wrong(source, at)
                return ev.Fetched(at=at, source=source)
            case ev.Build(source=source, slot=slot):
                if outcome == "wrong":
                    return self._wrong(source, at)
                return self._build(target, slot, at)
            case ev.Warm():
                if outcome == "refused" or target.artifact.digest in self.unloadable:
                    self._convict()
                    return ev.ModelRefused(at=at, code="model_rejected", detail="")
                return ev.Warmed(at=at)
            case ev.Watch():
                return self._verdict(outcome, lambda verdict: ev.HealthChecked(at=at, verdict=verdict, elapsed_s=11.0))
            case ev.Probe():
                return self._verdict(outcome, lambda verdict: ev.Probed(at=at, verdict=verdict))
            case _:
                raise AssertionError(effect)

    def _build(self, target: DesiredModel, slot: Slot, at: float) -> ev.Event:
        installed = self.journal.installed
        assert installed is None or slot != installed.slot, "the installed release's slot was written"
        self.disk[slot] = target.artifact.digest
        candidate = Installed(
            slot=slot,
            version=target.version,
            variant=target.variant,
            artifact=target.artifact,
            manifest=target.manifest,
        )
        return ev.Built(at=at, candidate=candidate)

    def _wrong(self, source: object, at: float) -> ev.Event:
        if type(source).__name__ == "FromPatch":
            return ev.PatchUnusable(at=at, detail="wrong base")
        if type(source).__name__ == "FromHeld":
            return ev.Interrupted(at=at, code="io_error", detail="")
        self._count_wrong()
        return ev.Corrupted(at=at, detail="")

    def _count_wrong(self) -> None:
        began = self.journal.started_at
        self.wrong_downloads[began] += 1
        if self.wrong_downloads[began] > REDOWNLOADS_MAX:
            self._convict()

    def _verdict(self, outcome: str, event: Callable[[ev.Verdict], ev.Event]) -> ev.Event:
        if outcome == "unhealthy":
            self._convict()
            return event("fail")
        if outcome == "quiet":
            return event("inconclusive")
        assert self.journal.target is not None
        self.proven.add(self.journal.target.artifact.digest)
        self.convicted.pop(self.journal.target.artifact.digest, None)
        return event("pass")

    def _convict(self) -> None:
        target = self.journal.target
        assert target is not None
        self.convicted[target.artifact.digest] = max(self.convicted.get(target.artifact.digest, 0), target.order)

    # What the executor does.

    def _handle(self, event: ev.Event) -> None:
        if isinstance(event, ev.Ordered) and self.journal.stage is Stage.PROBATION and self.journal.installed is None:
            # Nothing proven to go back to: the candidate is better than nothing.
            self.proven.add(self.journal.candidate.artifact.digest if self.journal.candidate else Digest(""))
        self._burn()
        state, effects = self._machine(self.journal, event)
        if state.stage is not self.journal.stage:
            self.arrows.add((self.journal.stage, type(event), state.stage))
        self.journal = state
        for effect in effects:
            self._burn()
            self._act(effect)

    def _burn(self) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                raise Died

    def _act(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Serve(installed=installed):
                if self.disk.get(installed.slot) != installed.artifact.digest:
                    self._handle(ev.SlotLost(at=self.now, slot=installed.slot))
                elif installed.artifact.digest in self.unloadable:
                    if self.journal.stage is Stage.IDLE:
                        self._convict()
                    self._handle(ev.Unservable(at=self.now, code="model_rejected", detail=""))
                else:
                    self.serving = installed.artifact.digest
            case ev.Switch():
                assert self.journal.candidate is not None
                self.fallback, self.serving = self.serving, self.journal.candidate.artifact.digest
                self._handle(ev.Switched(at=self.now))
            case ev.Commit():
                self.fallback = None
            case ev.Revert():
                self.serving, self.fallback = self.fallback, None
            case ev.Retire():
                self.serving = self.fallback = None
            case ev.Cancel():
                self.pending = None
            case ev.Tidy():
                self._tidy()
            case _:
                self._begin(effect)

    def _begin(self, effect: ev.Effect) -> None:
        if isinstance(effect, ev.Fetch):
            convicted = self.convicted.get(effect.target.artifact.digest, -1)
            assert convicted < effect.target.order, "a release that failed is tried again without a newer order"
        if isinstance(effect, ev.Warm) and self.disk.get(effect.candidate.slot) != effect.candidate.artifact.digest:
            self._count_wrong()
            self._handle(ev.SlotLost(at=self.now, slot=effect.candidate.slot))
            return
        self.pending = effect

    def _tidy(self) -> None:
        state = self.journal
        named = {release.slot for release in (state.installed, state.candidate, state.previous) if release is not None}
        self.disk = {slot: digest for slot, digest in self.disk.items() if slot in named}

    # What must hold.

    def check(self) -> None:
        """The invariants that are about a state rather than about one effect."""
        state = self.journal
        for release in (state.installed, state.candidate):
            if release is not None:
                assert self.disk.get(release.slot) == release.artifact.digest, "the journal names an incomplete slot"
        if state.installed is not None:
            assert self.serving is not None, "there is an installed release and nothing answers"
            assert state.installed.artifact.digest in self.proven, "a release was installed that did not prove itself"
        if state.stage is Stage.PROBATION and state.installed is not None:
            assert self.fallback == state.installed.artifact.digest, "nothing stands behind the candidate"
        assert state.order >= self._orders_seen, "the order went back"
        self._orders_seen = state.order
        if state.stage is Stage.FAILED and state.target is not None:
            assert state.target.artifact.digest in self.convicted, "a transient trouble became a verdict"
        began = state.started_at
        assert self.wrong_downloads[began] <= REDOWNLOADS_MAX + 1, "wrong bytes are fetched without end"
        if state.stage in {Stage.WARMING, Stage.SWITCHING, Stage.PROBATION}:
            assert self.deaths[began] < STRIKES_MAX, "the program dies over a candidate without end"

    def settle(self) -> None:
        """All troubles end; then every update must end too."""
        for _ in range(60):
            if self.pending is None:
                break
            self.finish_work("good")
        state = self.journal
        assert state.stage in {Stage.IDLE, Stage.FAILED, Stage.RETIRED}, f"the update hangs in {state.stage}"
        if state.stage is Stage.IDLE and state.target is not None:
            assert state.installed is not None
            assert state.installed.artifact == state.target.artifact, "the device settled on something else"
            assert self.serving == state.target.artifact.digest


def _overwrites_the_installed_slot(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    slot = state.installed.slot if state.installed else None
    return after, tuple(replace(e, slot=slot) if isinstance(e, ev.Build) and slot else e for e in effects)


def _trusts_before_probation(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return (replace(after, installed=after.candidate) if isinstance(event, ev.Switched) else after), effects


def _commits_at_the_switch(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return after, ((ev.Commit(), *effects) if isinstance(event, ev.Switched) else effects)


def _forgets_quarantine(state: ModelState, event: ev.Event) -> Step:
    if isinstance(event, ev.Ordered):
        state = replace(state, quarantine=())
    return step(state, event)


def _takes_any_order(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return (replace(after, order=event.target.order) if isinstance(event, ev.Ordered) else after), effects


def _fetches_wrong_bytes_for_ever(state: ModelState, event: ev.Event) -> Step:
    return step(replace(state, redownloads=0), event)


def _never_strikes(state: ModelState, event: ev.Event) -> Step:
    return step(state, replace(event, clean=True) if isinstance(event, ev.Restarted) else event)


def _condemns_for_a_broken_network(state: ModelState, event: ev.Event) -> Step:
    if isinstance(event, ev.Interrupted):
        event = ev.ManifestRefused(at=event.at, code=event.code, detail=event.detail)
    return step(state, event)


def _gives_up_waiting(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return after, tuple(effect for effect in effects if not isinstance(effect, ev.Wait))


def _serves_nothing_after_a_restart(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return after, tuple(effect for effect in effects if not isinstance(effect, ev.Serve))


MUTANTS: tuple[Machine, ...] = (
    _overwrites_the_installed_slot,
    _trusts_before_probation,
    _commits_at_the_switch,
    _forgets_quarantine,
    _takes_any_order,
    _fetches_wrong_bytes_for_ever,
    _never_strikes,
    _condemns_for_a_broken_network,
    _gives_up_waiting,
    _serves_nothing_after_a_restart,
)
