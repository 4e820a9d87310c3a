"""The admin port: ``/healthz``, ``/readyz``, ``/metrics`` and ``/status``. There is no authentication, and nothing secret."""

from __future__ import annotations

import asyncio
import logging
import platform
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import orjson
from aiohttp import web

from proxy import __version__, is_compiled, listeners
from proxy.admin.metrics import Snapshot, exposition

logger = logging.getLogger("payload_logger.admin")

KEEPALIVE_SECONDS = 75.0
ANSWER_SECONDS = 5.0  # for the workers to answer; a scrape has ten by default


class Source(Protocol):
    """Whom the port speaks for: one process, or the supervisor of several."""

    def not_ready(self) -> str | None:
        """Why no traffic should come now; None: it may."""

    def not_healthy(self) -> str | None:
        """Why the process should be replaced; None: it need not be."""

    async def snapshots(self) -> Sequence[tuple[str, Snapshot]]:
        """Of each worker that answers, under its name."""

    def common(self) -> Snapshot:
        """``proxy.admin.metrics.COMMON``."""


class AdminServer:
    """Use: ``await serve(sockets)``, ``await close()``. Until there is a ``source`` the process is healthy, and not ready."""

    def __init__(self) -> None:
        self.source: Source | None = None
        quiet = logging.getLogger(f"{logger.name}.http")
        quiet.disabled = True  # it writes a traceback for whatever is no HTTP
        self._http = web.Server(
            self._answer, access_log=None, logger=quiet, keepalive_timeout=KEEPALIVE_SECONDS, auto_decompress=False
        )
        self._servers: list[asyncio.Server] = []
        self._answers = {
            "/healthz": self._health,
            "/readyz": self._readiness,
            "/metrics": self._metrics,
            "/status": self._status,
        }

    async def serve(self, sockets: list[socket.socket]) -> str:
        """Takes connections from bound sockets; the address of the first. Raises OSError."""
        address = listeners.shown(sockets[0])
        self._servers += await listeners.serve(self._http, sockets)
        return address

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        await self._http.shutdown(0.1)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        answer = self._answers.get(request.path)
        if answer is None:
            return _text(404, f"there are {', '.join(self._answers)}")
        if request.method not in ("GET", "HEAD"):
            return _text(405, "use GET", Allow="GET, HEAD")
        try:
            return await answer(request)
        except TimeoutError:
            return _text(503, f"the workers did not answer within {ANSWER_SECONDS:g} s")
        except Exception:
            logger.exception("An answer of the admin port failed, by a defect of payload-logger.")
            return _text(500, "a defect of payload-logger; its log says more")

    async def _health(self, _: web.BaseRequest) -> web.Response:
        trouble = self.source.not_healthy() if self.source is not None else None
        return _text(200, "ok") if trouble is None else _text(503, trouble)

    async def _readiness(self, _: web.BaseRequest) -> web.Response:
        trouble = self.source.not_ready() if self.source is not None else "starting"
        return _text(200, "ready") if trouble is None else _text(503, trouble)

    async def _metrics(self, request: web.BaseRequest) -> web.Response:
        workers, common = await self._snapshots()
        body, content_type = exposition(workers, common, build(), ",".join(request.headers.getall("Accept", ())))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _status(self, _: web.BaseRequest) -> web.Response:
        workers, common = await self._snapshots()
        trouble = self.source.not_ready() if self.source is not None else "starting"
        body = orjson.dumps(status(workers, common, trouble), option=orjson.OPT_INDENT_2) + b"\n"
        return web.Response(body=body, headers={"Content-Type": "application/json"})

    async def _snapshots(self) -> tuple[Sequence[tuple[str, Snapshot]], Snapshot]:
        if self.source is None:
            return (), {}
        async with asyncio.timeout(ANSWER_SECONDS):
            return await self.source.snapshots(), self.source.common()


def build() -> dict[str, str]:
    """What runs."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "compiled": "yes" if is_compiled() else "no",
    }


def status(workers: Sequence[tuple[str, Snapshot]], common: Snapshot, not_ready: str | None) -> dict[str, Any]:
    """For people and scripts: the sums of all workers, and where recording and shipping stand."""
    snapshots = [snapshot for _, snapshot in workers]
    destinations: dict[str, dict[str, Any]] = {}
    for snapshot in snapshots:
        for one in snapshot["destinations"]:
            known = destinations.get(one["url"])
            if known is None or (one["trouble"] and not known["trouble"]):
                destinations[one["url"]] = dict(one)
            destinations[one["url"]]["lag_seconds"] = max(one["lag_seconds"], known["lag_seconds"] if known else 0.0)
    names = ("received", "delivered", "discarded", "pending", "spooled", "adopted")
    return {
        "build": build(),
        "ready": not_ready is None,
        **({} if not_ready is None else {"not_ready": not_ready}),
        "workers": common.get("workers", 0),
        "worker_restarts": common.get("worker_restarts", 0),
        "reloads": common.get("reloads", {}),
        "events": {name: _sum(snapshots, f"events_{name}") for name in names},
        "frames_refused": _sum(snapshots, "frames_refused"),
        "bodies_cut": _sum(snapshots, "bodies_cut"),
        "unheld_responses": _sum(snapshots, "unheld_responses"),
        "spool": {
            "bytes": max((one["spool_bytes"] for one in snapshots if "spool_bytes" in one), default=None),
            "limit_bytes": max(
                (one["spool_limit_bytes"] for one in snapshots if "spool_limit_bytes" in one), default=None
            ),
        },
        "destinations": list(destinations.values()),
        "upstream": {
            "responses": _sum(snapshots, "upstream_responses"),
            "trouble": next((one["upstream_trouble"] for one in snapshots if one["upstream_trouble"]), None),
        },
        "own_answers": _sum(snapshots, "own_answers"),
        "exchanges_in_flight": _sum(snapshots, "exchanges_in_flight"),
    }


def _sum(snapshots: Sequence[Snapshot], name: str) -> Any:
    values = [snapshot[name] for snapshot in snapshots]
    if any(isinstance(value, Mapping) for value in values):
        total: Counter[str] = Counter()
        for value in values:
            total.update(value)
        return dict(total)
    return sum(values)


def _text(status_: int, words: str, **headers: str) -> web.Response:
    return web.Response(status=status_, text=words + "\n", headers=headers)
