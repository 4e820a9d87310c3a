"""How much is fuzzed: short in ``make test``, long with DRILLS=long; ``DRILL_…`` sets one of them, or the seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.drills.sizes import LONG, SEED, patiently, size

__all__ = ["DIFFERENTIAL", "EXCHANGES", "LONG", "REQUESTS", "RESPONSES", "START", "fuzz", "patiently"]

REQUESTS = size("FUZZ_REQUESTS", 400, 25_000)  # each is sent whole, byte by byte, and cut somewhere
RESPONSES = size("FUZZ_RESPONSES", 300, 25_000)
DIFFERENTIAL = size("FUZZ_DIFFERENTIAL", 300, 5_000)  # connections, of two to nine exchanges each
EXCHANGES = size("FUZZ_EXCHANGES", 1000, 15_000)  # so many exchanges these must have at least

# The short run is the same each time; a long one is another each time, and says which.
START = size("SEED", SEED, random.SystemRandom().randrange(2**32))
_ROUND = 1000  # hypothesis remembers what it has tried, and grows with it


def fuzz(cases: int, test: Callable[..., None], **strategies: st.SearchStrategy[Any]) -> None:
    """Tries ``test`` with ``cases`` examples of the strategies for its arguments."""
    print(f"DRILL_SEED={START}")
    for number, begin in enumerate(range(0, cases, _ROUND)):
        limits = settings(
            database=None,
            deadline=None,
            max_examples=min(_ROUND, cases - begin),
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )
        seed(START + number)(limits(given(**strategies)(test)))()
