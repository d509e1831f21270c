# SPDX-License-Identifier: Apache-2.0
"""
The three models of `benchmarks/gpu.py`, with random weights, and their inputs: the same frames and questions in each one's form.

Sizes of the public models are those of their configurations on the Hub: InternVL3-2B has the vision tower and the language model of
GEODE, Qwen2.5-VL-3B its own. They are built by transformers' classes.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
)

from benchmarks.packing import make_records
from benchmarks.scene_reuse import questions_of_scene, real_width_processor
from geode import embedded_scene, tiny_checkpoint
from geode.configuration.configuration_geode import GeodeConfig
from geode.modeling_geode.scene_geode import SceneGeometry
from geode.trainers.collator import GeodeDataCollator
from geode.trainers.world_model import make_config


ROOM_SIZE_M = (6.0, 4.5, 2.6)
NUM_POINTS = {"real": 65_536, "tiny": 500}
NUM_FRAMES = {"real": 16, "tiny": 2}
# Of the frames for the reconstructor: a video of 4:3.
RECONSTRUCTED_SIZE = {"real": (392, 518), "tiny": (28, 42)}
TINY_RECONSTRUCTOR = {
    "image_size": 42,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "trunk_num_hidden_layers": 1,
    "trunk_num_attention_heads": 2,
    "camera_num_hidden_layers": 1,
    "camera_num_attention_heads": 2,
    "dense_hidden_size": 8,
    "dense_projection_sizes": [4, 4, 8, 8],
    "tapped_layers": [0, 1, 2, 3],
}
QWEN_PATCH, QWEN_MERGE, QWEN_FRAMES = 14, 2, 2  # pixels, patches a side and frames that become one token
QWEN = {
    "real": {
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
    },
    "tiny": {
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
    },
}


class Subject(NamedTuple):
    """
    One model of the comparison.

    Args:
        model (`PreTrainedModel`): The model.
        parts (`dict[str, nn.Module]`): What is timed of it, by name.
        ask (`Callable`): `ask(num_questions, num_tokens)` goes from frames on the device to so many new tokens a question.
        batch (`Callable`): Makes one batch of training.
        trained (`tuple[str, ...]`): Beginnings of the names of parameters that training changes.
    """

    model: PreTrainedModel
    parts: dict[str, nn.Module]
    ask: Callable[[int, int], Any]
    batch: Callable[[], dict[str, torch.Tensor]]
    trained: tuple[str, ...]


class Setting(NamedTuple):
    """
    What all models are built for.

    Args:
        size (`str`): `"real"` or `"tiny"`.
        device (`torch.device`): Where they run.
        dtype (`torch.dtype`): Of their weights.
        num_questions (`int`): Questions that may be asked.
        questions_per_pack (`int`): Questions about one scene in a batch of training.
    """

    size: str
    device: torch.device
    dtype: torch.dtype
    num_questions: int
    questions_per_pack: int


def make_processor(size: str):
    """GEODE's processor, at 448 pixels or as the tiny checkpoint has it."""
    return real_width_processor() if size == "real" else AutoProcessor.from_pretrained(tiny_checkpoint())


def geode_config(setting: Setting, processor, *, reconstructs: bool) -> GeodeConfig:
    """That of geode-1.5b, or the tiny one; with VGGT for inference alone."""
    if setting.size == "tiny":
        config = make_config(processor)
        return GeodeConfig.from_dict(
            {**config.to_dict(), "reconstructor_config": TINY_RECONSTRUCTOR if reconstructs else None}
        )
    without = {} if reconstructs else {"reconstructor_config": None}
    return GeodeConfig(
        image_token_id=processor.image_token_id,
        rationale_token_id=processor.rationale_token_id,
        control_tokens=processor.control_tokens,
        **without,
    )


def build(config, setting: Setting) -> PreTrainedModel:
    """A random model that never stops by itself, made where it runs."""
    torch.manual_seed(0)
    with setting.device:
        model = AutoModelForImageTextToText.from_config(config, dtype=setting.dtype)
    # Loading in half precision keeps these in float32, making a model does not.
    patterns = "|".join(model._keep_in_fp32_modules_strict)
    for name, parameter in model.named_parameters():
        if patterns and re.search(patterns, name):
            parameter.data = parameter.data.float()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def room_cloud(count: int) -> SceneGeometry:
    """Random points on the six sides of a room, by area."""
    generator = torch.Generator().manual_seed(0)
    x, y, z = ROOM_SIZE_M
    axes = torch.multinomial(torch.tensor([y * z, x * z, x * y]), count, replacement=True, generator=generator)
    points = torch.rand(count, 3, generator=generator)
    sides = torch.randint(0, 2, (count,), generator=generator).float()
    points[torch.arange(count), axes] = sides
    normals = torch.zeros(count, 3)
    normals[torch.arange(count), axes] = 1.0 - 2.0 * sides
    size = torch.tensor(ROOM_SIZE_M)
    return SceneGeometry.from_point_cloud(points * size, normals=normals, voxel_size_m=None)


def make_geode(setting: Setting, *, reconstructs: bool = True) -> Subject:
    """GEODE, and a scene of a video and a cloud."""
    processor = make_processor(setting.size)
    num_frames = NUM_FRAMES[setting.size]
    model = build(geode_config(setting, processor, reconstructs=reconstructs), setting)
    inputs = processor.prepare_scene(
        video=embedded_scene() / "room.mp4", geometry=room_cloud(NUM_POINTS[setting.size]), num_frames=num_frames
    )
    inputs = {name: moved(value, setting) for name, value in inputs.items()}
    questions = questions_of_scene(setting.num_questions)

    def ask(num_questions: int, num_tokens: int) -> None:
        scene = model.encode_scene(**inputs)
        options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
        model.ask(processor, scene, questions[:num_questions], **options)

    def batch() -> dict[str, torch.Tensor]:
        processor.num_frames = num_frames
        collator = GeodeDataCollator(processor=processor, media_root=embedded_scene())
        rows = collator([make_records(setting.questions_per_pack)])
        return {name: moved(value, setting) for name, value in rows.items()}

    names = ("vision_tower", "multi_modal_projector", "point_encoder", "drm", "language_model")
    return Subject(
        model=model,
        parts={name: getattr(model.model, name) for name in names},
        ask=ask,
        batch=batch,
        trained=("model.language_model", "model.multi_modal_projector", "lm_head", "drh", "model.feature_injection"),
    )


def make_internvl(setting: Setting) -> Subject:
    """InternVL with GEODE's vision tower and language model."""
    processor = make_processor(setting.size)
    ours = geode_config(setting, processor, reconstructs=False)
    config = InternVLConfig(
        vision_config=ours.vision_config.to_dict(),
        text_config=ours.text_config.to_dict(),
        image_token_id=ours.image_token_id,
        image_seq_length=ours.image_seq_length,
    )
    model = build(config, setting)
    num_frames, side = NUM_FRAMES[setting.size], ours.vision_config.image_size[0]
    pixels = torch.rand(num_frames, 3, side, side, generator=torch.Generator().manual_seed(1))
    media = {"pixel_values": moved(pixels, setting)}
    visual = torch.full((num_frames * ours.image_seq_length,), ours.image_token_id)
    names = ("vision_tower", "multi_modal_projector", "language_model")
    return Subject(
        model=model,
        parts={name: getattr(model.model, name) for name in names},
        ask=lambda count, tokens: ask_alone(model, media, prompts(visual, setting, count), tokens),
        batch=lambda: {**media, **labelled(visual, setting)},
        trained=("model.language_model", "model.multi_modal_projector", "lm_head"),
    )


def make_qwen(setting: Setting) -> Subject:
    """Qwen2.5-VL, which sees the same frames as a video: two frames and four patches become one token."""
    ours = geode_config(setting, make_processor(setting.size), reconstructs=False)
    sizes = QWEN[setting.size]
    vocab_size = ours.text_config.vocab_size
    config = Qwen2_5_VLConfig(
        vision_config=sizes["vision_config"],
        text_config={"vocab_size": vocab_size, **sizes["text_config"]},
        tie_word_embeddings=True,
        image_token_id=vocab_size - 1,
        video_token_id=vocab_size - 2,
        vision_start_token_id=vocab_size - 3,
        vision_end_token_id=vocab_size - 4,
    )
    model = build(config, setting)
    side = ours.vision_config.image_size[0] // (QWEN_PATCH * QWEN_MERGE) * QWEN_MERGE
    grid = torch.tensor([[-(-NUM_FRAMES[setting.size] // QWEN_FRAMES), side, side]])
    patches = torch.rand(int(grid.prod()), 3 * QWEN_FRAMES * QWEN_PATCH**2, generator=torch.Generator().manual_seed(1))
    media = {"pixel_values_videos": moved(patches, setting), "video_grid_thw": grid.to(setting.device)}
    visual = torch.full((int(grid.prod()) // QWEN_MERGE**2,), config.video_token_id)

    def typed(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**rows, "mm_token_type_ids": 2 * (rows["input_ids"] == config.video_token_id).int()}

    return Subject(
        model=model,
        parts={"visual": model.model.visual, "language_model": model.model.language_model},
        ask=lambda count, tokens: ask_alone(model, media, map(typed, prompts(visual, setting, count)), tokens),
        batch=lambda: {**media, **typed(labelled(visual, setting))},
        trained=("model.language_model", "model.visual.merger", "lm_head"),
    )


SUBJECTS = {"GEODE": make_geode, "InternVL3-2B": make_internvl, "Qwen2.5-VL-3B": make_qwen}


def moved(value: Any, setting: Setting) -> Any:
    """On the device; models cast pixels and features themselves."""
    return value.to(setting.device) if isinstance(value, torch.Tensor) else value


def texts(count: int) -> list[torch.Tensor]:
    """The tokens of questions."""
    tokenizer = AutoProcessor.from_pretrained(tiny_checkpoint()).tokenizer
    return [tokenizer(question, return_tensors="pt")["input_ids"][0] for question in questions_of_scene(count)]


def prompts(visual: torch.Tensor, setting: Setting, count: int) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of each question behind the visual placeholders."""
    for text in texts(count):
        input_ids = torch.cat([text[:1], visual, text])[None].to(setting.device)
        yield {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def labelled(visual: torch.Tensor, setting: Setting) -> dict[str, torch.Tensor]:
    """One row for training: all the questions of a pack behind the visual placeholders, as text to learn."""
    text = torch.cat(texts(setting.questions_per_pack))
    input_ids = torch.cat([text[:1], visual, text])[None].to(setting.device)
    labels = input_ids.clone()
    labels[:, : 1 + len(visual)] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def ask_alone(model: PreTrainedModel, media: dict, rows: Iterator[dict], num_tokens: int) -> None:
    """Generate for each question from the frames on, as a user of the library would."""
    for row in rows:
        model.generate(**media, **row, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)


__all__ = ["NUM_FRAMES", "RECONSTRUCTED_SIZE", "SUBJECTS", "Setting", "Subject", "make_geode"]
