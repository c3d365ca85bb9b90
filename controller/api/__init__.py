"""The HTTP API: `/v1/...`, JSON in and out, problems as RFC 9457, described by `/v1/openapi.json`.

`route` declares a route once, for serving and for the document; `dispatch` is what happens to every request; the
modules named after resources hold the handlers. The API decides nothing about rollouts or devices: it checks who asks,
parses what they say, and runs the unit of work that does it.
"""

from controller.api.application import build_api
from controller.api.auth import new_token
from controller.api.dependencies import ApiSettings, Dependencies

__all__ = ["ApiSettings", "Dependencies", "build_api", "new_token"]
