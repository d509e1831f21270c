# SPDX-License-Identifier: Apache-2.0
"""Precomputing: what is stored trains as what is computed, and no interruption shows in the folder."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from geode.data.feature_store import FeatureStore, collate_stored_scenes, read_shard_facts
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.trainers import precompute as precompute_module
from geode.trainers.precompute import VideoItem, list_items, main, precompute
from tests.trainers.common_precompute import NUM_ROOMS, content_of, load_model, make_rooms, make_video


ROOT = Path(__file__).resolve().parents[2]
# A short video, a scene of unknown scale and a wall without floor each say so once; the tests know.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    return root, [VideoItem(*item) for item in make_rooms(root)]


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in load_model():
        part.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def parts(saved_model):
    """
    Loaded as the command line loads them. Where weights lie in memory decides the last bit of a matrix product: those of a
    mapped file lie elsewhere than copies of them.
    """
    folder = saved_model / "model"
    return GeodeForConditionalGeneration.from_pretrained(folder), GeodeProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def make_store(media, parts):
    """Make a store of all videos, two scenes a shard, in this process."""
    root, items = media

    def make(out: Path, **options):
        return precompute(*parts, items, out, media_root=root, **{"shard_size": 2, "has_progress": False, **options})

    return make


@pytest.fixture(scope="module")
def reference(make_store, tmp_path_factory):
    """A store that nothing interrupted."""
    out = tmp_path_factory.mktemp("reference") / "store"
    return out, make_store(out)


@pytest.fixture(scope="module")
def with_frames(make_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("with_frames") / "store"
    make_store(out, store_vision_features=True)
    return FeatureStore(out)


# ---- training ----


def chat_of(video: dict, value: float) -> list[dict]:
    question = {"type": "text", "text": "How far is the chair from the table, in meters?"}
    answer = [{"type": "text", "text": "It is "}, {"type": "value", "token": "<REG>", "value": value}]
    return [{"role": "user", "content": [video, question]}, {"role": "assistant", "content": answer}]


def training_inputs(processor, videos: list[dict]) -> dict:
    chats = [chat_of(video, 1.5 + index) for index, video in enumerate(videos)]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    inputs = processor.apply_chat_template(chats, **options)
    inputs["labels"] = inputs["input_ids"].masked_fill(~inputs.pop("assistant_masks").bool(), -100)
    return dict(inputs)


def fly_inputs(processor, root: Path, items: list[VideoItem]) -> dict:
    """What training without a store reads."""
    videos = [{"type": "video", "path": str(root / item.path)} for item in items]
    for video, item in zip(videos, items, strict=True):
        if item.geometry:
            video["geometry"] = str(root / item.geometry)
    return training_inputs(processor, videos)


def store_inputs(processor, root: Path, items: list[VideoItem], store: FeatureStore) -> dict:
    scenes = [store.scene_of(item.path) for item in items]
    parts = [scene.as_part(root / item.path) for scene, item in zip(scenes, items, strict=True)]
    inputs = training_inputs(processor, parts)
    if scenes[0].has_video_features:
        inputs |= collate_stored_scenes([[scene] for scene in scenes])
    return inputs


def train(model, batches: list[dict]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """One optimiser step for each batch; losses and final weights. The model is as before afterwards."""
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.detach())
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    model.eval()
    return losses, after


@pytest.mark.parametrize("has_frames", [False, True], ids=["tokens", "tokens_and_frames"])
def test_training_on_stored_features_is_bitwise_training_on_the_fly(media, parts, reference, with_frames, has_frames):
    """Three AdamW steps in float32: a room with given geometry, a reconstructed one, and one of two frames."""
    (root, items), (model, processor) = media, parts
    store = with_frames if has_frames else FeatureStore(reference[0])
    store.check(model, processor)
    batches = [[items[1]], [items[0]], [items[4]]]
    assert [bool(batch[0].geometry) for batch in batches] == [True, False, False]
    fly = train(model, [fly_inputs(processor, root, batch) for batch in batches])
    read = train(model, [store_inputs(processor, root, batch, store) for batch in batches])
    assert all(torch.equal(one, other) for one, other in zip(fly[0], read[0], strict=True))
    assert [name for name in fly[1] if not torch.equal(fly[1][name], read[1][name])] == []
    before = model.state_dict()
    moved = {name.split(".")[1] for name in before if not torch.equal(before[name], fly[1][name])}
    assert {"language_model", "drm", "multi_modal_projector"} <= moved


@pytest.mark.parametrize("numbers", [[1, 3], [0, 2]], ids=["given", "reconstructed"])
def test_a_batch_of_stored_scenes_agrees_with_one_on_the_fly(media, parts, with_frames, numbers):
    """On the fly the encoders see both scenes at once, and may round otherwise: to 1e-5."""
    (root, items), (model, processor) = media, parts
    chosen = [items[number] for number in numbers]
    fly = model(**fly_inputs(processor, root, chosen))
    read = model(**store_inputs(processor, root, chosen, with_frames))
    torch.testing.assert_close(read.loss, fly.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(read.logits, fly.logits, atol=1e-4, rtol=1e-4)


# ---- what is stored ----


def test_every_good_video_is_stored_once_and_every_bad_one_is_listed(reference):
    out, report = reference
    store = FeatureStore(out)
    # Five rooms; the copy of the first is no scene of its own.
    assert len(store) == report.num_scenes == NUM_ROOMS
    assert store.key_of("rooms/a_copy_of_0.mp4") == store.key_of("rooms/0.mp4")
    assert report.num_videos == 11
    assert report.failures == store.failures
    assert sorted(report.failures) == [
        "rooms/bad_geometry.mp4",
        "rooms/empty.mp4",
        "rooms/missing.mp4",
        "rooms/no_geometry.mp4",
        "rooms/truncated.mp4",
    ]
    assert report.failures["rooms/missing.mp4"] == "There is no such file."
    assert report.failures["rooms/no_geometry.mp4"] == "There is no geometry at geometry/nowhere."
    assert report.failures["rooms/empty.mp4"].startswith("A video file was expected, but rooms/empty.mp4 (0 bytes)")
    assert "The files are damaged" in report.failures["rooms/bad_geometry.mp4"]
    assert report.lines()[0] == "5 scenes of 6 videos are stored, 5 videos failed."
    assert len(report.lines()) == 6


def test_nothing_in_the_folder_names_the_machine(media, reference):
    for path in reference[0].iterdir():
        content = path.read_bytes()
        assert str(media[0]).encode() not in content
        assert str(Path.cwd()).encode() not in content


def test_folder_holds_the_index_and_shards_and_nothing_else(reference):
    assert sorted(content_of(reference[0])) == [
        "index.json",
        "manifest.json",
        *(f"shard-0000{number}.safetensors" for number in range(4)),
    ]
    # Readable by whom the user's mask lets read.
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in reference[0].iterdir()} == {0o666 & ~mask}


def test_store_of_another_folder_of_the_same_videos_is_the_same(media, parts, reference, tmp_path):
    root, items = media
    moved = tmp_path / "elsewhere"
    shutil.copytree(root, moved)
    precompute(*parts, items[::-1], tmp_path / "store", media_root=moved, shard_size=2, has_progress=False)
    assert content_of(tmp_path / "store") == content_of(reference[0])


def test_rounding_features_to_half_precision(make_store, tmp_path, with_frames, parts):
    make_store(tmp_path / "store", store_vision_features=True, dtype=torch.bfloat16)
    store = FeatureStore(tmp_path / "store")
    rounded, exact = (one.scene_of("rooms/1.mp4").tensors() for one in (store, with_frames))
    for name in ("point_tokens", "video_features"):
        assert torch.equal(rounded[name], exact[name].bfloat16())
    assert torch.equal(rounded["point_token_positions"], exact["point_token_positions"])
    store.check(*parts)


# ---- interruptions ----


class Killer:
    """Kills this process, as `kill -9` does, at its n-th write: halfway, before the file gets its name, or after."""

    def __init__(self, number: int, moment: str):
        self.remaining, self.moment = number, moment

    def install(self) -> None:
        replace, real_open = os.replace, open

        def dying_replace(source, target):
            self.remaining -= 1
            if self.remaining == 0 and self.moment == "half":
                content = Path(source).read_bytes()
                with real_open(source, "wb") as file:
                    file.write(content[: len(content) // 2])
            if self.remaining == 0 and self.moment != "after":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            if self.remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        precompute_module.os.replace = dying_replace


def run_and_kill(make_store, out: Path, killer: Killer) -> int:
    """Run in a process of its own; return the signal that ended it, or 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of a fork beside threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            killer.install()
            make_store(out)
            code = 0
        finally:
            os._exit(code)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", ["half", "before", "after"])
def test_killed_at_every_write_and_resumed_gives_the_same_bytes(make_store, reference, tmp_path, moment):
    """Each run resumes the one before and is killed one write later, until one comes to the end."""
    kills = 0
    while run_and_kill(make_store, tmp_path / "store", Killer(kills + 1, moment)) == signal.SIGKILL:
        kills += 1
        assert not (tmp_path / "store" / "index.json").is_file() or moment == "after"
    # The manifest, the digests, four shards (each run finds those of the run before) and the index.
    assert kills >= 4
    assert content_of(tmp_path / "store") == content_of(reference[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("number", range(1, 8))
def test_killed_once_at_any_write_leaves_whole_files_only(make_store, reference, tmp_path, number):
    out = tmp_path / "store"
    assert run_and_kill(make_store, out, Killer(number, "half")) == signal.SIGKILL
    complete = content_of(reference[0])
    visible = {name: digest for name, digest in content_of(out).items() if not name.startswith(".")}
    assert visible.items() <= complete.items()
    assert len(visible) == max(0, number - 1 - (number > 2))  # the second write, of digests, is hidden
    report = make_store(out)
    assert content_of(out) == complete
    assert report.num_new_shards == 4 - sum(name.startswith("shard") for name in visible)


def command(folder: Path, media, out: Path, *options: str) -> list[str]:
    listed = folder / "videos.jsonl"
    rows = [{"media": item.path, "geometry": item.geometry, "media_type": "video"} for item in media[1]]
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = ["--model", str(folder / "model"), "--videos", str(listed), "--media-root", str(media[0])]
    return [*arguments, "--out", str(out), "--shard-size", "2", *options]


def launch(arguments: list[str]) -> list[str]:
    """The command for two processes, at a free port."""
    options = ["--num_processes", "2", "--cpu", "--main_process_port", "0", "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    script = str(ROOT / "trainers" / "precompute.py")
    return [sys.executable, "-m", "accelerate.commands.launch", *options, script, *arguments]


def test_command_line_killed_and_resumed_by_two_processes_gives_the_same_bytes(
    saved_model, media, reference, tmp_path
):
    """One process is killed from outside once its first shard is there; `accelerate launch` with two goes on."""
    arguments = command(saved_model, media, tmp_path / "store")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    options = {
        "cwd": tmp_path,
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    store = tmp_path / "store"
    first = store / "shard-00000.safetensors"
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-m", "geode.trainers.precompute", *arguments], **options)
        while process.poll() is None and not first.exists():
            time.sleep(0.001)
        process.kill()
        output = process.communicate(timeout=60)[0]
        if process.returncode != 0:
            break
        shutil.rmtree(store)  # this machine was busy, and the kill came too late
    assert process.returncode == -signal.SIGKILL, output
    assert not (store / "index.json").is_file()
    written = first.stat().st_mtime_ns
    script = launch(arguments)
    result = subprocess.run(script, **options, timeout=300)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("5 scenes of 6 videos are stored, 5 videos failed.") == 1
    assert result.stdout.count("failed: rooms/missing.mp4: There is no such file.") == 1
    assert first.stat().st_mtime_ns == written
    assert content_of(tmp_path / "store") == content_of(reference[0])


@pytest.mark.slow
def test_two_processes_killed_time_and_again_give_the_bytes_of_one(parts, saved_model, tmp_path):
    """Twenty videos, a shard each: launcher and both processes are killed whenever some shards more are there."""
    items = [VideoItem(f"{number:02d}.mp4") for number in range(20)]
    for number, item in enumerate(items):
        make_video(tmp_path / "media" / item.path, number)
    root, store = tmp_path / "media", tmp_path / "store"
    precompute(*parts, items, tmp_path / "reference", media_root=root, shard_size=1, has_progress=False)
    arguments = [
        "--model",
        str(saved_model / "model"),
        "--videos",
        str(root),
        "--out",
        str(store),
        "--shard-size",
        "1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    kills, code = 0, None
    while code != 0:
        assert kills < 20
        there = len(list(store.glob("shard-*"))) if store.is_dir() else 0
        process = subprocess.Popen(launch(arguments), **options, start_new_session=True)
        while process.poll() is None and len(list(store.glob("shard-*"))) < min(there + 3, len(items) + kills):
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        code = process.wait()
    assert kills >= 2
    assert content_of(store) == content_of(tmp_path / "reference")


def test_a_complete_store_is_left_alone(make_store, reference, tmp_path):
    shutil.copytree(reference[0], tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    report = make_store(tmp_path / "store")
    assert report.num_new_shards == 0
    assert report[:3] == reference[1][:3]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()} == before


@pytest.mark.parametrize("harm", ["truncate", "header", "remove", "swap"])
def test_a_damaged_shard_is_made_again(make_store, reference, tmp_path, harm):
    out = tmp_path / "store"
    shutil.copytree(reference[0], out)
    shard = out / "shard-00001.safetensors"
    content = shard.read_bytes()
    if harm == "truncate":
        shard.write_bytes(content[:-1])
    elif harm == "header":
        shard.write_bytes(b"\xff" * 16 + content[16:])
    elif harm == "remove":
        shard.unlink()
    else:
        (out / "index.json").unlink()  # a whole shard, but of other scenes
        shutil.copy(out / "shard-00000.safetensors", shard)
    assert make_store(out).num_new_shards == 1
    assert content_of(out) == content_of(reference[0])


def test_what_a_dead_run_left_is_removed(make_store, reference, tmp_path):
    out = tmp_path / "store"
    shutil.copytree(reference[0], out)
    (out / "index.json").unlink()
    (out / ".shard-00001.safetensors.tmp").write_bytes(b"half")
    (out / ".plan-00000.json.tmp").write_bytes(b"half")
    (out / "shard-00009.safetensors").write_bytes(b"of a longer list")
    make_store(out)
    assert content_of(out) == content_of(reference[0])


@pytest.mark.parametrize("plan", [b"", b'[{"st', b"\xff\xfe", b"3", b"[3]", b'[{"key": "k"}]'])
def test_a_damaged_plan_is_made_again(make_store, reference, tmp_path, plan):
    out = tmp_path / "store"
    shutil.copytree(reference[0], out)
    (out / "index.json").unlink()
    (out / ".plan-00000.json").write_bytes(plan)
    make_store(out)
    assert content_of(out) == content_of(reference[0])


def test_a_video_that_changed_during_an_interruption_is_stored_anew(parts, tmp_path):
    for number in range(2):
        make_video(tmp_path / f"media/{number}.mp4", number)
    items, out = [VideoItem("0.mp4"), VideoItem("1.mp4")], tmp_path / "store"
    options = {"media_root": tmp_path / "media", "shard_size": 1, "has_progress": False}
    precompute(*parts, items, out, **options)
    old = FeatureStore(out).paths
    (out / "index.json").unlink()
    make_video(tmp_path / "media/1.mp4", 7)
    assert precompute(*parts, items, out, **options).num_new_shards == 1
    new = FeatureStore(out).paths
    assert new["0.mp4"] == old["0.mp4"]
    assert new["1.mp4"] != old["1.mp4"]


def test_what_failed_is_tried_again_if_asked(parts, tmp_path):
    """Both a video that was missing and one that was damaged; the store is then as if they had never failed."""
    for number in range(4):
        make_video(tmp_path / f"media/{number}.mp4", number)
    items = [VideoItem(f"{number}.mp4") for number in range(4)]
    options = {"media_root": tmp_path / "media", "shard_size": 1, "has_progress": False}
    precompute(*parts, items, tmp_path / "whole", **options)
    videos = [tmp_path / "media/1.mp4", tmp_path / "media/2.mp4"]
    contents = [video.read_bytes() for video in videos]
    videos[0].unlink()
    videos[1].write_bytes(contents[1][:500])
    assert len(precompute(*parts, items, tmp_path / "store", **options).failures) == 2
    for video, content in zip(videos, contents, strict=True):
        video.write_bytes(content)
    assert len(precompute(*parts, items, tmp_path / "store", **options).failures) == 2
    assert precompute(*parts, items, tmp_path / "store", retry_failed=True, **options).failures == {}
    assert content_of(tmp_path / "store") == content_of(tmp_path / "whole")


def test_no_store_is_left_where_no_video_can_be_encoded(parts, tmp_path):
    (tmp_path / "0.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"No video could be encoded; the first error is: A video file was expected"):
        precompute(*parts, [VideoItem("0.mp4")], tmp_path / "store", media_root=tmp_path, has_progress=False)
    assert sorted(content_of(tmp_path / "store")) == ["manifest.json"]


# ---- refusals ----


def test_other_options_are_refused_with_both_values(make_store, reference, parts, media):
    with pytest.raises(ValueError, match=r"`shard_size` 3 instead of the stored 2"):
        make_store(reference[0], shard_size=3)
    with pytest.raises(ValueError, match=r'`options.vision_tower` \{"digest".* instead of the stored null'):
        make_store(reference[0], store_vision_features=True)
    model, processor = parts
    other = copy.deepcopy(processor)
    other.max_points = 999
    options = {"media_root": media[0], "shard_size": 2}
    with pytest.raises(ValueError, match=r"`options.point_encoder.max_points` 999 instead of the stored 1024"):
        precompute(model, other, media[1], reference[0], **options)
    with pytest.raises(ValueError, match=r"`videos.number` 10 instead of the stored 11"):
        precompute(model, processor, media[1][1:], reference[0], **options)


def test_a_folder_of_other_things_is_refused(make_store, tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match=r"must be new, empty or a feature store, and .* holds \['thesis.txt'\]"):
        make_store(tmp_path)
    assert sorted(content_of(tmp_path)) == ["thesis.txt"]


def test_a_wrong_media_root_is_an_error_and_no_store(parts, media, tmp_path):
    with pytest.raises(ValueError, match=r"None of the 11 videos can be read below .*There is no such file"):
        precompute(*parts, media[1], tmp_path / "store", media_root=tmp_path, has_progress=False)
    assert not (tmp_path / "store" / "index.json").exists()


def test_items_that_cannot_be_stored_are_refused(parts, media, tmp_path):
    model = copy.deepcopy(parts[0])
    model.detach_reconstructor()
    with pytest.raises(
        ValueError, match=r"7 videos have no geometry \(rooms/0.mp4 first\), and the model has no recon"
    ):
        precompute(model, parts[1], media[1], tmp_path / "store", media_root=media[0])
    with pytest.raises(ValueError, match=r"one geometry at most, got several for rooms/1.mp4"):
        precompute(*parts, [*media[1], ("rooms/1.mp4", None)], tmp_path / "store", media_root=media[0])
    with pytest.raises(ValueError, match=r"at least one video, got none"):
        precompute(*parts, [], tmp_path / "store", media_root=media[0])
    with pytest.raises(ValueError, match=r"`shard_size` must be a whole number of at least 1, got 0"):
        precompute(*parts, media[1], tmp_path / "store", media_root=media[0], shard_size=0)


def test_strict_command_line_fails_once_all_is_stored(saved_model, media, reference, tmp_path, capsys):
    assert main(command(saved_model, media, tmp_path / "store", "--strict")) == 2
    assert "5 of 11 videos could not be stored; the others are" in capsys.readouterr().err
    assert content_of(tmp_path / "store") == content_of(reference[0])


# ---- lists of videos ----


def test_list_items_searches_folders_and_fills_patterns(media):
    items, root = list_items(media[0], geometry="geometry/{stem}")
    assert root == media[0]
    assert items[0] == VideoItem("rooms/0.mp4", "geometry/0")
    assert [item.path for item in items] == sorted(item.path for item in media[1] if "missing" not in item.path)
    items, _ = list_items(
        media[0] / "rooms", media_root=media[0], geometry="{parent}/../geometry/{stem}".replace("../", "")
    )
    assert items[1] == VideoItem("rooms/1.mp4", "rooms/geometry/1")


def test_list_items_reads_lists_and_distinct_videos_of_records(tmp_path):
    (tmp_path / "list.txt").write_text("# rooms\nb.mp4\n./a.mp4\n\nb.mp4\n")
    assert list_items(tmp_path / "list.txt") == ([VideoItem("a.mp4"), VideoItem("b.mp4")], tmp_path)
    rows = [
        {"media": "b.mp4", "media_type": "video", "geometry": "g/b"},
        {"media": "b.mp4", "media_type": "video", "geometry": "g/b"},
        {"media": "picture.jpg", "media_type": "image"},
        {"media": "a.mp4"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items, root = list_items(tmp_path / "rows.jsonl", media_root=tmp_path / "media")
    assert items == [VideoItem("a.mp4"), VideoItem("b.mp4", "g/b")]
    assert root == tmp_path / "media"


def test_list_items_ends_lines_where_files_do(tmp_path):
    (tmp_path / "list.txt").write_bytes("\ufeffa\u2028b.mp4\r\nc\x85d.mp4\n \ne f.mp4 ".encode())
    assert [item.path for item in list_items(tmp_path / "list.txt")[0]] == ["a\u2028b.mp4", "c\x85d.mp4", "e f.mp4"]
    rows = [{"media": "a.mp4", "prompt": "x\u2028y\x85z"}, {"media": "c.mp4", "geometry": None}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(f"\ufeff{lines}".encode())
    assert list_items(tmp_path / "rows.jsonl")[0] == [VideoItem("a.mp4"), VideoItem("c.mp4")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"media_type": "video"}', "must have its video's path as `media`.* got None and None"),
        ('{"media": 3}', "got 3 and None"),
        ('{"media": "a.mp4", "geometry": ["g"]}', r"got 'a\.mp4' and \['g'\]"),
        ('{"media": "../a.mp4"}', "must stay below its root"),
        ("[1]", "A line must be a JSON object"),
        ('{"media": ', "Expecting value"),
    ],
)
def test_list_items_names_the_line_that_is_no_record(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"media": "b.mp4"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=rf"Line 3 of {path} is no record of a video: .*{message}"):
        list_items(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("../secret.mp4", "must stay below its root"),
        ("", "At least one video is needed"),
        ('{"media": "a.mp4", "geometry": "g"}\n{"media": "a.mp4"}', "a.mp4 has 'g' and None"),
    ],
)
def test_list_items_refuses_bad_lists(tmp_path, text, message):
    path = tmp_path / ("list.jsonl" if text.startswith("{") else "list.txt")
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list_items(path)
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        list_items(tmp_path / "absent")


@pytest.mark.parametrize("item", [("../a.mp4", None), ("/a.mp4", None), ("a.mp4", "../g"), ("a.mp4", "/g")])
def test_items_that_were_not_listed_stay_below_the_root_as_well(tmp_path, item):
    with pytest.raises(ValueError, match="must stay below its root"):
        precompute(None, None, [VideoItem(*item)], tmp_path / "store", media_root=tmp_path)
    assert not (tmp_path / "store").exists()


def test_read_shard_facts_gives_none_for_what_is_no_shard(tmp_path, reference):
    facts = read_shard_facts(reference[0] / "shard-00000.safetensors")
    assert len(facts["keys"]) == 2
    assert read_shard_facts(tmp_path / "absent") is None
    (tmp_path / "other").write_bytes(b"{}")
    assert read_shard_facts(tmp_path / "other") is None
