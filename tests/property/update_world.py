"""A simulated device around the real update machine: a disk, a process that may die anywhere, a network that may fail.

The world carries effects out as the executor does (save, then act) and dies after a chosen number of small steps. It
keeps its own books (what is on the disk, what crossed the network, what was proven, what failed under which order), so
that the invariants in `check` do not take the machine's word.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import cache

from msgspec import UNSET
from msgspec.structs import replace

from common.artifact import ArtifactRef, digest_of
from common.ids import Digest, ModelName, Version
from common.wire import (
    DesiredFile,
    DesiredModel,
    OnExceed,
    PartsOffer,
    PatchOffer,
    Shadow,
    ShadowReport,
    SideReport,
    Split,
)
from common.wire.traffic import OnFew
from edge_agent.update import (
    FromHeld,
    FromParts,
    FromPatches,
    Installed,
    ModelState,
    Slot,
    Sources,
    Stage,
    Tally,
    step,
    wanted_downloads,
)
from edge_agent.update import events as ev
from edge_agent.update.choice import Local, Plan, TooDear, choose, downloads, possible_downloads
from edge_agent.update.outcomes import REDOWNLOADS_MAX, REPLACEMENTS_MAX, SLOW_TRIES_MAX, STRIKES_MAX, Step
from edge_agent.update.state import files_of, fingerprint

MODEL = ModelName("kinds")
CODEC = "known.1"
WAYS = ("patch", "chain", "parts")
TRYING = frozenset({Stage.WARMING, Stage.SHADOWING, Stage.REPLACING, Stage.SWITCHING, Stage.PROBATION})
Machine = Callable[[ModelState, ev.Event], Step]


class Died(Exception):
    """The process is gone."""


@cache
def ref_of(text: str, size: int = 1000) -> ArtifactRef:
    return ArtifactRef(digest_of(text.encode()), size)


def target_of(
    version: int,
    order: int,
    *,
    base: int | None = None,
    ways: Collection[str] = ("patch",),
    max_bytes: int | None = None,
    on_exceed: OnExceed = "defer",
    shadow: Shadow | None = None,
    split: Split | None = None,
    probation_s: float = 10.0,
) -> DesiredModel:
    """An order for release `version`, with offers of these `ways` from the ONNX file of release `base`.

    A release has two files; releases 1 and 3 share their weights.
    """
    patches, parts = ((), ()) if base is None else _offers(version, base, ways)
    model = DesiredFile(name="model.onnx", artifact=ref_of(f"model {version}"), patches=patches, parts=parts)
    return DesiredModel(
        model=MODEL,
        version=Version(str(version)),
        variant="default",
        manifest=ref_of(f"manifest {version}", 100),
        files=(model, DesiredFile(name="weights.bin", artifact=ref_of(f"weights {version % 2}"))),
        order=order,
        probation_s=probation_s,
        max_bytes=max_bytes,
        on_exceed=on_exceed,
        shadow=shadow or UNSET,
        split=split or UNSET,
    )


def _offers(version: int, base: int, ways: Collection[str]) -> tuple[tuple[PatchOffer, ...], tuple[PartsOffer, ...]]:
    old, new, middle = ref_of(f"model {base}"), ref_of(f"model {version}"), ref_of(f"between {base} and {version}")
    patches: dict[str, list[PatchOffer]] = {
        "patch": [PatchOffer(old.digest, new, ref_of(f"patch {base} {version}", 30), CODEC)],
        "chain": [
            PatchOffer(old.digest, middle, ref_of(f"first {base} {version}", 10), CODEC),
            PatchOffer(middle.digest, new, ref_of(f"second {base} {version}", 10), CODEC),
        ],
    }
    parts = PartsOffer(old.digest, ref_of(f"index {base}", 20), ref_of(f"index {version}", 20), 300)
    return tuple(offer for way in ways for offer in patches.get(way, [])), (parts,) if "parts" in ways else ()


class World:
    """One device. `pending` is the effect whose work is under way in the living process."""

    def __init__(self, machine: Machine = step) -> None:
        self._machine = machine
        self.journal = ModelState(model=MODEL)
        self.disk: dict[Slot, Mapping[str, ArtifactRef]] = {}
        self.downloads: Counter[Digest] = Counter()
        """What is on the disk of each download."""
        self.useless: set[Digest] = set()
        """Offers that are damaged, for good."""
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
        """By the moment at which the update began, as all of these."""
        self.moved: Counter[float] = Counter()
        """Bytes that crossed the network and are or were on the disk."""
        self.wasted: Counter[float] = Counter()
        """Bytes that crossed the network and were thrown away."""
        self.too_dear: set[float] = set()
        """Updates that had to fail because they did not fit their budget."""
        self.budgets: dict[Digest, int | None] = {}
        """The budget in the newest order for these files."""
        self.unloadable: set[Digest] = set()
        """What the engine of this device refuses (any more)."""
        self.lacking: set[Digest] = set()
        """What needs a plug-in that this device has not got at the moment."""
        self.too_slow: set[Digest] = set()
        """What this device is too slow for, for good."""
        self.slow_tries: Counter[float] = Counter()
        self.tight = False
        """Memory holds one release and not two."""
        self.stops: Counter[float] = Counter()
        """Times the installed release was taken out of memory."""
        self.alone = False
        """The candidate answers, and what was installed before it is not in memory."""
        self.warm = False
        """A candidate is in memory and does not answer yet."""
        self.compared: set[float] = set()
        """Updates whose candidate was compared on live requests and not refused for it."""
        self.too_few: set[float] = set()
        """Updates that had to fail because there were too few requests to compare."""
        self.split: Split | None = None
        """How the requests are divided now."""
        self.arrows: set[tuple[Stage, type[ev.Event], Stage]] = set()
        """Every move that was seen."""
        self._orders_seen = 0
        self._line: Counter[Digest] = Counter()
        """What crossed the network in this try to fetch, and what an earlier one had no time to tell."""

    # What happens.

    def happen(self, make: Callable[[float], ev.Event]) -> None:
        """One event and what follows from it at once; the process may die on the way and comes back."""
        self.now += 1.0
        convicted, wrong, proven = dict(self.convicted), self.wrong_downloads.copy(), set(self.proven)
        wasted, too_dear, slow = self.wasted.copy(), set(self.too_dear), self.slow_tries.copy()
        compared, too_few = set(self.compared), set(self.too_few)
        try:
            event = make(self.now)
            if self.fuse == 0:  # it dies before it can write down what happened: nobody will ever know
                self.convicted, self.wrong_downloads, self.proven = convicted, wrong, proven
                self.wasted, self.too_dear, self.slow_tries = wasted, too_dear, slow
                self.compared, self.too_few = compared, too_few
            self._handle(event)
        except Died:
            self.die()
        self.check()

    def die(self, *, clean: bool = False) -> None:
        """The process ends and is started again. Memory is lost, the disk is not."""
        trying = self.journal.stage in TRYING
        self.deaths[self.journal.started_at] += trying and not clean
        if self.deaths[self.journal.started_at] == STRIKES_MAX:
            self._convict()
        self.fuse = self.serving = self.fallback = self.pending = self.split = None
        self.warm = self.alone = False
        previous = self.journal.previous
        self._sweep()
        if previous is not None and self.disk.get(previous.slot) != previous.files:
            self._handle(ev.SlotLost(at=self.now, slot=previous.slot))
        self.happen(lambda at: ev.Restarted(at=at, clean=clean))

    def rot(self, slot: Slot) -> None:
        """One of a slot's files goes bad on the disk, and the program is started anew."""
        if slot in self.disk:
            self.disk[slot] = {**self.disk[slot], "weights.bin": ref_of("rotten")}
            self.die(clean=True)

    def mend(self, slot: Slot) -> None:
        """One of a slot's files had gone bad and is replaced while the program runs."""
        if slot in self.disk:
            self.happen(lambda at: ev.Mended(at=at, slot=slot))

    def change_engine(self, version: int) -> None:
        """The program is started anew with an engine that refuses a release."""
        self.unloadable.add(ref_of(f"model {version}").digest)
        self.die(clean=True)

    def lose_plugin(self, version: int) -> None:
        """The program is started anew without something that a release needs."""
        self.lacking.add(ref_of(f"model {version}").digest)
        self.die(clean=True)

    def find_plugin(self) -> None:
        """Everything is installed again."""
        self.lacking.clear()

    def slow_down(self, version: int) -> None:
        """The device has other work that leaves a release too little."""
        self.too_slow.add(ref_of(f"model {version}").digest)

    def shrink(self, *, tight: bool) -> None:
        """Other programs take the memory that a second release would need, or give it back."""
        self.tight = tight

    def finish_work(self, outcome: str) -> None:
        """The work under way ends: `good`, or in the way that `outcome` names where that applies."""
        effect, self.pending = self.pending, None
        if effect is not None:
            self.happen(lambda at: self._end_of(effect, outcome, at))

    def look_again(self) -> None:
        """A poll was answered while nothing is under way."""
        if self.journal.stage is Stage.FETCHING and self.pending is None:
            self.happen(lambda at: ev.RetryDue(at=at))

    def _end_of(self, effect: ev.Effect, outcome: str, at: float) -> ev.Event:
        target = self.journal.target
        assert target is not None
        if isinstance(effect, ev.Fetch):
            return self._fetch(effect.target, outcome, at)
        if outcome == "transient" and not isinstance(effect, ev.Wait | ev.Watch | ev.Probe):
            return ev.Interrupted(at=at, code="unavailable", detail="the network is down")
        match effect:
            case ev.Wait():
                return ev.RetryDue(at=at)
            case ev.Build(sources=sources, slot=slot):
                if outcome == "wrong" or self._useless(sources):
                    return self._wrong(target, sources, at) or self._lost(target, sources, at)
                return self._build(target, sources, slot, at)
            case ev.Warm() if target.artifact.digest in self.lacking:
                return ev.Interrupted(at=at, code="plugin_missing", detail="")
            case ev.Warm():
                if self.tight and self.serving is not None:
                    self._must_not_go_on()
                    return ev.NoRoomBeside(at=at, detail="no room for two")
                if outcome == "wrong" and self.journal.stage is Stage.REPLACING:
                    return self._rotten(effect.candidate.slot, at)
                if outcome == "refused" or target.artifact.digest in self.unloadable:
                    self._convict()
                    return ev.ModelRefused(at=at, code="model_rejected", detail="")
                if outcome == "slow" or target.artifact.digest in self.too_slow:
                    return self._slow(at)
                if self.serving is None:
                    self._must_not_go_on()
                self.warm = True
                return ev.Warmed(at=at)
            case ev.Mirror(terms=terms):
                return self._compare(terms, outcome, at)
            case ev.Watch():
                return self._verdict(outcome, lambda verdict: ev.HealthChecked(at=at, verdict=verdict, elapsed_s=21.0))
            case ev.Probe():
                return self._verdict(outcome, lambda verdict: ev.Probed(at=at, verdict=verdict))
            case _:
                raise AssertionError(effect)

    def _fetch(self, target: DesiredModel, outcome: str, at: float) -> ev.WorkEnded:
        """As the executor does it: choose with what is on the disk, and tell what crossed the network."""
        plan, untold = self._plan(target), self.journal.tally.uncounted(self._here(target))
        self._line = Counter(untold)
        if isinstance(plan, TooDear):
            if target.on_exceed == "fail":
                self.too_dear.add(self.journal.started_at)
            event: ev.WorkEnded = ev.OverBudget(at=at, needs=plan.needs, budget=plan.budget)
        else:
            event = self._follow(plan, target, outcome, at)
        return replace(event, spent=Tally(downloads=dict(self._line)))

    def _follow(self, plan: Plan, target: DesiredModel, outcome: str, at: float) -> ev.WorkEnded:
        held = self._held()
        for name, size in downloads(target, plan.sources).items():  # the manifest first
            missing = size - self.downloads[name] if name not in held else 0
            if outcome == "manifest":
                self._convict()
                self._download(name, missing)
                return ev.ManifestRefused(at=at, code="integrity_failure", detail="")
            if outcome == "transient":
                self._download(name, missing // 2)
                return ev.Interrupted(at=at, code="unavailable", detail="the network is down")
            self._download(name, missing)
        if outcome == "wrong" or self._useless(plan.sources):
            return self._wrong(target, plan.sources, at) or ev.Fetched(at=at, sources=plan.sources)
        return ev.Fetched(at=at, sources=plan.sources)

    def _plan(self, target: DesiredModel) -> Plan | TooDear:
        here, told = self._here(target), self.journal.tally
        spent = told.bytes_transferred + sum(told.uncounted(here).values())
        return choose(target, Local(self._held(), (CODEC,), here, spent, frozenset(self.journal.refused)))

    def _held(self) -> frozenset[Digest]:
        releases = [release for release in (self.journal.installed, self.journal.previous) if release is not None]
        return frozenset(ref.digest for release in releases for ref in (*release.files.values(), release.manifest))

    def _here(self, target: DesiredModel) -> dict[Digest, int]:
        return {name: self.downloads[name] for name in possible_downloads(target) if self.downloads[name]}

    def _download(self, name: Digest, size: int) -> None:
        target = self.journal.target
        assert target is not None
        self.downloads[name] += size
        self._line[name] += size
        self.moved[self.journal.started_at] += size
        budget = self.budgets[fingerprint(target)]
        spent = self.moved[self.journal.started_at] + self.wasted[self.journal.started_at]
        assert not size or budget is None or spent <= budget, "more was downloaded than the order allows"

    def _build(self, target: DesiredModel, sources: Sources, slot: Slot, at: float) -> ev.Event:
        installed = self.journal.installed
        assert installed is None or slot != installed.slot, "the installed release's slot was written"
        self._check_sources(target, sources)
        self.disk[slot] = files_of(target)
        candidate = Installed(
            slot=slot,
            version=target.version,
            variant=target.variant,
            files=files_of(target),
            onnx_file=target.files[0].name,
            manifest=target.manifest,
        )
        return ev.Built(at=at, candidate=candidate)

    def _check_sources(self, target: DesiredModel, sources: Sources) -> None:
        """Everything that the files are made of must be here."""
        on_disk = {ref.digest for files in self.disk.values() for ref in files.values()}
        needed = set(downloads(target, sources)) - self._held()
        assert all(self.downloads[name] for name in needed), "a file is made from what was never downloaded"
        for file, source in zip(target.files, sources, strict=True):
            match source:
                case FromHeld():
                    assert file.artifact.digest in on_disk, "a file is copied from a slot that does not have it"
                case FromPatches(offers):
                    assert offers[0].base in on_disk, "a patch is applied to what is not here"
                case FromParts(offer):
                    assert offer.base in on_disk, "parts are copied from what is not here"

    def _useless(self, sources: Sources) -> bool:
        return any(offer in self.useless for source in sources for offer in _offers_of(source))

    def _wrong(self, target: DesiredModel, sources: Sources, at: float) -> ev.WorkEnded | None:
        """Something of these sources turns out wrong: an offer if there is one, else a whole file."""
        offers = [offer for source in sources for offer in _offers_of(source)]
        if offers:
            worst = next((offer for offer in offers if offer in self.useless), offers[0])
            self.useless.add(worst)
            return ev.OfferUnusable(at=at, offer=worst, detail="wrong base")
        whole = downloads(target, sources).keys() & {file.artifact.digest for file in target.files}
        if not whole:
            return None
        name = min(whole)
        began, size = self.journal.started_at, self.downloads.pop(name)
        self.moved[began] -= size
        self.wasted[began] += size
        self._count_wrong()
        return ev.Corrupted(at=at, detail="")

    def _lost(self, target: DesiredModel, sources: Sources, at: float) -> ev.Event:
        """A slot that a file should be copied from has gone bad."""
        (name, ref), *_ = (
            (file.name, file.artifact) for file, way in zip(target.files, sources, strict=True) if way == FromHeld()
        )
        slot = next(slot for slot, files in self.disk.items() if ref in files.values())
        self.disk[slot] = {**self.disk[slot], name: ref_of("rotten")}
        return ev.SlotLost(at=at, slot=slot)

    def _rotten(self, slot: Slot, at: float) -> ev.Event:
        """It was sound when it was last looked at, a moment ago."""
        self.disk[slot] = {**self.disk[slot], "weights.bin": ref_of("rotten")}
        self._count_wrong()
        return ev.SlotLost(at=at, slot=slot)

    def _count_wrong(self) -> None:
        began = self.journal.started_at
        self.wrong_downloads[began] += 1
        if self.wrong_downloads[began] > REDOWNLOADS_MAX:
            self._convict()

    def _slow(self, at: float) -> ev.Event:
        began = self.journal.started_at
        if self.journal.stage is Stage.REPLACING:  # the stops are counted
            return ev.TooSlow(at=at, detail="")
        self.slow_tries[began] += 1
        assert self.slow_tries[began] <= SLOW_TRIES_MAX, "a slow release is tried without end"
        if self.slow_tries[began] == SLOW_TRIES_MAX:
            self._convict()
        return ev.TooSlow(at=at, detail="")

    def _must_not_go_on(self) -> None:
        """Memory holds one release: an order that takes none without a comparison has to fail."""
        if self._unseen() and self._asked() == "fail":
            self.too_few.add(self.journal.started_at)

    def _unseen(self) -> bool:
        return self.journal.started_at not in self.compared

    def _asked(self) -> OnFew | None:
        """What the order says of too few comparisons; None where there is nothing to compare."""
        target = self.journal.target
        terms = (target and target.shadow) or None
        return terms.on_few if terms and self.journal.installed is not None else None

    def _compare(self, terms: Shadow, outcome: str, at: float) -> ev.Event:
        samples = terms.samples_min - 1 if outcome == "quiet" else terms.samples_min
        agreed = 0 if outcome == "disagrees" else samples
        found = ShadowReport(samples=samples, agreed=agreed, live=SideReport(requests=samples))
        if outcome == "quiet" and terms.on_few == "fail":
            self.too_few.add(self.journal.started_at)
        elif outcome == "disagrees" and terms.agreement_min is not None:
            self._convict()
        else:
            self.compared.add(self.journal.started_at)
        return ev.Shadowed(at=at, found=found)

    def _verdict(self, outcome: str, event: Callable[[ev.Verdict], ev.Event]) -> ev.Event:
        if outcome == "unhealthy":
            self._convict()
            return event("fail")
        if outcome == "quiet":
            return event("inconclusive")
        assert self.journal.target is not None
        self.proven.add(self.journal.target.artifact.digest)
        self.convicted.pop(fingerprint(self.journal.target), None)
        return event("pass")

    def _convict(self) -> None:
        target = self.journal.target
        assert target is not None
        files = fingerprint(target)
        self.convicted[files] = max(self.convicted.get(files, 0), target.order)

    # What the executor does.

    def _handle(self, event: ev.Event) -> None:
        if isinstance(event, ev.Ordered) and self.journal.stage is Stage.PROBATION and self.journal.installed is None:
            # Nothing proven to go back to: the candidate is better than nothing.
            self.proven.add(self.journal.candidate.artifact.digest if self.journal.candidate else Digest(""))
        self._burn()
        if isinstance(event, ev.Ordered):
            self.budgets[fingerprint(event.target)] = event.target.max_bytes
        asked = self.journal.target
        state, effects = self._machine(self.journal, event)
        if isinstance(event, ev.OverBudget):
            same = [e for e in effects if isinstance(e, ev.Wait) or (isinstance(e, ev.Fetch) and e.target == asked)]
            assert not same, "it asks again and again"
        if state.stage is not self.journal.stage:
            self.arrows.add((self.journal.stage, type(event), state.stage))
        if isinstance(event, ev.Unservable) and self.journal.started_at in self.compared:
            self.compared.add(state.started_at)  # a proven release that has to wait for its plug-in was compared before
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
                if self.disk.get(installed.slot) != installed.files:
                    self._handle(ev.SlotLost(at=self.now, slot=installed.slot))
                elif installed.artifact.digest in self.unloadable:
                    if self.journal.stage is Stage.IDLE:
                        self._convict()
                    self._handle(ev.Unservable(at=self.now, code="model_rejected", detail=""))
                elif installed.artifact.digest in self.lacking:
                    self._handle(ev.Unservable(at=self.now, code="plugin_missing", detail="", mendable=True))
                else:
                    self.serving = installed.artifact.digest
            case ev.StopServing():
                assert self.serving is not None, "nothing answers, and it is to be stopped"
                self.serving = None
                self.stops[self.journal.started_at] += 1
                assert self.stops[self.journal.started_at] <= REPLACEMENTS_MAX, "nothing answers, again and again"
            case ev.Switch(split=split):
                assert self.journal.candidate is not None
                assert self.warm, "what was not loaded is to answer"
                self.warm, self.alone = False, self.serving is None
                self._check_compared()
                self.split = split
                self.fallback, self.serving = self.serving, self.journal.candidate.artifact.digest
                self._handle(ev.Switched(at=self.now))
            case ev.Divide(split=split):
                self.split = split
            case ev.Commit():
                self.fallback = self.split = None
            case ev.Revert():
                self.serving, self.fallback, self.split = self.fallback, None, None
                if self.serving is None and self.journal.installed is not None:
                    self._act(ev.Serve(installed=self.journal.installed))
            case ev.Retire():
                self.serving = self.fallback = self.split = None
            case ev.Cancel():
                self.pending, self.warm = None, False
            case ev.Tidy():
                self._tidy()
            case _:
                self._begin(effect)

    def _begin(self, effect: ev.Effect) -> None:
        if isinstance(effect, ev.Fetch):
            convicted = self.convicted.get(fingerprint(effect.target), -1)
            assert convicted < effect.target.order, "a release that failed is tried again without a newer order"
        if isinstance(effect, ev.Warm) and self.disk.get(effect.candidate.slot) != effect.candidate.files:
            self._count_wrong()
            self._handle(ev.SlotLost(at=self.now, slot=effect.candidate.slot))
            return
        assert self.warm or not isinstance(effect, ev.Mirror), "what was not loaded is to be compared"
        self.pending, self.warm = effect, isinstance(effect, ev.Mirror)

    def _tidy(self) -> None:
        state = self.journal
        named = {release.slot for release in (state.installed, state.candidate, state.previous) if release is not None}
        self.disk = {slot: files for slot, files in self.disk.items() if slot in named}
        self._sweep()

    def _sweep(self) -> None:
        wanted = wanted_downloads(self.journal)
        self.downloads = Counter({name: size for name, size in self.downloads.items() if name in wanted})

    def _check_compared(self) -> None:
        if not self._asked() or not self._unseen():
            return
        assert self.alone and self._asked() == "go_on", "it answers before it was compared"
        found = self.journal.shadow
        assert found and found.verdict == "inconclusive", "the report does not say that nothing was compared"

    # What must hold.

    def check(self) -> None:
        """The invariants that are about a state rather than about one effect."""
        state = self.journal
        for release in (state.installed, state.candidate):
            if release is not None:
                assert self.disk.get(release.slot) == release.files, "the journal names an incomplete slot"
        if state.stage in {Stage.IDLE, Stage.FAILED, Stage.RETIRED}:
            assert state.candidate is None, "a slot is held for an update that is over"
        if state.installed is not None:
            stopped = state.stage is Stage.REPLACING
            assert stopped or self.serving is not None, "there is an installed release and nothing answers"
            assert state.installed.artifact.digest in self.proven, "a release was installed that did not prove itself"
        if state.stage is Stage.PROBATION and state.installed is not None and not self.alone:
            assert self.fallback == state.installed.artifact.digest, "nothing stands behind the candidate"
        if state.stage is Stage.PROBATION and state.target is not None:
            assert self.split == (state.target.split or None), "the requests are not divided as the order says"
            if isinstance(self.pending, ev.Watch):
                assert self.pending.probation_s == state.target.probation_s, "it is watched for another time"
        if state.stage is Stage.SHADOWING and state.installed is not None:
            assert self.serving == state.installed.artifact.digest, "the candidate answers before it was compared"
        assert state.order >= self._orders_seen, "the order went back"
        self._orders_seen = state.order
        if state.stage is Stage.FAILED and state.target is not None:
            no_memory = self.stops[state.started_at] == REPLACEMENTS_MAX
            excused = no_memory or state.started_at in self.too_dear | self.too_few
            justified = excused or fingerprint(state.target) in self.convicted
            assert justified, "a transient trouble became a verdict"
        began = state.started_at
        assert self.wrong_downloads[began] <= REDOWNLOADS_MAX + 1, "wrong bytes are fetched without end"
        if state.stage in TRYING:
            assert self.deaths[began] < STRIKES_MAX, "the program dies over a candidate without end"

    def settle(self) -> None:
        """All troubles end; then every update must end too, or wait for a cheaper way if its order wants that."""
        self.find_plugin()
        self.look_again()
        for _ in range(60):
            if self.pending is None:
                break
            self.finish_work("good")
        state = self.journal
        if self.pending is None and state.stage is Stage.FETCHING and state.target is not None:
            dear = state.target.on_exceed == "defer" and isinstance(self._plan(state.target), TooDear)
            assert dear, "the update waits and need not"
            assert "waiting for a cheaper way" in state.trouble
            return
        assert state.stage in {Stage.IDLE, Stage.FAILED, Stage.RETIRED}, f"the update hangs in {state.stage}"
        if state.stage is Stage.IDLE and state.target is not None:
            assert state.installed is not None
            assert state.installed.files == files_of(state.target), "the device settled on something else"
            assert self.serving == state.target.artifact.digest


def _offers_of(source: object) -> tuple[Digest, ...]:
    """The names under which what a source is made of is refused."""
    match source:
        case FromPatches(offers):
            return tuple(offer.patch.digest for offer in offers)
        case FromParts(offer):
            return (offer.index.digest,)
    return ()
