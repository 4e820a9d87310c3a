"""nginx as what stands behind the proxy: by itself with a file, and before a model server, as many have it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.clients.programs import selftest, uvicorn, wait_until
from tests.harness import proxy

pytestmark = pytest.mark.skipif(
    shutil.which("nginx") is None and not os.environ.get("CI"), reason="nginx is not installed"
)

CONFIG = """
{user} worker_processes 1; daemon off; pid nginx.pid; error_log stderr;
events {{ worker_connections 256; }}
http {{
  access_log off; client_body_temp_path bodies; proxy_temp_path answers; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
  gzip on; gzip_min_length 100; gzip_types application/json text/plain; default_type text/plain;
  server {{
    listen 127.0.0.1:{port};
    location / {{ root files; }}
    location /v1/ {{ proxy_pass {upstream}/; proxy_http_version 1.1; proxy_set_header Connection ""; }}
  }}
}}
"""
CONTENT = b"".join(b"line %d\n" % number for number in range(20_000))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("nginx")
    (folder / "files").mkdir()
    (folder / "files/labels.txt").write_bytes(CONTENT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    log_path = folder / "log"
    with uvicorn(folder) as model, log_path.open("wb") as log:
        user = "" if os.geteuid() else "user root;"  # else its worker is one that may not read our folders
        (folder / "nginx.conf").write_text(CONFIG.format(port=port, upstream=model.url, user=user))
        with subprocess.Popen(
            ["nginx", "-p", f"{folder}/", "-e", "stderr", "-c", f"{folder}/nginx.conf"], stdout=log, stderr=log
        ) as nginx:
            try:
                wait_until(lambda: _answers(port), nginx, log_path)
                yield f"http://127.0.0.1:{port}"
            finally:
                nginx.terminate()


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


async def test_the_self_test_finds_no_difference(server: str, tmp_path: Path) -> None:
    (tmp_path / "body.json").write_text('{"data": [[1, 2], [3], [4, 5]]}')
    for options in (["--path", "/labels.txt"], ["--path", "/v1/tokens", "--body", str(tmp_path / "body.json")]):
        await selftest(server, *options)


@pytest.mark.promise("C7a", "C10b")
async def test_ranges_and_compressed_answers(server: str, tmp_path: Path) -> None:
    async with proxy(server, tmp_path / "data") as p, aiohttp.ClientSession(auto_decompress=False) as session:
        raw = {}
        for base in (server, p.url):
            wanted = {"Range": "bytes=100-299", "Accept-Encoding": "identity"}
            async with session.get(f"{base}/labels.txt", headers=wanted) as part:
                assert (part.status, part.headers["Content-Range"]) == (206, f"bytes 100-299/{len(CONTENT)}")
                assert await part.read() == CONTENT[100:300]
            async with session.get(f"{base}/labels.txt", headers={"Accept-Encoding": "gzip"}) as packed:
                assert packed.headers["Content-Encoding"] == "gzip"
                raw[base] = await packed.read()
        assert raw[server] == raw[p.url]
        await p.recorded(4)
        assert [line["statuscode"] for line in p.lines("response")] == [206, 200]
        assert p.lines("response")[1]["data"] == CONTENT.decode()  # what is recorded is unpacked
