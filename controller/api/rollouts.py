"""Rollouts: the API checks who asks and writes down what the pure commands decide, all in one unit of work."""

import secrets

from common.errors import NotFound
from common.ids import parse_model_name, parse_version
from common.observability import traceparent_of
from controller import operations
from controller.api import conditional
from controller.api.pages import page_of
from controller.api.route import Answer, Call, route
from controller.api.views import rollout_view
from controller.resources import (
    Page,
    PageQuery,
    RolloutAction,
    RolloutActionRequest,
    RolloutQuery,
    RolloutView,
)
from controller.rollouts.model import Execution, Preview, Rollout, RolloutSpec
from controller.store.port import Transaction

SALT_BYTES = 8


@route(
    "POST",
    "/v1/rollouts",
    summary="Start a rollout; with dry_run, only say what it would do",
    statuses=(201, 200),
)
async def create(call: Call, body: RolloutSpec, query: RolloutQuery) -> Answer[RolloutView | Preview]:
    """A new rollout (201), or a preview (200). Older rollouts of the model that share devices are superseded."""
    parse_model_name(body.release.model, "release.model")
    parse_version(body.release.version, "release.version")
    if query.dry_run:
        salt = secrets.token_hex(SALT_BYTES)
        plan = await call.read(lambda tx: operations.preview_rollout(tx, body, salt=salt, now=call.now))
        return Answer(value=plan, status=200)
    answer = await call.write(lambda tx: _create(call, tx, body))
    call.deps.reconciler.nudge()
    return answer


@route("GET", "/v1/rollouts", summary="List rollouts, newest first")
async def index(call: Call, query: PageQuery) -> Answer[Page[RolloutView]]:
    """With their counts; `after` is the last id seen."""

    def work(tx: Transaction) -> list[RolloutView]:
        found = tx.rollouts.page(query.after, query.limit + 1)
        return [rollout_view(rollout, tx.rollouts.executions(rollout.id)) for rollout in found]

    return Answer(value=page_of(await call.read(work), query.limit, lambda view: view.id))


@route("GET", "/v1/rollouts/{rollout}", summary="Show a rollout: phases, counts and why it is where it is")
async def show(call: Call, rollout: str) -> Answer[RolloutView]:
    """The ETag moves with the rollout's own state, not with each device's progress."""
    found, executions = await call.read(lambda tx: _rollout(tx, rollout))
    return Answer(value=rollout_view(found, executions), etag=etag_of(found))


@route("GET", "/v1/rollouts/{rollout}/executions", summary="List what each device does in a rollout")
async def executions(call: Call, rollout: str, query: PageQuery) -> Answer[Page[Execution]]:
    """By device id."""
    _, found = await call.read(lambda tx: _rollout(tx, rollout))
    later = [execution for execution in found if execution.device > query.after]
    return Answer(value=page_of(later, query.limit, lambda execution: execution.device))


@route("POST", "/v1/rollouts/{rollout}/actions", summary="Approve, pause, resume, advance, abort, roll back or retry")
async def act(call: Call, rollout: str, body: RolloutActionRequest) -> Answer[RolloutView]:
    """The rollout after the action; 409 with what is possible when it makes no sense now. If-Match is honoured."""
    answer = await call.write(lambda tx: _act(call, tx, rollout, body.action))
    call.deps.reconciler.nudge()
    return answer


def etag_of(rollout: Rollout) -> str:
    """The entity tag of the rollout's own state."""
    return conditional.quote(f"r{rollout.revision}")


def new_rollout_id(now: float) -> str:
    """Sorts by time: milliseconds since 1970 in hex, then chance."""
    return f"r{int(now * 1000):012x}-{secrets.token_hex(3)}"


def _create(call: Call, tx: Transaction, spec: RolloutSpec) -> Answer[RolloutView | Preview]:
    rollout = operations.create_rollout(
        tx,
        spec,
        id=new_rollout_id(call.now),
        salt=secrets.token_hex(SALT_BYTES),
        actor=call.who,
        now=call.now,
        traceparent=traceparent_of(),
    )
    executions = tx.rollouts.executions(rollout.id)
    detail = {"release": str(spec.release), "selector": spec.selector, "devices": len(executions)}
    call.record(tx, "rollout.create", rollout.id, **detail)
    return Answer(value=rollout_view(rollout, executions), etag=etag_of(rollout))


def _act(call: Call, tx: Transaction, rollout: str, action: RolloutAction) -> Answer[RolloutView]:
    before, _ = _rollout(tx, rollout)
    call.check_unchanged(etag_of(before))
    after = operations.act_on_rollout(tx, rollout, action, now=call.now)
    call.record(tx, f"rollout.{action}", rollout, before=before.state.value, after=after.state.value)
    return Answer(value=rollout_view(after, tx.rollouts.executions(rollout)), etag=etag_of(after))


def _rollout(tx: Transaction, rollout: str) -> tuple[Rollout, list[Execution]]:
    found = tx.rollouts.get(rollout)
    if found is None:
        raise NotFound(f"there is no rollout {rollout}", field="rollout", fix="see: ferry rollout list")
    return found, tx.rollouts.executions(rollout)
