"""Which settings can change while the proxy runs, and what stays as it is until it is started again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from proxy import config_checks
from proxy.settings import PAYLOAD_COLLECTIONS, Collection, Settings

# Below these keys everything can change.
CHANGEABLE = frozenset(
    {
        "data_collector.sampling_rate",
        "data_collector.request_logging.capture_headers",
        "capture.include",
        "capture.exclude",
        "capture.max_inline_bytes",
        "capture.max_body_bytes",
        "capture.max_decoded_bytes",
        "capture.extended_fields",
        "logs.level",
        "logs.format",
    }
)
_COLLECTIONS = "data_collector.collections"
_ABSENT = Collection(enabled=False)


@dataclass(frozen=True, slots=True)
class Reloaded:
    """The settings to go on with: the new ones where they can change, else the old ones. Words, one line each."""

    settings: Settings
    changed: tuple[str, ...]
    refused: tuple[str, ...]


def reloaded(old: Settings, new: Settings) -> Reloaded:
    """What becomes of ``old`` when ``new`` was read. ``new`` is valid by itself."""
    merge = _Merge(old)
    settings = merge.struct("", old, new)
    broken = [] if merge.refused == [] else [words for _, words in config_checks.problems(settings)]
    if broken:  # the part that can change does not go with the part that can't
        return Reloaded(old, (), (*merge.refused, *(f"{words}; nothing is changed" for words in broken)))
    return Reloaded(settings, tuple(merge.changed), tuple(merge.refused))


class _Merge:
    def __init__(self, old: Settings) -> None:
        self.changed: list[str] = []
        self.refused: list[str] = []
        self._has_sdk_endpoint = old.sdk_endpoint is not None

    def struct(self, key: str, old: Any, new: Any) -> Any:
        """``old`` with what can change taken from ``new``, of the same type."""
        fields = {}
        for name in old.__struct_fields__:
            path = f"{key}.{name}".lstrip(".")
            fields[name] = self._value(path, getattr(old, name), getattr(new, name))
        return msgspec.structs.replace(old, **fields)

    def _value(self, path: str, old: Any, new: Any) -> Any:
        if path == _COLLECTIONS:
            return self._collections(old, new)
        if isinstance(old, msgspec.Struct) and type(old) is type(new):
            return self.struct(path, old, new)
        if old == new:
            return old
        if path in CHANGEABLE:
            self.changed.append(f"{path}: {_shown(old)} → {_shown(new)}")
            return new
        self.refused.append(f"{path}: {_shown(old)} stays until a restart")
        return old

    def _collections(self, old: dict[str, Collection], new: dict[str, Collection]) -> dict[str, Collection]:
        """A collection that is not there is one that is not enabled."""
        merged = {}
        for name in dict.fromkeys((*old, *new)):
            before, after = old.get(name, _ABSENT), new.get(name, _ABSENT)
            merged[name] = self._collection(f"{_COLLECTIONS}.{name}", name, before, after)
        return {name: one for name, one in merged.items() if name in old or one.enabled}

    def _collection(self, path: str, name: str, old: Collection, new: Collection) -> Collection:
        if new.enabled and not old.enabled and not self._has_sdk_endpoint and name not in PAYLOAD_COLLECTIONS:
            self.refused.append(f"{path}.enabled: there is no listener for the SDK until a restart")
            return old
        if old.enabled:
            for key in ("data", "client_id"):
                if getattr(old, key) != getattr(new, key) and new.enabled:
                    self.refused.append(f"{path}.{key}: it stays as it is until a restart")
        for key in ("enabled", "sampling_rate"):
            before, after = getattr(old, key), getattr(new, key)
            if before != after:
                self.changed.append(f"{path}.{key}: {_shown(before)} → {_shown(after)}")
        place = old if old.enabled else new
        return msgspec.structs.replace(new, data=place.data, client_id=place.client_id)


def _shown(value: object) -> str:
    return msgspec.json.encode(value).decode()
