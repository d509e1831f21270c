# SPDX-License-Identifier: Apache-2.0
"""
Make the tiny checkpoint that this package ships: `python -m geode.trainers.tiny --out geode/tiny`.

It is GEODE at the smallest size that runs every part, overfitted on the one embedded scene by plain
`transformers.Trainer`. It shows that the pipeline works from video file to metre. It knows no other room.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin, Trainer, TrainingArguments, set_seed

from geode import embedded_scene
from geode.configuration.configuration_geode import GeodeConfig
from geode.data.synthetic_rooms.questions import prompt_of
from geode.data.tokenizer import train_tokenizer
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.modeling_geode.scene_geode import SceneGeometry
from geode.modeling_geode.video_processing_geode import GeodeImageProcessor, load_video_frames
from geode.trainers.world_model import make_control_tokens


IMAGE_SIZE, PATCH_SIZE, NUM_FRAMES, NUM_RATIONALE_TOKENS = 84, 14, 4, 8
VOCAB_SIZE = 1024
GRID_SIZE_M, MAX_POINTS = 0.2, 1024
HIDDEN_SIZE = 128
# About HIDDEN_SIZE ** -0.5. At the usual 0.02 attention starts flat at this width, and reads nothing for hundreds of steps.
INITIALIZER_RANGE = 0.09
ALIGNED = ("input_ids", "attention_mask", "mm_token_type_ids", "labels", "regression_targets")


def read_rows(folder: Path) -> list[dict]:
    """All questions of the embedded scene, those that the demo asks included."""
    names = ("questions.jsonl", "train_questions.jsonl")
    return [json.loads(line) for name in names for line in (folder / name).read_text("utf-8").splitlines()]


def make_processor(rows: list[dict]) -> GeodeProcessor:
    """The processor, with a byte-level BPE trained on the questions."""
    texts = [f"user\n{prompt_of(row)}\nassistant\n{row['ground_truth']}" for row in rows]
    texts += [f"Frame{i + 1}: " for i in range(NUM_FRAMES)]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    side = IMAGE_SIZE // PATCH_SIZE // 2
    return GeodeProcessor(
        GeodeImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer,
        num_frames=NUM_FRAMES,
        num_geometry_frames=NUM_FRAMES,
        num_rationale_tokens=NUM_RATIONALE_TOKENS,
        image_seq_length=side * side,
        grid_size=GRID_SIZE_M,
        max_points=MAX_POINTS,
        control_tokens=make_control_tokens(
            [row["value_si"] for row in rows if row["value_si"] is not None],
            [row["box"] for row in rows if row["box"] is not None],
            tokenizer,
        ),
    )


def make_config(processor: GeodeProcessor) -> GeodeConfig:
    """Every part of GEODE, small."""
    tokenizer = processor.tokenizer
    return GeodeConfig(
        vision_config={
            "model_type": "internvl_vision",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "image_size": [IMAGE_SIZE, IMAGE_SIZE],
            "patch_size": [PATCH_SIZE, PATCH_SIZE],
            "attention_bias": True,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN_SIZE,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 3 * HIDDEN_SIZE,
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": True,
            "initializer_range": INITIALIZER_RANGE,
        },
        point_config={
            "enc_depths": [1, 1, 1],
            "enc_channels": [16, 32, 64],
            "enc_num_head": [1, 2, 4],
            "enc_patch_size": [256, 256, 256],
            "stride": [2, 2],
            "drop_path": 0.0,
            "grid_size": GRID_SIZE_M,
        },
        drm_config={
            "hidden_size": 96,
            "num_cross_attention_layers": 1,
            "num_attention_heads": 4,
            "mlp_ratio": 2,
            "num_rationale_tokens": NUM_RATIONALE_TOKENS,
            "max_context_tokens": 256,
        },
        reconstructor_config=None,
        image_token_id=processor.image_token_id,
        rationale_token_id=processor.rationale_token_id,
        control_tokens=processor.control_tokens,
        initializer_range=INITIALIZER_RANGE,
    )


class SceneQuestions(Dataset):
    """
    Questions about one scene, whose media are prepared for the model once.

    Args:
        processor ([`GeodeProcessor`]): Makes the inputs.
        rows (`list[dict]`): Lines of `questions.jsonl`.
        folder (`Path`): The scene, with `room.mp4` and `geometry/`.
    """

    def __init__(self, processor: GeodeProcessor, rows: list[dict], folder: Path):
        frames, _ = load_video_frames(folder / "room.mp4", num_frames=processor.num_frames)
        geometry = SceneGeometry.load(folder / "geometry")
        video = {"type": "video", "video": frames, "geometry": geometry}
        self.samples = []
        for row in tqdm(rows, desc="Preparing questions"):
            chat = [
                {
                    "role": "user",
                    "content": [video, {"type": "text", "text": prompt_of(row)}],
                },
                {"role": "assistant", "content": row["answer"]},
            ]
            inputs = processor.apply_chat_template(
                chat, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
            )
            self.samples.append(aligned_inputs(inputs))
        self.media = processor.prepare_scene(frames=frames, geometry=geometry)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[index]

    def collate(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Pad on the right, and give every sample the scene's media."""
        fill = {"labels": -100, "regression_targets": torch.nan}
        batch = {
            name: torch.nn.utils.rnn.pad_sequence(
                [sample[name] for sample in samples], batch_first=True, padding_value=fill.get(name, 0)
            )
            for name in ALIGNED
        }
        media = {name: tensor.expand(len(samples), *tensor.shape[1:]) for name, tensor in self.media.items()}
        return {**batch, **media}


def aligned_inputs(inputs) -> dict[str, torch.Tensor]:
    """The tensors of one chat that run along its tokens, with labels at the assistant's."""
    ids = inputs["input_ids"]
    nothing = {
        "mm_token_type_ids": torch.zeros_like(ids),
        "regression_targets": torch.full((*ids.shape, 7), torch.nan),
    }
    labels = ids.masked_fill(~inputs["assistant_masks"].bool(), -100)
    found = {**nothing, **inputs, "labels": labels}
    return {name: found[name][0] for name in ALIGNED}


def evaluate(model: GeodeForConditionalGeneration, processor: GeodeProcessor, rows: list[dict], folder: Path) -> dict:
    """Ask every question as a user would, and measure: letters right, relative error of numbers, error of centres."""
    video = {"type": "video", "path": str(folder / "room.mp4"), "geometry": str(folder / "geometry")}
    letters, relative, centers = [], [], []
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        chats = [[{"role": "user", "content": [video, {"type": "text", "text": prompt_of(row)}]}] for row in part]
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True)
        answers = processor.post_process_answers(output, input_ids=inputs["input_ids"])
        for row, answer in zip(part, answers, strict=True):
            if row["box"] is not None:
                centers.append(
                    torch.dist(torch.tensor(answer.boxes[0].center), torch.tensor(row["box"][:3])).item()
                    if answer.boxes
                    else float("inf")
                )
            elif row["value_si"] is not None:
                value = answer.values[0].si_value if answer.values else float("inf")
                relative.append(abs(value - row["value_si"]) / row["value_si"])
            else:
                letters.append(answer.text.strip() == row["ground_truth"])
    return {
        "questions": len(rows),
        "choices_right": sum(letters) / len(letters),
        "median_relative_error": statistics.median(relative),
        "max_relative_error": max(relative),
        "median_center_error_m": statistics.median(centers),
        "max_center_error_m": max(centers),
    }


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: video-text-to-text
tags: [geode, 3d, spatial-reasoning]
---

# The tiny checkpoint of GEODE

Overfitted on **one** rendered room, the one in `geode/assets/embedded_scene`, by plain `transformers.Trainer`. It shows that
the pipeline works from video file to metre. It knows no other room: its answers about any other video mean nothing, and the
figures below are of the questions it was trained on.

- Made by `python -m geode.trainers.tiny --out DIR --steps {steps} --batch-size {batch_size} --learning-rate {learning_rate} --seed {seed}`
  in {minutes_on_cpu} minutes on one CPU core. Rerunning it overwrites this folder.
- {parameters:,} parameters in float32. Vision tower and point encoder are random and frozen; projector, rationale module,
  language model and regression head are trained. There is no reconstructor: geometry comes with the video.
- Frames: {num_frames} at {image_size} x {image_size} pixels. Voxels of {grid_size_m} m. Byte-level BPE of its own.
- Values are SI units in the scene frame: +z up, origin on the floor below the first camera, metres.

| Of {questions} training questions | |
| --- | --- |
| choices right | {choices_right:.1%} |
| numbers, median relative error | {median_relative_error:.2%} |
| numbers, largest relative error | {max_relative_error:.1%} |
| box centres, median error | {median_center_error_m:.3f} m |
| box centres, largest error | {max_center_error_m:.3f} m |

Held-out rooms: Not evaluated. It would fail.

Licence: Apache-2.0. Everything in it was made by this package; no public weights or data. Citation: see the package.
"""


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    set_seed(args.seed)
    folder = embedded_scene()
    rows = read_rows(folder)
    processor = make_processor(rows)
    model = GeodeForConditionalGeneration(make_config(processor))
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=64
    )
    questions = SceneQuestions(processor, rows, folder)
    start = time.perf_counter()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=30,
            weight_decay=0.0,
            adam_beta2=0.98,
            logging_steps=50,
            save_strategy="no",
            remove_unused_columns=False,
            use_cpu=True,
            seed=args.seed,
        ),
        train_dataset=questions,
        data_collator=questions.collate,
    )
    trainer.train()
    minutes = (time.perf_counter() - start) / 60
    model.eval()
    model.config.use_cache = True
    facts = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "parameters": model.num_parameters(),
        "minutes_on_cpu": round(minutes, 1),
        **evaluate(model, processor, rows, folder),
    }
    # The plain methods: the shipped folder needs no copy of the code beside it.
    PreTrainedModel.save_pretrained(model, args.out)
    ProcessorMixin.save_pretrained(processor, args.out)
    (args.out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    card = CARD.format(num_frames=NUM_FRAMES, image_size=IMAGE_SIZE, grid_size_m=GRID_SIZE_M, **facts)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(card)  # noqa: T201


if __name__ == "__main__":
    main()
