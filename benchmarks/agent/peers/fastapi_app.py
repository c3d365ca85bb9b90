"""FastAPI on uvicorn with uvloop and httptools; the body is not parsed, inference on the thread pool, one process."""

import shared
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

model = shared.BareModel()
app = FastAPI()


@app.post("/infer")
async def infer(request: Request) -> Response:
    answer = await run_in_threadpool(model.run, await request.body())
    return Response(answer, media_type="application/octet-stream")


if __name__ == "__main__":
    uvicorn.run(app, port=shared.PORT, loop="uvloop", http="httptools", access_log=False, log_level="warning")
