"""Behind the proxy: Azure's own inference server with a scoring script, unchanged."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import exchange, proxy

SCORE_PY = """
import json

def init():
    pass

def run(data):
    return [sum(row) * 200.5 for row in json.loads(data)["data"]]
"""
# 60 bytes with its line end, as the documented "contentrange" counts them.
DOCUMENTED_REQUEST = b'{"data": [ [1,2,3,4,5,6,7,8,9,10], [10,9,8,7,6,5,4,3,2,1]]}\n'


@pytest.fixture(scope="module")
def inference_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a running azureml-inference-server-http."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "score.py").write_text(SCORE_PY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [Path(sys.executable).parent / "azmlinfsrv", "--entry_script", "score.py", "--port", str(port)],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "AZUREML_APP_ROOT": str(folder)},
        ) as server,
    ):
        try:
            _wait_until_healthy(f"http://127.0.0.1:{port}/", server, folder / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                assert answer.read() == b"Healthy"
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"not healthy within 30 s: {log.read_text()}")


def _request(path: bytes, body: bytes, request_id: bytes) -> bytes:
    return (
        b"POST %b HTTP/1.1\r\nHost: model\r\nContent-Type: application/json\r\nx-request-id: %b\r\n"
        b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (path, request_id, len(body), body)
    )


async def test_the_documented_request_is_recorded_as_documented(inference_server: str, tmp_path: Path) -> None:
    async with proxy(inference_server, tmp_path) as p:
        answer = await exchange(p.port, _request(b"/score", DOCUMENTED_REQUEST, b"documented-1"))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert json.loads(body) == [11027.5, 11027.5]
        assert head.lower().count(b"x-request-id: documented-1") == 1
        assert b"x-ms-server-version: azmlinfsrv/" in head
        (request,), (response,) = p.lines("request"), p.lines("response")
    assert request["data"] == json.loads(DOCUMENTED_REQUEST)
    assert (request["path"], request["method"], request["contentrange"]) == ("/score", "POST", "bytes 0-59/60")
    assert response["data"] == [11027.5, 11027.5]
    assert request["xrequestid"] == response["xrequestid"] == request["correlationid"] == "documented-1"


async def test_an_error_of_the_scoring_script_is_recorded(inference_server: str, tmp_path: Path) -> None:
    async with proxy(inference_server, tmp_path) as p:
        answer = await exchange(p.port, _request(b"/score", b'{"rows": []}', b"bad-1"))
        assert answer.startswith(b"HTTP/1.1 500 ")
        (response,) = p.lines("response")
    assert response["statuscode"] == 500
    assert response["data"] == json.loads(answer.partition(b"\r\n\r\n")[2])


async def test_one_hundred_requests_give_one_hundred_pairs(inference_server: str, tmp_path: Path) -> None:
    async with proxy(inference_server, tmp_path) as p:
        ids = [b"many-%d" % number for number in range(100)]
        limit = asyncio.Semaphore(8)

        async def send(request_id: bytes) -> bytes:
            async with limit:
                return await exchange(p.port, _request(b"/score", DOCUMENTED_REQUEST, request_id))

        answers = await asyncio.gather(*map(send, ids))
        assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
        for collection in ("request", "response"):
            assert sorted(line["xrequestid"] for line in p.lines(collection)) == sorted(one.decode() for one in ids)
        assert p.account().discarded == {}
