# SPDX-License-Identifier: Apache-2.0
"""What is named is learned: boxes at the last token of a name, and the terms of the loss, by a loop over tokens."""

import dataclasses
import math
import statistics

import pytest
import torch

from geode.data.tokenizer import train_tokenizer
from geode.modeling_geode.regression_geode import encode_values
from geode.trainers.packing import block_mask
from geode.trainers.stage2_config import GeodeStage2Config
from geode.trainers.stage2_trainer import GeodeStage2Trainer
from geode.trainers.world_mentions import (
    BOX_TOKEN,
    MentionCollator,
    MentionTrainer,
    places_of_names,
    turns,
    unique_boxes,
)
from tests.trainers.common_collator import make_media, make_model, make_processor, make_records, text_record
from tests.trainers.common_training import settings, steps


BED, BIN = [1.0, 2.0, 0.5, 2.0, 1.5, 1.0, 0.0], [-1.0, 0.0, 0.25, 0.5, 0.5, 0.5, 0.5]


def test_boxes_are_those_of_categories_with_one_object():
    objects = [
        {"category": "bed", "box": BED},
        {"category": "chair", "box": BIN},
        {"category": "trash bin", "box": BIN},
        {"category": "chair", "box": BED},
    ]
    assert unique_boxes({"objects": objects}) == {"bed": BED, "trash bin": BIN}


class Written:
    """A collator of text alone."""

    def __init__(self, tokenizer):
        self.processor = dataclasses.make_dataclass("Processor", ["tokenizer"])(tokenizer)

    def __call__(self, examples):
        texts = [(example[0].prompt, example[0].answer_text) for example in examples]
        rows = [self.processor.tokenizer(list(text))["input_ids"] for text in texts]
        longest = max(len(asked + answered) for asked, answered in rows)
        ids = [[0] * (longest - len(asked + answered)) + asked + answered for asked, answered in rows]
        labels = [[-100] * (longest - len(answered)) + answered for _, answered in rows]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def test_boxes_stand_at_the_last_token_of_each_name():
    tokenizer = train_tokenizer(["How far is the bed from the trash bin?"], 300)
    boxes = {"a": {"bed": BED, "trash bin": BIN}, "b": {"bed": BIN}}
    prompts = {"a": "The trash bin, the bed, the trash and the bin.", "b": "The trash bin by the bed"}
    collator = MentionCollator(Written(tokenizer), boxes)
    batch = collator([[text_record(prompt, scene=scene)] for scene, prompt in prompts.items()])
    assert batch["mention_boxes"].shape == (*batch["input_ids"].shape, 7)
    for row, (scene, prompt) in enumerate(prompts.items()):
        ids, expected = batch["input_ids"][row], {}
        for category, box in boxes[scene].items():
            end = prompt.index(f" {category}") + len(category) + 1
            behind = sum(map(len, tokenizer([prompt[end:], "A room."])["input_ids"]))
            expected[len(ids) - behind - 1] = box
        named = ~batch["mention_boxes"][row].isnan().any(dim=-1)
        assert sorted(named.nonzero().flatten().tolist()) == sorted(expected)
        for column, box in expected.items():
            assert batch["mention_boxes"][row, column].tolist() == box


def test_options_stand_at_their_last_token_with_their_letters():
    tokenizer = train_tokenizer(["Options:\nA. left\nB. right\nC. front-left"], 300)
    texts = {
        "Where?\nOptions:\nA. left\nB. front-left\nC. right\nAnswer with the letter.\n": "B\n",
        "A. B. is it\nso?": "2.5",
    }
    collator = MentionCollator(Written(tokenizer), {"a": {"bed": BED}})
    batch = collator([[text_record(prompt, answer, scene="a")] for prompt, answer in texts.items()])
    found = {}
    for row, column in (batch["options"][..., 0] >= 0).nonzero().tolist():
        text = tokenizer.decode(batch["input_ids"][row, : column + 1])
        found[row, text.rpartition("\n")[2]] = batch["options"][row, column].tolist()
    assert found == {(0, "A. left"): [0, 0], (0, "B. front-left"): [1, 1], (0, "C. right"): [2, 0], (0, "B"): [1, 2]}
    assert batch["options"][batch["options"][..., 0] < 0].unique(dim=0).tolist() == [[-1, 0]]


def test_places_are_those_of_the_names_that_a_token_sees():
    is_named = torch.tensor([[0, 1, 0, 1, 1, 1, 1, 0]], dtype=torch.bool)
    # A prefix of two tokens, of which one names something, and questions of three tokens each.
    is_visible = block_mask(torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2]]))[:, 0]
    first, second, third = places_of_names(is_named, is_visible).tolist()
    assert first == [[-1, 1, 1, 1, 1, 1, 1, 1]]
    assert second == [[-1, -1, -1, 3, 3, 5, 5, 5]]
    assert third == [[-1, -1, -1, -1, 4, -1, 6, 6]]


@pytest.mark.parametrize(
    ("third", "degrees"),
    [((4.0, 1.0), 0.0), ((1.0, 5.0), 90.0), ((-1.0, 1.0), 180.0), ((1.0, 0.0), -90.0), ((2.0, 0.0), -45.0)],
)
def test_turn_is_positive_to_the_left(third, degrees):
    """One stands at (1, 1) and looks along +x."""
    centers = torch.tensor([[1.0, 1.0, 0.3], [3.0, 1.0, 2.0], [*third, 1.0]])
    angle = math.radians(degrees)
    torch.testing.assert_close(turns(centers), torch.tensor([math.sin(angle), math.cos(angle)]), atol=1e-6, rtol=0)


def test_turn_of_things_above_each_other_is_zero():
    assert turns(torch.zeros(3, 3)).tolist() == [0.0, 0.0]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_media(tmp_path_factory.mktemp("media"))


RECORDS = [dataclasses.replace(record, scene="one") for record in make_records(count=6)]
# Words that the questions have, which stand for categories.
BOXES = {"one": {"bed": BED, "the": BIN, "room": BED, "is": BIN, "of": BED, "to": BIN}}


def make_trainer(root, folder, kind=MentionTrainer, *, records=RECORDS, **changes):
    processor = make_processor()
    trainer = kind(
        make_model(processor),
        GeodeStage2Config(**settings(folder, root, **changes)),
        train_dataset=records,
        eval_dataset=records[:2],
        processing_class=processor,
    )
    if kind is MentionTrainer:
        trainer.data_collator = MentionCollator(trainer.data_collator, BOXES)
    return trainer


def terms_by_loop(trainer, states, boxes, is_visible) -> dict[str, float]:
    """The four terms of names, token by token."""
    network, heads = trainer.geode_model, trainer.heads
    entry, norm = network.drh.entries[BOX_TOKEN], network.model.language_model.norm
    box, place, later, turn = [], [], [[], [], []], []
    for row in range(len(boxes)):
        names = [column for column in range(boxes.shape[1]) if not boxes[row, column].isnan().any()]
        for column in range(boxes.shape[1]):
            seen = [name for name in names if is_visible[row, column, name]]
            if column in names:
                early = norm(states[trainer.name_layer][row, column])
                error = network.drh.heads["3DBBOX"](early) - encode_values(boxes[row, column], entry)
                box.append(error.square().mean().item())
                number = min(seen.index(column), 3)
                place.append(-heads.place(early).log_softmax(-1)[number].item())
            late = norm(states[trainer.box_layer][row, column])
            for number, name in enumerate(seen[:3]):
                error = heads.boxes[number](late) - encode_values(boxes[row, name], entry)
                later[number].append(error.square().mean().item())
            if len(seen) > 2:
                expected = turns(boxes[row, seen[:3], :3])
                error = heads.turn(norm(states[trainer.turn_layer][row, column])) - expected
                turn.append(error.square().mean().item())
    mean = statistics.fmean
    later_box = sum(mean(found) / 3 for found in later if found)
    return {"box": mean(box), "place": mean(place), "later_box": later_box, "turn": mean(turn)}


def option_terms_by_loop(trainer, states, logits, options) -> dict[str, float]:
    """The four terms of options, token by token; a question's options come before its answer."""
    letters, rights, answers, later, ends, last = [], [], [], [], [], 0
    letter_ids = trainer.processing_class.tokenizer.convert_tokens_to_ids(list("ABCD"))
    for row, column in (options[..., 0] >= 0).nonzero().tolist():
        letter, kind = options[row, column].tolist()
        state = trainer.geode_model.model.language_model.norm(states[row, column])
        if kind == 2:
            guess = trainer.heads.answer(torch.stack(ends).mean(dim=0))
            answers.append(-guess.log_softmax(-1)[letter].item())
            for waiting in range(last, column):
                later.append(-logits[row, waiting, letter_ids].log_softmax(-1)[letter].item())
            ends = []
            continue
        last = column
        ends.append(state)
        guess = trainer.heads.option(state)
        letters.append(-guess[1:].log_softmax(-1)[letter].item())
        rights.append(-(guess[0] if kind else -guess[0]).sigmoid().log().item())
    mean = statistics.fmean
    return {"letter": mean(letters), "right": mean(rights), "answer": mean(answers), "later_answer": mean(later)}


def test_terms_are_those_of_a_loop_and_are_added_to_the_loss(root, tmp_path):
    trainer = make_trainer(root, tmp_path)
    plain = make_trainer(root, tmp_path / "plain", GeodeStage2Trainer)
    batch = trainer.data_collator([RECORDS, RECORDS[:3]])
    boxes, is_visible = batch["mention_boxes"], batch["attention_mask"][:, 0]
    assert (is_visible & ~boxes.isnan().any(dim=-1)[:, None]).sum(dim=-1).max() > 3  # a question names more than three
    without = {name: value for name, value in batch.items() if name not in ("mention_boxes", "options")}
    outputs = trainer.model.eval()(**without, output_hidden_states=True)
    states = outputs.hidden_states
    with torch.no_grad():
        found = trainer.name_losses(states, boxes, is_visible)
        found |= trainer.option_losses(states[trainer.option_layer], outputs.logits, batch["options"], is_visible)
        expected = terms_by_loop(trainer, states, boxes, is_visible)
        expected |= option_terms_by_loop(trainer, states[-2], outputs.logits, batch["options"])
    assert {name: term.item() for name, term in found.items()} == pytest.approx(expected, rel=1e-4)
    assert (batch["options"][..., 1] == 2).sum() > 1  # questions with options
    weights = {"place": 0.3, "letter": 0.3}
    added = sum(weights.get(name, 1.0) * term for name, term in expected.items())
    loss = trainer.compute_loss(trainer.model.eval(), batch).item()
    assert loss == pytest.approx(plain.compute_loss(plain.model.eval(), without).item() + added, rel=1e-4)
    assert {"mention_boxes", "options"} <= batch.keys()  # the caller's batch stays whole


def test_layers_after_the_names_learn_nothing_from_their_boxes(root, tmp_path):
    trainer = make_trainer(root, tmp_path)
    batch = trainer.data_collator([RECORDS])
    boxes, options, is_visible = batch.pop("mention_boxes"), batch.pop("options"), batch["attention_mask"][:, 0]
    ends = {"box": trainer.name_layer, "place": trainer.name_layer}
    ends |= {"later_box": trainer.box_layer, "turn": trainer.turn_layer}
    ends |= {
        **dict.fromkeys(("letter", "right", "answer"), trainer.option_layer),
        "later_answer": trainer.option_layer + 1,
    }
    for term, last in ends.items():
        network = trainer.model.train()
        network.zero_grad()
        outputs = network(**batch, output_hidden_states=True)
        states = outputs.hidden_states
        terms = trainer.name_losses(states, boxes, is_visible)
        terms |= trainer.option_losses(states[trainer.option_layer], outputs.logits, options, is_visible)
        terms[term].backward()
        layers = network.model.language_model.layers
        learns = [any(p.grad is not None and p.grad.any() for p in layer.parameters()) for layer in layers]
        assert learns == [index < last for index in range(len(layers))], term


def test_nothing_named_adds_nothing(root, tmp_path):
    trainer = make_trainer(root, tmp_path)
    batch = trainer.data_collator([RECORDS])
    batch["mention_boxes"].fill_(torch.nan)
    batch["options"].fill_(-1)
    without = {name: value for name, value in batch.items() if name not in ("mention_boxes", "options")}
    losses = [trainer.compute_loss(trainer.model.eval(), inputs) for inputs in (without, batch)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    losses[1].backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in trainer.model.parameters())


def test_training_without_its_collator_is_refused(root, tmp_path):
    trainer = make_trainer(root, tmp_path, max_steps=1)
    trainer.data_collator = trainer.data_collator.collator
    with pytest.raises(ValueError, match="`data_collator` must be a `MentionCollator`"):
        trainer.train()


def test_interrupted_run_goes_on_with_the_heads_that_it_had(root, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    whole = make_trainer(root, tmp_path / "whole", **options)
    before = {name: value.clone() for name, value in whole.heads.state_dict().items()}
    whole.train()
    assert all(not torch.equal(before[name], value) for name, value in whole.heads.state_dict().items())
    resumed = make_trainer(root, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in whole.heads.state_dict().items():
        torch.testing.assert_close(resumed.heads.state_dict()[name], value)
    losses = [[entry["loss"] for entry in steps(trainer)] for trainer in (whole, resumed)]
    assert losses[1][-2:] == pytest.approx(losses[0][-2:], rel=1e-5)
    assert {"names/box", "names/place", "names/later_box", "names/turn", "names/letter", "names/answer"} <= steps(
        whole
    )[0].keys()
    assert whole.evaluate()["eval_loss"] > 0
    # The heads are no part of the model.
    assert not any("heads" in name and not name.startswith("drh.") for name in whole.model.state_dict())
