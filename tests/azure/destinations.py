"""The destinations that one contract holds for: local disk, the blob server of the tests, Azurite, Azurite with tokens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from azure.storage.blob import ContainerClient

from tests.azure.azurite import ACCOUNT_KEY, Azurite, azurite
from tests.azure.blob_server import ACCOUNT, blob_server
from tests.azure.identity import Identity, identity

CONTAINER = "payloads"
Stored = dict[str, tuple[bytes, str | None]]  # by name below the storage URL: content, and content type if it has one


@dataclass
class Destination:
    """``url`` is for ``storage.url``, ``environment`` holds the right to it, ``read`` returns all that is there."""

    url: str
    read: Callable[[], Stored]
    environment: dict[str, str] = field(default_factory=dict)
    azurite: Azurite | None = None
    identity: Identity | None = None

    async def content(self) -> Stored:
        return await asyncio.to_thread(self.read)


async def _local(folder: Path) -> AsyncIterator[Destination]:
    root = folder / "data"

    def read() -> Stored:
        files = [path for path in root.rglob("*") if path.is_file() and ".payload-logger" not in path.parts]
        return {path.relative_to(root).as_posix(): (path.read_bytes(), None) for path in files}

    yield Destination(root.as_uri(), read)


async def _blob_server(_folder: Path) -> AsyncIterator[Destination]:
    async with blob_server() as server:

        def read() -> Stored:
            prefix = f"{CONTAINER}/pre fix/"
            return {
                key.removeprefix(prefix): (bytes(blob.data), blob.content_type)
                for key, blob in server.blobs.items()
                if key.startswith(prefix)
            }

        yield Destination(
            f"{server.account_url}/{CONTAINER}/pre%20fix",
            read,
            {"AZURE_STORAGE_CONNECTION_STRING": "UseDevelopmentStorage=true"},
        )


def _reader(server: Azurite, verify: bool | str = True) -> Callable[[], Stored]:
    def read() -> Stored:
        credential = {"account_name": ACCOUNT, "account_key": ACCOUNT_KEY}
        with ContainerClient(server.account_url, CONTAINER, credential, connection_verify=verify) as container:
            names = [blob.name for blob in container.list_blobs("pre fix/")] if container.exists() else []
            found = {name: container.download_blob(name) for name in names}
            return {
                name.removeprefix("pre fix/"): (blob.readall(), blob.properties.content_settings.content_type)
                for name, blob in found.items()
            }

    return read


async def _azurite(folder: Path) -> AsyncIterator[Destination]:
    with azurite(folder / "azurite") as server:
        yield Destination(
            f"{server.account_url}/{CONTAINER}/pre%20fix",
            _reader(server),
            {"AZURE_STORAGE_KEY": ACCOUNT_KEY},
            azurite=server,
        )


async def _azurite_with_tokens(folder: Path, certificate: tuple[Path, Path]) -> AsyncIterator[Destination]:
    with azurite(folder / "azurite", tls=certificate, oauth=True) as server:
        async with identity(lifetime_seconds=5) as endpoint:
            yield Destination(
                f"{server.account_url}/{CONTAINER}/pre%20fix",
                _reader(server, str(certificate[0])),
                endpoint.environment | {"SSL_CERT_FILE": str(certificate[0])},
                azurite=server,
                identity=endpoint,
            )


NAMES = ("local disk", "blob server", "Azurite", "Azurite with tokens")


@contextlib.asynccontextmanager
async def destination(name: str, folder: Path, certificate: tuple[Path, Path]) -> AsyncIterator[Destination]:
    """The destination of that name, empty, until the block ends."""
    made = {
        "local disk": lambda: _local(folder),
        "blob server": lambda: _blob_server(folder),
        "Azurite": lambda: _azurite(folder),
        "Azurite with tokens": lambda: _azurite_with_tokens(folder, certificate),
    }[name]()
    async with contextlib.aclosing(made) as running:
        async for one in running:
            yield one
