"""Stored versions are read only if they are what was written."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedlight.federation.checkpoint import last_versions
from fedlight.federation.messages import fingerprint, pack
from fedlight.federation.store import Versions
from fedlight.runtime.errors import Damaged

GROUPS = {"theta": {"weight": torch.arange(3.0)}}


def store(folder: Path, content: bytes) -> Path:
    path = folder / f"r0001-{fingerprint(content)}.safetensors"
    path.write_bytes(content)
    return path


def test_a_version_is_read_as_it_was_written(tmp_path: Path) -> None:
    versions = Versions(tmp_path, "cell")
    hash_ = versions.write(7, {"a": 1}, GROUPS)
    (path,) = tmp_path.iterdir()
    assert path.name == f"r0007-{hash_}.safetensors"
    header, groups = versions.read(versions.find()[7])
    assert header == {"a": 1, "cell": "cell"}
    assert torch.equal(groups["theta"]["weight"], GROUPS["theta"]["weight"])


def test_the_last_write_of_a_round_replaces_the_others(tmp_path: Path) -> None:
    versions = Versions(tmp_path, "cell")
    hashes = [versions.write(round_, {"a": a}, GROUPS) for round_, a in ((1, 1), (1, 2), (2, 1))]
    assert [path.stem for _, path in sorted(versions.find().items())] == [
        f"r0001-{hashes[1]}",
        f"r0002-{hashes[2]}",
    ]
    versions.remove(lambda round_: round_ < 2)
    assert [path.stem for path in tmp_path.iterdir()] == [f"r0002-{hashes[2]}"]


def test_files_of_other_states_and_other_names_are_ignored(tmp_path: Path) -> None:
    Versions(tmp_path, "cell", "server-").write(1, {}, GROUPS)
    (tmp_path / "r0001-backup.safetensors").touch()
    (tmp_path / "r0002-0123456789abcdef.safetensors").mkdir()
    assert Versions(tmp_path, "cell").find() == {}
    assert [path.name[:13] for path in last_versions(tmp_path)] == ["server-r0001-"]
    assert Versions(tmp_path / "missing", "cell").find() == {}


@pytest.mark.parametrize("header", [["cell"], "cell", 1, None, {}, {"cell": "another"}])
@pytest.mark.parametrize("repair", [False, True])
def test_a_header_that_is_not_of_this_cell_is_damage(header: Any, repair: bool, tmp_path: Path) -> None:
    path = store(tmp_path, pack(header, GROUPS))
    with pytest.raises(Damaged):
        Versions(tmp_path, "cell", repair=repair).read(path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{path.name}.damaged" if repair else path.name]


def test_bytes_without_a_header_are_damage(tmp_path: Path) -> None:
    for content in (b"", b"short", b"\xff" * 100):
        with pytest.raises(Damaged, match="header"):
            Versions(tmp_path, "cell").read(store(tmp_path, content))


def test_a_changed_byte_is_damage_and_named(tmp_path: Path) -> None:
    versions = Versions(tmp_path, "cell")
    versions.write(1, {}, GROUPS)
    path = versions.find()[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged, match=rf"^{path} is damaged$"):
        versions.read(path)
    with pytest.raises(Damaged, match=rf"^{path} is missing$"):
        versions.read(path)
