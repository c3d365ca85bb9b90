"""What can happen to a model's update (events), and what the machine may ask for (effects).

Events that end a piece of work carry `spent`, what it cost. Every event carries `at`, Unix seconds, because the machine
has no clock. Effects are safe to repeat: a crash between saving the state and acting leads to the same effect again.
"""

from typing import Literal

import msgspec

from common.ids import Digest
from common.wire import DesiredModel, Shadow, ShadowReport, Split, SplitReport
from edge_agent.update.choice import Sources
from edge_agent.update.state import Installed, Slot, Tally

Verdict = Literal["pass", "fail", "inconclusive"]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something happened at `at`, in Unix seconds."""

    at: float


class WorkEnded(Event, frozen=True, kw_only=True):
    """A piece of work ended and cost `spent`."""

    spent: Tally = Tally()


class Restarted(Event, frozen=True, kw_only=True):
    """The program started; `clean` if its last run ended in good order."""

    clean: bool


class Ordered(Event, frozen=True, kw_only=True):
    """An accepted order asks for `target`."""

    target: DesiredModel
    traceparent: str | None = None


class Withdrawn(Event, frozen=True, kw_only=True):
    """An accepted order no longer names the model."""


class Fetched(WorkEnded, frozen=True, kw_only=True):
    """Manifest and bytes are here; `sources` say what the files will be made of."""

    sources: Sources


class OfferUnusable(WorkEnded, frozen=True, kw_only=True):
    """The patch or the index `offer` is gone, damaged or of another base: there must be another way."""

    offer: Digest
    detail: str


class OverBudget(WorkEnded, frozen=True, kw_only=True):
    """The cheapest way there is makes the update cost `needs` bytes, and the order allows `budget`."""

    needs: int
    budget: int


class Corrupted(WorkEnded, frozen=True, kw_only=True):
    """The bytes came whole and are not what the order names."""

    detail: str


class ManifestRefused(WorkEnded, frozen=True, kw_only=True):
    """The manifest is not signed by a trusted key, or disagrees with the order."""

    code: str
    detail: str


class Interrupted(WorkEnded, frozen=True, kw_only=True):
    """Transient trouble (network, disk): no verdict on anything."""

    code: str
    detail: str


class RetryDue(Event, frozen=True, kw_only=True):
    """The wait after an interruption is over."""


class Built(Event, frozen=True, kw_only=True):
    """The idle slot holds `candidate`, complete, verified and on the disk."""

    candidate: Installed


class Warmed(Event, frozen=True, kw_only=True):
    """The candidate is loaded, gave finite answers to made-up inputs and the right ones to its samples.

    `run_s` are the median seconds of a run, if they were measured.
    """

    run_s: float | None = None


class ModelRefused(Event, frozen=True, kw_only=True):
    """The engine cannot load the candidate, or it answers nonsense to made-up inputs or wrongly to its samples."""

    code: str
    detail: str


class TooSlow(Event, frozen=True, kw_only=True):
    """The candidate answers its samples rightly, and slower than it may; perhaps the device was busy."""

    detail: str


class NoRoomBeside(Event, frozen=True, kw_only=True):
    """Memory does not hold the candidate beside the installed release, and would hold it in its place."""

    detail: str


class Shadowed(Event, frozen=True, kw_only=True):
    """The shadow time is over; `found` is not judged yet."""

    found: ShadowReport


class Switched(Event, frozen=True, kw_only=True):
    """The candidate answers requests from now on."""


class HealthChecked(Event, frozen=True, kw_only=True):
    """A look at the candidate `elapsed_s` seconds after the switch; `split` is how both sides have done until then."""

    verdict: Verdict
    elapsed_s: float
    detail: str = ""
    split: SplitReport | None = None


class Probed(Event, frozen=True, kw_only=True):
    """How the candidate answered the agent's own requests, for want of others."""

    verdict: Verdict
    detail: str = ""


class SlotLost(Event, frozen=True, kw_only=True):
    """What `slot` holds is not what the journal says, or had to make room."""

    slot: Slot


class Mended(Event, frozen=True, kw_only=True):
    """Files of `slot` had gone bad on the disk and are again what the journal says."""

    slot: Slot


class Unservable(Event, frozen=True, kw_only=True):
    """The installed release is intact, but after a restart the engine would not load it, or it answered its samples
    wrongly. `mendable`: it lacks something on this device that can be installed.
    """

    code: str
    detail: str
    mendable: bool = False


class Wanted(Event, frozen=True, kw_only=True):
    """Somebody asks for the model, and the installed release is not in memory."""


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """Something to do, after the state was saved."""


class Serve(Effect, frozen=True, kw_only=True):
    """Check and load `installed` and let it answer requests. May end in `SlotLost` or `Unservable`.

    Unless `awake`, a model that the owner wants loaded on demand is only got ready for that.
    """

    installed: Installed
    awake: bool = False


class Fetch(Effect, frozen=True, kw_only=True):
    """Choose the cheapest way to all files of `target`, get and check the manifest, then the bytes. May end in any of
    the events from `Fetched` to `Interrupted`, or in `SlotLost`.
    """

    target: DesiredModel


class Build(Effect, frozen=True, kw_only=True):
    """Make all files of `target` in `slot` and check their digests."""

    target: DesiredModel
    sources: Sources
    slot: Slot


class Warm(Effect, frozen=True, kw_only=True):
    """Load `candidate` beside what serves, and try it. May end in `Warmed`, `ModelRefused`, `TooSlow`, `SlotLost`,
    `NoRoomBeside` (unless nothing serves) or `Interrupted`.
    """

    candidate: Installed


class StopServing(Effect, frozen=True, kw_only=True):
    """Take the installed release out of memory, after the requests in flight; new ones are told to come back."""


class Mirror(Effect, frozen=True, kw_only=True):
    """Put live requests to the warmed candidate too, on these terms. Ends in `Shadowed` or `Interrupted`."""

    terms: Shadow


class Switch(Effect, frozen=True, kw_only=True):
    """Let the warmed candidate answer, all requests or as `split` says; what served before stays behind it."""

    split: Split | None = None


class Divide(Effect, frozen=True, kw_only=True):
    """From now on the candidate in probation answers as `split` says; None: all requests."""

    split: Split | None


class Watch(Effect, frozen=True, kw_only=True):
    """Look at the candidate's health now and again until `probation_s` seconds after the switch."""

    probation_s: float


class Probe(Effect, frozen=True, kw_only=True):
    """Send the candidate a few requests of our own."""


class Commit(Effect, frozen=True, kw_only=True):
    """Drop what stood behind the candidate."""


class Revert(Effect, frozen=True, kw_only=True):
    """Let what stood behind the candidate answer again; the installed release is loaded if it was not in memory."""


class Retire(Effect, frozen=True, kw_only=True):
    """Take the model out of service, after the requests in flight."""


class Cancel(Effect, frozen=True, kw_only=True):
    """Stop the work under way and forget its result."""


class Wait(Effect, frozen=True, kw_only=True):
    """Raise `RetryDue` after the backoff for retry number `attempt` (0-based)."""

    attempt: int


class Tidy(Effect, frozen=True, kw_only=True):
    """Remove the files that no state names any more."""
