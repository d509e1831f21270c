# SPDX-License-Identifier: Apache-2.0
"""The shipped checkpoint is what its card says, and plain `Trainer` trains the model."""

import json

import pytest
import torch
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments, pipeline, set_seed

import geode
from geode.data.synthetic_rooms.questions import prompt_of
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.trainers.tiny import SceneQuestions, evaluate, make_config, make_processor, read_rows


@pytest.fixture(scope="module")
def checkpoint():
    folder = geode.tiny_checkpoint()
    return AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_auto_classes_give_the_models_own_classes(checkpoint):
    model, processor = checkpoint
    assert type(model) is geode.GeodeForConditionalGeneration
    assert type(processor) is geode.GeodeProcessor


def test_shipped_checkpoint_is_small_and_answers_as_its_card_says(checkpoint):
    folder = geode.tiny_checkpoint()
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 15 * 2**20
    facts = json.loads((folder / "facts.json").read_text("utf-8"))
    rows = read_rows(geode.embedded_scene())[:26]
    measured = evaluate(*checkpoint, rows, geode.embedded_scene())
    assert measured["questions"] == 26
    # The card's figures are over all questions; those of the demo are among them.
    assert measured["max_relative_error"] <= facts["max_relative_error"] + 1e-3
    assert measured["max_center_error_m"] <= facts["max_center_error_m"] + 1e-3
    assert measured["median_relative_error"] < 0.1
    assert measured["median_center_error_m"] < 0.3
    card = (folder / "README.md").read_text("utf-8")
    assert f"{facts['choices_right']:.1%}" in card


def test_plain_trainer_lowers_both_losses(tmp_path):
    set_seed(0)
    folder = geode.embedded_scene()
    rows = [row for row in read_rows(folder) if row["question_type"] in ("object_counting", "object_localization")][:8]
    processor = make_processor(rows)
    model = GeodeForConditionalGeneration(make_config(processor))
    questions = SceneQuestions(processor, rows, folder)
    batch = questions.collate([questions[index] for index in range(len(rows))])
    before = model(**batch)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=40,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        remove_unused_columns=False,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=questions, data_collator=questions.collate)
    trainer.train()
    after = model(**batch)
    assert after.ce_loss < 0.2 * before.ce_loss
    assert after.regression_loss < 0.6 * before.regression_loss


def test_image_text_to_text_pipeline_answers_about_an_image(checkpoint):
    model, processor = checkpoint
    image = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    from PIL import Image

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


def test_questions_keep_their_options(checkpoint):
    row = {"question": "Which is closest?", "options": ["A. sofa", "B. door"]}
    assert prompt_of(row) == "Which is closest?\nOptions:\nA. sofa\nB. door"
