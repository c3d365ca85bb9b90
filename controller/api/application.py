"""The aiohttp application: every declared route, wired to the parts it needs."""

from aiohttp import web

from controller.api import blobs, devices, events, join, releases, rollouts, service
from controller.api.dependencies import JSON_BYTES_MAX, Dependencies
from controller.api.dispatch import answering_every_error, serving
from controller.api.route import ROUTES

DECLARED_IN = (releases, blobs, devices, join, rollouts, events, service)
"""Importing these modules declares their routes; the order is the order of the documents."""


def build_api(deps: Dependencies) -> web.Application:
    """The API over `deps`. Starting and stopping it is for the caller (`web.AppRunner`)."""
    app = web.Application(middlewares=[answering_every_error], client_max_size=JSON_BYTES_MAX)
    app[events.FEED] = events.EventFeed(deps)
    app.cleanup_ctx.append(events.feeding)
    app.on_shutdown.append(events.closing)
    for declared in ROUTES:
        app.router.add_route(declared.method, declared.path, serving(declared, deps))
    return app
