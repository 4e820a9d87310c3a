"""The proxy is killed with SIGKILL while the real SDK sends frames to it, and started again."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.azure.blob_server import reserved_port
from tests.custom_logging.sdk import NEW, running, sdk_env, write_configuration
from tests.drills.load import until
from tests.drills.sizes import SEED

FRAMES_BETWEEN = 100
_SENT = re.compile(r"send payload model_inputs@(\S+) (succeeded|failed) - (\d*)")  # said with AZUREML_MDC_DEBUG
SCRIPT = """
import itertools, pathlib
inputs = Collector(name="model_inputs")
for number in itertools.count():
    while get_queue().length() > 20:
        time.sleep(0.001)
    if pathlib.Path("stop").exists():
        break
    inputs.collect(pd.DataFrame({"number": [number], "text": ["x" * 2000]}))
"""


@dataclass
class Drill:
    """Frames, by id."""

    statuses: set[str]
    succeeded: set[str]  # as the SDK was told
    recorded: Counter[str]  # how many lines there are of each

    @property
    def lost(self) -> set[str]:
        return self.succeeded - self.recorded.keys()


async def drill(folder: Path, kills: int, *, broken: str | None = None) -> Drill:
    random_ = random.Random(SEED)
    with reserved_port() as port:
        configuration = write_configuration(
            folder,
            {
                "data_collector": {"collections": {"model_inputs": {"enabled": "True"}}},
                "proxy": {"listen": "127.0.0.1:0"},
                "storage": {"url": str(folder / "data")},
                "spool": {"max_hold": "20s"},  # on a machine that is busy with other things, too
                "custom_logging": {"listen": f"127.0.0.1:{port}"},
            },
        )
        variables = await sdk_env(configuration)
        assert variables["AZUREML_MDC_ENABLED"] == "true"
        variables["AZUREML_MDC_DEBUG"] = "true"
        async with NEW.script(SCRIPT, variables, folder) as output:

            async def more(word: str, count: int) -> None:
                def told() -> int:
                    return output.read_text().count(f" {word} - ")

                wanted = told() + count
                await until(lambda: told() >= wanted, 30)

            for kill in range(kills):
                async with running(configuration, f"proxy{kill}", broken=broken) as proxy:
                    await more("succeeded", FRAMES_BETWEEN)
                    await asyncio.sleep(random_.uniform(0, 0.05))
                    proxy.kill()
                await more("failed", 1)
            async with running(configuration, "last", broken=broken) as proxy:
                await more("succeeded", FRAMES_BETWEEN)
                (folder / "stop").touch()
                await until(lambda: "worker thread 0: exit" in output.read_text())
                await proxy.stop()
    sent = _SENT.findall(output.read_text())
    return Drill(
        {status for _, word, status in sent if word == "succeeded"},
        {frame for frame, word, _ in sent if word == "succeeded"},
        Counter(
            json.loads(line)["id"]
            for path in (folder / "data").rglob("*.jsonl")
            for line in path.read_bytes().splitlines()
        ),
    )


async def test_what_the_sdk_got_a_success_for_is_there_once(tmp_path: Path) -> None:
    """A frame that the proxy was killed over may be there, too; the SDK doesn't send it again."""
    done = await drill(tmp_path, 5)
    assert done.statuses == {"200"}
    assert len(done.succeeded) > 5 * FRAMES_BETWEEN
    assert not done.lost
    assert set(done.recorded.values()) == {1}
    assert len(done.recorded.keys() - done.succeeded) <= 5


async def test_the_drill_finds_a_proxy_that_answers_before_it_writes(tmp_path: Path) -> None:
    done = await drill(tmp_path, 2, broken="answer-first")
    assert done.lost
