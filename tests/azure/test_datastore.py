"""``storage.url: azureml://…``: where the datastore leads, its key, what lines point to, and the data assets."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from proxy.settings import Collection
from tests.azure import faults
from tests.azure.arm_server import arm_server
from tests.azure.azurite import ACCOUNT_KEY
from tests.azure.blob_server import blob_server
from tests.azure.identity import identity
from tests.drills.load import until
from tests.harness import proxy

ACCOUNT = "devstoreaccount1"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
WORKSPACE = {"subscription_id": "s", "resource_group": "r", "workspace_name": "w"}
DATASTORE = "azureml://subscriptions/s/resourcegroups/r/workspaces/w/datastores/store"


@pytest.fixture(autouse=True)
def names_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """ACCOUNT.blob.localhost is this machine; the environment holds no secret."""
    real = socket.getaddrinfo

    def local(host: Any, *arguments: Any, **more: Any) -> Any:
        return real("127.0.0.1" if str(host).endswith(".localhost") else host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", local)
    for name in list(os.environ):
        if name.startswith(("AZURE_", "IDENTITY_", "MSI_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "when the control plane is back"])
async def test_a_datastore(
    late: bool, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with blob_server() as blobs, arm_server() as arm, identity() as endpoint:
        for name, value in endpoint.environment.items():
            monkeypatch.setenv(name, value)
        arm.subscription, arm.group, arm.workspace, arm.further_tokens = "s", "r", "w", endpoint.issued
        blobs.containers.add("mdc")  # with a host of its own, the server takes the first folder for the account's
        secrets = {"secretsType": "AccountKey", "key": ACCOUNT_KEY}
        place = {"accountName": ACCOUNT, "containerName": "payloads", "protocol": "http"}
        arm.add_datastore("store", secrets=secrets, endpoint=f"localhost:{blobs.port}", **place)
        if late:
            arm.faults = faults.always(faults.busy(0))
        async with proxy(
            model,
            "azureml://datastores/store/paths/mdc/x",  # type: ignore[arg-type]
            spool__path=str(tmp_path / "spool"),
            storage__ship_interval=0.05,
            azureml={**WORKSPACE, "management_url": arm.url},
        ) as p:

            async def send(body: bytes, content_type: str) -> None:
                async with (
                    aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
                    session.post(f"{p.url}/classify", data=body, headers={"Content-Type": content_type}) as answer,
                ):
                    assert answer.status == 200

            if late:
                await send(PNG, "image/png")  # nothing waits for Azure
                await until(lambda: arm.requests.total() > 2)
                assert not blobs.blobs
                assert p.account().pending == 2
                arm.faults = None
            await until(lambda: len(arm.data) == 2)
            resolved = f"http://{ACCOUNT}.blob.localhost:{blobs.port}/payloads/mdc/x"
            await until(lambda: urls(p)["request"] == f"{resolved}/local-endpoint/default/request")
            await send(PNG, "image/png")
            await until(lambda: p.account().delivered == p.account().received)
        lines = blobs.lines("mdc/x/local-endpoint/default/request/")
        pointers = [line["data"] for line in lines]
        assert pointers[-1].startswith(f"{resolved}/local-endpoint/default/request/")
        assert len(pointers) == 1 + late
        if late:  # the name that was known then
            assert pointers[0].startswith(f"{DATASTORE}/paths/mdc/x/local-endpoint/default/request/")
        for pointer in pointers:
            name = pointer.partition("/mdc/")[2]
            assert blobs.blobs[f"mdc/{name}"].data == PNG
            assert blobs.blobs[f"mdc/{name}"].content_type == "image/png"
        assert {name for name, _ in arm.data} == {
            "local-endpoint-default-request",
            "local-endpoint-default-response",
        }
        secret = ACCOUNT_KEY[:20]
        assert secret not in caplog.text


async def test_a_collection_that_a_reload_enables_is_registered_and_shipped_too(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with blob_server() as blobs, arm_server() as arm, identity() as endpoint:
        for name, value in endpoint.environment.items():
            monkeypatch.setenv(name, value)
        arm.subscription, arm.group, arm.workspace, arm.further_tokens = "s", "r", "w", endpoint.issued
        blobs.containers.add("mdc")
        secrets = {"secretsType": "AccountKey", "key": ACCOUNT_KEY}
        place = {"accountName": ACCOUNT, "containerName": "payloads", "protocol": "http"}
        arm.add_datastore("store", secrets=secrets, endpoint=f"localhost:{blobs.port}", **place)
        async with proxy(
            model,
            "azureml://datastores/store/paths/mdc/x",  # type: ignore[arg-type]
            spool__path=str(tmp_path / "spool"),
            storage__ship_interval=0.05,
            data_collector={"collections": {"request": {"enabled": True}}},
            azureml={**WORKSPACE, "management_url": arm.url},
        ) as p:
            await until(lambda: len(arm.data) == 1)
            both = {name: Collection(enabled=True) for name in ("request", "response")}
            chosen = msgspec.structs.replace(p.app.settings.data_collector, collections=both)
            await p.app.apply(msgspec.structs.replace(p.app.settings, data_collector=chosen))
            await until(lambda: len(arm.data) == 2)
            resolved = f"http://{ACCOUNT}.blob.localhost:{blobs.port}/payloads/mdc/x"
            await until(lambda: urls(p)["response"] == f"{resolved}/local-endpoint/default/response")
            async with aiohttp.ClientSession() as session, session.post(f"{p.url}/classify", data=b"{}") as answer:
                assert answer.status == 200
            await until(lambda: p.account().received == p.account().delivered == 2)
        assert set(arm.data) == {("local-endpoint-default-request", "1"), ("local-endpoint-default-response", "1")}
        assert len(blobs.lines("mdc/x/local-endpoint/default/response/")) == 1


def urls(p: Any) -> dict[str, str]:
    """The root URLs that the running proxy writes into lines."""
    return {name: place.root_url for name, place in p.app.places.items()}
