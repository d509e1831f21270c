# SPDX-License-Identifier: Apache-2.0
"""A disk that is full: the error says so, nothing has its name before it is whole, and the same command goes on with more room."""

import subprocess
from pathlib import Path

import pytest

from tests.trainers.common_precompute import content_of


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, and a function that changes its size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> subprocess.CompletedProcess:
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)

    try:
        tried = mount("size=64k")
    except FileNotFoundError:
        pytest.skip("there is no `mount`")
    if tried.returncode != 0:
        pytest.skip(f"this user may not mount a tmpfs: {tried.stderr.strip()}")
    yield place, lambda size: mount(f"remount,size={size}").check_returncode()
    subprocess.run(["umount", place], check=True)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "kills", "share"),
    [
        ("store", "precompute_kills", 0.6),
        ("eval", "eval_kills", 0.0),
        pytest.param("eval", "eval_kills", 0.5, marks=pytest.mark.slow),
        ("geode-tiny", "exported", 0.6),
        pytest.param("rooms", "rooms_kills", 0.5, marks=pytest.mark.slow),
        pytest.param("trained", "training_kills", 0.3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_full_disk_is_named_and_more_room_is_enough(name, kills, share, disk, places, zygote, request):
    kills, (place, resize) = request.getfixturevalue(kills), disk
    whole, out = places / name, place / name
    resize(max(4096, int(share * size_of(whole))))
    ended = zygote.run(kills.arguments(out), out)
    assert ended.code == 2, ended.printed
    error = ended.printed[ended.printed.rindex("geode: error:") :]
    assert "Traceback" not in ended.printed
    assert str(out) in error
    assert "No space left on device" in error or "unexpected pos" in error  # of `torch.save`, which does not say why
    assert "Make room" in error
    complete = content_of(whole)
    for path, digest in content_of(out).items():
        # What is under way has other names: hidden ones, the parts of an evaluation, the digests of rooms, and a checkpoint's.
        if not any(part.startswith((".", "predictions-", "SHA256SUMS", "checkpoint-")) for part in Path(path).parts):
            assert complete.get(path) == digest, path
    if name == "trained":
        assert all((folder / "trainer_state.json").is_file() for folder in out.glob("checkpoint-*"))
    resize("1g")
    ended = zygote.run(kills.arguments(out), out)
    assert ended.code == 0, ended.printed
    kills.compare(out)
