"""The controller's API as Python: typed with the same resources that the server answers with.

    with FerryClient("http://127.0.0.1:8080", token) as ferry:
        ferry.publish("detector", "1.4.0", {"default": Path("model.onnx")})
        rollout = ferry.create_rollout(RolloutSpec(release=ReleaseRef.parse("detector@1.4.0")))
        for event in ferry.events(subject=rollout.id): ...

What the server refuses is raised as the error class that the server raised (`common.errors`), with its field and fix;
a controller that does not answer is `Unavailable`. Mutations carry an Idempotency-Key, so they are tried again safely
when the connection breaks. All requests of one client belong to one trace. Synchronous; one client per thread.
"""

import random
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from common import errors
from common.artifact import ArtifactRef, Hasher
from common.artifact.external import data_files
from common.artifact.onnx_io import read_signature
from common.artifact.selftest import Rule
from common.artifact.serving import GivenServing
from common.backoff import Backoff
from common.errors import FerryError, NotFound, Unavailable
from common.filesource import FileSource
from common.ids import Digest, ReleaseRef, parse_model_name, parse_version
from controller.resources import (
    BlobView,
    CollectedView,
    CollectGarbage,
    CreateJoinToken,
    DeviceView,
    GivenPipeline,
    GivenSelfTest,
    HealthView,
    JoinTokenCreated,
    JoinTokenView,
    Page,
    PatchView,
    Problem,
    PublishRelease,
    RelabelDevice,
    ReleaseView,
    RolloutAction,
    RolloutActionRequest,
    RolloutView,
    TelemetryView,
)
from controller.rollouts.model import Execution, Preview, RolloutSpec
from controller.store.port import AuditEntry, Event

T = TypeVar("T")

ATTEMPTS_MAX = 4
TIMEOUT_S = 30.0
PUBLISH_TIMEOUT_S = 1800.0
"""The controller reads and hashes all files before it answers."""
STREAM_SILENCE_S = 60.0
"""An event stream that says nothing for this long (it sends a comment every few seconds) is taken for broken."""
UPLOAD_BYTES = 256 * 1024
BACKOFF = Backoff(base_s=0.2, cap_s=3.0)

Progress = Callable[[int, int], object]
"""Called with bytes done and bytes in all."""

Body = Callable[[], Iterator[bytes] | bytes]
"""Gives a request's body, anew for each attempt."""

ERROR_OF_CODE: Mapping[str, type[FerryError]] = {
    kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FerryError)
}
ERROR_OF_STATUS: Mapping[int, type[FerryError]] = {
    400: errors.InvalidInput,
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    412: errors.PreconditionFailed,
    413: errors.TooLarge,
    422: errors.InvalidInput,
    502: errors.Unavailable,
    503: errors.Unavailable,
    504: errors.Unavailable,
    507: errors.StorageFull,
}
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""Never through a proxy."""
RETRIED = frozenset({502, 503, 504})


class SelfTestDraft(NamedTuple):
    """A self-test to publish: the file with the samples (`common.artifact.samples`), and its terms."""

    samples: Path
    rules: Mapping[str, Rule]
    latency_max_s: float | None = None


class FerryClient:
    """One connection pool to one controller, as the owner of `token`."""

    def __init__(self, url: str, token: str = "", *, timeout_s: float = TIMEOUT_S) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        proxied = httpx.URL(url).host not in LOOPBACK
        self.url = url.rstrip("/")
        self.trace_id = secrets.token_hex(16)
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, trust_env=proxied)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> "FerryClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Releases

    def upload(self, file: Path, on_progress: Progress | None = None) -> BlobView:
        """Stream `file` into the registry unless it is there already."""
        artifact = reference_of(file)
        known = self._find_blob(artifact.digest)
        return known or self._send_blob(file, artifact, on_progress)

    def publish(
        self,
        model: str,
        version: str,
        variants: Mapping[str, Path],
        on_progress: Progress | None = None,
        self_tests: Mapping[str, SelfTestDraft] | None = None,
        *,
        pipelines: Mapping[str, GivenPipeline] | None = None,
        custom_ops: Mapping[str, Sequence[Path]] | None = None,
        serving: Mapping[str, GivenServing] | None = None,
        references: Mapping[str, Path] | None = None,
    ) -> tuple[ReleaseView, bool]:
        """Upload files and make the release `model@version`; whether it is new. `Conflict` if it has other bytes.

        `variants` are ONNX files by variant; the files beside them that they keep weights in are found and sent too.
        The rest is by variant: `custom_ops` are shared libraries, `references` files (`common.monitoring.reference`).
        """
        tests, libraries, usual = self_tests or {}, custom_ops or {}, references or {}
        builds = {name: build_of(file, f"variants.{name}") for name, file in variants.items()}
        groups = (*builds.values(), *libraries.values())
        extra_paths = (*(test.samples for test in tests.values()), *usual.values())
        paths = (*(path for paths in groups for path in paths), *extra_paths)
        artifacts = {path: reference_of(path) for path in paths}
        request = PublishRelease(
            model=parse_model_name(model),
            version=parse_version(version),
            variants={name: {path.name: artifacts[path].digest for path in paths} for name, paths in builds.items()},
            self_tests={
                name: GivenSelfTest(
                    samples=artifacts[test.samples].digest, rules=dict(test.rules), latency_max_s=test.latency_max_s
                )
                for name, test in tests.items()
            },
            pipelines=dict(pipelines or {}),
            custom_ops={
                name: {path.name: artifacts[path].digest for path in paths} for name, paths in libraries.items()
            },
            serving=dict(serving or {}),
            references={name: artifacts[path].digest for name, path in usual.items()},
        )
        total = sum(artifact.size for artifact in artifacts.values())
        done = 0
        for path, artifact in artifacts.items():
            if self._find_blob(artifact.digest) is None:
                self._send_blob(path, artifact, _part_of(on_progress, done, total))
            done += artifact.size
            if on_progress:
                on_progress(done, total)
        try:
            return self._publish(request)
        except NotFound:  # a blob that was here has been collected as garbage meanwhile
            for path, artifact in artifacts.items():
                self._send_blob(path, artifact, None)
            return self._publish(request)

    def releases(self, model: str | None = None) -> Iterator[ReleaseView]:
        """All releases, or those of one model."""
        return self._pages("/v1/releases", ReleaseView, {"model": model} if model else {})

    def release(self, ref: ReleaseRef) -> ReleaseView:
        """One release."""
        return self._get(f"/v1/releases/{ref.model}/{ref.version}", ReleaseView)

    def telemetry(self, ref: ReleaseRef, since_s: float, device: str | None = None) -> TelemetryView:
        """What devices, or one device, measured of a release in the last `since_s` seconds."""
        path = f"/v1/releases/{ref.model}/{ref.version}/telemetry"
        only = {} if device is None else {"device": device}
        return self._get(path, TelemetryView, {"since_s": str(since_s), **only})

    def patches(self, target: Digest) -> Iterator[PatchView]:
        """What is known of patches that rebuild `target`."""
        return self._pages("/v1/patches", PatchView, {"target": target})

    def collect_garbage(self, min_age_s: float) -> CollectedView:
        """Remove blobs that nothing needs."""
        return self._change("POST", "/v1/gc", CollectGarbage(min_age_s=min_age_s), CollectedView)

    # Devices

    def devices(self, selector: str = "true") -> Iterator[DeviceView]:
        """The devices that `selector` matches."""
        return self._pages("/v1/devices", DeviceView, {"selector": selector})

    def device(self, device: str) -> DeviceView:
        """One device."""
        return self._get(f"/v1/devices/{_segment(device)}", DeviceView)

    def label_device(self, device: str, labels: dict[str, str | None], revision: int | None = None) -> DeviceView:
        """Merge `labels`, None removing one; `PreconditionFailed` if it is no longer at `revision`."""
        path = f"/v1/devices/{_segment(device)}"
        return self._change("PATCH", path, RelabelDevice(labels=labels), DeviceView, revision=revision)

    def create_join_token(self, request: CreateJoinToken) -> JoinTokenCreated:
        """A claim that lets devices in; its join string is only in this answer."""
        return self._change("POST", "/v1/join-tokens", request, JoinTokenCreated)

    def join_tokens(self) -> Iterator[JoinTokenView]:
        """All claims."""
        return self._pages("/v1/join-tokens", JoinTokenView)

    def withdraw_join_token(self, token: str) -> None:
        """Make a claim worthless."""
        self._send("DELETE", f"/v1/join-tokens/{_segment(token)}", headers=_fresh_key())

    # Rollouts

    def plan_rollout(self, spec: RolloutSpec) -> Preview:
        """What `spec` would do; nothing is changed."""
        return self._change("POST", "/v1/rollouts", spec, Preview, query={"dry_run": "true"})

    def create_rollout(self, spec: RolloutSpec) -> RolloutView:
        """Start a rollout."""
        return self._change("POST", "/v1/rollouts", spec, RolloutView)

    def rollouts(self) -> Iterator[RolloutView]:
        """All rollouts, newest first."""
        return self._pages("/v1/rollouts", RolloutView)

    def rollout(self, rollout: str) -> RolloutView:
        """One rollout."""
        return self._get(f"/v1/rollouts/{_segment(rollout)}", RolloutView)

    def executions(self, rollout: str) -> Iterator[Execution]:
        """What each device does in a rollout."""
        return self._pages(f"/v1/rollouts/{_segment(rollout)}/executions", Execution)

    def act(self, rollout: str, action: RolloutAction, revision: int | None = None) -> RolloutView:
        """Approve, pause, resume...; `Conflict` when it makes no sense now."""
        path = f"/v1/rollouts/{_segment(rollout)}/actions"
        return self._change("POST", path, RolloutActionRequest(action=action), RolloutView, revision=revision)

    # The controller itself

    def health(self) -> HealthView:
        """How the controller is."""
        return self._get("/v1/health", HealthView)

    def audit(self) -> Iterator[AuditEntry]:
        """Who did what, newest first."""
        return self._pages("/v1/audit", AuditEntry)

    def events(self, *, kind: str = "", subject: str = "", after: int | None = None) -> Iterator[Event]:
        """Events as they happen, from now on or after number `after`, until the connection breaks (`Unavailable`).

        To go on after that, call again with the `seq` of the last event.
        """
        return (event for event in self.signals(kind=kind, subject=subject, after=after) if event is not None)

    def signals(self, *, kind: str = "", subject: str = "", after: int | None = None) -> Iterator[Event | None]:
        """Like `events`, with a None when the stream has begun and now and then while nothing happens."""
        query = {name: value for name, value in (("kind", kind), ("subject", subject)) if value}
        if after is not None:
            query["after"] = str(after)
        timeout = httpx.Timeout(TIMEOUT_S, read=STREAM_SILENCE_S)
        headers = self._traced({"Accept": "text/event-stream"})
        try:
            with self._http.stream("GET", "/v1/events", params=query, headers=headers, timeout=timeout) as response:
                if response.is_error:
                    response.read()
                    raise error_of(response)
                yield from _signals_in(response.iter_lines())
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        raise Unavailable("the controller ended the event stream", fix="connect again")

    # How it is done

    def _find_blob(self, digest: Digest) -> BlobView | None:
        try:
            response = self._send("HEAD", f"/v1/blobs/{digest}")
        except NotFound:
            return None
        return BlobView(digest=digest, size=int(response.headers["Content-Length"]))

    def _send_blob(self, file: Path, artifact: ArtifactRef, on_progress: Progress | None) -> BlobView:
        with file.open("rb") as source:

            def body() -> Iterator[bytes]:
                source.seek(0)
                return _read_in_chunks(source, artifact.size, on_progress)

            headers = {"Content-Length": str(artifact.size), "Content-Type": "application/octet-stream"}
            response = self._send("PUT", f"/v1/blobs/{artifact.digest}", body=body, headers=headers)
        return msgspec.json.decode(response.content, type=BlobView)

    def _publish(self, request: PublishRelease) -> tuple[ReleaseView, bool]:
        response = self._send(
            "POST", "/v1/releases", body=_json(request), headers=_fresh_key(), timeout_s=PUBLISH_TIMEOUT_S
        )
        return msgspec.json.decode(response.content, type=ReleaseView), response.status_code == httpx.codes.CREATED

    def _get(self, path: str, view: type[T], query: Mapping[str, str] | None = None) -> T:
        return msgspec.json.decode(self._send("GET", path, query=query).content, type=view)

    def _change(
        self,
        method: str,
        path: str,
        request: msgspec.Struct,
        view: type[T],
        *,
        query: Mapping[str, str] | None = None,
        revision: int | None = None,
    ) -> T:
        headers = _fresh_key()
        if revision is not None:
            headers["If-Match"] = f'"r{revision}"'
        response = self._send(method, path, query=query, body=_json(request), headers=headers)
        return msgspec.json.decode(response.content, type=view)

    def _pages(self, path: str, view: type[T], query: Mapping[str, str] | None = None) -> Iterator[T]:
        after: str | None = ""
        while after is not None:
            page = self._get(path, Page[view], {**(query or {}), **({"after": after} if after else {})})  # type: ignore[valid-type]  # a runtime type, which mypy cannot follow
            yield from page.items
            after = page.next

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Body | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> httpx.Response:
        """The answer; tried again while the controller does not answer. `body` is called for each attempt."""
        timeout = httpx.USE_CLIENT_DEFAULT if timeout_s is None else httpx.Timeout(TIMEOUT_S, read=timeout_s)
        for attempt in range(ATTEMPTS_MAX):
            content = body() if body else None
            try:
                response = self._http.request(
                    method, path, params=query, content=content, headers=self._traced(headers or {}), timeout=timeout
                )
            except httpx.TransportError as error:
                if attempt + 1 == ATTEMPTS_MAX:
                    raise self._unreachable(error) from error
            else:
                if not response.is_error:
                    return response
                if response.status_code not in RETRIED or attempt + 1 == ATTEMPTS_MAX:
                    raise error_of(response)
            time.sleep(BACKOFF.delay_s(attempt, random.random()))  # noqa: S311 - it spreads retries, it guards nothing
        raise AssertionError("the last attempt returns or raises")

    def _traced(self, headers: Mapping[str, str]) -> dict[str, str]:
        """W3C Trace Context: one trace per client, so that a command and what it causes are found together."""
        return {**headers, "traceparent": f"00-{self.trace_id}-{secrets.token_hex(8)}-01"}

    def _unreachable(self, error: httpx.TransportError) -> Unavailable:
        reason = str(error) or type(error).__name__
        fix = "is the controller running, and is the URL right? (--url, FERRY_URL, ferry context)"
        return Unavailable(f"no answer from {self.url}: {reason}", fix=fix)


def build_of(model: Path, field: str) -> list[Path]:
    """The ONNX file `model` and the files beside it that it keeps weights in, the model first.

    `InvalidInput` when it is no ONNX file, or names a file that is not there.
    """
    try:
        with FileSource(model) as source:
            names = data_files(read_signature(source).external)
    except errors.InvalidInput as error:
        raise errors.InvalidInput(error.message, field=f"{field}.{model.name}", fix=error.fix) from error
    except OSError as error:
        raise _unreadable(model, error) from error
    for name in names:
        if not (model.parent / name).is_file():
            fix = f"copy {name} into {model.parent}, or save the model again with all its weights"
            raise errors.InvalidInput(f"the weights in {name!r} are not beside the model", field=field, fix=fix)
    return [model, *(model.parent / name for name in names)]


def reference_of(file: Path) -> ArtifactRef:
    """The name of the bytes in `file`, read in pieces; `InvalidInput` when it cannot be read."""
    hasher = Hasher()
    try:
        with file.open("rb") as source:
            while chunk := source.read(UPLOAD_BYTES):
                hasher.update(chunk)
    except OSError as error:
        raise _unreadable(file, error) from error
    return ArtifactRef(hasher.digest(), hasher.size)


def _unreadable(file: Path, error: OSError) -> FerryError:
    return errors.InvalidInput(f"cannot read {file}: {error.strerror or type(error).__name__}", field="file")


def error_of(response: httpx.Response) -> FerryError:
    """The error that a response stands for: the class by its problem code, else by its status."""
    by_status = ERROR_OF_STATUS.get(response.status_code, FerryError)
    try:
        problem = msgspec.json.decode(response.content, type=Problem)
    except msgspec.DecodeError:
        return by_status(f"the server answered {response.status_code} {response.reason_phrase}")
    kind = ERROR_OF_CODE.get(problem.code, by_status)
    trace = f" [trace {problem.trace_id}]" if kind is FerryError and problem.trace_id else ""
    return kind(f"{problem.detail}{trace}", field=problem.field, fix=problem.fix)


def _signals_in(lines: Iterator[str]) -> Iterator[Event | None]:
    """Events out of an SSE stream (WHATWG HTML, section 9.2.6): each of ours is a single `data:` line."""
    for line in lines:
        if line.startswith("data:"):
            yield msgspec.json.decode(line.removeprefix("data:").strip(), type=Event)
        elif line.startswith((":", "retry:")):
            yield None


def _read_in_chunks(source: IO[bytes], size: int, on_progress: Progress | None) -> Iterator[bytes]:
    sent = 0
    while chunk := source.read(UPLOAD_BYTES):
        yield chunk
        sent += len(chunk)
        if on_progress:
            on_progress(sent, size)


def _part_of(on_progress: Progress | None, before: int, total: int) -> Progress | None:
    if on_progress is None:
        return None
    report = on_progress
    return lambda done, _: report(before + done, total)


def _json(request: msgspec.Struct) -> Body:
    data = msgspec.json.encode(request)
    return lambda: data


def _fresh_key() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


def _segment(name: str) -> str:
    """A name from a person as one path segment, so that a slash in it cannot lead elsewhere."""
    return quote(name, safe="")


__all__ = ["FerryClient", "Progress", "build_of", "error_of", "reference_of"]
