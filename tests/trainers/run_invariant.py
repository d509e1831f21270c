# SPDX-License-Identifier: Apache-2.0
"""
Train a small model for some steps in as many processes as the environment says, and write down what each step did.

```bash
python -m tests.trainers.run_invariant CASES.json OUT       # RANK, WORLD_SIZE, MASTER_ADDR, ... for several processes
```
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from geode.trainers.alignment_config import GeodeAlignmentConfig
from geode.trainers.alignment_trainer import GeodeAlignmentTrainer
from geode.trainers.stage1_config import GeodeStage1Config
from geode.trainers.stage1_trainer import GeodeStage1Trainer
from geode.trainers.stage2_config import GeodeStage2Config
from geode.trainers.stage2_trainer import GeodeStage2Trainer
from tests.trainers.common_collator import make_model, make_processor, make_records, text_record
from tests.trainers.common_training import settings, steps


STAGES = {
    "alignment": (GeodeAlignmentTrainer, GeodeAlignmentConfig),
    "stage1": (GeodeStage1Trainer, GeodeStage1Config),
    "stage2": (GeodeStage2Trainer, GeodeStage2Config),
}
ROOMS = ("rooms/one.mp4", "rooms/two")
COMPARED = ("loss", "grad_norm", "loss/ce", "loss/drh", "token_accuracy", "mae/<REG>", "loss/alignment")


@dataclasses.dataclass
class Case:
    """
    A run to compare with others.

    Args:
        name (`str`): Begins the names of its files.
        stage (`str`): One of `STAGES`.
        rows (`str`): One of `ROWS`.
        batch_size, accumulation, steps (`int`): Of each process.
        adapter (`bool`): Train an adapter.
        dtype (`str`): Of the model.
        changes (`dict`): Further options of the run.
    """

    name: str
    stage: str = "stage2"
    rows: str = "mixed"
    batch_size: int = 8
    accumulation: int = 1
    steps: int = 2
    adapter: bool = False
    dtype: str = "float32"
    changes: dict = dataclasses.field(default_factory=dict)


# ---- rows ----


def texts(count: int, *, first: int = 0, **changes) -> list:
    """Questions without a value whose answers and rationales are of very different lengths."""
    return [
        text_record(
            prompt=f"What is object {number}?",
            answer="A room. " * (1 + number % 5),
            rationale=f"Because {number} is {'near ' * (1 + number * 3 % 7)}it.",
            uid=f"text:{number}",
            **changes,
        )
        for number in range(first, first + count)
    ]


def mixed() -> list[list]:
    """Packs of one to four questions: numbers, boxes, choices and texts, of both rooms, and a picture without geometry."""
    known = {room: [record for record in make_records(room, count=18) if _fits(record, room)] for room in ROOMS}
    packs = []
    for number in range(32):
        room = ROOMS[number % 3 == 2]
        own, size = known[room], 1 + number * 5 % 4
        pack = [own[(number * 3 + entry) % len(own)] for entry in range(size)]
        if number % 4 == 3:
            pack = texts(size, first=number, media=room)
        elif number % 8 == 6:
            pack = texts(1, first=number, media="pictures/a.png", media_type="image")
        packs.append(pack)
    return packs


def _fits(record, room: str) -> bool:
    return record.kind != "box" or room == ROOMS[0]


def with_geometry(packs: list[list]) -> list[list]:
    """The same packs. Records name the geometry of rooms, since a picture has none."""
    stems = {room: f"geometry/{Path(room).stem}" for room in ROOMS}
    return [[dataclasses.replace(record, geometry=stems.get(record.media)) for record in pack] for pack in packs]


def rationales() -> list[list]:
    """Packs of one to three questions with rationales, of both rooms."""
    return [texts(1 + number % 3, first=number, media=ROOMS[number % 2]) for number in range(32)]


def second_rank(others: list) -> list[list]:
    """Four packs with values, then four without, and so on: with two processes of four rows the second has none."""
    values = [pack for pack in mixed() if any(record.kind in ("number", "box") for record in pack)]
    blocks = [[*values[4 * block : 4 * block + 4], *([record] for record in others)] for block in range(4)]
    return [pack for block in blocks for pack in block]


def pictures(**changes) -> list:
    """Four texts about a picture without geometry."""
    return texts(4, media="pictures/a.png", media_type="image", **changes)


def with_pictures(packs: list[list]) -> list[list]:
    """Four packs, four pictures, and so on."""
    return [pack for start in range(0, 16, 4) for pack in [*packs[start : start + 4], *([one] for one in pictures())]]


ROWS = {
    "mixed": mixed,
    "rationales": rationales,
    "second rank texts": lambda: second_rank(texts(4)),
    "second rank pictures": lambda: second_rank(pictures()),
    "rationales, second rank pictures": lambda: with_pictures(rationales()),
}


# ---- runs ----


class KeepGradients(TrainerCallback):
    """Keeps the gradients of the first step, as the optimiser sees them."""

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Copy them."""
        if not self.gradients:
            named = model.named_parameters()
            grads = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
            self.gradients = {
                name: (grad.full_tensor() if isinstance(grad, DTensor) else grad).cpu().clone()
                for name, grad in grads.items()
            }


def train(case: Case, root: Path, out: Path):
    """
    Train, write the gradients of the first step to `out`, and return the trainer and what each step did.

    Plain gradient descent with a long stride: Adam would make much of the rounding of gradients that are nearly 0.
    """
    trainer_class, config_class = STAGES[case.stage]
    options = settings(out / case.name, root, max_steps=case.steps, per_device_train_batch_size=case.batch_size)
    options |= {"gradient_accumulation_steps": case.accumulation, "train_sampling_strategy": "sequential"}
    options |= {"geometry": None, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1.0}
    if case.stage == "stage2":
        options["drh_learning_rate"] = 0.05
    processor, keeper = make_processor(), KeepGradients()
    extra = {"peft_config": LoraConfig(r=4)} if case.adapter else {}
    trainer = trainer_class(
        make_model(processor).to(getattr(torch, case.dtype)),
        config_class(**{**options, **case.changes}),
        train_dataset=with_geometry(ROWS[case.rows]()),
        processing_class=processor,
        callbacks=[keeper],
        **extra,
    )
    trainer.train()
    out.mkdir(parents=True, exist_ok=True)
    save_file(keeper.gradients, out / f"{case.name}_{trainer.args.process_index}.safetensors")
    found = [{name: entry[name] for name in COMPARED if name in entry} for entry in steps(trainer)]
    return trainer, found


def main(cases: Path, out: Path) -> None:
    """Run cases one after another, and then those of `run_fsdp`."""
    rank, content = int(os.environ.get("RANK", "0")), json.loads(cases.read_text("utf-8"))
    for entry in content["cases"]:
        case = Case(**entry)
        trainer, found = train(case, Path(content["root"]), out)
        found = {"world_size": trainer.args.world_size, "steps": found}
        (out / f"{case.name}_{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    if content.get("sharded"):
        from tests.trainers import run_fsdp  # which imports this module

        run_fsdp.run_cases(Path(content["root"]), out, content["sharded"])
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
