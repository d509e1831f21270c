# SPDX-License-Identifier: Apache-2.0
"""
Train the tiny model on the embedded world, from nothing to the checkpoint: `python -m geode.trainers.world --data DATA --out DIR`.

`DATA/rooms` is what `geode data rooms` makes. The stages, of which each leaves a folder or a file below `DIR` and is skipped if it
is there:

| Stage | What trains | On what |
| --- | --- | --- |
| `parts` | vision tower, point encoder | labels of patches and points; frozen after |
| | language model | questions, rationales and answers, as text alone |
| `features` | | what both encoders make of every scene, in a feature store |
| `lookup` | rationale module | what is where, through a head that is thrown away |
| `alignment` | projector | questions; the recipe of the paper's first stage |
| `stage1` | rationale module | rationales, with the language model frozen |
| `locate` | what stage 2 trains | "Locate the ..." alone |
| `measure` | what stage 2 trains | boxes, distances, sizes, counts, directions |
| `stage2` | projector, language model, regression head | all questions |
| `calibration` | the width of intervals | answers about the validation split |
| `scores` | | every task on held-out rooms, also with another room shown |
| `checkpoint` | | the folder to ship, with its card |

Localisation comes first, or nothing else is learned; in the curriculum the language model also learns the boxes of whatever a question
names (`world_mentions`). Every stage that shows scenes logs the shuffled-scene gate: how much the loss
rises when each question is shown another room.
"""

import argparse
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module, resources
from multiprocessing import get_context
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin, set_seed
from transformers.trainer_utils import get_last_checkpoint

from geode.data.feature_store import FeatureStore
from geode.data.mixtures import Mixture
from geode.data.readers import read_records
from geode.data.schemas import Record
from geode.data.synthetic_rooms.dataset import SPLITS
from geode.evaluation.benchmark import Question
from geode.evaluation.calibration import interval_report, measure_scales
from geode.evaluation.runner import check_run, prediction_line
from geode.modeling_geode.answers_geode import Answer
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.trainers.collator import GeodeDataCollator, exchanged_scenes
from geode.trainers.precompute import VideoItem, precompute
from geode.trainers.stage2_config import GeodeStage2Config
from geode.trainers.stage2_trainer import GeodeStage2Trainer
from geode.trainers.world_card import build_world_card
from geode.trainers.world_encoders import (
    list_classes,
    list_scenes,
    load_labelled_scene,
    point_accuracy,
    pretrain_point_encoder,
    pretrain_vision_tower,
    read_scene_record,
    vision_accuracy,
)
from geode.trainers.world_language import language_gate, pretrain_language_model
from geode.trainers.world_lookup import load_lookup_scene, lookup_accuracy, pretrain_rationale_module
from geode.trainers.world_mentions import MentionCollator, MentionTrainer, unique_boxes
from geode.trainers.world_model import make_config, make_processor
from geode.trainers.world_scores import answer_records, blind_scores, score_answers


logger = logging.getLogger(__name__)

STAGES = (
    "parts",
    "features",
    "lookup",
    "alignment",
    "stage1",
    "locate",
    "measure",
    "stage2",
    "calibration",
    "scores",
    "checkpoint",
)
DATASET, STORE = "rooms", "store"
NUM_HELD_OUT = 40  # scenes of the validation split that parts and stages are measured on
NUM_TEST = 200  # scenes of the test split that are asked about in the end
# Steps of the parts that stand for public checkpoints, of the curriculum, and of the paper's stages.
STEPS = {
    "vision_tower": 4000,
    "point_encoder": 1600,
    "language_model": 600,
    "lookup": 3000,
    "alignment": 100,
    "stage1": 100,
    "locate": 1500,
    "measure": 1500,
    "stage2": 300,
}
# How often each type of question is asked in an epoch. A room has some twenty distances and few counts and sizes.
CURRICULUM = {
    "locate": {"object_localization": 1},
    "measure": {
        "object_localization": 2,
        "object_abs_distance": 1,
        "object_size_estimation": 3,
        "room_size_estimation": 3,
        "object_counting": 10,
        "object_rel_direction_easy": 1,
        "object_rel_direction_medium": 1,
        "object_rel_direction_hard": 1,
    },
}
QUESTIONS_PER_PACK, PACKS_PER_STEP = 16, 8
LEARNING_RATE = 2e-3


@dataclass
class World:
    """
    A run: where its data and its results are.

    Args:
        data (`Path`): Folder of the datasets; `rooms` in it is the world.
        out (`Path`): Folder of the results.
        scale (`float`, defaults to 1): Factor of all numbers of steps, for a trial.
        seed (`int`, defaults to 0): Decides everything.
    """

    data: Path
    out: Path
    scale: float = 1.0
    seed: int = 0

    @property
    def rooms(self) -> Path:
        """Folder of the world."""
        return self.data / DATASET

    @cached_property
    def train_scenes(self) -> list[str]:
        """Scenes of the training split."""
        return list_scenes(self.rooms, "train")

    @cached_property
    def held_out_scenes(self) -> list[str]:
        """Some scenes of the validation split."""
        return list_scenes(self.rooms, "validation")[:NUM_HELD_OUT]

    @cached_property
    def classes(self) -> list[str]:
        """The room and the categories."""
        return list_classes(self.rooms, self.train_scenes)

    @cached_property
    def records(self) -> list[Record]:
        """Questions of the training split, as the trainers read them."""
        rows = Mixture.from_yaml(DATASET).load(self.data, cache_dir=self.out / "cache")
        return [Record.from_dict(row) for row in rows]

    def held_out_mixture(self) -> Path:
        """Write a mixture of some questions of the validation split, for the recipes' evaluations and their gate."""
        source = {"reader": DATASET, "path": DATASET, "data_files": ["questions/validation.parquet"]}
        source["fraction"] = min(1.0, NUM_HELD_OUT / len(list_scenes(self.rooms, "validation")))
        path = self.out / "held_out.yaml"
        path.write_text(yaml.safe_dump({"seed": self.seed, "sources": [source]}), encoding="ascii")
        return path

    def questions(self, split: str) -> list[Record]:
        """Questions of a split that is not trained on."""
        rows = read_records(DATASET, self.rooms, data_files=[f"questions/{split}.parquet"])
        return [Record.from_dict(row) for row in rows]

    def steps(self, name: str) -> int:
        """Steps of a part."""
        return max(2, round(self.scale * STEPS[name]))

    def load(self, stage: str) -> tuple[GeodeForConditionalGeneration, GeodeProcessor]:
        """Load what a stage left."""
        folder = self.out / stage
        return GeodeForConditionalGeneration.from_pretrained(folder), GeodeProcessor.from_pretrained(folder)

    def save(self, stage: str, model: GeodeForConditionalGeneration, processor: GeodeProcessor) -> None:
        """Save what a stage made."""
        model.save_pretrained(self.out / stage)
        processor.save_pretrained(self.out / stage)


# ---- the parts that stand for public checkpoints ----


def train_parts(world: World) -> dict:
    """Make the model, and train vision tower, point encoder and language model, each in a process of its own."""
    set_seed(world.seed)
    processor = make_processor(world.records, world.classes[1:])
    model = GeodeForConditionalGeneration(make_config(processor))
    # At zero the gate keeps a trained model as it was. Here is none, and from zero Adam takes hundreds of steps to open it.
    torch.nn.init.ones_(model.model.feature_injection.gate)
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=64
    )
    world.save("untrained", model, processor)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        runs = {name: pool.submit(_train_part, replace(world), name) for name in PARTS}
        facts = {name: run.result() for name, run in runs.items()}
    for name in PARTS:
        getattr(model.model, name).load_state_dict(load_file(world.out / "untrained" / f"{name}.safetensors"))
    world.save("parts", model, processor)
    return facts


def _train_part(world: World, name: str) -> dict:
    """Train one part of the untrained model, and leave its weights beside it; those of an earlier run are kept."""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {name}: %(message)s", force=True)
    torch.set_num_threads(1)
    weights, done = (world.out / "untrained" / f"{name}.{suffix}" for suffix in ("safetensors", "json"))
    if done.is_file():
        return json.loads(done.read_text("ascii"))
    model, processor = world.load("untrained")
    facts = PARTS[name](world, model, processor)
    save_file(getattr(model.model, name).state_dict(), weights)
    done.write_text(json.dumps(facts) + "\n", encoding="ascii")
    return facts


def _labelled_scenes(world: World, model, processor) -> tuple[list, list]:
    options = {"processor": processor, "classes": world.classes, "grid": model.config.patch_grid}
    return tuple(
        [load_labelled_scene(world.rooms, name, **options) for name in names]
        for names in (world.train_scenes, world.held_out_scenes)
    )


def _train_vision_tower(world: World, model, processor) -> dict:
    seen, held_out = _labelled_scenes(world, model, processor)
    head = pretrain_vision_tower(model, seen, num_steps=world.steps("vision_tower"), seed=world.seed)
    return vision_accuracy(model, head, held_out)


def _train_point_encoder(world: World, model, processor) -> dict:
    seen, held_out = _labelled_scenes(world, model, processor)
    head = pretrain_point_encoder(model, seen, num_steps=world.steps("point_encoder"), seed=world.seed)
    return point_accuracy(model, head, held_out)


def _train_language_model(world: World, model, processor) -> dict:
    scenes = {name: read_scene_record(world.rooms, name) for name in world.train_scenes}
    steps = world.steps("language_model")
    loss = pretrain_language_model(
        model, processor.tokenizer, world.records, scenes=scenes, num_steps=steps, seed=world.seed
    )
    held_out = {name: read_scene_record(world.rooms, name) for name in world.held_out_scenes}
    asked = [record for record in world.questions("validation") if record.scene in held_out]
    gate = language_gate(model.eval(), processor.tokenizer, asked, scenes=held_out, seed=world.seed)
    return {"loss": loss, **gate}


# The longest first.
PARTS = {
    "vision_tower": _train_vision_tower,
    "point_encoder": _train_point_encoder,
    "language_model": _train_language_model,
}


def store_features(world: World, model=None, processor=None, *, folder: Path | None = None) -> dict:
    """
    Store what the frozen encoders make of the scenes of every split.

    Args:
        world ([`World`]): The run.
        model ([`GeodeForConditionalGeneration`], *optional*): The default is that of the stage before.
        processor ([`GeodeProcessor`], *optional*): Likewise.
        folder (`Path`, *optional*): The store; by default that of the run.

    Returns:
        `dict`: Number of scenes.

    Raises:
        ValueError: If a scene cannot be encoded.
    """
    if model is None:
        model, processor = world.load("parts")
    names = sorted(name for split in SPLITS for name in list_scenes(world.rooms, split))
    items = [VideoItem(f"rooms/{name}.mp4", f"geometry/{name}") for name in names]
    options = {"media_root": world.rooms, "store_vision_features": True, "shard_size": 64}
    report = precompute(model, processor, items, folder or world.out / STORE, **options)
    if report.failures:
        raise ValueError(
            f"All scenes must be stored, and {len(report.failures)} failed: {report.lines()[1]}. Make the world anew, or run "
            "`geode data rooms` again, which makes what is missing."
        )
    return {"scenes": report.num_scenes}


def train_lookup(world: World) -> dict:
    """Train the rationale module to say what is where."""
    set_seed(world.seed)
    model, processor = world.load("parts")
    store = FeatureStore(world.out / STORE)
    entry = model.config.control_tokens["<3DBBOX>"]
    side = model.config.drm_config.spatial_pooling
    grid = (model.config.patch_grid[0] // side, model.config.patch_grid[1] // side)

    def load(names: Sequence[str]) -> list:
        options = {"store": store, "classes": world.classes, "entry": entry, "grid": grid}
        return [load_lookup_scene(world.rooms, name, **options) for name in names]

    head = pretrain_rationale_module(model, load(world.train_scenes), num_steps=world.steps("lookup"), seed=world.seed)
    facts = lookup_accuracy(model, head, load(world.held_out_scenes), std_m=entry["codec"]["std"])
    world.save("lookup", model, processor)
    return facts


# ---- the stages of the paper, and the curriculum between them ----


def recipe_of(stage: str) -> str:
    """Return the path of a stage's recipe."""
    return str(resources.files("geode.configuration") / "recipes" / stage / "tiny_rooms_cpu.yaml")


def run_recipe(world: World, stage: str, *, source: str, **overrides: object) -> dict:
    """
    Run a stage of the paper by its recipe, as `geode train` does.

    Args:
        world ([`World`]): The run.
        stage (`str`): `"alignment"`, `"stage1"` or `"stage2"`.
        source (`str`): The stage whose model is trained.
        **overrides: Options that replace those of the recipe.

    Returns:
        `dict`: The last evaluation's metrics.
    """
    options = {
        "model_name_or_path": world.out / source,
        "data_root": world.data,
        "feature_store": (world.out / STORE).resolve(),
        "cache_dir": world.out / "cache",
        "output_dir": world.out / stage,
        "eval_mixture": world.held_out_mixture(),
        "eval_strategy": "steps",
        "eval_steps": world.steps(stage),  # at the end
        "max_steps": world.steps(stage),
        "seed": world.seed,
        **overrides,
    }
    checkpoint = find_checkpoint(world.out / stage)
    if checkpoint is not None:
        options["resume_from_checkpoint"] = checkpoint
    arguments = [
        "--config",
        recipe_of(stage),
        *(text for name, value in options.items() for text in (f"--{name}", str(value))),
    ]
    import_module(f"geode.trainers.{stage}").run_from_arguments(arguments)
    return _last_metrics(world.out / stage)


def find_checkpoint(folder: Path) -> str | None:
    """Return the last checkpoint of an interrupted run, if there is one."""
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def _last_metrics(folder: Path) -> dict:
    history = json.loads((folder / "trainer_state.json").read_text("utf-8"))["log_history"]
    found: dict = {}
    for entry in history:
        found |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    return found


def train_curriculum(world: World, stage: str, *, source: str, **options: object) -> dict:
    """Train what stage 2 trains on some types of question: the curriculum, each part of which goes on from the one before."""
    set_seed(world.seed)
    model, processor = world.load(source)
    options = {"output_dir": world.out / stage, "trainer_class": MentionTrainer, **options}
    trainer = curriculum_trainer(world, stage, model, processor, **options)
    boxes = {name: unique_boxes(read_scene_record(world.rooms, name)) for name in world.train_scenes}
    trainer.data_collator = MentionCollator(trainer.data_collator, boxes)
    trainer.train(resume_from_checkpoint=find_checkpoint(world.out / stage))
    metrics = trainer.evaluate()
    world.save(stage, trainer.geode_model, processor)
    trainer.end()
    return metrics


def curriculum_trainer(
    world: World,
    stage: str,
    model: GeodeForConditionalGeneration,
    processor: GeodeProcessor,
    *,
    output_dir: Path,
    collator: GeodeDataCollator | None = None,
    trainer_class: type[GeodeStage2Trainer] = GeodeStage2Trainer,
    **options: object,
) -> GeodeStage2Trainer:
    """
    Make the trainer of a part of the curriculum.

    Args:
        world ([`World`]): The run.
        stage (`str`): A key of `CURRICULUM`.
        model ([`GeodeForConditionalGeneration`]): The model.
        processor ([`GeodeProcessor`]): Its processor.
        output_dir (`Path`): Folder of its checkpoints.
        collator ([`GeodeDataCollator`], *optional*): In the place of the trainer's own.
        trainer_class (`type`, defaults to [`GeodeStage2Trainer`]): It, or a class of it.
        **options: Options of [`GeodeStage2Config`] that replace those of the curriculum.

    Returns:
        [`GeodeStage2Trainer`]: The trainer.
    """
    times, num_steps = CURRICULUM[stage], world.steps(stage)
    defaults = {
        "data_root": str(world.data),
        "media_root": str(world.rooms),
        "feature_store": str((world.out / STORE).resolve()),
        "questions_per_pack": QUESTIONS_PER_PACK,
        "per_device_train_batch_size": PACKS_PER_STEP,
        "max_steps": num_steps,
        "learning_rate": LEARNING_RATE,
        "drh_learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.3,
        "adam_beta2": 0.98,
        "bf16": False,
        "use_cpu": True,
        "dataloader_num_workers": 1,  # beside the process that trains
        "dataloader_persistent_workers": True,
        "logging_steps": 50,
        "save_steps": max(2, num_steps // 3),
        "save_total_limit": 1,
        "num_eval_examples": 2,
        "max_new_tokens": 8,
        "activation_checkpointing": False,
        "report_to": [],
        "seed": world.seed,
    }
    held_out = set(world.held_out_scenes)
    return trainer_class(
        model,
        GeodeStage2Config(output_dir=str(output_dir), **{**defaults, **options}),
        data_collator=collator,
        train_dataset=[record for record in world.records for _ in range(times.get(record.question_type, 0))],
        eval_dataset=[
            record
            for record in world.questions("validation")
            if record.question_type in times and record.scene in held_out
        ],
        processing_class=processor,
    )


# ---- what came out ----


def asking_collator(world: World, processor: GeodeProcessor) -> GeodeDataCollator:
    """Make the collator that shows a question its scene, from the store."""
    return GeodeDataCollator(
        processor=processor, media_root=world.rooms, feature_store=FeatureStore(world.out / STORE)
    )


def number_lines(records: Sequence[Record], answers: Sequence[Answer]) -> list[dict]:
    """Write questions about numbers and their answers as `geode eval` does."""
    return [
        prediction_line(Question(record=record, ground_truth=str(record.value), num_options=None), answer, 0.0)
        for record, answer in zip(records, answers, strict=True)
        if record.kind == "number"
    ]


def calibrate(world: World) -> dict:
    """Measure on the validation split how wide intervals must be, and save the model with that."""
    model, processor = world.load("stage2")
    records = [record for record in world.questions("validation") if record.kind == "number"]
    answers = answer_records(model.eval(), asking_collator(world, processor), records)
    scales: dict = {}
    try:
        scales = measure_scales(number_lines(records, answers), model.config)
    except ValueError as error:  # a trial of a few steps answers hardly anything with a value
        logger.warning("Intervals stay those of the Gaussian. %s", error)
    model.config.drh_config.interval_scales = {token: entry["scale"] for token, entry in scales.items()}
    world.save("calibration", model, processor)
    return {"tokens": scales}


def score(world: World) -> dict:
    """Ask every question of the test split, with its room and with another one."""
    model, processor = world.load("calibration")
    collator = asking_collator(world, processor)
    asked = set(list_scenes(world.rooms, "test")[:NUM_TEST])
    records = [record for record in world.questions("test") if record.scene in asked]
    found: dict = {}
    for name, shown in (("scores", None), ("shuffled", exchanged_scenes(records))):
        answers = answer_records(model.eval(), replace(collator, shown_scenes=shown), records)
        found[name] = score_answers(records, answers)
        if shown is None:
            found["value_intervals"] = interval_report(number_lines(records, answers))
    centers = torch.tensor([record.box[:3] for record in world.records if record.box is not None])
    mean = centers.mean(dim=0)
    prior = statistics.median(
        torch.dist(torch.tensor(record.box[:3]), mean).item() for record in records if record.box is not None
    )
    return {**found, "prior_m": prior, "num_scenes": len(asked)}


def write_checkpoint(world: World) -> dict:
    """Write the folder that can be shipped: the calibrated model of stage 2, its facts and its card."""
    model, processor = world.load("calibration")
    model.config.use_cache = True
    folder = world.out / "checkpoint"
    # The plain methods, without names of files: the package ships this folder, and needs no copy of the code beside it.
    del model.config.auto_map, processor.image_processor.auto_map
    PreTrainedModel.save_pretrained(model, folder)
    ProcessorMixin.save_pretrained(processor, folder)
    facts = {stage: json.loads((world.out / f"{stage}.json").read_text("ascii")) for stage in STAGES[:-1]}
    facts |= {"steps": {name: world.steps(name) for name in STEPS}, "seed": world.seed}
    facts |= {"parameters": model.num_parameters(), "train_scenes": len(world.train_scenes), "cores": os.cpu_count()}
    facts["blind"] = blind_scores(world.rooms)
    facts["interval_coverage"] = model.config.drh_config.interval_coverage
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="ascii")
    card = build_world_card(facts)
    (folder / "README.md").write_text(card, encoding="ascii")
    logger.info("\n%s", card)
    return {"folder": str(folder)}


RUNS: dict[str, Callable[[World], dict]] = {
    "parts": train_parts,
    "features": store_features,
    "lookup": train_lookup,
    "alignment": lambda world: run_recipe(world, "alignment", source="lookup"),
    # Before the curriculum, in which the language model forgets all text that is no short answer.
    "stage1": lambda world: run_recipe(world, "stage1", source="alignment"),
    "locate": lambda world: train_curriculum(world, "locate", source="alignment", drm_path=str(world.out / "stage1")),
    "measure": lambda world: train_curriculum(world, "measure", source="locate"),
    "stage2": lambda world: run_recipe(world, "stage2", source="measure", drm_path=world.out / "stage1"),
    "calibration": calibrate,
    "scores": score,
    "checkpoint": write_checkpoint,
}


def run_stages(world: World, stages: Sequence[str]) -> None:
    """
    Run stages in order, but for those that are done.

    Args:
        world ([`World`]): The run.
        stages (`Sequence[str]`): Names from `STAGES`.

    Raises:
        ValueError: If the folder holds a run of another seed or other numbers of steps.
    """
    world.out.mkdir(parents=True, exist_ok=True)
    check_run(world.out, {"seed": world.seed, "steps": {name: world.steps(name) for name in STEPS}})
    for stage in stages:
        done = world.out / f"{stage}.json"
        if done.is_file():
            logger.info("%s is done: %s", stage, done)
            continue
        start = time.perf_counter()
        facts = RUNS[stage](world)
        facts["seconds"] = round(time.perf_counter() - start, 1)
        done.write_text(json.dumps(facts, indent=1) + "\n", encoding="ascii")
        logger.info("%s took %.0f s: %s", stage, facts["seconds"], facts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with `rooms` in it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all numbers of steps, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    world = World(data=args.data, out=args.out, scale=args.scale, seed=args.seed)
    run_stages(world, STAGES if args.stage == "all" else [args.stage])


if __name__ == "__main__":
    main()
