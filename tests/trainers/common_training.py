# SPDX-License-Identifier: Apache-2.0
"""A small run of a stage, and what it changed."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.trainers.common_collator import GEOMETRY, make_media, make_model, make_processor


NUM_STEPS = 8
# How fast a run was says nothing about what it learned.
SPEEDS = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def make_world(folder: Path) -> Path:
    """
    A folder with a model that has dropout, and with a recipe of stage 2.

    Its epochs have three steps, the last one shorter, of packs of two rooms that are dealt anew each time.
    """
    (folder / "media").mkdir(parents=True)
    make_media(folder / "media")
    processor = make_processor()
    model = make_model(processor)
    model.config.text_config.attention_dropout = 0.2
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = []
    for number in range(18):
        medium = ("rooms/one.mp4", "rooms/two")[number % 2]
        row = {"media": medium, "media_type": "video", "prompt": f"How long is object {number}?"}
        rows.append(row | ({"answer": "It is not here."} if number % 3 == 2 else {"answer": number + 1, "unit": "m"}))
    (folder / "rows").mkdir()
    (folder / "rows" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    mixture = "sources:\n  - {reader: jsonl, path: rows, media_root: media}\n"
    (folder / "rows.yaml").write_text(mixture, encoding="utf-8")
    recipe = {
        "model_name_or_path": str(folder / "model"),
        "mixture": str(folder / "rows.yaml"),
        "data_root": str(folder),
        "cache_dir": str(folder / "cache"),
        "geometry": "geometry/{stem}",
        "questions_per_pack": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": NUM_STEPS,
        "warmup_steps": 2,
        "learning_rate": 1.0e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "disable_tqdm": True,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return folder


def arguments_of(world: Path, out: Path, *options: str) -> list[str]:
    """The command line that trains in a world."""
    return ["train", "stage2", "--config", str(world / "recipe.yaml"), "--output_dir", str(out), *options]


def history_of(out: Path) -> list[dict]:
    """What each step logged: losses, gradient norm, learning rate and metrics."""
    history = json.loads((out / "trainer_state.json").read_text("utf-8"))["log_history"]
    assert [entry["step"] for entry in history[:NUM_STEPS]] == list(range(1, NUM_STEPS + 1))
    return [{name: value for name, value in entry.items() if name not in SPEEDS} for entry in history[:NUM_STEPS]]


def assert_same_run(out: Path, whole: Path) -> None:
    """To the last bit."""
    assert history_of(out) == history_of(whole)
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, out))
    assert expected.keys() == found.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


def settings(folder, root, **changes) -> dict:
    """Options of a run on one core that says what each step did."""
    return {
        "output_dir": str(folder),
        "media_root": str(root),
        "geometry": GEOMETRY,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 1,
        "save_strategy": "no",
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "questions_per_pack": 2,
        "num_eval_examples": 0,
        "shuffled_scene_gate": False,
        "seed": 0,
        **changes,
    }


def snapshot(model) -> dict[str, torch.Tensor]:
    """Every parameter by name, as it is now."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before: dict[str, torch.Tensor], model) -> set[str]:
    """Names of the parameters that differ from a snapshot."""
    return {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}


def steps(trainer) -> list[dict]:
    """The log of each training step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]
