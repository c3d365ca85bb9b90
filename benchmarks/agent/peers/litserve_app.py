"""LitServe with a worker for each core and its fast queue; bodies are JSON there, so tensors come in base64."""

import base64

import litserve
import shared


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = shared.BareModel()

    def decode_request(self, request: dict) -> bytes:
        return base64.b64decode(request["data"])

    def predict(self, body: bytes) -> bytes:
        return self.model.run(body)

    def encode_response(self, output: bytes) -> dict:
        return {"data": base64.b64encode(output).decode()}


if __name__ == "__main__":
    server = litserve.LitServer(
        Api(api_path="/infer"), accelerator="cpu", workers_per_device=shared.CORES, fast_queue=True, timeout=False
    )
    server.run(port=shared.PORT, host="127.0.0.1", generate_client_file=False, log_level="warning", access_log=False)
