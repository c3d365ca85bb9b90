"""MLServer with a runtime of its own and no worker processes; V2 in JSON, because its REST takes no binary tensors."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import shared
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Peer(MLModel):
    async def load(self) -> bool:
        self.session = shared.load()
        self.names = [node.name for node in self.session.get_outputs()]
        self.threads = ThreadPoolExecutor(shared.CORES)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feeds = {each.name: NumpyCodec.decode_input(each) for each in payload.inputs}
        loop = asyncio.get_running_loop()
        arrays = await loop.run_in_executor(self.threads, self.session.run, None, feeds)
        outputs = [NumpyCodec.encode_output(name, array) for name, array in zip(self.names, arrays, strict=True)]
        return InferenceResponse(model_name=self.name, outputs=outputs)


async def main() -> None:
    settings = Settings(
        host="127.0.0.1",
        http_port=shared.PORT,
        grpc_port=int(os.environ["PEER_OTHER_PORT"]),
        metrics_endpoint=None,
        parallel_workers=0,
        debug=False,
        use_structured_logging=False,
    )
    await MLServer(settings).start([ModelSettings(name="model", implementation=Peer)])


if __name__ == "__main__":
    asyncio.run(main())
