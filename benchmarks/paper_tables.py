# SPDX-License-Identifier: Apache-2.0
"""
Tables 2, 3 and 4 of the paper on the embedded world, two controls that it lacks, and open choices of the method.

    python -m geode.trainers.world --data DATA --out tiny          # once: encoders, features, language model, rationale module
    python -m benchmarks.paper_tables --data DATA --world tiny --out tables --table 4

Each variant starts from the same aligned model and rationale module, and takes the same steps of the same curriculum (`locate`, then
`measure`, with the terms of `world_mentions`, without which distances and directions stay guesses) in each of several seeds. What is
run is kept in a folder of its own, so that an interrupted run goes on, and two tables share the variants that they have in common. At
the end stand a table of means and standard errors over seeds (`table_4.md`), the same as numbers (`.json`) and as a picture (`.png`),
and whether true geometry beats that of another room by more than two standard errors.

| Table | Variants, beside GEODE: 16 rationale tokens and the fused features of the room, 8 geometry frames, values regressed |
| --- | --- |
| `4` | SFT: no geometry, digits. + DRH: no geometry. + DRM: digits. Other geometry: that of another room, in training and after |
| `geometry` | Those of table 4 that regress values, of which a run takes half as long as one with digits |
| `2` | 16 geometry frames |
| `3` | 4 and 8 rationale tokens, in training and after; and without fused features |
| `digits` | + DRM with a loss on number tokens instead of a head |
| `choices` | The state that is regressed, the loss, the codec, and whether values are fed back |
"""

import argparse
import json
import logging
import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import set_seed

from geode.configuration.configuration_geode import GeodeConfig
from geode.data.feature_store import FeatureStore, StoredScene
from geode.evaluation.runner import check_run
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.trainers.collator import GeodeDataCollator
from geode.trainers.training_setup import load_model
from geode.trainers.world import NUM_TEST, STORE, World, curriculum_trainer, find_checkpoint, store_features
from geode.trainers.world_encoders import list_scenes, read_scene_record
from geode.trainers.world_mentions import MentionCollator, MentionTrainer, unique_boxes
from geode.trainers.world_scores import BOX_TASK, answer_records, blind_scores, score_answers


PARTS = ("locate", "measure")
DIRECTIONS = tuple(f"object_rel_direction_{kind}" for kind in ("easy", "medium", "hard"))
TASKS = ("object_abs_distance", "object_size_estimation", *DIRECTIONS, BOX_TASK)
# Digits of a box take some fifty tokens.
MAX_NEW_TOKENS = {True: 4, False: 64}
SOURCE = "alignment"


@dataclass(frozen=True)
class Variant:
    """
    One row of a table.

    Args:
        use_geometry (`bool`): Show `<spatio>` tokens and fused features.
        with_values (`bool`): Regress numbers and boxes rather than write digits.
        is_exchanged (`bool`): Take the geometry of another room.
        num_rationale_tokens (`int`, *optional*): `<spatio>` tokens, if fewer than all.
        num_geometry_frames (`int`, *optional*): Frames of the geometry, if others than the world's.
        has_number_loss (`bool`): Add [`number_token_loss`].
        overrides (`dict`): Changes of the configuration.
    """

    use_geometry: bool = True
    with_values: bool = True
    is_exchanged: bool = False
    num_rationale_tokens: int | None = None
    num_geometry_frames: int | None = None
    has_number_loss: bool = False
    overrides: dict = field(default_factory=dict)


VARIANTS = {
    "SFT": Variant(use_geometry=False, with_values=False),
    "+ DRH": Variant(use_geometry=False),
    "+ DRM": Variant(with_values=False),
    "GEODE": Variant(),
    "GEODE, other geometry": Variant(is_exchanged=True),
    "16 geometry frames": Variant(num_geometry_frames=16),
    "M = 4": Variant(num_rationale_tokens=4),
    "M = 8": Variant(num_rationale_tokens=8),
    "rationale tokens alone": Variant(overrides={"drm_config": {"inject_features": False}}),
    "+ DRM, number loss": Variant(with_values=False, has_number_loss=True),
    "state before the token": Variant(overrides={"drh_config": {"hidden_position": "previous"}}),
    "L1": Variant(overrides={"drh_config": {"loss": "l1"}}),
    "Huber": Variant(overrides={"drh_config": {"loss": "huber"}}),
    "log": Variant(overrides={"control_tokens": "log"}),
    "value feedback": Variant(overrides={"drh_config": {"value_feedback": True}}),
}
TABLES = {
    "4": ("SFT", "+ DRH", "+ DRM", "GEODE", "GEODE, other geometry"),
    "geometry": ("+ DRH", "GEODE", "GEODE, other geometry"),
    "2": ("GEODE", "16 geometry frames"),
    "3": ("M = 4", "M = 8", "GEODE", "rationale tokens alone"),
    "digits": ("+ DRM", "+ DRM, number loss", "GEODE"),
    "choices": ("GEODE", "state before the token", "L1", "Huber", "log", "value feedback"),
}
NUMBER_LOSS_WEIGHT = 0.3


def number_token_loss(logits: torch.Tensor, labels: torch.Tensor, digit_ids: Sequence[int]) -> torch.Tensor:
    """
    Return the squared distance between a digit and the mean of the digits that are predicted in its place.

    Source: Zausinger et al., "Regress, Don't Guess" (arXiv 2411.02083), its form with a squared error.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): Predictions of the next token.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Tokens, -100 where nothing is learned.
        digit_ids (`Sequence[int]`): The tokens of 0 to 9.

    Returns:
        `torch.Tensor` of shape `()`: The mean over the digits that are learned; 0 where there is none.

    Example:
    ```python
    >>> logits = torch.zeros(1, 2, 10)  # all digits alike: 4.5 in the mean
    >>> number_token_loss(logits, torch.tensor([[-100, 4]]), range(10))
    tensor(0.2500)

    ```
    """
    digits = torch.tensor(list(digit_ids), device=labels.device)
    rows = torch.isin(labels[:, 1:], digits)
    shares = logits[:, :-1][rows][:, digits].float().softmax(dim=-1)
    truth = (labels[:, 1:][rows][:, None] == digits).float()
    values = torch.arange(10.0, device=labels.device)
    return ((shares - truth) @ values).square().sum() / rows.sum().clamp(min=1)


class NumberTokenTrainer(MentionTrainer):
    """The curriculum's trainer with [`number_token_loss`] beside the cross-entropy. For one process without accumulated gradients."""

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Compute the loss of a batch."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            digits = self.processing_class.tokenizer.convert_tokens_to_ids(list("0123456789"))
            loss = loss + NUMBER_LOSS_WEIGHT * number_token_loss(outputs.logits, inputs["labels"], digits)
        return (loss, outputs) if return_outputs else loss


class ExchangedGeometry(FeatureStore):
    """A store whose every scene has its own frames and the geometry of another one, the next by its key."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        keys = sorted(self.keys())
        self.shown = dict(zip(keys, [*keys[1:], keys[0]], strict=True))

    def __getitem__(self, key: str) -> StoredScene:
        return _ExchangedScene(self, key)


class _ExchangedScene(StoredScene):
    def tensors(self) -> dict[str, torch.Tensor]:
        own = super().tensors()
        other = StoredScene(self.store, self.store.shown[self.key]).tensors()
        return {name: own[name] if name == "video_features" else tensor for name, tensor in other.items()}


def overrides_of(variant: Variant, world: World, config: GeodeConfig) -> dict:
    """Return a variant's changes of the configuration; a codec takes its statistics from the world's numbers."""
    if variant.overrides.get("control_tokens") != "log":
        return variant.overrides
    logs = torch.tensor([record.value_si for record in world.records if record.value_si is not None]).log()
    codec = {"transform": "log", "mean": [logs.mean().item()], "std": [logs.std().item()]}
    tokens = config.control_tokens
    return {"control_tokens": {**tokens, "<REG>": {**tokens["<REG>"], "codec": codec}}}


def store_of(world: World, variant: Variant) -> Path:
    """Return the features that a variant reads."""
    suffix = f"_{variant.num_geometry_frames}_frames" if variant.num_geometry_frames else ""
    return world.out / f"{STORE}{suffix}"


def run(world: World, out: Path, name: str, seed: int) -> dict:
    """Train and score a variant once; what was finished before is read."""
    variant = VARIANTS[name]
    folder = out / f"{name.replace(' ', '_').replace(',', '')}_{seed}"
    if (folder / "scores.json").is_file():
        return json.loads((folder / "scores.json").read_text("ascii"))
    world = replace(world, seed=seed)
    set_seed(seed)
    source, store = str(world.out / SOURCE), store_of(world, variant)
    overrides = overrides_of(variant, world, GeodeConfig.from_pretrained(source))
    model, processor = load_model(source, overrides=overrides), GeodeProcessor.from_pretrained(source)
    processor.control_tokens = model.config.control_tokens
    if variant.num_geometry_frames:
        processor.num_geometry_frames = variant.num_geometry_frames
    collator = GeodeDataCollator(
        processor=processor,
        media_root=world.rooms,
        feature_store=ExchangedGeometry(store) if variant.is_exchanged else FeatureStore(store),
        use_geometry=variant.use_geometry,
        with_values=variant.with_values,
        num_rationale_tokens=variant.num_rationale_tokens,
    )
    boxes = {name: unique_boxes(read_scene_record(world.rooms, name)) for name in world.train_scenes}
    for part in PARTS:
        trainer = curriculum_trainer(
            world,
            part,
            model,
            processor,
            output_dir=folder / part,
            collator=collator,
            trainer_class=NumberTokenTrainer if variant.has_number_loss else MentionTrainer,
            drm_path=str(world.out / "stage1"),
            feature_store=str(store.resolve()),
            eval_strategy="no",
            save_steps=200,
            disable_tqdm=True,
        )
        trainer.data_collator = MentionCollator(trainer.data_collator, boxes)
        trainer.train(resume_from_checkpoint=find_checkpoint(folder / part))
        model = trainer.geode_model
    asked = set(list_scenes(world.rooms, "test")[:NUM_TEST])
    records = [record for record in world.questions("test") if record.scene in asked and record.question_type in TASKS]
    answers = answer_records(model.eval(), collator, records, max_new_tokens=MAX_NEW_TOKENS[variant.with_values])
    scores = score_answers(records, answers)
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="ascii")
    return scores


def make_store(world: World, variant: Variant) -> None:
    """Store the features of all rooms with another number of geometry frames; what is stored is kept."""
    model, processor = world.load("parts")
    processor.num_geometry_frames = variant.num_geometry_frames
    store_features(world, model, processor, folder=store_of(world, variant))


def _run_alone(world: World, out: Path, name: str, seed: int) -> dict:
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {name}, seed {seed}: %(message)s", force=True)
    torch.set_num_threads(1)
    return run(world, out, name, seed)


def columns(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return what the table shows of a run: percent, and the error of boxes in metres."""
    directions = [scores[task] for task in DIRECTIONS]
    count = sum(entry["n"] for entry in directions)
    return {
        "Abs. Dist.": scores["object_abs_distance"]["score"],
        "Obj. Size": scores["object_size_estimation"]["score"],
        "Rel. Dir.": sum(entry["n"] * entry["score"] for entry in directions) / count,
        "Box centre, m": scores[BOX_TASK]["median_center_error_m"],
        "Box within 1 m": 100.0 * scores[BOX_TASK]["share_within_1m"],
    }


def summarise(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, tuple[float, float]]]:
    """
    Return mean and standard error over seeds.

    Args:
        runs (`dict[str, list[dict[str, float]]]`): For each variant what [`columns`] gave for each seed.

    Returns:
        `dict[str, dict[str, tuple[float, float]]]`: `(mean, standard error)` by variant and column; of one seed the error is nan.

    Example:
    ```python
    >>> summarise({"GEODE": [{"Abs. Dist.": 40.0}, {"Abs. Dist.": 44.0}]})
    {'GEODE': {'Abs. Dist.': (42.0, 2.0)}}

    ```
    """
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, rows in runs.items():
        values = {column: [row[column] for row in rows] for column in rows[0]}
        found[name] = {
            column: (
                statistics.mean(group),
                statistics.stdev(group) / math.sqrt(len(group)) if len(group) > 1 else math.nan,
            )
            for column, group in values.items()
        }
    return found


def blind_columns(blind: dict[str, float]) -> dict[str, float]:
    """Return the best blind scores of the columns that have one, from those of the tasks."""
    return {
        "Abs. Dist.": blind["object_abs_distance"],
        "Obj. Size": blind["object_size_estimation"],
        "Rel. Dir.": statistics.mean(blind[task] for task in DIRECTIONS),
    }


def draw(runs: dict[str, list[dict[str, float]]], blind: dict[str, float], path: Path) -> None:
    """
    Draw every run as a dot, and mean and standard error over seeds as a bar with whiskers.

    Args:
        runs (`dict[str, list[dict[str, float]]]`): For each variant what [`columns`] gave for each seed.
        blind (`dict[str, float]`): Best blind scores of the tasks: dashed lines.
        path (`Path`): The picture.
    """
    from matplotlib.figure import Figure

    summary, lines = summarise(runs), blind_columns(blind)
    names = list(next(iter(summary.values())))
    figure = Figure(figsize=(2.6 * len(names), 0.5 * len(runs) + 1.2), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        means, errors = zip(*(summary[variant][column] for variant in runs), strict=True)
        axes.barh(list(runs), means, xerr=None if math.isnan(errors[0]) else errors, color="#9db8d2", capsize=3)
        for variant, rows in runs.items():
            axes.plot([row[column] for row in rows], [variant] * len(rows), ".", color="#20364b")
        if column in lines:
            axes.axvline(lines[column], color="#b03a2e", linestyle="--", label="best blind")
        axes.set_title(column)
    axes.invert_yaxis()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower right")
    figure.savefig(path, dpi=110)


def write_table(summary: dict[str, dict[str, tuple[float, float]]], blind: dict[str, float], *, num_seeds: int) -> str:
    """Write the table, with the best blind scores and what the control says."""
    names = list(next(iter(summary.values())))
    lines = [f"| Variant, {num_seeds} seeds | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    known = blind_columns(blind)
    lines.append(f"| Best blind | {' | '.join(f'{known[name]:.1f}' if name in known else '' for name in names)} |")
    for name, row in summary.items():
        cells = [f"{mean:.2f} +- {error:.2f}" for mean, error in row.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    own, other = summary.get("GEODE"), summary.get("GEODE, other geometry")
    if own and other:
        lines.append("")
        for column in ("Abs. Dist.", "Rel. Dir."):
            margin = own[column][0] - other[column][0]
            error = math.hypot(own[column][1], other[column][1])
            verdict = f"{'more' if margin > 2 * error else 'not more'} than 2 x {error:.2f}"
            if math.isnan(error):
                verdict = "of one seed, without a standard error"
            lines.append(f"{column}: true geometry is {margin:+.2f} from another room's, {verdict}.\n")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with `rooms` in it")
    parser.add_argument(
        "--world", type=Path, required=True, help="results of `geode.trainers.world`, at least up to `stage1`"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and tables")
    parser.add_argument("--table", choices=list(TABLES), default="4", help="which table (default: 4)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the curriculum's steps")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    args = parser.parse_args(arguments)
    world = World(data=args.data, out=args.world, scale=args.scale)
    args.out.mkdir(parents=True, exist_ok=True)
    check_run(args.out, {"world": str(args.world), "steps": {part: world.steps(part) for part in PARTS}})
    names = TABLES[args.table]
    for variant in (VARIANTS[name] for name in names):
        if variant.num_geometry_frames:
            make_store(world, variant)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        # Seed by seed, so that an unfinished table compares all variants.
        futures = {
            (name, seed): pool.submit(_run_alone, world, args.out, name, seed)
            for seed in range(args.seeds)
            for name in names
        }
        found = {key: columns(future.result()) for key, future in futures.items()}
    runs = {name: [found[name, seed] for seed in range(args.seeds)] for name in names}
    summary = summarise(runs)
    blind = blind_scores(world.rooms)
    table = write_table(summary, blind, num_seeds=args.seeds)
    draw(runs, blind, args.out / f"table_{args.table}.png")
    (args.out / f"table_{args.table}.md").write_text(table + "\n", encoding="ascii")
    (args.out / f"table_{args.table}.json").write_text(
        json.dumps({"runs": runs, "summary": summary}, indent=1) + "\n", encoding="ascii"
    )
    print(table)  # noqa: T201


if __name__ == "__main__":
    main()
