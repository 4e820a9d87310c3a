from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.azure.blob_server import BlobServer, blob_server
from tests.drills import sizes
from tests.drills.load import REPOSITORY, PatientModel
from tests.drills.shipping import Shipping
from tests.harness import model_server

Figure = Callable[[str, str], None]

_figures = pytest.StashKey[list[tuple[str, str]]]()


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """``figure(drill, found)``: a row of the table that ``make drills`` ends with; what a drill found, beside that it passed."""

    def note(drill: str, found: str) -> None:
        print(f"{drill}: {found}")
        request.config.stash.setdefault(_figures, []).append((drill, found))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = terminalreporter.config.stash.get(_figures, [])
    if rows and (sizes.LONG or os.environ.get("DRILL_FIGURES")):
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
        terminalreporter.section("figures")
        terminalreporter.line(
            f"{time.strftime('%Y-%m-%d', time.gmtime())}, {'long' if sizes.LONG else 'short'} sizes, seed {sizes.SEED}, "
            f"commit {commit.stdout.strip() or 'unknown'}, Python {platform.python_version()}, {os.cpu_count()} cores\n"
        )
        terminalreporter.line("| drill | found |\n|---|---|")
        for drill, found in rows:
            terminalreporter.line(f"| {drill} | {found} |")


def _needs_root() -> None:
    if os.geteuid() != 0 and not os.environ.get("CI"):
        pytest.skip("only root can mount a disk")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    _needs_root()
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0755", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def freezable_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MiB that ``fsfreeze`` can make hang."""
    _needs_root()
    image, path = tmp_path / "image", tmp_path / "disk"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop,noatime", str(image), str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
async def patient() -> AsyncIterator[PatientModel]:
    model = PatientModel()
    async with model_server(model.handle) as model.server:
        yield model


@pytest.fixture
async def server() -> AsyncIterator[BlobServer]:
    async with blob_server() as server:
        yield server


@pytest.fixture
def shipping(tmp_path: Path, model: str, server: BlobServer) -> Shipping:
    return Shipping(tmp_path, model, server.account_url)
