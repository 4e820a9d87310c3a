"""The program's own log, on standard error: one line per problem or change of state, never a payload or a secret."""

from __future__ import annotations

import logging
import sys
import time
import traceback

import orjson

from proxy.settings import LogFormat, Logs

ROOT = "payload_logger"


class TextFormatter(logging.Formatter):
    """For people: time, level, message."""

    def __init__(self, worker: int | None) -> None:
        who = "" if worker is None else f"worker {worker}: "
        super().__init__(f"%(asctime)s %(levelname)-7s {who}%(message)s", "%Y-%m-%dT%H:%M:%SZ")

    converter = staticmethod(time.gmtime)


class JsonFormatter(logging.Formatter):
    """For log collectors: one JSON object per line."""

    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self._who = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._who,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[1] is not None:
            fields["exception"] = "".join(traceback.format_exception(record.exc_info[1]))
        return orjson.dumps(fields, option=orjson.OPT_NON_STR_KEYS).decode()


def configure(logs: Logs, worker: int | None = None) -> None:
    """Sends what this program logs to standard error, as the settings say. worker: this process's number of several."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(worker) if logs.format is LogFormat.JSON else TextFormatter(worker))
    logger = logging.getLogger(ROOT)
    logger.handlers[:] = [handler]
    logger.setLevel(logs.level.value.upper())
    logger.propagate = False
    asyncio_logger = logging.getLogger("asyncio")
    asyncio_logger.handlers[:] = [handler]
    asyncio_logger.propagate = False
