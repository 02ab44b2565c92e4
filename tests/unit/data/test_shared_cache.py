"""A cache that several users of a machine share: real users, in child processes that drop root."""

import multiprocessing.dummy  # noqa: F401  # for thread pools, before root is dropped
import os
import pwd
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from fedlight.data.data_name import data_name
from fedlight.data.image_cache import decode
from fedlight.evaluation.weights import PUBLISHED, find_weights
from fedlight.runtime.cache import load_or_make
from fedlight.runtime.files import atomic

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can work as other users")
FIRST, SECOND, GROUP = 65501, 65502, 65500


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder of the group, in which new files belong to the group."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chown(folder, 0, GROUP)
        folder.chmod(0o2775)
        yield folder


def work_as(user: int, umask: int, work: Callable[[], object]) -> str:
    """What `work` returns, or the error that it raises, as another user with that umask."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([GROUP])
            os.setgid(GROUP)
            os.setuid(user)
            os.umask(umask)
            answer = str(work())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def entry(cache: Path, value: int) -> Callable[[], int]:
    """Reads an entry of the cache; the value is that of whoever made it."""

    def make(temporary: Path) -> None:
        save_file({"value": np.array([value])}, temporary)

    return lambda: int(load_or_make(cache / "classifier" / "x.safetensors", load_file, make)["value"][0])


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(("umask", "expected"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_the_umask_decides_the_mode_of_what_a_library_writes(shared: Path, umask: int, expected: int) -> None:
    assert work_as(FIRST, umask, entry(shared, 1)) == "1"
    assert mode(shared / "classifier" / "x.safetensors") == expected


@pytest.mark.parametrize("umask", [0o002, 0o022])
def test_a_second_user_reads_the_first_user_s_file_and_does_not_change_it(shared: Path, umask: int) -> None:
    assert work_as(FIRST, umask, entry(shared, 1)) == "1"
    assert work_as(SECOND, umask, entry(shared, 2)) == "1"
    assert (shared / "classifier" / "x.safetensors").stat().st_uid == FIRST


def test_members_of_a_group_take_turns_at_a_lock(shared: Path) -> None:
    assert work_as(FIRST, 0o002, entry(shared, 1)) == "1"
    (shared / "classifier" / "x.safetensors").unlink()
    assert mode(shared / "classifier" / "x.safetensors.lock") == 0o664
    assert work_as(SECOND, 0o002, entry(shared, 2)) == "2"


def test_reading_needs_no_lock(shared: Path) -> None:
    assert work_as(FIRST, 0o022, entry(shared, 1)) == "1"
    (shared / "classifier" / "x.safetensors.lock").chmod(0)
    assert work_as(SECOND, 0o022, entry(shared, 2)) == "1"


def test_an_unreadable_file_of_the_cache_is_reported_with_its_owner_and_kept(shared: Path) -> None:
    assert work_as(FIRST, 0o002, entry(shared, 1)) == "1"
    path = shared / "classifier" / "x.safetensors"
    path.chmod(0o600)
    message = work_as(SECOND, 0o002, entry(shared, 2))
    assert message.startswith(f"BadInput: the cache cannot be used: {path}: Permission denied; ")
    assert f"{path} belongs to user {FIRST}, mode 0600" in message
    assert "FEDLIGHT_CACHE" in message
    assert "room" not in message
    assert (path.stat().st_uid, mode(path)) == (FIRST, 0o600)


def test_a_folder_that_may_not_be_written_is_named_with_its_owner(shared: Path) -> None:
    shared.chmod(0o755)
    message = work_as(SECOND, 0o022, entry(shared, 2))
    assert f"{shared} belongs to {pwd.getpwuid(0).pw_name}, mode 0755" in message


def test_decoded_images_and_hashes_of_a_shared_cache_serve_both(shared: Path) -> None:
    images, cache = shared / "images" / "cat", str(shared / "cache")
    images.mkdir(parents=True)
    Image.new("L", (4, 4), 200).save(images / "a.png")

    def look() -> str:
        pixels = decode("set", images, [images / "a.png"], cache, 4, 1).pixels
        data_name.cache_clear()
        return f"{int(pixels.max())} {data_name('image_folder', str(images.parent), cache)}"

    answer = work_as(FIRST, 0o022, look)
    assert answer.startswith("200 images_")
    assert work_as(SECOND, 0o022, look) == answer
    (decoded,) = shared.glob("cache/decoded/*.npy")
    decoded.chmod(0o600)
    message = work_as(SECOND, 0o022, look)
    assert message.startswith("BadInput: data.cache: ")
    assert f"{decoded} belongs to user {FIRST}, mode 0600" in message
    notes = list(shared.glob("cache/hashes/*.json"))
    assert notes
    for note in notes:
        note.chmod(0o600)
    decoded.chmod(0o644)
    notes[0].parent.chmod(0o777)
    assert work_as(SECOND, 0o022, look) == answer
    assert {note.stat().st_uid for note in notes} == {FIRST}


def test_weights_that_may_not_be_read_are_not_downloaded_again(shared: Path) -> None:
    file = shared / PUBLISHED["inception"].file
    file.write_bytes(b"weights")
    file.chmod(0o600)
    message = work_as(SECOND, 0o022, lambda: find_weights("inception", None, str(shared)))
    assert f"{file}: Permission denied" in message


def test_a_file_without_a_library_has_the_mode_of_any_other(shared: Path) -> None:
    def write() -> None:
        with atomic(shared / "note.json") as temporary:
            temporary.write_text("{}", encoding="utf-8")
        (shared / "plain").touch()

    work_as(FIRST, 0o027, write)
    assert mode(shared / "note.json") == mode(shared / "plain") == 0o640
