"""Builds everything from the settings: it starts from top to bottom, and stops from bottom to top."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from proxy.capture.recorder import PayloadRecorder
from proxy.ledger import Ledger
from proxy.relay.parsing import Limits, require_c_parser
from proxy.relay.server import Relay
from proxy.relay.upstream import Pool, UpstreamAddress
from proxy.settings import PAYLOAD_COLLECTIONS, Durability, HostHeader, Settings
from proxy.spool import recovery
from proxy.spool.budget import Budget
from proxy.spool.files import Files, make_folders
from proxy.spool.layout import Place, new_process_id
from proxy.spool.writer import Spool

logger = logging.getLogger("payload_logger")

SPOOL_FOLDER = ".payload-logger"
# How long a busy event loop keeps the writer thread from the interpreter; with Python's 5 ms the responses of a few
# hundred clients wait for it half as long again.
SWITCH_INTERVAL_SECONDS = 0.0005
# What glibc keeps when it is freed. By default each piece of a large body (256 KB) is given back to the kernel and
# asked for again, page by page: with these, bodies of 10 MiB pass at 1.8 instead of 1.2 GB/s.
KEPT_BYTES = 16 * 1024 * 1024
LARGEST_KEPT_BYTES = 1024 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class StartError(Exception):
    """It can't start: the message says what is wrong and names the setting."""


class App:
    """A running proxy: ``address`` is where it listens, ``ledger`` what it has recorded."""

    def __init__(self, settings: Settings, relay: Relay, ledger: Ledger, address: str) -> None:
        self.settings = settings
        self.relay = relay
        self.ledger = ledger
        self.address = address


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[App]:
    """The proxy, for as long as the block runs. Raises StartError; nothing is left behind then."""
    require_c_parser()
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    _keep_freed_memory()
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        ledger = Ledger()
        budget = Budget(_roots(settings), settings.spool.max_bytes)
        stack.callback(budget.stop)
        spool = await _start_spool(settings, ledger, budget, loop)
        stack.push_async_callback(spool.close)

        limits = Limits(settings.proxy.max_head_bytes, settings.proxy.max_headers)
        relay = Relay(
            loop,
            pool=_pool(settings, loop, limits),
            recorder=PayloadRecorder(settings, spool),
            limits=limits,
            keepalive_timeout_seconds=settings.proxy.keepalive_timeout,
            forwarded_headers=settings.proxy.forwarded_headers,
            rewrite_host=settings.proxy.host_header is HostHeader.UPSTREAM,
        )
        stack.push_async_callback(relay.close)
        address = await _listen(settings, relay)

        gc.collect()
        gc.freeze()  # what is there by now stays: no need to look at it again and again
        stack.callback(gc.unfreeze)
        yield App(settings, relay, ledger, address)

        cut = await relay.drain(settings.proxy.drain_seconds)
        if cut:
            logger.warning("%d exchanges had not finished after %g s and were cut.", cut, settings.proxy.drain_seconds)


def _keep_freed_memory() -> None:
    if "CS_GNU_LIBC_VERSION" in os.confstr_names:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)


def places(settings: Settings) -> dict[str, Place]:
    """Where each payload collection goes on local disk."""
    storage = local_path(settings.storage.url)
    deployment = storage / settings.endpoint_name / settings.name
    found: dict[str, Place] = {}
    for name in PAYLOAD_COLLECTIONS:
        collection = settings.data_collector.collections.get(name)
        if collection is None or not collection.enabled:
            continue
        root, large = deployment / name, deployment
        if collection.data is not None and collection.data.path is not None:
            root = _own_root(storage, collection.data.path)
            large = root.parent / f"{root.name}-large"  # beside the root: what is below it is taken for lines
        found[name] = Place(root, root.as_uri(), large, large.as_uri())
    return found


def local_path(file_url: str) -> Path:
    """The path of a ``file://`` URL."""
    return Path(unquote(urlsplit(file_url).path))


def spool_path(settings: Settings) -> Path:
    """Where locks and journals are kept."""
    if settings.spool.path is not None:
        return Path(settings.spool.path)
    return local_path(settings.storage.url) / SPOOL_FOLDER


def _own_root(storage: Path, data_path: str) -> Path:
    if data_path.startswith("file:"):
        return local_path(data_path)
    return storage / data_path.partition("/paths/")[2].strip("/")


def _roots(settings: Settings) -> list[Path]:
    """The folders that the dataset is in, without those within another one."""
    roots = {root for place in places(settings).values() for root in (place.root, place.large_root)}
    return [root for root in roots if not any(parent in roots for parent in root.parents)]


async def _start_spool(settings: Settings, ledger: Ledger, budget: Budget, loop: asyncio.AbstractEventLoop) -> Spool:
    folder = spool_path(settings)
    targets = places(settings)
    process_id = new_process_id()
    try:
        for path in (folder, *(place.root for place in targets.values())):
            make_folders(path, sync=settings.spool.durability is Durability.SYNCED)
        recovered = await asyncio.to_thread(recovery.recover, folder)
        journal = recovery.Journal(folder, process_id)
    except OSError as error:
        raise StartError(f"storage.url: can't write to {error.filename or folder}: {error.strerror}") from error
    if recovered.processes:
        ledger.recover(torn=recovered.torn, orphans=recovered.orphans)
        logger.warning(
            "Put in order what %d ended process(es) left: %d torn lines cut off, %d unfinished bodies removed.",
            recovered.processes,
            recovered.torn,
            recovered.orphans,
        )
    files = Files(
        targets,
        rate=settings.data_collector.rolling_rate,
        roll_bytes=settings.spool.roll_bytes,
        sync=settings.spool.durability is Durability.SYNCED,
        process_id=process_id,
        journal=journal,
        budget=budget,
        ledger=ledger,
    )
    budget.start()
    spool = Spool(
        files,
        ledger,
        loop,
        durability=settings.spool.durability,
        when_full=settings.spool.when_full,
        max_hold_seconds=settings.spool.max_hold,
        memory_bytes=settings.capture.memory_bytes,
    )
    spool.start()
    return spool


def _pool(settings: Settings, loop: asyncio.AbstractEventLoop, limits: Limits) -> Pool:
    proxy = settings.proxy
    address = UpstreamAddress.parse(proxy.upstream)
    tls = None
    if address.tls:
        try:
            tls = ssl.create_default_context(cafile=proxy.upstream_ca)
        except (OSError, ssl.SSLError) as error:
            raise StartError(
                f"proxy.upstream_ca: {proxy.upstream_ca} is not a PEM file of certificates: {error}"
            ) from error
        if not proxy.upstream_verify:
            tls.check_hostname = False
            tls.verify_mode = ssl.CERT_NONE
    return Pool(
        loop,
        address,
        tls=tls,
        limits=limits,
        connect_timeout_seconds=proxy.connect_timeout,
        idle_timeout_seconds=proxy.upstream_idle_timeout,
        keepalive_seconds=proxy.upstream_keepalive,
    )


async def _listen(settings: Settings, relay: Relay) -> str:
    proxy = settings.proxy
    tls = None
    if proxy.tls_certificate is not None and proxy.tls_key is not None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            tls.load_cert_chain(proxy.tls_certificate, proxy.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise StartError(
                f"proxy.tls_certificate, proxy.tls_key: not a PEM certificate and its key: {error}"
            ) from error
    try:
        return await relay.listen(proxy.listen, tls)
    except OSError as error:
        raise StartError(f"proxy.listen: can't listen on {proxy.listen}: {_listen_reason(error)}") from error


def _listen_reason(error: OSError) -> str:
    reason = (error.strerror or str(error)).rpartition(": ")[2]  # asyncio repeats the address before it
    if "address already in use" in str(error).lower():
        return "the address is in use by another process; choose another one (--listen HOST:PORT)"
    return reason
