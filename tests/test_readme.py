"""The README's commands for reading a dataset, as they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from tests.harness import answers, exchange, model_server, proxy

README = (Path(__file__).parent.parent / "README.md").read_text()
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]"
# What a reader may stumble over must not spoil the other lines.
BODIES = [b'{"data": [[5.1, 3.5]]}', b'{"data": 1, "Data": 2}', b'{"data": 1, "data": 2}']


@pytest.fixture
async def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with model_server(answers(OK)) as model, proxy(model.url, tmp_path / "data") as p:
        for body in BODIES:
            head = b"POST /score HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nConnection: close\r\n"
            await exchange(p.port, head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))


def command(beginning: str) -> list[str]:
    (line,) = re.findall(rf"^{re.escape(beginning)}.*$", README, re.MULTILINE)
    return shlex.split(line)


@pytest.mark.usefixtures("dataset")
async def test_duckdb_reads_it() -> None:
    with duckdb.connect() as connection:
        rows = connection.sql(command("duckdb -c")[-1]).project("data").fetchall()
    assert [row[0].replace(" ", "").encode() for row in rows] == [body.replace(b" ", b"") for body in BODIES]


@pytest.mark.usefixtures("dataset")
async def test_pandas_reads_it() -> None:
    done = subprocess.run([sys.executable, *command("python -c")[1:]], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert f"[{len(BODIES)} rows x " in done.stdout


@pytest.mark.usefixtures("dataset")
async def test_the_folders_are_those_of_the_readme(tmp_path: Path) -> None:
    pattern = command("jq -c")[-1]
    assert len(list(tmp_path.glob(pattern))) == 1
