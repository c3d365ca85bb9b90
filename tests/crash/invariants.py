"""What must hold after every crash. Each function yields a sentence for every way in which it does not.

They look at files, at the journal by plain SQL, at answers and at what the desk and the controller saw, and never ask
the agent's own code whether all is well. `ALL` names them; `mutants` has a wrong agent for each.
"""

from collections.abc import Callable, Iterator, Mapping

from common.ids import Digest, ModelName
from common.wire import UpdateReport
from edge_agent.update import STRIKES_MAX, Installed, Stage
from edge_agent.update.outcomes import REDOWNLOADS_MAX
from edge_agent.update.state import Quarantined, files_of, fingerprint
from tests.crash.disk import Loss
from tests.crash.stories import Step, Story
from tests.crash.survey import BLOCK_BYTES, FLUSH_BYTES, Crash, Memory, Recovery, Told, Tree, sha256
from tests.integration.release_desk import MODEL

LOADING = frozenset({Stage.WARMING, Stage.SHADOWING, Stage.REPLACING, Stage.SWITCHING, Stage.PROBATION})
BLAMELESS = frozenset({"over_budget", "shadow_inconclusive", "no_memory"})
"""Reasons for which an order ends and its release is not to blame."""
Found = Iterator[str]


class Case:
    """A crash and what was seen after it."""

    def __init__(self, story: Story, crash: Crash, seen: Recovery, blobs: Mapping[Digest, bytes]) -> None:
        self.story = story
        self.crash = crash
        self.seen = seen
        self.blobs = blobs
        self.left = seen.left

    @property
    def step(self) -> Step:
        """The step under way at the crash."""
        return self.story.steps[max(1, self.crash.asked) - 1]

    @property
    def moments(self) -> tuple[tuple[str, Tree, Memory], ...]:
        return (
            ("at the crash", self.crash.tree, self.left),
            ("after the restart", self.seen.offline_tree, self.seen.offline),
            ("in the end", self.seen.end_tree, self.seen.end),
        )


def named_releases_are_complete(case: Case) -> Found:
    """What the journal names as installed or as candidate is there, every file with its digest."""
    for when, tree, memory in case.moments:
        state = memory.state
        for release in (state.installed, state.candidate) if state else ():
            if release is not None and not is_complete(tree, MODEL, release):
                yield f"{when} the journal names {release.version} in slot {release.slot}, which is not complete"


def the_old_or_the_new_serves(case: Case) -> Found:
    """Something answers at once and without a network, it is what it says it is, and nothing else than old or new."""
    state, answer = case.left.state, case.seen.offline_answer
    releases = [release for release in (state.installed, state.candidate) if release] if state else []
    if state and state.installed and answer is None:
        yield f"{state.installed.version} is installed and nothing answers after the restart"
    if answer and answer[0] not in {release.version for release in releases}:
        yield f"after the restart {answer[0]} answers, which the journal does not name"
    answers = {*case.seen.answers, answer, case.seen.end_answer}
    for wrong in [one for one in answers if one and float(one[0]) != one[1]]:
        yield f"an answer said it was from {wrong[0]} and was from {wrong[1]}"
    if answer and None in case.seen.answers and all(step.target for step in case.story.steps):
        yield "requests were refused while there was a release"


def the_old_release_stays_until_the_commit(case: Case) -> Found:
    """The newest release that has proven itself is the installed one until another one has."""
    state = case.left.state
    told = [model.last_update for one in case.crash.told if one.standing for model in one.standing.models]
    proven = [update.version for update in told if update and update.outcome == "succeeded"]
    if not proven or not state or not all(step.target for step in case.story.steps):
        return
    done = state.last_update
    expected = done.version if done and done.outcome == "succeeded" else proven[-1]
    if state.installed is None or state.installed.version != expected:
        yield f"{expected} has proven itself, and the journal names {state.installed and state.installed.version}"


def success_is_kept(case: Case) -> Found:
    """What was reported as installed serves after the crash."""
    update = _last_told(case.crash.told)
    target, answer = case.step.target, case.seen.offline_answer
    if update is None or target is None or (update.outcome, update.generation) != ("succeeded", target.order):
        return
    if answer is None or answer[0] != update.version:
        yield f"{update.version} was reported as installed, and {answer} answers"


def deaths_over_a_candidate_are_strikes(case: Case) -> Found:
    """An unclean end while a candidate was loaded or tried is counted, and the last one that is allowed rolls back."""
    left, started = case.left.state, case.seen.started
    if left is None or left.stage not in LOADING or not case.left.running:
        return
    if left.strikes + 1 >= STRIKES_MAX:
        update = started.last_update
        if update is None or update.reason != "unclean_restarts" or started.stage is not Stage.FAILED:
            yield f"{STRIKES_MAX} deaths over {left.target and left.target.version} did not roll it back"
    elif started.stage in LOADING and started.strikes <= left.strikes:
        yield "a death over a candidate was not counted"


def quarantined_bytes_are_not_tried_again(case: Case) -> Found:
    """A release that failed is neither fetched nor tried before an order with a higher number asks for it.

    It is in quarantine, unless the end was no verdict on its bytes.
    """
    target = case.step.target
    update = _last_told(case.crash.told)
    if not target or not update or update.generation != target.order or update.outcome == "succeeded":
        return
    for ref in files_of(target).values():
        if case.seen.asked.get(ref.digest):
            yield f"{target.version} failed here and was fetched again under the same order"
    later = [step.target for step in case.story.steps if step.target and step.target.order > target.order]
    again = any(fingerprint(other) == fingerprint(target) for other in later)
    if not again and any(answer and answer[0] == target.version for answer in case.seen.answers):
        yield f"{target.version} failed here and answers again"
    held: tuple[Quarantined, ...] = case.seen.offline.state.quarantine if case.seen.offline.state else ()
    if update.reason in BLAMELESS:
        return
    if not any(entry.files == fingerprint(target) and entry.order >= target.order for entry in held):
        yield f"{target.version} failed here and is not in quarantine"


def generations_do_not_decrease(case: Case) -> Found:
    """What was reported as accepted stays so, and an older order is refused."""
    told = max((told.standing.generation for told in case.crash.told if told.standing), default=0)
    seen = (told, case.left.generation, case.seen.offline.generation, case.seen.end.generation)
    if list(seen) != sorted(seen):
        yield f"the generation went back: {seen}"
    if case.seen.accepted_older:
        yield "an order that is older than the newest was followed"
    orders = [memory.state.order for _, _, memory in case.moments if memory.state]
    if orders != sorted(orders) and all(step.target for step in case.story.steps):
        yield f"the model's order went back: {orders}"


def blobs_are_absent_or_right(case: Case) -> Found:
    """A finished download is what its name says; what a killed process leaves unfinished is its beginning."""
    for when, tree, _ in case.moments:
        for path, data in tree.items():
            folder, _, name = path.rpartition("/")
            if folder != "downloads" or data is None or name.endswith(".made"):
                continue
            digest = Digest(f"sha256:{name.removesuffix('.part')}")
            whole = case.story.made[digest][1] if digest in case.story.made else case.blobs.get(digest)
            if whole is None:
                yield f"{when} there is a download that nobody ordered: {name}"
            elif not name.endswith(".part") and data != whole:
                yield f"{when} {name[:12]} is not what its name says"
            elif case.crash.loss is Loss.KILLED and not whole.startswith(data[: len(whole) - 1]):
                yield f"{when} {name[:12]}.part is not the beginning of its blob"


def what_is_here_is_not_fetched_again(case: Case) -> Found:
    """Of every download that was under way only what was not on the disk for good comes again.

    After a power cut that is known of all but the last flushed piece.
    """
    left, target = case.left.state, case.step.target
    if not case.step.outcome or not target or not left or not left.target or left.target.order != target.order:
        return
    if left.stage in {Stage.IDLE, Stage.FAILED, Stage.RETIRED}:
        return
    for digest, sent in case.seen.sent.items():
        whole = len(_wanted(case, digest))
        here = max(_here(case, name) for name in {digest, *_made_from(case.story, digest)})
        if sent > whole - here and digest not in case.story.tampered:
            yield f"{sent} bytes of {digest[:19]} came again, {here} of {whole} were on the disk"


def every_end_is_told_and_only_one(case: Case) -> Found:
    """Each order's end is reported at least once, and two reports of one order never disagree."""
    told = [*case.crash.told, *case.seen.told]
    ends: dict[int, set[str]] = {}
    for standing in (one.standing for one in told if one.standing):
        for update in (model.last_update for model in standing.models if model.last_update):
            ends.setdefault(update.generation, set()).add(update.outcome)
    for order, outcomes in ends.items():
        if len(outcomes) > 1:
            yield f"order {order} was reported as {' and as '.join(sorted(outcomes))}"
    for step in case.story.steps:
        if step.outcome and step.target and step.target.order not in ends:
            yield f"the end of order {step.target.order} was never reported"


def the_story_ends_as_it_does_without_a_crash(case: Case) -> Found:
    """Liveness: the newest order is carried out, unless the agent died over its candidate too often."""
    step = case.story.steps[-1]
    update = case.seen.end.state.last_update if case.seen.end.state else None
    if step.target is None or update is None:
        yield "the last order of the story did not end"
        return
    answer = case.seen.end_answer
    if update.outcome == step.outcome:
        if step.outcome == "succeeded" and (answer is None or answer[0] != step.target.version):
            yield f"{step.target.version} was installed and {answer} answers"
    elif update.reason != "unclean_restarts":
        yield f"the last order ended {update.outcome} ({update.reason}: {update.detail}), not {step.outcome}"


def attempts_are_bounded(case: Case) -> Found:
    """No download is asked for more often than wrong bytes are fetched again, and once more if it was resumed."""
    for digest, asked in case.seen.asked.items():
        if asked > 2 + REDOWNLOADS_MAX:
            yield f"{digest[:19]} was asked for {asked} times"


def a_second_start_changes_nothing(case: Case) -> Found:
    """Recovery is idempotent: starting once more finds everything in order."""
    if case.seen.again is None:
        return
    memory, answer, requests = case.seen.again
    if memory.state != case.seen.end.state or answer != case.seen.end_answer:
        yield "another start changed what the device holds"
    if requests:
        yield f"another start sent {requests} requests"


def nothing_is_left_over(case: Case) -> Found:
    """When all is done there are the releases that the journal names, and no other file."""
    state = case.seen.end.state
    releases = (state.installed, state.candidate, state.previous) if state else ()
    named = {f"models/{MODEL}/{release.slot}" for release in releases if release}
    for path, data in case.seen.end_tree.items():
        folder = path.rpartition("/")[0]
        if data is not None and (folder.startswith("models/") or folder == "downloads") and folder not in named:
            yield f"{path} is left over"


def requests_finish_on_their_session(case: Case) -> Found:
    """No session is closed under a request."""
    if case.seen.closed_in_use:
        yield "a session was closed while a request was in it"


Invariant = Callable[[Case], Found]
ALL: tuple[Invariant, ...] = (
    named_releases_are_complete,
    the_old_or_the_new_serves,
    the_old_release_stays_until_the_commit,
    success_is_kept,
    deaths_over_a_candidate_are_strikes,
    quarantined_bytes_are_not_tried_again,
    generations_do_not_decrease,
    blobs_are_absent_or_right,
    what_is_here_is_not_fetched_again,
    every_end_is_told_and_only_one,
    the_story_ends_as_it_does_without_a_crash,
    attempts_are_bounded,
    a_second_start_changes_nothing,
    nothing_is_left_over,
    requests_finish_on_their_session,
)


def violations(case: Case) -> list[str]:
    """Everything that does not hold, each with the name of its invariant."""
    return [f"{check.__name__}: {found}" for check in ALL for found in check(case)]


def is_complete(tree: Tree, model: ModelName, release: Installed) -> bool:
    """Whether all files of the release are in its slot, each with its digest."""
    folder = f"models/{model}/{release.slot}"
    files = {name: ref.digest for name, ref in release.files.items()} | {"manifest.json": release.manifest.digest}
    return all(
        (data := tree.get(f"{folder}/{name}")) is not None and f"sha256:{sha256(data)}" == digest
        for name, digest in files.items()
    )


def _last_told(told: tuple[Told, ...]) -> UpdateReport | None:
    for one in reversed(told):
        if one.standing:
            return next((model.last_update for model in one.standing.models), None)
    return None


def _made_from(story: Story, digest: Digest) -> list[Digest]:
    return [name for name, (source, _) in story.made.items() if source == digest]


def _wanted(case: Case, digest: Digest) -> bytes:
    """What of the artifact may have to come."""
    made = _made_from(case.story, digest)
    return case.story.made[made[0]][1] if made else case.blobs[digest]


def _here(case: Case, name: Digest) -> int:
    """Bytes of the download that the crash has left for sure."""
    path = f"downloads/{name.removeprefix('sha256:')}"
    state = case.left.state
    for release in (state.installed, state.candidate, state.previous) if state else ():
        holds = release is not None and name in {ref.digest for ref in (*release.files.values(), release.manifest)}
        if release is not None and holds and is_complete(case.crash.tree, MODEL, release):
            return len(case.blobs[name])
    if case.crash.loss is Loss.KILLED:
        lengths = _lengths(case.crash.tree)
        return max(lengths.get(path, 0), lengths.get(f"{path}.part", 0))
    unsure = FLUSH_BYTES + BLOCK_BYTES
    return max(case.crash.synced.get(path, 0), case.crash.synced.get(f"{path}.part", 0) - unsure)


def _lengths(tree: Tree) -> dict[str, int]:
    return {path: len(data) for path, data in tree.items() if data is not None}
