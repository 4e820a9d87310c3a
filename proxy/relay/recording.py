"""What the relay tells of the traffic. Whoever records it provides these; the relay knows no more of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Protocol

from multidict import CIMultiDictProxy

from proxy.relay.faults import Fault

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left


class Ending(Enum):
    """How the exchange ended."""

    COMPLETE = "complete"
    CLIENT_LEFT = "clientleft"
    UPSTREAM_FAILED = "upstreamfailed"
    REQUEST_REFUSED = "requestrefused"
    STOPPED = "stopped"  # cut by us at the end of drain_seconds


class Recording(Protocol):
    """One exchange that is recorded. Pieces of bodies are the payload without its framing, in order.

    A piece's method may return something to wait for: then the body flows no faster than it can be kept.
    """

    def request_piece(self, data: bytes) -> Awaitable[None] | None: ...

    def request_complete(self) -> None:
        """The request's body has come to its end."""

    def response_head(self, status: int, headers: CIMultiDictProxy[str] | None, *, sized: bool) -> None:
        """The status and headers that the client gets; None stands for the relay's own JSON answer.

        ``sized`` says whether the length of the body was known in advance.
        """

    def response_piece(self, data: bytes) -> Awaitable[None] | None: ...

    def finish(self, ending: Ending) -> asyncio.Future[bool] | None:
        """The exchange is over. What is returned is done when the end of the response may leave; None: at once.

        Its result is whether the recording is by then as durable as the settings ask.
        """

    def abandon(self) -> None:
        """Nothing more will be told, by a defect of the recording."""


class Recorder(Protocol):
    """Decides what is recorded."""

    def open(
        self, method: str, target: str, headers: CIMultiDictProxy[str], request_id: str, *, length: int | None
    ) -> Recording | None:
        """The recording of an exchange that begins, or None where it is not recorded.

        ``length`` is the size of the request's body in bytes, None when that is not known in advance.
        Raises RecordingRefused when nothing may pass unrecorded.
        """


class NoRecorder:
    """Records nothing."""

    def open(
        self,
        method: str,
        target: str,
        headers: CIMultiDictProxy[str],
        request_id: str,
        *,
        length: int | None,
    ) -> Recording | None:
        return None


class Witness:
    """What an exchange tells its recording through, if it has one. A defect there costs the recording, never the exchange.

    ``failed`` is told of such a defect.
    """

    __slots__ = ("_failed", "_recording")

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._recording: Recording | None = None

    def open(
        self,
        recorder: Recorder,
        method: str,
        target: str,
        headers: CIMultiDictProxy[str],
        request_id: str,
        length: int | None,
    ) -> None:
        """Raises RecordingRefused."""
        try:
            self._recording = recorder.open(method, target, headers, request_id, length=length)
        except Fault:
            raise
        except Exception as error:  # noqa: BLE001 - counted and logged by who is told, as below
            self._lose(error)

    def request_piece(self, data: bytes) -> Awaitable[None] | None:
        if self._recording is not None:
            try:
                return self._recording.request_piece(data)
            except Exception as error:  # noqa: BLE001
                self._lose(error)
        return None

    def request_complete(self) -> None:
        if self._recording is not None:
            try:
                self._recording.request_complete()
            except Exception as error:  # noqa: BLE001
                self._lose(error)

    def response_head(self, status: int, headers: CIMultiDictProxy[str] | None, sized: bool) -> None:
        if self._recording is not None:
            try:
                self._recording.response_head(status, headers, sized=sized)
            except Exception as error:  # noqa: BLE001
                self._lose(error)

    def response_piece(self, data: bytes) -> Awaitable[None] | None:
        if self._recording is not None:
            try:
                return self._recording.response_piece(data)
            except Exception as error:  # noqa: BLE001
                self._lose(error)
        return None

    def finish(self, ending: Ending) -> asyncio.Future[bool] | None:
        """The first call counts; what is to be awaited before the end of the response leaves."""
        held: asyncio.Future[bool] | None = None
        if self._recording is not None:
            try:
                held = self._recording.finish(ending)
            except Exception as error:  # noqa: BLE001
                self._lose(error)
            self._recording = None
        return held

    def _lose(self, error: Exception) -> None:
        recording, self._recording = self._recording, None
        self._failed(error)
        if recording is not None:
            with contextlib.suppress(Exception):
                recording.abandon()
