"""The commands as a user runs them: real processes, what they print and how they exit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "proxy"]
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("PAYLOAD_LOGGER_")}


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    environ = {**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parent.parent), **environment}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=30, cwd=cwd, env=environ, check=False
    )


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_demo_shows_three_exchanges_and_their_files(tmp_path: Path) -> None:
    done = run("demo", "--once", "--listen", "127.0.0.1:0", "--storage", "data", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for shown in ("JSON   POST /score", "text   POST /echo", "image  POST /classify", '"datainblob":"true"'):
        assert shown in done.stdout
    assert done.stdout.rstrip().endswith("received 6 events = delivered 6 + discarded 0 + pending 0")
    files = [path for path in (tmp_path / "data/demo/blue").rglob("*") if path.is_file()]
    lines = [json.loads(line) for path in files if path.suffix == ".jsonl" for line in path.read_text().splitlines()]
    assert sorted(line["type"].rpartition(".")[2] for line in lines) == ["request"] * 3 + ["response"] * 3
    (image,) = (path for path in files if path.suffix != ".jsonl")
    assert image.read_bytes().startswith(b"\x89PNG")
    assert f"data/{image.relative_to(tmp_path / 'data')}" in done.stdout


def test_demo_says_when_its_address_is_taken(tmp_path: Path, taken_port: int) -> None:
    done = run("demo", "--once", "--listen", f"127.0.0.1:{taken_port}", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"payload-logger: proxy.listen: can't listen on 127.0.0.1:{taken_port}: "
        "the address is in use by another process; choose another one (--listen HOST:PORT)\n"
    )


def test_run_says_what_it_does_serves_and_stops(tmp_path: Path) -> None:
    command = [*COMMAND, "run", "--upstream", "127.0.0.1:9", "--listen", "127.0.0.1:0", "--storage", "data"]
    environ = {**ENVIRONMENT, "PAYLOAD_LOGGER_LOGS_FORMAT": "json", "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environ) as process:
        assert process.stderr is not None
        started = json.loads(process.stderr.readline())
        address = started["message"].split(" on ")[1].split(",")[0]
        with pytest.raises(urllib.error.HTTPError) as answer:
            urllib.request.urlopen(f"http://{address}/score", b"{}", timeout=10)
        assert answer.value.code == 502
        answer.value.close()
        process.send_signal(signal.SIGTERM)
        rest = [json.loads(line) for line in process.stderr]
        assert process.wait(10) == 0
    assert started["level"] == "info"
    assert "before http://127.0.0.1:9, recording request, response in file://" in started["message"]
    upstream, stopping, stopped = rest
    assert (upstream["level"], upstream["logger"]) == ("warning", "payload_logger.relay")
    assert upstream["message"].startswith(
        "Upstream 127.0.0.1:9: no connection to the model server: Connection refused;"
    )
    assert stopping["message"].startswith("Stopping: ")
    assert stopped["message"] == (
        "Stopped: received 2 events = delivered 2 + discarded 0 + pending 0; "
        "answered by the proxy itself: 1 × upstream_unreachable."
    )
    (line,) = (json.loads(path.read_text()) for path in (tmp_path / "data").rglob("response/**/*.jsonl"))
    assert (line["statuscode"], line["data"]["error"]["code"]) == (502, 502)


BAD = {
    "a bad URL": (
        ["run", "--upstream", "ftp://h"],
        2,
        (
            "payload-logger: command line: proxy.upstream: 'ftp://h' is not an upstream; use http://HOST:PORT, "
            "https://HOST:PORT or unix:/PATH, without user, query or fragment\n"
        ),
    ),
    "no such file": (
        ["run", "-c", "none.yaml"],
        2,
        "payload-logger: none.yaml: cannot be read: No such file or directory\n",
    ),
    "no mapping": (
        ["check", "-c", "list.yaml"],
        2,
        "payload-logger: list.yaml: a list is not a mapping of keys to values\n",
    ),
    "two mistakes": (
        ["check", "-c", "two.yaml"],
        2,
        (
            "payload-logger: two.yaml: proxy.listne: unknown key; did you mean 'listen'?\n"
            "payload-logger: two.yaml: spool.max_bytes: 'much' is not a size; use a number of bytes or one with a unit, "
            "like 64KiB, 4MB or 10GiB\n"
        ),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configuration_is_named_and_nothing_is_made(case: str, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "two.yaml").write_text("proxy: {listne: 1}\nspool: {max_bytes: much}\nstorage: {url: data}\n")
    before = sorted(tmp_path.iterdir())
    arguments, status, message = BAD[case]
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", message)
    assert sorted(tmp_path.iterdir()) == before


def test_a_port_in_use_is_named(tmp_path: Path, taken_port: int) -> None:
    done = run(
        "run", "--listen", f"127.0.0.1:{taken_port}", "--upstream", "127.0.0.1:9", "--storage", "data", cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"proxy.listen: can't listen on 127.0.0.1:{taken_port}: the address is in use" in done.stderr
    assert not list((tmp_path / "data").rglob("*.journal"))


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("run", "--listen", "127.0.0.1:0", "--upstream", "127.0.0.1:9", "--storage", "file/data", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"storage.url: can't write to {tmp_path}/file/data" in done.stderr
    assert "Not a directory" in done.stderr


def test_what_is_not_recorded_is_not_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data_collector: {collections: {request: {enabled: 'False'}}}\n")
    command = [
        *COMMAND,
        "run",
        "-c",
        "c.yaml",
        "--upstream",
        "127.0.0.1:9",
        "--listen",
        "127.0.0.1:0",
        "--storage",
        "data",
    ]
    environ = {**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environ) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(2)]
        process.terminate()
        process.stderr.read()
    assert "data_collector.collections: none is enabled; nothing is recorded" in lines[0]
    assert lines[1].endswith("before http://127.0.0.1:9, recording nothing.\n")


def test_check_says_what_goes_where_and_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "endpoint_name: ep\nname: dp\nproxy: {upstream: 'http://127.0.0.1:5001'}\nstorage: {url: /srv/data}\n"
        "data_collector: {rolling_rate: day, collections: {request: {enabled: 'True'}}}\n"
    )
    done = run("check", "-c", "c.yaml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "request    /srv/data/ep/dp/request/yyyy/MM/dd/*.jsonl\n" in done.stdout
    assert "warning: c.yaml: data_collector.rolling_rate" in done.stdout
    assert done.stdout.endswith("The configuration is valid.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("arguments", [[], ["bogus"], ["run", "-c", "a", "--deployment", "b"]])
def test_wrong_arguments_show_the_usage(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: payload-logger")


def test_schema_is_json() -> None:
    assert json.loads(run("schema").stdout)["$schema"] == "https://json-schema.org/draft/2020-12/schema"
