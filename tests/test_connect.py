"""``check --connect``: each thing that can be wrong is named, and what it tried is removed."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proxy.config import load
from proxy.connect import findings
from tests.azure import faults
from tests.azure.arm_server import arm_server
from tests.azure.blob_server import blob_server
from tests.harness import answers, model_server

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CONNECTION_STRING = "AZURE_STORAGE_CONNECTION_STRING"


@pytest.fixture(autouse=True)
def only_these_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("AZURE_", "IDENTITY_", "MSI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv(CONNECTION_STRING, "UseDevelopmentStorage=true")


async def found(storage: str, folder: Path, upstream: str | None = None, **more: Any) -> list[str]:
    """The findings as lines; with an upstream that answers, if none is given."""
    async with model_server(answers(OK)) as model:
        settings = load(
            overrides={
                "proxy.upstream": upstream or model.url,
                "storage.url": storage,
                "spool.path": str(folder / "spool"),
                "spool.max_bytes": 1024 * 1024,
                **more,
            },
            environ={},
        ).settings
        return [str(finding) async for finding in findings(settings)]


def failures(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("FAIL")]


async def test_all_is_well_and_nothing_is_left(tmp_path: Path) -> None:
    async with blob_server() as server:
        lines = await found(f"{server.account_url}/c/pre%20fix", tmp_path)
        assert failures(lines) == []
        assert [line[5:].split()[0] for line in lines] == [
            "upstream",
            "folder",
            "disk",
            "right",
            "blobs",
            "clock",
            "blobs",
        ]
        assert "200 to GET /" in lines[0]
        assert lines[3] == f"     right    the account key of {CONNECTION_STRING}"
        assert (
            lines[4] == f"ok   blobs    {server.account_url}/c/pre%20fix/local-endpoint/default/request can be written"
        )
        assert lines[5] in [
            f"ok   clock    this machine's is {sign}{off} s off Azure's" for sign in "+-" for off in (0, 1)
        ]
        assert server.requests["append"] == server.requests["read"] == server.requests["delete"] == 2
        assert not server.blobs
    assert not list(tmp_path.iterdir())


async def test_what_the_spool_holds_is_of_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * 1024 * 1024)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage)
    backlog = tmp_path / "spool" / "http" / "backlog"
    backlog.parent.mkdir(parents=True)
    async with blob_server() as server:
        for size, full in ((0, True), (3 * 1024 * 1024, False)):
            backlog.write_bytes(bytes(size))
            lines = await found(f"{server.account_url}/c/p", tmp_path, **{"spool.max_bytes": 4 * 1024 * 1024})
            assert any("the disk is full before the budget is used up" in line for line in failures(lines)) == full
            assert any("budget (spool.max_bytes) 4 MiB, 3 MiB used" in line for line in lines) == bool(size)


async def test_local_storage_needs_no_azure(tmp_path: Path) -> None:
    lines = await found(str(tmp_path / "data"), tmp_path)
    assert failures(lines) == []
    assert [line[5:].split()[0] for line in lines] == ["upstream", "folder", "folder", "folder", "disk"]
    assert not list(tmp_path.iterdir())


REFUSALS = {
    "no role": (faults.NOT_PERMITTED, "is refused (403 AuthorizationPermissionMismatch)"),
    "wrong key": (faults.NOT_AUTHENTICATED, "it is not this account's key, or this machine's clock is wrong"),
    "no append blobs": (faults.WRONG_ACCOUNT, "has no append blobs (BlobTypeNotSupported); use a general-purpose v2"),
    "busy": (faults.busy(), "it is busy (503 ServerBusy)"),
}


@pytest.mark.parametrize("case", REFUSALS)
async def test_what_the_destination_refuses_is_said_once(case: str, tmp_path: Path) -> None:
    fault, words = REFUSALS[case]
    async with blob_server() as server:
        server.containers.add("c")
        server.faults = faults.always(fault, "create")
        (failure,) = failures(await found(f"{server.account_url}/c", tmp_path))
    assert failure.startswith(f"FAIL blobs    {server.account_url}/c: ")
    assert words in failure


async def test_a_probe_that_may_not_be_removed_is_named(tmp_path: Path) -> None:
    async with blob_server() as server:
        server.faults = faults.always(faults.NOT_PERMITTED, "delete")
        lines = await found(f"{server.account_url}/c/p", tmp_path)
        assert failures(lines) == []
        assert len(server.blobs) == 2
        for key in server.blobs:
            name = key.partition("/")[2]
            assert name.rpartition("/")[2].startswith(".payload-logger-probe-")  # which readers pass over
            assert any(f"the probe {name} could not be removed" in line for line in lines)


async def test_nobody_there(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
        upstream, blobs = failures(await found(f"{nobody}/devstoreaccount1/c", tmp_path, nobody))
    assert upstream.startswith(f"FAIL upstream {nobody}: ")
    assert upstream.endswith("is the model server running? (proxy.upstream)")
    assert blobs.startswith(f"FAIL blobs    {nobody}/devstoreaccount1/c: it can't be reached: ")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "it is plain HTTP, over which no token is sent: use https, or set AZURE_STORAGE_KEY"),
        ({"AZURE_STORAGE_KEY": "no key"}, "AZURE_STORAGE_KEY is no account key"),
        ({"AZURE_STORAGE_SAS_TOKEN": "secret"}, "AZURE_STORAGE_SAS_TOKEN is no SAS"),
        ({"AZURE_STORAGE_KEY_FILE": "/does/not/exist"}, "AZURE_STORAGE_KEY_FILE names no file that exists"),
        ({CONNECTION_STRING: "AccountName=other;AccountKey=c2VjcmV0"}, "is for the account 'other'"),
    ],
)
async def test_secrets_that_cant_be_used(
    environment: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CONNECTION_STRING)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (failure,) = failures(await found("http://127.0.0.1:9/devstoreaccount1/c", tmp_path))
    assert words in failure
    assert "c2VjcmV0" not in failure


async def test_a_datastore_and_its_asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control plane refuses this machine, which has no identity: it is said so, for the datastore."""
    async with arm_server() as arm:
        workspace = {"subscription_id": "s", "resource_group": "r", "workspace_name": "w", "management_url": arm.url}
        monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "EnvironmentCredential")  # the others ask the machine's network
        lines = await found("azureml://datastores/d/paths/p", tmp_path, azureml=workspace)
    (failure,) = failures(lines)
    assert failure.startswith("FAIL blobs    azureml://subscriptions/s/resourcegroups/r/workspaces/w/datastores/d: ")
    assert "there is no token for this machine's identity" in failure
    assert lines[-2:] == [
        f"     asset    local-endpoint-default-{name}, version 1, will stand for azureml://subscriptions/s/resourcegroups/r"
        f"/workspaces/w/datastores/d/paths/p/local-endpoint/default/{name}"
        for name in ("request", "response")
    ]


async def test_a_folder_that_cant_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lines = failures(await found(str(tmp_path / "data"), tmp_path, **{"spool.path": str(tmp_path / "file" / "x")}))
    assert len(lines) == 1
    assert lines[0].startswith(f"FAIL folder   {tmp_path / 'file' / 'x'}: can't write in {tmp_path / 'file'}")


@pytest.mark.parametrize("folder", ["x" * 256, f"new/{'x' * 256}/y", f"new/{'ü' * 128}", "x/" * 2500])
async def test_a_folder_whose_name_is_too_long(tmp_path: Path, folder: str) -> None:
    data = str(tmp_path / "data")
    (failure,) = failures(await found(data, tmp_path, **{"spool.path": str(tmp_path / folder)}))
    assert failure.startswith(f"FAIL folder   {tmp_path / folder}: can't write in {tmp_path}: File name too long")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("works", "status"), [(True, 0), (False, 1)])
async def test_the_exit_status(works: bool, status: int, tmp_path: Path) -> None:
    async with blob_server() as server, model_server(answers(OK)) as model:
        if not works:
            server.faults = faults.always(faults.NOT_PERMITTED)
        config = tmp_path / "c.yaml"
        config.write_text(f"spool: {{path: {tmp_path / 'spool'}, max_bytes: 1MiB}}\n")
        command = [sys.executable, "-m", "proxy", "check", "--connect", "--upstream", model.url, "-c", str(config)]
        command += ["--storage", f"{server.account_url}/c"]
        done = await asyncio.to_thread(subprocess.run, command, stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == status
    assert done.stdout.splitlines()[-1] == ("All of it works." if works else "Not all of it works.")
