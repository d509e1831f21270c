# SPDX-License-Identifier: Apache-2.0
"""The README's section on data, from rooms to a training step, with few and small rooms."""

import re
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import geode
from geode.cli import main
from geode.data.feature_store import FeatureStore


README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    pytest.importorskip("embreex", reason="rendering needs embreex, the extra `world`")
    root = tmp_path_factory.mktemp("data")
    small = ["--image-size", "60", "80", "--frames", "8", "--workers", "1"]
    assert main(["data", "rooms", "--scenes", "4", "--out", str(root / "rooms"), *small]) == 0
    return root


def test_data_rooms_says_what_it_made(data, capsys):
    assert main(["data", "rooms", "--scenes", "4", "--out", str(data / "rooms"), "--image-size", "60", "80"]) == 2
    error = capsys.readouterr().err
    assert "16" in error  # the number of frames that it was not begun with
    assert "8" in error


def test_rooms_mixture_passes_the_check_against_its_own_benchmark(data, tmp_path, capsys):
    benchmark = data / "rooms" / "benchmark"
    arguments = ["data", "check", "rooms", "--data-root", str(data), "--report", str(tmp_path / "r.json")]
    assert main([*arguments, "--benchmark", str(benchmark)]) == 0
    assert "rooms: passed: no scene of" in capsys.readouterr().out


def test_check_notices_a_test_room_in_training(data, tmp_path, capsys):
    mixture = tmp_path / "leaky.yaml"
    mixture.write_text('sources:\n  - {reader: rooms, path: rooms, data_files: ["questions/*.parquet"]}\n')
    arguments = ["data", "check", str(mixture), "--data-root", str(data), "--report", str(tmp_path / "r.json")]
    assert main([*arguments, "--benchmark", str(data / "rooms" / "benchmark")]) == 1
    assert "rows about scenes of the benchmark" in capsys.readouterr().out


def test_precompute_and_the_readmes_example_lead_to_a_training_step(data, tmp_path, capsys, monkeypatch):
    checkpoint, rooms = geode.tiny_checkpoint(), data / "rooms"
    arguments = ["--videos", str(rooms / "rooms"), "--media-root", str(rooms), "--geometry", "geometry/{stem}"]
    assert main(["precompute", "--model", str(checkpoint), *arguments, "--out", str(data / "store")]) == 0
    names = {
        "model": geode.GeodeForConditionalGeneration.from_pretrained(checkpoint),
        "processor": geode.GeodeProcessor.from_pretrained(checkpoint),
    }
    store = FeatureStore(data / "store")
    store.check(names["model"], names["processor"])
    assert sorted(store.paths) == [f"rooms/{path.name}" for path in sorted((rooms / "rooms").iterdir())]
    (example,) = [part for part in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "ScenePacks" in part]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    exec(compile(example.replace('"DATA', f'"{data}'), "README.md", "exec"), names)  # noqa: S102 - our own README
    packs = names["packs"]
    assert all(1 <= len(pack) <= 8 for pack in packs)
    batch = names["collator"]([packs[0], packs[1]])
    loss = names["model"](**batch).loss
    assert torch.isfinite(loss)
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=1, remove_unused_columns=False, use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model=names["model"], args=args, train_dataset=packs, data_collator=names["collator"])
    assert trainer.train().global_step == 1
