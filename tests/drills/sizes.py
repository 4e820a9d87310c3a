"""How large the drills are: short in ``make test``, long in ``make drills``; ``DRILL_…`` sets one of them, or the seed."""

from __future__ import annotations

import os

import pytest

LONG = os.environ.get("DRILLS") == "long"


def size(name: str, short: int, long: int) -> int:
    return int(os.environ.get(f"DRILL_{name}", long if LONG else short))


SEED = size("SEED", 20241, 20241)
KILLS = size("KILLS", 30, 500)  # drill 1, local storage
SHIPPING_KILLS = size("SHIPPING_KILLS", 10, 500)  # drill 1, Azure Blob
POINT_ROUNDS = size("POINT_ROUNDS", 1, 20)  # drill 2: how often the proxy dies at each point
OUTAGE_SECONDS = size("OUTAGE_SECONDS", 4, 1800)  # drill 3
OUTAGE_RATE = size("OUTAGE_RATE", 100, 300)  # requests a second
BACKLOG_MIB = size("BACKLOG_MIB", 64, 2048)
FLAKY_APPENDS = size("FLAKY_APPENDS", 200, 5000)  # drill 4
AMBIGUOUS_APPENDS = size("AMBIGUOUS_APPENDS", 100, 10_000)  # drill 5
FOREIGN_WRITES = size("FOREIGN_WRITES", 5, 500)
FORBIDDEN_SECONDS = size("FORBIDDEN_SECONDS", 3, 120)  # drill 6
LARGE_MIB = size("LARGE_MIB", 32, 1024)  # drill 8: eight bodies of that size at once
BREAK_STEP = size("BREAK_STEP", 23, 1)  # drill 9: bytes from one break to the next
SLOWLORIS = size("SLOWLORIS", 100, 500)
STOPS = size("STOPS", 1, 100)  # drill 11
CLOCK_STEPS = size("CLOCK_STEPS", 8, 200)  # drill 12
SOAK_SECONDS = size("SOAK_SECONDS", 60, 4 * 3600)  # drill 13
AZURITE_KILLS = size("AZURITE_KILLS", 1, 20)

patiently = pytest.mark.timeout(6 * 3600 if LONG else 180)
