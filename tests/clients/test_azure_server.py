"""What tests/test_inference_server.py leaves out of Azure's inference server: threads with keep-alive, ``@rawhttp``, framings.

Its workers answer one request per connection by default. With threads, as GUNICORN_CMD_ARGS gives them, connections stay, and
are closed when they are idle.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.clients.programs import SECONDS, selftest, wait_until
from tests.custom_logging.sdk import environment
from tests.drills.load import until
from tests.harness import Proxy, proxy

SCORE_PY = """
import hashlib
from azureml_inference_server_http.api.aml_request import AMLRequest, rawhttp
from azureml_inference_server_http.api.aml_response import AMLResponse

def init():
    pass

@rawhttp
def run(request):
    data = request.get_data()
    if request.method == "GET":
        return AMLResponse({"query": request.query_string.decode("latin-1")}, 200, json_str=True)
    if request.headers.get("X-Want") == "bytes":
        return AMLResponse(data[::-1], 203, {"X-Note": "backwards", "Content-Type": "image/png"})
    if request.headers.get("X-Want") == "error":
        raise ValueError("not this one")
    return AMLResponse({"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}, 200, json_str=True)
"""
BLOB = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "score.py").write_text(SCORE_PY)
    log_path = folder / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "AZUREML_APP_ROOT": str(folder),
        "AML_CORS_ORIGINS": "http://a.test",
        "GUNICORN_CMD_ARGS": "--threads=8 --keep-alive=1",
    }
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "azmlinfsrv", "--entry_script", "score.py", "--port", str(port)],
            cwd=folder,
            env=environment(variables),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(lambda: "ready for serving traffic" in log_path.read_text(), process, log_path)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()  # it ends its workers
        try:
            process.wait(SECONDS)
        finally:
            process.kill()


@contextlib.asynccontextmanager
async def through(server: str, storage: Path, **settings: object) -> AsyncIterator[tuple[Proxy, aiohttp.ClientSession]]:
    async with (
        asyncio.timeout(60),
        proxy(server, storage, **settings) as p,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        yield p, session


CALLS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "alive": ("GET", "/", {}),
    "its swagger": ("GET", "/swagger.json?version=3", {}),
    "a query": ("GET", "/score?a=%2F&b=;;&c", {}),
    "a head": ("HEAD", "/score", {}),
    "an answer of bytes": ("POST", "/score", {"data": BLOB, "headers": {"X-Want": "bytes"}}),
    "an error": ("POST", "/score", {"data": b"x", "headers": {"X-Want": "error"}}),
    "nothing": ("POST", "/score", {}),
    "json": ("POST", "/score", {"json": {"data": [1]}}),
    "compressed, which it leaves alone": ("POST", "/score", {"data": BLOB, "compress": "gzip"}),
    "a preflight": (
        "OPTIONS",
        "/score",
        {"headers": {"Origin": "http://a.test", "Access-Control-Request-Method": "POST"}},
    ),
    "from elsewhere": ("POST", "/score", {"data": b"x", "headers": {"Origin": "http://a.test"}}),
    "an id of Azure": (
        "POST",
        "/score",
        {"data": b"x", "headers": {"x-ms-client-request-id": "mine", "x-request-id": "a-1"}},
    ),
    "asks first": ("POST", "/score", {"data": BLOB, "expect100": True}),
    "no such page": ("GET", "/nowhere", {}),
    "no such method": ("DELETE", "/score", {}),
}


@pytest.mark.promise("A3", "A3a", "C7", "F19")
@pytest.mark.parametrize("case", CALLS)
async def test_the_same_answer_as_without_the_proxy(case: str, server: str, tmp_path: Path) -> None:
    method, path, options = CALLS[case]
    told = []
    async with through(server, tmp_path) as (p, session):
        for url in (server, p.url):
            async with session.request(method, url + path, **options) as answer:
                headers = [(name, value) for name, value in answer.raw_headers if name.lower() not in VARIES]
                told.append((answer.status, answer.reason, headers, await answer.read()))
    assert told[0] == told[1]


VARIES = {b"date", b"x-request-id", b"x-ms-request-id", b"x-ms-run-fn-exec-ms", b"connection"}


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 100_000):
        yield data[start : start + 100_000]


async def test_a_binary_body_in_chunks(server: str, tmp_path: Path) -> None:
    async with through(server, tmp_path) as (p, session):
        want = {"X-Want": "bytes", "Content-Type": "image/png", "x-request-id": "scan-1"}
        async with session.post(f"{p.url}/score", data=pieces(BLOB), headers=want) as answer:
            assert (answer.status, await answer.read()) == (203, BLOB[::-1])
            assert answer.headers.getall("x-request-id") == ["scan-1"]  # the server's own
        await p.recorded(2)
        for collection, body in (("request", BLOB), ("response", BLOB[::-1])):
            (line,) = p.lines(collection)
            assert Path(line["data"].removeprefix("file://")).read_bytes() == body
            assert (line["datacontenttype"], line["xrequestid"]) == ("image/png", "scan-1")


@pytest.mark.promise("E16", "E16a", "E17a")
async def test_connections_that_gunicorn_closes(server: str, tmp_path: Path) -> None:
    """After a second; the proxy would keep them for longer."""
    async with through(server, tmp_path, proxy__upstream_keepalive="60s") as (p, session):

        async def post(number: int) -> None:
            async with session.post(f"{p.url}/score", data=b"%d" % number) as answer:
                assert (answer.status, (await answer.json())["bytes"]) == (200, len(str(number)))

        pool = p.app.relay.pool
        for _ in range(2):
            await asyncio.gather(*map(post, range(100)))
            await until(lambda: len(pool._idle) == len(pool._quiet_since))
            for number in range(20):
                await post(number)
            await until(lambda: not pool._quiet_since)  # closed by gunicorn
        account = await p.recorded(480)
        assert (account.received, account.discarded) == (480, {})
        assert not p.app.relay.faults


async def test_the_self_test_finds_no_difference(server: str, tmp_path: Path) -> None:
    (tmp_path / "body.json").write_text('{"data": [[1, 2]]}')
    for options in (["--path", "/"], ["--path", "/score", "--body", str(tmp_path / "body.json")]):
        await selftest(server, *options)
