"""An HTTP service around one engine.

    uvicorn fastapi_app:app      serves it: one process, which holds the models
    python fastapi_app.py        asks it a few questions without a server

docs/serving.md explains it. Needs fastapi; asking without a server needs httpx.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from orion_oie import (
    DeadlineExceededError,
    EngineClosedError,
    InvalidRequestError,
    OrionError,
    OrionInferenceEngine,
    QueueFullError,
)

MODEL = "smollm2-135m-instruct"  # or a GGUF file of your own

STATUS = {
    InvalidRequestError: 400,  # the client must change the request
    QueueFullError: 429,
    EngineClosedError: 503,
    DeadlineExceededError: 504,
}


def status_of(error: OrionError) -> int:
    """The HTTP status of an error: of its kind, else 503 if the same request may succeed later."""
    known = [status for kind, status in STATUS.items() if isinstance(error, kind)]
    return known[0] if known else 503 if error.retryable else 500


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with OrionInferenceEngine(model=MODEL) as engine:
        app.state.engine = engine
        yield


app = FastAPI(lifespan=lifespan)


@app.exception_handler(OrionError)
async def refuse(_request: Request, error: OrionError) -> JSONResponse:
    status = status_of(error)
    message = error.message if status == 400 else ""  # the others may name files of this machine
    return JSONResponse({"error": type(error).__name__, "message": message}, status)


class Question(BaseModel):
    text: str
    agent: str | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=1024)

    def options(self) -> dict[str, Any]:
        return {"agent": self.agent, "max_tokens": self.max_tokens, "deadline": 60.0}


@app.post("/ask")
async def ask(question: Question, request: Request) -> dict[str, Any]:
    result = await request.app.state.engine.ainfer(question.text, **question.options())
    return {"answer": result.content, "agent": result.agent_id, "model": result.model_id}


@app.post("/stream")
async def stream(question: Question, request: Request) -> StreamingResponse:
    answer = request.app.state.engine.astream(question.text, **question.options())
    first = await anext(answer, None)  # what is wrong until here becomes a status

    async def body() -> AsyncIterator[str]:
        async with answer:  # a client that goes away ends the request
            if first is not None:
                yield first.text
            async for event in answer:
                yield event.text

    return StreamingResponse(body(), media_type="text/plain; charset=utf-8")


@app.get("/health")
async def health(request: Request, response: Response) -> dict[str, Any]:
    state = request.app.state.engine.health()
    response.status_code = 503 if state.status == "down" else 200
    return {"status": state.status, "reasons": state.reasons}


def main() -> None:
    from fastapi.testclient import TestClient

    with TestClient(app) as client:
        print(client.get("/health").json())
        print(client.post("/ask", json={"text": "What is rain?", "max_tokens": 32}).json())
        question = {"text": "Tell me about the sea.", "max_tokens": 32}
        with client.stream("POST", "/stream", json=question) as response:
            print(response.status_code, "".join(response.iter_text()))
        refused = client.post("/stream", json={"text": "Hello?", "agent": "nobody"})
        print(refused.status_code, refused.json())


if __name__ == "__main__":
    main()
