# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of the tiny model, and its text."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from geode.data.schemas import Record, benchmark_prompt
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.trainers import world_language
from geode.trainers.world_language import NUM_OTHERS, draw_objects, language_gate, pretrain_language_model, text_of
from geode.trainers.world_model import frequent_phrases, make_config, make_processor


NAMES = ["bed", "tv", "tv stand", "lamp"]
SCENE = {"objects": [{"category": "bed", "box": [1.0, 2.0, 0.25, 2.0, 1.5, 0.5, 0.0]}]}


def make_record(number: int, **fields) -> Record:
    plain = {"uid": str(number), "source": "rooms", "media_type": "video", "media": "a.mp4", "scene": "a"}
    return Record(**{**plain, "kind": "number", "answer_text": "1.5", **fields})


@pytest.fixture(scope="module")
def records() -> list[Record]:
    found = []
    for number in range(60):
        first, second = NAMES[number % 4], NAMES[(number + 1) % 4]
        question = f"Measuring from the closest point, how far is the {first} from the {second} (in meters)?"
        options = ["A. left", "B. right"] if number % 3 == 0 else None
        found.append(
            make_record(
                number,
                prompt=benchmark_prompt(question, options),
                question_type="object_abs_distance",
                value_si=1.0 + number / 50,
                rationale=f"The {first} is at (1.25, {number / 10:.2f}). Answer: turn left.",
            )
        )
    boxes = [[0.1 * n, -0.2 * n, 0.5 + n, 1.0 + n, 1.0 + 0.2 * n, 0.5 + 0.3 * n, 0.1] for n in range(8)]
    return found + [make_record(60 + number, prompt="Locate the bed.", box=box) for number, box in enumerate(boxes)]


def test_frequent_phrases_hold_neither_names_nor_numbers(records):
    phrases = frequent_phrases([record.prompt for record in records], NAMES)
    assert "Measuring from the closest point, how far is the" in phrases
    assert " from the" in phrases
    assert not [phrase for phrase in phrases if any(name in phrase.split() for name in NAMES)]
    assert not [phrase for phrase in phrases if any(character.isdigit() for character in phrase)]


def test_codecs_have_the_statistics_of_the_encoded_targets(records):
    """Metres and square metres by log1p, a box's centre as it is, its sizes by their logarithms."""
    codecs = {name: entry["codec"] for name, entry in make_processor(records, NAMES).control_tokens.items()}
    numbers = [math.log1p(record.value_si) for record in records if record.value_si is not None]
    assert codecs["<REG>"]["mean"] == pytest.approx([statistics.mean(numbers)])
    boxes = [record.box for record in records if record.box is not None]
    columns = [[box[0] for box in boxes], [math.log(box[4]) for box in boxes]]
    found = [(codecs["<3DBBOX>"]["mean"][place], codecs["<3DBBOX>"]["std"][place]) for place in (0, 4)]
    assert found == [pytest.approx((statistics.mean(values), statistics.stdev(values))) for values in columns]


def test_tokenizer_shortens_boilerplate_and_spells_everything_else(records):
    tokenizer = make_processor(records, NAMES).tokenizer
    prompt = records[0].prompt
    ids = tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(ids) == prompt
    # 3 lines, 2 names, 4 phrases, and options of 3 tokens with their line ends; a plain BPE has one for each word at least.
    assert len(ids) < 25 < len(prompt.split())
    # What decides is a token of its own wherever it stands.
    (left,) = tokenizer(" left")["input_ids"]
    assert left in ids
    assert left in tokenizer(records[0].rationale)["input_ids"]
    for text in ("x1.25, -0.7", "Measuring from", "Stra\u00dfe \u4f60 <REG>", "tv stands"):
        assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text
    assert len(tokenizer("31.25")["input_ids"]) == 5


def test_language_model_learns_from_text_alone_by_its_seed(records):
    processor = make_processor(records, NAMES)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = GeodeForConditionalGeneration(make_config(processor))
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        options = {"scenes": {"a": SCENE}, "num_steps": 12, "batch_size": 2, "length": 96, "seed": seed}
        losses.append(pretrain_language_model(model, processor.tokenizer, records, **options))
        changed = {name for name in start if not torch.equal(start[name], model.state_dict()[name])}
        assert {name.split(".")[1] for name in changed} <= {"language_model", "weight"}
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] < math.log(len(processor.tokenizer))


def test_three_of_four_chats_begin_with_a_list(records, monkeypatch):
    listed = []

    def write(record, objects=()):
        listed.append(bool(objects))
        return text_of(record, objects)

    monkeypatch.setattr(world_language, "text_of", write)
    processor = make_processor(records, NAMES)
    model = GeodeForConditionalGeneration(make_config(processor))
    options = {"scenes": {"a": SCENE}, "num_steps": 4, "batch_size": 8, "length": 512}
    pretrain_language_model(model, processor.tokenizer, records, **options)
    assert len(listed) > 100
    # Four standard deviations of the binomial.
    assert abs(sum(listed) / len(listed) - 0.75) < 4 * (0.75 * 0.25 / len(listed)) ** 0.5


def test_text_of_lists_things_before_the_question(records):
    listed = text_of(records[0], SCENE["objects"])
    assert "user\nThe bed is at (1.00, 2.00, 0.25) and measures 2.00 x 1.50 x 0.50 m.\nThese are frames" in listed
    assert listed.endswith("Answer: turn left.<|im_end|>\n")
    assert text_of(records[0]) == listed.replace(listed.partition("user\n")[2].partition("These")[0], "")


def test_what_is_listed_is_what_is_named_and_a_few_things_more():
    """With all of a room a list was longer than a row, and nothing was ever looked up in it."""
    box = [1.0, 2.0, 0.25, 2.0, 1.5, 0.5, 0.0]
    names = ["bed", "lamp", "lamp", "lampshade", *(f"thing {number}" for number in range(20))]
    scene = {"objects": [{"category": name, "box": box, "id": number} for number, name in enumerate(names)]}
    record = make_record(0, prompt="How far is the bed?", rationale="The lamp is near.")
    found = [draw_objects(record, scene, torch.Generator().manual_seed(seed)) for seed in range(6)]
    for objects in found:
        ids = [entry["id"] for entry in objects]
        assert {0, 1, 2} < set(ids)
        assert len(ids) == len(set(ids)) == 3 + NUM_OTHERS
    # What is asked about is not told by its place.
    assert len({objects[0]["id"] in (0, 1, 2) for objects in found}) == 2
    assert len({tuple(entry["id"] for entry in objects) for objects in found}) > 3
    assert draw_objects(record, SCENE, torch.Generator()) == SCENE["objects"]


def test_language_gate_is_the_loss_of_rationales_after_lists(records):
    """A model that copies from the list tells its own room from another one; one at random does not."""
    processor = make_processor(records, NAMES)
    torch.manual_seed(0)
    model = GeodeForConditionalGeneration(make_config(processor)).eval()
    far = {"objects": [{**SCENE["objects"][0], "box": [3.0, -3.0, 1.25, 0.5, 0.5, 0.5, 0.0]}]}
    asked = [replace(record, scene="ab"[number % 2]) for number, record in enumerate(records)]
    options = {"scenes": {"a": SCENE, "b": far}, "num_records": 4}
    found = language_gate(model, processor.tokenizer, asked, **options)
    assert found == language_gate(model, processor.tokenizer, asked, **options)
    assert set(found) == {"listed", "other_listed", "unlisted"}
    assert len(set(found.values())) == 3
    # By hand, for one record without a list: the mean over the tokens of its rationale and of its end.
    record = next(record for record in asked if record.rationale)
    ids = processor.tokenizer(text_of(record))["input_ids"]
    length = len(processor.tokenizer(f"{record.rationale}<|im_end|>\n")["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(dim=-1)
    losses = -logits.gather(1, torch.tensor(ids[1:])[:, None])[-length:]
    alone = language_gate(model, processor.tokenizer, [record, record], **options)
    assert alone["unlisted"] == pytest.approx(losses.mean().item(), rel=1e-4)
