# SPDX-License-Identifier: Apache-2.0
"""A small run of a stage, and what it changed."""

import torch

from tests.trainers.common_collator import GEOMETRY


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
