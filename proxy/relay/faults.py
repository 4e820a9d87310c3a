"""What goes wrong on the traffic path, by whose fault it is, and the status that the client sees for it."""

from __future__ import annotations


class Fault(Exception):
    """An exchange that the relay answers by itself, or aborts when the answer has begun. The message is for the client.

    ``reason`` is what it is counted as.
    """

    status = 500
    reason = "defect"


class RequestFault(Fault):
    """The client's request can't be passed on."""

    def __init__(self, message: str, status: int = 400, reason: str = "invalid_request") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class RecordingRefused(Fault):
    """The operator wants no traffic that can't be recorded (``when_full: reject``)."""

    status = 503
    reason = "not_recorded"


class ConnectionRefused(Fault):
    """There are too many connections."""

    status = 503
    reason = "connections"


class UpstreamFault(Fault):
    """The model server failed."""

    status = 502


class UpstreamUnreachable(UpstreamFault):
    """No connection could be made."""

    reason = "upstream_unreachable"


class UpstreamLost(UpstreamFault):
    """The connection ended before the answer did."""

    reason = "upstream_lost"


class UpstreamInvalid(UpstreamFault):
    """The answer breaks HTTP's rules, so nothing more of it is passed on."""

    reason = "upstream_invalid"


class UpstreamTimeout(UpstreamFault):
    """No connection within the connect time-out, or no byte within the idle time-out."""

    status = 504
    reason = "upstream_timeout"
