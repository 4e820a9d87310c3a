"""Runs the proxy until it is told to stop: in this process, or in several."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from proxy import __version__, listeners, logs
from proxy.admin.metrics import Snapshot
from proxy.admin.snapshot import snapshot
from proxy.app import App, StartError, freeze, listening, running
from proxy.config import ConfigError, Loaded
from proxy.processes.signals import Signals
from proxy.reload import Reloaded, reloaded
from proxy.settings import Settings

if TYPE_CHECKING:
    from proxy.admin.server import AdminServer

logger = logging.getLogger("payload_logger")

Read = Callable[[], Loaded]


async def serve(settings: Settings, read: Read) -> int:
    """The exit status. ``read`` reads the settings anew, from where they came. Raises nothing for a user's mistake."""
    from proxy.processes.supervisor import supervise  # which is not needed for one process

    signals = Signals()
    try:
        async with admin_port(settings) as admin:
            if settings.proxy.workers > 1:
                return await supervise(settings, read, signals, admin)
            return await _serve_alone(settings, read, signals, admin)
    except StartError as error:
        logger.error("%s", error)
        return 1
    finally:
        signals.close()


@contextlib.asynccontextmanager
async def admin_port(settings: Settings) -> AsyncIterator[AdminServer | None]:
    """It is there before everything else, and to the end. Raises StartError."""
    if settings.admin is None:
        yield None
        return
    from proxy.admin.server import AdminServer  # with aiohttp's server: only where it is wanted

    admin = AdminServer()
    with listening("admin.listen", settings.admin.listen):
        address = await admin.serve(listeners.open_listeners(settings.admin.listen))
    logger.info("Probes and metrics on %s.", address)
    try:
        yield admin
    finally:
        await admin.close()


def describe(settings: Settings, address: str, custom_logging_address: str | None) -> str:
    """One line for the log: from where, to where, what is recorded."""
    collections = settings.data_collector.collections
    names = [name for name, one in collections.items() if one.enabled]
    recorded = f"recording {', '.join(names)} in {settings.storage.url}" if names else "recording nothing"
    frames = f"; custom logging on {custom_logging_address}" if custom_logging_address else ""
    workers = f" ({settings.proxy.workers} workers)" if settings.proxy.workers > 1 else ""
    return f"payload-logger {__version__} on {address}{workers}, before {settings.proxy.upstream}, {recorded}{frames}."


async def read_again(settings: Settings, read: Read, outcomes: Counter[str]) -> Reloaded | None:
    """What becomes of ``settings``; None: what is written there can't be used, and the log says why."""
    try:
        loaded = await asyncio.to_thread(read)
    except ConfigError as error:
        for problem in error.problems:
            logger.error("Not reloaded: %s", problem)
        outcomes["refused"] += 1
        return None
    for warning in loaded.warnings:
        logger.warning("%s", warning)
    return reloaded(settings, loaded.settings)


def tell_reloaded(found: Reloaded, trouble: str | None, outcomes: Counter[str]) -> None:
    """Logs and counts what came of a reload."""
    for words in found.refused:
        logger.error("Not reloaded: %s.", words)
    if trouble is not None:
        logger.error("Not reloaded: %s.", trouble)
    elif found.changed or not found.refused:
        logger.info("Reloaded: %s.", "; ".join(found.changed) or "nothing has changed")
    applied = trouble is None and (found.changed or not found.refused)
    outcomes["refused" if not applied else "partly" if found.refused else "applied"] += 1


class _Alone:
    """This process is all that there is. See ``proxy.admin.server.Source``."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.stopping = False
        self.reloads: Counter[str] = Counter()

    def not_ready(self) -> str | None:
        return "stopping" if self.stopping else None

    def not_healthy(self) -> str | None:
        return None  # who could say so would not answer

    async def snapshots(self) -> Sequence[tuple[str, Snapshot]]:
        return [("0", snapshot(self.app, ready=not self.stopping))]

    def common(self) -> Snapshot:
        return {"workers": 0 if self.stopping else 1, "worker_restarts": 0, "reloads": self.reloads}

    async def reload(self, read: Read) -> None:
        found = await read_again(self.app.settings, read, self.reloads)
        if found is None:
            return
        trouble = None
        try:
            await self.app.apply(found.settings)
            logs.configure(found.settings.logs)
        except StartError as error:
            trouble = str(error)
        tell_reloaded(found, trouble, self.reloads)


async def _serve_alone(settings: Settings, read: Read, signals: Signals, admin: AdminServer | None) -> int:
    async with running(settings, stop_now=signals.stop_now) as app:
        freeze()
        alone = _Alone(app)
        if admin is not None:
            admin.source = alone
        logger.info("%s", describe(settings, app.address, app.custom_logging_address))
        while await signals.next():
            await alone.reload(read)
        alone.stopping = True
        logger.info(
            "Stopping: no new connections; exchanges in flight have %g s to finish.", settings.proxy.drain_seconds
        )
    logger.info("Stopped: %s.", "; ".join([str(app.ledger.account()), *_own_answers(app)]))
    return 1 if signals.stop_now.is_set() else 0


def _own_answers(app: App) -> list[str]:
    counts = ", ".join(f"{count} × {status}" for status, count in sorted(app.relay.faults.items()))
    return [f"answered by the proxy itself: {counts}"] if counts else []
