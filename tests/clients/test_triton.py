"""``tritonclient[http]`` before the proxy; behind it a stub of Triton that speaks the binary tensor protocol.

A body is a JSON head, whose length stands in Inference-Header-Content-Length, and the bytes of the tensors behind it:
https://github.com/kserve/kserve/blob/master/docs/predict-api/v2/extension_binary_data.md
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clients.programs import Program
from tests.harness import Proxy, model_server, proxy
from tests.relay.wire import head, header, payload, read_message

CODERS: dict[bytes, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    b"gzip": (gzip.compress, gzip.decompress),
    b"deflate": (zlib.compress, zlib.decompress),
}
ABOUT = {"name": "adder", "versions": ["1"], "platform": "stub", "inputs": [], "outputs": []}


class Stub:
    """A model ``adder``: SUM is LEFT + RIGHT, WORDS are passed through. ``bodies``: of requests and answers, as sent."""

    def __init__(self) -> None:
        self.bodies: list[tuple[bytes, bytes]] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            message = await read_message(reader)
            writer.write(self._answer(message))

    def _answer(self, message: bytes) -> bytes:
        method, path, _ = message.split(b" ", 2)
        if method == b"GET":
            assert path in (b"/v2/health/live", b"/v2/models/adder/ready", b"/v2/models/adder")
            return _framed(b"200 OK", json.dumps(ABOUT).encode() if path.endswith(b"/adder") else b"")
        if path != b"/v2/models/adder/infer":
            return _framed(b"400 Bad Request", b'{"error":"Request for unknown model"}')
        body = payload(message)
        coding = (header(message, b"content-encoding") or [b""])[0]
        plain = CODERS[coding][1](body) if coding else body
        (length,) = map(int, header(message, b"inference-header-content-length"))
        answer, json_length = infer(plain, length)
        headers = [b"Content-Type: application/json"]
        if json_length:
            headers = [b"Content-Type: application/octet-stream", b"Inference-Header-Content-Length: %d" % json_length]
        coding = (header(message, b"accept-encoding") or [b""])[0]
        if coding in CODERS:
            answer = CODERS[coding][0](answer)
            headers.append(b"Content-Encoding: " + coding)
        self.bodies.append((body, answer))
        return _framed(b"200 OK", answer, *headers)


def _framed(status: bytes, body: bytes, *headers: bytes) -> bytes:
    return head(b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *headers) + body


def infer(body: bytes, length: int) -> tuple[bytes, int]:
    """The answer, and the length of its JSON if tensors follow, else 0."""
    asked = json.loads(body[:length])
    tensors, rest = {}, body[length:]
    for one in asked["inputs"]:
        size = one.get("parameters", {}).get("binary_data_size")
        if size is None:
            tensors[one["name"]] = struct.pack(f"<{len(one['data'])}f", *one["data"])
        else:
            tensors[one["name"]], rest = rest[:size], rest[size:]
    assert not rest
    count = len(tensors["LEFT"]) // 4
    pairs = zip(*(struct.unpack(f"<{count}f", tensors[name]) for name in ("LEFT", "RIGHT")), strict=True)
    results = {"SUM": struct.pack(f"<{count}f", *(a + b for a, b in pairs)), "WORDS": tensors["WORDS"]}
    outputs: list[dict[str, Any]] = []
    binary = b""
    for one in asked["outputs"]:
        words = one["name"] == "WORDS"
        output = {"name": one["name"], "datatype": "BYTES" if words else "FP32", "shape": [1, 2 if words else count]}
        if one["parameters"]["binary_data"]:
            binary += results[one["name"]]
            outputs.append({**output, "parameters": {"binary_data_size": len(results[one["name"]])}})
        else:
            outputs.append({**output, "data": struct.unpack(f"<{count}f", results["SUM"])})
    told = json.dumps({"model_name": "adder", "id": asked["id"], "outputs": outputs}).encode()
    return told + binary, len(told) if binary else 0


@contextlib.asynccontextmanager
async def calling(folder: Path, p: Proxy) -> AsyncIterator[Program]:
    client = Program(folder, "triton_client.py", f"127.0.0.1:{p.port}")
    try:
        yield client
        await asyncio.to_thread(client.end)
    finally:
        client.kill()


async def called(client: Program, call: str, request_id: str = "", **more: Any) -> Any:
    given = {"call": call, "id": request_id, "size": 1000, "binary": True, **more}
    client.tell(json.dumps({"request_compression": None, "response_compression": None, **given}))
    return await client.said()


def recorded(p: Proxy, collection: str, request_id: str) -> tuple[dict[str, Any], bytes | None]:
    """The line, and what is in the file that it points to."""
    (line,) = [one for one in p.lines(collection) if one["xrequestid"] == request_id]
    if line.get("datainblob") != "true":
        return line, None
    return line, Path(line["data"].removeprefix("file://")).read_bytes()


@pytest.mark.promise("A3", "C7", "C7a")
async def test_the_binary_tensor_protocol(tmp_path: Path) -> None:
    stub = Stub()
    async with (
        model_server(stub) as server,
        proxy(server.url, tmp_path / "data") as p,
        calling(tmp_path, p) as client,
        asyncio.timeout(60),
    ):
        assert await called(client, "about") == [True, True, ABOUT]

        cases = [(sent, wanted) for sent in (None, "gzip", "deflate") for wanted in (None, "gzip", "deflate")]
        for number, (sent, wanted) in enumerate(cases):
            request_id = f"binary-{number}"
            how = {"request_compression": sent, "response_compression": wanted}
            assert (await called(client, "infer", request_id, **how))[0] == request_id
            for collection, coding, body in zip(("request", "response"), (sent, wanted), stub.bodies[-1], strict=True):
                plain = CODERS[coding.encode()][1](body) if coding else body
                line, content = recorded(p, collection, request_id)
                assert content == plain
                assert (line["bodybytes"], line["capturestatus"]) == (len(body), "complete")
                assert line.get("contentencoding") == coding
            assert recorded(p, "response", request_id)[0]["datacontenttype"] == "application/octet-stream"

        # An answer without tensors behind its JSON stands in the line itself.
        assert (await called(client, "infer", "json", binary=False))[0] == "json"
        line, content = recorded(p, "response", "json")
        assert (line["data"]["outputs"][0]["name"], content) == ("SUM", None)
        assert len(line["data"]["outputs"][0]["data"]) == 1000

        # Larger than a line, and than what is sent in one piece.
        assert (await called(client, "infer", "large", size=1_500_000))[0] == "large"
        for collection, body in zip(("request", "response"), stub.bodies[-1], strict=True):
            assert len(body) > 4 * 1024 * 1024
            assert recorded(p, collection, "large")[1] == body

        before = p.account().received
        assert (await called(client, "many", "many", count=40))[0] == "many"
        status, words = await called(client, "infer", "unknown", model="nobody")
        assert (status, words) == ("400", "Request for unknown model")
        account = await p.recorded(before + 82)
        assert (account.received, account.discarded) == (before + 82, {})
        assert not p.app.relay.faults
