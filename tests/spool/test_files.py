from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.settings import RollingRate
from proxy.spool.files import LineFile, SpoolFull
from proxy.spool.recovery import Recovered, recover
from tests.spool.workbench import PROCESS_ID, Bench

NOON = 1_795_348_800.0  # 2026-11-22T12:00:00Z
HOUR = 3600.0
LINE = b'{"id":1}\n'
NUMBERED_LINE = b'{"id":%d}\n'


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    bench.files.begin(NOON)
    yield bench
    with contextlib.suppress(OSError):
        bench.files.close()


def folders(bench: Bench, collection: str = "request") -> list[str]:
    root = bench.places[collection].root
    return [str(path.parent.relative_to(root)) for path in bench.paths(collection)]


# --- rolling ---


def test_lines_of_one_partition_share_a_file(bench: Bench) -> None:
    for second in range(3):
        bench.files.begin(NOON + second)
        bench.files.append("request", [LINE, LINE])
    assert bench.content() == [LINE] * 6
    assert [path.name for path in bench.paths()] == [f"{PROCESS_ID}000001.jsonl"]
    assert folders(bench) == ["2026/11/22/12"]


def test_each_collection_has_files_of_its_own(bench: Bench) -> None:
    bench.files.append("request", [b"1\n"])
    bench.files.append("response", [b"2\n"])
    assert bench.content("request") == [b"1\n"]
    assert bench.content("response") == [b"2\n"]
    assert bench.paths("request")[0].name != bench.paths("response")[0].name


def test_a_file_ends_with_its_partition(bench: Bench) -> None:
    bench.files.begin(NOON + HOUR - 0.001)
    bench.files.append("request", [b"1\n"])
    bench.files.begin(NOON + HOUR)
    bench.files.append("request", [b"2\n"])
    assert folders(bench) == ["2026/11/22/12", "2026/11/22/13"]
    assert [path.read_bytes() for path in bench.paths()] == [b"1\n", b"2\n"]


def test_a_file_ends_at_its_size_and_not_before(tmp_path: Path) -> None:
    bench = Bench(tmp_path, roll_bytes=3 * len(LINE))
    bench.files.begin(NOON)
    for _ in range(7):
        bench.files.append("request", [LINE])
    bench.files.close()
    assert [path.read_bytes() for path in bench.paths()] == [LINE * 3, LINE * 3, LINE]


def test_lines_above_the_size_have_a_file_to_themselves(tmp_path: Path) -> None:
    bench = Bench(tmp_path, roll_bytes=2 * len(LINE))
    bench.files.begin(NOON)
    for count in (1, 10, 1):
        bench.files.append("request", [LINE] * count)
    bench.files.close()
    assert [path.read_bytes() for path in bench.paths()] == [LINE, LINE * 10, LINE]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(min_value=-3 * HOUR, max_value=3 * HOUR), min_size=1, max_size=30))
def test_a_clock_that_steps_loses_no_line_and_reopens_no_file(
    tmp_path_factory: pytest.TempPathFactory, steps: list[float]
) -> None:
    bench = Bench(tmp_path_factory.mktemp("clock"))
    now = NOON
    expected: dict[str, list[bytes]] = {}
    ended: dict[Path, bytes] = {}
    for number, step in enumerate(steps):
        now += step
        line = NUMBERED_LINE % number
        before = {path: path.read_bytes() for path in bench.paths()}
        bench.files.begin(now)
        bench.files.append("request", [line])
        folder = Path(bench.files._partition)
        expected.setdefault(str(folder), []).append(line)
        [grown] = [path for path in bench.paths() if path.read_bytes() != before.get(path, b"")]
        assert str(grown).endswith(str(folder / grown.name))
        assert grown not in ended
        ended |= {path: content for path, content in before.items() if path != grown}
    bench.files.close()
    for folder_name, lines in expected.items():
        found = [
            line for path in bench.paths() if folder_name in str(path) for line in path.read_bytes().splitlines(True)
        ]
        assert found == lines
    assert len({path.name for path in bench.paths()}) == len(bench.paths())


def test_a_clock_that_goes_back_an_hour_gives_a_new_file_there(bench: Bench) -> None:
    for moment in (NOON, NOON - HOUR, NOON):
        bench.files.begin(moment)
        bench.files.append("request", [LINE])
    assert folders(bench) == ["2026/11/22/11", "2026/11/22/12", "2026/11/22/12"]


def test_a_partition_may_be_a_minute(tmp_path: Path) -> None:
    bench = Bench(tmp_path, rate=RollingRate.MINUTE)
    for second in (0, 59, 60):
        bench.files.begin(NOON + second)
        bench.files.append("request", [LINE])
    bench.files.close()
    assert folders(bench) == ["2026/11/22/12/00", "2026/11/22/12/01"]


# --- what others do to the files ---


def test_a_file_that_was_deleted_is_noticed(bench: Bench) -> None:
    bench.files.append("request", [b"1\n"])
    bench.paths()[0].unlink()
    bench.files.begin(NOON)
    bench.files.append("request", [b"2\n"])
    assert bench.content() == [b"2\n"]


def test_a_folder_that_was_deleted_is_made_again(bench: Bench) -> None:
    for collection in ("request", "response"):
        bench.files.append(collection, [b"1\n"])
    shutil.rmtree(bench.root / "data")
    for collection in ("request", "response"):
        bench.files.append(collection, [b"2\n"])
        assert bench.content(collection) == [b"2\n"]


def test_a_file_that_somebody_else_has_made_is_not_written(bench: Bench) -> None:
    path = bench.places["request"].lines("2026/11/22/12", f"{PROCESS_ID}000001")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not ours")
    with pytest.raises(FileExistsError):
        bench.files.append("request", [LINE])
    bench.files.append("request", [LINE])
    assert path.read_bytes() == b"not ours"
    assert len(bench.paths()) == 2


# --- a disk that fails ---

PARTIAL_WRITE = """
import resource, signal, sys
from pathlib import Path
from tests.spool.workbench import Bench

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
bench = Bench(Path(sys.argv[1]))
bench.files.begin(1_795_348_800.0)
bench.files.append("request", [b"first\\n"] * 10)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))
failed = 0
for lines in ([b"second\\n"] * 100, [b"x" * 1000 + b"\\n"]):
    try:
        bench.files.append("request", lines)
    except OSError as error:
        failed += 1
print(failed, bench.budget.used_bytes)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
bench.files.append("request", [b"third\\n"])
bench.files.close()
"""


@pytest.mark.parametrize("limit_bytes", [60, 61, 66, 67, 100, 500, 759])
def test_a_write_that_fails_half_way_is_undone(tmp_path: Path, limit_bytes: int) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PARTIAL_WRITE, str(tmp_path), str(limit_bytes)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == ["2", "60"]
    [path] = tmp_path.rglob("*.jsonl")
    assert path.read_bytes() == b"first\n" * 10 + b"third\n"
    assert list((tmp_path / "locks").iterdir()) == []


def test_nothing_follows_half_a_line_and_the_next_start_cuts_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails in the middle of a line, and to cut it off fails, too."""
    writev = os.writev

    def half(fd: int, lines: list[bytes]) -> int:
        writev(fd, [b"".join(lines)[:5]])
        raise OSError(errno.EIO, "Input/output error")

    def fail(fd: int, length: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    bench.files.append("request", [LINE])
    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", half)
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(OSError, match="Input/output error"):
            bench.files.append("request", [LINE])
    bench.files.append("request", [LINE])
    bench.files.close()
    torn, whole = bench.paths()
    assert torn.read_bytes() == LINE + LINE[:5]
    assert whole.read_bytes() == LINE
    assert recover(bench.root / "locks") == Recovered(processes=1, torn=1)
    assert bench.content() == [LINE, LINE]
    assert recover(bench.root / "locks") == Recovered()


def test_a_disk_that_fails_is_tried_under_one_name(bench: Bench) -> None:
    """Else the journal grows with every try, and every message is a new one."""
    root = bench.places["request"].root
    root.parent.mkdir(parents=True)
    root.write_bytes(b"in the way")
    messages = set()
    for _ in range(20):
        with pytest.raises(OSError) as raised:
            bench.files.append("request", [LINE])
        messages.add(str(raised.value))
        bench.files.append("response", [LINE])
    assert len(messages) == 1
    assert len(bench.journal.path.read_text().splitlines()) == 3
    root.unlink()
    bench.files.append("request", [LINE])
    assert bench.content() == [LINE]


def test_a_sync_that_fails_keeps_no_other_file_from_being_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def sync(file: LineFile) -> None:
        synced.append(file.path)
        raise OSError(errno.EIO, "Input/output error")

    bench = Bench(tmp_path, sync=True)
    bench.files.begin(NOON)
    bench.files.append("request", [LINE])
    bench.files.append("response", [LINE])
    monkeypatch.setattr(LineFile, "sync", sync)
    with pytest.raises(OSError, match="Input/output error"):
        bench.files.end()
    assert sorted(synced) == bench.paths("request") + bench.paths("response")
    bench.files.begin(NOON + HOUR)
    bench.files.close()


# --- the budget ---


def test_a_group_that_the_budget_does_not_allow_is_not_written_at_all(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_bytes=5 * len(LINE))
    bench.files.begin(NOON)
    bench.files.append("request", [LINE] * 3)
    with pytest.raises(SpoolFull):
        bench.files.append("request", [LINE] * 3)
    bench.files.append("request", [LINE] * 2)
    with pytest.raises(SpoolFull):
        bench.files.append("response", [b"\n"])
    assert bench.content() == [LINE] * 5
    bench.files.close()


# --- bodies ---


def test_a_body_has_no_name_before_it_is_whole(bench: Bench) -> None:
    part = bench.files.open_body("request", "id")
    bench.files.write_body(part, b"one ")
    assert [path.name[0] for path in bench.paths(pattern="*")] == ["."]
    bench.files.write_body(part, b"two")
    url = bench.files.finish_body(part, "request", "id", "a/b", large=False)
    [path] = bench.paths(pattern="*")
    assert path.as_uri() == url
    assert path.read_bytes() == b"one two"
    assert bench.budget.used_bytes == 7


def test_a_body_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_bytes=10)
    bench.files.begin(NOON)
    assert bench.files.keep_body("request", "id", "a/b", [b"x" * 6, b"x" * 6], large=False) is None
    assert bench.paths(pattern="*") == []
    assert bench.budget.used_bytes == 0
    assert bench.ledger.account().bodies_cut == 1
    assert bench.files.keep_body("request", "id", "a/b", [b"x" * 10], large=False)
    bench.files.close()


def test_a_defect_while_a_body_is_made_leaves_nothing(bench: Bench) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"one"
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        bench.files.keep_body("request", "id", "a/b", pieces(), large=False)
    assert bench.paths(pattern="*") == []


@pytest.mark.parametrize("large", [True, False])
def test_a_body_goes_with_its_line(tmp_path: Path, *, large: bool) -> None:
    """When the disk takes the body but no line that points to it, the body would only keep it full."""
    bench = Bench(tmp_path, max_bytes=100)
    bench.files.begin(NOON)
    assert bench.files.keep_body("request", "lost", "a/b", [b"x" * 95], large=large)
    with pytest.raises(SpoolFull):
        bench.files.append("request", [LINE])
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == []
    assert bench.budget.used_bytes == 0

    assert bench.files.keep_body("request", "kept", "a/b", [b"x" * 80], large=large)
    bench.files.append("request", [LINE])
    with pytest.raises(SpoolFull):
        bench.files.append("request", [LINE * 10])
    assert [path.stem for path in (tmp_path / "data").rglob("kept*")] == ["kept"]
    bench.files.close()


def test_a_body_that_could_not_be_named_is_closed_once(bench: Bench) -> None:
    """The second time it would close whatever has got the same number meanwhile: a client's connection."""
    part = bench.files.open_body("request", "id")
    bench.files.write_body(part, b"body")
    bench.places["request"].body("2026/11/22/12", "id", "a/b", large=False)[0].mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        bench.files.finish_body(part, "request", "id", "a/b", large=False)
    other = os.open(os.devnull, os.O_RDONLY)
    try:
        bench.files.drop_body(part)
        os.fstat(other)
    finally:
        os.close(other)
    assert bench.paths(pattern=".*") == []


def test_the_journal_does_not_grow_with_bodies(bench: Bench) -> None:
    for number in range(100):
        assert bench.files.keep_body("request", f"{number}", "a/b", [b"x"], large=False)
    assert bench.journal.path.stat().st_size < 500


def test_bodies_that_a_dead_process_did_not_finish_are_removed(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from tests.spool.workbench import Bench\n"
        "bench = Bench(Path(sys.argv[1])); bench.files.begin(1_795_348_800.0)\n"
        "bench.files.keep_body('request', 'whole', 'a/b', [b'x'], large=False); bench.files.append('request', [b'1\\n'])\n"
        "for number in range(3): bench.files.write_body(bench.files.open_body('request', str(number)), b'x')\n"
        "os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    others = tmp_path / "data/e/n/request" / f".{'b' * 32}.1.part"
    others.write_bytes(b"of a living process")
    assert len(list(others.parent.glob(".*.part"))) == 4
    assert recover(tmp_path / "locks") == Recovered(processes=1, orphans=3)
    assert list(others.parent.glob(".*.part")) == [others]
    assert [path.name for path in others.parent.rglob("whole")] == ["whole"]


# --- modes ---


def test_others_can_not_read_the_dataset(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        bench = Bench(tmp_path / "root")
        bench.files.begin(NOON)
        bench.files.append("request", [LINE])
        bench.files.keep_body("request", "small", "a/b", [b"x"], large=False)
        bench.files.keep_body("request", "large", "a/b", [b"x"], large=True)
        made = list(bench.places["request"].root.rglob("*")) + list(bench.places["request"].large_root.rglob("*"))
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [*made, bench.journal.path]}
        bench.files.close()
    finally:
        os.umask(before)
    assert {mode for path, mode in modes.items() if path.suffix == ".journal"} == {0o640}
    assert {mode for path, mode in modes.items() if path.name in ("small", "large.jsonl")} == {0o640}
    assert {modes[path] for path in made if path.name == f"{PROCESS_ID}000001.jsonl"} == {0o640}
    leaves = {path.parent for path in made if path.name in ("small", "large.jsonl")}
    assert {modes[path] for path in leaves} == {0o750}
