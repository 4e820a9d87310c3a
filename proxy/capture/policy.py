"""Which exchanges are recorded in which collections: pure, and alike in every replica."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from fnmatch import translate

from proxy.relay.headers import origin_form
from proxy.settings import REQUEST, RESPONSE, Capture, DataCollector

_REMEMBERED = 4096
_REMEMBERED_CHARACTERS = 256


class Policy:
    """Decides by method, path and request id."""

    def __init__(self, collector: DataCollector, capture: Capture) -> None:
        self._include = _Rules(capture.include)
        self._exclude = _Rules(capture.exclude)
        self.rates = {
            name: collector.sampling_rate if collection.sampling_rate is None else collection.sampling_rate
            for name, collection in collector.collections.items()
            if name in (REQUEST, RESPONSE) and collection.enabled
        }
        self._all = frozenset(name for name, rate in self.rates.items() if rate >= 1)
        self._sampled = any(0 < rate < 1 for rate in self.rates.values())
        self._remembered: dict[tuple[str, str], bool] = {}

    def collections(self, method: str, target: str, request_id: str) -> frozenset[str]:
        """The collections that this exchange is recorded in, of ``request`` and ``response``."""
        if not self._selects(method, target.partition("?")[0] if target.startswith("/") else _path(method, target)):
            return frozenset()
        if not self._sampled:
            return self._all
        position = sample_position(request_id)
        return frozenset(name for name, rate in self.rates.items() if position < rate)

    def _selects(self, method: str, path: str) -> bool:
        selected = self._remembered.get((method, path))
        if selected is None:
            selected = self._include.match(method, path) and not self._exclude.match(method, path)
            if len(path) <= _REMEMBERED_CHARACTERS:  # paths are the client's to choose
                if len(self._remembered) >= _REMEMBERED:
                    self._remembered.clear()
                self._remembered[method, path] = selected
        return selected


def sample_position(request_id: str) -> float:
    """Where an exchange stands between 0 (always recorded) and 1. A higher rate records all that a lower one does."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _path(method: str, target: str) -> str:
    """The path of a target in absolute form (RFC 9112 §3.2.2)."""
    return (
        origin_form(method, target.encode("utf-8", "surrogateescape"), b"")[0]
        .partition(b"?")[0]
        .decode("utf-8", "surrogateescape")
    )


class _Rules:
    """Path rules: ``[METHOD[,METHOD…] ]PATTERN`` with ``*`` and ``?``."""

    def __init__(self, rules: Iterable[str]) -> None:
        self._rules = []
        for rule in rules:
            methods, _, pattern = rule.strip().rpartition(" ")
            names = frozenset(name.strip().upper() for name in methods.split(",") if name.strip())
            self._rules.append((names, re.compile(translate(pattern.replace("[", "[[]")))))

    def match(self, method: str, path: str) -> bool:
        return any((not names or method in names) and pattern.match(path) for names, pattern in self._rules)
