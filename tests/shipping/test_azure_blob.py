"""AzureBlobStore: Azure's SDK and real sockets, a server that goes wrong, and what all of that is called."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import ssl
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from urllib.parse import quote

import aiohttp.connector
import pytest
from aiohttp import web

from proxy.shipping import azure_blob, azure_errors
from proxy.shipping.azure_blob import PART_BYTES, Azure, AzureBlobStore
from proxy.shipping.destination import Container, Datastore
from proxy.shipping.store import (
    AbsentError,
    Blob,
    BlobFullError,
    NotNow,
    OtherBlobError,
    PositionTakenError,
)
from tests.azure import faults
from tests.azure.azurite import ACCOUNT_KEY
from tests.azure.blob_server import BlobServer, blob_server
from tests.azure.faults import Fault, refused
from tests.azure.identity import Identity, identity
from tests.shipping.memory import FOREIGN

pytestmark = pytest.mark.usefixtures("_tasks_end")

KEY = base64.b64encode(b"the secret key of the account, which nobody may see").decode()
SIGNATURE = "VerySecretSignature/Of+The+Sas="
SAS = f"sv=2025-01-05&se=2026-11-23T12%3A00%3A00Z&sr=c&sp=racw&sig={quote(SIGNATURE, safe='')}"
MANAGEMENT = "https://management.azure.com"
# The SDK gives parts of 4 MiB to aiohttp as they are; the shipper's loop has nobody to keep waiting.
large = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
NAME = "pre fix/e/d/request/2026/11/22/12/x.jsonl"
LINE = b'{"n": 1}\n'


@pytest.fixture(autouse=True)
def _no_secret_is_told(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """At no level, by nobody's logger."""
    caplog.set_level(logging.DEBUG)
    yield
    records = caplog.get_records("call")
    assert not secrets_in("".join(map(logging.Formatter("%(message)s").format, records)))
    assert not [record for record in records if record.name.split(".")[0] in ("azure", "msal", "urllib3")]


def secrets_in(text: str) -> list[str]:
    secrets = (KEY, SIGNATURE, quote(SIGNATURE), quote(SIGNATURE, safe=""), "SharedKey", ACCOUNT_KEY)
    return [secret for secret in secrets if secret in text]


@pytest.fixture(autouse=True)
def _in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here takes long, but what hangs."""
    for name, value in {"CONNECT_SECONDS": 2, "READ_SECONDS": 0.5, "CALL_SECONDS": 5.0}.items():
        monkeypatch.setattr(azure_blob, name, value)


@pytest.fixture
async def server() -> AsyncIterator[BlobServer]:
    async with blob_server() as server:
        server.containers.add("container")
        yield server


@contextlib.asynccontextmanager
async def opened(
    account_url: str, environ: dict[str, str] | None = None, client_id: str | None = None, name: str = "container"
) -> AsyncIterator[AzureBlobStore]:
    azure = Azure({"AZURE_STORAGE_KEY": KEY} if environ is None else environ, MANAGEMENT)
    store = azure.store(Container(account_url, name), client_id)
    try:
        yield store
    finally:
        await store.close()
        await azure.close()


@pytest.fixture
async def store(server: BlobServer) -> AsyncIterator[AzureBlobStore]:
    async with opened(server.account_url) as store:
        yield store


async def refusal(call: Awaitable[object]) -> NotNow:
    """What ``call`` is refused with. It holds no secret, nor does what is behind it."""
    with pytest.raises(NotNow) as caught:
        await call
    error = caught.value
    told = "".join([repr(error), str(error), error.words, *traceback.format_exception(error)])
    assert not secrets_in(told)
    assert "\n" not in error.words
    return error


async def calls(store: AzureBlobStore, path: Path) -> dict[str, Callable[[], Awaitable[object]]]:
    """Every call of a Store."""
    path.write_bytes(b"a body")
    return {
        "look": lambda: store.look(NAME),
        "create": lambda: store.create(NAME),
        "append": lambda: store.append(NAME, LINE, 0),
        "read": lambda: store.read(NAME, 0, 5),
        "put": lambda: store.put("body", path, "image/png"),
    }


CALLS = ("look", "create", "append", "read", "put")


# --- as it should be ---


async def test_an_append_blob(store: AzureBlobStore, server: BlobServer) -> None:
    assert await store.look(NAME) is None
    await store.create(NAME)
    assert await store.look(NAME) == Blob(0, 0)
    await store.append(NAME, LINE, 0)
    await store.append(NAME, LINE, len(LINE))
    assert await store.look(NAME) == Blob(2 * len(LINE), 2)
    assert await store.read(NAME, 4, 8) == (LINE + LINE)[4:12]
    assert server.blobs[f"container/{NAME}"].content_type == "application/x-ndjson"


async def test_a_blob_is_not_made_twice(store: AzureBlobStore, server: BlobServer) -> None:
    await store.create(NAME)
    await store.append(NAME, LINE, 0)
    await store.create(NAME)
    assert bytes(server.blobs[f"container/{NAME}"].data) == LINE
    assert server.requests["create"] == 2


async def test_reads_end_with_the_blob(store: AzureBlobStore) -> None:
    await store.create(NAME)
    assert await store.read(NAME, 0, 5) == b""
    await store.append(NAME, LINE, 0)
    assert await store.read(NAME, 4, 1000) == LINE[4:]
    assert await store.read(NAME, len(LINE), 1000) == b""
    assert await store.read(NAME, 1000, 1000) == b""


async def test_a_position_that_is_taken(store: AzureBlobStore, server: BlobServer) -> None:
    await store.create(NAME)
    await store.append(NAME, LINE, 0)
    for position in (0, 5, len(LINE) + 1):
        with pytest.raises(PositionTakenError):
            await store.append(NAME, LINE, position)
    assert bytes(server.blobs[f"container/{NAME}"].data) == LINE


async def test_a_blob_that_is_not_there(store: AzureBlobStore) -> None:
    assert await store.look(NAME) is None
    with pytest.raises(AbsentError):
        await store.append(NAME, LINE, 0)
    with pytest.raises(AbsentError):
        await store.read(NAME, 0, 5)


async def test_a_blob_of_another_kind(store: AzureBlobStore, tmp_path: Path) -> None:
    path = tmp_path / "body"
    path.write_bytes(b"a body")
    await store.put(NAME, path, "image/png")
    with pytest.raises(OtherBlobError):
        await store.look(NAME)
    with pytest.raises(OtherBlobError):
        await store.append(NAME, LINE, 6)


async def test_a_full_blob(store: AzureBlobStore, server: BlobServer) -> None:
    server.max_blocks = 2
    await store.create(NAME)
    for number in range(2):
        await store.append(NAME, LINE, number * len(LINE))
    with pytest.raises(BlobFullError):
        await store.append(NAME, LINE, 2 * len(LINE))


@large
@pytest.mark.parametrize("size", [0, 6, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES + 7])
async def test_a_body_of_any_size(store: AzureBlobStore, server: BlobServer, tmp_path: Path, size: int) -> None:
    path = tmp_path / "body"
    path.write_bytes(b"x" * size)
    for _ in range(2):  # a second time replaces it
        await store.put("a body", path, "image/png")
    blob = server.blobs["container/a body"]
    assert (len(blob.data), blob.content_type, blob.kind) == (size, "image/png", "BlockBlob")


@large
async def test_a_large_body_in_the_place_of_another_kind(store: AzureBlobStore, tmp_path: Path) -> None:
    path = tmp_path / "body"
    path.write_bytes(b"x" * (PART_BYTES + 1))
    await store.create("body")
    with pytest.raises(OtherBlobError):
        await store.put("body", path, "image/png")


async def test_a_body_whose_file_is_gone(store: AzureBlobStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await store.put("body", tmp_path / "gone", "image/png")


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("text/plain; charset=utf-8", "text/plain; charset=utf-8"),
        ('multipart/related; a="b, c"', 'multipart/related; a="b, c"'),
        (" text/plain;\t charset=utf-8 ", "text/plain; charset=utf-8"),
        ("text/plain; x=ü", "application/octet-stream"),
        ("text/plain; x=\ufffd", "application/octet-stream"),
        ("text/plain; x=\x85", "application/octet-stream"),
        ("a\x01b", "application/octet-stream"),
        ("", "application/octet-stream"),
    ],
)
async def test_any_content_type_that_a_client_may_send(
    store: AzureBlobStore, server: BlobServer, tmp_path: Path, given: str, sent: str
) -> None:
    """Azure refuses, or finds wrongly signed, what is not ASCII; one client could stop all that is shipped."""
    path = tmp_path / "body"
    path.write_bytes(b"x")
    await store.put("body", path, given)
    assert server.blobs["container/body"].content_type == sent


@pytest.mark.parametrize("name", ["ü ä/日本", "100%/a%20b", "a+b&c=d;e:f@g~h!i'j(k)*l,$", "x y#z"])
async def test_any_name(store: AzureBlobStore, server: BlobServer, name: str) -> None:
    await store.create(name)
    await store.append(name, LINE, 0)
    assert await store.read(name, 0, 100) == LINE
    assert f"container/{name}" in server.blobs


async def test_one_try_per_call(store: AzureBlobStore, server: BlobServer, tmp_path: Path) -> None:
    """Only shipping knows what may be sent again, and when."""
    await store.create(NAME)
    server.requests.clear()
    for fault in (
        faults.INTERNAL_ERROR,
        faults.busy(),
        faults.THROTTLED,
        faults.REQUEST_TIMEOUT,
        faults.NOT_AUTHENTICATED,
    ):
        server.faults = faults.always(fault)
        for name, call in (await calls(store, tmp_path / "body")).items():
            server.requests.clear()
            await refusal(call())
            assert server.requests.total() == 1, name


# --- refusals ---

REFUSALS = [
    # what Azure says, the reason, and what the words have to hold
    (503, "ServerBusy", "busy", "it is busy (503 ServerBusy)"),
    (429, "TooManyRequests", "busy", "429"),
    (408, "RequestTimeout", "busy", "408"),
    (409, "BlobModifiedWhileReading", "busy", "BlobModifiedWhileReading"),
    (412, "LeaseIdMissing", "conflict", "break the lease"),
    (500, "InternalError", "server", "it has a fault of its own (500 InternalError)"),
    (500, "OperationTimedOut", "server", "OperationTimedOut"),
    (502, "", "server", "it has a fault of its own (502)."),
    (429, "", "busy", "it is busy (429)."),
    (400, "InvalidHeaderValue", "unexpected", "it refuses this: 400 InvalidHeaderValue"),
    (413, "RequestBodyTooLarge", "unexpected", "413 RequestBodyTooLarge"),
    (404, "ResourceNotFound", "missing", "it is not there (ResourceNotFound); correct storage.url"),
    (400, "InvalidResourceName", "missing", "the name of the container"),
    (400, "OutOfRangeInput", "missing", "correct storage.url"),
    (400, "BlobTypeNotSupported", "account", "general-purpose v2"),
    (409, "BlobOperationNotSupported", "account", "no append blobs (BlobOperationNotSupported)"),
    (409, "FeatureNotSupportedForAccount", "account", "no append blobs"),
    (409, "FeatureNotYetSupportedForHierarchicalNamespaceAccounts", "account", "no append blobs"),
    (409, "OperationNotSupportedOnPremiumStorage", "account", "no append blobs"),
    (409, "UnsupportedBlobType", "account", "no append blobs"),
    (409, "BlobImmutableDueToPolicy", "forbidden", "immutable by a policy (BlobImmutableDueToPolicy)"),
    (403, "AuthorizationFailure", "forbidden", "firewall or network rules refuse this machine"),
    (
        403,
        "AuthorizationFailure",
        "forbidden",
        "or the account key of AZURE_STORAGE_KEY is wrong: it is not this account's",
    ),
    (
        403,
        "AccountIsDisabled",
        "forbidden",
        "the storage account is disabled; enable it, or see to its subscription (Acc",
    ),
    (403, "AuthorizationSourceIPMismatch", "forbidden", "the SAS is for other addresses than this machine's"),
    (403, "UnauthorizedBlobOverwrite", "forbidden", "the right allows no overwriting"),
    (403, "", "forbidden", "the account key of AZURE_STORAGE_KEY is refused (403): it is not this account's key"),
    (403, "KeyBasedAuthenticationNotPermitted", "forbidden", "unset AZURE_STORAGE_KEY and use an identity"),
    (403, "AuthenticationFailed", "forbidden", "it is not this account's key, or this machine's clock is wrong"),
    (401, "InvalidAuthenticationInfo", "forbidden", "the account key of AZURE_STORAGE_KEY is refused"),
]


@pytest.mark.parametrize("call", ["append", "look"])
@pytest.mark.parametrize(("status", "code", "reason", "words"), REFUSALS)
async def test_every_refusal_has_its_words(
    store: AzureBlobStore,
    server: BlobServer,
    tmp_path: Path,
    status: int,
    code: str,
    reason: str,
    words: str,
    call: str,
) -> None:
    server.faults = faults.always(refused(status, code))
    error = await refusal((await calls(store, tmp_path / "body"))[call]())
    assert error.reason == reason
    assert words in error.words
    if code in azure_errors._OWN_WORDS:
        assert "AZURE_STORAGE_KEY" not in error.words, "it is not the key's fault"


STATED = [
    (412, "AppendPositionConditionNotMet", PositionTakenError),
    (404, "BlobNotFound", AbsentError),
    (404, "", AbsentError),
    (409, "BlockCountExceedsLimit", BlobFullError),
    (409, "InvalidBlobType", OtherBlobError),
]


@pytest.mark.parametrize(("status", "code", "kind"), STATED)
async def test_what_an_append_can_find(
    store: AzureBlobStore, server: BlobServer, status: int, code: str, kind: type[Exception]
) -> None:
    server.faults = faults.always(refused(status, code))
    with pytest.raises(kind):
        await store.append(NAME, LINE, 0)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("fault", "seconds"),
    [(faults.busy(7), 7), (faults.refused(500, "InternalError", 3), 3), (faults.INTERNAL_ERROR, 0)],
)
async def test_the_pause_that_azure_asks_for(
    store: AzureBlobStore, server: BlobServer, tmp_path: Path, fault: Fault, seconds: float, call: str
) -> None:
    server.faults = faults.always(fault)
    error = await refusal((await calls(store, tmp_path / "body"))[call]())
    assert error.retry_after_seconds == seconds


def test_pauses_are_read_in_every_form() -> None:
    class Answer:
        def __init__(self, **headers: str) -> None:
            self.response = self
            self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    for headers, seconds in (
        ({"retry_after": "5"}, 5),
        ({"retry_after_ms": "1500"}, 1.5),
        ({"x_ms_retry_after_ms": "250"}, 0.25),
        ({"retry_after": "-5"}, 0),
        ({"retry_after": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0),
        ({"retry_after": format_datetime(datetime.now(UTC) + timedelta(hours=1))}, pytest.approx(3600, abs=60)),
        ({"retry_after": "soon"}, 0),
        ({}, 0),
    ):
        assert azure_errors._retry_after(Answer(**headers)) == seconds  # type: ignore[arg-type]


# --- the right ---


async def test_a_sas_that_is_refused_says_until_when_it_is_valid(server: BlobServer) -> None:
    async with opened(server.account_url, {"AZURE_STORAGE_SAS_TOKEN": SAS}) as store:
        await store.create(NAME)
        assert server.authorizations[-1] == f"sig={SIGNATURE}"
        server.faults = faults.always(faults.NOT_AUTHENTICATED)
        error = await refusal(store.append(NAME, LINE, 0))
    assert error.reason == "forbidden"
    assert error.words == (
        "the SAS of AZURE_STORAGE_SAS_TOKEN is refused (403 AuthenticationFailed): it has expired at 2026-11-23T12:00:00Z; "
        "put a new one there."
    )


@pytest.mark.parametrize(
    ("expires", "words"),
    [
        ("", "it has to allow read, add, create and write (sp=racw) in this container; put a new one there."),
        ("2020-01-01", "it has expired at 2020-01-01; put a new one there."),
        ("2020-01-01T00:00:00Z", "it has expired at 2020-01-01T00:00:00Z; put a new one there."),
        ("2999-01-01T00:00Z", "it is valid until 2999-01-01T00:00Z, and has to allow read, add, create and write"),
        ("never", "it is valid until never, and has to allow read, add, create and write"),
    ],
)
@pytest.mark.parametrize(
    "code", ["AuthenticationFailed", "AuthorizationPermissionMismatch", "AuthorizationFailure", ""]
)
async def test_what_may_be_wrong_with_a_sas(server: BlobServer, expires: str, words: str, code: str) -> None:
    server.faults = faults.always(refused(403, code))
    sas = f"sv=x{expires and '&se='}{expires}&sig={quote(SIGNATURE, safe='')}"
    async with opened(server.account_url, {"AZURE_STORAGE_SAS_TOKEN": sas}) as store:
        error = await refusal(store.append(NAME, LINE, 0))
    assert words in error.words
    assert "AZURE_STORAGE_SAS_TOKEN is " in error.words
    assert ("firewall" in error.words) == (code == "AuthorizationFailure")
    assert "()" not in error.words


@pytest.mark.parametrize("sas", [f"sv=x&sig={quote(SIGNATURE, safe='')}", f"?{SAS}", f"https://a/c?{SAS}"])
async def test_any_sas_that_is_refused(server: BlobServer, sas: str) -> None:
    server.faults = faults.always(refused(403, "AuthorizationPermissionMismatch"))
    async with opened(server.account_url, {"AZURE_STORAGE_SAS_TOKEN": sas}) as store:
        error = await refusal(store.append(NAME, LINE, 0))
    assert "is refused (403 AuthorizationPermissionMismatch): it has " in error.words


async def test_a_secret_that_is_refused_is_read_again(server: BlobServer, tmp_path: Path) -> None:
    file = tmp_path / "sas"
    file.write_text("sv=x&sig=old")
    async with opened(server.account_url, {"AZURE_STORAGE_SAS_TOKEN_FILE": str(file)}) as store:
        await store.create(NAME)
        file.write_text("sv=x&sig=new")
        await store.look(NAME)
        assert server.authorizations[-1] == "sig=old"
        server.faults = faults.in_turn(faults.NOT_AUTHENTICATED, operation="append")
        error = await refusal(store.append(NAME, LINE, 0))
        assert "AZURE_STORAGE_SAS_TOKEN_FILE" in error.words
        await store.append(NAME, LINE, 0)
        assert server.authorizations[-1] == "sig=new"


async def test_a_secret_that_may_not_make_the_container_is_read_again(server: BlobServer, tmp_path: Path) -> None:
    file = tmp_path / "sas"
    file.write_text("sv=x&sig=old")
    async with opened(server.account_url, {"AZURE_STORAGE_SAS_TOKEN_FILE": str(file)}, name="another") as store:
        server.faults = faults.always(refused(403, "AuthorizationPermissionMismatch"), "create_container")
        error = await refusal(store.look(NAME))
        assert error.reason == "container"
        assert f"there is no container {server.account_url}/another, and it can't be made: the SAS of" in error.words
        file.write_text("sv=x&sig=new")
        server.faults = None
        assert await store.look(NAME) is None
        assert server.authorizations[-1] == "sig=new"


@pytest.mark.parametrize("call", CALLS)
async def test_a_sas_of_a_container_that_is_missing(server: BlobServer, tmp_path: Path, call: str) -> None:
    """It can't make it, nor could another one."""
    server.faults = faults.always(refused(403, "AuthorizationFailure"), "create_container")
    async with opened(server.account_url, {"AZURE_STORAGE_SAS_TOKEN": SAS}, name="another") as store:
        error = await refusal((await calls(store, tmp_path / "body"))[call]())
    assert error.reason == "container"
    assert error.words == (
        f"there is no container {server.account_url}/another; make it "
        "(the SAS of AZURE_STORAGE_SAS_TOKEN is for a container, and can't)."
    )


async def test_a_call_that_is_refused_closes_nothing_under_the_others(
    store: AzureBlobStore, server: BlobServer
) -> None:
    await store.create(NAME)
    server.faults = faults.either(
        faults.in_turn(faults.slow(0.4), operation="look"), faults.always(faults.NOT_AUTHENTICATED, "append")
    )
    slow = asyncio.create_task(store.look(NAME))
    while not server.happened["slow"]:
        await asyncio.sleep(0)
    for result in await asyncio.gather(*(store.append(NAME, LINE, 0) for _ in range(10)), return_exceptions=True):
        assert isinstance(result, NotNow)
        assert result.reason == "forbidden"
    assert not slow.done()
    assert await store.look(NAME) == await slow == Blob(0, 0)
    server.faults = None
    await store.append(NAME, LINE, 0)


async def test_plain_http_wants_a_secret(server: BlobServer) -> None:
    async with opened(server.account_url, {}) as store:
        error = await refusal(store.look(NAME))
    assert error.reason == "identity"
    assert error.words.endswith("plain HTTP, over which no token is sent: use https, or set AZURE_STORAGE_KEY.")
    assert server.requests.total() == 0
    async with opened(server.account_url, client_id="client-1") as store:  # outside Azure, with a YAML from there
        assert await store.look(NAME) is None


@pytest.mark.parametrize(
    "environ",
    [
        {"AZURE_STORAGE_KEY": f"{KEY}!"},
        {"AZURE_STORAGE_SAS_TOKEN": KEY},
        {"AZURE_STORAGE_CONNECTION_STRING": KEY},
        {"AZURE_STORAGE_CONNECTION_STRING": f"AccountName=another;AccountKey={KEY}"},
        {"AZURE_STORAGE_KEY_FILE": "/nowhere"},
    ],
)
async def test_a_secret_that_can_t_be_used(server: BlobServer, environ: dict[str, str]) -> None:
    async with opened(server.account_url, environ) as store:
        error = await refusal(store.look(NAME))
        assert error.reason == "identity"
        assert next(iter(environ)) in error.words
        store._azure.environ = {"AZURE_STORAGE_KEY": KEY}
        assert await store.look(NAME) is None, "it is looked for again"


# --- an identity ---


@pytest.fixture
async def endpoint(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Identity]:
    async with identity() as endpoint:
        for name, value in endpoint.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "ManagedIdentityCredential")  # no others are looked for
        yield endpoint


@pytest.fixture
async def private_server(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[BlobServer]:
    """With TLS, over which alone tokens are sent."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(*certificate)
    trusted = ssl.create_default_context(cafile=certificate[0])
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", trusted)
    async with blob_server(tls=tls) as server:
        server.containers.add("container")
        yield server


async def test_an_identity(private_server: BlobServer, endpoint: Identity, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(private_server.account_url, {}, "client-1") as store:
        await store.create(NAME)
        assert private_server.authorizations[-1] == f"Bearer {endpoint.issued[0]}"
        assert endpoint.asked[0]["client_id"] == "client-1"
        private_server.faults = faults.always(refused(403, "AuthorizationPermissionMismatch"))
        error = await refusal(store.append(NAME, LINE, 0))
        assert error.reason == "forbidden"
        assert error.words == (
            "the identity with client id client-1 may not write there (AuthorizationPermissionMismatch); give it the role "
            "'Storage Blob Data Contributor' on the account or the container (it takes some minutes until a role works)."
        )
        private_server.faults = faults.always(refused(403, "AccountIsDisabled"))
        assert "the storage account is disabled" in (await refusal(store.look(NAME))).words
        for status, code in (
            (401, "InvalidAuthenticationInfo"),
            (401, "NoAuthenticationInformation"),
            (403, "AuthenticationFailed"),
            (403, "SomethingNew"),
            (403, ""),
        ):
            private_server.faults = faults.always(refused(status, code))
            assert (await refusal(store.look(NAME))).words == (
                f"the identity with client id client-1 is refused ({f'{status} {code}'.strip()}): it is of another tenant than "
                "the account, this machine's clock is wrong, or it lacks the role 'Storage Blob Data Contributor'."
            )
        private_server.faults = faults.always(faults.TOKEN_EXPIRED)
        assert (await refusal(store.append(NAME, LINE, 0))).reason == "forbidden"
        private_server.faults = None
        await store.append(NAME, LINE, 0)
    for token in endpoint.issued:
        assert token not in caplog.text
        assert token not in error.words


async def test_an_identity_comes_before_the_secret_of_another_account(
    private_server: BlobServer, endpoint: Identity
) -> None:
    environ = {"AZURE_STORAGE_KEY": KEY, "AZURE_STORAGE_CONNECTION_STRING": f"AccountName=another;AccountKey={KEY}"}
    async with opened(private_server.account_url, environ, "client-1") as store:
        await store.create(NAME)
        assert (await store.opened()).right == "the identity with client id client-1"
    assert private_server.authorizations[-1] == f"Bearer {endpoint.issued[0]}"


async def test_a_token_that_is_refused_once(private_server: BlobServer, endpoint: Identity, tmp_path: Path) -> None:
    """The SDK gets another one and sends the same again: all of it."""
    async with opened(private_server.account_url, {}) as store:
        await store.create(NAME)
        private_server.faults = faults.in_turn(faults.TOKEN_EXPIRED, operation="append")
        await store.append(NAME, LINE, 0)
        assert private_server.requests["append"] == 2
        path = tmp_path / "body"
        path.write_bytes(b"a body")
        private_server.faults = faults.in_turn(faults.TOKEN_EXPIRED, operation="put")
        await store.put("body", path, "image/png")
    assert bytes(private_server.blobs[f"container/{NAME}"].data) == LINE
    assert bytes(private_server.blobs["container/body"].data) == b"a body"


async def test_there_is_no_identity(private_server: BlobServer, endpoint: Identity) -> None:
    for status in (400, 403):
        endpoint.refuses = status
        async with opened(private_server.account_url, {}) as store:
            error = await refusal(store.look(NAME))
            assert error.reason == "identity", status
            assert "there is no token for this machine's identity (tried: " in error.words
            assert "AZURE_STORAGE_CONNECTION_STRING" in error.words
            endpoint.refuses = None
            assert await store.look(NAME) is None, "it is asked again"


# --- the container ---


@pytest.mark.parametrize("call", CALLS)
async def test_a_missing_container_is_made(server: BlobServer, tmp_path: Path, call: str) -> None:
    server.containers.clear()
    async with opened(server.account_url) as store:
        act = (await calls(store, tmp_path / "body"))[call]
        if call in ("append", "read"):
            with pytest.raises(AbsentError):
                await act()
        else:
            assert await act() is None
        assert server.containers == {"container"}
        if call in ("create", "put"):
            assert len(server.blobs) == 1


@pytest.mark.parametrize("call", CALLS)
async def test_a_container_that_is_made_by_somebody_else_meanwhile(
    server: BlobServer, tmp_path: Path, call: str
) -> None:
    server.faults = faults.in_turn(faults.NO_CONTAINER, operation=call)
    async with opened(server.account_url) as store:
        with contextlib.suppress(AbsentError):
            await (await calls(store, tmp_path / "body"))[call]()
    assert server.requests["create_container"] == 1


@pytest.mark.parametrize("code", ["ContainerBeingDeleted", "ContainerDisabled"])
async def test_a_container_that_can_t_be_made_for_now(store: AzureBlobStore, server: BlobServer, code: str) -> None:
    server.faults = faults.always(refused(409, code))
    error = await refusal(store.append(NAME, LINE, 0))
    assert error.reason == "container"
    assert code in error.words
    assert "can't be made" in error.words


async def test_a_container_that_vanishes_again_and_again(
    store: AzureBlobStore, server: BlobServer, tmp_path: Path
) -> None:
    server.faults = faults.always(faults.NO_CONTAINER, "put", "create")
    path = tmp_path / "body"
    path.write_bytes(b"x")
    error = await refusal(store.put("body", path, "image/png"))
    assert error.reason == "container"
    await store.create(NAME)
    assert server.requests["create"] == server.requests["put"] == 2


# --- the way there ---


async def test_a_name_that_no_host_has() -> None:
    async with opened("https://nosuchaccount.blob.core.windows.invalid") as store:
        error = await refusal(store.look(NAME))
    assert error.reason == "unreachable"
    assert error.words == (
        "it can't be reached: there is no host nosuchaccount.blob.core.windows.invalid (is the account's name right?)."
    )


async def test_a_port_where_nobody_listens(store: AzureBlobStore, server: BlobServer) -> None:
    await server.down()
    error = await refusal(store.look(NAME))
    assert error.reason == "unreachable"
    assert f"127.0.0.1:{server.port}" in error.words
    await server.up()
    assert await store.look(NAME) is None


@pytest.mark.parametrize("call", CALLS)
async def test_a_connection_that_breaks(store: AzureBlobStore, server: BlobServer, tmp_path: Path, call: str) -> None:
    await store.create(NAME)
    server.faults = faults.always(faults.RESET, call)
    error = await refusal((await calls(store, tmp_path / "body"))[call]())
    assert error.reason == "unreachable"


@pytest.mark.parametrize("call", CALLS)
async def test_an_answer_that_does_not_come(
    store: AzureBlobStore, server: BlobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(azure_blob, "READ_SECONDS", 0.05)
    server.faults = faults.always(faults.HANG)
    error = await refusal((await calls(store, tmp_path / "body"))[call]())
    assert error.reason == "timeout"
    assert error.words == f"127.0.0.1:{server.port} does not answer in time."


async def test_a_call_that_takes_too_long_as_a_whole(
    store: AzureBlobStore, server: BlobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(azure_blob, "CALL_SECONDS", 0.05)
    server.faults = faults.always(faults.HANG)
    for name, call in (await calls(store, tmp_path / "body")).items():
        assert (await refusal(call())).reason == "timeout", name


async def test_a_large_body_has_more_time(
    store: AzureBlobStore, server: BlobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(azure_blob, "CALL_SECONDS", 0.2)
    monkeypatch.setattr(azure_blob, "SLOWEST_BYTES_PER_SECOND", 1000)
    server.faults = faults.always(faults.slow(0.3))
    path = tmp_path / "body"
    path.write_bytes(b"x")
    assert (await refusal(store.put("body", path, "image/png"))).reason == "timeout"
    path.write_bytes(b"x" * 5000)
    await store.put("body", path, "image/png")


@contextlib.asynccontextmanager
async def answering(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """The account URL of something that listens, and is no Azure Blob Storage."""
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await handle(reader, writer)
        writer.close()

    listener = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/account"
    finally:
        listener.close()
        if tasks:
            await asyncio.wait(tasks)


def saying(answer: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()

    return handle


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nLast-Modified: yesterday\r\nETag: x\r\n\r\n",
        b"HTTP/1.1 206 OK\r\nContent-Length: 0\r\nContent-Range: of course\r\n\r\n",
        b"HTTP/1.1 400 Bad\r\nContent-Type: application/xml\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/elsewhere?sig=x\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["nothing", "ssh", "bad length", "empty page", "bad date", "bad range", "bad xml", "proxy", "redirect"],
)
async def test_something_that_is_not_azure(tmp_path: Path, answer: bytes, call: str) -> None:
    """A proxy or a portal on the way. What is said about it holds no signature, though the SAS is a part of the URL."""
    sas = f"sig={quote(SIGNATURE, safe='')}&sv=2025-01-05"
    async with answering(saying(answer)) as url, opened(url, {"AZURE_STORAGE_SAS_TOKEN": sas}, name="c") as store:
        error = await refusal((await calls(store, tmp_path / "body"))[call]())
    assert error.reason in ("unreachable", "unexpected", "identity", "forbidden")
    assert "elsewhere" not in error.words


@pytest.mark.parametrize(
    ("answer", "call"),
    [("404 Not Found", "create"), ("404 Not Found", "put"), ("201 Created", "append"), ("201 Created", "put")],
)
async def test_what_is_not_azure_delivers_nothing(tmp_path: Path, answer: str, call: str) -> None:
    """A wrong port, or a gateway."""
    async with (
        answering(saying(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n".encode())) as url,
        opened(url) as store,
    ):
        error = await refusal((await calls(store, tmp_path / "body"))[call]())
        assert error.reason == "unexpected"
        assert f"what answers at {url}/container is not Azure Blob Storage" in error.words


async def test_a_probe_of_what_is_not_azure(tmp_path: Path) -> None:
    async with answering(saying(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")) as url, opened(url) as store:
        error = await refusal(store.probe("folder/"))
    assert "is not Azure Blob Storage (404); correct storage.url" in error.words


async def test_a_probe_whose_blob_is_not_there() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        made = head.startswith(b"PUT ") and b"comp=appendblock" not in head
        writer.write(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % (b"201 Created" if made else b"404 Not Found"))
        await writer.drain()

    async with answering(handle) as url, opened(url) as store:
        error = await refusal(store.probe("folder/"))
    assert "is not Azure Blob Storage (404); correct storage.url" in error.words


@pytest.mark.parametrize("call", CALLS)
async def test_a_redirect_is_not_followed(tmp_path: Path, call: str) -> None:
    """Nor does what would be at its end get to see the secret."""
    seen = []

    async def elsewhere(request: web.BaseRequest) -> web.Response:
        seen.append(request.url)
        return web.Response()

    there = web.Server(elsewhere)
    listener = await asyncio.get_running_loop().create_server(there, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    answer = f"HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:{port}/account/c/x\r\nContent-Length: 0\r\n\r\n"
    try:
        async with answering(saying(answer.encode())) as url, opened(url, {"AZURE_STORAGE_SAS_TOKEN": SAS}) as store:
            await refusal((await calls(store, tmp_path / "body"))[call]())
    finally:
        listener.close()
        await there.shutdown(0)
    assert seen == []


async def test_tls_where_there_is_none(server: BlobServer, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(server.account_url.replace("http:", "https:")) as store:
        error = await refusal(store.look(NAME))
    assert error.reason == "unreachable"
    assert "SSL" in error.words


async def test_a_certificate_that_nobody_vouches_for(certificate: tuple[Path, Path]) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(*certificate)
    async with blob_server(tls=tls) as server, opened(server.account_url) as store:
        error = await refusal(store.look(NAME))
    assert error.reason == "unreachable"
    assert "certificate" in error.words.lower()


# --- the probe ---


async def test_a_probe_leaves_nothing(store: AzureBlobStore, server: BlobServer) -> None:
    server.containers.clear()
    ahead, left = await store.probe("pre fix/")
    assert abs(ahead) < 5
    assert left == ""
    assert server.blobs == {}


async def test_a_probe_that_can_t_be_removed(store: AzureBlobStore, server: BlobServer) -> None:
    server.faults = faults.always(faults.NOT_PERMITTED, "delete")
    _, left = await store.probe("pre fix/")
    assert "could not be removed" in left
    assert len(server.blobs) == 1


@pytest.mark.parametrize("operation", ["look", "create", "append", "read"])
async def test_a_probe_that_is_refused(store: AzureBlobStore, server: BlobServer, operation: str) -> None:
    server.faults = faults.always(faults.NOT_PERMITTED, operation)
    assert (await refusal(store.probe("pre fix/"))).reason == "forbidden"


async def test_a_probe_in_which_somebody_else_writes(store: AzureBlobStore, server: BlobServer) -> None:
    server.faults = faults.always(faults.foreign(FOREIGN), "append")
    assert (await refusal(store.probe("pre fix/"))).reason == "unexpected"


# --- what is shown ---


async def test_what_stands_for_a_store(server: BlobServer) -> None:
    async with opened(server.account_url) as store:
        assert store.url == f"{server.account_url}/container"
        found = await store.opened()
        assert found.right == "the account key of AZURE_STORAGE_KEY"
        assert not secrets_in(repr(found) + repr(store) + repr(store._azure))
        assert server.requests.total() == 0
    datastore = Datastore("s", "r", "w", "d")
    assert Azure({}, MANAGEMENT).store(datastore, None).url == datastore.url


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ('{"upn": "a@b", "tid": "t"}', "a@b, tenant t"),
        ('{"appid": "1", "oid": "2"}', "client 1, object 2"),
        ("{}", ""),
        ("[]", "a token that does not say for whom"),
        ("no json", "a token that does not say for whom"),
    ],
)
def test_whom_a_token_is_for(claims: str, words: str) -> None:
    middle = base64.urlsafe_b64encode(claims.encode()).decode().rstrip("=")
    assert azure_blob._who(f"head.{middle}.signature") == words
    assert azure_blob._who("none") == "a token that does not say for whom"
