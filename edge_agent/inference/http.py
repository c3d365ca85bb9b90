"""The device's inference API: Open Inference Protocol V2 over HTTP, for applications on the device.

Any V2 client works (`tritonclient`, `curl`); docs/reference/inference-api.md is the reference. Errors are
`{"error": "..."}` and name the tensor and what was expected. What runs is the fleet's decision; only models that the
device's owner has loaded on demand can be loaded and unloaded here. There is no authentication, so listen on loopback
or on a Unix socket unless the network is trusted.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from common.errors import Forbidden, InvalidInput
from common.ids import ModelName
from edge_agent.inference import descriptions
from edge_agent.inference.bodies import BodyLimits
from edge_agent.inference.infer_route import ANSWERED_BY, CACHE, HEADER_LENGTH, Infer, named
from edge_agent.inference.labels import LABELS_MAX, Label, Labels
from edge_agent.inference.serving import ModelServer, Served
from edge_agent.inference.web import Application, Call, Reply, document

__all__ = ["ANSWERED_BY", "CACHE", "HEADER_LENGTH", "BodyLimits", "inference_app"]


def inference_app(
    server: ModelServer,
    status: Callable[[], dict[str, Any]] | None = None,
    limits: BodyLimits | None = None,
    labels: Labels | None = None,
) -> Application:
    """The application that serves `server`'s models; `GET /status` answers what `status` returns, if given, and answers
    can be labelled where there are `labels`.
    """
    return _Api(server, status, labels).application(limits or BodyLimits())


class GivenLabels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request to label answers."""

    labels: Annotated[tuple[Label, ...], Meta(min_length=1, max_length=LABELS_MAX)]


class _Api:
    """The handlers."""

    def __init__(
        self,
        server: ModelServer,
        status: Callable[[], dict[str, Any]] | None,
        labels: Labels | None,
    ) -> None:
        self._labels = labels
        self._server = server
        self._status = status

    def application(self, limits: BodyLimits) -> Application:
        application = Application(limits, self._server.cores, self._server.serve)
        infer = Infer(self._server, self._labels)
        add = application.add
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            add("POST", f"{model}/infer", infer)
            if self._labels:
                add("POST", f"{model}/labels", self.label)
            add("GET", model, self.metadata)
            add("GET", f"{model}/ready", self.model_ready)
            add("GET", f"{model}/config", self.config)
            add("GET", f"{model}/stats", self.statistics)
        add("GET", "/v2/models/stats", self.statistics)
        add("GET", "/v2", self.server_metadata)
        add("GET", "/v2/health/live", self.live)
        add("GET", "/v2/health/ready", self.ready)
        add("POST", "/v2/repository/index", self.index)
        for verb in ("load", "unload"):
            add("POST", f"/v2/repository/models/{{model}}/{verb}", self.move)
        if self._status:
            add("GET", "/status", self.status)
        return application

    async def label(self, call: Call) -> Reply:
        """The true labels of earlier answers."""
        model, version = named(call)
        try:
            given = msgspec.json.decode(call.body, type=GivenLabels).labels
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            fix = 'send {"labels": [{"id": "...", "label": 3}]}'
            raise InvalidInput(f"these are no labels: {error}", field="labels", fix=fix) from error
        if self._labels is None:
            raise AssertionError("labels without a memory")
        return document(self._labels.label(model, version, given))

    async def metadata(self, call: Call) -> Reply:
        model, version = named(call)
        served = self._server.served(model, version)
        versions = [one.version for one in self._all(model)]
        return document(descriptions.model_metadata(served, versions, self._server.platform))

    async def model_ready(self, call: Call) -> Reply:
        served = self._server.served(*named(call))
        return document({"name": served.model, "ready": True})

    async def config(self, call: Call) -> Reply:
        served = self._server.served(*named(call))
        return document(descriptions.model_config(served, self._server.platform))

    async def statistics(self, call: Call) -> Reply:
        if "model" not in call.named:
            return document(descriptions.model_statistics(self._server.models() + self._server.shadows()))
        model, version = named(call)
        shadows = [one for one in self._server.shadows() if one.model == model]
        chosen = [one for one in shadows if one.version == version]
        if not chosen:
            chosen = [self._server.served(model, version)] if version else [*self._all(model), *shadows]
        return document(descriptions.model_statistics(chosen))

    async def server_metadata(self, _: Call) -> Reply:
        return document(descriptions.server_metadata())

    async def live(self, _: Call) -> Reply:
        return document({"live": True})

    async def ready(self, _: Call) -> Reply:
        # The protocol says 4xx for "no", not 503.
        return document({"ready": self._server.ready}, 200 if self._server.ready else 400)

    async def index(self, _: Call) -> Reply:
        return document(descriptions.repository_index(self._server.models()))

    async def move(self, call: Call) -> Reply:
        """Into memory or out of it, for models that are loaded on demand; all else is the fleet's."""
        model, verb = ModelName(call.named["model"]), call.path.rpartition("/")[2]
        if self._server.may_rest(model):
            served = self._server.served(model)
            if verb == "load" and not served.in_memory:
                await self._server.waking.awake(model, None)
            elif verb == "unload" and served.in_memory and not served.probation:
                await self._server.rest(model)
            return document({})
        fix = "change what the device should run with a rollout"
        raise Forbidden(f"cannot {verb} {model[:80]!r} here: the fleet's controller decides", fix=fix)

    async def status(self, _: Call) -> Reply:
        return document(self._status() if self._status else {})

    def _all(self, model: ModelName) -> Sequence[Served]:
        self._server.served(model)
        return [one for one in self._server.models() if one.model == model]
