"""Requests on their way to the model that a release's rules name, over what is served at this moment.

Only requests that name no version are handed on, at most `HOPS_MAX` times and never back. A target must be served and
have inputs and outputs of the same names and types as the model that was asked, and take tensors of this shape. What
was skipped, and why, is in `status`. A target that is not in memory is woken for the requests to come; this one stays
where it was.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from common.artifact.tensors import Array, accepts
from common.errors import NotFound, Unavailable
from common.ids import ModelName
from edge_agent.inference.loaded import Loaded
from edge_agent.inference.placement import Chosen, Placements
from edge_agent.inference.routing import HOPS_MAX, Ask, Decision, Load, Rule, compiled, decide


class RuleStatus(msgspec.Struct, frozen=True):
    """A rule as `GET /status` tells of it: `skipped` says why it cannot be used now (empty: it can), `taken` counts the
    requests that it handed on, `failed` those on which it could not be evaluated, the last time for the reason
    `failure`.
    """

    when: str
    model: ModelName
    skipped: str
    taken: int
    failed: int
    failure: str


class _Rules:
    """The rules of one release, and what became of them."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self.rules = rules
        self.taken = [0] * len(rules)
        self.failed = [0] * len(rules)
        self.failures = [""] * len(rules)
        self._lock = threading.Lock()

    def count(self, decision: Decision) -> None:
        with self._lock:
            if decision.rule is not None:
                self.taken[decision.rule] += 1
            for index, reason in decision.failed:
                self.failed[index] += 1
                self.failures[index] = reason


class Router:
    """Hands requests on. Safe for threads. `load` tells how busy the device is, `wake` asks for a sleeping model."""

    def __init__(self, placements: Placements, load: Callable[[], Load], wake: Callable[[ModelName], None]) -> None:
        self._placements = placements
        self._load = load
        self._wake = wake
        self._rules: dict[Loaded, _Rules] = {}

    def learn(self, loaded: Loaded) -> None:
        """Compile the rules of a release that is about to serve."""
        if loaded.serving.routes:
            self._rules[loaded] = _Rules(compiled(loaded.serving.routes))

    def forget(self, loaded: Loaded) -> None:
        """The release will not serve any more."""
        self._rules.pop(loaded, None)

    def handed_on(
        self, chosen: Chosen, feeds: Mapping[str, Array], priority: int, parameters: Mapping[str, Any]
    ) -> Chosen:
        """Who answers instead of `chosen`, if somebody does: pinned, and `chosen` no longer."""
        if chosen.first not in self._rules:
            return chosen
        target = self._walk(chosen.first, Ask(self._load(), priority, feeds, parameters))
        if target == chosen.first.model:
            return chosen
        try:
            other = self._placements.pin(target, None)
        except (NotFound, Unavailable):  # it was there a moment ago
            return chosen
        if _difference(chosen.first, other.first, feeds):
            other.unpin()
            return chosen
        chosen.unpin()
        return other

    def status(self, loaded: Loaded) -> tuple[RuleStatus, ...]:
        """The release's rules as they stand."""
        seen = self._rules.get(loaded)
        if seen is None:
            return ()
        counts = zip(seen.rules, seen.taken, seen.failed, seen.failures, strict=True)
        return tuple(
            RuleStatus(
                when=rule.route.when,
                model=rule.route.model,
                skipped=rule.flaw
                or self._obstacle(loaded, rule.route.model, {loaded.model}, {})
                or self._sleeping(rule.route.model),
                taken=taken,
                failed=failed,
                failure=failure,
            )
            for rule, taken, failed, failure in counts
        )

    def _walk(self, asked: Loaded, ask: Ask) -> ModelName:
        """The model at the end of the rules."""
        here: Loaded | None = asked
        visited = {asked.model}
        model = asked.model
        for _ in range(HOPS_MAX):
            rules = self._rules.get(here) if here else None
            if rules is None:
                break
            decision = decide(rules.rules, ask, lambda name: self._obstacle(asked, name, visited, ask.feeds))
            target = model if decision.rule is None else rules.rules[decision.rule].route.model
            if target in self._placements.asleep:
                self._wake(target)
                decision = decision._replace(rule=None)
            rules.count(decision)
            if decision.rule is None:
                break
            model = target
            visited.add(model)
            placement = self._placements.get(model)
            here = placement.current if placement else None
        return model

    def _obstacle(self, asked: Loaded, target: ModelName, visited: set[ModelName], feeds: Mapping[str, Array]) -> str:
        """Why `target` cannot answer for `asked`; empty if it can."""
        if target in visited:
            return f"leads back to {target}"
        placement = self._placements.get(target)
        if placement is None:
            return "" if target in self._placements.asleep else f"{target} is not served here"
        return _difference(asked, placement.current, feeds)

    def _sleeping(self, target: ModelName) -> str:
        asleep = target in self._placements.asleep
        return f"{target} is not in memory until such a request comes" if asleep else ""


def _difference(asked: Loaded, other: Loaded, feeds: Mapping[str, Array]) -> str:
    if asked.interface != other.interface:
        return f"{other.model}@{other.version} has inputs or outputs of other names or types"
    if not all(accepts(spec, feeds[spec.name]) for spec in other.inputs if spec.name in feeds):
        return f"{other.model}@{other.version} takes other shapes"
    return ""
