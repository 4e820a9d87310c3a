from __future__ import annotations

import pytest


@pytest.fixture
def quick_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time-outs are looked at fifty times a second, not once."""
    monkeypatch.setattr("proxy.relay.server.SWEEP_SECONDS", 0.02)
