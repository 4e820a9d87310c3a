"""The event loop that everything runs on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


def run_loop(main_coroutine: Coroutine[Any, Any, int]) -> int:
    """Runs a coroutine on uvloop where it exists, else on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main_coroutine)
    return uvloop.run(main_coroutine)
