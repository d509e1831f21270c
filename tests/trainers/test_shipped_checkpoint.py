# SPDX-License-Identifier: Apache-2.0
"""The shipped checkpoint is what its card says, and answers about a room that it was not trained on."""

import json
import statistics

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

import geode
from geode.demo import read_questions
from geode.trainers.collator import GeodeDataCollator
from geode.trainers.world_card import build_world_card
from geode.trainers.world_scores import answer_records
from tests.trainers.common_collator import record_of


FOLDER, ROOM = geode.tiny_checkpoint(), geode.embedded_scene()


@pytest.fixture(scope="module")
def checkpoint():
    return AutoModel.from_pretrained(FOLDER).eval(), AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def facts() -> dict:
    return json.loads((FOLDER / "facts.json").read_text("utf-8"))


def test_auto_classes_give_the_models_own_classes(checkpoint):
    model, processor = checkpoint
    assert type(model) is geode.GeodeForConditionalGeneration
    assert type(processor) is geode.GeodeProcessor


def test_card_is_that_of_the_facts_and_the_folder_is_small(checkpoint, facts):
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 15 * 2**20
    assert facts["parameters"] == checkpoint[0].num_parameters()
    assert (FOLDER / "README.md").read_text("utf-8") == build_world_card(facts)


def answers_about(checkpoint, kind: str) -> list:
    model, processor = checkpoint
    rows = [row for row in read_questions(ROOM / "train_questions.jsonl") if row["question_type"] == kind]
    records = [record_of(row, media="room.mp4") for row in rows]
    collator = GeodeDataCollator(processor=processor, media_root=ROOM, geometry=str(ROOM / "geometry"))
    return list(zip(records, answer_records(model, collator, records), strict=True))


def test_boxes_of_a_new_room_are_nearer_than_the_rooms_middle(checkpoint):
    """The room is none of the training rooms, and larger in frames and points."""
    pairs = answers_about(checkpoint, "object_localization")
    assert len(pairs) >= 10
    truth = torch.tensor([record.box[:3] for record, _ in pairs])
    found = torch.tensor([answer.boxes[0].center for _, answer in pairs])
    error = (found - truth).norm(dim=1)
    assert error.median() < 0.6 * (truth - truth.mean(dim=0)).norm(dim=1).median()


def test_distances_of_a_new_room_follow_the_truth(checkpoint):
    pairs = answers_about(checkpoint, "object_abs_distance")
    values = [answer.values[0].si_value for _, answer in pairs]
    assert statistics.correlation(values, [record.value_si for record, _ in pairs]) > 0.5


def test_image_text_to_text_pipeline_answers_about_an_image(checkpoint):
    model, processor = checkpoint
    image = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Image.fromarray(image)},
                {"type": "text", "text": "How many plants?"},
            ],
        }
    ]
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    (result,) = ask(text=chat, max_new_tokens=4, return_full_text=False)
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    sequences = model.generate(**inputs, max_new_tokens=4)
    expected = processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert result["generated_text"] == expected
