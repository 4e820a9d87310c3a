"""``python -m tests.drills.broken FAULT run …``: the proxy with a fault built in, for the drills.

answer-first   the response leaves before its lines are written: what the drills must find out
die-in-write   SIGKILL in the middle of a write: the last line is in the file by half
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

from proxy.cli import main
from proxy.spool import files

WRITES_BEFORE_DEATH = 60


def answer_first() -> None:
    os.environ["PAYLOAD_LOGGER_SPOOL_DURABILITY"] = "none"
    append = files.LineFile.append

    def append_late(self: files.LineFile, lines: list[bytes], size: int) -> None:
        time.sleep(0.02)
        append(self, lines, size)

    files.LineFile.append = append_late  # type: ignore[method-assign]


def die_in_write() -> None:
    writev = os.writev
    left = WRITES_BEFORE_DEATH

    def write_half(fd: int, lines: Sequence[bytes]) -> int:
        nonlocal left
        left -= 1
        if left > 0 or threading.current_thread().name != "spool-writer":
            return writev(fd, lines)
        content = b"".join(lines)
        os.write(fd, content[: -(len(lines[-1]) // 2)])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    os.writev = write_half  # type: ignore[assignment]


FAULTS = {"answer-first": answer_first, "die-in-write": die_in_write}

if __name__ == "__main__":
    FAULTS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
