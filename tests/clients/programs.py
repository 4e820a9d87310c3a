"""Servers and clients of others, as processes of their own, in an environment of their own. ``make test`` installs it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tests.custom_logging.sdk import environment

FOLDER = Path(__file__).parent
SECONDS = 30  # a program that says nothing for longer has failed
Found = TypeVar("Found")
_FLAGS = "--host 127.0.0.1 --port 0 --no-access-log --no-use-colors --no-proxy-headers --loop asyncio"
_RUNNING = re.compile(r"Uvicorn running on (http://\S+)")


def python() -> Path:
    path = Path(sys.prefix, "clients", "bin", "python")
    assert path.exists(), f"there is no {path}; run `make test`, which installs it"
    return path


def wait_until(ready: Callable[[], Found | None], process: subprocess.Popen[bytes], log_path: Path) -> Found:
    """What ``ready`` finds in the end; fails when the process has ended."""
    deadline = time.monotonic() + SECONDS
    while not (found := ready()):
        assert process.poll() is None, log_path.read_text()
        assert time.monotonic() < deadline, f"it does not start: {log_path.read_text()}"
        time.sleep(0.02)
    return found


class Program:
    """A script of this folder. It prints a line of JSON for whatever happens, and reads lines that tell it what to do."""

    def __init__(self, folder: Path, script: str, *arguments: str) -> None:
        self._errors = folder / f"{script}.log"
        with self._errors.open("wb") as log:
            self._process = subprocess.Popen(
                [python(), FOLDER / script, *arguments],
                cwd=folder,
                env=environment({}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    async def said(self) -> Any:
        """The next line. Fails when the program has ended, or says nothing."""
        assert self._process.stdout is not None
        reading = asyncio.ensure_future(asyncio.to_thread(self._process.stdout.readline))
        try:
            async with asyncio.timeout(SECONDS):
                line = await asyncio.shield(reading)
        except (asyncio.CancelledError, TimeoutError):
            self._process.kill()  # else the thread would wait on
            await reading
            raise
        assert line, self._errors.read_text()
        return json.loads(line)

    def tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n".encode())
        self._process.stdin.flush()

    def end(self) -> None:
        """It comes to its end when it is told nothing more; fails when it had something to complain about."""
        with self._process as process:
            try:
                assert process.stdin is not None
                process.stdin.close()
                assert process.wait(SECONDS) == 0, self._errors.read_text()
            finally:
                process.kill()
        assert "Traceback" not in self._errors.read_text(), self._errors.read_text()

    def kill(self) -> None:
        self._process.kill()
        with contextlib.suppress(BrokenPipeError), self._process:  # closes its pipes, and waits
            pass


class Uvicorn:
    """``fastapi_app.py`` in uvicorn. Several start at once, as each is waited for when its URL is asked for."""

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path) -> None:
        self.process = process
        self._log_path = log_path

    @functools.cached_property
    def url(self) -> str:
        return wait_until(lambda: _RUNNING.search(self._log_path.read_text()), self.process, self._log_path)[1]


@contextlib.contextmanager
def uvicorn(folder: Path, *flags: str) -> Iterator[Uvicorn]:
    log_path = folder / f"{'-'.join(['uvicorn', *flags])}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [python(), "-m", "uvicorn", "--app-dir", FOLDER, *_FLAGS.split(), *flags, "fastapi_app:app"],
            cwd=folder,
            env=environment({}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield Uvicorn(process, log_path)
    finally:
        process.kill()
        process.wait(SECONDS)
    assert "Traceback" not in log_path.read_text(), log_path.read_text()


async def selftest(url: str, *options: str) -> str:
    """What ``payload-logger selftest`` prints of a server; fails when it finds a difference, or no answer worth comparing."""
    arguments = ("selftest", "--upstream", url, "--count", "20", "--quick", *options)
    words = [sys.executable, "-m", "proxy", *arguments]
    done = await asyncio.to_thread(
        subprocess.run, words, env=environment({}), capture_output=True, text=True, timeout=2 * SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing differs but what docs/transparency.md lists." in done.stdout
    assert re.search(r"^ok .+ 200, [1-9]\d* bytes$", done.stdout, re.MULTILINE), done.stdout
    return done.stdout
