# SPDX-License-Identifier: Apache-2.0
"""
Teach the language model what a question is about, in the curriculum of the embedded world.

A distance needs two boxes and a direction three. What answers "Locate the ..." looks its one thing up at the token that is regressed,
and never learns to look up several: distances and directions then stay where guessing is. So three things are learned beside the
answers, each one a step of what they need, wherever a question names things of which the room has one:

1. the state of a name, after two fifths of the layers, has the box of what it names, read by the head of `<3DBBOX>`;
2. the same state knows whether it is the first, second or third name of its question;
3. every later token of the question and of its answer has the boxes of those names, a fifth of the layers on;
4. and after another fifth, where the third is from the first for one who faces the second;
5. before the last layer, the last token of each option knows the option's letter, and whether it is the right one; the mean over the
   options of a question has the letter of the right one; and every token between options and answer would answer with it.

What reads 2 to 5 is thrown away.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from geode.modeling_geode.regression_geode import encode_values, encoded_dim
from geode.trainers.collator import Example, GeodeDataCollator, records_of
from geode.trainers.stage2_trainer import GeodeStage2Trainer


BOX_TOKEN, BOX_DIM = "<3DBBOX>", 7
NUM_PLACES = 3  # the first, second and third name of a question
PLACE_WEIGHT = 0.3
LETTERS, NO_OPTION, ANSWER = "ABCD", -1, 2
HEADS_FILE = "name_heads.safetensors"


def unique_boxes(scene: dict) -> dict[str, list[float]]:
    """
    Return the boxes of the categories of which a scene has one object.

    Args:
        scene (`dict`): The record of a scene.

    Returns:
        `dict[str, list[float]]`: By category, seven numbers each.
    """
    found: dict[str, list] = {}
    for entry in scene["objects"]:
        found.setdefault(entry["category"], []).append(entry["box"])
    return {category: boxes[0] for category, boxes in found.items() if len(boxes) == 1}


class MentionCollator:
    """
    Adds to the batches of a collator which thing each token names.

    Args:
        collator ([`GeodeDataCollator`]): Makes packs; every example of them has something to learn.
        boxes (`dict[str, dict[str, list[float]]]`): By scene and category; see [`unique_boxes`].

    A batch has `mention_boxes` too, of shape `(batch_size, sequence_length, 7)`: boxes in SI units at the last token of each name, NaN
    elsewhere. And `options` of shape `(batch_size, sequence_length, 2)`: at the last token of each option its letter from 0, and 1 if it
    is the right one, otherwise 0; at the letter that answers, this letter and 2; -1 and 0 elsewhere.
    """

    def __init__(self, collator: GeodeDataCollator, boxes: Mapping[str, Mapping[str, Sequence[float]]]):
        self.collator, self.boxes = collator, boxes
        categories = sorted({category for found in boxes.values() for category in found})
        ids = collator.processor.tokenizer([f" {category}" for category in categories])["input_ids"]
        self.names = [(category, torch.tensor(tokens)) for category, tokens in zip(categories, ids, strict=True)]
        self.letters = collator.processor.tokenizer.convert_tokens_to_ids(list(LETTERS))
        (self.dot,), (self.line_end,) = collator.processor.tokenizer([".", "\n"])["input_ids"]

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Make a batch."""
        batch = self.collator(examples)
        scenes = [records_of(example)[0].scene for example in examples]
        boxes = [self._mentioned(ids, scene) for ids, scene in zip(batch["input_ids"], scenes, strict=True)]
        options = [
            self._options(*row) for row in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        ]
        return {**batch, "mention_boxes": torch.stack(boxes), "options": torch.tensor(options)}

    def _mentioned(self, input_ids: torch.Tensor, scene: str) -> torch.Tensor:
        found = torch.full((len(input_ids), BOX_DIM), torch.nan)
        for category, tokens in self.names:
            box = self.boxes[scene].get(category)
            if box is None:
                continue
            (starts,) = (input_ids.unfold(0, len(tokens), 1) == tokens).all(dim=1).nonzero(as_tuple=True)
            found[starts + len(tokens) - 1] = torch.tensor(box)
        return found

    def _options(self, input_ids: list[int], labels: list[int]) -> list[list[int]]:
        found, answer, end = [[NO_OPTION, 0] for _ in input_ids], None, None
        # From the end, for an answer is behind its options.
        for position in range(len(input_ids) - 2, 0, -1):
            token = input_ids[position]
            if labels[position] in self.letters:
                answer = position
            elif token == self.line_end:
                end = position
            elif token in self.letters and input_ids[position + 1] == self.dot and None not in (answer, end):
                found[end - 1] = [self.letters.index(token), int(token == input_ids[answer])]
                found[answer] = [self.letters.index(input_ids[answer]), ANSWER]
        return found


def places_of_names(is_named: torch.Tensor, is_visible: torch.Tensor) -> torch.Tensor:
    """
    Find the first names that each token sees before it.

    Args:
        is_named (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Where names end.
        is_visible (`torch.BoolTensor` of shape `(batch_size, sequence_length, sequence_length)`): Whether the token of the second
            dimension sees that of the third.

    Returns:
        `torch.LongTensor` of shape `(3, batch_size, sequence_length)`: Positions of the first, second and third name, -1 where there
        is none.
    """
    names = is_visible & is_named[:, None]
    order = names.cumsum(dim=-1) * names
    places = [order == place for place in range(1, NUM_PLACES + 1)]
    return torch.stack([torch.where(hits.any(-1), hits.int().argmax(-1), -1) for hits in places])


def turns(centers: torch.Tensor) -> torch.Tensor:
    """
    Compute where a third thing is for one who stands at a first and faces a second.

    Args:
        centers (`torch.Tensor` of shape `(..., 3, 3)`): Centres of the three, in metres; z is up.

    Returns:
        `torch.Tensor` of shape `(..., 2)`: Sine and cosine of the turn about +z: (0, 1) is ahead, (1, 0) left, (-1, 0) right. Zeros
        where two of them stand above each other.

    Example:
    ```python
    >>> turns(torch.tensor([[0.0, 0.0, 0.5], [2.0, 0.0, 1.0], [0.0, 3.0, 0.0]]))  # faces +x, and +y is left
    tensor([1., 0.])

    ```
    """
    ahead, aside = (centers[..., place, :2] - centers[..., 0, :2] for place in (1, 2))
    sine = ahead[..., 0] * aside[..., 1] - ahead[..., 1] * aside[..., 0]
    return F.normalize(torch.stack([sine, (ahead * aside).sum(dim=-1)], dim=-1), dim=-1)


class NameHeads(nn.Module):
    """
    What reads states for the terms 2 to 5, and is thrown away.

    Args:
        hidden_size (`int`): Of the language model.
        box_dim (`int`): Of an encoded box.
    """

    def __init__(self, hidden_size: int, box_dim: int):
        super().__init__()
        self.place = nn.Linear(hidden_size, NUM_PLACES + 1)  # the last is "a later one"
        self.boxes = nn.ModuleList(_perceptron(hidden_size, box_dim) for _ in range(NUM_PLACES))
        self.turn = nn.Linear(hidden_size, 2)
        self.option = nn.Linear(hidden_size, len(LETTERS) + 1)
        self.answer = nn.Linear(hidden_size, len(LETTERS))


def _perceptron(hidden_size: int, out_size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, out_size))


class MentionTrainer(GeodeStage2Trainer):
    """
    A [`GeodeStage2Trainer`] that also learns what is named, where its batches are those of [`MentionCollator`].

    The terms are means over the tokens of a micro-batch, and are logged as `names/...`. Evaluations have none.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.geode_model.config
        depth = config.text_config.num_hidden_layers
        self.name_layer, self.box_layer, self.turn_layer = (max(1, fifths * depth // 5) for fifths in (2, 3, 4))
        self.option_layer = max(1, depth - 1)
        self.entry = config.control_tokens[BOX_TOKEN]
        self.heads = NameHeads(config.text_config.hidden_size, encoded_dim(self.entry)).to(self.args.device)
        self._terms: dict[str, list[float]] = {}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser of stage 2, and let it train the heads."""
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            settings = {"lr": self.args.drh_learning_rate, "weight_decay": 0.0}
            optimizer.add_param_group({"params": list(self.heads.parameters()), **settings})
            # The library clears the gradients of the model, of which the heads are no part.
            optimizer.register_step_post_hook(lambda *_: self.heads.zero_grad())
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Add the terms to the loss."""
        inputs = dict(inputs)
        boxes = inputs.pop("mention_boxes", None)
        options = inputs.pop("options", None)
        if boxes is None:
            if model.training:
                raise ValueError(
                    "`data_collator` must be a `MentionCollator`, got batches without `mention_boxes`. Wrap it in one."
                )
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, {**inputs, "output_hidden_states": True}, True, num_items_in_batch)
        terms = self.name_losses(outputs.hidden_states, boxes, inputs["attention_mask"][:, 0])
        seen = (outputs.hidden_states[self.option_layer], outputs.logits, options, inputs["attention_mask"][:, 0])
        terms |= self.option_losses(*seen)
        for name, term in terms.items():
            self._terms.setdefault(f"names/{name}", []).append(term.item())
        loss = loss + terms["box"] + PLACE_WEIGHT * terms["place"] + terms["later_box"] + terms["turn"]
        loss = loss + PLACE_WEIGHT * terms["letter"] + terms["right"] + terms["answer"] + terms["later_answer"]
        return (loss, outputs) if return_outputs else loss

    def option_losses(
        self, states: torch.Tensor, logits: torch.Tensor, options: torch.Tensor, is_visible: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        Compute the terms of options.

        Args:
            states (`torch.Tensor` of shape `(batch_size, length, hidden_size)`): Before the last layer.
            logits (`torch.Tensor` of shape `(batch_size, length, vocab_size)`): Of the next token.
            options (`torch.LongTensor` of shape `(batch_size, length, 2)`): See [`MentionCollator`].
            is_visible (`torch.BoolTensor` of shape `(batch_size, length, length)`): The mask of a pack.

        Returns:
            `dict[str, torch.Tensor]`: `letter`, `right`, `answer` and `later_answer`, of shape `()`.
        """
        states = self.geode_model.model.language_model.norm(states)
        is_answer = options[..., 1] == ANSWER
        is_end = (options[..., 0] != NO_OPTION) & ~is_answer
        letters, rights = options[is_end].unbind(dim=-1)
        guesses = self.heads.option(states[is_end])
        # What attention that is still uniform makes of the options of a question.
        seen = (is_visible & is_end[:, None]).to(states.dtype)
        counts = seen.sum(dim=-1)
        rows, places = is_answer.nonzero(as_tuple=True)
        pooled = (seen @ states)[rows, places] / counts[rows, places, None]
        answers = options[rows, places, 0]
        # Tokens that have seen all options of a question, up to the one before its answer.
        waits = is_visible[rows, places] & (counts[rows] == counts[rows, places, None])
        waits &= torch.arange(waits.shape[1], device=waits.device) < places[:, None]
        which, columns = waits.nonzero(as_tuple=True)
        ids = self.processing_class.tokenizer.convert_tokens_to_ids(list(LETTERS))
        later = logits[rows[which], columns][:, ids]
        sums = {
            "letter": (F.cross_entropy(guesses[:, 1:], letters, reduction="sum"), letters),
            "right": (F.binary_cross_entropy_with_logits(guesses[:, 0], rights.float(), reduction="sum"), letters),
            "answer": (F.cross_entropy(self.heads.answer(pooled), answers, reduction="sum"), answers),
            "later_answer": (F.cross_entropy(later, answers[which], reduction="sum"), which),
        }
        return {name: found / max(1, len(items)) for name, (found, items) in sums.items()}

    def name_losses(
        self, hidden_states: Sequence[torch.Tensor], boxes: torch.Tensor, is_visible: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        Compute the terms.

        Args:
            hidden_states (`Sequence[torch.Tensor]`): Of the embeddings and after each layer, `(batch_size, length, hidden_size)` each.
            boxes (`torch.Tensor` of shape `(batch_size, length, 7)`): See [`MentionCollator`].
            is_visible (`torch.BoolTensor` of shape `(batch_size, length, length)`): The mask of a pack.

        Returns:
            `dict[str, torch.Tensor]`: `box`, `place`, `later_box` and `turn`, of shape `()`.
        """
        norm = self.geode_model.model.language_model.norm
        is_named = ~boxes.isnan().any(dim=-1)
        early = norm(hidden_states[self.name_layer][is_named])
        late, last = norm(hidden_states[self.box_layer]), norm(hidden_states[self.turn_layer])
        ids = torch.full((1, len(early)), self.entry["token_id"], device=early.device)
        places = places_of_names(is_named, is_visible)
        own = (is_visible & is_named[:, None]).sum(dim=-1)[is_named] - 1
        later = [late.sum() * 0.0]
        for head, place in zip(self.heads.boxes, places, strict=True):
            rows, columns = (place >= 0).nonzero(as_tuple=True)
            expected = encode_values(boxes[rows, place[rows, columns]], self.entry)
            if len(rows):
                later.append((head(late[rows, columns]) - expected).square().mean() / NUM_PLACES)
        rows, columns = (places[-1] >= 0).nonzero(as_tuple=True)
        centers = boxes[rows[:, None], places[:, rows, columns].T, :3]
        turn_errors = (self.heads.turn(last[rows, columns]) - turns(centers)).square().sum()
        place_loss = F.cross_entropy(self.heads.place(early), own.clamp(max=NUM_PLACES), reduction="sum")
        return {
            "box": self.geode_model.drh(early[None], ids, boxes[is_named][None]).loss,
            "place": place_loss / max(1, len(own)),
            "later_box": torch.stack(later).sum(),
            "turn": turn_errors / max(1, 2 * len(rows)),
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; with a window's training loss go the means of the terms."""
        if "loss" in logs:
            logs |= {name: sum(found) / len(found) for name, found in self._terms.items()}
            self._terms.clear()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        save_file(self.heads.state_dict(), Path(output_dir or self.args.output_dir) / HEADS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.heads.load_state_dict(load_file(Path(resume_from_checkpoint) / HEADS_FILE))


__all__ = ["MentionCollator", "MentionTrainer", "NameHeads", "places_of_names", "unique_boxes"]
