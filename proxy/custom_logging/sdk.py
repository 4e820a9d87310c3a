"""The SDK's own configuration: a JSON file, and the environment of the scoring script.

Source: azureml-ai-monitoring 0.1.0b2 to 1.0.0, ``config/config.py``.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import orjson

from proxy.settings import PAYLOAD_COLLECTIONS, CustomLogging, Settings

_FILE_MODE, _FOLDER_MODE = 0o644, 0o755  # the scoring script may run as another user


def configuration(settings: Settings) -> dict[str, Any]:
    """What AZUREML_MDC_CONFIG_PATH names. Sampling is done by the SDK, in percent; names are in lower case there."""
    collector = settings.data_collector
    return {
        "runMode": "cloud",
        "collections": {
            name.lower(): {"enabled": one.enabled, "sampleRatePercentage": _percentage(settings, name)}
            for name, one in collector.collections.items()
        },
    }


def write(settings: Settings, path: Path) -> None:
    """Writes the file, whole or not at all; where there is a link, to the file that it leads to. Raises OSError."""
    path = path.resolve()
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
        path.parent.chmod(_FOLDER_MODE)
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(number, "wb") as file:
            file.write(orjson.dumps(configuration(settings), option=orjson.OPT_INDENT_2) + b"\n")
            os.fchmod(number, _FILE_MODE)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def environment(settings: Settings, options: CustomLogging) -> dict[str, str]:
    """What the scoring script needs in its environment. Raises ValueError where that can't be told."""
    host, _, port = options.listen.rpartition(":")
    if port == "0":
        raise ValueError("custom_logging.listen: port 0 is another one at each start; name one for the SDK")
    host = host.strip("[]")
    here = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    variables = {
        "AZUREML_MDC_HOST": f"[{here}]" if ":" in here else here,
        "AZUREML_MDC_PORT": port,
    }
    if options.sdk_config_path is not None:
        return variables | {"AZUREML_MDC_CONFIG_PATH": str(Path(options.sdk_config_path).absolute())}
    rates = {
        _percentage(settings, name)
        for name, one in settings.data_collector.collections.items()
        if one.enabled and name not in PAYLOAD_COLLECTIONS
    }
    if len(rates) > 1 or any(rate != int(rate) for rate in rates):
        raise ValueError(
            "custom_logging.sdk_config_path: missing; the collections' sampling rates differ, or are no whole percentages, "
            "and the SDK takes such only from a file"
        )
    variables |= {"AZUREML_MDC_ENABLED": "true", "AZUREML_MDC_FORMAT_COMPACT": "false"}
    if rates and rates != {100}:
        variables["AZUREML_MDC_SAMPLE_RATE"] = str(int(rates.pop()))
    return variables


def _percentage(settings: Settings, name: str) -> float:
    rate = settings.data_collector.collections[name].sampling_rate
    percentage = round((settings.data_collector.sampling_rate if rate is None else rate) * 100, 6)
    return int(percentage) if percentage == int(percentage) else percentage
