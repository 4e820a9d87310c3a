"""Azurite killed with SIGKILL while the proxy ships to it.

It forgets what it acknowledged in its last seconds, as Azure would not: see ``tests.azure.azurite``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from azure.storage.blob import ContainerClient

from tests.azure.azurite import ACCOUNT_KEY, Azurite, azurite
from tests.azure.blob_server import ACCOUNT
from tests.drills.load import ProxyProcess, Request, until
from tests.drills.shipping import CONTAINER, FAILS, GOES_ON, SOON_SECONDS, Blobs, Shipping, compare
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


async def read(server: Azurite) -> Blobs:
    def blobs() -> Blobs:
        credential = {"account_name": ACCOUNT, "account_key": ACCOUNT_KEY}
        with ContainerClient(server.account_url, CONTAINER, credential) as container:
            names = {blob.name: blob.blob_type.value for blob in container.list_blobs()} if container.exists() else {}
            return {
                f"{CONTAINER}/{name}": (kind, container.download_blob(name).readall()) for name, kind in names.items()
            }

    return await asyncio.to_thread(blobs)


@dataclass
class Kills:
    kills: int = 0
    gone: set[str] = field(default_factory=set)  # files that were no more in the spool at some kill
    forgotten_bytes: int = 0  # of the others, which Azurite had acknowledged


async def kill_again_and_again(shipping: Shipping, server: Azurite, *, closing: bool) -> Kills:
    """AZURITE_KILLS times, and then on until Azurite has forgotten something. closing: files are closed, and so removed."""
    done = Kills()

    def gone() -> set[str]:
        return {path.name for path in shipping.kept.iterdir()} - {path.name for path in shipping.spooled()}

    async def one_more(proxy: ProxyProcess, words: str, times: int) -> None:
        await until(lambda: proxy.log().count(words) > times, SOON_SECONDS)

    async with shipping.process("hasty", *(["clock-steps"] if closing else [])) as proxy:
        async with shipping.load(proxy, "load", per_second=200):
            while done.kills < AZURITE_KILLS or not (closing or done.forgotten_bytes):
                before = len(gone())
                while len(gone()) == before if closing else not any(data for _, data in (await read(server)).values()):
                    await asyncio.sleep(0.01)
                told = proxy.log().count(FAILS)
                await asyncio.to_thread(server.kill)
                done.kills += 1
                await one_more(proxy, FAILS, told)
                done.gone |= gone()
                told = proxy.log().count(GOES_ON)
                await asyncio.to_thread(server.start)
                await one_more(proxy, GOES_ON, told)
                done.forgotten_bytes = sum(map(int, _FORGOTTEN.findall(proxy.log())))
        received, delivered, *rest = await shipping.stop(proxy)
    assert received == delivered == 2 * len(shipping.traffic.seen)
    assert rest == [0, 0]
    assert not shipping.spooled()
    return done


@patiently
async def test_what_is_still_in_the_spool_is_shipped_again(
    to_azurite: Shipping, real: Azurite, figure: Callable[[str, str], None]
) -> None:
    done = await kill_again_and_again(to_azurite, real, closing=False)
    arrived = compare(to_azurite, await read(real))
    figure(
        "Azurite killed",
        f"{done.kills} kills; {done.forgotten_bytes} bytes that it had acknowledged and forgot were shipped again; "
        f"{arrived.lines} lines: {len(arrived.lost(to_azurite.traffic.seen))} lost, {len(arrived.doubled())} twice",
    )
    assert done.gone == set()
    arrived.check(to_azurite.traffic)


@patiently
async def test_what_has_left_the_spool_is_for_the_destination_to_keep(
    to_azurite: Shipping, real: Azurite, figure: Callable[[str, str], None]
) -> None:
    """Files that are closed, and acknowledged, are removed. Azurite loses some; nothing else is lost, and nothing is twice."""
    done = await kill_again_and_again(to_azurite, real, closing=True)
    arrived = compare(to_azurite, await read(real))
    figure(
        "Azurite killed, files closed meanwhile",
        f"{done.kills} kills; {len(done.gone)} files had been acknowledged whole, and removed; Azurite forgot "
        f"{arrived.gap_lines} lines of theirs; {len(arrived.doubled())} twice",
    )
    assert done.gone
    assert {name for name, _, _ in arrived.gaps} <= done.gone
    assert arrived.lines + arrived.gap_lines == 2 * len(to_azurite.traffic.seen)
    assert arrived.twice == arrived.wrong == []
    assert arrived.doubled() == set()
