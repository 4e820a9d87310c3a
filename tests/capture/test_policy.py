"""Which exchanges are recorded: by path, by method, by a hash of the request id."""

from __future__ import annotations

import tracemalloc
import uuid
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.capture.policy import Policy, sample_position
from proxy.settings import Capture, Collection, DataCollector

MANY = settings(deadline=None, max_examples=300)
BOTH = frozenset({"request", "response"})
NONE: frozenset[str] = frozenset()
IDS = st.uuids().map(str) | st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=100)
RATES = st.sampled_from([0.0, 0.001, 0.1, 0.5, 0.999, 1.0]) | st.floats(0, 1)


def policy(root: float = 1.0, *, request: Any = None, response: Any = None, capture: Capture | None = None) -> Policy:
    """``request`` and ``response`` are rates of their own, or False where the collection is not enabled."""
    collections = {
        name: Collection(enabled=given is not False, sampling_rate=None if given is False else given)
        for name, given in (("request", request), ("response", response))
    }
    collections["model_inputs"] = Collection(enabled=True)  # custom logging: not ours to record
    return Policy(DataCollector(sampling_rate=root, collections=collections), capture or Capture())


def sampled(rules: Policy, request_id: str) -> frozenset[str]:
    return rules.collections("POST", "/score", request_id)


# --- sampling ---


@pytest.mark.parametrize(
    ("request_id", "position"),
    [
        ("f6e806c9-1a9a-446b-baa2-901373162105", 0.257987245),
        ("test", 0.588580829),
        ("1", 0.964786650),
    ],
)
def test_a_position_is_the_same_in_every_replica_and_version(request_id: str, position: float) -> None:
    assert sample_position(request_id) == pytest.approx(position, abs=1e-9)


@MANY
@given(request_id=IDS)
def test_a_position_is_below_one(request_id: str) -> None:
    assert 0 <= sample_position(request_id) < 1
    assert sample_position(request_id) == sample_position(request_id)


@MANY
@given(request_id=IDS, root=RATES, request=st.none() | RATES, response=st.none() | RATES)
def test_rates_nest(request_id: str, root: float, request: float | None, response: float | None) -> None:
    found = sampled(policy(root, request=request, response=response), request_id)
    rates = {
        "request": root if request is None else request,
        "response": root if response is None else response,
    }
    higher = max(rates, key=lambda name: rates[name])
    assert not found or higher in found
    if rates["request"] == rates["response"]:
        assert found in (BOTH, NONE)
    for name, rate in rates.items():
        assert (name in found) == (sample_position(request_id) < rate)
        assert rate < 1 or name in found
        assert rate > 0 or name not in found
    assert found == sampled(policy(root, request=request, response=response), request_id)


@MANY
@given(request_id=IDS, rates=st.tuples(RATES, RATES).map(sorted))
def test_a_higher_rate_records_all_that_a_lower_one_does(request_id: str, rates: list[float]) -> None:
    lower, higher = rates
    assert sampled(policy(lower), request_id) <= sampled(policy(higher), request_id)


@pytest.mark.parametrize(
    "make", [str, lambda number: f"request-{number:08}", lambda number: str(uuid.UUID(int=number))]
)
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_ids_in_sequence_are_sampled_evenly(make: Any, rate: float) -> None:
    """Within five standard deviations, overall and in each of ten runs."""
    total = 20_000
    rules = policy(rate)
    chosen = [bool(sampled(rules, make(number))) for number in range(total)]
    for part in (chosen, *(chosen[start : start + total // 10] for start in range(0, total, total // 10))):
        deviation = (len(part) * rate * (1 - rate)) ** 0.5
        assert abs(sum(part) - len(part) * rate) < 5 * deviation


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({}, BOTH),
        ({"request": False}, {"response"}),
        ({"response": False}, {"request"}),
        ({"request": False, "response": False}, NONE),
        ({"request": 0.0}, {"response"}),
        ({"request": False, "response": 0.0}, NONE),
    ],
)
def test_enabled_or_not(rates: dict[str, Any], expected: frozenset[str]) -> None:
    assert sampled(policy(**rates), "any") == expected


# --- paths ---

DEFAULT = Capture()


@pytest.mark.parametrize(
    ("capture", "method", "target", "recorded"),
    [
        (DEFAULT, "POST", "/score", True),
        (DEFAULT, "POST", "/score?verbose=1", True),
        (DEFAULT, "GET", "/v1/models", True),
        (DEFAULT, "POST", "/", True),
        (DEFAULT, "POST", "/health", True),
        (DEFAULT, "GET", "/", False),
        (DEFAULT, "HEAD", "/", False),
        (DEFAULT, "GET", "/?x=/score", False),
        (DEFAULT, "GET", "/health", False),
        (DEFAULT, "GET", "/healthz?full", False),
        (DEFAULT, "GET", "/live", False),
        (DEFAULT, "HEAD", "/readyz", False),
        (DEFAULT, "GET", "/ping", False),
        (DEFAULT, "GET", "/pingpong", True),
        (DEFAULT, "GET", "/metrics", False),
        (DEFAULT, "GET", "/v2/health/ready", False),
        (DEFAULT, "GET", "/v2/models/m/infer", True),
        (DEFAULT, "GET", "/favicon.ico", False),
        (DEFAULT, "GET", "/api/health", True),
        (DEFAULT, "GET", "http://model.example/health", False),
        (DEFAULT, "GET", "http://model.example", False),
        (DEFAULT, "GET", "http://model.example?x", False),
        (DEFAULT, "POST", "http://model.example/score", True),
        (Capture(exclude=()), "GET", "/health", True),
        (Capture(include=("/score",)), "POST", "/score", True),
        (Capture(include=("/score",)), "POST", "/score?x=1", True),
        (Capture(include=("/score",)), "POST", "http://h:1/score?x=1", True),
        (Capture(include=("/score",)), "POST", "/score/", False),
        (Capture(include=("/score",)), "POST", "/Score", False),
        (Capture(include=("/v1/*",)), "POST", "/v1/a/b", True),
        (Capture(include=("/v1/*",)), "POST", "/v1", False),
        (Capture(include=("/v?/x",)), "POST", "/v1/x", True),
        (Capture(include=("/v?/x",)), "POST", "/v10/x", False),
        (Capture(include=("POST,PUT *",)), "PUT", "/a", True),
        (Capture(include=("POST,PUT *",)), "GET", "/a", False),
        (Capture(include=("/m/[a-z]",)), "POST", "/m/[a-z]", True),
        (Capture(include=("/m/[a-z]",)), "POST", "/m/x", False),
        (Capture(include=("/a.b",)), "POST", "/aXb", False),
        (Capture(include=()), "POST", "/score", False),
        (Capture(include=("/score", "/v1/*"), exclude=("/v1/internal/*",)), "POST", "/v1/internal/x", False),
        (Capture(exclude=("*",)), "POST", "/score", False),
        (DEFAULT, "OPTIONS", "*", True),
    ],
)
def test_paths(capture: Capture, method: str, target: str, recorded: bool) -> None:
    rules = policy(capture=capture)
    for _ in range(2):  # what was decided is remembered
        assert rules.collections(method, target, "id") == (BOTH if recorded else NONE)


def test_paths_are_the_clients_to_choose_and_take_no_memory() -> None:
    rules = policy()
    tracemalloc.start()
    try:
        for number in range(5000):
            assert rules.collections("POST", f"/{number:020000}", "id") == BOTH
            assert rules.collections("POST", f"/{number}", "id") == BOTH
        assert tracemalloc.get_traced_memory()[0] < 5_000_000
    finally:
        tracemalloc.stop()
