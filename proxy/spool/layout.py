"""Where files go, as Azure ML's data collector lays them out: pure, no clock and no disk.

Lines:          {root}/{yyyy}/{MM}/{dd}/{HH}/{instance_id}.jsonl      (by rolling_rate, UTC)
Binary bodies:  {root}/{yyyy}/{MM}/{dd}/{HH}/{event_id}               beside the line that points to them
Large bodies:   {large_root}/{yyyy}/{MM}/{dd}/{HH}/{event_id}.jsonl   without the collection's level, as documented

Names that begin with a dot are not finished; readers of such datasets pass them over.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from proxy.settings import RollingRate

FOLDERS = {
    RollingRate.YEAR: "yyyy",
    RollingRate.MONTH: "yyyy/MM",
    RollingRate.DAY: "yyyy/MM/dd",
    RollingRate.HOUR: "yyyy/MM/dd/HH",
    RollingRate.MINUTE: "yyyy/MM/dd/HH/mm",
}
_DIRECTIVES = {"yyyy": "%Y", "MM": "%m", "dd": "%d", "HH": "%H", "mm": "%M"}
_FORMATS = {rate: "/".join(map(_DIRECTIVES.__getitem__, folders.split("/"))) for rate, folders in FOLDERS.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """Where one collection goes: folders on local disk, and the URLs that the same folders have in the destination."""

    root: Path
    root_url: str
    large_root: Path
    large_url: str

    def lines(self, partition: str, instance_id: str) -> Path:
        return self.root / partition / f"{instance_id}.jsonl"

    def unfinished(self, process_id: str, event_id: str) -> Path:
        return self.root / f".{process_id}.{event_id}.part"

    def body(self, partition: str, event_id: str, *, large: bool) -> tuple[Path, str]:
        """Path and URL of a body in a file of its own."""
        if large:
            name = f"{partition}/{event_id}.jsonl"
            return self.large_root / name, f"{self.large_url}/{name}"
        name = f"{partition}/{event_id}"
        return self.root / name, f"{self.root_url}/{name}"


def partition(rate: RollingRate, epoch_seconds: float) -> str:
    """The folder of a moment, for example ``2026/11/22/16``."""
    return time.strftime(_FORMATS[rate], time.gmtime(epoch_seconds))


def instance_id(process_id: str, number: int) -> str:
    """A file's name, as Azure's: 32 hexadecimal digits, constant in a process, and 6 digits that count its files."""
    return f"{process_id}{number:06d}"


def new_process_id() -> str:
    """32 hexadecimal digits, fresh for each process: no two ever write the same file."""
    return uuid.uuid4().hex
