# SPDX-License-Identifier: Apache-2.0
"""
Does memory stay flat, and do answers stay the same, over thousands of questions about dozens of scenes?

    python -m benchmarks.soak --json

Scenes are the embedded video, each beside a geometry of its own: the room's points, thinned differently. They come from a
`SceneStore` that holds only some of them at a time, in random order, so that scenes are encoded, read and put out again and again;
each visit asks a batch of questions with `model.ask`. Resident memory is read after each visit, once the allocator has given
back what it holds free. The growth is the median of the last quarter of the visits over that of the second quarter: the first is
warm-up. A question that was asked about a scene before must have the same answer. Linux only.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

from benchmarks.common import add_json_option, resident_bytes, trim_memory, write_json
from benchmarks.scene_reuse import questions_of_scene
from geode import embedded_scene, tiny_checkpoint
from geode.modeling_geode.scene_geode import SceneGeometry


MIB = 2**20
NUM_KINDS = 26  # of questions


def make_scenes(folder: Path, count: int) -> list[Path]:
    """Save geometries that differ in the points that they keep, at least nine of ten."""
    geometry, folders = SceneGeometry.load(embedded_scene() / "geometry"), []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        keeps = torch.rand(len(geometry.points), generator=generator) > 0.1 * (number + 1) / count
        fields = {name: getattr(geometry, name) for name in ("points", "colors", "normals")}
        fields = {name: None if field is None else field[keeps] for name, field in fields.items()}
        folders.append(folder / f"scene_{number}")
        dataclasses.replace(geometry, **fields).save(folders[-1])
    return folders


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """
    Ask all questions.

    Args:
        options (`argparse.Namespace`): Of the command line.
        folder (`Path`): An empty folder.

    Returns:
        `dict`: `growth_mib`, `resident_mib` after each visit, `num_questions`, `num_encoded`, `num_visits`, `questions_per_s`.

    Raises:
        RuntimeError: If an answer changes.
    """
    model = AutoModel.from_pretrained(tiny_checkpoint()).eval()
    processor = AutoProcessor.from_pretrained(tiny_checkpoint())
    scenes = make_scenes(folder / "geometry", options.scenes)
    asked = questions_of_scene(NUM_KINDS)
    video = embedded_scene() / "room.mp4"
    store = model.open_scene_store(folder / "store", max_bytes=2**40)
    store.encode(processor, video, geometry=scenes[0])
    # Room for a part of them, so that scenes leave the store and are encoded again; sizes differ by a few bytes.
    room = 1.02 * store.num_bytes * max(1.0, options.scenes * options.stored)
    store = model.open_scene_store(folder / "store", max_bytes=int(room))
    chance, known, resident, num_encoded = np.random.default_rng(0), {}, [], 0
    num_visits = -(-options.questions // options.batch)
    # Every scene comes equally often, in an order without a pattern.
    order = [number % options.scenes for number in range(num_visits)]
    chance.shuffle(order)
    started = time.perf_counter()
    for number in tqdm(order, desc="visits", file=sys.stderr):
        num_encoded += store.key_of(processor, video, geometry=scenes[number]) not in store
        scene = store.encode(processor, video, geometry=scenes[number])
        questions = chance.choice(asked, options.batch, replace=False).tolist()
        answers = model.ask(processor, scene, questions, max_new_tokens=options.new_tokens)
        for question, answer in zip(questions, answers, strict=True):
            before = known.setdefault((number, question), answer.text)
            if answer.text != before:
                raise RuntimeError(
                    f"{question!r} about scene {number} was answered {before!r}, and now {answer.text!r}."
                )
        del scene, answers
        trim_memory()
        resident.append(resident_bytes("VmRSS") / MIB)
    quarter = max(1, num_visits // 4)
    growth = statistics.median(resident[-quarter:]) - statistics.median(resident[quarter : 2 * quarter])
    return {
        "growth_mib": growth,
        "resident_mib": resident,
        "num_questions": num_visits * options.batch,
        "num_encoded": num_encoded,
        "num_visits": num_visits,
        "questions_per_s": num_visits * options.batch / (time.perf_counter() - started),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Memory over many questions about many scenes.")
    parser.add_argument("--scenes", type=int, default=50, help="default: 50")
    parser.add_argument("--questions", type=int, default=2000, help="in all, in whole batches (default: 2000)")
    parser.add_argument("--batch", type=int, default=8, help=f"questions of a visit, at most {NUM_KINDS} (default: 8)")
    parser.add_argument(
        "--stored", type=float, default=0.5, help="share of the scenes that the store holds (default: 0.5)"
    )
    parser.add_argument("--new-tokens", type=int, default=8, help="for each question (default: 8)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error(f"resident memory is read from /proc, which Linux has, got the platform {sys.platform!r}.")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    resident = found["resident_mib"]
    sys.stdout.write(
        f"{found['num_questions']} questions about {options.scenes} scenes in {found['num_visits']} visits, {found['num_encoded']} "
        f"of which encoded the scene: resident memory {min(resident):.0f} to {max(resident):.0f} MiB, growth after warm-up "
        f"{found['growth_mib']:+.1f} MiB\n"
    )
    write_json({**vars(options), "torch": torch.__version__, **found}, options.json)


if __name__ == "__main__":
    main()
