"""``payload-logger check --connect``: whether what the settings name can be reached and used, in plain words.

Sends one ``GET /`` to the model server, writes and removes a file in each local folder and a blob at each remote root.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import ssl
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import aiohttp

from proxy.places import measured_roots, places, spool_path
from proxy.relay.upstream import UpstreamAddress, upstream_tls
from proxy.settings import Settings
from proxy.shipping import destination
from proxy.shipping.azure_blob import Azure
from proxy.shipping.azureml import assets
from proxy.shipping.store import NotNow
from proxy.spool.budget import bytes_below

LARGEST_CLOCK_ERROR_SECONDS = 60.0  # Azure refuses keys and tokens at 15 minutes
UPSTREAM_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried. ``good``: None if it is only to be known."""

    good: bool | None
    text: str

    def __str__(self) -> str:
        return f"{ {True: 'ok  ', False: 'FAIL', None: '    '}[self.good] } {self.text}"


async def findings(settings: Settings) -> AsyncIterator[Finding]:
    """Tries one thing after the other."""
    yield await _upstream(settings)
    local = [place.root for place in places(settings).values() if not place.remote]
    for folder in dict.fromkeys([spool_path(settings), *local]):
        yield _folder(folder)
    yield _room(settings)
    azure = Azure(os.environ, settings.management_url)
    try:
        async for finding in _remote(settings, azure):
            yield finding
    finally:
        await azure.close()


async def _upstream(settings: Settings) -> Finding:
    proxy = settings.proxy
    address = UpstreamAddress.parse(proxy.upstream)
    started = asyncio.get_running_loop().time()
    try:
        tls = upstream_tls(proxy.upstream_ca, verify=proxy.upstream_verify) if address.tls else None
        connector = aiohttp.UnixConnector(address.unix_path) if address.unix_path else None
        timeout = aiohttp.ClientTimeout(total=UPSTREAM_SECONDS, sock_connect=proxy.connect_timeout)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.get(
                "http://localhost/" if connector else proxy.upstream, ssl=tls or True, allow_redirects=False
            ) as answer,
        ):
            milliseconds = (asyncio.get_running_loop().time() - started) * 1000
            return Finding(True, f"upstream {proxy.upstream} answers ({answer.status} to GET /, {milliseconds:.0f} ms)")
    except TimeoutError:
        return Finding(
            False, f"upstream {proxy.upstream} does not answer within {UPSTREAM_SECONDS:g} s; is it the right port?"
        )
    except (aiohttp.ClientError, OSError, ssl.SSLError) as error:
        reason = getattr(error, "os_error", None) or error
        return Finding(False, f"upstream {proxy.upstream}: {reason}; is the model server running? (proxy.upstream)")


def _folder(folder: Path) -> Finding:
    existing = _existing(folder)
    try:
        for path in (folder, *(existing / part for part in folder.parts[len(existing.parts) :])):
            with contextlib.suppress(FileNotFoundError):
                path.stat()  # a name that is too long is one also where nothing is
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".payload-logger-check-") as file:
            file.write(b"x")
    except OSError as error:
        return Finding(False, f"folder   {folder}: can't write in {existing}: {error.strerror}")
    made = "" if existing == folder else f" (will be made in {existing})"
    return Finding(True, f"folder   {folder} can be written{made}")


def _room(settings: Settings) -> Finding:
    roots = measured_roots(settings) or [spool_path(settings)]
    folder = _existing(roots[0])
    free, budget, used = shutil.disk_usage(folder).free, settings.spool.max_bytes, bytes_below(roots)
    words = f"disk     {_size(free)} free at {folder}, budget (spool.max_bytes) {_size(budget) if budget else 'without limit'}"
    if used:
        words += f", {_size(used)} used"
    if free < max(budget - used, 1024 * 1024):
        return Finding(False, f"{words}: the disk is full before the budget is used up")
    return Finding(True, words)


def _existing(folder: Path) -> Path:
    """``folder``, or the nearest one above it that there is."""
    while not os.path.exists(folder):  # noqa: PTH110  Path.exists raises OSError for names that are too long
        folder = folder.parent
    return folder


async def _remote(settings: Settings, azure: Azure) -> AsyncIterator[Finding]:
    collections = settings.data_collector.collections
    roots = {place.root_url: collections[name].client_id for name, place in places(settings).items() if place.remote}
    seen = set()
    clocks = set()
    failed = set()
    for root, client_id in roots.items():
        place, path = destination.parse(root)
        if (place, client_id) in failed:
            continue
        store = azure.store(place, client_id)
        try:
            opened = await store.opened()
            if (opened.container, client_id) not in seen:
                seen.add((opened.container, client_id))
                if root.startswith("azureml:"):
                    yield Finding(True, f"datastore {place.url} is {opened.container.url}")
                who = await azure.who(client_id) if opened.secret is None else ""
                yield Finding(True if who else None, f"right    {opened.right}{f': {who}' if who else ''}")
            clock_error_seconds, left = await store.probe(f"{path}/" if path else "")
            yield Finding(
                True, f"blobs    {opened.container.url}/{quote(path)} can be written{f'; {left}' if left else ''}"
            )
            words = f"clock    this machine's is {clock_error_seconds:+.0f} s off Azure's"
            if abs(clock_error_seconds) > LARGEST_CLOCK_ERROR_SECONDS:
                yield Finding(False, f"{words}; partitions and tokens go by it")
            elif opened.container not in clocks:
                clocks.add(opened.container)
                yield Finding(True, words)
        except NotNow as error:
            failed.add((place, client_id))
            yield Finding(False, f"blobs    {place.url}: {error.words}")
        finally:
            await store.close()
    try:
        for asset in assets(settings, {name: place.root_url for name, place in places(settings).items()}).values():
            yield Finding(None, f"asset    {asset.name}, version {asset.version}, will stand for {asset.data_uri}")
    except ValueError as error:
        yield Finding(False, str(error))


def _size(size: float) -> str:
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{size:.4g} {units[0]}"
