"""BentoML: one worker process with a thread for each core; the body is the root input, as bytes."""

import os
import sys
from typing import Annotated

import bentoml
import shared
from bentoml.validators import ContentType

Octets = Annotated[bytes, ContentType("application/octet-stream")]


@bentoml.service(workers=1, threads=shared.CORES, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Peer:
    def __init__(self) -> None:
        self.model = shared.BareModel()

    @bentoml.api(route="/infer")
    def infer(self, body: bytes, /) -> Octets:
        return self.model.run(body)


if __name__ == "__main__":
    serve = ["-m", "bentoml", "serve", "bentoml_app:Peer", "--host", "127.0.0.1", "--port", str(shared.PORT)]
    os.execv(sys.executable, [sys.executable, *serve])
