"""Builds everything from the settings: it starts from top to bottom, and stops from bottom to top."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import itertools
import logging
import os
import resource
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, MutableSequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from proxy import listeners
from proxy.capture.recorder import PayloadRecorder
from proxy.ledger import Ledger
from proxy.loop_delay import LoopDelay
from proxy.places import measured_roots, places, spool_path
from proxy.relay.parsing import Limits, require_c_parser
from proxy.relay.server import Patience, Relay
from proxy.relay.upstream import Pool, UpstreamAddress, upstream_tls
from proxy.settings import CustomLogging, Durability, HostHeader, Settings
from proxy.shipping import destination
from proxy.shipping.azure_blob import Azure
from proxy.shipping.azureml import DataAsset, assets
from proxy.shipping.shipper import Chore, Shipper
from proxy.spool import recovery
from proxy.spool.budget import Budget
from proxy.spool.files import LEAST_FILE_BYTES, Files, LineFile, make_folders
from proxy.spool.layout import Place, new_process_id
from proxy.spool.writer import Spool

if TYPE_CHECKING:
    from proxy.custom_logging.endpoint import FrameEndpoint

logger = logging.getLogger("payload_logger")

LEAST_SHIPPING_SECONDS = 5.0  # at the end, even if the exchanges in flight took all of proxy.drain_seconds
# Of the disk budget one file takes at most this part: it is removed only when it is closed, and shipped.
FILES_IN_BUDGET = 16
# How long a busy event loop keeps the writer thread from the interpreter; with Python's 5 ms the responses of a few
# hundred clients wait for it half as long again.
SWITCH_INTERVAL_SECONDS = 0.0005
# What glibc keeps when it is freed. By default each piece of a large body (256 KB) is given back to the kernel and
# asked for again, page by page: with these, bodies of 10 MiB pass at 1.8 instead of 1.2 GB/s.
KEPT_BYTES = 16 * 1024 * 1024
LARGEST_KEPT_BYTES = 1024 * 1024
OTHER_FILES = 256
UNLIMITED_CONNECTIONS = 32 * 1024
# Each thread would get a heap of its own, and keep what it once needed; under the interpreter's lock two are enough.
HEAPS = 2
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


class StartError(Exception):
    """It can't start: the message says what is wrong and names the setting."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What the processes of one proxy have in common."""

    worker: int  # the number of this one, from 0
    sockets: Mapping[str, list[socket.socket]]  # bound, by the key of their setting: proxy.listen
    spent: MutableSequence[int]  # bytes on disk, see Budget


class App:
    """A running proxy: ``address`` is where it listens, ``ledger`` what it has recorded, ``places`` where to.

    ``custom_logging_address`` is where it listens for the SDK, if it does.
    """

    def __init__(self, settings: Settings, relay: Relay, recording: _Recording, loop_delay: LoopDelay) -> None:
        self.settings = settings
        self.relay = relay
        self.ledger = recording.ledger
        self.budget = recording.budget
        self.spool = recording.spool
        self.shipper = recording.shipper
        self.places: Mapping[str, Place] = recording.places
        self.loop_delay = loop_delay
        self.address = ""
        self.custom_logging_address: str | None = None
        self.tls: ssl.SSLContext | None = None
        self.frames: FrameEndpoint | None = None
        self._recording = recording

    async def apply(self, settings: Settings) -> None:
        """Goes on with other settings, of those that can be changed (``proxy.reload``).

        Raises StartError, and records as before then.
        """
        if self.tls is not None:
            _load_certificate(self.tls, settings)
        await self._recording.extend(settings)
        if self.frames is not None:
            _write_sdk_config(settings)
            self.frames.enable(settings)
        self.relay.recorder = PayloadRecorder(settings, self.spool)
        self.settings = settings


@contextlib.asynccontextmanager
async def running(
    settings: Settings, shared: Shared | None = None, stop_now: asyncio.Event | None = None
) -> AsyncIterator[App]:
    """The proxy, for as long as the block runs. Raises StartError; nothing is left behind then.

    stop_now: when it is set, exchanges in flight are cut, and nothing more is shipped.
    """
    require_c_parser()
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    _keep_freed_memory()
    _allow_files(settings.proxy.max_connections)
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        recording = _Recording(settings, loop, shared, stop_now or asyncio.Event())
        stack.callback(recording.budget.stop)
        await recording.start()
        stack.push_async_callback(recording.close)

        frames, frames_address = None, None
        if settings.sdk_endpoint is not None:
            # Stopped after the traffic: a scoring script sends its last frames when it has answered.
            frames, frames_address = await _serve_sdk(settings, settings.sdk_endpoint, recording.spool, stack, shared)

        limits = Limits(settings.proxy.max_head_bytes, settings.proxy.max_headers)
        relay = Relay(
            loop,
            pool=_pool(settings, loop, limits),
            recorder=PayloadRecorder(settings, recording.spool),
            limits=limits,
            patience=Patience(
                settings.proxy.head_timeout, settings.proxy.client_idle_timeout, settings.proxy.keepalive_timeout
            ),
            max_connections=settings.proxy.max_connections,
            forwarded_headers=settings.proxy.forwarded_headers,
            rewrite_host=settings.proxy.host_header is HostHeader.UPSTREAM,
        )
        stack.push_async_callback(relay.close)
        app = App(settings, relay, recording, LoopDelay(loop))
        app.frames, app.custom_logging_address = frames, frames_address
        await _serve_traffic(app, shared)
        app.loop_delay.start()
        stack.callback(app.loop_delay.stop)

        yield app

        recording.ends_at = loop.time() + settings.proxy.drain_seconds
        cut = await relay.drain(settings.proxy.drain_seconds, recording.stop_now)
        if cut and not recording.stop_now.is_set():
            logger.warning("%d exchanges had not finished after %g s and were cut.", cut, settings.proxy.drain_seconds)


def freeze() -> None:
    """For a process that is there for the proxy alone: what is there by now stays, no need to look at it again and again."""
    gc.collect()
    gc.freeze()


def _keep_freed_memory() -> None:
    if "CS_GNU_LIBC_VERSION" in os.confstr_names:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        libc.mallopt(_M_ARENA_MAX, HEAPS)


def _allow_files(connections: int) -> None:
    """Raises the limit of open files to what so many connections need, as far as that is allowed."""
    wanted = 2 * (connections or UNLIMITED_CONNECTIONS) + OTHER_FILES  # each may have one to the model server
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit < connections + OTHER_FILES:
        logger.warning("proxy.max_connections: %d, but this process may open %d files (ulimit -n).", connections, limit)


class _Recording:
    """The spool, and the shipper behind it if anything goes further than the local disk."""

    def __init__(
        self, settings: Settings, loop: asyncio.AbstractEventLoop, shared: Shared | None, stop_now: asyncio.Event
    ) -> None:
        self._settings = settings
        self.stop_now = stop_now
        self._loop = loop
        self.ledger = Ledger()
        self.budget = Budget(
            measured_roots(settings),
            settings.spool.max_bytes,
            *(() if shared is None else (shared.spent, shared.worker)),
        )
        self._registers = shared is None or shared.worker == 0  # of several processes one will do
        self.ends_at = loop.time()  # until when shipping may go on when the proxy stops
        self.places = places(settings)
        self._azure = Azure(os.environ, settings.management_url)
        process_id = new_process_id()
        self.shipper = self._new_shipper(process_id) if any(place.remote for place in self.places.values()) else None
        self._process_id = process_id

    async def start(self) -> None:
        """Raises StartError."""
        folder = spool_path(self._settings)
        try:
            self._make_folders(folder, *(place.root for place in self.places.values()))
            recovered = await asyncio.to_thread(recovery.recover, folder)
            journal = recovery.Journal(folder, self._process_id)
        except OSError as error:
            key = "spool.path" if self.shipper is not None else "storage.url"
            raise StartError(f"{key}: can't write to {error.filename or folder}: {error.strerror}") from error
        if recovered.processes:
            self.ledger.recover(torn=recovered.torn, orphans=recovered.orphans)
            logger.warning(
                "Put in order what %d ended process(es) left: %d torn lines cut off, %d unfinished bodies removed.",
                recovered.processes,
                recovered.torn,
                recovered.orphans,
            )
        self.spool = self._new_spool(journal)
        self.budget.start()
        self.spool.start()
        if self.shipper is not None:
            self.shipper.start()

    async def close(self) -> None:
        await self.spool.close()
        if self.shipper is not None:
            await self.shipper.finish(max(LEAST_SHIPPING_SECONDS, self.ends_at - self._loop.time()), self.stop_now)

    async def extend(self, settings: Settings) -> None:
        """Has a place for each collection that ``settings`` have enabled. Raises StartError."""
        new = {name: place for name, place in places(settings).items() if name not in self.places}
        for name, place in new.items():
            if place.remote and self.shipper is None:
                raise StartError(f"data_collector.collections.{name}: nothing was shipped so far; that needs a restart")
        chores = self._chores(settings, new)
        try:
            await asyncio.to_thread(self._make_folders, *(place.root for place in new.values()))
        except OSError as error:
            raise StartError(f"can't write to {error.filename}: {error.strerror}") from error
        for name, place in new.items():
            if self.shipper is not None and place.remote:
                client_id = settings.data_collector.collections[name].client_id
                self.shipper.add_root(place.root_url, client_id, chores[name])
            self.places[name] = place

    def _make_folders(self, *paths: Path) -> None:
        for path in paths:
            make_folders(path, sync=self._settings.spool.durability is Durability.SYNCED)

    def _new_spool(self, journal: recovery.Journal) -> Spool:
        spool = self._settings.spool
        roll_bytes = spool.roll_bytes
        if self.shipper is not None and spool.max_bytes:
            roll_bytes = min(roll_bytes, max(LEAST_FILE_BYTES, spool.max_bytes // FILES_IN_BUDGET))
        files = Files(
            self.places,
            rate=self._settings.data_collector.rolling_rate,
            roll_bytes=roll_bytes,
            sync=spool.durability is Durability.SYNCED,
            process_id=self._process_id,
            journal=journal,
            budget=self.budget,
            ledger=self.ledger,
            opened=self.shipper.track if self.shipper is not None else None,
        )
        return Spool(
            files,
            self.ledger,
            self._loop,
            durability=spool.durability,
            when_full=spool.when_full,
            max_hold_seconds=spool.max_hold,
            memory_bytes=self._settings.capture.memory_bytes,
        )

    def _new_shipper(self, process_id: str) -> Shipper:
        settings = self._settings
        collections = settings.data_collector.collections
        return Shipper(
            spool_path(settings),
            process_id=process_id,
            urls={place.root_url: collections[name].client_id for name, place in self.places.items() if place.remote},
            open_store=self._azure.store,
            close=self._azure.close,
            retire=self._retire,
            ledger=self.ledger,
            budget=self.budget,
            interval_seconds=settings.storage.ship_interval,
            chores=list(itertools.chain.from_iterable(self._chores(settings, self.places).values())),
        )

    def _chores(self, settings: Settings, new: Mapping[str, Place]) -> dict[str, list[Chore]]:
        """What is to be done once at Azure for these places of collections. Raises StartError."""
        try:
            wanted = assets(settings, {name: place.root_url for name, place in new.items()})
        except ValueError as error:
            raise StartError(str(error)) from error
        found: dict[str, list[Chore]] = {}
        for name, place in new.items():
            client_id, chores = settings.data_collector.collections[name].client_id, found.setdefault(name, [])
            if place.root_url.startswith("azureml:"):
                chores.append(partial(_learn_urls, self._azure, place, client_id))
            if name in wanted and self._registers:
                chores.append(partial(_register, self._azure, wanted[name], client_id))
        return found

    def _retire(self, file: LineFile) -> None:
        """Called in the shipper's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended; so has the file by then
            self._loop.call_soon_threadsafe(self.spool.retire, file)


async def _serve_sdk(
    settings: Settings, options: CustomLogging, spool: Spool, stack: contextlib.AsyncExitStack, shared: Shared | None
) -> tuple[FrameEndpoint, str]:
    """Listens for the SDK; where. Raises StartError."""
    from proxy.custom_logging.endpoint import FrameEndpoint  # with aiohttp's server: only where it is wanted

    _write_sdk_config(settings)
    frames = FrameEndpoint(settings, options, spool)
    stack.push_async_callback(frames.close)
    with listening("custom_logging.listen", options.listen):
        return frames, await frames.serve(_sockets("custom_logging.listen", options.listen, shared))


def _write_sdk_config(settings: Settings) -> None:
    """Raises StartError."""
    from proxy.custom_logging import sdk

    options = settings.sdk_endpoint
    if options is not None and options.sdk_config_path is not None:
        try:
            sdk.write(settings, Path(options.sdk_config_path))
        except OSError as error:
            raise StartError(
                f"custom_logging.sdk_config_path: can't write {options.sdk_config_path}: {error.strerror}"
            ) from error


async def _learn_urls(azure: Azure, place: Place, client_id: str | None) -> None:
    """Has lines point to where the datastore of ``place`` leads. Called in the shipper's thread."""
    datastore, _ = destination.parse(place.root_url)
    url = (await azure.store(datastore, client_id).opened()).container.url
    for name in ("root_url", "large_url"):
        setattr(place, name, url + getattr(place, name).partition("/paths")[2])


async def _register(azure: Azure, asset: DataAsset, client_id: str | None) -> None:
    logger.info("%s", await azure.control_plane(client_id).register(asset))


def _pool(settings: Settings, loop: asyncio.AbstractEventLoop, limits: Limits) -> Pool:
    proxy = settings.proxy
    address = UpstreamAddress.parse(proxy.upstream)
    tls = None
    if address.tls:
        try:
            tls = upstream_tls(proxy.upstream_ca, verify=proxy.upstream_verify)
        except (OSError, ssl.SSLError) as error:
            raise StartError(
                f"proxy.upstream_ca: {proxy.upstream_ca} is not a PEM file of certificates: {error}"
            ) from error
    return Pool(
        loop,
        address,
        tls=tls,
        limits=limits,
        connect_timeout_seconds=proxy.connect_timeout,
        idle_timeout_seconds=proxy.upstream_idle_timeout,
        keepalive_seconds=proxy.upstream_keepalive,
    )


async def _serve_traffic(app: App, shared: Shared | None) -> None:
    """Raises StartError."""
    proxy = app.settings.proxy
    if proxy.tls_certificate is not None and proxy.tls_key is not None:
        app.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        _load_certificate(app.tls, app.settings)
    with listening("proxy.listen", proxy.listen, " (--listen HOST:PORT)"):
        app.address = await app.relay.serve(_sockets("proxy.listen", proxy.listen, shared), app.tls)


def _load_certificate(tls: ssl.SSLContext, settings: Settings) -> None:
    """For the handshakes from now on. Raises StartError."""
    try:
        tls.load_cert_chain(settings.proxy.tls_certificate or "", settings.proxy.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise StartError(f"proxy.tls_certificate, proxy.tls_key: not a PEM certificate and its key: {error}") from error


def _sockets(key: str, address: str, shared: Shared | None) -> list[socket.socket]:
    """Raises OSError."""
    return listeners.open_listeners(address) if shared is None else list(shared.sockets[key])


@contextlib.contextmanager
def listening(key: str, address: str, option: str = "") -> Iterator[None]:
    """Tells in the words of the settings why it can't listen."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason = f"the address is in use by another process; choose another one{option}"
        raise StartError(f"{key}: can't listen on {address}: {reason}") from error
