"""Tables about what people do: rollouts, credentials, and the journal of events, audit entries and answers given."""

from collections.abc import Sequence

import msgspec
import sqlalchemy as sa

from controller.rollouts.model import TERMINAL_ROLLOUT_STATES, Execution, Rollout
from controller.store import schema
from controller.store.dialect import Row, upsert
from controller.store.port import AuditEntry, Event, StoredResponse, Token


class SqlRollouts:
    """`port.Rollouts`."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def get(self, rollout: str) -> Rollout | None:
        table = schema.rollouts
        return self._connection.scalar(sa.select(table.c.document).where(table.c.id == rollout))

    def put(self, rollout: Rollout) -> None:
        active = rollout.state not in TERMINAL_ROLLOUT_STATES
        upsert(self._connection, schema.rollouts, [{"id": rollout.id, "active": active, "document": rollout}])

    def page(self, before: str, limit: int) -> list[Rollout]:
        table = schema.rollouts
        query = sa.select(table.c.document).order_by(table.c.id.desc()).limit(limit)
        return list(self._connection.scalars(query.where(table.c.id < before) if before else query))

    def active(self) -> list[Rollout]:
        table = schema.rollouts
        query = sa.select(table.c.document).where(table.c.active).order_by(table.c.id)
        return list(self._connection.scalars(query))

    def executions(self, rollout: str) -> list[Execution]:
        table = schema.executions
        query = sa.select(table.c.document).where(table.c.rollout == rollout).order_by(table.c.device)
        return list(self._connection.scalars(query))

    def put_executions(self, rollout: str, executions: Sequence[Execution]) -> None:
        rows = [{"rollout": rollout, "device": entry.device, "document": entry} for entry in executions]
        upsert(self._connection, schema.executions, rows)


class SqlTokens:
    """`port.Tokens`."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def find(self, sha256: str) -> Token | None:
        table = schema.tokens
        return self._connection.scalar(sa.select(table.c.document).where(table.c.sha256 == sha256))

    def get(self, token: str) -> Token | None:
        table = schema.tokens
        return self._connection.scalar(sa.select(table.c.document).where(table.c.id == token))

    def put(self, token: Token) -> None:
        upsert(self._connection, schema.tokens, [{"id": token.id, "sha256": token.sha256, "document": token}])

    def page(self, after: str, limit: int) -> list[Token]:
        table = schema.tokens
        query = sa.select(table.c.document).where(table.c.id > after).order_by(table.c.id).limit(limit)
        return list(self._connection.scalars(query))

    def remove(self, token: str) -> None:
        self._connection.execute(schema.tokens.delete().where(schema.tokens.c.id == token))


class SqlJournal:
    """`port.Journal`. Numbers grow in the order of commits, because there is one writer."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def append_event(self, event: Event) -> int:
        return self._append(schema.events, event)

    def events_after(self, seq: int, limit: int) -> list[Event]:
        table = schema.events
        query = sa.select(table).where(table.c.seq > seq).order_by(table.c.seq).limit(limit)
        return [Event(**row._asdict()) for row in self._connection.execute(query)]

    def append_audit(self, entry: AuditEntry) -> int:
        return self._append(schema.audit, entry)

    def audit_before(self, seq: int | None, limit: int) -> list[AuditEntry]:
        table = schema.audit
        query = sa.select(table).order_by(table.c.seq.desc()).limit(limit)
        rows = self._connection.execute(query if seq is None else query.where(table.c.seq < seq))
        return [AuditEntry(**row._asdict()) for row in rows]

    def response(self, actor: str, key: str) -> StoredResponse | None:
        table = schema.responses
        query = sa.select(table).where(table.c.actor == actor, table.c.key == key)
        row = self._connection.execute(query).first()
        return None if row is None else StoredResponse(**row._asdict())

    def put_response(self, response: StoredResponse) -> None:
        upsert(self._connection, schema.responses, [msgspec.structs.asdict(response)])

    def forget(self, before: float) -> int:
        tables = (schema.events, schema.responses)
        return sum(self._connection.execute(table.delete().where(table.c.at < before)).rowcount for table in tables)

    def _append(self, table: sa.Table, entry: Event | AuditEntry) -> int:
        row: Row = {name: value for name, value in msgspec.structs.asdict(entry).items() if name != "seq"}
        (seq,) = self._connection.execute(table.insert().returning(table.c.seq), row).one()
        return int(seq)
