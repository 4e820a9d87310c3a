"""Where files go, as Azure ML's data collector lays them out: pure, no clock and no disk.

Lines:          {root}/{yyyy}/{MM}/{dd}/{HH}/{instance_id}.jsonl      (by rolling_rate, UTC)
Binary bodies:  {root}/{yyyy}/{MM}/{dd}/{HH}/{event_id}               beside the line that points to them
Large bodies:   {large_root}/{yyyy}/{MM}/{dd}/{HH}/{event_id}.jsonl   without the collection's level, as documented

Names that begin with a dot are not finished; readers of such datasets pass them over.
"""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from proxy.settings import RollingRate

FOLDERS = {
    RollingRate.YEAR: "yyyy",
    RollingRate.MONTH: "yyyy/MM",
    RollingRate.DAY: "yyyy/MM/dd",
    RollingRate.HOUR: "yyyy/MM/dd/HH",
    RollingRate.MINUTE: "yyyy/MM/dd/HH/mm",
}
LARGE = "-large"  # behind the name of a root of the user's own: where its large bodies are
_DIRECTIVES = {"yyyy": "%Y", "MM": "%m", "dd": "%d", "HH": "%H", "mm": "%M"}
_FORMATS = {rate: "/".join(map(_DIRECTIVES.__getitem__, folders.split("/"))) for rate, folders in FOLDERS.items()}


_LONGEST_TYPE = 180  # of a content type in a file's name, which may have 255 bytes
_UNKNOWN_TYPE = "application/octet-stream"
# The instance that wrote the file (32 digits of it are the process's); how many of its bytes are elsewhere, and the name that it
# has in the destination since then.
LINES_NAME = re.compile(r"(([0-9a-f]{32})[0-9]{6,})(?:@([0-9]+)@([0-9a-f]{32}[0-9]{6,}))?\.jsonl")
_BODY = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?:\.jsonl)?);(.*)", re.DOTALL)


@dataclass(slots=True)
class Place:
    """Where one collection goes: folders on local disk, and the URLs that the same folders have in the destination.

    ``remote``: the folders are a spool, and their files are shipped to the URLs. The URLs may become better known.
    """

    root: Path
    root_url: str
    large_root: Path
    large_url: str
    remote: bool = False

    def lines(self, partition: str, instance_id: str) -> Path:
        return self.root / partition / f"{instance_id}.jsonl"

    def unfinished(self, process_id: str, event_id: str) -> Path:
        return self.root / f".{process_id}.{event_id}.part"

    def body(self, partition: str, event_id: str, content_type: str, *, large: bool) -> tuple[Path, str]:
        """Path and URL of a body in a file of its own. Until it is shipped, its name holds its content type as well."""
        root, url = (self.large_root, self.large_url) if large else (self.root, self.root_url)
        name = f"{partition}/{event_id}.jsonl" if large else f"{partition}/{event_id}"
        return root / (f"{name};{_quoted(content_type)}" if self.remote else name), f"{url}/{name}"


def _quoted(content_type: str) -> str:
    quoted = quote(content_type, safe="", errors="surrogateescape")
    return quoted if len(quoted) <= _LONGEST_TYPE else quote(_UNKNOWN_TYPE, safe="")


def lines_process(name: str) -> str | None:
    """The process that wrote a file of lines, by the file's name; None: it is no file of lines."""
    found = LINES_NAME.fullmatch(name)
    return found[2] if found else None


def shipped_body(name: str) -> tuple[str, str] | None:
    """(name in the destination, content type) of a spooled body, by its file's name; None: it is none."""
    found = _BODY.fullmatch(name)
    return (found[1], unquote(found[2], errors="replace")) if found else None


def partition(rate: RollingRate, epoch_seconds: float) -> str:
    """The folder of a moment, for example ``2026/11/22/16``."""
    return time.strftime(_FORMATS[rate], time.gmtime(epoch_seconds))


def instance_id(process_id: str, number: int) -> str:
    """A file's name, as Azure's: 32 hexadecimal digits, constant in a process, and 6 digits that count its files."""
    return f"{process_id}{number:06d}"


def new_process_id() -> str:
    """32 hexadecimal digits, fresh for each process: no two ever write the same file."""
    return uuid.uuid4().hex
