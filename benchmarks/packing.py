# SPDX-License-Identifier: Apache-2.0
"""
What packing saves: forward and backward of some questions about one scene, behind one shared prefix or each with its own.

    python -m benchmarks.packing --json

Both batches come from the same collator, with the same questions, and give the same loss, which is checked. The two are run in
turn, so that a change of the machine's load meets them alike; each pair gives one ratio of wall-clock times. Questions alone are
padded to the longest, as training pads them. Weights are
random, the scene is the embedded one. `tiny` has the sizes of the shipped checkpoint. `middle` has its media, so the shared
prefix is as short, and a wider language model, vision tower and rationale module; `--num-frames` lengthens the prefix.

- end to end: with vision tower, point encoder and rationale module in every step.
- from features: with their frozen parts' features given, as training from a feature store has them.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from tqdm import tqdm
from transformers import AutoProcessor, set_seed

from benchmarks.common import add_json_option, write_json
from geode import embedded_scene, tiny_checkpoint
from geode.data.schemas import Record
from geode.data.synthetic_rooms.questions import prompt_of
from geode.demo import read_questions
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.trainers.collator import GeodeDataCollator
from geode.trainers.world_model import make_config


SIZES = {
    "tiny": {},
    "middle": {
        "text_config": {
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "intermediate_size": 1536,
            "layer_types": ["full_attention"] * 8,
        },
        "vision_config": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 1024},
        "drm_config": {"hidden_size": 256},
    },
}
CLOUD = ("point_features", "point_coords", "point_grid_coords", "point_mask")
# Two programs that compute the same differ by rounding only.
SAME_LOSS = 1e-4


def make_model(processor, size: str) -> GeodeForConditionalGeneration:
    """A random model of one of `SIZES`, with its encoders frozen."""
    set_seed(0)
    config = make_config(processor)
    for name, changes in SIZES[size].items():
        for key, value in changes.items():
            setattr(getattr(config, name), key, value)
    return GeodeForConditionalGeneration(config).train()


def make_records(count: int) -> list[Record]:
    """Questions about the embedded scene, of all its types in turn."""
    names = ("questions.jsonl", "train_questions.jsonl")
    rows = [row for name in names for row in read_questions(embedded_scene() / name)]
    rows = [rows[number * len(rows) // count] for number in range(count)]
    return [
        Record(
            uid=f"embedded:{row['id']}",
            source="embedded",
            media_type="video",
            media="room.mp4",
            geometry="geometry",
            prompt=prompt_of(row),
            kind="box" if row["box"] else "text" if row["value_si"] is None else "number",
            answer_text=row["ground_truth"],
            **{name: row[name] for name in ("value", "unit", "value_si", "box")},
        )
        for row in rows
    ]


@torch.no_grad()
def with_features(model: GeodeForConditionalGeneration, batch: dict) -> dict:
    """The batch with what the frozen encoders make of it in place of frames and clouds."""
    frames = {name: batch[name] for name in ("pixel_values_videos", "video_frame_mask", "scene_mask")}
    features = {"video_features": model.get_video_features(**frames).last_hidden_state}
    features |= model.get_point_tokens(**{name: batch[name] for name in CLOUD})
    return {
        **{name: value for name, value in batch.items() if name not in (*CLOUD, "pixel_values_videos")},
        **features,
    }


def step(model: GeodeForConditionalGeneration, batch: dict) -> float:
    """One forward and backward; the loss."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.item()


def timed(function: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a call, and what it returned."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def measure(model: GeodeForConditionalGeneration, single: dict, packed: dict, num_pairs: int) -> dict:
    """
    Run both batches in turn.

    Args:
        model ([`GeodeForConditionalGeneration`]): The model.
        single (`dict`): A row for each question.
        packed (`dict`): One row for all.
        num_pairs (`int`): Pairs that are counted; one more comes before them.

    Returns:
        `dict`: `single_s` and `packed_s`, the median seconds, `ratio`, the median of the pairs' ratios, and `ratios`.

    Raises:
        RuntimeError: If the losses differ.
    """
    pairs = []
    for _ in tqdm(range(num_pairs + 1), desc="pairs", file=sys.stderr):
        (one, want), (other, got) = timed(lambda: step(model, single)), timed(lambda: step(model, packed))
        if not abs(got - want) <= SAME_LOSS * abs(want):
            raise RuntimeError(f"The packed loss must be {want}, that of the questions alone; got {got}.")
        pairs.append((one, other))
    ones, others = zip(*pairs[1:], strict=True)
    ratios = [one / other for one, other in pairs[1:]]
    return {
        "single_s": statistics.median(ones),
        "packed_s": statistics.median(others),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Packed questions against the same ones each with their own scene.")
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=["tiny", "middle"], help="models")
    parser.add_argument("--questions", type=int, default=8, help="questions of the scene (default: 8)")
    parser.add_argument("--num-frames", type=int, help="frames of the scene (default: the tiny checkpoint's 4)")
    parser.add_argument("--pairs", type=int, default=7, help="pairs that are counted (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    processor = AutoProcessor.from_pretrained(tiny_checkpoint())
    processor.num_frames = options.num_frames or processor.num_frames
    collator = GeodeDataCollator(processor=processor, media_root=embedded_scene())
    records = make_records(options.questions)
    single, packed = collator(records), collator([records])
    tokens = {
        "alone": int(single["attention_mask"].sum()),
        "alone_padded": single["input_ids"].numel(),
        "packed": packed["input_ids"].numel(),
    }
    report = {**vars(options), "torch": torch.__version__, "tokens": tokens, "results": {}}
    sys.stdout.write(
        f"{options.questions} questions: {tokens['alone']} tokens alone ({tokens['alone_padded']} with padding), "
        f"{tokens['packed']} packed\n"
    )
    for size in options.sizes:
        model = make_model(processor, size)
        kinds = {"end to end": (single, packed)}
        kinds["from features"] = (with_features(model, single), with_features(model, packed))
        for kind, batches in kinds.items():
            found = report["results"][f"{size}, {kind}"] = measure(model, *batches, options.pairs)
            sys.stdout.write(
                f"{size}, {kind}: {found['single_s']:.3f} s alone, {found['packed_s']:.3f} s packed, ratio "
                f"{found['ratio']:.2f} ({min(found['ratios']):.2f} to {max(found['ratios']):.2f})\n"
            )
    write_json(report, options.json)


if __name__ == "__main__":
    main()
