"""Damage, stray files and failing disks: what is lost is made again, and nothing else is touched."""

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Cell, invoke

from fedlight import dashboard, export, report, sample, sweeps
from fedlight.experiment import cell as cell_module
from fedlight.federation.journal import Journal
from fedlight.federation.site import Site
from fedlight.runtime.files import atomic, remove_temporaries

MakeCell = Callable[..., Cell]
UDEC = ["method=UDEC", "clients=3", "trainer.workers=1"]
FULL = ["method=FULL", *UDEC[1:]]


def snapshot(folder: Path) -> dict[str, Any]:
    """Every path below a folder with its bytes and the time of its last change."""
    return {
        str(path.relative_to(folder.parent)): (
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in [folder, *folder.rglob("*")]
    }


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def last(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern))


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The client of each local update."""
    begun: list[int] = []
    update = Site.update

    def counted(site: Site, group: Any) -> Any:
        begun.extend(broadcast.client for broadcast in group)
        return update(site, group)

    monkeypatch.setattr(Site, "update", counted)
    return begun


def outcome(cell: Cell) -> Any:
    result = cell.result
    tables = [cell.rows("ledger.csv"), [{**row, "seconds": ""} for row in cell.rows("rounds.csv")]]
    return result["status"], result["state_sha256"], result["client_sha256"], tables


def run_again(*arguments: str, cell: list[str] = UDEC) -> int:
    return invoke(*SMALL, *cell, *arguments)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `runs` of a finished cell."""
    runs = tmp_path_factory.mktemp("finished") / "runs"
    assert run_again(f"output={runs}") == 0
    return runs


@pytest.fixture
def made(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cell:
    """A copy of it in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(original, tmp_path / "runs")
    (folder,) = Path("runs", "default").glob("UDEC*")
    return Cell(folder)


STRAYS = ("notes.txt", "r0001-backup.safetensors", "server-r0002-backup.safetensors", ".tmp-mine", "000000")
FOLDERS = (".tmp-folder", "r0009-0123456789abcdef.safetensors", f"r0002-{'0' * 32}.updates")


@pytest.mark.slow
def test_what_a_person_keeps_in_a_checkpoint_is_left_alone(made: Cell) -> None:
    quiet, checkpoint = outcome(made), made.folder / "checkpoint"
    kept = []
    for folder in [checkpoint, *(path for path in checkpoint.rglob("*") if path.is_dir())]:
        for name in STRAYS:
            if not (folder / name).exists():
                (folder / name).write_text(name)
                kept.append(folder / name)
        for name in FOLDERS:
            (folder / name).mkdir()
            kept.append(folder / name)
        (folder / "dangling").symlink_to("nowhere")
        kept.append(folder / "dangling")
    last(checkpoint, "server-r0002-????????????????.safetensors").unlink()
    (made.folder / "result.json").unlink()
    assert run_again() == 0
    assert outcome(made) == quiet
    assert [path for path in kept if not (path.is_symlink() or path.exists())] == []
    assert all(path.read_text() == path.name for path in kept if path.name in STRAYS)


def test_what_another_writer_has_just_removed_is_not_missed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "updates")
    gone = tmp_path / "updates" / f"r0001-{'0' * 32}.updates"
    journal._files = lambda: [gone, gone.with_name(f"r0000-{'0' * 32}.updates")]  # type: ignore[method-assign]
    journal.open_round(1)
    assert journal.find(0) is None
    journal.clear()


def test_temporaries_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    with atomic(tmp_path / "inner" / "a.csv") as temporary:
        copy = temporary.rename(temporary.with_suffix(".txt"))
        temporary.touch()
    remove_temporaries(tmp_path)
    assert not copy.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", "a.csv"]


FAILURES = {
    errno.EIO: "the disk, or the way to it, fails: have it looked at",
    errno.ESTALE: "the network's file system lost it: mount it again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (errno.EIO, "checkpoint/server-r0002-*"),
        (errno.ESTALE, "checkpoint/clients/000001/r0002-*"),
        (errno.EMFILE, "result.json"),
    ],
)
def test_a_failing_disk_is_no_damage(
    made: Cell,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
    name: str,
) -> None:
    failing = last(made.folder, name)
    if failing.name != "result.json":
        (made.folder / "result.json").unlink()
    before = snapshot(made.folder / "checkpoint")
    read = {name: getattr(Path, name) for name in ("read_bytes", "read_text")}

    with monkeypatch.context() as patch:
        for name, act in read.items():

            def fails(path: Path, *given: Any, act: Any = act, **named: Any) -> Any:
                if path.name == failing.name:
                    raise OSError(number, os.strerror(number))  # as of an open file: without its name
                return act(path, *given, **named)

            patch.setattr(Path, name, fails)
        assert run_again() == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fedlight: error")]
    again = "and type the same command again"
    assert lines == [f"fedlight: error: {failing}: {os.strerror(number)}; {FAILURES[number]}, {again}"]
    assert snapshot(made.folder / "checkpoint") == before
    assert failing.exists()


def test_a_full_disk_is_named_where_a_file_was_to_be_written(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "checkpoint" in path.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert command(*SMALL, *UDEC) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fedlight: error")]
    assert "/checkpoint/clients/000000/r0001-" in line
    assert line.endswith("No space left on device; make room there, and type the same command again")


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755)])
def test_files_have_the_umask_of_the_user(cell: MakeCell, umask: int, file: int, folder: int) -> None:
    before = os.umask(umask)
    try:
        made = cell(*UDEC, "evaluation.grid=1")
    finally:
        os.umask(before)
    modes = {
        (path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in [made.folder, *made.folder.rglob("*")]
    }
    assert modes == {(False, file), (True, folder)}


@pytest.mark.slow
def test_reading_never_writes(made: Cell, capfd: pytest.CaptureFixture[str]) -> None:
    damaged = last(made.folder, "checkpoint/clients/000000/r0002-*")
    flip(damaged)
    before = snapshot(made.folder)
    here, sweep = made.folder, made.folder.parent

    def drawn(client: int) -> int:
        return invoke(str(here), "--client", str(client), "--images", "1", "--out", "a.png", main=sample.main)

    def exported(client: int) -> int:
        return invoke(str(here), "--client", str(client), "--out", f"model{client}", main=export.main)

    for asked in drawn, exported:
        assert asked(1) == 0
        capfd.readouterr()
        assert asked(0) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line == f"fedlight: error: {damaged} is damaged; run the cell again for the model of client 0"
    assert not Path("model0").exists()
    assert invoke(str(sweep), "--out", "page", main=report.main) == 0
    assert invoke("status", str(sweep), main=sweeps.main) == 0
    assert invoke("--entity", "e", "--out", "d.json", main=dashboard.main) == 0
    assert snapshot(made.folder) == before

    server = last(made.folder, "checkpoint/server-r0002-*")
    flip(server)
    before = snapshot(made.folder)
    capfd.readouterr()
    shutil.rmtree("model1")
    for asked in drawn, exported:
        assert asked(1) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line == f"fedlight: error: {here / 'checkpoint'} is damaged; run the cell again for its models"
    assert snapshot(made.folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, Path.unlink])
@pytest.mark.parametrize(
    ("what", "trained"),
    [
        ("checkpoint/server-r0002-*", 3),
        ("checkpoint/clients/000001/r0002-*", 3),
    ],
)
def test_what_a_finished_cell_lost_is_made_again(
    made: Cell,
    capfd: pytest.CaptureFixture[str],
    updates: list[int],
    damage: Callable[[Path], None],
    what: str,
    trained: int,
) -> None:
    quiet, (lost,) = outcome(made), made.folder.glob(what)
    content = lost.read_bytes()
    damage(lost)
    updates.clear()
    capfd.readouterr()
    assert run_again() == 0
    assert f"{lost} is missing or damaged; it is made again" in capfd.readouterr().err
    assert len(updates) == trained
    assert outcome(made) == quiet
    if "server" not in what:  # whose header holds seconds
        assert lost.read_bytes() == content
    aside = lost.with_name(f"{lost.name}.damaged")
    assert aside.exists() == (damage is flip)
    assert run_again() == 0
    assert "done already" in capfd.readouterr().out
    assert len(updates) == trained


@pytest.mark.slow
def test_what_a_finished_cell_lost_of_its_model_is_made_again_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], updates: list[int]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_again(cell=FULL) == 0
    (folder,) = Path("runs", "default").glob("FULL*")
    quiet, model = outcome(Cell(folder)), folder / "model"
    updates.clear()
    for damage in (flip, Path.unlink):
        for lost in (model / "unet" / "diffusion_pytorch_model.safetensors", model / "model_index.json"):
            content = lost.read_bytes()
            damage(lost)
            capfd.readouterr()
            assert run_again(cell=FULL) == 0
            assert f"{lost} is missing or damaged; it is made again" in capfd.readouterr().err
            assert lost.read_bytes() == content
    shutil.rmtree(model)
    assert run_again(cell=FULL) == 0
    assert (model / "model_index.json").exists()
    assert not updates
    assert outcome(Cell(folder)) == quiet


@pytest.mark.slow
def test_a_finished_cell_without_its_checkpoint_is_run_again(made: Cell, updates: list[int]) -> None:
    quiet = outcome(made)
    updates.clear()
    shutil.rmtree(made.folder / "checkpoint")
    assert run_again() == 0
    assert outcome(made) == quiet
    assert len(updates) == 6


def test_a_finished_cell_of_an_earlier_version_is_done(made: Cell, capfd: pytest.CaptureFixture[str]) -> None:
    (made.folder / cell_module.CHECKSUMS).unlink()
    assert run_again() == 0
    assert "done already" in capfd.readouterr().out
