"""payload-logger: a reverse proxy that records traffic as Azure ML data-collector events."""

import importlib.util

__version__ = "0.1.0"


def is_compiled() -> bool:
    """Whether the traffic path is compiled (docs/decisions/0005-compiled.md)."""
    hot = importlib.util.find_spec("proxy.relay.exchange")
    return hot is not None and not str(hot.origin).endswith(".py")
