"""``python -m tests.drills.broken FAULT[,FAULT] run …``: the proxy with faults built in, for the drills.

What the drills must find out:
answer-first       the response leaves before its lines are written
no-position        a block is appended wherever the blob ends
assumed-position   an append that is refused for its position is taken to have worked; nobody looks
early-removal      a file that is closed is removed before the blob has all of it

What the proxy has to survive:
die-in-write       SIGKILL in the middle of a write: the last line is in the file by half
die-at:POINT:N     SIGKILL when it comes to a point of ``tests.drills.points`` for the Nth time
clock-steps        the clock steps forth and back, by hours, every few writes
worker-1-ends      the second worker can't be started again

What makes a drill possible:
keep:FOLDER        each file of lines has a second name in FOLDER, so that what was in it can be read when it is gone
hasty              shorter waits for answers, and between tries: thousands of faults fit in minutes
small-blocks       one append takes a few lines
impatient          the supervisor asks its workers often, and waits for two seconds only
polite             who stops waits longer for a last request, as clients on a busy machine may be late with it
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from proxy.cli import main
from proxy.processes import supervisor, worker
from proxy.relay import server as relay_server
from proxy.shipping import azure_blob, lane, mirror
from proxy.spool import files
from tests.drills.points import die_at

WRITES_BEFORE_DEATH = 60
WRITES_BETWEEN_STEPS = 20
CLOCK_STEPS = (0, 3600, 7200, 3600, 3599, -86400, 0, 30)  # where the clock is, in seconds from the true time


def answer_first() -> None:
    os.environ["PAYLOAD_LOGGER_SPOOL_DURABILITY"] = "none"
    append = files.LineFile.append

    def append_late(self: files.LineFile, lines: list[bytes], size: int) -> None:
        time.sleep(0.02)
        append(self, lines, size)

    files.LineFile.append = append_late  # type: ignore[method-assign]


def no_position() -> None:
    async def append(self: azure_blob.AzureBlobStore, name: str, data: bytes, _position: int) -> None:
        async with self._blob(name) as blob:
            await blob.append_block(data, len(data))

    azure_blob.AzureBlobStore.append = append  # type: ignore[method-assign]


def assumed_position() -> None:
    find = mirror.Mirror._find

    async def assume(self: mirror.Mirror) -> None:
        if self._found:
            self._advance(self.length)
        else:
            await find(self)

    mirror.Mirror._find = assume  # type: ignore[method-assign]


def early_removal() -> None:
    ship_lines = lane.Lane._ship_lines

    async def remove_and_ship(self: lane.Lane, one: mirror.Mirror, until: int) -> None:
        if one.closed:
            with contextlib.suppress(FileNotFoundError):
                one.path.unlink()
        await ship_lines(self, one, until)

    lane.Lane._ship_lines = remove_and_ship  # type: ignore[method-assign]


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


def clock_steps() -> None:
    true_time = time.time
    begin = files.Files.begin
    groups = 0

    def now() -> float:
        return true_time() + CLOCK_STEPS[groups // WRITES_BETWEEN_STEPS % len(CLOCK_STEPS)]

    def begin_then(self: files.Files, _epoch_seconds: float) -> None:
        nonlocal groups
        groups += 1
        begin(self, now())

    files.Files.begin = begin_then  # type: ignore[method-assign]
    time.time = now


def keep(folder: str) -> None:
    open_file = files.LineFile.__init__

    def open_and_link(self: files.LineFile, path: Path, partition_name: str) -> None:
        open_file(self, path, partition_name)
        os.link(path, Path(folder, path.name))

    files.LineFile.__init__ = open_and_link  # type: ignore[method-assign]


def hasty() -> None:
    lane.FIRST_RETRY_SECONDS = 0.01
    lane.LONGEST_RETRY_SECONDS = 0.1
    azure_blob.READ_SECONDS = 0.5


def small_blocks() -> None:
    mirror.MAX_APPEND_BYTES = 2048
    mirror.BACKLOG_APPEND_BYTES = 1024


def worker_1_ends() -> None:
    command = worker.command
    begun: set[str] = set()

    def command_once(fd: int, name: str) -> tuple[list[str], dict[str, str]]:
        words, environment = command(fd, name)
        if name in begun and name.endswith("-1"):
            words = [sys.executable, "-c", "raise SystemExit(3)"]
        begun.add(name)
        return words, environment

    worker.command = command_once


def impatient() -> None:
    supervisor.ASK_EVERY_SECONDS = 0.5
    supervisor.HUNG_SECONDS = 2.0


def polite() -> None:
    relay_server.IDLE_STOP_SECONDS = 10.0


FAULTS = {
    "answer-first": answer_first,
    "no-position": no_position,
    "assumed-position": assumed_position,
    "early-removal": early_removal,
    "die-in-write": die_in_write,
    "die-at": lambda point, nth: die_at(point, int(nth)),
    "clock-steps": clock_steps,
    "keep": keep,
    "hasty": hasty,
    "small-blocks": small_blocks,
    "worker-1-ends": worker_1_ends,
    "impatient": impatient,
    "polite": polite,
}


def apply(faults: str) -> None:
    """To this process, and to the workers that it starts."""
    for fault in faults.split(","):
        name, *arguments = fault.split(":")
        FAULTS[name](*arguments)
    command = worker.command

    def command_with_faults(fd: int, name: str) -> tuple[list[str], dict[str, str]]:
        words, environment = command(fd, name)
        if "proxy.processes.worker" in words[2]:
            words[2] = f"from tests.drills import broken; broken.apply({faults!r}); {words[2]}"
        return words, environment

    worker.command = command_with_faults


if __name__ == "__main__":
    apply(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
