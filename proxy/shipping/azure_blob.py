"""Azure Blob Storage as a Store. With ``azure_errors.py`` the only one that imports ``azure.*``, when it is first needed.

The SDK's own retries are off: a block that is sent again has to be sent at the same position, which only shipping knows.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy.shipping import credentials
from proxy.shipping.azure_errors import BeyondError, ExistsError, azure_errors
from proxy.shipping.azureml import ControlPlane, ResolvedDatastore
from proxy.shipping.credentials import Opened
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
    from azure.storage.blob.aio import BlobClient, ContainerClient

STORAGE_SCOPE = "https://storage.azure.com/.default"
CONNECT_SECONDS = 10
READ_SECONDS = 60
CALL_SECONDS = 90.0  # one call, however the connection behaves
SLOWEST_BYTES_PER_SECOND = 64 * 1024
PART_BYTES = 4 * 1024 * 1024  # larger bodies go up in blocks of this size
LINES_TYPE = "application/x-ndjson"
_CREDENTIAL_REASONS = frozenset({"identity", "forbidden"})


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
        with azure_errors(scope):
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
            raise self._not_azure("no type of the blob")
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
            except ExistsError:
                pass
            except AbsentError:
                raise self._not_azure("404") from None
            return

    async def append(self, name: str, data: bytes, position: int) -> None:
        # Closed at the end: what the SDK keeps of a request in cycles would keep its megabytes until they are collected.
        with io.BytesIO(data) as block:
            async with self._blob(name) as blob:
                done = await blob.append_block(
                    block,
                    len(data),
                    appendpos_condition=position,
                    raw_response_hook=lambda _: block.seek(0),  # the SDK sends it again when a token is refused
                )
        if str(done.get("blob_append_offset")) != str(position):
            raise self._not_azure("no offset of the append")

    async def read(self, name: str, start: int, size: int) -> bytes:
        with contextlib.suppress(BeyondError):
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
                try:
                    async with self._blob(name, more_seconds=size / SLOWEST_BYTES_PER_SECOND) as blob:
                        done = await blob.upload_blob(
                            file, length=size, overwrite=True, max_concurrency=1, content_settings=settings
                        )
                except _ContainerMadeError:
                    file.seek(0)
                    continue
                except AbsentError:
                    raise self._not_azure("404") from None
                if not done.get("request_id"):
                    raise self._not_azure("no id of the request")
                return
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
        except AbsentError:
            raise self._not_azure("404") from None
        except (PositionTakenError, BlobFullError, OtherBlobError) as error:
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

    def _not_azure(self, what: str) -> NotNow:
        return NotNow(
            "unexpected", f"what answers at {self.url} is not Azure Blob Storage ({what}); correct storage.url."
        )

    @contextlib.asynccontextmanager
    async def _blob(self, name: str, *, more_seconds: float = 0.0) -> AsyncIterator[BlobClient]:
        """The blob ``name``; what goes wrong with it is told in the words of Store. A missing container is made."""
        client = await self._open()
        self._calls += 1
        try:
            with azure_errors(self.url, self._opened):
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
            with contextlib.suppress(ExistsError), azure_errors(self.url, self._opened):
                async with asyncio.timeout(CALL_SECONDS):
                    await client.create_container()
        except NotNow as error:
            self._refused |= error.reason in _CREDENTIAL_REASONS
            words = f"there is no container {self.url}, and it can't be made: {error.words}"
            secret = self._opened.secret if self._opened is not None else None
            if error.reason == "forbidden" and secret is not None and secret.of_one_container:
                words = f"there is no container {self.url}; make it (the SAS of {secret.source} is for a container, and can't)."
            raise NotNow("container", words) from None

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
            container = self._place
            secret = credentials.secret(self._azure.environ, container, or_identity=self._client_id is not None)
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


class _ContainerMadeError(AbsentError):
    """The container was missing, and is there now, empty."""


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
