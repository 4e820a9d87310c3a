"""Azurite killed with SIGKILL while the proxy ships to it.

It forgets what it acknowledged in its last seconds, as Azure would not: see ``tests.azure.azurite``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from azure.storage.blob import ContainerClient

from tests.azure.azurite import ACCOUNT_KEY, Azurite, azurite
from tests.azure.blob_server import ACCOUNT
from tests.drills.load import ProxyProcess, Request, until
from tests.drills.shipping import CONTAINER, GOES_ON, NOTHING, SOON_SECONDS, Blobs, Shipping, compare
from tests.drills.sizes import AZURITE_KILLS, patiently

_FORGOTTEN = re.compile(r"has lost (\d+) bytes; they are shipped again")


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Azurite]:
    with azurite(tmp_path / "azurite") as server:
        yield server


@pytest.fixture
def to_azurite(tmp_path: Path, model: str, real: Azurite) -> Shipping:
    def lines_only(request_id: str) -> Request:
        """A body is removed from the spool when it is acknowledged; what Azurite forgets of them is gone."""
        return "/echo", b'{"id": "%b"}' % request_id.encode()

    return Shipping(tmp_path, model, real.account_url, lines_only)


def read(server: Azurite) -> Blobs:
    credential = {"account_name": ACCOUNT, "account_key": ACCOUNT_KEY}
    with ContainerClient(server.account_url, CONTAINER, credential) as container:
        names = {blob.name: blob.blob_type.value for blob in container.list_blobs()} if container.exists() else {}
        return {f"{CONTAINER}/{name}": (kind, container.download_blob(name).readall()) for name, kind in names.items()}


async def kill_again_and_again(shipping: Shipping, server: Azurite, kills: int, *faults: str) -> tuple[set[str], int]:
    """Names of the files that were gone from the spool at some kill, and the bytes that Azurite forgot of the others."""
    gone: set[str] = set()

    def gone_now() -> set[str]:
        return {path.name for path in shipping.kept.iterdir()} - {path.name for path in shipping.spooled()}

    async def one_more(proxy: ProxyProcess, words: str, times: int) -> None:
        await until(lambda: proxy.log().count(words) > times, SOON_SECONDS)

    async with shipping.process("hasty", *faults) as proxy:
        async with shipping.load(proxy, "load", per_second=200):
            for _ in range(kills):
                files = len(gone_now())
                while not await asyncio.to_thread(read, server) or (
                    "clock-steps" in faults and len(gone_now()) == files
                ):
                    pass
                told = proxy.log().count(NOTHING)
                await asyncio.to_thread(server.kill)
                await one_more(proxy, NOTHING, told)
                gone |= gone_now()
                told = proxy.log().count(GOES_ON)
                await asyncio.to_thread(server.start)
                await one_more(proxy, GOES_ON, told)
        received, delivered, *rest = await shipping.stop(proxy)
    assert received == delivered == 2 * len(shipping.traffic.seen)
    assert rest == [0, 0]
    assert not shipping.spooled()
    return gone, sum(map(int, _FORGOTTEN.findall(shipping.log())))


@patiently
async def test_what_is_still_in_the_spool_is_shipped_again(
    to_azurite: Shipping, real: Azurite, figure: Callable[[str, str], None]
) -> None:
    gone, forgotten = await kill_again_and_again(to_azurite, real, AZURITE_KILLS)
    arrived = compare(to_azurite, await asyncio.to_thread(read, real))
    figure(
        "Azurite killed",
        f"{AZURITE_KILLS} kills; {forgotten} bytes that it had acknowledged and forgot were shipped again; {arrived.lines} "
        f"lines: {len(arrived.lost(to_azurite.traffic.seen))} lost, {len(arrived.doubled())} twice",
    )
    assert gone == set()
    arrived.check(to_azurite.traffic)


@patiently
async def test_what_has_left_the_spool_is_for_the_destination_to_keep(
    to_azurite: Shipping, real: Azurite, figure: Callable[[str, str], None]
) -> None:
    """Files that are closed, and acknowledged, are removed. Azurite loses some; nothing else is lost, and nothing is twice."""
    gone, _ = await kill_again_and_again(to_azurite, real, AZURITE_KILLS, "clock-steps")
    arrived = compare(to_azurite, await asyncio.to_thread(read, real))
    figure(
        "Azurite killed, files closed meanwhile",
        f"{AZURITE_KILLS} kills; {len(gone)} files had been acknowledged whole, and removed; Azurite forgot "
        f"{arrived.gap_lines} lines of theirs; {len(arrived.doubled())} twice",
    )
    assert gone
    assert {name for name, _, _ in arrived.gaps} <= gone
    assert arrived.lines + arrived.gap_lines == 2 * len(to_azurite.traffic.seen)
    assert arrived.twice == arrived.wrong == []
    assert arrived.doubled() == set()
