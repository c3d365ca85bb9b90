"""How a device gets into the fleet: an operator makes a claim, a machine trades it for an identity.

The claim token in the join string is worth some number of devices for some time. What the device gets back (its own
token, its broker password) is shown once; with an Idempotency-Key the same answer can be had again, because the line
may break just then. The order of things: identity and first order are committed, then the broker is told. A crash in
between is mended by the device's own repeat.
"""

import secrets

import msgspec
from msgspec.structs import replace

from common.errors import Conflict, NotFound, Unauthenticated
from common.ids import DeviceId, check_labels, parse_device_id
from common.wire import JoinString
from controller.api.auth import new_token
from controller.api.idempotency import Replayed
from controller.api.pages import page_of
from controller.api.route import Answer, Call, route
from controller.api.views import join_token_view
from controller.devices import Device
from controller.orders import first_order
from controller.resources import (
    BrokerAccess,
    CreateJoinToken,
    Join,
    Joined,
    JoinTokenCreated,
    JoinTokenView,
    Page,
    PageQuery,
)
from controller.store.port import Token, Transaction

PASSWORD_BYTES = 24
RANDOM_NAME_BYTES = 5


@route("POST", "/v1/join", summary="Trade a claim token for a device identity", roles=("join",), statuses=(201,))
async def join(call: Call, body: Join) -> Answer[Joined]:
    """The new device's credentials. A taken name is 409, a used-up claim 401."""
    name = parse_device_id(body.name, "name") if body.name else DeviceId(f"d-{secrets.token_hex(RANDOM_NAME_BYTES)}")
    labels = check_labels({**body.labels, **call.token.labels})
    password = secrets.token_urlsafe(PASSWORD_BYTES)
    claim = call.token.id

    def work(tx: Transaction) -> Answer[Joined]:
        _use(tx, claim)
        if tx.devices.get(name) is not None:
            raise Conflict(f"the name {name} is taken", field="name", fix="choose another name")
        device = Device(id=name, created_at=call.now, labels=labels, capabilities=body.capabilities)
        first_order(tx, device, call.deps.signer, call.now)
        text, token = new_token("device", name, call.now)
        tx.tokens.put(token)
        call.record(tx, "device.join", name, claim=claim, labels=labels)
        call.announce(tx, "device.joined", name, labels=labels)
        return Answer(value=_joined(call, name, text, password))

    try:
        answer = await call.write(work)
    except Replayed as replay:
        joined = msgspec.json.decode(replay.body, type=Joined)
        await call.deps.admit(joined.device, joined.broker.password)
        raise
    await call.deps.admit(name, password)
    call.deps.reconciler.nudge()
    return answer


@route("POST", "/v1/join-tokens", summary="Make a claim that lets devices in", statuses=(201,))
async def create(call: Call, body: CreateJoinToken) -> Answer[JoinTokenCreated]:
    """The join string is in this answer and nowhere else."""
    labels = check_labels(body.labels)
    text, token = new_token("join", call.who, call.now, ttl_s=body.ttl_s, uses=body.uses, labels=labels)
    join_string = str(JoinString(call.deps.settings.public_url, text))

    def work(tx: Transaction) -> Answer[JoinTokenCreated]:
        tx.tokens.put(token)
        call.record(tx, "join_token.create", token.id, uses=body.uses, ttl_s=body.ttl_s, labels=labels)
        view = msgspec.structs.asdict(join_token_view(token))
        return Answer(value=JoinTokenCreated(**view, join_string=join_string))

    return await call.write(work)


@route("GET", "/v1/join-tokens", summary="List claims")
async def index(call: Call, query: PageQuery) -> Answer[Page[JoinTokenView]]:
    """Without their secrets."""

    def work(tx: Transaction) -> list[Token]:
        found: list[Token] = []
        last = query.after
        while len(found) <= query.limit and (batch := tx.tokens.page(last, query.limit + 1)):
            found += [token for token in batch if token.role == "join"]
            last = batch[-1].id
        return found[: query.limit + 1]

    found = await call.read(work)
    return Answer(value=page_of([join_token_view(token) for token in found], query.limit, lambda view: view.id))


@route("DELETE", "/v1/join-tokens/{token}", summary="Withdraw a claim", statuses=(204,))
async def withdraw(call: Call, token: str) -> Answer[None]:
    """Devices that joined with it stay."""

    def work(tx: Transaction) -> Answer[None]:
        found = tx.tokens.get(token)
        if found is None or found.role != "join":
            raise NotFound(f"there is no claim {token}", field="token", fix="see: ferry device token list")
        tx.tokens.remove(token)
        call.record(tx, "join_token.withdraw", token)
        return Answer(value=None)

    return await call.write(work)


def _use(tx: Transaction, claim: str) -> None:
    token = tx.tokens.get(claim)
    if token is None or token.uses_left == 0:
        fix = "ask for a new one: ferry device token create"
        raise Unauthenticated("the join string is used up or withdrawn", field="join string", fix=fix)
    if token.uses_left is not None:
        tx.tokens.put(replace(token, uses_left=token.uses_left - 1))


def _joined(call: Call, device: DeviceId, token: str, password: str) -> Joined:
    settings = call.deps.settings
    return Joined(
        device=device,
        device_token=token,
        broker=BrokerAccess(url=settings.broker_url, username=device, password=password),
        signing_keys=(call.deps.signer.public_key,),
        heartbeat_s=settings.heartbeat_s,
        poll_s=settings.poll_s,
    )
