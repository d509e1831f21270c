# SPDX-License-Identifier: Apache-2.0
"""
Table 4 of the paper on the embedded world, with a control that the paper lacks: geometry of another room.

    python -m geode.trainers.world --data DATA --out tiny          # once: encoders, features, language model, rationale module
    python -m benchmarks.paper_tables --data DATA --world tiny --out tables

Each variant starts from the same aligned model and rationale module, and takes the same steps of the same curriculum (`locate`,
then `measure`) in each of several seeds. What is run is kept in a folder of its own, so that an interrupted run goes on. At the end
stand a table of means and standard errors over seeds (`tables.md`), the same as numbers (`tables.json`) and as a picture
(`tables.png`, which needs matplotlib), and whether true geometry beats that of another room by more than two standard errors.

| Variant | `<spatio>` tokens and fused features | Numbers and boxes |
| --- | --- | --- |
| SFT | none | digits |
| + DRH | none | regressed |
| + DRM | of the room | digits |
| GEODE | of the room | regressed |
| GEODE, other geometry | of another room, in training and after; the frames are the room's | regressed |
"""

import argparse
import json
import logging
import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import set_seed

from geode.data.feature_store import FeatureStore, StoredScene
from geode.trainers.collator import GeodeDataCollator
from geode.trainers.world import NUM_TEST, STORE, World, check_run, curriculum_trainer, find_checkpoint
from geode.trainers.world_encoders import list_scenes
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
    One row of the table.

    Args:
        use_geometry (`bool`): Show `<spatio>` tokens and fused features.
        with_values (`bool`): Regress numbers and boxes rather than write digits.
        is_exchanged (`bool`): Take the geometry of another room.
    """

    use_geometry: bool = True
    with_values: bool = True
    is_exchanged: bool = False


VARIANTS = {
    "SFT": Variant(use_geometry=False, with_values=False),
    "+ DRH": Variant(use_geometry=False),
    "+ DRM": Variant(with_values=False),
    "GEODE": Variant(),
    "GEODE, other geometry": Variant(is_exchanged=True),
}


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


def run(world: World, out: Path, name: str, seed: int) -> dict:
    """Train and score a variant once; what was finished before is read."""
    variant = VARIANTS[name]
    folder = out / f"{name.replace(' ', '_').replace(',', '')}_{seed}"
    if (folder / "scores.json").is_file():
        return json.loads((folder / "scores.json").read_text("ascii"))
    world = replace(world, seed=seed)
    set_seed(seed)
    model, processor = world.load(SOURCE)
    store = world.out / STORE
    collator = GeodeDataCollator(
        processor=processor,
        media_root=world.rooms,
        feature_store=ExchangedGeometry(store) if variant.is_exchanged else FeatureStore(store),
        use_geometry=variant.use_geometry,
        with_values=variant.with_values,
    )
    for part in PARTS:
        trainer = curriculum_trainer(
            world,
            part,
            model,
            processor,
            output_dir=folder / part,
            collator=collator,
            drm_path=str(world.out / "stage1"),
            eval_strategy="no",
            save_steps=200,
            disable_tqdm=True,
        )
        trainer.train(resume_from_checkpoint=find_checkpoint(folder / part))
        model = trainer.geode_model
    asked = set(list_scenes(world.rooms, "test")[:NUM_TEST])
    records = [record for record in world.questions("test") if record.scene in asked and record.question_type in TASKS]
    answers = answer_records(model.eval(), collator, records, max_new_tokens=MAX_NEW_TOKENS[variant.with_values])
    scores = score_answers(records, answers)
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="ascii")
    return scores


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
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the curriculum's steps")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    args = parser.parse_args(arguments)
    world = World(data=args.data, out=args.world, scale=args.scale)
    args.out.mkdir(parents=True, exist_ok=True)
    check_run(args.out, {"world": str(args.world), "steps": {part: world.steps(part) for part in PARTS}})
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        # Seed by seed, so that an unfinished table compares all variants.
        futures = {
            (name, seed): pool.submit(_run_alone, world, args.out, name, seed)
            for seed in range(args.seeds)
            for name in args.variants
        }
        found = {key: columns(future.result()) for key, future in futures.items()}
    runs = {name: [found[name, seed] for seed in range(args.seeds)] for name in args.variants}
    summary = summarise(runs)
    blind = blind_scores(world.rooms)
    table = write_table(summary, blind, num_seeds=args.seeds)
    draw(runs, blind, args.out / "tables.png")
    (args.out / "tables.md").write_text(table + "\n", encoding="ascii")
    (args.out / "tables.json").write_text(
        json.dumps({"runs": runs, "summary": summary}, indent=1) + "\n", encoding="ascii"
    )
    print(table)  # noqa: T201


if __name__ == "__main__":
    main()
