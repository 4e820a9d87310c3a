"""The self-test's report: a line for each thing that was looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

from proxy.selftest.differences import Difference


class Found(Enum):
    OK = "ok"
    DIFFERS = "differs"
    NOTE = "note"  # to be known; no fault of the proxy


class Report:
    """Hands lines to ``write``. ``good``: nothing differs but what docs/transparency.md lists."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self.good = True

    def heading(self, text: str) -> None:
        self._write(f"\n{text}")

    def line(self, found: Found, what: str, words: str) -> None:
        self.good &= found is not Found.DIFFERS
        self.plain(found.value, f"{what:<24} {words}")

    def plain(self, first: str, words: str) -> None:
        self._write(f"{first:<8} {words}".rstrip())

    def differences(self, differences: Iterable[Difference]) -> None:
        """One below the other, each once."""
        for words in dict.fromkeys(one.words for one in differences):
            self.plain("", f"  {words}")

    def end(self, text: str) -> None:
        self._write(text)
