"""The account of every event: received = delivered + discarded{reason} + pending, at every moment."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

logger = logging.getLogger("payload_logger.spool")

QUIET_SECONDS = 60.0  # after this long without a loss, the next one is news again


class Discard(Enum):
    """Why an event was not recorded. The list is closed: nothing vanishes for another reason."""

    SPOOL_FULL = "spool_full"  # the disk budget is used up
    WRITE_FAILED = "write_failed"  # the disk gave an error
    MEMORY_FULL = "memory_full"  # the disk is slower than the traffic, or hangs
    RENDER_FAILED = "render_failed"  # a defect of ours
    STOPPED = "stopped"  # the disk did not take it before the process had to end
    SPOOL_DELETED = "spool_deleted"  # somebody deleted the spool's file before it was shipped


class Refusal(Enum):
    """Why a frame that was sent to custom logging was not taken. Its sender was told; it was never received."""

    MALFORMED = "malformed"  # it does not name its collection, or was cut
    UNKNOWN_COLLECTION = "unknown_collection"
    DISABLED_COLLECTION = "disabled_collection"
    BAD_TYPE = "bad_type"
    TOO_LARGE = "too_large"
    NOT_ROWS = "not_rows"  # no array of objects
    UNAVAILABLE = "unavailable"  # there is no memory for it, or the proxy stops


@dataclass(frozen=True, slots=True)
class Account:
    """The ledger at one moment. Events, unless the name says otherwise."""

    received: int
    delivered: int
    discarded: dict[str, int]
    bodies_cut: int  # bodies of delivered events that are not whole for want of memory or disk
    unheld: int  # responses whose end left before their lines were written, after max_hold
    torn: int  # half lines of a process that died, cut off at start
    orphans: int  # files of bodies that a process that died left without a line
    spooled: int  # of the pending: on disk, and yet to be shipped
    adopted: int  # of the received: recorded by processes that have ended, shipped by this one
    refused: dict[str, int]  # frames of custom logging; not of the received

    @property
    def pending(self) -> int:
        return self.received - self.delivered - sum(self.discarded.values())

    def __str__(self) -> str:
        discarded = _counts(self.discarded)
        text = (
            f"received {self.received} events = delivered {self.delivered} + discarded {sum(self.discarded.values())}"
            + (f" ({discarded})" if discarded else "")
            + f" + pending {self.pending}"
        )
        notes = [
            f"{count} {words}"
            for count, words in (
                (self.bodies_cut, "bodies not whole for want of memory or disk"),
                (self.unheld, "responses left before they were written"),
                (self.torn, "torn lines cut off at start"),
                (self.orphans, "orphaned bodies removed at start"),
                (self.spooled, "on disk, to be shipped"),
                (self.adopted, "shipped for processes that have ended"),
                (sum(self.refused.values()), f"frames refused ({_counts(self.refused)})"),
            )
            if count
        ]
        return "; ".join([text, *notes])


def _counts(by_reason: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(by_reason.items()))


@dataclass(slots=True)
class Ledger:
    """Counts events. Every method may be called from any thread."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _received: int = 0
    _delivered: int = 0
    _discarded: Counter[str] = field(default_factory=Counter)
    _bodies_cut: int = 0
    _unheld: int = 0
    _torn: int = 0
    _orphans: int = 0
    _spooled: int = 0
    _adopted: int = 0
    _refused: Counter[str] = field(default_factory=Counter)
    _settled: bool = False
    _cut_at: float = 0.0

    def receive(self, events: int) -> None:
        with self._lock:
            self._received += events

    def deliver(self, events: int) -> None:
        with self._lock:
            if not self._settled:
                self._delivered += events

    def keep(self, events: int) -> None:
        """They are on disk, and delivered once they are shipped."""
        with self._lock:
            if not self._settled:
                self._spooled += events

    def ship(self, events: int) -> None:
        """They were kept, and are delivered."""
        with self._lock:
            if self._settled:  # those that came to the disk after that are counted as STOPPED
                events = min(events, self._spooled)
            self._spooled -= (
                events  # below 0 for a moment, if they are shipped before the writer says that they are kept
            )
            self._delivered += events

    def adopt(self, events: int) -> None:
        """They were recorded by a process that has ended, and are delivered."""
        with self._lock:
            self._received += events
            self._delivered += events
            self._adopted += events

    def lose(self, reason: Discard, events: int) -> None:
        """They were kept, and are gone."""
        with self._lock:
            if self._settled:
                events = min(events, self._spooled)
            self._spooled -= events
            self._discarded[reason.value] += events

    def discard(self, reason: Discard, events: int) -> None:
        with self._lock:
            if not self._settled:
                self._discarded[reason.value] += events

    def refuse(self, reason: Refusal) -> None:
        with self._lock:
            self._refused[reason.value] += 1

    def settle(self) -> int:
        """Counts what is not even on disk as STOPPED, for good: should the disk take it later, that is not counted.

        Returns their number.
        """
        with self._lock:
            pending = self._received - self._delivered - self._discarded.total() - self._spooled
            self._discarded[Discard.STOPPED.value] += pending
            self._settled = True
            return pending

    def cut_body(self) -> None:
        with self._lock:
            self._bodies_cut += 1
            first = self._bodies_cut == 1 or time.monotonic() - self._cut_at > QUIET_SECONDS
            self._cut_at = time.monotonic()
        if first:
            logger.warning(
                "A large body was not recorded whole: the disk did not take it. Its line says so; further ones are counted."
            )

    def release_unheld(self, responses: int) -> None:
        with self._lock:
            self._unheld += responses

    def recover(self, *, torn: int, orphans: int) -> None:
        with self._lock:
            self._torn += torn
            self._orphans += orphans

    def account(self) -> Account:
        """A consistent copy."""
        with self._lock:
            return Account(
                self._received,
                self._delivered,
                dict(self._discarded),
                self._bodies_cut,
                self._unheld,
                self._torn,
                self._orphans,
                self._spooled,
                self._adopted,
                dict(self._refused),
            )
