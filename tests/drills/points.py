"""Where the proxy may be when it is killed: functions that it is about to enter, or has just left.

All of them are of modules that no build compiles.
"""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from proxy.shipping.azure_blob import AzureBlobStore
from proxy.shipping.lane import Lane
from proxy.shipping.mirror import Mirror
from proxy.spool import files, recovery


@dataclass(frozen=True, slots=True)
class Point:
    """``most`` times at least, a short run under load comes here. when: whether a call counts, by its arguments or result."""

    owner: type | ModuleType
    function: str
    most: int = 1
    before: bool = False
    when: Callable[..., bool] = lambda *_: True


POINTS = {
    "file-made": Point(files.LineFile, "__init__", 2),
    "before-write": Point(files.LineFile, "append", 50, before=True),
    "after-write": Point(files.LineFile, "append", 50),
    "body-named": Point(files.Files, "finish_body", 5),  # and its line not written
    "before-recovery": Point(recovery, "cut_torn_line", before=True),
    "within-recovery": Point(recovery, "cut_torn_line"),  # the journal is still there
    "adopted": Point(Lane, "_adopt", when=lambda adopted: adopted),
    "blob-found": Point(Mirror, "_find", 2),
    "blob-made": Point(AzureBlobStore, "create", 2),
    "before-append": Point(AzureBlobStore, "append", 10, before=True),
    "append-answered": Point(AzureBlobStore, "append", 10),
    "body-put": Point(AzureBlobStore, "put", 5),
    "before-removal": Point(Lane, "_close", before=True, when=lambda _lane, mirror: mirror.is_done),
    "after-removal": Point(Lane, "_forget", before=True),
    "before-rename": Point(Mirror, "roll", before=True),
    "after-rename": Point(Mirror, "roll"),
}
NEED_A_DEAD_ONE = ("before-recovery", "within-recovery", "adopted", "before-removal", "after-removal")
NEED_A_FOREIGN_WRITE = ("before-rename", "after-rename")


def die_at(name: str, nth: int) -> None:
    """Has this process kill itself the ``nth`` time that it comes to a point."""
    point = POINTS[name]
    function: Callable[..., Any] = getattr(point.owner, point.function)
    left = nth

    def pass_by(*seen: object) -> None:
        nonlocal left
        left -= point.when(*seen)
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if point.before:
            pass_by(*arguments)
        result = function(*arguments, **options)
        if not point.before:
            pass_by(result)
        return result

    async def wrapped_coroutine(*arguments: Any, **options: Any) -> Any:
        if point.before:
            pass_by(*arguments)
        result = await function(*arguments, **options)
        if not point.before:
            pass_by(result)
        return result

    setattr(point.owner, point.function, wrapped_coroutine if inspect.iscoroutinefunction(function) else wrapped)
