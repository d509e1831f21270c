# SPDX-License-Identifier: Apache-2.0
"""Nothing has its name before it is whole. Kills and full disks are in `tests/faults/`."""

import errno

import pytest
from safetensors import SafetensorError

from geode.data.whole_files import UNFINISHED, is_free, whole_folder, write_whole, writing


def names(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_write_whole_replaces_a_file_and_what_a_kill_left(tmp_path):
    (tmp_path / ".a.json.tmp").write_text("half of")
    for content in (b"old and longer", "neu, \u00fcber"):
        write_whole(tmp_path / "a.json", content)
    assert (tmp_path / "a.json").read_bytes() == "neu, \u00fcber".encode()
    assert names(tmp_path) == ["a.json"]


def test_write_whole_leaves_the_old_file_after_an_error(tmp_path):
    write_whole(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a.json", "\ud800")
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "absent" / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")],
    ids=type,
)
def test_error_of_a_full_disk_names_the_file_and_the_remedy(error):
    with pytest.raises(OSError, match=r"rooms/a.mp4 could not be written \(.*No space left.*\)\. Make room") as raised:
        with writing("rooms/a.mp4"):
            raise error
    assert raised.value.errno == getattr(error, "errno", None)


def test_other_errors_pass():
    """A video that is missing is no disk that is full."""
    with pytest.raises(FileNotFoundError, match=r"^There is no video\.$"), writing("predictions.jsonl"):
        raise FileNotFoundError("There is no video.")


def test_whole_folder_appears_at_the_end_and_not_after_an_error(tmp_path):
    folder = tmp_path / "new" / "export"

    def fail_halfway() -> None:
        with whole_folder(folder) as work:
            (work / "config.json").write_text("{}")
            assert names(folder) == [UNFINISHED, f"{UNFINISHED}/config.json"]
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail_halfway()
    assert not folder.exists()
    folder.mkdir()  # an empty one stays
    with pytest.raises(KeyboardInterrupt), whole_folder(folder) as work:
        raise KeyboardInterrupt
    assert names(folder) == []
    with whole_folder(folder) as work:
        (work / "config.json").write_text("{}")
        (work / "code").mkdir()
        (work / "code" / "a.py").touch()
    assert names(folder) == ["code", "code/a.py", "config.json"]


def test_folder_that_a_kill_left_is_free_and_others_are_not(tmp_path):
    """The kill came while files were moved: one is there, the other is not, and the same call replaces both."""
    folder = tmp_path / "export"
    assert is_free(folder)
    (folder / UNFINISHED / "code").mkdir(parents=True)
    (folder / "code").mkdir()
    (folder / "code" / "a.py").write_text("old")
    assert is_free(folder)
    with pytest.raises(ValueError, match="no"), whole_folder(folder) as work:
        raise ValueError("no")
    assert is_free(folder)
    with whole_folder(folder) as work:
        (work / "code").mkdir()
        (work / "code" / "a.py").write_text("new")
    assert (folder / "code" / "a.py").read_text() == "new"
    assert not is_free(folder)
