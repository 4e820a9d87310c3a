"""Azure's own credential with the managed identity of the tests, and Azurite, which looks at its tokens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
from azure.core.credentials import AccessToken
from azure.core.credentials_async import AsyncTokenCredential
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError
from azure.core.pipeline.transport import AioHttpTransport
from azure.identity.aio import ManagedIdentityCredential
from azure.storage.blob.aio import BlobClient, BlobServiceClient

from tests.azure.azurite import Azurite, azurite
from tests.azure.identity import STORAGE, Identity, identity, token
from tests.drills.load import until


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, certificate: tuple[Path, Path]) -> Iterator[Azurite]:
    with azurite(tmp_path_factory.mktemp("azurite"), in_memory=True, tls=certificate, oauth=True) as server:
        yield server


@pytest.fixture
async def endpoint(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Identity]:
    async with identity() as endpoint:
        for name, value in endpoint.environment.items():
            monkeypatch.setenv(name, value)
        yield endpoint


@contextlib.asynccontextmanager
async def new_log(real: Azurite, certificate: tuple[Path, Path], credential: object) -> AsyncIterator[BlobClient]:
    """A new append blob."""
    trusted = ssl.create_default_context(cafile=certificate[0])
    transport = AioHttpTransport(session=aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusted)))
    async with BlobServiceClient(real.account_url, credential, transport=transport, retry_total=0) as client:
        container = await client.create_container(uuid.uuid4().hex)
        blob = container.get_blob_client("x.jsonl")
        await blob.create_append_blob()
        yield blob


async def test_azurite_takes_the_tokens(real: Azurite, certificate: tuple[Path, Path], endpoint: Identity) -> None:
    async with (
        ManagedIdentityCredential(client_id="of-the-user", retry_total=0) as credential,
        new_log(real, certificate, credential) as blob,
    ):
        for position in range(3):
            await blob.append_block(b"a", appendpos_condition=position)
    assert len(endpoint.issued) == 1
    assert endpoint.asked == [{"api-version": "2019-08-01", "resource": STORAGE, "client_id": "of-the-user"}]


async def test_a_token_that_is_over_is_replaced(
    real: Azurite, certificate: tuple[Path, Path], endpoint: Identity
) -> None:
    endpoint.lifetime_seconds = 2
    async with ManagedIdentityCredential(retry_total=0) as credential, new_log(real, certificate, credential) as blob:
        issued, over = len(endpoint.issued), time.time() + 2
        await until(lambda: time.time() > over)
        await blob.append_block(b"a", appendpos_condition=0)
        assert len(endpoint.issued) == issued + 1
    assert len(set(endpoint.issued)) == len(endpoint.issued)


async def test_an_identity_that_gives_no_token(
    real: Azurite, certificate: tuple[Path, Path], endpoint: Identity
) -> None:
    endpoint.refuses = 400
    with pytest.raises(ClientAuthenticationError):
        async with (
            ManagedIdentityCredential(retry_total=0) as credential,
            new_log(real, certificate, credential),
        ):
            pass
    assert (len(endpoint.asked), endpoint.issued) == (1, [])


class Given(AsyncTokenCredential):
    """Always the same token."""

    def __init__(self, given: str) -> None:
        self.given = given

    async def get_token(self, *_scopes: str, **_options: object) -> AccessToken:
        return AccessToken(self.given, int(time.time()) + 3600)

    async def close(self) -> None: ...

    async def __aexit__(self, *_exception: object) -> None: ...


@pytest.mark.parametrize(
    "given", [token(lifetime_seconds=-1), token("https://management.azure.com")], ids=["over", "for something else"]
)
async def test_azurite_refuses_other_tokens(real: Azurite, certificate: tuple[Path, Path], given: str) -> None:
    with pytest.raises(HttpResponseError) as caught:
        async with new_log(real, certificate, Given(given)):
            pass
    assert caught.value.response is not None
    assert (caught.value.status_code, caught.value.response.headers["x-ms-error-code"]) == (403, "AuthenticationFailed")


async def test_a_process_trusts_the_certificate_that_its_environment_names(
    real: Azurite, certificate: tuple[Path, Path], endpoint: Identity
) -> None:
    """SSL_CERT_FILE, which aiohttp reads when it is imported."""
    program = f"""
import asyncio
from azure.identity.aio import ManagedIdentityCredential
from azure.storage.blob.aio import BlobServiceClient

async def main():
    async with ManagedIdentityCredential() as credential:
        async with BlobServiceClient("{real.account_url}", credential, retry_total=0) as client:
            await client.create_container("{uuid.uuid4().hex}")

asyncio.run(main())
"""
    environment = os.environ | endpoint.environment | {"SSL_CERT_FILE": str(certificate[0])}
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(endpoint.issued) == 1
