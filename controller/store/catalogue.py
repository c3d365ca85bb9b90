"""Tables about what can be installed: releases, the artifacts they are made of, patches between them, their parts."""

from typing import Any

import msgspec
import sqlalchemy as sa

from common.artifact.manifest import ArtifactRef
from common.errors import Conflict
from common.ids import Digest, ModelName, ReleaseRef
from controller.store import schema
from controller.store.dialect import Row, insert_absent, insert_new, upsert
from controller.store.port import FileParts, Patch, Release


class SqlReleases:
    """`port.Releases`; `release_files` is the index from an artifact to the releases that hold it."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def get(self, ref: ReleaseRef) -> Release | None:
        table = schema.releases
        this_one = (table.c.model == ref.model) & (table.c.version == ref.version)
        return self._connection.scalar(sa.select(table.c.document).where(this_one))

    def add(self, release: Release) -> None:
        name: Row = {"model": release.ref.model, "version": release.ref.version}
        row = {**name, "envelope": release.envelope.digest, "document": release}
        if not insert_new(self._connection, schema.releases, row):
            fix = "publish the new bytes under a new version"
            raise Conflict(f"{release.ref} is published already", field="version", fix=fix)
        files = [
            {**name, "variant": variant, "file": file, "digest": artifact.digest}
            for variant, build in release.manifest.variants.items()
            for file, artifact in build.files.items()
        ]
        insert_absent(self._connection, schema.release_files, files)

    def page(self, after: tuple[str, str] | None, limit: int, model: ModelName | None = None) -> list[Release]:
        columns = schema.releases.c
        query = sa.select(columns.document).order_by(columns.model, columns.version).limit(limit)
        if after is not None:
            query = query.where(sa.tuple_(columns.model, columns.version) > sa.tuple_(*after))
        if model is not None:
            query = query.where(columns.model == model)
        return list(self._connection.scalars(query))

    def by_artifact(self, artifact: Digest) -> list[Release]:
        table, files = schema.releases, schema.release_files
        holds = sa.exists().where(
            files.c.model == table.c.model, files.c.version == table.c.version, files.c.digest == artifact
        )
        query = sa.select(table.c.document).where(holds).order_by(table.c.model, table.c.version)
        return list(self._connection.scalars(query))


class SqlArtifacts:
    """`port.Artifacts`."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def get(self, digest: Digest) -> ArtifactRef | None:
        table = schema.artifacts
        size = self._connection.scalar(sa.select(table.c.size).where(table.c.digest == digest))
        return None if size is None else ArtifactRef(digest, size)

    def put(self, artifact: ArtifactRef, at: float) -> None:
        upsert(
            self._connection,
            schema.artifacts,
            [{"digest": artifact.digest, "size": artifact.size, "arrived_at": at}],
        )

    def unused(self, before: float) -> list[ArtifactRef]:
        table, patches, parts, files = schema.artifacts, schema.patches, schema.parts, schema.release_files
        is_file = sa.exists().where(files.c.digest == table.c.digest)
        is_envelope = sa.exists().where(schema.releases.c.envelope == table.c.digest)
        is_patch = sa.exists().where(
            patches.c.patch == table.c.digest, patches.c.state == "ready", files.c.digest == patches.c.target
        )
        is_index = sa.exists().where(parts.c.digest == table.c.digest, files.c.digest == parts.c.file)
        query = (
            sa.select(table.c.digest, table.c.size)
            .where(table.c.arrived_at < before, ~is_file, ~is_envelope, ~is_patch, ~is_index)
            .order_by(table.c.digest)
        )
        return [ArtifactRef(digest, size) for digest, size in self._connection.execute(query)]

    def remove(self, digest: Digest) -> None:
        """Also forgets the patches and the lists of parts whose bytes these were, so that nobody offers them."""
        self._connection.execute(schema.artifacts.delete().where(schema.artifacts.c.digest == digest))
        self._connection.execute(schema.patches.delete().where(schema.patches.c.patch == digest))
        self._connection.execute(schema.parts.delete().where(schema.parts.c.digest == digest))


class SqlParts:
    """`port.PartsIndexes`."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def get(self, file: Digest) -> FileParts | None:
        table = schema.parts
        row = self._connection.execute(
            sa.select(table.c.digest, table.c.data).where(table.c.file == file)
        ).one_or_none()
        return None if row is None else FileParts(file=file, index=ArtifactRef(row[0], len(row[1])), data=row[1])

    def put(self, parts: FileParts) -> None:
        row: Row = {"file": parts.file, "digest": parts.index.digest, "data": parts.data}
        upsert(self._connection, schema.parts, [row])


class SqlPatches:
    """`port.Patches`."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def get(self, base: Digest, target: Digest, codec: str) -> Patch | None:
        columns = schema.patches.c
        rows = self._find(columns.base == base, columns.target == target, columns.codec == codec, limit=1)
        return rows[0] if rows else None

    def put(self, patch: Patch) -> None:
        row = msgspec.structs.asdict(patch)
        needed = row.pop("needs_bytes")
        row["size"] = patch.patch.size if patch.patch else needed or None
        row["patch"] = patch.patch.digest if patch.patch else None
        upsert(self._connection, schema.patches, [row])

    def pending(self, limit: int) -> list[Patch]:
        return self._find(schema.patches.c.state == "pending", limit=limit)

    def skipped(self, limit: int) -> list[Patch]:
        return self._find(schema.patches.c.state == "skipped", limit=limit, newest_first=True)

    def ready(self) -> list[Patch]:
        return self._find(schema.patches.c.state == "ready")

    def ready_bytes(self) -> int:
        columns = schema.patches.c
        query = sa.select(sa.func.coalesce(sa.func.sum(columns.size), 0)).where(columns.state == "ready")
        return int(self._connection.scalar(query) or 0)

    def for_target(self, target: Digest) -> list[Patch]:
        return self._find(schema.patches.c.target == target)

    def _find(
        self, *conditions: sa.ColumnElement[bool], limit: int | None = None, newest_first: bool = False
    ) -> list[Patch]:
        columns = schema.patches.c
        at = columns.created_at.desc() if newest_first else columns.created_at
        order = (at, columns.base, columns.target, columns.codec)
        query = sa.select(schema.patches).where(*conditions).order_by(*order).limit(limit)
        return [_patch(row._asdict()) for row in self._connection.execute(query)]


def _patch(row: dict[str, Any]) -> Patch:
    digest, size = row.pop("patch"), row.pop("size")
    if digest is None:
        return Patch(**row, needs_bytes=size or 0)
    return Patch(**row, patch=ArtifactRef(digest, size))
