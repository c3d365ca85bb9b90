"""Releases: bytes that were uploaded get a name, and what has none is taken away.

A release is immutable: publishing the same files under the same name again changes nothing, other files are refused.
The manifest says which bytes make up each variant and which tensors go in and out (read from the ONNX file itself); it
is signed, and its envelope is a blob like any other. So are the lists of the files' parts, which are made here too. A
variant may carry a self-test, whose samples are one file more, steps around its model, libraries with operators, and
terms of how it is served. Publishing also asks for patches from what devices run now.
"""

import asyncio
import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
from opentelemetry import trace

from common.artifact.manifest import (
    FILE_NAME,
    FILES_PER_VARIANT_MAX,
    MANIFEST_BYTES_MAX,
    MEASURED_VARIANT,
    PAYLOAD_TYPE,
    VARIANTS_MAX,
    ArtifactRef,
    ReleaseManifest,
    Variant,
    encode_manifest,
)
from common.artifact.selftest import SAMPLES_FILE, Rule
from common.artifact.serving import ServingTerms
from common.clock import Clock
from common.delta import CODECS
from common.errors import Conflict, InvalidInput, NotFound, TooLarge
from common.ids import Digest, ModelName, ReleaseRef, Version, parse_digest, parse_model_name, parse_version
from common.monitoring.reference import REFERENCE_FILE
from common.trust import Signer
from controller.devices import Device, running_version
from controller.registry import patches
from controller.registry.additions import CustomOps, Pipelines, with_custom_ops, with_pipeline
from controller.registry.blobs import LocalBlobs
from controller.registry.inspection import Build, inspect_build, parts_of
from controller.registry.references import References, with_reference
from controller.registry.selftests import SelfTests, with_self_test
from controller.registry.serving import Serving, Terms, asked_terms, with_terms
from controller.resources import GivenPipeline
from controller.rollouts.patching import Lineage, PatchKey, bases_of, wanted_patches
from controller.store.port import AuditEntry, Event, FileParts, Release, Store, Transaction

VARIANT_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
PATCHES_PER_RELEASE_MAX = 32
"""How many patches publishing asks for: those that serve most devices."""
COLLECT_MIN_AGE_S = 24 * 3600.0
"""By default a blob that nobody refers to is left alone this long: its publisher may be about to."""
ORPHANS_PER_READ = 200

Files = Mapping[str, Mapping[str, Digest]]
"""Variant name to file name to digest."""

tracer = trace.get_tracer(__name__)


class Collected(msgspec.Struct, frozen=True):
    """What garbage collection took away."""

    count: int
    bytes: int


class Releases:
    """The releases in `store`, over the bytes in `blobs`, signed by `signer`."""

    def __init__(self, store: Store, blobs: LocalBlobs, signer: Signer, clock: Clock) -> None:
        self._store = store
        self._blobs = blobs
        self._signer = signer
        self._clock = clock

    async def publish(
        self,
        model: ModelName,
        version: Version,
        variants: Files,
        actor: str,
        self_tests: SelfTests | None = None,
        *,
        pipelines: Pipelines | None = None,
        custom_ops: CustomOps | None = None,
        serving: Serving | None = None,
        references: References | None = None,
    ) -> tuple[Release, bool]:
        """Make the release `model@version` of blobs that were uploaded before; whether it is new.

        Raises `InvalidInput` (not an ONNX model, bad names, files that do not belong together, samples or terms of
        serving that do not fit), `NotFound` (a blob that is not here), `Conflict` (the release exists with other
        bytes), `StorageFull`.
        """
        added = _Additions(
            self_tests or {}, pipelines or {}, custom_ops or {}, asked_terms(serving or {}), references or {}
        )
        ref = ReleaseRef(parse_model_name(model), parse_version(version))
        with tracer.start_as_current_span("release.publish", attributes={"ferry.release": str(ref)}):
            _check_names(variants, added)
            existing = await self._store.read(lambda tx: tx.releases.get(ref))
            if existing is not None:
                return _same(existing, _asked(variants, added)), False
            try:
                builds = await asyncio.to_thread(self._inspect_all, variants)
                complete = await asyncio.to_thread(self._complete, builds, added)
                lists = await self._lists_of_parts(builds.values())
            except FileNotFoundError as error:  # garbage collection came between finding a blob and reading it
                fix = "upload the files again"
                raise NotFound("a blob was removed meanwhile", field="variants", fix=fix) from error
            manifest = ReleaseManifest(ref.model, ref.version, with_terms(complete, added.serving, ref.model))
            return await self._commit(manifest, lists, actor)

    async def collect_garbage(self, actor: str, min_age_s: float = COLLECT_MIN_AGE_S) -> Collected:
        """Remove blobs that arrived more than `min_age_s` ago and that no release and no patch of one needs.

        The rows go first: a crash in between leaves files without rows, which the next collection finds.
        """
        if min_age_s < 0:
            raise InvalidInput(f"{min_age_s} is negative", field="min_age_s", fix="give an age in seconds, from 0 on")
        before = self._clock.now() - min_age_s
        async with self._blobs.changing:
            unused = await self._store.write(lambda tx: _forget_unused(tx, before))
            orphans = await self._orphans(before, {artifact.digest for artifact in unused})
            removed = [*unused, *orphans]
            for artifact in removed:
                await asyncio.to_thread(self._blobs.remove, artifact.digest)
        collected = Collected(len(removed), sum(artifact.size for artifact in removed))
        if removed:
            now = self._clock.now()
            await self._store.write(lambda tx: _record_collection(tx, collected, actor, now))
        return collected

    async def _commit(
        self, manifest: ReleaseManifest, lists: Mapping[Digest, bytes], actor: str
    ) -> tuple[Release, bool]:
        payload = encode_manifest(manifest)
        if len(payload) > MANIFEST_BYTES_MAX:
            fix = f"at most {MANIFEST_BYTES_MAX} bytes; publish fewer variants"
            raise TooLarge(f"the manifest takes {len(payload)} bytes", field="variants", fix=fix)
        envelope = self._signer.sign(PAYLOAD_TYPE, payload)
        wanted = await self._store.read(lambda tx: _patches_wanted(tx, manifest))
        async with self._blobs.changing:
            for name, variant in manifest.variants.items():
                for file, reference in variant.files.items():
                    self._path(reference.digest, f"variants.{name}.{file}")
            parts = [
                FileParts(file=file, index=await asyncio.to_thread(self._blobs.put_bytes, data), data=data)
                for file, data in lists.items()
            ]
            release = Release(
                ref=manifest.release,
                manifest=manifest,
                envelope=await asyncio.to_thread(self._blobs.put_bytes, envelope),
                published_at=self._clock.now(),
                published_by=actor,
            )
            references = await asyncio.to_thread(self._references_of, manifest)
            return await self._store.write(lambda tx: _record_release(tx, release, parts, references, wanted))

    def _references_of(self, manifest: ReleaseManifest) -> dict[Digest, bytes]:
        digests = [one.files[one.reference].digest for one in manifest.variants.values() if one.reference]
        return {digest: self._path(digest, "references").read_bytes() for digest in digests}

    def _inspect_all(self, variants: Files) -> dict[str, Build]:
        return {name: inspect_build(name, files, self._path) for name, files in variants.items()}

    def _complete(self, builds: Mapping[str, Build], added: "_Additions") -> dict[str, Variant]:
        """The variants with libraries and steps, and with self-tests and references, which go through the steps."""
        variants = {name: build.variant for name, build in builds.items()}
        for name, libraries in added.custom_ops.items():
            variants[name] = with_custom_ops(variants[name], libraries, self._path, f"custom_ops.{name}")
        for name, pipeline in added.pipelines.items():
            variants[name] = with_pipeline(variants[name], pipeline, f"pipelines.{name}")
        for name, given in added.self_tests.items():
            field = f"self_tests.{name}"
            variants[name] = with_self_test(variants[name], given, self._path(given.samples, f"{field}.samples"), field)
        for name, digest in added.references.items():
            field = f"references.{name}"
            variants[name] = with_reference(variants[name], digest, self._path(digest, field), field)
        return variants

    async def _lists_of_parts(self, builds: Iterable[Build]) -> dict[Digest, bytes]:
        """The encoded lists of the files that have none yet."""
        tensors = {file: places for build in builds for file, places in build.tensors.items()}
        known = await self._store.read(lambda tx: {file for file in tensors if tx.parts.get(file) is not None})
        lists = {
            file: await asyncio.to_thread(parts_of, self._path(file, "variants"), places)
            for file, places in tensors.items()
            if file not in known
        }
        return {file: data for file, data in lists.items() if data is not None}

    def _path(self, digest: Digest, field: str) -> Path:
        path = self._blobs.path(digest)
        if path is None:
            fix = f"upload the file first: PUT /v1/blobs/{digest}"
            raise NotFound(f"there is no blob {digest}", field=field, fix=fix)
        return path

    async def _orphans(self, before: float, known: set[Digest]) -> list[ArtifactRef]:
        """Old files without a row: what a crash between writing bytes and committing their row left."""
        old = await asyncio.to_thread(lambda: [blob.artifact for blob in self._blobs.all() if blob.arrived_at < before])
        candidates = [artifact for artifact in old if artifact.digest not in known]
        orphans: list[ArtifactRef] = []
        for start in range(0, len(candidates), ORPHANS_PER_READ):
            some = candidates[start : start + ORPHANS_PER_READ]
            orphans += await self._store.read(functools.partial(_without_row, artifacts=some))
        return orphans


def _without_row(tx: Transaction, artifacts: list[ArtifactRef]) -> list[ArtifactRef]:
    return [artifact for artifact in artifacts if tx.artifacts.get(artifact.digest) is None]


class _Additions(NamedTuple):
    """What variants have besides model and weights."""

    self_tests: SelfTests
    pipelines: Pipelines
    custom_ops: CustomOps
    serving: Terms
    references: References


def _check_names(variants: Files, added: _Additions) -> None:
    if not 1 <= len(variants) <= VARIANTS_MAX:
        raise InvalidInput(f"{len(variants)} variants", field="variants", fix=f"give 1 to {VARIANTS_MAX}")
    for variant, files in variants.items():
        if not VARIANT_NAME.fullmatch(variant):
            fix = "use lower-case letters, digits and inner '.', '_' or '-', for example 'default' or 'int8'"
            raise InvalidInput(f"{variant[:80]!r} is not allowed", field="variants", fix=fix)
        if variant == MEASURED_VARIANT:
            taken = f"{variant!r} is what a device says that leaves its variant to measurement"
            raise InvalidInput(taken, field="variants", fix="choose another name")
        others = len(added.custom_ops.get(variant, ()))
        others += (variant in added.self_tests) + (variant in added.references)
        if not 1 <= len(files) <= FILES_PER_VARIANT_MAX - others:
            fix = f"model, its data files, samples, reference and libraries are at most {FILES_PER_VARIANT_MAX}"
            raise InvalidInput(f"{len(files)} files", field=f"variants.{variant}", fix=fix)
        _check_files(files, f"variants.{variant}")
    for what, given in added._asdict().items():
        for variant in given:
            if variant not in variants:
                fix = f"the variants are {', '.join(sorted(variants))}"
                raise InvalidInput("there is no such variant", field=f"{what}.{variant[:80]}", fix=fix)
    for variant, test in added.self_tests.items():
        parse_digest(test.samples, f"self_tests.{variant}.samples")
    for variant, digest in added.references.items():
        parse_digest(digest, f"references.{variant}")
    for variant, libraries in added.custom_ops.items():
        _check_files(libraries, f"custom_ops.{variant}")


def _check_files(files: Mapping[str, Digest], field: str) -> None:
    for file, digest in files.items():
        if not re.fullmatch(FILE_NAME, file):
            fix = "use letters, digits and inner '.', '_' or '-', at most 128 characters"
            raise InvalidInput(f"{file[:80]!r} is not allowed", field=field, fix=fix)
        parse_digest(digest, f"{field}.{file}")


class _Ingredients(NamedTuple):
    """What tells two variants apart that are published under one name."""

    files: Mapping[str, Digest]
    rules: Mapping[str, Rule] | None
    latency_max_s: float | None
    pipeline: GivenPipeline | None
    custom_ops: frozenset[str]
    serving: ServingTerms | None


def _asked(variants: Files, added: _Additions) -> dict[str, _Ingredients]:
    asked = {}
    for name, files in variants.items():
        test, libraries = added.self_tests.get(name), added.custom_ops.get(name, {})
        samples = {SAMPLES_FILE: test.samples} if test else {}
        reference = {REFERENCE_FILE: added.references[name]} if name in added.references else {}
        asked[name] = _Ingredients(
            {**files, **libraries, **samples, **reference},
            test.rules if test else None,
            test.latency_max_s if test else None,
            added.pipelines.get(name),
            frozenset(libraries),
            added.serving.get(name),
        )
    return asked


def _made_of(manifest: ReleaseManifest) -> dict[str, _Ingredients]:
    return {
        name: _Ingredients(
            {file: artifact.digest for file, artifact in build.files.items()},
            build.self_test.rules if build.self_test else None,
            build.self_test.latency_max_s if build.self_test else None,
            _given(build),
            frozenset(build.custom_ops),
            build.serving,
        )
        for name, build in manifest.variants.items()
    }


def _given(build: Variant) -> GivenPipeline | None:
    """The pipeline as its publisher gave it."""
    pipeline = build.pipeline
    if pipeline is None:
        return None
    return GivenPipeline(inputs=build.inputs, outputs=build.outputs, before=pipeline.before, after=pipeline.after)


def _same(existing: Release, asked: Mapping[str, _Ingredients]) -> Release:
    """The release, if it was made of these; otherwise `Conflict`."""
    if _made_of(existing.manifest) != asked:
        fix = "releases never change; publish the new files under a new version"
        message = f"{existing.ref} exists with other files, steps, self-test, reference or terms of serving"
        raise Conflict(message, field="version", fix=fix)
    return existing


def _record_release(
    tx: Transaction,
    release: Release,
    parts: list[FileParts],
    references: Mapping[Digest, bytes],
    wanted: list[PatchKey],
) -> tuple[Release, bool]:
    variants = release.manifest.variants
    existing = tx.releases.get(release.ref)
    if existing is not None:  # somebody else published it while we read the files
        return _same(existing, _made_of(release.manifest)), False
    now = release.published_at
    files_of_all = [file for build in variants.values() for file in build.files.values()]
    for artifact in (release.envelope, *files_of_all, *(one.index for one in parts)):
        tx.artifacts.put(artifact, now)
    for one in parts:
        tx.parts.put(one)
    for digest, data in references.items():
        tx.telemetry.put_reference(digest, data)
    tx.releases.add(release)
    for key in wanted:
        patches.request(tx, key.base, key.target, key.codec, now)
    _tell(tx, release)
    return release, True


def _tell(tx: Transaction, release: Release) -> None:
    subject, now = str(release.ref), release.published_at
    detail: dict[str, object] = {
        name: {file: ref.digest for file, ref in build.files.items()}
        for name, build in release.manifest.variants.items()
    }
    tx.journal.append_event(Event(kind="release.published", subject=subject, at=now, data={"variants": detail}))
    tx.journal.append_audit(
        AuditEntry(at=now, actor=release.published_by, action="release.publish", subject=subject, detail=detail)
    )


def _patches_wanted(tx: Transaction, manifest: ReleaseManifest) -> list[PatchKey]:
    """From what each device runs now to the variant it would get, the most useful patches first."""
    running: dict[Version, list[Device]] = {}
    for device in tx.devices.all():
        if (version := running_version(device, manifest.model)) is not None:
            running.setdefault(version, []).append(device)
    counts: Counter[PatchKey] = Counter()
    for version, devices in running.items():
        release = tx.releases.get(ReleaseRef(manifest.model, version))
        builds: Iterable[Variant] = release.manifest.variants.values() if release else ()
        lineage = Lineage(bases=bases_of(manifest, builds), codecs=CODECS)
        counts.update(key for device in devices for key in wanted_patches(device, manifest, lineage))
    return [wanted for wanted, _ in counts.most_common(PATCHES_PER_RELEASE_MAX)]


def _forget_unused(tx: Transaction, before: float) -> list[ArtifactRef]:
    unused = tx.artifacts.unused(before)
    for artifact in unused:
        tx.artifacts.remove(artifact.digest)
    return unused


def _record_collection(tx: Transaction, collected: Collected, actor: str, at: float) -> None:
    detail: dict[str, object] = {"count": collected.count, "bytes": collected.bytes}
    tx.journal.append_event(Event(kind="garbage.collected", subject="blobs", at=at, data=detail))
    tx.journal.append_audit(AuditEntry(at=at, actor=actor, action="garbage.collect", subject="blobs", detail=detail))
