"""Azure Blob Storage as a Store. The only module that imports ``azure.*``, and it does so when it is first needed.

The SDK's own retries are off: a block that is sent again has to be sent at the same position, which only shipping knows.
Errors are told apart by Azure's error codes:
https://learn.microsoft.com/rest/api/storageservices/blob-service-error-codes
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from proxy.shipping import credentials
from proxy.shipping.azureml import ControlPlane, ResolvedDatastore
from proxy.shipping.destination import Container, Destination
from proxy.shipping.store import (
    AbsentError,
    Blob,
    BlobFullError,
    NotNow,
    OtherBlobError,
    PositionTakenError,
)

if TYPE_CHECKING:
    from azure.core.credentials_async import AsyncTokenCredential
    from azure.core.exceptions import AzureError, HttpResponseError
    from azure.storage.blob.aio import BlobClient, ContainerClient

STORAGE_SCOPE = "https://storage.azure.com/.default"
CONNECT_SECONDS = 10
READ_SECONDS = 60
CALL_SECONDS = 90.0  # one call, however the connection behaves
SLOWEST_BYTES_PER_SECOND = 64 * 1024
PART_BYTES = 4 * 1024 * 1024  # larger bodies go up in blocks of this size
LINES_TYPE = "application/x-ndjson"
_CREDENTIAL_REASONS = frozenset({"identity", "forbidden"})
_ROLE = "Storage Blob Data Contributor"
_NO_APPEND_BLOBS = frozenset(
    {
        "BlobTypeNotSupported",
        "BlobOperationNotSupported",
        "FeatureNotSupportedForAccount",
        "FeatureNotYetSupportedForHierarchicalNamespaceAccounts",
        "OperationNotSupportedOnPremiumStorage",
        "UnsupportedBlobType",
    }
)


class Azure:
    """Opens stores. One for the process: it keeps the identities. ``environ`` holds the secrets, if there are any."""

    def __init__(self, environ: Mapping[str, str], management_url: str) -> None:
        self.environ = environ
        self._management_url = management_url
        self._identities: dict[str | None, AsyncTokenCredential] = {}
        for name in ("azure", "msal", "urllib3"):  # they log whole requests
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)

    def store(self, place: Destination, client_id: str | None) -> AzureBlobStore:
        return AzureBlobStore(self, place, client_id)

    def identity(self, client_id: str | None) -> AsyncTokenCredential:
        """Whatever identity this machine has: workload identity, managed identity, az login, …; or that of ``client_id``."""
        from azure.identity.aio import DefaultAzureCredential

        if client_id not in self._identities:
            chosen = (
                {}
                if client_id is None
                else {"managed_identity_client_id": client_id, "workload_identity_client_id": client_id}
            )
            self._identities[client_id] = DefaultAzureCredential(**chosen)
        return self._identities[client_id]

    async def token(self, scope: str, client_id: str | None = None) -> str:
        """A bearer token. Raises NotNow."""
        with _azure_errors(scope):
            async with asyncio.timeout(CALL_SECONDS):
                return (await self.identity(client_id).get_token(scope)).token
        raise AssertionError

    def control_plane(self, client_id: str | None) -> ControlPlane:
        """Azure ML's, with the identity of ``client_id``."""
        return ControlPlane(lambda scope: self.token(scope, client_id), self._management_url)

    async def who(self, client_id: str | None) -> str:
        """Whom the identity resolves to, by the claims of its token. Raises NotNow."""
        return _who(await self.token(STORAGE_SCOPE, client_id))

    async def close(self) -> None:
        for identity in self._identities.values():
            await identity.close()
        self._identities.clear()


class AzureBlobStore:
    """A Store. It finds out where a datastore leads, and which secret to use, at the first call, and again when it is refused."""

    def __init__(self, azure: Azure, place: Destination, client_id: str | None) -> None:
        self._azure = azure
        self._place = place
        self._client_id = client_id
        self._lock = asyncio.Lock()
        self._client: ContainerClient | None = None
        self._calls = 0  # under way
        self._refused = False  # the secret, or the place, may be another one by now
        self._opened: Opened | None = None

    async def look(self, name: str) -> Blob | None:
        try:
            async with self._blob(name) as blob:
                found = await blob.get_blob_properties()
        except AbsentError:
            return None
        if found.blob_type is None:
            raise NotNow("unexpected", f"{self.url}: what answers there is not Azure Blob Storage.")
        if found.blob_type != "AppendBlob":
            raise OtherBlobError(name)
        return Blob(found.size, found.append_blob_committed_block_count or 0)

    async def create(self, name: str) -> None:
        from azure.core import MatchConditions
        from azure.storage.blob import ContentSettings

        for _ in range(2):  # the second time if the container had to be made
            try:
                async with self._blob(name) as blob:
                    await blob.create_append_blob(
                        ContentSettings(content_type=LINES_TYPE), match_condition=MatchConditions.IfMissing
                    )
            except _ContainerMadeError:
                continue
            except _ExistsError:
                pass
            return

    async def append(self, name: str, data: bytes, position: int) -> None:
        # Closed at the end: what the SDK keeps of a request in cycles would keep its megabytes until they are collected.
        with io.BytesIO(data) as block:
            async with self._blob(name) as blob:
                await blob.append_block(
                    block,
                    len(data),
                    appendpos_condition=position,
                    raw_response_hook=lambda _: block.seek(0),  # the SDK sends it again when a token is refused
                )

    async def read(self, name: str, start: int, size: int) -> bytes:
        with contextlib.suppress(_BeyondError):
            async with self._blob(name) as blob:
                content: bytes = await (await blob.download_blob(start, size)).readall()
                return content
        return b""

    async def put(self, name: str, path: Path, content_type: str) -> None:
        from azure.storage.blob import ContentSettings

        settings = ContentSettings(content_type=_signable(content_type))
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for _ in range(2):  # the second time if the container had to be made
                with contextlib.suppress(_ContainerMadeError):
                    async with self._blob(name, more_seconds=size / SLOWEST_BYTES_PER_SECOND) as blob:
                        await blob.upload_blob(
                            file, length=size, overwrite=True, max_concurrency=1, content_settings=settings
                        )
                        return
                file.seek(0)
            raise NotNow("container", f"there is no container {self.url}; it was made, and has vanished again.")

    async def probe(self, folder: str) -> tuple[float, str]:
        """Makes an append blob in ``folder``, appends to it, reads it and removes it. Raises NotNow.

        Returns by how many seconds this machine's clock is ahead, and in words what could not be removed.
        """
        name = f"{folder}.payload-logger-probe-{uuid.uuid4()}"
        line = b"payload-logger\n"
        answered: list[float] = []
        try:
            await self.look(name)  # makes the container if need be
            await self.create(name)
            await self.append(name, line, 0)
            if await self.read(name, 0, len(line)) != line:
                raise NotNow("unexpected", f"{name} does not hold what was appended to it.")
        except (PositionTakenError, AbsentError, BlobFullError, OtherBlobError) as error:
            raise NotNow("unexpected", f"{name} was changed by somebody else ({type(error).__name__}).") from None
        try:
            async with self._blob(name) as blob:
                await blob.get_blob_properties(
                    raw_response_hook=lambda answer: answered.append(
                        _date(answer.http_response.headers.get("Date", ""))
                    )
                )
                await blob.delete_blob()
        except (NotNow, AbsentError):
            return _ahead(
                answered
            ), f"the probe {name} could not be removed, it may not delete; nothing else needs that"
        return _ahead(answered), ""

    async def opened(self) -> Opened:
        """Where this store leads, and by what right. Raises NotNow."""
        async with self._lock:
            if self._opened is None:
                self._opened = await self._find()
            return self._opened

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    @property
    def url(self) -> str:
        return self._opened.container.url if self._opened is not None else self._place.url

    @contextlib.asynccontextmanager
    async def _blob(self, name: str, *, more_seconds: float = 0.0) -> AsyncIterator[BlobClient]:
        """The blob ``name``; what goes wrong with it is told in the words of Store. A missing container is made."""
        client = await self._open()
        self._calls += 1
        try:
            with _azure_errors(self.url, self._opened):
                async with asyncio.timeout(CALL_SECONDS + more_seconds):
                    yield client.get_blob_client(name)
        except NotNow as error:
            if error.reason == "container":
                await self._make_container(client)
                raise _ContainerMadeError from None
            self._refused |= error.reason in _CREDENTIAL_REASONS
            raise
        finally:
            self._calls -= 1

    async def _make_container(self, client: ContainerClient) -> None:
        try:
            with contextlib.suppress(_ExistsError), _azure_errors(self.url, self._opened):
                async with asyncio.timeout(CALL_SECONDS):
                    await client.create_container()
        except NotNow as error:
            self._refused |= error.reason in _CREDENTIAL_REASONS
            raise NotNow(
                "container", f"there is no container {self.url}, and it can't be made: {error.words}"
            ) from None

    async def _open(self) -> ContainerClient:
        async with self._lock:
            if self._refused and not self._calls:
                await self.close()
            if self._client is None:
                self._opened = await self._find()
                self._client = self._connect(self._opened)
                self._refused = False
            return self._client

    async def _find(self) -> Opened:
        if isinstance(self._place, Container):
            container, secret = self._place, credentials.secret(self._azure.environ, self._place)
        else:
            found: ResolvedDatastore = await self._azure.control_plane(self._client_id).resolve(self._place)
            container = found.container
            secret = credentials.secret(self._azure.environ, container) if self._client_id is None else None
            if secret is None and (found.account_key or found.sas_token):
                secret = credentials.Secret(f"datastore {self._place.name}", found.account_key, found.sas_token)
        if secret is None and container.account_url.startswith("http:"):
            raise NotNow(
                "identity", "it is plain HTTP, over which no token is sent: use https, or set AZURE_STORAGE_KEY."
            )
        return Opened(container, secret, self._client_id)

    def _connect(self, opened: Opened) -> ContainerClient:
        from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
        from azure.storage.blob.aio import ContainerClient

        credential: Any
        if opened.secret is None:
            credential = self._azure.identity(self._client_id)
        elif opened.secret.account_key is not None:
            credential = AzureNamedKeyCredential(opened.container.account, opened.secret.account_key)
        else:
            credential = AzureSasCredential(opened.secret.sas_token or "")
        return ContainerClient(
            opened.container.account_url,
            opened.container.name,
            credential=credential,
            retry_total=0,
            permit_redirects=False,
            connection_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            max_single_put_size=PART_BYTES,
            max_block_size=PART_BYTES,
            max_single_get_size=PART_BYTES,
        )


@dataclass(frozen=True, slots=True)
class Opened:
    """Where a store leads, and by what right: a secret, or an identity, that of ``client_id`` if there is one."""

    container: Container
    secret: credentials.Secret | None
    client_id: str | None

    @property
    def right(self) -> str:
        """In words."""
        if self.secret is None:
            return f"the identity with client id {self.client_id}" if self.client_id else "this machine's identity"
        return f"{'the account key' if self.secret.account_key else 'the SAS'} of {self.secret.source}"


class _ExistsError(Exception):
    """What was to be made is there already."""


class _ContainerMadeError(AbsentError):
    """The container was missing, and is there now, empty."""


class _BeyondError(Exception):
    """The blob ends before that."""


class _azure_errors:  # noqa: N801
    """Turns what the SDK raises into the words of Store: ``with _azure_errors(url, opened): …``."""

    def __init__(self, url: str, opened: Opened | None = None) -> None:
        self._url = url
        self._opened = opened

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is None:
            return
        from azure.core.exceptions import (
            AzureError,
            ClientAuthenticationError,
            HttpResponseError,
            ServiceRequestTimeoutError,
            ServiceResponseTimeoutError,
        )

        if isinstance(error, HttpResponseError) and error.status_code is not None:
            raise _refusal(error, self._url, self._opened) from None
        if isinstance(error, ClientAuthenticationError):
            raise NotNow("identity", _no_identity(error, self._opened)) from None
        if isinstance(error, TimeoutError | ServiceRequestTimeoutError | ServiceResponseTimeoutError):
            raise NotNow("timeout", f"{_host(self._url)} does not answer in time.") from None
        if isinstance(error, AzureError):
            raise NotNow("unreachable", f"it can't be reached: {_connection_words(error, self._url)}.") from None
        if isinstance(error, ValueError | LookupError):  # of the SDK, which does not find what Azure's answers have
            raise NotNow("unexpected", f"{_host(self._url)} does not answer as Azure does.") from None


def _refusal(error: HttpResponseError, url: str, opened: Opened | None) -> Exception:
    code = _code(error)
    status = error.status_code or 0
    stated = {
        "AppendPositionConditionNotMet": PositionTakenError,
        "BlobNotFound": AbsentError,
        "BlockCountExceedsLimit": BlobFullError,
        "InvalidBlobType": OtherBlobError,
        "BlobAlreadyExists": _ExistsError,
        "ContainerAlreadyExists": _ExistsError,
        "InvalidRange": _BeyondError,
    }.get(code)
    if stated is not None:
        return stated(url)
    if code in ("ContainerNotFound", "ContainerBeingDeleted", "ContainerDisabled"):
        return NotNow("container", f"there is no such container ({code}); make it, or correct storage.url.")
    if status == 404:
        if not code:  # a HEAD request has no body, and some servers no code
            return AbsentError(url)
        return NotNow("missing", f"it is not there ({code}); correct storage.url.")
    if code in _NO_APPEND_BLOBS:
        return NotNow(
            "account",
            f"this storage account has no append blobs ({code}); use a general-purpose v2 account "
            "(or a premium one for block blobs).",
        )
    if code.startswith("BlobImmutable"):
        return NotNow("forbidden", f"the blob is immutable by a policy ({code}); allow protected append writes in it.")
    if status in (401, 403):
        return NotNow(*_forbidden(error, code, opened))
    if status in (408, 429, 503) or code in ("BlobModifiedWhileReading", "ServerBusy", "LeaseIdMissing"):
        return NotNow("busy", f"it is busy ({status} {code}).", _retry_after(error))
    if status >= 500:
        return NotNow("server", f"it has a fault of its own ({status} {code}).", _retry_after(error))
    return NotNow("unexpected", f"it refuses this: {status} {code or error.reason}.", _retry_after(error))


def _forbidden(error: HttpResponseError, code: str, opened: Opened | None) -> tuple[str, str]:
    secret = opened.secret if opened is not None else None
    right = opened.right if opened is not None else "this machine's identity"
    if code == "AuthorizationFailure":
        return "forbidden", f"the account's firewall or network rules refuse this machine ({code})."
    if code == "KeyBasedAuthenticationNotPermitted":
        return (
            "forbidden",
            f"the account allows no keys ({code}); unset {secret.source if secret else 'the key'} and use an identity.",
        )
    if secret is not None and secret.sas_token is not None:
        expires = parse_qs(secret.sas_token).get("se", ["?"])[0]
        return "forbidden", (
            f"{right} is refused ({code}). It is valid until {expires}, and has to allow "
            "read, add, create and write (sp=racw); put a new one there."
        )
    if secret is not None:
        return (
            "forbidden",
            f"{right} is refused ({code}): it is not this account's key, or this machine's clock is wrong.",
        )
    if code in ("AuthorizationPermissionMismatch", "InsufficientAccountPermissions", "AuthorizationPermissionDenied"):
        return "forbidden", (
            f"{right} may not write there ({code}); give it the role {_ROLE!r} on the account or the container "
            "(it takes some minutes until a role works)."
        )
    return "forbidden", f"{right} is refused ({error.status_code} {code})."


def _no_identity(error: AzureError, opened: Opened | None) -> str:
    right = opened.right if opened is not None else "this machine's identity"
    tried = sorted(set(re.findall(r"\b(\w+)Credential:", str(error))))
    return (
        f"there is no token for {right} (tried: {', '.join(tried) or 'all ways'}). Use workload or managed identity, "
        "'az login', or set AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN."
    )


def _connection_words(error: AzureError, url: str) -> str:
    host = _host(url)
    cause = getattr(error, "inner_exception", None) or error
    text = str(getattr(cause, "os_error", None) or cause)
    if re.search(r"not known|nodename|getaddrinfo|no address|name resolution|domain name", text, re.IGNORECASE):
        return f"there is no host {host} (is the account's name right?)"
    text = " ".join(text.partition("?")[0].split())  # no query: a SAS would be in it
    return f"{host}: {text[:200].rstrip('.')}"


def _host(url: str) -> str:
    return urlsplit(url).netloc or url


def _signable(content_type: str) -> str:
    """As a header's value that Azure takes, and finds rightly signed: it comes from a client, and may be anything."""
    words = " ".join(content_type.split())
    return words if content_type.isascii() and words.isprintable() else "application/octet-stream"


def _date(header: str) -> float:
    with contextlib.suppress(TypeError, ValueError):
        return parsedate_to_datetime(header).timestamp()
    return time.time()


def _ahead(answered: list[float]) -> float:
    return time.time() - answered[0] if answered else 0.0


def _who(token: str) -> str:
    with contextlib.suppress(IndexError, ValueError, AttributeError):
        claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
        names = {"xms_mirid": "", "upn": "", "unique_name": "", "appid": "client ", "oid": "object ", "tid": "tenant "}
        return ", ".join(f"{words}{claims[name]}" for name, words in names.items() if claims.get(name))
    return "a token that does not say for whom"


def _code(error: HttpResponseError) -> str:
    code: Any = getattr(error, "error_code", None) or _headers(error).get("x-ms-error-code")
    return str(getattr(code, "value", code) or "")


def _headers(error: HttpResponseError) -> Mapping[str, str]:
    headers: Mapping[str, str] = getattr(error.response, "headers", {})
    return headers


def _retry_after(error: HttpResponseError) -> float:
    """In seconds; 0 if it does not say."""
    for name, unit in (("retry-after-ms", 0.001), ("x-ms-retry-after-ms", 0.001), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            return max(0.0, float(_headers(error)[name]) * unit)
    return 0.0
