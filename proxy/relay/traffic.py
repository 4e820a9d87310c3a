"""What the relay counts of the traffic. On the event loop only; kept plain, as each exchange pays for it."""

from __future__ import annotations

from bisect import bisect_left

# Upper bounds in seconds, inclusive, as Prometheus has them: answers of models, and what is added to them.
UPSTREAM_BOUNDS: tuple[float, ...] = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
ADDED_BOUNDS: tuple[float, ...] = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
DELAY_BOUNDS: tuple[float, ...] = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class Histogram:
    """How often a duration was in which range. ``counts`` has one more than ``bounds``: the longer ones."""

    __slots__ = ("bounds", "counts", "seconds")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.seconds = 0.0  # all together

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.seconds += seconds


class Traffic:
    """Answers of the model server by the hundreds of their status, and how long they took."""

    __slots__ = ("added", "classes", "upstream")

    def __init__(self) -> None:
        self.classes = [0] * 10  # 2: those from 200 to 299
        # From when the request was written to the model server until the head of its final answer has come.
        self.upstream = Histogram(UPSTREAM_BOUNDS)
        # From the request's head until it is written to the model server, and from the end of the answer until it may leave.
        self.added = Histogram(ADDED_BOUNDS)
