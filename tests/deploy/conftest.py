from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deploy.charts import Helm


@pytest.fixture(scope="session")
def helm() -> Iterator[Helm]:
    with Helm() as running:
        yield running
