"""What docs/chat.md and docs/serving.md show runs as it stands there. The backend is a fake one."""

import asyncio
import contextlib
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from engines import LONG, TEXT
from helpers import BOUND_S, wait_until
from starlette.requests import ClientDisconnect

import orion_oie
from orion_oie import (
    CircuitOpenError,
    DeadlineExceededError,
    EngineClosedError,
    InvalidRequestError,
    ModelNotFoundError,
    OrionError,
    OrionInferenceEngine,
    QueueFullError,
    RequestCancelledError,
    UnknownAgentError,
    WorkerCrashedError,
)
from orion_oie.backends.base import GenerationJob
from orion_oie.backends.fake import FakeAnswer

TOP = Path(__file__).parents[1]
BAD = FakeAnswer("", error=WorkerCrashedError("/home/me/model.gguf crashed"))


def blocks(page: str) -> list[str]:
    text = (TOP / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def script(job: GenerationJob) -> FakeAnswer:
    return {"long": LONG, "bad": BAD}.get(job.messages[-1].content, FakeAnswer(TEXT))


@pytest.fixture
def engines(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[OrionInferenceEngine]:
    """The engines that the code under test makes, each over a fake backend."""
    made: list[OrionInferenceEngine] = []

    def make(**_model: Any) -> OrionInferenceEngine:
        made.append(make_engine({"*": script}))
        return made[-1]

    monkeypatch.setattr(orion_oie, "OrionInferenceEngine", make)
    return made


@pytest.fixture
def recipes(
    engines: list[OrionInferenceEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], ModuleType]]:
    """Imports the files of docs/serving.md, and the examples, by name."""
    for block in blocks("serving.md"):
        name = re.match(r"# (\w+\.py)", block)
        assert name is not None, "a block of docs/serving.md does not say which file it is"
        (tmp_path / name[1]).write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(TOP / "examples")
    before = set(sys.modules)
    yield importlib.import_module
    for name in ("status", "fastapi_service", "flask_service", "fastapi_app"):
        if name not in before:
            sys.modules.pop(name, None)


# Chats


@pytest.mark.parametrize("block", blocks("chat.md"), ids=lambda block: block.splitlines()[0])
def test_a_snippet_about_chats_runs(
    block: str, engines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Each by itself, in an empty folder; it prints something."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "chat.md", "exec"), {"__name__": "snippet"})
    assert capsys.readouterr().out.strip()
    assert all(engine.health().status == "down" for engine in engines)


def test_every_snippet_is_tested() -> None:
    """The pages have no other kinds of blocks that could be wrong."""
    for page, count in (("chat.md", 4), ("serving.md", 3)):
        text = (TOP / "docs" / page).read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(blocks(page)) == 2 * count


# Errors


@pytest.mark.parametrize("name", ["status", "fastapi_app"])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequestError("x"), 400),
        (UnknownAgentError("x"), 400),
        (QueueFullError("x"), 429),
        (DeadlineExceededError("x"), 504),
        (EngineClosedError("x"), 503),
        (CircuitOpenError("x"), 503),
        (WorkerCrashedError("x"), 503),
        (ModelNotFoundError("x"), 500),
        (RequestCancelledError("x"), 500),
        (OrionError("x"), 500),
    ],
)
def test_an_error_has_a_status(recipes: Any, name: str, error: OrionError, status: int) -> None:
    """Of its kind, or by whether the same request may succeed later."""
    assert recipes(name).status_of(error) == status


# FastAPI


@pytest.mark.parametrize("name", ["fastapi_service", "fastapi_app"])
def test_the_fastapi_service_answers(recipes: Any, engines: Any, name: str) -> None:
    """Whole and streamed; what is wrong is a status; one engine, which ends with the service."""
    from fastapi.testclient import TestClient

    with TestClient(recipes(name).app) as client:
        answer = client.post("/ask", json={"text": "Hello?", "agent": "conversation"})
        assert (answer.status_code, answer.json()["answer"]) == (200, TEXT)
        with client.stream("POST", "/stream", json={"text": "Hello?"}) as streamed:
            assert (streamed.status_code, "".join(streamed.iter_text())) == (200, TEXT)
        for path in ("/ask", "/stream"):
            for wrong, status, error in (
                ({"text": ""}, 400, "InvalidRequestError"),
                ({"text": "Hello?", "agent": "nobody"}, 400, "UnknownAgentError"),
                ({"text": "bad"}, 503, "WorkerCrashedError"),
            ):
                refused = client.post(path, json=wrong)
                assert (refused.status_code, refused.json()["error"]) == (status, error)
                assert "model.gguf" not in refused.text
            engines[0].reset_breakers()
            assert client.post(path, json={"text": 3}).status_code == 422
        engines[0].close()
        assert client.post("/stream", json={"text": "Hello?"}).status_code == 503
    assert len(engines) == 1
    assert engines[0].health().status == "down"


@pytest.mark.parametrize("name", ["fastapi_service", "fastapi_app"])
@pytest.mark.parametrize("spec_version", ["2.1", "2.4"])
def test_a_fastapi_client_that_goes_away_ends_its_request(
    recipes: Any, engines: Any, name: str, spec_version: str
) -> None:
    """Whether the server tells of it, or refuses to send, as newer ones do."""
    app = recipes(name).app

    async def main() -> None:
        async with app.router.lifespan_context(app):
            await leave_early(app, spec_version)
            engine = engines[0]
            while engine.stats().requests.cancelled == 0:
                await asyncio.sleep(0.001)
            assert engine.stats().running == 0
            assert (await engine.ainfer("Hello?")).content == TEXT

    asyncio.run(asyncio.wait_for(main(), BOUND_S))


async def leave_early(app: Any, spec_version: str) -> None:
    """Ask for a long stream as an ASGI server does, and go away after its first text."""
    body = json.dumps({"text": "long"}).encode()
    requests = [{"type": "http.request", "body": body, "more_body": False}]
    has_text = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await has_text.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if spec_version == "2.4" and has_text.is_set():
            raise OSError("the client has gone")
        if message.get("body"):
            has_text.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/stream",
        "raw_path": b"/stream",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("test", 1),
        "server": ("test", 80),
        "state": {},
    }
    with contextlib.suppress(ClientDisconnect):
        await app(scope, receive, send)


# Flask


def test_the_flask_service_answers(recipes: Any, engines: Any) -> None:
    """Whole and streamed; what is wrong is a status; one engine."""
    client = recipes("flask_service").create_app().test_client()
    answer = client.post("/ask", json={"text": "Hello?"})
    assert (answer.status_code, answer.json["answer"]) == (200, TEXT)
    streamed = client.post("/stream", json={"text": "Hello?"})
    assert (streamed.status_code, streamed.text) == (200, TEXT)
    for path in ("/ask", "/stream"):
        for wrong, status, error in (
            ({}, 400, "InvalidRequestError"),
            ({"text": "Hello?", "agent": "nobody"}, 400, "UnknownAgentError"),
            ({"text": "bad"}, 503, "WorkerCrashedError"),
        ):
            refused = client.post(path, json=wrong)
            assert (refused.status_code, refused.json["error"]) == (status, error)
            assert "model.gguf" not in refused.text
        engines[0].reset_breakers()
    (engine,) = engines
    engine.close()
    assert client.post("/stream", json={"text": "Hello?"}).status_code == 503


@pytest.mark.parametrize("is_begun", [True, False])
def test_a_flask_client_that_goes_away_ends_its_request(
    recipes: Any, engines: Any, is_begun: bool
) -> None:
    """A WSGI server closes the response, begun or not."""
    client = recipes("flask_service").create_app().test_client()
    response = client.post("/stream", json={"text": "long"}, buffered=False)
    if is_begun:
        assert next(iter(response.response)) == b"word "
    response.close()
    if is_begun:
        assert engines[0].stats().requests.cancelled == 1
    del response, client
    wait_until(lambda: engines[0].stats().requests.cancelled == 1)
    assert engines[0].infer("Hello?").content == TEXT
