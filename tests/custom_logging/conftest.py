from __future__ import annotations

import pytest

from tests.custom_logging.sdk import NEW, OLD, Sdk


@pytest.fixture(params=[NEW, OLD], ids=["1.0.0-pandas-3", "0.1.0b4-pandas-2"])
def sdk(request: pytest.FixtureRequest) -> Sdk:
    """The newest SDK with pandas 3, and the last beta, which Azure ML's pages name, with pandas 2 and urllib3 1."""
    found: Sdk = request.param
    return found
