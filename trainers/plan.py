# SPDX-License-Identifier: Apache-2.0
"""What the runs of some recipes would cost on some accelerators: `geode plan`. Nothing is measured."""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from trl import get_peft_config

from geode.configuration.configuration_geode import GeodeConfig, VggtConfig
from geode.modeling_geode.vggt_geode import VggtModel
from geode.trainers.costs import (
    STRATEGIES,
    ModelFacts,
    Workload,
    encoder_flops,
    rank_bytes,
    row_tokens,
    sent_bytes,
    stored_scene_bytes,
    training_flops,
)
from geode.trainers.dry_run import DEFAULT_FRAMES, MODEL_CONFIGS, find_config, model_on_meta
from geode.trainers.plan_arguments import Assumptions, Devices, parse_devices
from geode.trainers.training_config import check_count, overridden


STAGES = ("alignment", "stage1", "stage2")
GB = 1e9


class Plan(NamedTuple):
    """
    A recipe, counted.

    Args:
        name (`str`): Stage and file of the recipe.
        facts ([`ModelFacts`]): Of its model, as frozen as the stage freezes it.
        work ([`Workload`]): What it asks for.
        rows (`int`): Packed rows of the run, if all are full.
        tokens (`int`): Tokens of a row.
        training (`float`): Operations of a row without encoders.
        encoders (`float`): Operations of the encoders that run for a row.
    """

    name: str
    facts: ModelFacts
    work: Workload
    rows: int
    tokens: int
    training: float
    encoders: float

    def row_seconds(self, devices: Devices, assumptions: Assumptions) -> float:
        """Seconds of one accelerator for a row."""
        busy = self.training / assumptions.mfu + self.encoders / assumptions.encoder_mfu
        return busy / devices.peak_flops


def run(arguments: argparse.Namespace) -> str:
    """
    Plan as the command line says.

    Args:
        arguments (`argparse.Namespace`): Of `geode plan`, see [`geode.trainers.plan_arguments.add_arguments`].

    Returns:
        `str`: The plan, in Markdown.

    Raises:
        ValueError: If a recipe, a kind of accelerator or an assumption cannot be used.
    """
    names = [entry.name for entry in dataclasses.fields(Assumptions)]
    assumptions = Assumptions(**{name: getattr(arguments, name) for name in names})
    devices = [parse_devices(text) for text in arguments.devices]
    check_count("rows", arguments.rows, is_optional=True)
    plans = [read_plan(Path(recipe), assumptions, rows=arguments.rows) for recipe in arguments.recipes]
    return report(plans, devices, assumptions)


# ---- counting ----


def read_plan(recipe: Path, assumptions: Assumptions, *, rows: int | None = None) -> Plan:
    """
    Count what a recipe asks for. Needs neither weights nor data nor an accelerator.

    Args:
        recipe (`Path`): A YAML file in a folder that is called as its stage.
        assumptions ([`Assumptions`]): Shape of frames.
        rows (`int`, *optional*): Records of one epoch; the default is the recipe's `expected_rows`.

    Returns:
        [`Plan`]: The counts.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the stage is not known, or the number of records is not.
    """
    if not recipe.is_file():
        raise FileNotFoundError(f"`recipe` must be a YAML file, and there is none at {str(recipe)!r}.")
    stage = recipe.resolve().parent.name
    if stage not in STAGES:
        raise ValueError(
            f"`recipe` must lie in a folder that is called as its stage, one of {STAGES}, got {str(recipe)!r}."
        )
    script = import_module(f"geode.trainers.{stage}")
    # Half precision is the accelerator's, and this machine may have none.
    on_cpu = ["--use_cpu", "true", "--bf16", "false", "--fp16", "false", "--dry_run", "true"]
    script_args, args, model_args = script.make_parser().parse_args_and_config(["--config", str(recipe), *on_cpu])
    config = overridden(_config_of(script_args, model_args), args.model_overrides)
    trainer = vars(script)[f"Geode{stage.capitalize()}Trainer"]
    model = trainer.for_dry_run(model_on_meta(config), args, get_peft_config(model_args))
    work = Workload(
        frames=args.num_frames or DEFAULT_FRAMES,
        geometry_frames=args.num_geometry_frames or DEFAULT_FRAMES,
        questions=args.questions_per_pack,
        rows_per_device=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        shows_frames=getattr(args, "keep_visual_tokens", True),
        uses_geometry=args.use_geometry,
        reads_store=args.feature_store is not None,
        has_checkpointing=bool(args.gradient_checkpointing),
        weight_bytes=2 if model_args.dtype in ("bfloat16", "float16") else 4,
    )
    facts = count_model(model, config, work, (assumptions.frame_height, assumptions.frame_width))
    total = _records_of(recipe, args, rows)
    encoders = encoder_flops(facts, work, assumptions)
    return Plan(
        name=f"{stage}/{recipe.stem}",
        facts=facts,
        work=work,
        rows=math.ceil(total / work.questions),
        tokens=row_tokens(facts, work, assumptions.text_tokens),
        training=training_flops(facts, work, assumptions.text_tokens),
        encoders=0.0 if work.reads_store else sum(encoders.values()),
    )


def _config_of(script_args, model_args) -> GeodeConfig:
    """The model's configuration. A folder that is there comes first, and the Hub last: a plan should need no network."""
    name = model_args.model_name_or_path
    if script_args.model_config in MODEL_CONFIGS and not (name is not None and Path(name).is_dir()):
        return MODEL_CONFIGS[script_args.model_config]()
    return find_config(name, script_args.model_config, revision=model_args.model_revision)[0]


def _records_of(recipe: Path, args, rows: int | None) -> float:
    if args.max_steps > 0:
        if rows is not None:
            raise ValueError(f"`--rows` {rows} has no effect: {str(recipe)!r} has `max_steps`. Leave one of them out.")
        batch = (args.dry_run_devices or 1) * args.per_device_train_batch_size * args.gradient_accumulation_steps
        return args.max_steps * batch * args.questions_per_pack
    records = args.expected_rows if rows is None else rows
    if records is None:
        raise ValueError(f"`--rows` must say how many records {str(recipe)!r} trains on; it has no `expected_rows`.")
    return records * args.num_train_epochs


def count_model(model, config: GeodeConfig, work: Workload, frame_size: tuple[int, int]) -> ModelFacts:
    """
    Count a model on the meta device, frozen as its stage freezes it.

    Args:
        model ([`GeodeForConditionalGeneration`] or an adapter on it): The model.
        config ([`GeodeConfig`]): Its configuration.
        work ([`Workload`]): Frames of the reconstructor, and whether it runs.
        frame_size (`tuple[int, int]`): Height and width of its frames, in pixels.

    Returns:
        [`ModelFacts`]: The counts. Operations of the reconstructor are counted by running it on the meta device.
    """
    parts = model.get_base_model() if isinstance(model, PeftModel) else model
    inner = parts.model
    named = {**dict(inner.named_children()), "drh": parts.drh}
    text, drm = config.text_config, config.drm_config
    layers, tower = inner.language_model.layers, inner.vision_tower
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    height, width = config.patch_grid
    points, reconstructor = config.point_config, config.reconstructor_config
    flops = 0
    if reconstructor is not None and work.uses_geometry:
        flops = _reconstructor_flops(json.dumps(reconstructor.to_dict()), work.geometry_frames, frame_size)
    return ModelFacts(
        parameters={name: _count(part) for name, part in named.items()},
        trained={name: _count(part, only_trained=True) for name, part in named.items()},
        layer_parameters=_count(layers),
        layer_trained=_count(layers, only_trained=True),
        layer_last=sum(
            _count([part for part in layer.modules() if isinstance(part, nn.Linear)][-1]) for layer in layers
        ),
        num_layers=text.num_hidden_layers,
        text_width=text.hidden_size,
        attention_width=text.num_attention_heads * head_width,
        vocab_size=text.vocab_size,
        trains_head=_count(parts.get_output_embeddings(), only_trained=True) > 0,
        patches=height * width,
        frame_tokens=config.image_seq_length,
        vision_layer_parameters=_count(tower.encoder),
        vision_layers=config.vision_config.num_hidden_layers,
        vision_width=config.vision_config.hidden_size,
        drm_parameters={name: _count(part) for name, part in inner.drm.named_children()},
        drm_width=drm.hidden_size,
        drm_layers=drm.num_cross_attention_layers,
        drm_context=drm.max_context_tokens + work.geometry_frames + 1,
        pooling=drm.spatial_pooling,
        num_rationale_tokens=drm.num_rationale_tokens,
        point_stages=tuple(
            (_count(stage), depth, channels, window)
            for stage, depth, channels, window in zip(
                inner.point_encoder.stages, points.enc_depths, points.enc_channels, points.enc_patch_size, strict=True
            )
        ),
        reconstructor_flops=flops,
    )


def _count(module, *, only_trained: bool = False) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not only_trained)


@lru_cache
def _reconstructor_flops(config: str, num_frames: int, frame_size: tuple[int, int]) -> int:
    with torch.device("meta"):
        model = VggtModel(VggtConfig.from_dict(json.loads(config))).eval().requires_grad_(False)
        frames = torch.empty(1, num_frames, 3, *frame_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(frames, heads=("camera", "depth"))
    return counter.get_total_flops()


# ---- writing ----


def report(plans: Sequence[Plan], devices: Sequence[Devices], assumptions: Assumptions) -> str:
    """Return tables of work, hours, memory, store and rates, and everything that was assumed, in Markdown."""
    parts = [
        ("Work", work_table(plans)),
        ("Accelerator-hours, and hours of the clock", hours_table(plans, devices, assumptions)),
        ("Memory of one process, GB", memory_table(plans, devices, assumptions)),
        ("Feature store", store_table(plans, assumptions)),
        ("Rates", rate_table(plans, devices, assumptions)),
    ]
    tables = [f"**{title}**\n\n{_table(rows)}" for title, rows in parts]
    lines = [
        f"- `--{entry.name.replace('_', '-')} {_plain(getattr(assumptions, entry.name))}`: {entry.metadata['help']}"
        for entry in dataclasses.fields(assumptions)
    ]
    peaks = ", ".join(f"{kind.label} {kind.peak_flops / 1e12:g}" for kind in devices)
    lines.append(f"- dense bf16 TFLOP/s of one accelerator, by its maker: {peaks}")
    return "\n\n".join(
        ["Computed from recipes and configurations; nothing is measured.", *tables, "**Assumed**", "\n".join(lines)]
    )


def work_table(plans: Sequence[Plan]) -> list[list[str]]:
    """Rows and operations of each recipe."""
    head = [
        "Recipe",
        "Trained parameters",
        "Rows",
        "Questions a row",
        "Tokens a row",
        "Training, TFLOP a row",
        "Encoders, TFLOP a row",
    ]
    return [head] + [
        [
            plan.name,
            f"{sum(plan.facts.trained.values()):,}",
            f"{plan.rows:,}",
            f"{plan.work.questions}",
            f"{plan.tokens:,}",
            f"{plan.training / 1e12:.1f}",
            "from the store" if plan.work.reads_store else f"{plan.encoders / 1e12:.1f}",
        ]
        for plan in plans
    ]


def hours_table(plans: Sequence[Plan], devices: Sequence[Devices], assumptions: Assumptions) -> list[list[str]]:
    """Hours of each recipe, of encoding videos once, and of all of it."""
    seconds = {plan.name: [plan.rows * plan.row_seconds(kind, assumptions) for kind in devices] for plan in plans}
    encoding = max((sum(encoder_flops(plan.facts, plan.work, assumptions).values()) for plan in plans), default=0.0)
    once = f"encoding {assumptions.videos:,} videos"
    totals = [sum(column) for column in zip(*seconds.values(), strict=True)]
    seconds["all recipes"] = totals
    seconds[once] = [assumptions.videos * encoding / (kind.peak_flops * assumptions.encoder_mfu) for kind in devices]
    return [["Recipe", *(kind.label for kind in devices)]] + [
        [
            name,
            *(
                f"{value / 3600:.1f} ({value / 3600 / kind.count:.1f})"
                for value, kind in zip(row, devices, strict=True)
            ),
        ]
        for name, row in seconds.items()
    ]


def memory_table(plans: Sequence[Plan], devices: Sequence[Devices], assumptions: Assumptions) -> list[list[str]]:
    """Memory of one process by strategy; what does not fit is marked."""
    rows = [["Recipe", "Strategy", *(f"{kind.label} ({kind.memory_bytes / GB:g})" for kind in devices)]]
    for plan in plans:
        for strategy in STRATEGIES:
            cells = []
            for kind in devices:
                used = sum(rank_bytes(strategy, plan.facts, plan.work, assumptions, devices=kind.count).values())
                cells.append(f"{used / GB:.1f}" + (" (too much)" if used > kind.memory_bytes else ""))
            rows.append([plan.name, strategy, *cells])
    return rows


def store_table(plans: Sequence[Plan], assumptions: Assumptions) -> list[list[str]]:
    """Bytes of a feature store, by what is in it."""
    plan = max(plans, key=lambda plan: plan.work.geometry_frames * plan.work.uses_geometry)
    sizes = _scene_bytes(plan, assumptions)
    contents = [
        ("points and cameras", sizes["points"]),
        ("the same and the vision tower's features", sizes["points"] + sizes["vision"]),
        ("the same and reconstructed geometry", sum(sizes.values())),
    ]
    return [["Stored", "MB a scene", f"{assumptions.videos:,} videos, TB"]] + [
        [name, f"{size / 1e6:.2f}", f"{size * assumptions.videos / 1e12:.2f}"] for name, size in contents
    ]


def _scene_bytes(plan: Plan, assumptions: Assumptions) -> dict[str, int]:
    facts = plan.facts
    sizes = stored_scene_bytes(
        point_tokens=assumptions.point_tokens,
        point_width=facts.point_stages[-1][2],
        cameras=plan.work.geometry_frames,
        frames=plan.work.frames,
        patches=facts.patches,
        vision_width=facts.vision_width,
        feature_bytes=assumptions.store_bytes,
    )
    return {**sizes, "geometry": 36 * assumptions.points}


def rate_table(plans: Sequence[Plan], devices: Sequence[Devices], assumptions: Assumptions) -> list[list[str]]:
    """What data and network must deliver for the accelerators to be as busy as assumed."""
    rows = [
        [
            "Recipe",
            "Devices",
            "Rows a second",
            "From a store, GB/s",
            "From videos, MB/s",
            "Frames decoded a second",
            "DDP sends, GB a step (GB/s)",
            "FSDP2 sends, GB a step (GB/s)",
        ]
    ]
    for plan in plans:
        sizes = _scene_bytes(plan, assumptions)
        stored = sizes["vision"] + sizes["points"] * plan.work.uses_geometry
        for kind in devices:
            per_device = 1 / plan.row_seconds(kind, assumptions)
            rate = kind.count * per_device
            step = plan.work.rows_per_device * plan.work.accumulation / per_device
            sent = [sent_bytes(name, plan.facts, plan.work, devices=kind.count) / GB for name in ("DDP", "FSDP2")]
            rows.append(
                [
                    plan.name,
                    kind.label,
                    f"{rate:.1f}",
                    f"{rate * stored / GB:.2f}",
                    f"{rate * assumptions.video_mb:.0f}",
                    f"{rate * assumptions.video_seconds * assumptions.video_fps:,.0f}",
                    *(f"{value:.2f} ({value / step:.2f})" for value in sent),
                ]
            )
    return rows


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


__all__ = ["Plan", "count_model", "read_plan", "report", "run"]
