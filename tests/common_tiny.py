# SPDX-License-Identifier: Apache-2.0
"""GEODE at the smallest size that runs every part, with random weights: tests do not depend on the shipped checkpoint's sizes."""

import json
from pathlib import Path

from geode import embedded_scene
from geode.configuration.configuration_geode import GeodeConfig
from geode.data.synthetic_rooms.questions import prompt_of
from geode.data.tokenizer import train_tokenizer
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.modeling_geode.video_processing_geode import GeodeImageProcessor
from geode.trainers.world_model import INITIALIZER_RANGE, make_control_tokens


IMAGE_SIZE, PATCH_SIZE, NUM_FRAMES, NUM_RATIONALE_TOKENS = 84, 14, 4, 8
VOCAB_SIZE = 1024
GRID_SIZE_M, MAX_POINTS = 0.2, 1024
HIDDEN_SIZE = 128


def read_rows(folder: Path) -> list[dict]:
    """All questions of the embedded scene, those that the demo asks included."""
    names = ("questions.jsonl", "train_questions.jsonl")
    return [json.loads(line) for name in names for line in (folder / name).read_text("utf-8").splitlines()]


def make_processor() -> GeodeProcessor:
    """A processor whose tokenizer knows the embedded scene's questions."""
    rows = read_rows(embedded_scene())
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


__all__ = ["make_config", "make_processor", "read_rows"]
