"""What the SDK shows the author of a scoring script when a frame is not taken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.custom_logging.sdk import Sdk, enabled, recording

COLLECTIONS = {"model_inputs": {"enabled": True}, "switched_off": {"enabled": False}}
ONE_MB = 1_000_000

# What is collected, for which collection; the answer, as the SDK logs it, and its reason.
CASES = {
    "unknown collection": ("{'a': [1]}", "other", "404, .*'other'.*'model_inputs'.*", "unknown_collection"),
    "disabled collection": ("{'a': [1]}", "switched_off", "403, .*'switched_off' is disabled.*", "disabled_collection"),
    "collection of the traffic": ("{'a': [1]}", "request", "403, .*'request'.*another name", "unknown_collection"),
    "names equal but for case": ("[[1, 2]], columns=['Maß', 'MAß']", "model_inputs", "422, .*'Maß' and 'MAß'.*", "not_rows"),
    "names equal": ("[[1, 2]], columns=[1, '1']", "model_inputs", "422, .*'1' twice", "not_rows"),
    "names equal, deep inside": ("{'o': [[{'b': {'K': 1, 'k': 2}}]]}", "model_inputs", "422, .*'K' and 'k'.*", "not_rows"),
    "nested deeply": ("{'o': [eval('[' * 120 + ']' * 120)]}", "model_inputs", "422, .*deeper than 100 levels.*", "not_rows"),
    "too large": ("{'o': ['x' * 1_000_000]}", "model_inputs", "413, .*max_body_bytes.*1000000.*", "too_large"),
    "far too large": ("{'o': ['x' * 12_000_000]}", "model_inputs", "413, .*max_body_bytes.*1000000.*", "too_large"),
    "large, unknown collection": ("{'o': ['x' * 12_000_000]}", "other", "404, .*'other'.*", "unknown_collection"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
async def test_the_sdk_logs_the_reason(sdk: Sdk, case: str, tmp_path: Path) -> None:
    """And goes on."""
    frame, collection, answer, reason = CASES[case]
    script = f"""
Collector(name="{collection}").collect(pd.DataFrame({frame}))
Collector(name="model_inputs").collect(pd.DataFrame({{"fine": [1]}}))
"""
    async with recording(tmp_path, COLLECTIONS, custom_logging__max_body_bytes=ONE_MB) as p:
        printed = await sdk.run(script, enabled(p), tmp_path)
        account = await p.recorded(1)
        assert [line["data"] for line in p.lines("model_inputs")] == [[{"fine": 1}]]
    (logged,) = re.findall("failed to send json payload: (.*)", printed)
    assert re.fullmatch(answer, logged)
    assert (account.received, account.discarded, account.refused) == (1, {}, {reason: 1})


async def test_the_compact_format_is_text_for_people(sdk: Sdk, tmp_path: Path) -> None:
    script = """
Collector(name="model_inputs").collect(pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}))
"""
    async with recording(tmp_path) as p:
        printed = await sdk.run(script, enabled(p) | {"AZUREML_MDC_FORMAT_COMPACT": "true"}, tmp_path)
        account = p.account()
        assert p.lines("model_inputs") == []
    assert re.search("failed to send binary payload: 415, .*Set AZUREML_MDC_FORMAT_COMPACT to false", printed), printed
    assert (account.received, account.refused) == (0, {"bad_type": 1})
