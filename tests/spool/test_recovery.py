from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.spool.recovery import Journal, Recovered, cut_torn_line, recover

BLOCK = 64 * 1024
LINE = b'{"id":1}\n'


def dead_journal(folder: Path, *paths: Path, tail: bytes = b"") -> Path:
    """The journal of a process that is no more."""
    journal = folder / f"{'d' * 32}.journal"
    journal.write_bytes(b"".join(os.fsencode(path) + b"\n" for path in paths) + tail)
    return journal


@contextmanager
def living_process(folder: Path) -> Iterator[Path]:
    """The journal of another process that is alive, and has a torn file in it."""
    torn = folder / "living.jsonl"
    torn.write_bytes(LINE + b"half")
    program = (
        "import sys; from pathlib import Path; from proxy.spool.recovery import Journal\n"
        "journal = Journal(Path(sys.argv[1]), 'a' * 32); journal.note(Path(sys.argv[2]))\n"
        "print(journal.path, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder), str(torn)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout
        yield Path(process.stdout.readline().strip())
        process.kill()


# --- one file ---


@pytest.mark.parametrize("whole", [1, 100])
@pytest.mark.parametrize("torn_bytes", [1, 100, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_a_torn_tail_of_any_length_is_cut(tmp_path: Path, torn_bytes: int, whole: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE * whole + b"x" * torn_bytes)
    assert cut_torn_line(path) == 1
    assert path.read_bytes() == LINE * whole


@pytest.mark.parametrize("line_bytes", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_a_whole_file_is_left_as_it_is(tmp_path: Path, line_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    content = b"x" * (line_bytes - 1) + b"\n"
    path.write_bytes(content)
    before = path.stat()
    assert cut_torn_line(path) == 0
    assert path.read_bytes() == content
    assert path.stat().st_mtime_ns == before.st_mtime_ns


@given(st.binary(max_size=200))
@example(b"\n")
@example(b"\x00" * 30)
@example(b"a\n" + b"\x00" * BLOCK)
@example(b"a\r\n\xff")
def test_what_follows_the_last_line_end_is_cut_and_nothing_else(content: bytes) -> None:
    whole = content[: content.rfind(b"\n") + 1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        path.write_bytes(content)
        assert cut_torn_line(path) == (whole != content)
        assert (path.read_bytes() if path.exists() else b"") == whole


@pytest.mark.parametrize(("content", "torn"), [(b"", 0), (b"half", 1), (b"h" * 2 * BLOCK, 1)])
def test_a_file_without_a_whole_line_is_removed(tmp_path: Path, content: bytes, torn: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert cut_torn_line(path) == torn
    assert not path.exists()


def test_a_file_that_is_gone_is_none_to_cut(tmp_path: Path) -> None:
    assert cut_torn_line(tmp_path / "a.jsonl") == 0


# --- what a process left ---


def test_everything_that_a_dead_process_left_is_put_in_order(tmp_path: Path) -> None:
    whole, torn, gone, part = (tmp_path / name for name in ("w.jsonl", "t.jsonl", "g.jsonl", ".b.part"))
    whole.write_bytes(LINE)
    torn.write_bytes(LINE + b"half")
    part.write_bytes(b"body")
    journal = dead_journal(tmp_path, whole, torn, gone, part, tmp_path / ".gone.part")
    assert recover(tmp_path) == Recovered(processes=1, torn=1, orphans=1)
    assert whole.read_bytes() == torn.read_bytes() == LINE
    assert not part.exists()
    assert not journal.exists()
    assert recover(tmp_path) == Recovered()


def test_files_that_no_journal_names_are_not_touched(tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(b"half")
    dead_journal(tmp_path)
    recover(tmp_path)
    assert other.read_bytes() == b"half"


@pytest.mark.parametrize("length", [1, 10, 1000])
def test_a_torn_journal_line_names_nothing(tmp_path: Path, length: int) -> None:
    torn, other = tmp_path / "t.jsonl", tmp_path / "other.jsonl"
    torn.write_bytes(LINE + b"half")
    other.write_bytes(b"half")
    dead_journal(tmp_path, torn, tail=os.fsencode(other)[:length])
    assert recover(tmp_path) == Recovered(processes=1, torn=1)
    assert other.read_bytes() == b"half"


@pytest.mark.parametrize("junk", [b"\0" * 100, b"\0\n", b"\0\0\n\0"])
def test_nuls_in_a_journal_name_nothing(tmp_path: Path, junk: bytes) -> None:
    """After a loss of power they stand where the last write was."""
    torn = tmp_path / "a.jsonl"
    torn.write_bytes(LINE + b"half")
    journal = dead_journal(tmp_path)
    journal.write_bytes(junk + os.fsencode(torn) + b"\n" + junk)
    assert recover(tmp_path) == Recovered(processes=1, torn=1)
    assert torn.read_bytes() == LINE
    assert not journal.exists()


def test_an_empty_journal_is_removed(tmp_path: Path) -> None:
    journal = dead_journal(tmp_path)
    assert recover(tmp_path) == Recovered(processes=1)
    assert not journal.exists()


def test_a_path_may_have_any_bytes(tmp_path: Path) -> None:
    torn = tmp_path / os.fsdecode(b"caf\xe9 \xf0\x9f\x90\x8d.jsonl")
    torn.write_bytes(b"half")
    dead_journal(tmp_path, torn)
    assert recover(tmp_path).torn == 1
    assert not torn.exists()


def test_one_file_that_can_not_be_put_in_order_does_not_keep_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, torn = tmp_path / "bad.jsonl", tmp_path / "t.jsonl"
    bad.mkdir()  # stands for any file that can't be opened
    torn.write_bytes(LINE + b"half")
    journal = dead_journal(tmp_path, bad, torn)
    assert recover(tmp_path).torn == 1
    assert torn.read_bytes() == LINE
    assert str(bad) in caplog.text
    assert journal.exists(), "it is to be tried again"
    bad.rmdir()
    caplog.clear()
    assert recover(tmp_path) == Recovered(processes=1)
    assert not journal.exists()
    assert not caplog.text


def test_what_a_living_process_has_open_is_left_alone(tmp_path: Path) -> None:
    with living_process(tmp_path) as journal:
        assert recover(tmp_path) == Recovered()
        assert journal.exists()
        assert (tmp_path / "living.jsonl").read_bytes() == LINE + b"half"
    assert recover(tmp_path) == Recovered(processes=1, torn=1)
    assert (tmp_path / "living.jsonl").read_bytes() == LINE
    assert not journal.exists()


# --- the journal ---


def test_a_journal_is_one_s_own_from_the_first_moment(tmp_path: Path) -> None:
    """Two processes that start at once: neither takes the other's journal for a dead one's."""
    stop = threading.Event()
    found: list[Recovered] = []

    def other_process() -> None:
        while not stop.is_set():
            found.append(recover(tmp_path))

    thread = threading.Thread(target=other_process)
    thread.start()
    try:
        journals = [Journal(tmp_path, f"{number:032x}") for number in range(300)]
    finally:
        stop.set()
        thread.join()
    assert all(journal.path.exists() for journal in journals)
    assert set(found) == {Recovered()}
    for journal in journals:
        journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_could_not_take_a_whole_line_takes_none_of_it(tmp_path: Path) -> None:
    """The disk is full in the middle of a path (here: a limit on file size): the next path starts a line of its own."""
    program = """
import resource, signal, sys
from pathlib import Path
from proxy.spool.recovery import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
journal = Journal(folder, "a" * 32)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
journal.note(folder / "first.jsonl")
resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 5, hard))
try:
    journal.note(folder / "second.jsonl")
except OSError as error:
    print(error.strerror)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
journal.note(folder / "third.jsonl")
"""
    ran = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ran.stdout == "File too large\n"
    noted = (tmp_path / f"{'a' * 32}.journal").read_text().splitlines()
    assert noted == [str(tmp_path / "first.jsonl"), str(tmp_path / "third.jsonl")]
    (tmp_path / "third.jsonl").write_bytes(LINE + b"half")
    assert recover(tmp_path) == Recovered(processes=1, torn=1)


def test_a_journal_that_was_deleted_is_written_anew(tmp_path: Path) -> None:
    """Who deletes the whole dataset deletes the journal in it."""
    folder = tmp_path / ".payload-logger"
    folder.mkdir()
    journal = Journal(folder, "a" * 32)
    journal.note(tmp_path / "first.jsonl")
    journal.path.unlink()
    folder.rmdir()
    journal.note(tmp_path / "second.jsonl")
    assert journal.path.read_text().splitlines() == [str(tmp_path / "second.jsonl")]
    assert recover(folder) == Recovered(), "it is locked again"
    journal.remove()


def test_a_process_that_ends_well_leaves_no_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "a" * 32)
    journal.note(tmp_path / "first.jsonl")
    journal.remove()
    assert recover(tmp_path) == Recovered()
    assert list(tmp_path.iterdir()) == []
