"""Joining a fleet: a claim token against an identity, once, even when the power goes in the middle.

The request is written to `join.pending.json` (private, it holds the claim token) before it is sent, with its
Idempotency-Key; a join that is repeated after a crash sends the very same request again and gets the very same answer,
so that a token good for one device is not used up by half a join. The file goes away when the identity is on the disk.
"""

import asyncio
import secrets
import uuid
from http import HTTPStatus
from pathlib import Path

import aiohttp
import msgspec

from common.durable import PRIVATE_MODE, fsync_folder, remove, write_file
from common.errors import Conflict, IntegrityFailure
from common.ids import DeviceId, check_labels, parse_device_id
from common.trust import PublicKey
from common.wire import Capabilities, JoinString
from common.wire.messages import Seconds
from edge_agent.fetch import open_session
from edge_agent.fetch.problems import problem_error
from edge_agent.fetch.twin import unreachable
from edge_agent.identity import BrokerAccess, Identity, identity_path, save_identity

PENDING_FILE = "join.pending.json"
JOIN_TIMEOUT_S = 30.0
ANSWER_BYTES_MAX = 64 * 1024
CLIENT_ID_RANDOM_BYTES = 8
MEMORIES = ("journal.db*", "telemetry.db*")


class JoinRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of `POST /v1/join`."""

    name: str | None = None
    labels: dict[str, str] = {}
    capabilities: Capabilities


class PendingJoin(msgspec.Struct, frozen=True, kw_only=True):
    """A join that may or may not have reached the controller."""

    join: JoinString
    name: str | None
    labels: dict[str, str]
    idempotency_key: str
    body: str


class JoinAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller gives a device that it lets in."""

    device: DeviceId
    device_token: str
    broker: BrokerAccess
    signing_keys: tuple[PublicKey, ...]
    heartbeat_s: Seconds
    poll_s: Seconds


async def join(
    join_string: str,
    data: Path,
    *,
    capabilities: Capabilities,
    name: str | None = None,
    labels: dict[str, str] | None = None,
    force: bool = False,
    ca_file: Path | None = None,
) -> Identity:
    """Make this device a member of the fleet that `join_string` leads to, and keep the identity in the folder `data`.

    Raises `Conflict` when `data` holds an identity already (unless `force`) or the name is taken, `InvalidInput`,
    `Unauthenticated` when the token is used up or expired, `Unavailable` when the controller does not answer; then
    nothing has changed and the same command may be given again.
    """
    where = JoinString.parse(join_string.strip())
    if name is not None:
        parse_device_id(name, "name")
    if identity_path(data).exists() and not force:
        fix = "add --force to leave that fleet, or use another --data folder"
        raise Conflict(f"{data} holds the identity of a device that has joined already", fix=fix)
    request = JoinRequest(name=name, labels=check_labels(labels or {}), capabilities=capabilities)
    pending = await asyncio.to_thread(_pend, data, where, request)
    identity = _identity(where, await _ask(pending, ca_file))
    await asyncio.to_thread(_keep, data, identity)
    return identity


def _pend(data: Path, where: JoinString, request: JoinRequest) -> PendingJoin:
    """The join to send, on the disk: the one that was left unfinished, if it is the same."""
    path = data / PENDING_FILE
    try:
        left = msgspec.json.decode(path.read_bytes(), type=PendingJoin)
        if (left.join, left.name, left.labels) == (where, request.name, request.labels):
            return left
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        pass  # nothing of ours that could be gone on with
    pending = PendingJoin(
        join=where,
        name=request.name,
        labels=request.labels,
        idempotency_key=str(uuid.uuid4()),
        body=msgspec.json.encode(request).decode(),
    )
    write_file(path, msgspec.json.encode(pending), PRIVATE_MODE)
    return pending


async def _ask(pending: PendingJoin, ca_file: Path | None) -> JoinAnswer:
    headers = {"Content-Type": "application/json", "Idempotency-Key": pending.idempotency_key}
    url = f"{pending.join.url.rstrip('/')}/v1/join"
    try:
        async with (
            asyncio.timeout(JOIN_TIMEOUT_S),
            open_session(pending.join.token, ca_file) as session,
            (await session.client()).post(
                url, data=pending.body.encode(), headers=headers, allow_redirects=False
            ) as response,
        ):
            body = await response.content.read(ANSWER_BYTES_MAX)
            status = response.status
    except (aiohttp.ClientError, OSError) as error:
        raise unreachable(error) from error
    if status not in {HTTPStatus.CREATED, HTTPStatus.OK}:
        raise problem_error(status, body, "the join")
    try:
        return msgspec.json.decode(body, type=JoinAnswer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        fix = "check that the address is a controller's and that both sides are up to date"
        raise IntegrityFailure(f"{url} did not answer as a controller does: {error}", fix=fix) from error


def _identity(where: JoinString, answer: JoinAnswer) -> Identity:
    return Identity(
        device=parse_device_id(answer.device),
        device_token=answer.device_token,
        controller_url=where.url.rstrip("/"),
        broker=answer.broker,
        client_id=f"{answer.device}-{secrets.token_hex(CLIENT_ID_RANDOM_BYTES)}",
        signing_keys=answer.signing_keys,
        heartbeat_s=answer.heartbeat_s,
        poll_s=answer.poll_s,
    )


def _keep(data: Path, identity: Identity) -> None:
    """Begin a new life: what an earlier device remembered here (its highest generation, its telemetry) is not ours."""
    for pattern in MEMORIES:
        for file in data.glob(pattern):
            remove(file)
    save_identity(data, identity)
    remove(data / PENDING_FILE)
    fsync_folder(data)
