"""Folders that several processes, and several users, write to."""

import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedlight.federation import journal
from fedlight.federation.journal import Journal
from fedlight.federation.noise import note
from fedlight.runs import clock
from fedlight.runs.clock import Clock, Spent
from fedlight.runs.csv_files import CsvFile, write_partition
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import atomic, explain
from fedlight.runtime.lease import acquire_lease

# --- several processes append to the journal of a round ---


def alarms(capfd: pytest.CaptureFixture[str]) -> str:
    return capfd.readouterr().err


def test_a_record_being_written_is_no_damage_and_one_cut_short_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The file of another worker may end after any byte: of a header, or of an update."""
    writer = Journal(tmp_path)
    writer.open_round(1)
    writer.add(0, b"first", None)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for cut in range(len(whole)):
        content = whole[:cut] if cut < 20 else whole + whole[:cut].replace(b'"client": 0', b'"client": 1')
        path.write_bytes(content)
        with path.open("ab") as appending:
            fcntl.flock(appending, fcntl.LOCK_EX)
            reader = Journal(tmp_path)
            reader.open_round(1)
            assert not alarms(capfd), cut
            assert (reader.find(0) is not None) == (cut >= 20)
            assert reader.find(1) is None
        reader = Journal(tmp_path)
        reader.open_round(1)
        assert "is damaged or cut short" in alarms(capfd), cut


def test_readers_of_a_busy_writer_see_complete_updates_and_report_no_damage(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    updates = [os.urandom(300_000) for _ in range(60)]

    def write() -> None:
        writer = Journal(tmp_path)
        writer.open_round(1)
        for client, update in enumerate(updates):
            writer.add(client, update, None)

    thread = threading.Thread(target=write)
    thread.start()
    looks = 0
    while thread.is_alive() or not looks:
        reader = Journal(tmp_path)
        reader.open_round(1)
        seen = [client for client in range(len(updates)) if reader.find(client)]
        assert seen == [*range(len(seen))]
        looks += 1
    thread.join()
    reader = Journal(tmp_path)
    reader.open_round(1)
    assert [receipt.read() for client in range(60) if (receipt := reader.find(client))] == updates
    assert not alarms(capfd)


def test_updates_are_stored_on_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def unsupported(file: object, kind: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(journal.fcntl, "flock", unsupported)
    writer, reader = Journal(tmp_path), Journal(tmp_path)
    writer.open_round(1)
    writer.add(0, b"first", None)
    writer.add(1, b"second", None)
    reader.open_round(1)
    assert [reader.find(client).read() for client in (0, 1)] == [b"first", b"second"]  # type: ignore[union-attr]
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    Journal(tmp_path).open_round(1)
    assert "is damaged or cut short" in alarms(capfd)


# --- another user made a symbolic link in place of a file ---


def mark(folder: Path) -> None:
    Clock(folder / ".clock.json").mark(1, Spent(2.0, 1.0))


def append(folder: Path) -> None:
    table = CsvFile(folder / "rounds.csv", ("round",))
    (folder / "rounds.csv").unlink()
    (folder / "rounds.csv").symlink_to(folder.parent / "victim")
    table.append([{"round": 1}])


def take(folder: Path) -> None:
    with acquire_lease(folder):
        pass


def send(folder: Path) -> None:
    box = Journal(folder)
    box.open_round(1)
    box.add(0, b"first", None)
    (path,) = (path for path in folder.iterdir() if path.name.startswith("r0001"))
    path.unlink()
    path.symlink_to(folder.parent / "victim")
    box.add(1, b"second", None)


def replace(folder: Path) -> None:
    with atomic(folder / "result.json") as temporary:
        temporary.write_text("{}")


def swapped(folder: Path) -> None:
    with atomic(folder / "result.json") as temporary:
        temporary.unlink()
        temporary.symlink_to(folder.parent / "victim")


WRITERS: dict[str, tuple[Callable[[Path], object], bool]] = {
    "releases": (lambda folder: note(folder / "releases"), False),
    ".clock.json.new": (mark, True),
    ".clock.json": (mark, True),
    "rounds.csv": (lambda folder: CsvFile(folder / "rounds.csv", ("round",)), False),
    "partition.csv": (lambda folder: write_partition(folder / "partition.csv", np.ones((1, 1)), "a"), False),
    "grown.csv": (append, False),
    ".lock": (take, False),
    "sent.updates": (send, False),
    "result.json": (replace, True),
    "swapped.json": (swapped, False),
}
"""Name of the link: who writes there, and whether it can do so without following it."""


@pytest.mark.parametrize("name", WRITERS)
def test_symbolic_links_are_replaced_or_rejected_and_never_followed(name: str, tmp_path: Path) -> None:
    folder, victim = tmp_path / "shared", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("precious")
    (folder / name).symlink_to(victim)
    write, goes_on = WRITERS[name]
    if goes_on:
        write(folder)
        assert not (folder / name).is_symlink() or name == ".clock.json.new"
    else:
        with pytest.raises((OSError, BadInput)) as caught:
            write(folder)
        message = explain(caught.value) if isinstance(caught.value, OSError) else str(caught.value)
        assert "symbolic link" in message
        assert str(folder) in message
    assert victim.read_text() == "precious"


def test_the_clock_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "EVERY", 0.0)
    made = Clock(tmp_path / ".clock.json")
    for seconds in (1.0, 2.0):
        made.mark(3, Spent(seconds, 0.5))
    assert [path.name for path in tmp_path.iterdir()] == [".clock.json"]
    assert made.spent_after(3) == Spent(2.0, 0.5)
