"""The ``openai`` client before the proxy, a small server that speaks its API behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.programs import Program
from tests.harness import Proxy, model_server, proxy
from tests.relay.wire import head, header, payload, read_message

SECONDS = 30
TOKENS = ["Say", " é", ": ", '"', "\n\n", "x" * 5000, " done"]


def event(token: str) -> bytes:
    data = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    choice = {"index": 0, "delta": {"role": "assistant", "content": token}, "finish_reason": None}
    return f"data: {json.dumps({**data, 'choices': [choice]})}\n\n".encode()


def answer(text: str) -> bytes:
    message = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    return as_json(
        b"200 OK",
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [message], "usage": usage},
    )


def as_json(status: bytes, body: Any, *more: bytes) -> bytes:
    data = json.dumps(body).encode()
    length = b"Content-Length: %d" % len(data)
    return head(b"HTTP/1.1 " + status, b"Content-Type: application/json", length, *more) + data


class Model:
    """Streams what the test puts in ``tokens``, as it is put there, to who asks for a stream; else the ``answers`` in turn."""

    def __init__(self, *answers: bytes) -> None:
        self.requests: list[dict[str, Any]] = []
        self.asked = asyncio.Event()
        self.left = asyncio.Event()
        self.tokens: asyncio.Queue[str | None] = asyncio.Queue()
        self.breaks_off = False
        self._answers = list(answers)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            message = await read_message(reader)
            assert message.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
            assert header(message, b"authorization") == [b"Bearer sk-of-nobody"]
            self.requests.append(json.loads(payload(message)))
            self.asked.set()
            if self.requests[-1].get("stream"):
                await self._stream(reader, writer)
            elif self._answers:
                writer.write(self._answers.pop(0))
            else:
                await self._wait_until_left(reader)

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head(b"HTTP/1.1 200 OK", b"Content-Type: text/event-stream", b"Transfer-Encoding: chunked"))
        leaving = asyncio.create_task(self._wait_until_left(reader))
        try:
            while not leaving.done():
                more = asyncio.create_task(self.tokens.get())
                await asyncio.wait([leaving, more], return_when=asyncio.FIRST_COMPLETED)
                if not more.done():
                    more.cancel()
                    return
                token = more.result()
                if token is None and self.breaks_off:
                    return
                data = b"data: [DONE]\n\n" if token is None else event(token)
                writer.write(b"%x\r\n%b\r\n" % (len(data), data))
                if token is None:
                    writer.write(b"0\r\n\r\n")
                    return
        finally:
            leaving.cancel()
            writer.close()

    async def _wait_until_left(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionResetError):
            await reader.read(1)
        self.left.set()


class Client:
    """The program with the client in it: one for all tests, but for a new one behind a test that failed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.program = Program(folder, "openai_client.py")

    @contextlib.asynccontextmanager
    async def asking(self, scenario: str, p: Proxy) -> AsyncIterator[Program]:
        """Plays a scenario before the proxy; it has come to its end with the block."""
        try:
            async with asyncio.timeout(SECONDS):
                self.program.tell(f"{scenario} {p.url}/v1")
                yield self.program
                assert await self.program.said() == "done"
        except BaseException:
            self.program.kill()
            self.program = Program(self._folder, "openai_client.py")
            raise


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    found = Client(tmp_path_factory.mktemp("openai"))
    yield found
    found.program.end()


@contextlib.asynccontextmanager
async def asked(client: Client, scenario: str, model: Model, folder: Path) -> AsyncIterator[tuple[Proxy, Program]]:
    async with (
        model_server(model) as server,
        proxy(server.url, folder / "data") as p,
        client.asking(scenario, p) as program,
    ):
        yield p, program


@pytest.mark.promise("D12")
@pytest.mark.parametrize("scenario", ["stream", "stream_async"])
async def test_each_token_is_there_before_the_next_one_is_sent(client: Client, scenario: str, tmp_path: Path) -> None:
    model = Model()
    async with asked(client, scenario, model, tmp_path) as (p, program):
        for token in TOKENS:
            model.tokens.put_nowait(token)
            assert await program.said() == token
        model.tokens.put_nowait(None)
        await p.recorded(2)
        (request,), (response,) = p.lines("request"), p.lines("response")
    assert request["data"] == model.requests[0]
    assert request["path"] == "/v1/chat/completions"
    assert response["data"] == (b"".join(map(event, TOKENS)) + b"data: [DONE]\n\n").decode()
    assert (response["datacontenttype"], response["capturestatus"]) == ("text/event-stream", "complete")


@pytest.mark.promise("E14")
@pytest.mark.parametrize("scenario", ["leave", "leave_async"])
async def test_a_stream_that_is_left_is_left_at_the_server(client: Client, scenario: str, tmp_path: Path) -> None:
    model = Model()
    async with asked(client, scenario, model, tmp_path) as (p, program):
        for token in TOKENS[:3]:
            model.tokens.put_nowait(token)
            assert await program.said() == token
        assert await program.said() == "left"
        await model.left.wait()
        await p.recorded(2)
        (line,) = p.lines("response")
        program.tell("go")  # until now it was there
    assert (line["statuscode"], line["capturestatus"]) == (499, "clientleft")
    assert line["data"] == b"".join(map(event, TOKENS[:3])).decode()


@pytest.mark.promise("E14")
async def test_a_request_that_is_given_up_before_its_answer(client: Client, tmp_path: Path) -> None:
    model = Model()
    async with asked(client, "leave_before_the_answer", model, tmp_path) as (p, program):
        await model.asked.wait()
        program.tell("leave")
        assert await program.said() == "left"
        await model.left.wait()
        await p.recorded(2)
        (line,) = p.lines("response")
        program.tell("go")
    assert (line["statuscode"], line["capturestatus"], line["data"]) == (499, "clientleft", None)


@pytest.mark.promise("E15")
async def test_answers_and_errors(client: Client, tmp_path: Path) -> None:
    """The client's request id is the one that is recorded."""
    slow_down = {"error": {"message": "slow down", "type": "requests", "param": None, "code": "rate_limit_exceeded"}}
    model = Model(
        answer("é"), as_json(b"429 Too Many Requests", slow_down, b"Retry-After: 7", b"x-request-id: mine"), answer("é")
    )
    async with asked(client, "answers", model, tmp_path) as (p, program):
        told = []
        for _ in range(3):
            program.tell("ask")
            told.append(await program.said())
        program.tell("enough")
        await p.recorded(6)
        lines = p.lines("response")
        assert [one[:2] for one in told] == [["answer", 200], ["RateLimitError", 429], ["answer", 200]]
        assert told[0][3:] == ["é", 5]
        assert told[1][2] == "mine"  # the model server's own
        assert told[1][3:] == [slow_down["error"], {"retry-after": "7", "content-type": "application/json"}]
        assert [told[0][2], told[2][2]] == [lines[0]["xrequestid"], lines[2]["xrequestid"]]
        assert [line["statuscode"] for line in lines] == [200, 429, 200]
        assert lines[1]["data"] == slow_down
    assert len(model.requests) == 3


@pytest.mark.promise("E15")
async def test_a_server_that_is_not_there(client: Client, tmp_path: Path) -> None:
    async with model_server(Model()) as server:
        url = server.url
    async with proxy(url, tmp_path / "data") as p, client.asking("answers", p) as program:
        program.tell("ask")
        name, status, request_id, body, _ = await program.said()
        program.tell("enough")
        assert (name, status, body["code"]) == ("InternalServerError", 502, 502)
        assert request_id == body["request_id"] == p.lines("response")[0]["xrequestid"]


async def test_what_the_client_repeats_is_recorded_each_time(client: Client, tmp_path: Path) -> None:
    busy = as_json(b"503 Service Unavailable", {"error": {"message": "busy"}}, b"retry-after-ms: 1")
    model = Model(busy, busy, answer("at last"))
    async with asked(client, "retries", model, tmp_path) as (p, program):
        assert await program.said() == "at last"
        await p.recorded(6)
        assert [line["statuscode"] for line in p.lines("response")] == [503, 503, 200]
    assert len(model.requests) == 3


@pytest.mark.promise("C9a")
async def test_a_stream_that_breaks_off_is_an_error_for_the_client(client: Client, tmp_path: Path) -> None:
    model = Model()
    model.breaks_off = True
    async with asked(client, "broken", model, tmp_path) as (p, program):
        model.tokens.put_nowait("first")
        assert await program.said() == "first"
        model.tokens.put_nowait(None)
        assert "Exception" in await program.said()
        await p.recorded(2)
        (line,) = p.lines("response")
    assert line["capturestatus"] == "upstreamfailed"
