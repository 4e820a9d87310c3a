from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from proxy.settings import AzureML, Collection, Data, DataCollector, Settings
from proxy.shipping import azureml
from proxy.shipping.azureml import ControlPlane, DataAsset, ResolvedDatastore, assets
from proxy.shipping.destination import Container, Datastore
from proxy.shipping.store import NotNow
from tests.azure.arm_server import GROUP, SUBSCRIPTION, TOKEN, WORKSPACE, ArmServer, Raw, arm_server
from tests.azure.faults import HANG, RESET, Silence, always, in_turn, lost, refused

DATASTORE = Datastore(SUBSCRIPTION, GROUP, WORKSPACE, "workspaceblobstore")
CONTAINER = Container("https://myaccount.blob.core.windows.net", "my-container")
HEAD = f"azureml://subscriptions/{SUBSCRIPTION}/resourcegroups/{GROUP}/workspaces/{WORKSPACE}"
URI = f"{HEAD}/datastores/workspaceblobstore/paths/modelDataCollector/e/d/request"
ASSET = DataAsset(SUBSCRIPTION, GROUP, WORKSPACE, "e-d-request", "1", URI)
KEY, SAS = "a2V5IG9mIHRoZSBhY2NvdW50", "sv=2024-08-04&sr=c&sp=racw&sig=c2lnbmF0dXJl"
ACCOUNT_KEY = {"secretsType": "AccountKey", "key": KEY}


@pytest.fixture
async def arm() -> AsyncIterator[ArmServer]:
    async with arm_server() as server:
        yield server


async def token(_scope: str) -> str:
    return TOKEN


def plane(arm: ArmServer) -> ControlPlane:
    return ControlPlane(token, arm.url)


async def failure(arm: ArmServer, call: Datastore | DataAsset = DATASTORE) -> NotNow:
    """What the call fails with; nothing that it drags along holds a secret."""
    with pytest.raises(NotNow) as raised:
        await (plane(arm).resolve(call) if isinstance(call, Datastore) else plane(arm).register(call))
    error = raised.value
    assert error.__cause__ is None
    assert error.__context__ is None
    for secret in (TOKEN, KEY, SAS, "c2lnbmF0dXJl"):
        assert secret not in f"{error!r} {error} {error.words}"
    assert error.words.endswith(".")
    return error


# --- resolve ---


async def test_a_datastore_with_a_key(arm: ArmServer) -> None:
    arm.add_datastore("workspaceblobstore", secrets=ACCOUNT_KEY)
    assert await plane(arm).resolve(DATASTORE) == ResolvedDatastore(CONTAINER, account_key=KEY)
    assert arm.requests == {"get_datastore": 1, "list_secrets": 1}


@pytest.mark.parametrize("given", [SAS, f"?{SAS}"])
async def test_a_datastore_with_a_sas(arm: ArmServer, given: str) -> None:
    arm.add_datastore("workspaceblobstore", secrets={"secretsType": "Sas", "sasToken": given})
    assert await plane(arm).resolve(DATASTORE) == ResolvedDatastore(CONTAINER, sas_token=SAS)


async def test_a_file_system_is_a_container_of_the_same_account_s_blob_endpoint(arm: ArmServer) -> None:
    arm.add_datastore(
        "workspaceblobstore",
        secrets=ACCOUNT_KEY,
        datastoreType="AzureDataLakeGen2",
        containerName=None,
        filesystem="my-filesystem",
        protocol="abfss",
    )
    found = await plane(arm).resolve(DATASTORE)
    assert found.container == Container("https://myaccount.blob.core.windows.net", "my-filesystem")


@pytest.mark.parametrize("kind", ["None", "ServicePrincipal", "Certificate"])
async def test_no_secret_is_asked_for_that_storage_does_not_take(arm: ArmServer, kind: str) -> None:
    arm.add_datastore("workspaceblobstore", credentials={"credentialsType": kind})
    assert await plane(arm).resolve(DATASTORE) == ResolvedDatastore(CONTAINER)
    assert arm.requests == {"get_datastore": 1}


async def test_a_secret_of_another_kind_leaves_the_identity(arm: ArmServer) -> None:
    secret = {"secretsType": "ServicePrincipal", "clientSecret": KEY}
    arm.add_datastore("workspaceblobstore", secrets=secret, credentials=None)
    assert await plane(arm).resolve(DATASTORE) == ResolvedDatastore(CONTAINER)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
async def test_an_identity_that_may_not_list_secrets_is_used_itself(arm: ArmServer, status: int) -> None:
    arm.add_datastore("workspaceblobstore", secrets=ACCOUNT_KEY)
    arm.faults = always(refused(status, "AuthorizationFailed"), "list_secrets")
    assert await plane(arm).resolve(DATASTORE) == ResolvedDatastore(CONTAINER)


async def test_secrets_that_can_t_be_listed_just_now_are_waited_for(arm: ArmServer) -> None:
    arm.add_datastore("workspaceblobstore", secrets=ACCOUNT_KEY)
    arm.faults = in_turn(refused(429, "TooManyRequests", 7), operation="list_secrets")
    error = await failure(arm)
    assert (error.reason, error.retry_after_seconds) == ("busy", 7)
    assert (await plane(arm).resolve(DATASTORE)).account_key == KEY


@pytest.mark.parametrize(
    ("properties", "url"),
    [
        ({"endpoint": "core.chinacloudapi.cn"}, "https://myaccount.blob.core.chinacloudapi.cn"),
        ({"endpoint": "core.usgovcloudapi.net", "protocol": None}, "https://myaccount.blob.core.usgovcloudapi.net"),
        ({"endpoint": None}, "https://myaccount.blob.core.windows.net"),
        ({"protocol": "wasbs"}, "https://myaccount.blob.core.windows.net"),
        ({"protocol": "http"}, "https://myaccount.blob.core.windows.net"),
        ({"protocol": "http", "endpoint": "localhost:10000"}, "http://myaccount.blob.localhost:10000"),
        ({"protocol": "https", "endpoint": "localhost:10000"}, "https://myaccount.blob.localhost:10000"),
    ],
)
async def test_the_blob_endpoint_of_a_datastore(arm: ArmServer, properties: dict[str, Any], url: str) -> None:
    arm.add_datastore("workspaceblobstore", **properties)
    assert (await plane(arm).resolve(DATASTORE)).container.account_url == url


@pytest.mark.parametrize("endpoint", ["core.chinacloudapi.cn", None])
async def test_the_blob_endpoint_is_that_of_the_cloud(
    arm: ArmServer, endpoint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(azureml.STORAGE_ENDPOINTS, arm.url, "core.chinacloudapi.cn")
    arm.add_datastore("workspaceblobstore", endpoint=endpoint)
    arm.url = arm.url.upper() + "/"
    found = await plane(arm).resolve(DATASTORE)
    assert found.container.account_url == "https://myaccount.blob.core.chinacloudapi.cn"


@pytest.mark.parametrize("endpoint", ["core.windows.net", "evil.example", "core.chinacloudapi.cn.evil.example"])
async def test_no_token_goes_to_an_endpoint_of_somebody_else(
    arm: ArmServer, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(azureml.STORAGE_ENDPOINTS, arm.url, "core.chinacloudapi.cn")
    arm.add_datastore("workspaceblobstore", endpoint=endpoint)
    error = await failure(arm)
    assert error.reason == "datastore"
    assert f"is at {endpoint}, which is not this cloud's core.chinacloudapi.cn." in error.words


def test_each_cloud_has_its_storage() -> None:
    assert azureml.STORAGE_ENDPOINTS == {
        "https://management.azure.com": "core.windows.net",
        "https://management.chinacloudapi.cn": "core.chinacloudapi.cn",
        "https://management.usgovcloudapi.net": "core.usgovcloudapi.net",
    }


async def test_a_datastore_that_is_no_blob_container_is_named_with_its_type(arm: ArmServer) -> None:
    arm.add_datastore("workspaceblobstore", datastoreType="AzureFile")
    error = await failure(arm)
    assert error.reason == "datastore"
    assert error.words == (
        "datastore workspaceblobstore of workspace my-workspace is of type AzureFile; use one of type AzureBlob or "
        "AzureDataLakeGen2."
    )


def test_secrets_are_never_shown() -> None:
    shown = f"{ResolvedDatastore(CONTAINER, KEY, SAS)!r} {ResolvedDatastore(CONTAINER, KEY, SAS)}"
    assert "my-container" in shown
    assert KEY not in shown
    assert SAS not in shown


# --- register ---


async def test_an_asset_is_registered(arm: ArmServer) -> None:
    words = await plane(arm).register(ASSET)
    assert words == f"data asset e-d-request:1 of workspace my-workspace is registered: it stands for {URI}."
    stored = arm.data["e-d-request", "1"]
    assert (stored["dataType"], stored["dataUri"]) == ("uri_folder", URI)
    assert arm.requests == {"get_data": 1, "put_data": 1}


async def test_an_asset_that_is_there_is_kept_with_all_that_somebody_wrote_on_it(arm: ArmServer) -> None:
    await plane(arm).register(ASSET)
    arm.data["e-d-request", "1"] |= {"description": "Of the first week.", "tags": {"team": "fraud"}, "isArchived": True}
    before = dict(arm.data["e-d-request", "1"])
    words = await plane(arm).register(ASSET)
    assert words == f"data asset e-d-request:1 of workspace my-workspace is kept: it stands for {URI}."
    assert arm.data == {("e-d-request", "1"): before}
    assert arm.requests["put_data"] == 1


async def test_an_asset_that_stands_for_something_else_is_kept_and_told(arm: ArmServer) -> None:
    other = "https://other.blob.core.windows.net/c/folder"
    arm.data["e-d-request", "1"] = {"dataType": "uri_folder", "dataUri": f"{other}?{SAS}"}
    words = await plane(arm).register(ASSET)
    assert words == (
        f"data asset e-d-request:1 of workspace my-workspace is kept as it is: it stands for {other}, not for {URI}, and a "
        "version can't be changed; give the collection's data another version or name."
    )
    assert arm.requests == {"get_data": 1}


@pytest.mark.parametrize("status", [400, 409])
@pytest.mark.parametrize(("theirs", "words"), [(f"{URI}/", "is kept: it"), (f"{URI}2", "is kept as it is: it")])
async def test_when_somebody_was_faster_theirs_is_kept(arm: ArmServer, status: int, theirs: str, words: str) -> None:
    arm.data["e-d-request", "1"] = {"dataType": "uri_folder", "dataUri": theirs}
    arm.conflict_status = status
    arm.faults = in_turn(refused(404, "UserError"), operation="get_data")
    assert words in await plane(arm).register(ASSET)
    assert arm.requests == {"get_data": 2, "put_data": 1}
    assert arm.data["e-d-request", "1"]["dataUri"] == theirs


@pytest.mark.parametrize("status", [400, 409])
async def test_a_refusal_that_is_no_conflict_is_told(arm: ArmServer, status: int) -> None:
    arm.faults = in_turn(refused(status, "ValidationError"), operation="put_data")
    error = await failure(arm, ASSET)
    assert error.reason == "unexpected"
    assert error.words == (
        f"data asset e-d-request:1 of workspace my-workspace: Azure refuses this ({status} ValidationError): As the plan says."
    )


@pytest.mark.parametrize("answer", [Silence.RESET, Silence.HANG])
async def test_an_asset_whose_answer_was_lost_is_found_the_next_time(
    arm: ArmServer, answer: Silence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(azureml, "CALL_SECONDS", 0.3)
    arm.faults = always(lost(answer), "put_data")
    assert (await failure(arm, ASSET)).reason in ("unreachable", "timeout")
    tried = arm.requests["put_data"]
    assert "is kept: it" in await plane(arm).register(ASSET)
    assert arm.requests["put_data"] == tried
    assert list(arm.data) == [("e-d-request", "1")]


@pytest.mark.parametrize(
    "theirs",
    [
        URI,
        f"{URI}/",
        URI.replace("resourcegroups", "resourceGroups"),
        URI.replace("my-group", "MY-Group").replace("workspaceblobstore", "WorkspaceBlobStore"),
        "azureml://datastores/workspaceblobstore/paths/modelDataCollector/e/d/request",
        URI.replace("/e/", "/%65/"),
    ],
)
async def test_the_same_place_in_another_form_is_the_same(arm: ArmServer, theirs: str) -> None:
    arm.data["e-d-request", "1"] = {"dataType": "uri_folder", "dataUri": theirs}
    assert "is kept: it" in await plane(arm).register(ASSET)


@pytest.mark.parametrize(
    "theirs",
    [
        URI.replace("/e/", "/E/"),
        URI.replace("my-workspace", "another-workspace"),
        "azureml://datastores/workspaceblobstore",
        "azureml://datastores/other/paths/modelDataCollector/e/d/request",
        "azureml:e-d-request:1",
        "x",
    ],
)
async def test_another_place_is_another_one(arm: ArmServer, theirs: str) -> None:
    arm.data["e-d-request", "1"] = {"dataType": "uri_folder", "dataUri": theirs}
    assert f"is kept as it is: it stands for {theirs}, not for {URI}" in await plane(arm).register(ASSET)


async def test_a_blob_url_is_compared_as_one(arm: ArmServer) -> None:
    url = "https://myaccount.blob.core.windows.net/c/paths/Folder"
    asset = DataAsset(SUBSCRIPTION, GROUP, WORKSPACE, "a", "1", url)
    await plane(arm).register(asset)
    for theirs, words in [
        ("https://MyAccount.blob.core.windows.net/c/paths/Folder/", "is kept: it"),
        ("https://myaccount.blob.core.windows.net/C/paths/Folder", "is kept as it is: it"),
    ]:
        arm.data["a", "1"]["dataUri"] = theirs
        assert words in await plane(arm).register(asset)


# --- what the data assets are ---


def settings(*, azureml: bool = True, endpoint_name: str = "e", **collections: Collection) -> Settings:
    return Settings(
        endpoint_name=endpoint_name,
        name="d",
        data_collector=DataCollector(collections=collections),
        azureml=AzureML(subscription_id=SUBSCRIPTION, resource_group=GROUP, workspace_name=WORKSPACE)
        if azureml
        else None,
    )


ENABLED = Collection(enabled=True)


def test_each_enabled_collection_is_an_asset() -> None:
    own = Collection(enabled=True, data=Data(name="mine", version="7"))
    chosen = settings(request=ENABLED, response=own, model_inputs=ENABLED)
    roots = {
        "request": URI,
        "response": "https://myaccount.blob.core.windows.net/c/e/d/response",
        "model_inputs": "azureml://datastores/Other/paths/a/Folder",
    }
    ids = (SUBSCRIPTION, GROUP, WORKSPACE)
    assert assets(chosen, roots) == {
        "request": DataAsset(*ids, "e-d-request", "1", URI),
        "response": DataAsset(*ids, "mine", "7", "https://myaccount.blob.core.windows.net/c/e/d/response"),
        "model_inputs": DataAsset(*ids, "e-d-model_inputs", "1", f"{HEAD}/datastores/Other/paths/a/Folder"),
    }


def test_what_is_not_enabled_or_not_in_azure_is_no_asset() -> None:
    chosen = settings(request=ENABLED, response=Collection(enabled=False), a=ENABLED, b=ENABLED)
    roots = {"request": "file:///data/e/d/request", "response": URI, "a": "http://127.0.0.1:10000/devstoreaccount1/c/a"}
    assert assets(chosen, roots) == {}


def test_without_a_workspace_there_are_no_assets() -> None:
    assert assets(settings(azureml=False, request=ENABLED), {"request": URI}) == {}


def test_a_default_name_is_one_that_azure_takes() -> None:
    asset = assets(settings(endpoint_name="my.endpoint é", request=ENABLED), {"request": URI})["request"]
    assert asset.name == "my-endpoint---d-request"


@pytest.mark.parametrize("name", ["a b", "a.b", "-a", "_a", "é", "a/b", "a\n", "x" * 256])
def test_a_name_that_azure_does_not_take_is_an_error(name: str) -> None:
    chosen = settings(request=Collection(enabled=True, data=Data(name=name)))
    with pytest.raises(
        ValueError, match=r"data_collector\.collections\.request\.data\.name: .* is no name for a data asset"
    ):
        assets(chosen, {"request": URI})


@pytest.mark.parametrize("name", ["a", "0-_", "x" * 255])
def test_a_name_that_azure_takes(name: str) -> None:
    asset = assets(settings(request=Collection(enabled=True, data=Data(name=name))), {"request": URI})["request"]
    assert asset.name == name


# --- what goes wrong ---

CALLS = [pytest.param(DATASTORE, id="resolve"), pytest.param(ASSET, id="register")]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("status", "code", "reason", "words"),
    [
        (401, "InvalidAuthenticationToken", "identity", "the token is refused (401 InvalidAuthenticationToken)"),
        (
            403,
            "AuthorizationFailed",
            "forbidden",
            "give it the role 'AzureML Data Scientist' on workspace my-workspace",
        ),
        (408, "", "busy", "Azure is busy (408)."),
        (429, "TooManyRequests", "busy", "Azure is busy (429 TooManyRequests)."),
        (500, "InternalServerError", "server", "Azure has a fault of its own (500 InternalServerError)."),
        (503, "ServerBusy", "busy", "Azure is busy (503 ServerBusy)."),
        (504, "GatewayTimeout", "server", "Azure has a fault of its own (504 GatewayTimeout)."),
        (418, "Teapot", "unexpected", "Azure refuses this (418 Teapot): As the plan says."),
        (204, "", "unexpected", "Azure refuses this (204): it does not say why."),
    ],
)
async def test_what_azure_refuses_is_told(
    arm: ArmServer, call: Datastore | DataAsset, status: int, code: str, reason: str, words: str
) -> None:
    arm.faults = always(refused(status, code)) if status != 204 else always(Raw(204, b""))  # type: ignore[arg-type]
    with pytest.raises(NotNow) as raised:
        await (plane(arm).resolve(call) if isinstance(call, Datastore) else plane(arm).register(call))
    assert raised.value.reason == reason
    assert words in raised.value.words
    assert arm.requests.total() == 1  # who calls, tries again


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("17", 17), ("9999", 9999), ("10000", 0), ("-1", 0), ("1e9", 0), ("nan", 0), ("soon", 0), ("9" * 5000, 0)],
)
async def test_retry_after_is_passed_on_within_reason(arm: ArmServer, given: str, seconds: float) -> None:
    arm.faults = always(Raw(503, b"", {"Retry-After": given}))  # type: ignore[arg-type]
    error = await failure(arm)
    assert (error.reason, error.retry_after_seconds) == ("busy", seconds)


@pytest.mark.parametrize(
    ("what", "missing"),
    [
        ("subscription", "subscription"),
        ("group", "resource group"),
        ("workspace", "workspace"),
        ("datastore", "datastore"),
    ],
)
async def test_what_is_not_there_is_named(arm: ArmServer, what: str, missing: str) -> None:
    if what != "datastore":
        setattr(arm, what, "another")
    for call in (DATASTORE, ASSET) if what != "datastore" else (DATASTORE,):
        error = await failure(arm, call)
        assert error.reason == "missing"
        assert f"there is no such {missing} (404 " in error.words
        assert f"workspace {WORKSPACE}, resource group {GROUP}, subscription {SUBSCRIPTION}." in error.words


async def test_every_name_is_one_segment_of_the_path(arm: ArmServer) -> None:
    arm.group, arm.workspace = "my.group (1)", "a/b?c=d#e%2F é"
    arm.add_datastore("x/../y", secrets=ACCOUNT_KEY)
    found = await plane(arm).resolve(Datastore(SUBSCRIPTION, arm.group, arm.workspace, "x/../y"))
    assert found.account_key == KEY
    await plane(arm).register(DataAsset(SUBSCRIPTION, arm.group, arm.workspace, "a", "1/2 +&", URI))
    assert list(arm.data) == [("a", "1/2 +&")]


GOOD = {"datastoreType": "AzureBlob", "accountName": "myaccount", "containerName": "my-container"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>Sign in</html>",
        b"\xff\xfe",
        b'{"properties":',
        b"[" * 100_000,
        b"null",
        b"[]",
        b'"properties"',
        b"{}",
        b'{"properties": null}',
        b'{"properties": []}',
        b'{"properties": {}}',
        *(
            json.dumps({"properties": {**GOOD, name: value}}).encode()
            for name in GOOD
            for value in (None, 1, "", [], {}, ["AzureBlob"])
        ),
        *(
            json.dumps({"properties": {**GOOD, **wrong}}).encode()
            for wrong in (
                {"accountName": "evil.example/"},
                {"accountName": "evil.example#"},
                {"accountName": "MyAccount"},
                {"containerName": "../other"},
                {"containerName": "abc?sig=x"},
                {"containerName": "abc/d"},
                {"containerName": "ABC"},
                {"endpoint": "core.windows.net/x"},
                {"endpoint": "core.windows.net@evil.example"},
                {"endpoint": ".."},
                {"endpoint": 5},
                {"endpoint": ["core.windows.net"]},
            )
        ),
        json.dumps({"properties": GOOD}).encode().ljust(azureml.MAX_ANSWER_BYTES + 1),
    ],
)
async def test_a_datastore_that_is_not_as_it_should_be(arm: ArmServer, body: bytes) -> None:
    arm.faults = in_turn(Raw(200, body), operation="get_datastore")  # type: ignore[arg-type]
    error = await failure(arm)
    assert error.reason == "unexpected"
    assert "the answer (200) can't be used" in error.words


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"secretsType": 1}',
        b'{"secretsType": "AccountKey"}',
        b'{"secretsType": "AccountKey", "key": null}',
        b'{"secretsType": "AccountKey", "key": ""}',
        b'{"secretsType": "Sas", "key": "a2V5IG9mIHRoZSBhY2NvdW50"}',
        b'{"secretsType": "Sas", "sasToken": ["sv=2024-08-04&sr=c&sp=racw&sig=c2lnbmF0dXJl"]}',
        b'{"secretsType": "AccountKey", "key": "a2V5IG9mIHRoZSBhY2NvdW50"',
    ],
)
async def test_secrets_that_are_not_as_they_should_be(arm: ArmServer, body: bytes) -> None:
    arm.add_datastore("workspaceblobstore", secrets=ACCOUNT_KEY)
    arm.faults = in_turn(Raw(200, body), operation="list_secrets")  # type: ignore[arg-type]
    assert (await failure(arm)).reason == "unexpected"


@pytest.mark.parametrize("credentials", [None, [], "AccountKey", {}, {"credentialsType": ["None"]}])
async def test_credentials_of_no_known_kind_are_no_reason_to_fail(arm: ArmServer, credentials: object) -> None:
    arm.add_datastore("workspaceblobstore", credentials=credentials)
    assert await plane(arm).resolve(DATASTORE) == ResolvedDatastore(CONTAINER)


@pytest.mark.parametrize("operation", ["get_data", "put_data"])
@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"{}", b'{"properties": {"dataUri": 1}}', b'{"properties": "x"}']
)
async def test_an_asset_that_is_not_as_it_should_be(arm: ArmServer, operation: str, body: bytes) -> None:
    arm.faults = in_turn(Raw(200, body), operation=operation)  # type: ignore[arg-type]
    assert (await failure(arm, ASSET)).reason == "unexpected"


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": "no"}', b'{"error": {"code": {}, "message": 5}}'])
async def test_an_error_that_is_not_as_it_should_be(arm: ArmServer, body: bytes) -> None:
    arm.faults = always(Raw(403, body))  # type: ignore[arg-type]
    assert (await failure(arm, ASSET)).reason == "forbidden"


async def test_a_code_that_is_none_is_not_shown(arm: ArmServer) -> None:
    arm.add_datastore("workspaceblobstore", secrets=ACCOUNT_KEY)
    body = json.dumps({"error": {"code": KEY, "message": KEY}}).encode()
    arm.faults = in_turn(Raw(500, body), operation="list_secrets")  # type: ignore[arg-type]
    assert "Azure has a fault of its own (500)." in (await failure(arm)).words


async def test_an_error_is_shown_in_one_short_line_and_without_the_token(arm: ArmServer) -> None:
    message = f"Bearer {TOKEN} {{said}}\r\n\x1b[31m" + "x" * 100_000
    body = json.dumps({"error": {"code": TOKEN, "message": message}}).encode()
    arm.faults = always(Raw(418, body))  # type: ignore[arg-type]
    with pytest.raises(NotNow) as raised:
        await plane(arm).register(ASSET)
    words = raised.value.words
    assert "(418 ...): Bearer ... {said}   [31mxxx" in words
    assert len(words) < 500
    assert words.isprintable()


@pytest.mark.parametrize("call", CALLS)
async def test_no_answer(arm: ArmServer, call: Datastore | DataAsset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert azureml.CALL_SECONDS == 30
    monkeypatch.setattr(azureml, "CALL_SECONDS", 0.2)
    arm.faults = always(HANG)
    error = await failure(arm, call)
    assert error.reason == "timeout"
    assert f"no answer from {arm.url[7:]} within 0.2 s." in error.words


async def test_half_an_answer_is_none(arm: ArmServer) -> None:
    arm.add_datastore("workspaceblobstore", secrets=ACCOUNT_KEY)
    for body in (
        b"8\r\n" + KEY.encode(),
        KEY.encode() + b"\r\n",
        b"18\r\n" + KEY.encode() + b"\r\nzz" + KEY.encode() + b"\r\n",
    ):
        arm.faults = in_turn(Raw(200, body, whole=False), operation="list_secrets")  # type: ignore[arg-type]
        error = await failure(arm)
        assert error.reason == "unreachable"


@pytest.mark.parametrize("call", CALLS)
async def test_a_connection_that_breaks(arm: ArmServer, call: Datastore | DataAsset) -> None:
    arm.faults = always(RESET)
    error = await failure(arm, call)
    assert error.reason == "unreachable"
    assert f"{arm.url[7:]} can't be reached: ServerDisconnectedError." in error.words


async def test_nobody_there(arm: ArmServer) -> None:
    async with arm_server() as gone:
        url = gone.url
    for unreachable, word in ((url, "Connect call failed"), ("https://management.invalid", "management.invalid:443")):
        arm.url = unreachable
        error = await failure(arm)
        assert error.reason == "unreachable"
        assert word in error.words


async def test_an_answer_without_an_end(arm: ArmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b" " * 65536)
                await writer.drain()

    monkeypatch.setattr(azureml, "CALL_SECONDS", 5)
    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        arm.url = "http://127.0.0.1:{1}".format(*server.sockets[0].getsockname())
        assert (await failure(arm)).reason == "unexpected"


async def test_a_redirect_is_not_followed(arm: ArmServer) -> None:
    group = f"/subscriptions/{SUBSCRIPTION}/resourceGroups/{GROUP}"
    path = f"{group}/providers/Microsoft.MachineLearningServices/workspaces/{WORKSPACE}"
    async with arm_server() as elsewhere:
        for server in (arm, elsewhere):
            server.add_datastore("other")
            location = f"{server.url}{path}/datastores/other?api-version=2024-04-01"
            arm.faults = in_turn(Raw(307, b"", {"Location": location}), operation="get_datastore")  # type: ignore[arg-type]
            assert (await failure(arm)).reason == "unexpected"


# --- tokens ---


async def test_the_token_is_for_this_cloud(arm: ArmServer) -> None:
    scopes = []

    async def noted(scope: str) -> str:
        scopes.append(scope)
        return TOKEN

    arm.add_datastore("workspaceblobstore")
    await ControlPlane(noted, f"{arm.url}/").resolve(DATASTORE)
    assert scopes == [f"{arm.url}/.default"]


async def test_no_token_no_call(arm: ArmServer) -> None:
    async def none(_scope: str) -> str:
        raise NotNow("identity", "there is no identity.", 3)

    with pytest.raises(NotNow, match="there is no identity"):
        await ControlPlane(none, arm.url).register(ASSET)
    assert arm.requests.total() == 0


async def test_another_token_is_refused(arm: ArmServer) -> None:
    arm.token = "another"
    assert (await failure(arm)).reason == "identity"


@pytest.mark.parametrize(
    "url",
    [
        "http://management.azure.com",
        "HTTP://management.azure.com",
        "http://10.0.0.1",
        "http://[fe80::1]",
        "http://127.0.0.1.example.com",
        "http://localhost.example.com",
        "http://127.0.0.1@example.com",
        "http://notlocalhost",
        "http://[::1",
        "ftp://127.0.0.1",
        "management.azure.com",
        "",
    ],
)
async def test_no_token_is_even_asked_for_over_plain_http(url: str) -> None:
    async def never(_scope: str) -> str:
        raise AssertionError

    with pytest.raises(NotNow) as raised:
        await ControlPlane(never, url).resolve(DATASTORE)
    assert raised.value.reason == "identity"


@pytest.mark.parametrize(
    "url",
    ["https://management.azure.com", "http://127.0.0.1:1", "http://127.9.9.9", "http://[::1]:1", "http://localhost"],
)
async def test_a_token_is_asked_for_where_it_can_be_sent(url: str) -> None:
    async def none(scope: str) -> str:
        raise NotNow("asked", scope)

    with pytest.raises(NotNow, match=r"/\.default") as raised:
        await ControlPlane(none, url).resolve(DATASTORE)
    assert raised.value.reason == "asked"


@contextlib.asynccontextmanager
async def http_proxy() -> AsyncIterator[tuple[str, list[bytes]]]:
    """A proxy that hangs up; its URL, and the heads that it has seen."""
    seen: list[bytes] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield "http://127.0.0.1:{1}".format(*server.sockets[0].getsockname()), seen


async def test_the_environment_s_proxy_is_used_and_sees_no_token(
    arm: ArmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm.add_datastore("workspaceblobstore")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with http_proxy() as (url, seen):
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, url)
        await plane(arm).resolve(DATASTORE)
        assert seen == []
        arm.url = azureml.PUBLIC_CLOUD
        assert (await failure(arm)).reason == "unreachable"
        assert all(head.startswith(b"CONNECT management.azure.com:443 ") for head in seen)
        assert seen
        assert TOKEN.encode() not in b"".join(seen)
