from __future__ import annotations

from pathlib import Path

from tests.harness import answers, exchange, model_server, proxy


async def test_one_exchange_gives_one_line_in_each_collection(tmp_path: Path) -> None:
    response = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 7\r\n\r\n[1.50]\n"
    async with model_server(answers(response)) as model, proxy(model.url, tmp_path) as p:
        got = await exchange(
            p.port,
            b"POST /score HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Type: application/json\r\n"
            b'Content-Length: 13\r\n\r\n{"data": [1]}',
        )
        assert got.endswith(b"[1.50]\n")
        assert b'"data":{"data": [1]},' in p.raw_lines("request")[0]
        assert b'"data":[1.50],' in p.raw_lines("response")[0]
        assert p.lines("request")[0]["xrequestid"] == p.lines("response")[0]["xrequestid"]
        assert p.account().delivered == 2
