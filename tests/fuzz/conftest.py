from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import pytest

from tests.fuzz import sizes

Found = Callable[[Counter[str]], None]
_found = pytest.StashKey[list[str]]()


@pytest.fixture
def found(request: pytest.FixtureRequest) -> Found:
    """Takes what a fuzz has seen; a long run ends with it."""

    def note(seen: Counter[str]) -> None:
        line = f"{request.node.name}: " + ", ".join(f"{kind} {number}" for kind, number in seen.most_common())
        print(line)
        request.config.stash.setdefault(_found, []).append(line)

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = terminalreporter.config.stash.get(_found, [])
    if lines and (sizes.LONG or os.environ.get("DRILL_FIGURES")):
        terminalreporter.section(f"fuzz, DRILL_SEED={sizes.START}")
        for line in lines:
            terminalreporter.line(line)
