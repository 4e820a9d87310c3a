"""What goes wrong on the traffic path, by whose fault it is, and the status that the client sees for it."""

from __future__ import annotations


class Fault(Exception):
    """An exchange that the relay answers by itself, or aborts when the answer has begun. The message is for the client."""

    status = 500


class RequestFault(Fault):
    """The client's request can't be passed on."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class RecordingRefused(Fault):
    """The operator wants no traffic that can't be recorded (``when_full: reject``)."""

    status = 503


class UpstreamFault(Fault):
    """The model server failed."""

    status = 502


class UpstreamUnreachable(UpstreamFault):
    """No connection could be made."""


class UpstreamLost(UpstreamFault):
    """The connection ended before the answer did."""


class UpstreamInvalid(UpstreamFault):
    """The answer breaks HTTP's rules, so nothing more of it is passed on."""


class UpstreamTimeout(UpstreamFault):
    """No connection within the connect time-out, or no byte within the idle time-out."""

    status = 504
