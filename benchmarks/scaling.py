"""What many proxies do to one storage account: ``python benchmarks/scaling.py`` prints the tables of docs/scaling.md.

Time is the simulation's own, so that an hour of 10,000 processes takes seconds. A process has one ``Lane``, which does what
``proxy.shipping.lane.Lane`` does, with the constants and the ``Backoff`` of that module: a random start, a pause of one
interval after each turn, FILES_AT_ONCE files at a time, appends of at most MAX_APPEND_BYTES, a new file heard of at the next
look (ADOPT_SECONDS), and asked for and made before its first append. ``tests/test_scaling.py`` runs the real ``Lane`` beside it.

The ``Account`` takes so many operations and bytes in each second, and refuses the others with 503.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it sees its own folder only

from proxy.settings import Spool, Storage
from proxy.shipping.lane import FILES_AT_ONCE, MIRRORS, TOLD_AFTER, Backoff
from proxy.shipping.mirror import FULL_BLOCKS
from proxy.shipping.shipper import ADOPT_SECONDS
from proxy.shipping.store import BACKLOG_APPEND_BYTES, MAX_APPEND_BYTES

# Published: on the pages that docs/scaling.md names.
ACCOUNT_OPERATIONS, ACCOUNT_BYTES = 20_000, 25e9 / 8  # a second; 40,000 and 60 Gbit/s in large regions
LISTED = 5_000  # blobs in one answer of List Blobs
# Assumed, not measured.
ANSWER_SECONDS = 0.02
BURST_SECONDS = 0.1
REQUESTS_PER_SECOND = 10.0  # of a process
# Measured: docs/performance.md, docs/guarantees.md. (requests/s, bytes of a request, bytes of a response)
MEASURED: dict[str, tuple[float, int, int]] = {
    "714 B, one core, compiled": (29_890, 714, 241),
    "714 B, one core": (19_569, 714, 241),
    "64 KiB both ways, one core, compiled": (4_079, 65_536, 65_536),
    "714 B, as assumed below": (REQUESTS_PER_SECOND, 714, 241),
}
FIELDS_BYTES = 546  # what a line has beside the body
PROCESS_BYTES_PER_SECOND = 230e6  # a backlog is shipped at this pace
RATES = tuple(REQUESTS_PER_SECOND * (body + FIELDS_BYTES) for body in (714, 241))  # bytes/s: requests, responses

HOUR, MONTH_HOURS = 3600.0, 720
INTERVAL = Storage().ship_interval
SIZES = (1, 10, 100, 1_000, 10_000)
MOST = 500  # processes that are simulated: of 10,000 each stands for 20, beside a twentieth of the account


@dataclass(slots=True)
class Account:
    """Takes ``operations`` and ``bytes`` a second, BURST_SECONDS of it at once, and refuses the others.

    ``outage``: from when to when it refuses all. ``lost``: the part of the appends that are done, and answered with 500.
    """

    operations: float = math.inf
    bytes: float = math.inf
    outage: tuple[float, float] = (0.0, 0.0)
    retry_after: float = 0.0
    lost: float = 0.0
    served: Counter[int] = field(default_factory=Counter)  # by the second
    refused: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    bytes_done: float = 0.0
    _at: float = 0.0
    _operations_used: float = 0.0  # of the burst
    _bytes_used: float = 0.0

    def does(self, kind: str, at: float, size: float = 0.0) -> bool:
        """To be called in the order of time."""
        gone, self._at = at - self._at, at
        self._operations_used = max(0.0, self._operations_used - gone * self.operations)
        self._bytes_used = max(0.0, self._bytes_used - gone * self.bytes)
        full = self._operations_used > self.operations * BURST_SECONDS or self._bytes_used > self.bytes * BURST_SECONDS
        if full or self.outage[0] <= at < self.outage[1]:
            self.refused[int(at)] += 1
            return False
        self.served[int(at)] += 1
        self._operations_used += 1
        self._bytes_used += size
        self.kinds[kind] += 1
        self.bytes_done += size
        return True


@dataclass(slots=True, eq=False)
class File:
    """``rate`` bytes a second are written to it from ``begins`` to ``ends``. ``steps`` are due before the next append."""

    rate: float
    begins: float
    ends: float = math.inf
    shipped: float = 0.0  # as the lane knows it
    blob: float = 0.0  # as it is
    until: float = 0.0
    steps: tuple[str, ...] = (
        "look",
        "create",
    )  # a new one; ("look", "read") where it has to be found how far the blob is
    confirmed: bool = False  # it was looked at once more, before the file was removed

    def is_whole(self, at: float) -> bool:
        """Whether the lane knows that all that there will ever be is in the blob."""
        return self.ends <= at and self.shipped >= self.length(at)

    def length(self, at: float) -> float:
        return self.rate * (min(at, self.ends) - self.begins)


def _first_steps(file: File) -> tuple[str, ...]:
    return ("look", "read") if file.blob else ("look", "create")


class Lane:
    """One process. ``step`` does what happens at one moment and returns the next one, or None when it has ended."""

    def __init__(self, run: Run, starts: float, stops: float, left: list[File]) -> None:
        self.run, self.starts, self.stops = run, starts, stops
        self.backoff = Backoff()
        self.most_open = MIRRORS + len(run.rates)
        self.open: list[File] = []
        self.left = deque(left)  # by a process that has ended
        self.opened: deque[tuple[float, File]] = deque()  # heard of at that time
        self.current: list[File] = []
        self.partition_ends = starts
        self.first = min(starts + run.interval * random.random(), stops)
        self.active: list[File] = []
        self.waiting: deque[File] = deque()
        self.failed = self.arrived = self.adopted = self.crowded = False
        self.began = starts

    def step(self, at: float) -> float | None:
        """One operation each for the files that are being shipped: all take the same time."""
        if not self.active and not self.waiting:
            self._begin_turn(at)
        while self.waiting and len(self.active) < FILES_AT_ONCE:
            self.active.append(self.waiting.popleft())
        if not self.active:
            return self._end_turn(at)
        sent, going = 0.0, []
        for file in self.active:
            done, size = self._operation(file, at)
            sent += size
            self.failed |= not done
            if done and (file.shipped < file.until or (file.is_whole(self.began) and not file.confirmed)):
                going.append(file)
        self.active = going
        at += ANSWER_SECONDS + sent / PROCESS_BYTES_PER_SECOND
        return at if going or self.waiting else self._end_turn(at)

    def _begin_turn(self, at: float) -> None:
        self.began = at
        if self.partition_ends <= at or self.stops <= at:
            self._begin_partitions(at)
        self.failed = self.arrived = self.adopted = False
        while self.opened and self.opened[0][0] <= at and len(self.open) < self.most_open:
            self.open.append(self.opened.popleft()[1])
        for file in self.open:
            file.until = file.length(at)
            if file.until > file.shipped or (file.is_whole(at) and not file.confirmed):
                self.waiting.append(file)
        while self.left and len(self.open) < self.most_open:  # they are shipped in the next turn
            self.open.append(self.left.popleft())
            self.adopted = True
        self.crowded = bool(self.left or (self.opened and self.opened[0][0] <= at))

    def _begin_partitions(self, at: float) -> None:
        """Those of an hour that is over have their last line by then, and those of the next one their first."""
        look = min(ADOPT_SECONDS, self.run.interval)
        while self.partition_ends <= at and self.partition_ends < self.stops:
            begins = self.partition_ends
            self.partition_ends = HOUR * (begins // HOUR + 1)
            for file in self.current:
                file.ends = begins
            self.current = [File(rate, begins) for rate in self.run.rates]
            self.run.files += self.current
            heard = self.starts + look * (math.floor((begins - self.starts) / look) + 1)
            self.opened.extend((min(heard, self.stops), file) for file in self.current)
        if self.stops <= at:
            for file in self.current:
                file.ends = min(file.ends, self.stops)

    def _operation(self, file: File, at: float) -> tuple[bool, float]:
        """Whether it worked, and how many bytes were sent."""
        account = self.run.account
        if not file.steps and file.is_whole(self.began):
            file.confirmed = account.does("look", at)
            return file.confirmed, 0.0
        if file.steps:
            if not account.does(file.steps[0], at):
                file.steps = _first_steps(file)
                return False, 0.0
            file.steps = file.steps[1:]
            if not file.steps:
                file.shipped = file.blob
            return True, 0.0
        size = file.until - file.shipped
        size = size if size <= MAX_APPEND_BYTES else BACKLOG_APPEND_BYTES
        if file.blob != file.shipped:  # it did arrive, and the answer was lost: 412
            worked = account.does("append refused by its position", at)
            file.steps = _first_steps(file) if worked else ()
            return worked, size
        if not account.does("append", at, size):
            return False, size
        self.run.arrived(at, at + ANSWER_SECONDS - file.begins - file.shipped / file.rate)
        file.blob = min(file.shipped + size, file.until)
        if account.lost and random.random() < account.lost:
            return False, size
        file.shipped = file.blob
        self.arrived = True
        return True, size

    def _end_turn(self, at: float) -> float | None:
        self.open = [file for file in self.open if not file.confirmed]
        if self.arrived or not self.failed:
            self.backoff.failures = 0
        room = self.crowded and len(self.open) < self.most_open
        pause = 0.0 if self.adopted or room else self.run.interval
        if self.failed:
            pause = self.backoff.seconds(self.run.account.retry_after)
        if at < self.stops:
            if self.failed:
                pause = max(pause, self.run.interval * random.uniform(0.75, 1.25))
            return min(at + pause, self.stops)
        if self.backoff.failures >= TOLD_AFTER or not (self.open or self.opened):
            return None
        return at + (pause if self.failed else 0.01)


@dataclass(slots=True)
class Run:
    """What came of it, of all that the ``weight`` stands for. ``lags``: the longest, by the second of its append."""

    account: Account
    rates: tuple[float, ...]
    interval: float
    weight: int = 1
    files: list[File] = field(default_factory=list)
    lags: dict[int, float] = field(default_factory=dict)
    left: int = 0  # files that stopped processes left to the next ones

    def arrived(self, at: float, lag: float) -> None:
        if lag > self.lags.get(int(at), 0.0):
            self.lags[int(at)] = lag

    def tried(self, first: float, last: float) -> list[int]:
        """Operations in each second."""
        served, refused = self.account.served, self.account.refused
        return [self.weight * (served[second] + refused[second]) for second in range(int(first), int(last))]

    def refused(self, first: float) -> int:
        return self.weight * sum(number for second, number in self.account.refused.items() if second >= first)

    def longest_lag(self, first: float) -> float:
        return max(lag for second, lag in self.lags.items() if second >= first)


def simulate(
    account: Account,
    processes: int,
    *,
    seconds: float,
    seed: str,
    interval: float = INTERVAL,
    rates: tuple[float, ...] = RATES,
    starts: float = 0.0,
    stops: Callable[[], float] = lambda: math.inf,
) -> Run:
    """``stops`` tells when a process does; a second later there is another one, on the same spool."""
    random.seed(seed)
    run = Run(account, rates, interval, max(1, processes // MOST))
    account.operations /= run.weight
    account.bytes /= run.weight
    lanes = [Lane(run, starts, stops(), []) for _ in range(processes // run.weight)]
    heap = [(lane.first, number) for number, lane in enumerate(lanes)]
    heapq.heapify(heap)
    while heap[0][0] < seconds:
        at, number = heap[0]
        lane = lanes[number]
        following = lane.step(at)
        if following is None:
            left = [file for file in (*lane.open, *(file for _, file in lane.opened)) if file.length(at) > file.shipped]
            for file in left:
                file.steps = _first_steps(file)
            run.left += run.weight * len(left)
            lanes[number] = lane = Lane(run, at + 1.0, math.inf, left)
            following = lane.first
        heapq.heapreplace(heap, (following, number))
    return run


# --- tables ---

Rows = Iterator[Sequence[object]]


def one_process(_most: int) -> Rows:
    for name, (requests, *bodies) in MEASURED.items():
        rates = [requests * (body + FIELDS_BYTES) for body in bodies]
        appends = sum(
            1 / INTERVAL if rate * INTERVAL <= MAX_APPEND_BYTES else rate / BACKLOG_APPEND_BYTES for rate in rates
        )
        files = sum(max(1, HOUR * rate / Spool().roll_bytes) for rate in rates)
        minutes = Spool().max_bytes / sum(rates) / 60
        yield name, f"{requests:,.0f}", f"{sum(rates) / 1e6:.3g}", f"{appends:.1f}", f"{files:,.0f}", f"{minutes:,.1f}"


def calm(most: int) -> Rows:
    for processes, interval in [*((size, INTERVAL) for size in SIZES), (10_000, 10.0), (10_000, 30.0)]:
        if processes <= most:
            first, last = 3 * interval, 13 * interval
            run = simulate(Account(), processes, seconds=last, seed=f"calm {processes} {interval}", interval=interval)
            tried = run.tried(first, last)
            mean = sum(tried) / len(tried)
            parts = mean / ACCOUNT_OPERATIONS, processes * sum(RATES) / ACCOUNT_BYTES
            numbers = f"{processes:,}", f"{interval:.0f}", f"{mean:,.0f}", f"{max(tried):,}"
            yield *numbers, *(f"{part:.2%}" for part in parts), f"{run.longest_lag(first):.1f}"


def intervals(_most: int) -> Rows:
    for interval in (1.0, 2.0, 5.0, 10.0, 30.0, 60.0):
        period, look = interval + ANSWER_SECONDS, min(ADOPT_SECONDS, interval)
        lags = f"{interval / 2 + ANSWER_SECONDS:.1f}", f"{interval + look + 3 * ANSWER_SECONDS:.1f}"
        blobs = max(1, math.ceil(24 * HOUR / period / FULL_BLOCKS))
        appends = len(RATES) * MONTH_HOURS * HOUR / period
        most = ACCOUNT_OPERATIONS / 2 * period / len(RATES)
        yield f"{interval:.0f}", *lags, f"{HOUR / period:,.0f}", blobs, f"{appends / 1e6:.2f}", f"{most:,.0f}"


def edges(most: int) -> Rows:
    hour, start, stop, minute = "the full hour", "all start", "all stop, and start again", "the same within a minute"
    all_of_them = [(10_000, 2.0, name) for name in (hour, start, stop, minute)]
    for processes, interval, name in [
        (100, 2.0, hour),
        (1_000, 2.0, hour),
        (1_000, 2.0, stop),
        *all_of_them,
        (10_000, 10.0, hour),
    ]:
        if processes <= most:
            at = HOUR if name == hour else 20.0
            run = simulate(
                Account(ACCOUNT_OPERATIONS, ACCOUNT_BYTES),
                processes,
                seconds=at + 150,
                seed=f"{name} {processes} {interval}",
                interval=interval,
                starts={hour: HOUR - 30, start: at}.get(name, 0.0),
                stops={stop: lambda: 20.0, minute: lambda: 20 + 60 * random.random()}.get(name, lambda: math.inf),
            )
            full = sum(second >= at for second in run.account.refused)
            what = name, f"{processes:,}", f"{interval:.0f}", f"{max(run.tried(at - 1, at + 150)):,}"
            yield *what, full, f"{run.refused(at):,}", f"{run.longest_lag(at):.1f}", run.left


def outage(most: int) -> Rows:
    ends = HOUR + 1800
    for processes, retry_after in [(100, 0.0), (1_000, 0.0), (10_000, 0.0), (10_000, 10.0)]:
        if processes <= most:
            account = Account(ACCOUNT_OPERATIONS, ACCOUNT_BYTES, (ends - HOUR, ends), retry_after)
            seed = f"outage {processes} {retry_after}"
            run = simulate(account, processes, seconds=ends + 600, seed=seed, starts=ends - HOUR - 60)
            during, after = sum(run.tried(ends - 600, ends)) / 600, max(run.tried(ends, ends + 600))
            late = 2 * INTERVAL + 1
            caught_up = max(second for second, lag in run.lags.items() if lag > late) - ends
            what = f"{processes:,}", f"{retry_after:.0f}", f"{during:,.0f}", f"{after:,}", f"{run.refused(ends):,}"
            yield *what, f"{processes * sum(RATES) * HOUR / 1e9:,.0f}", f"{caught_up:.0f}", f"{HOUR / caught_up:.0f}"


def too_much(most: int) -> Rows:
    for wanted in (0.9, 1.1, 1.5, 3.0):
        for retry_after in (0.0, 10.0) if most >= MOST else ():
            account = Account(MOST * len(RATES) / (INTERVAL + ANSWER_SECONDS) / wanted, retry_after=retry_after)
            run = simulate(account, MOST, seconds=900, seed=f"too much {wanted} {retry_after}")
            done = sum(account.served[second] for second in range(600, 900)) / 300 / account.operations
            tried = sum(run.tried(600, 900)) / 300 / account.operations
            lags = sorted(900 - file.begins - file.shipped / file.rate for file in run.files)
            what = wanted, f"{retry_after:.0f}", f"{done:.2f}", f"{tried:.2f}"
            yield *what, f"{lags[len(lags) // 2]:.1f}", f"{lags[-1]:.0f}"


def month(_most: int) -> Rows:
    for processes in SIZES:
        files, size = processes * len(RATES) * MONTH_HOURS, sum(RATES) / len(RATES) * HOUR
        yield (
            f"{processes:,}",
            f"{files:,}",
            f"{size / 1e6:.0f}",
            f"{files * size / 1e12:,.2f}",
            f"{math.ceil(files / LISTED):,}",
        )


TABLES: dict[Callable[[int], Rows], str] = {
    one_process: "requests of a process | a second | MB/s to the disk | appends/s | files an hour | 10 GiB full after min",
    calm: "processes | interval s | operations/s | in the busiest second | of 20,000/s | of 25 Gbit/s | longest lag s",
    intervals: "interval s | mean lag s | longest, of a new file | blocks of an hour's blob | blobs a day, rolling_rate Day "
    "| million appends a month | processes at half of 20,000/s",
    edges: "what | processes | interval s | operations in the busiest second | seconds with refusals | refused | longest lag s "
    "| files left to the next process",
    outage: "processes | Retry-After s | operations/s meanwhile | in the busiest second after | refused after | backlog GB "
    "| all caught up after s | times as fast as it came",
    too_much: "operations wanted, of what the account takes | Retry-After s | done | tried | median lag s | longest lag s",
    month: "processes | files of a month | MB each | TB | lists of 5,000 blobs",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the tables of docs/scaling.md.")
    parser.add_argument("--most", type=int, default=SIZES[-1], metavar="N", help="leave out rows of more processes")
    most = parser.parse_args().most
    for rows, head in TABLES.items():
        print(f"| {head} |", "|" + "---|" * (head.count("|") + 1), sep="\n")
        for row in rows(most):
            print("| " + " | ".join(map(str, row)) + " |")
        print()


if __name__ == "__main__":
    main()
