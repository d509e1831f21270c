# SPDX-License-Identifier: Apache-2.0
"""What a run would train, from its options alone: neither weights nor data are needed."""

import math
from pathlib import Path

import torch
from transformers import set_seed

from geode.configuration.configuration_geode import GeodeConfig
from geode.data.mixtures import Mixture
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.trainers.costs import activation_bytes, state_bytes
from geode.trainers.plan_arguments import Assumptions
from geode.trainers.training_config import GeodeTrainingConfig, overridden


MODEL_CONFIGS = {"geode-1.5b": GeodeConfig}
GIB = 2**30
DEFAULT_FRAMES = 16


def model_on_meta(config: GeodeConfig) -> GeodeForConditionalGeneration:
    """Build a model that has shapes and no memory."""
    set_seed(0)
    with torch.device("meta"):
        return GeodeForConditionalGeneration(config)


def find_config(name_or_path: str | None, model_config: str | None, revision: str = "main") -> tuple[GeodeConfig, str]:
    """
    Find the configuration of a model that may not be there.

    Args:
        name_or_path (`str`, *optional*): Folder or Hub id.
        model_config (`str`, *optional*): Name of a configuration that stands in for it.
        revision (`str`, defaults to `"main"`): On the Hub.

    Returns:
        The configuration, and a line that says where it is from.

    Raises:
        OSError: If the model cannot be found and nothing stands in for it.
        ValueError: If neither is given, or `model_config` is no name.
    """
    if model_config is not None and model_config not in MODEL_CONFIGS:
        raise ValueError(f"`model_config` must be one of {sorted(MODEL_CONFIGS)}, got {model_config!r}.")
    if name_or_path is None and model_config is None:
        raise ValueError("A model is needed: give `model_name_or_path`, or for a dry run `model_config`.")
    if name_or_path is not None:
        try:
            return GeodeConfig.from_pretrained(name_or_path, revision=revision), name_or_path
        except OSError:
            if model_config is None:
                raise
    assert model_config is not None
    absent = "" if name_or_path is None else f" ({name_or_path} is not here)"
    return MODEL_CONFIGS[model_config](), f"{model_config}, by its configuration{absent}"


def dry_run(
    trainer_class,
    args: GeodeTrainingConfig,
    *,
    config: GeodeConfig,
    source: str,
    dtype: str | None = None,
    peft_config=None,
) -> str:
    """
    Describe a run.

    Args:
        trainer_class (`type`): The stage's trainer.
        args ([`GeodeTrainingConfig`]): Its options.
        config ([`GeodeConfig`]): The model's, before `args.model_overrides`.
        source (`str`): Where the model is from.
        dtype (`str`, *optional*): Of the weights; the default is float32.
        peft_config (*optional*): The adapter.

    Returns:
        `str`: Trained parameters by part, data, effective batch, steps and estimated memory.
    """
    config = overridden(config, args.model_overrides)
    model = trainer_class.for_dry_run(model_on_meta(config), args, peft_config)
    return "\n".join(
        [
            f"dry run of {trainer_class._name.lower()}, nothing is trained",
            f"model: {source}",
            *_parameter_lines(model),
            *_data_lines(args),
            *_memory_lines(model, config, args, dtype),
        ]
    )


def _parameter_lines(model) -> list[str]:
    parts: dict[str, list[int]] = {}
    seen = set()
    for name, parameter in model.named_parameters():
        if parameter in seen:
            continue
        seen.add(parameter)
        names = [piece for piece in name.split(".") if piece not in ("base_model", "model")]
        part = parts.setdefault(names[0], [0, 0])
        part[0] += parameter.numel() * parameter.requires_grad
        part[1] += parameter.numel()
    lines = [f"  {name:<24}{trained:>16,} of {total:>16,}" for name, (trained, total) in parts.items()]
    trained, total = (sum(part[column] for part in parts.values()) for column in (0, 1))
    return ["trainable parameters:", *lines, f"  {'all':<24}{trained:>16,} of {total:>16,}"]


def _data_lines(args: GeodeTrainingConfig) -> list[str]:
    devices = args.dry_run_devices or args.world_size
    rows = devices * args.per_device_train_batch_size * args.gradient_accumulation_steps
    packed = f" of up to {args.questions_per_pack} questions, {rows * args.questions_per_pack} in all"
    batch = (
        f"effective batch: {rows} rows{packed if args.questions_per_pack > 1 else ''} "
        f"({devices} devices x {args.per_device_train_batch_size} x {args.gradient_accumulation_steps})"
    )
    lines, num_records = _look_for_data(args)
    if args.max_steps > 0:
        steps = f"steps: {args.max_steps:,}"
    elif num_records is None:
        steps = "steps: not known before the data are read; `expected_rows` would tell"
    else:
        least = math.ceil(num_records / args.questions_per_pack / rows)
        total = math.ceil(args.num_train_epochs * least)
        steps = f"steps: {'at least ' * (args.questions_per_pack > 1)}{total:,}, in {args.num_train_epochs:g} epochs"
    return [*lines, batch, steps]


def _look_for_data(args: GeodeTrainingConfig) -> tuple[list[str], int | None]:
    if args.mixture is None:
        return ["data: no mixture is named"], args.expected_rows
    found: list[str] = []
    absent: list[str] = []
    for source in Mixture.from_yaml(args.mixture).sources:
        folder = Path(args.data_root) / source.path
        is_there = any(path.is_file() for pattern in source.patterns for path in folder.glob(pattern))
        (found if is_there else absent).append(str(folder))
    lines = [f"data: found at {', '.join(found)}"] if found else []
    if absent:
        rows = "" if args.expected_rows is None else f", {args.expected_rows:,} rows expected"
        lines.append(f"data: not found at {', '.join(absent)}{rows}")
    return lines, args.expected_rows


def _memory_lines(model, config: GeodeConfig, args: GeodeTrainingConfig, dtype: str | None) -> list[str]:
    assumptions = Assumptions()
    parameters = list(model.parameters())
    weights, states = state_bytes(
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        weight_bytes=2 if dtype in ("bfloat16", "float16") else 4,
        optimizer_states=assumptions.optimizer_states,
    )
    text = config.text_config
    frames = args.num_frames or DEFAULT_FRAMES
    shows_frames = getattr(args, "keep_visual_tokens", True)
    length = (
        frames * config.image_seq_length * shows_frames + config.drm_config.num_rationale_tokens * args.use_geometry
    )
    length += assumptions.text_tokens * args.questions_per_pack
    tokens = length * args.per_device_train_batch_size
    layers, logits = activation_bytes(
        tokens,
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        vocab_size=text.vocab_size,
        has_checkpointing=bool(args.gradient_checkpointing),
        assumptions=assumptions,
    )
    total = weights + states + layers + logits
    return [
        "memory of one device, an estimate, not measured, before any sharding:",
        f"  weights {weights / GIB:.1f} GiB, gradients and optimiser {states / GIB:.1f} GiB",
        f"  activations of the language model {layers / GIB:.1f} GiB, logits {logits / GIB:.1f} GiB, for {tokens:,} tokens",
        f"  all {total / GIB:.1f} GiB, encoders' activations not counted",
    ]


__all__ = ["MODEL_CONFIGS", "dry_run", "find_config", "model_on_meta"]
