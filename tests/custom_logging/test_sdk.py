"""The real SDK logs frames of every kind; each is the line that it should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import UUID

from tests.custom_logging.sdk import COLLECTIONS, NEW, Sdk, address, data, enabled, recording

BOTH = """
inputs, outputs = Collector(name="model_inputs"), Collector(name="model_outputs")
"""


# --- both ways to configure the SDK ---


async def test_the_file_that_the_proxy_writes_configures_it(sdk: Sdk, tmp_path: Path) -> None:
    """It holds which collections are enabled, and how much of them is wanted; the SDK samples."""
    path = tmp_path / "shared" / "mdc.json"
    collections = {
        "model_inputs": {"enabled": True},
        "never": {"enabled": True, "sampling_rate": 0},
        "off": {"enabled": False},
    }
    script = """
Collector(name="model_inputs").collect(pd.DataFrame({"a": [1]}))
Collector(name="never").collect(pd.DataFrame({"a": [1]}))
Collector(name="off", on_error=print).collect(pd.DataFrame({"a": [1]}))
"""
    async with recording(tmp_path, collections, custom_logging__sdk_config_path=str(path)) as p:
        printed = await sdk.run(script, address(p) | {"AZUREML_MDC_CONFIG_PATH": str(path)}, tmp_path)
        account = await p.recorded(1)
        assert [line["data"] for line in p.lines("model_inputs")] == [[{"a": 1}]]
        assert p.lines("never") == []
    assert "collection off is not enabled, drop the data" in printed
    assert (account.received, account.delivered, account.refused) == (1, 1, {})


async def test_the_environment_configures_it(sdk: Sdk, tmp_path: Path) -> None:
    """Each frame that comes is recorded, as whoever sent it has sampled; names are compared without case."""
    script = """
Collector(name="Model_Inputs").collect(pd.DataFrame({"a": [1]}))
"""
    async with recording(tmp_path, {"model_inputs": {"enabled": True, "sampling_rate": 0}}) as p:
        await sdk.run(script, enabled(p), tmp_path)
        await p.recorded(1)
        (line,) = p.lines("model_inputs")
    assert (line["type"].lower(), line["data"]) == ("azureml.inference.model_inputs", [{"a": 1}])


# --- the line ---


async def test_the_documented_line(sdk: Sdk, tmp_path: Path) -> None:
    """Azure's page shows this one; the rest of it is made by the collector, or names the SDK."""
    script = """
context = BasicCorrelationContext(id="3711655d-b04c-4aa2-a6c4-6a90cbfcb73f", timestamp=1669884690)
frame = pd.DataFrame({"label": ["DRUG"] * 3, "pattern": ["aspirin", "trazodone", "citalopram"]})
Collector(name="inputs").collect(frame, context)
"""
    async with recording(tmp_path, {"inputs": {"enabled": True}}) as p:
        await sdk.run(script, enabled(p), tmp_path)
        await p.recorded(1)
        ((line,), (raw,)) = p.lines("inputs"), p.raw_lines("inputs")
    assert str(UUID(line.pop("id"))) in raw.decode()
    assert line.pop("source").startswith("/subscriptions/")
    assert line == {
        "specversion": "1.0",
        "type": "azureml.inference.inputs",
        "datacontenttype": "application/json",
        "time": "2022-12-01T08:51:30Z",
        "data": [
            {"label": "DRUG", "pattern": "aspirin"},
            {"label": "DRUG", "pattern": "trazodone"},
            {"label": "DRUG", "pattern": "citalopram"},
        ],
        "contentrange": "bytes 0-116/117",
        "correlationid": "3711655d-b04c-4aa2-a6c4-6a90cbfcb73f",
        "xrequestid": "3711655d-b04c-4aa2-a6c4-6a90cbfcb73f",
        "modelversion": "default",
        "collectdatatype": sdk.data_type,
        "agent": f"azureml-ai-monitoring/{sdk.version}",
    }


async def test_inputs_and_outputs_share_the_context_s_id(sdk: Sdk, tmp_path: Path) -> None:
    """Ids of one's own, or those that the SDK makes."""
    script = f"""{BOTH}
for number, context in enumerate((BasicCorrelationContext(id="mine"), BasicCorrelationContext(id="Größe"), None)):
    context = inputs.collect(pd.DataFrame({{"n": [number]}}), context)
    outputs.collect(pd.DataFrame({{"score": [number / 4]}}), context)
"""
    async with recording(tmp_path) as p:
        await sdk.run(script, enabled(p), tmp_path)
        await p.recorded(6)
        ids = {name: [line["correlationid"] for line in p.lines(name)] for name in COLLECTIONS}
        lines = [line for name in COLLECTIONS for line in p.lines(name)]
    assert ids["model_inputs"] == ids["model_outputs"]
    assert ids["model_inputs"][:2] == ["mine", "Größe"]
    assert UUID(ids["model_inputs"][2])
    assert all(line["xrequestid"] == line["correlationid"] for line in lines)
    assert len({line["id"] for line in lines}) == 6


async def test_further_headers_of_a_context_are_fields(sdk: Sdk, tmp_path: Path) -> None:
    """Those that are fields already, are not."""
    script = """
context = BasicCorrelationContext(id="mine", headers={"Tenant-Id": "größer", "rows": 2, "Data": "x", "source": "x"})
Collector(name="model_inputs").collect(pd.DataFrame({"a": [1]}), context)
"""
    async with recording(tmp_path) as p:
        await sdk.run(script, enabled(p), tmp_path)
        await p.recorded(1)
        ((line,), (raw,)) = p.lines("model_inputs"), p.raw_lines("model_inputs")
    assert (line["tenantid"], line["rows"]) == ("größer", "2")
    assert line["data"] == [{"a": 1}]
    assert raw.lower().count(b'"data":') == raw.lower().count(b'"source":') == 1


# --- what is in frames ---

FRAMES = """
frames = {
    "names and texts": pd.DataFrame({"größe": [1, 2], "城市": ["東京", "Zürich"], "😀": ['"\\u2028\\\\ \\r\\n\\t', ""]}),
    "missing": pd.DataFrame({"n": [1.5, float("nan"), float("inf")], "text": [None, "x", float("nan")]}),
    "numbers": pd.DataFrame({"large": [2**63 - 1, -(2**63)], "small": [0.1 + 0.2, 1e-7], "huge": [2**70, 0]}),
    "dates": pd.DataFrame({
        "day": pd.to_datetime(["2024-01-02", None]),
        "zoned": pd.to_datetime(["2024-01-02", "2024-07-02"]).tz_localize("Europe/Berlin"),
        "span": pd.to_timedelta(["90s", "1D"]),
    }),
    "objects": pd.DataFrame({"o": [{"k": [1, {"Z": None}], "z": {}}, None], "list": [[], [[1], "a"]]}),
    "categories": pd.DataFrame({"c": pd.Categorical(["a", "b"])}, index=["x", "y"]),
    "no names": pd.DataFrame([[1, 2], [3, 4]]),
    "no rows": pd.DataFrame({"a": [], "b": []}),
    "nothing": pd.DataFrame(),
    "wide": pd.DataFrame([range(5000), range(5000)], columns=[f"column {n}" for n in range(5000)]),
    "long": pd.DataFrame({"n": range(20_000)}),
}
collector = Collector(name="model_inputs")
for name, frame in frames.items():
    print("FRAME", frame.to_json(orient="records"))
    collector.collect(frame, BasicCorrelationContext(id=name))
"""
CONTENT: dict[str, Any] = {
    "names and texts": [
        {"größe": 1, "城市": "東京", "😀": '"\u2028\\ \r\n\t'},
        {"größe": 2, "城市": "Zürich", "😀": ""},
    ],
    "missing": [{"n": 1.5, "text": None}, {"n": None, "text": "x"}, {"n": None, "text": None}],
    "numbers": [
        {"large": 2**63 - 1, "small": 0.3, "huge": 2**70},
        {"large": -(2**63), "small": 0.0000001, "huge": 0},
    ],
    "dates": [
        {"day": 1704153600000, "zoned": 1704150000000, "span": 90000},
        {"day": None, "zoned": 1719871200000, "span": 86400000},
    ],
    "objects": [{"o": {"k": [1, {"Z": None}], "z": {}}, "list": []}, {"o": None, "list": [[1], "a"]}],
    "categories": [{"c": "a"}, {"c": "b"}],
    "no names": [{"0": 1, "1": 2}, {"0": 3, "1": 4}],
    "no rows": [],
    "nothing": [],
    "wide": [{f"column {n}": n for n in range(5000)}] * 2,
    "long": [{"n": n} for n in range(20_000)],
}


async def test_frames_of_every_kind(sdk: Sdk, tmp_path: Path) -> None:
    """The line holds what pandas made of the frame, byte for byte."""
    async with recording(tmp_path) as p:
        printed = await sdk.run(FRAMES, enabled(p), tmp_path)
        await p.recorded(len(CONTENT))
        lines, raw_lines = p.lines("model_inputs"), p.raw_lines("model_inputs")
    texts = [line.removeprefix("FRAME ") for line in printed.splitlines() if line.startswith("FRAME ")]
    assert [data(raw) for raw in raw_lines] == texts
    assert {line["correlationid"]: line["data"] for line in lines} == CONTENT
    assert [line["contentrange"] for line in lines] == [f"bytes 0-{len(text) - 1}/{len(text)}" for text in texts]


async def test_a_frame_over_4_mb_has_a_file_of_its_own(sdk: Sdk, tmp_path: Path) -> None:
    script = """
frame = pd.DataFrame({"n": range(50_000), "größe": ["x" * 100] * 50_000})
Collector(name="model_inputs").collect(frame, BasicCorrelationContext(id="large"))
"""
    rows = (f'{{"n":{n},"gr\\u00f6\\u00dfe":"{"x" * 100}"}}' for n in range(50_000))
    expected = f"[{','.join(rows)}]".encode()
    async with recording(tmp_path) as p:
        await sdk.run(script, enabled(p), tmp_path)
        await p.recorded(1)
        (line,) = p.lines("model_inputs")
    path = Path(unquote(urlsplit(line["dataref"]).path))
    assert path.read_bytes() == expected
    folders = path.relative_to(tmp_path / "data").parts
    assert (len(folders), path.suffix) == (7, ".jsonl")  # endpoint, deployment, year, month, day, hour, name
    assert "data" not in line
    assert line["contentrange"] == f"bytes 0-{len(expected) - 1}/{len(expected)}"
    assert line["correlationid"] == "large"


# --- many ---

THREADS, FRAMES_EACH = 10, 250


async def test_ten_threads_log_five_thousand_frames(tmp_path: Path) -> None:
    """The SDK has one queue, of 1500, and one thread that sends; both versions are the same there."""
    script = f"""{BOTH}
from threading import Thread

def room():
    while get_queue().length() > 1000:
        time.sleep(0.001)

def work(thread):
    for n in range({FRAMES_EACH}):
        room()
        context = inputs.collect(pd.DataFrame({{"thread": [thread], "n": [n], "text": ["größe " * 20]}}))
        outputs.collect(pd.DataFrame({{"score": [thread + n / 256]}}), context)

threads = [Thread(target=work, args=(thread,)) for thread in range({THREADS})]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    async with recording(tmp_path) as p:
        await NEW.run(script, enabled(p), tmp_path)
        account = await p.recorded(2 * THREADS * FRAMES_EACH)
        found = {name: [(json.loads(raw), data(raw)) for raw in p.raw_lines(name)] for name in COLLECTIONS}
    assert (account.received, account.discarded, account.refused) == (2 * THREADS * FRAMES_EACH, {}, {})
    inputs, outputs = ({line["correlationid"]: text for line, text in found[name]} for name in COLLECTIONS)
    assert inputs.keys() == outputs.keys()
    text = json.dumps("größe " * 20)
    assert sorted((inputs[one], outputs[one]) for one in inputs) == sorted(
        (f'[{{"thread":{thread},"n":{n},"text":{text}}}]', f'[{{"score":{thread + n / 256}}}]')
        for thread in range(THREADS)
        for n in range(FRAMES_EACH)
    )
    assert len({line["id"] for lines in found.values() for line, _ in lines}) == 2 * THREADS * FRAMES_EACH
