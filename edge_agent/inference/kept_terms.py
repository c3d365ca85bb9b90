"""How the terms of a release (`common.artifact.serving`) are kept here: what `GET /status` tells under `serving`."""

import msgspec

from common.ids import ModelName, Version
from edge_agent.inference.loaded import Loaded
from edge_agent.inference.recall import Recall
from edge_agent.inference.router import Router, RuleStatus


class KeptTerms(msgspec.Struct, frozen=True, omit_defaults=True):
    """The release in service, and how its terms are kept.

    `cache_bytes` is what it may keep, `answers` how many it keeps in `answers_bytes`; `routes` are its rules; `padding`
    says whether requests of other lengths run with each other.
    """

    model: ModelName
    version: Version
    cache_bytes: int = 0
    answers: int = 0
    answers_bytes: int = 0
    routes: tuple[RuleStatus, ...] = ()
    padding: str = ""


def kept_terms(loaded: Loaded, recall: Recall, router: Router) -> KeptTerms:
    """How the terms of `loaded` are kept at this moment."""
    answers, size = recall.held(loaded)
    return KeptTerms(
        model=loaded.model,
        version=loaded.version,
        cache_bytes=loaded.serving.cache_bytes,
        answers=answers,
        answers_bytes=size,
        routes=router.status(loaded),
        padding=loaded.batching.lengths.standing,
    )
