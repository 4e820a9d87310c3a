"""What can go wrong with a request to a storage account, and plans that say when. Pure.

A plan is asked about every request: ``plan(operation, blob, number)``, with ``number`` of that operation from 1 on and
``blob`` as ``container/name``. Operations are the keys of ``BlobServer.requests``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Refusal(NamedTuple):
    """An answer of Azure's that is an error."""

    status: int
    code: str
    retry_after_seconds: int | None = None

    def __str__(self) -> str:
        return f"{self.status} {self.code}"


class Silence(Enum):
    """No answer."""

    RESET = "reset"
    HANG = "hang"  # until the client gives up, or the server is told to go on

    def __str__(self) -> str:
        return self.value


Answer = Refusal | Silence


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong with one request. Without an ``answer`` the client gets the true one.

    foreign: somebody else appends this to the blob first. slow_seconds: the request waits before anything is done.
    applied: whether the server does what was asked for. late: it does so only after that many seconds, or when the next
    request of that operation for the same blob has been answered.
    """

    answer: Answer | None = None
    applied: bool = True
    late: float | str | None = None
    foreign: bytes = b""
    slow_seconds: float = 0.0

    @property
    def name(self) -> str:
        """What the answer counts as in ``BlobServer.happened``."""
        if self.late is not None:
            return f"applied late, {self.answer}"
        return f"applied, then {self.answer}" if self.applied else str(self.answer)


def refused(status: int, code: str, retry_after_seconds: int | None = None) -> Fault:
    return Fault(answer=Refusal(status, code, retry_after_seconds), applied=False)


def busy(retry_after_seconds: int = 1) -> Fault:
    return refused(503, "ServerBusy", retry_after_seconds)


def lost(answer: Answer = Silence.RESET) -> Fault:
    """Applied, but the client doesn't hear of it."""
    return Fault(answer=answer)


def late(after: float | str = "append", answer: Answer = Silence.RESET) -> Fault:
    """Applied when the client has already been told, or had to think, that it was not. See ``Fault.late``."""
    return Fault(answer=answer, late=after)


def foreign(data: bytes) -> Fault:
    """Somebody else's append comes first."""
    return Fault(foreign=data)


def slow(seconds: float) -> Fault:
    return Fault(slow_seconds=seconds)


INTERNAL_ERROR = refused(500, "InternalError")
TIMED_OUT = refused(500, "OperationTimedOut")  # not applied, but who knows
THROTTLED = refused(429, "TooManyRequests", 1)
REQUEST_TIMEOUT = refused(408, "RequestTimeout")
RESET = Fault(answer=Silence.RESET, applied=False)
HANG = Fault(answer=Silence.HANG, applied=False)
MODIFIED = refused(409, "BlobModifiedWhileReading")  # somebody asked for the length just then
NOT_PERMITTED = refused(403, "AuthorizationPermissionMismatch")  # no role assignment, or not yet
NOT_AUTHENTICATED = refused(403, "AuthenticationFailed")
TOKEN_EXPIRED = refused(401, "InvalidAuthenticationInfo")
NO_CONTAINER = refused(404, "ContainerNotFound")
CONTAINER_GOING = refused(409, "ContainerBeingDeleted")
WRONG_ACCOUNT = refused(400, "BlobTypeNotSupported")  # an account for page blobs only
UNSUPPORTED = refused(409, "BlobOperationNotSupported")  # a blob that was made with the API of Data Lake Gen2

FLAKY = (busy(), INTERNAL_ERROR, TIMED_OUT, THROTTLED, REQUEST_TIMEOUT, RESET, HANG)
AMBIGUOUS = (
    lost(Silence.RESET),
    lost(Silence.HANG),
    lost(Refusal(500, "OperationTimedOut")),
    lost(Refusal(500, "InternalError")),
    late("append"),
    late("append", Refusal(500, "OperationTimedOut")),
    late("look"),
    late(0.05),
)


Plan = Callable[[str, str, int], Fault | None]


def in_turn(*faults: Fault | None, operation: str = "append") -> Plan:
    """A fault for each of the next requests of ``operation``, None for one that goes well; then no more."""
    given = iter(faults)
    return lambda asked, _blob, _number: next(given, None) if asked == operation else None


def always(fault: Fault, *operations: str) -> Plan:
    """The same fault for every request, or for every one of ``operations``."""
    return lambda asked, _blob, _number: fault if not operations or asked in operations else None


def at_random(seed: int, rate: float, faults: tuple[Fault, ...], *operations: str) -> Plan:
    """One of ``faults`` for that share of the requests: the same for the same seed, operation and number."""

    def plan(asked: str, _blob: str, number: int) -> Fault | None:
        if operations and asked not in operations:
            return None
        chance = random.Random(f"{seed} {asked} {number}")
        return chance.choice(faults) if chance.random() < rate else None

    return plan


def flaky(seed: int, rate: float = 0.3) -> Plan:
    """Requests of all kinds that fail, and did nothing."""
    return at_random(seed, rate, FLAKY)


def ambiguous(seed: int, rate: float = 0.3) -> Plan:
    """Writes that are done though the client can't know it."""
    return at_random(seed, rate, AMBIGUOUS, "append", "create", "put", "put_block", "put_block_list")


def either(*plans: Plan) -> Plan:
    """The first fault that one of the plans has for the request."""

    def plan(operation: str, blob: str, number: int) -> Fault | None:
        return next((fault for each in plans if (fault := each(operation, blob, number))), None)

    return plan
