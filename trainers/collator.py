# SPDX-License-Identifier: Apache-2.0
"""From records to the inputs of the model, with labels, regression targets and masks: the collator of every stage."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from geode.data.feature_store import FeatureStore
from geode.data.messages import messages_from_record
from geode.data.schemas import Record
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.modeling_geode.shown_geode import shown
from geode.trainers.packing import IGNORED_LABEL, TokenRow, pack_questions, pad_rows, scene_key
from geode.trainers.scene_media import TOKEN_INPUTS, SceneLoader, SceneMedia, ScenePlace, collate_media


logger = logging.getLogger(__name__)

TARGETS = ("answer", "rationale")
OVERLONG = ("error", "drop")
_MEDIA_TYPES = ("video", "image", "scene")
Example = Record | dict | Sequence[Record | dict]


@dataclass(kw_only=True)
class GeodeDataCollator:
    """
    Makes batches for [`GeodeForConditionalGeneration`] from records, for plain `transformers.Trainer` as well.

    An example is a record, the dict of one, or a list of them about one scene, which become one row with one shared
    prefix: see [`ScenePacks`] and `geode.trainers.packing`. Every assistant turn is learned, its end token included;
    everything else has the label -100. Tokens after the last learned one teach nothing and are left out.

    > Parameters of the media

    Args:
        processor ([`GeodeProcessor`]):
            Makes tokens and tensors.
        media_root (path, or `dict[str, path]`, *optional*):
            Folder that the paths of records are relative to; with a dict, the folder of each `source`.
        geometry (`str` or `Callable`, *optional*):
            Where the geometry of records without one is, such as `"geometry/{stem}"`: see [`SceneLoader`].
        use_geometry (`bool`, defaults to `True`):
            False leaves geometry and `<spatio>` tokens out, even where geometry is given.
        feature_store ([`FeatureStore`] or `dict[str, FeatureStore]`, *optional*):
            Features of videos computed before, instead of clouds and frames: see [`SceneLoader`]. Its
            [`~FeatureStore.check`] compares it with the model.
        num_cached_scenes (`int`, defaults to 2):
            Scenes that are kept from batch to batch. Within a batch each is loaded once.

    > Parameters of the targets

    Args:
        target (`str`, defaults to `"answer"`):
            What is learned: `"answer"`, or `"rationale"` for stage 1 of the paper.
        keep_visual_tokens (`bool`, defaults to `False`):
            With `target="rationale"`, also show the language model the frames. Otherwise they reach it only through the
            `<spatio>` tokens.
        with_values (`bool`, defaults to `True`):
            Numbers and boxes are control tokens with regression targets. False writes them as text: the baseline of
            digits.
        regress_suspect (`bool`, defaults to `False`):
            Also regress values whose published label is known to be wrong. Otherwise their control token is learned as text
            and its value is not.
        num_rationale_tokens (`int`, *optional*):
            `<spatio>` tokens per scene, if fewer than the processor's. It may be set anew from batch to batch.
        sample_num_rationale_tokens (`Sequence[int]`, *optional*):
            Numbers of which each batch takes one, so that a model learns to do with fewer. The records of the batch and
            `seed` decide which.
        rationale_from_answer (`bool`, defaults to `False`):
            With `target="rationale"`, a free text of one turn without a rationale is one itself.
        seed (`int`, defaults to 0):
            See `sample_num_rationale_tokens`.

    > Parameters of a control experiment

    Args:
        shown_scenes (`dict`, *optional*):
            Records by [`scene_key`], whose scenes are shown in the place of the true ones: see [`exchanged_scenes`]. Questions
            and targets stay as they are.

    > Parameters of the rows

    Args:
        max_length (`int`, *optional*):
            Largest number of tokens of a question with its scene; a pack, which holds the scene once, is longer. What is cut
            is the end of the answer. Placeholders, prompt, control tokens and the token after each of these, which receives
            the value's embedding, are never cut.
        overlong (`str`, defaults to `"error"`):
            What becomes of a record that cannot be cut to `max_length`: `"error"`, or `"drop"`, counted in `num_dropped` and
            in the log. Where nothing else is left of a batch, the scene of its first record stays without a label, so that
            training goes on, in step with other processes: its loss and its gradients are 0.
        padding_side (`str`, defaults to `"right"`):
            `"left"` or `"right"`.
        pad_to_multiple_of (`int`, *optional*):
            Rows are padded to a multiple of it.

    Example:
        ```python
        collator = GeodeDataCollator(processor=processor, media_root="data", geometry="geometry/{stem}")
        packs = ScenePacks(records, questions_per_pack=8)
        args = TrainingArguments("out", remove_unused_columns=False)
        Trainer(model=model, args=args, train_dataset=packs, data_collator=collator).train()
        ```
    """

    processor: GeodeProcessor
    media_root: str | os.PathLike | Mapping[str, str | os.PathLike] | None = None
    geometry: str | Callable[[Record], object] | None = None
    use_geometry: bool = True
    feature_store: FeatureStore | Mapping[str, FeatureStore] | None = None
    num_cached_scenes: int = 2
    target: str = "answer"
    keep_visual_tokens: bool = False
    with_values: bool = True
    regress_suspect: bool = False
    num_rationale_tokens: int | None = None
    sample_num_rationale_tokens: Sequence[int] | None = None
    rationale_from_answer: bool = False
    seed: int = 0
    shown_scenes: Mapping[tuple, Example] | None = None
    max_length: int | None = None
    overlong: str = "error"
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None
    num_dropped: int = field(default=0, init=False)
    _has_warned_of_empty_batch: bool = field(default=False, init=False, repr=False)

    def __post_init__(self):
        for name, allowed in (("target", TARGETS), ("overlong", OVERLONG), ("padding_side", ("left", "right"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
        for name in ("max_length", "pad_to_multiple_of", "num_rationale_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1 or None, got {value!r}.")
        if self.target == "rationale" and not self.use_geometry:
            raise ValueError(
                "`target='rationale'` trains the rationale module, which needs geometry: got `use_geometry=False`."
            )
        most = self.processor.num_rationale_tokens
        for value in self.sample_num_rationale_tokens or ():
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(
                    f"`sample_num_rationale_tokens` must hold whole numbers from 1 to {most}, as many as the processor has, got "
                    f"{list(self.sample_num_rationale_tokens)}."
                )
        self._loader = SceneLoader(
            self.processor,
            media_root=self.media_root,
            geometry=self.geometry,
            use_geometry=self.use_geometry,
            feature_store=self.feature_store,
            num_cached_scenes=self.num_cached_scenes,
        )

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """
        Make a batch.

        Args:
            examples (`Sequence`): Records, dicts of records, or lists of them about one scene.

        Returns:
            `dict[str, torch.Tensor]`: Arguments of the model. With packs, `attention_mask` is boolean, of shape
            `(batch_size, 1, sequence_length, sequence_length)`.

        Raises:
            FileNotFoundError: If a medium or geometry is missing.
            ValueError: If there are no examples, a record lacks what its target needs, counts more frames than its video
                has, or is longer than `max_length`.
        """
        if not isinstance(examples, Sequence) or isinstance(examples, str | bytes):
            raise TypeError(f"A batch must be a list of records, got {shown(examples)}.")
        if not len(examples):
            raise ValueError("A batch must hold at least one example, got none.")
        rows, media, questions = [], [], []
        spare = None
        loaded: dict[tuple, SceneMedia] = {}
        packs = [records_of(example) for example in examples]
        num_rationale_tokens = self._draw_num_rationale_tokens(packs)
        for records in packs:
            self._check_pack(records)
            key = scene_key(records[0])
            medium = loaded[key] = loaded.get(key) or self._loader.load(self._shown(records[0]))
            found = self._rows(records, medium, num_rationale_tokens)
            kept = [entry for entry in found if self._teaches(entry[0])]
            if not kept:
                spare = spare or (*found[0], medium)
                continue
            pack = [row for row, _ in kept]
            rows.append(pack[0] if len(pack) == 1 else self._packed(pack))
            media.append(medium)
            questions += [question for _, question in kept[:1] if question is not None]
        if spare is not None and not rows:
            self._warn_of_empty_batch(len(examples))
            row, question, medium = spare
            rows, media, questions = [row], [medium], [] if question is None else [question]
        batch = pad_rows(
            rows,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            padding_side=self.padding_side,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        return {**batch, **self._padded_questions(questions), **collate_media(media), **self._switches()}

    def prompt(self, *records: Record | dict) -> dict[str, torch.Tensor]:
        """
        Make the inputs of `generate` for questions: scenes, conversations up to the last answer, and no answer.

        Args:
            *records ([`Record`] or `dict`): The questions, of any scenes.

        Returns:
            `dict[str, torch.Tensor]`: Arguments of the model for a batch of them, padded on the left.

        Raises:
            ValueError: If there are no questions.
        """
        if not records:
            raise ValueError("A prompt must hold at least one question, got none.")
        rows, media = [], []
        for example in records:
            (record,) = records_of(example)
            medium = self._loader.load(self._shown(record))
            inputs = self.processor.apply_chat_template(
                self._turns(record, medium)[:-1],
                tokenize=True,
                return_dict=True,
                add_generation_prompt=True,
                use_geometry=self.use_geometry,
                num_rationale_tokens=self.num_rationale_tokens,
            )
            rows.append({name: tensor[0] for name, tensor in inputs.items() if name in TOKEN_INPUTS})
            media.append(medium)
        for row in rows:  # a question without media has no types
            row.setdefault("mm_token_type_ids", torch.zeros_like(row["input_ids"]))
        fill = dict.fromkeys(("input_ids", "question_input_ids"), self.processor.tokenizer.pad_token_id)
        tokens = {
            name: pad_sequence(
                [row[name] for row in rows], batch_first=True, padding_value=fill.get(name, 0), padding_side="left"
            )
            for name in rows[0]
        }
        return {**tokens, **collate_media(media), **self._switches()}

    def expected_answer(self, record: Record | dict) -> str:
        """
        Return what is learned of a question, as text; a box is in the frame of its scene.

        Args:
            record ([`Record`] or `dict`): The question.

        Returns:
            `str`: The answer or the rationale.
        """
        (record,) = records_of(record)
        if self.target == "rationale":
            return rationale_of(record, from_answer=self.rationale_from_answer) or ""
        if record.box is None or not self.with_values:
            return record.answer_text
        box = self._loader.box_in_scene(record, self._loader.load(record))
        return str([round(value, 3) for value in box])

    def _shown(self, record: Record) -> Record:
        """The record whose scene is shown: its own, but for the control experiment."""
        if self.shown_scenes is None:
            return record
        return records_of(self.shown_scenes[scene_key(record)])[0]

    def _draw_num_rationale_tokens(self, packs: list[list[Record]]) -> int | None:
        """Decided by the records, since workers hold copies of the collator that share no generator."""
        if not self.sample_num_rationale_tokens:
            return self.num_rationale_tokens
        names = "\n".join(record.uid for records in packs for record in records)
        digest = hashlib.blake2b(names.encode(), digest_size=8, key=str(self.seed).encode()).digest()
        return self.sample_num_rationale_tokens[int.from_bytes(digest, "big") % len(self.sample_num_rationale_tokens)]

    def _switches(self) -> dict[str, bool]:
        return {"use_visual_tokens": False} if self._hides_frames else {}

    @property
    def _hides_frames(self) -> bool:
        return self.target == "rationale" and not self.keep_visual_tokens

    def _check_pack(self, records: list[Record]) -> None:
        if not records:
            raise ValueError("A pack must hold at least one record, got an empty list.")
        keys = {scene_key(record) for record in records}
        if len(keys) > 1:
            raise ValueError(
                "The records of a pack must be about one scene, with the same source, medium, geometry and number of frames; "
                f"got {sorted(map(str, keys))}. Make packs with `ScenePacks`."
            )
        if len(records) > 1 and self.processor.question_conditioned:
            raise ValueError(
                f"A rationale module that reads the question has other tokens for each one, so {len(records)} questions "
                "cannot share them. Give single records, or set `drm_config.question_conditioned=False`."
            )

    # ---- one record ----

    def _turns(self, record: Record, medium: SceneMedia) -> list[dict]:
        return self._rationale_chat(record, medium) if self.target == "rationale" else self._chat(record, medium)

    def _rows(
        self, records: list[Record], medium: SceneMedia, num_rationale_tokens: int | None
    ) -> list[tuple[TokenRow, torch.Tensor | None]]:
        """The tokens of each record of a pack and of its question; without labels if it is dropped."""
        # One call, which tokenises the markup that the records share once.
        inputs = self.processor.apply_chat_template(
            [self._turns(record, medium) for record in records],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            use_geometry=self.use_geometry,
            num_rationale_tokens=num_rationale_tokens,
            padding_side="right",
        )
        ids = inputs["input_ids"]
        dim = max(entry["dim"] for entry in self.processor.control_tokens.values())
        nothing = torch.full((*ids.shape, dim), torch.nan)
        tensors = {
            "input_ids": ids,
            "labels": ids.masked_fill(~inputs["assistant_masks"].bool(), IGNORED_LABEL),
            "mm_token_type_ids": inputs.get("mm_token_type_ids", torch.zeros_like(ids)),
            "regression_targets": inputs.get("regression_targets", nothing),
        }
        questions = inputs.get("question_input_ids", [None] * len(records))
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        found = []
        for index, (record, length) in enumerate(zip(records, lengths, strict=True)):
            row = TokenRow(**{name: tensor[index, :length] for name, tensor in tensors.items()})
            if record.label_suspect and not self.regress_suspect:
                row = dataclasses.replace(row, regression_targets=nothing[index, :length])
            found.append((self._cut(row, record), questions[index]))
        return found

    def _chat(self, record: Record, medium: SceneMedia) -> list[dict]:
        box = record.box
        if box is not None and self.with_values:
            own = medium if self.shown_scenes is None else self._loader.load(record)
            box = self._loader.box_in_scene(record, own)
        # Without geometry the box stays as it is here, and a suspect value has its token: `_row` leaves its target out.
        plain = dataclasses.replace(record, box=box, geometry=None, label_suspect=False)
        chat = messages_from_record(plain, with_values=self.with_values)
        is_medium = [
            [isinstance(part, dict) and part["type"] in _MEDIA_TYPES for part in turn["content"]] for turn in chat
        ]
        return [
            {
                **turn,
                "content": [medium.part if flag else part for part, flag in zip(turn["content"], flags, strict=True)]
                if any(flags)
                else turn["content"],
            }
            for turn, flags in zip(chat, is_medium, strict=True)
        ]

    def _rationale_chat(self, record: Record, medium: SceneMedia) -> list[dict]:
        rationale = rationale_of(record, from_answer=self.rationale_from_answer)
        if rationale is None:
            raise ValueError(
                f"`target='rationale'` needs a rationale, and record {record.uid!r} has none. Filter the dataset by "
                "`rationale`."
            )
        if "pixel_values" in medium.tensors:
            raise ValueError(
                f"`target='rationale'` trains the rationale module, and the image of record {record.uid!r} has no geometry "
                "for it. Give the image its geometry, or leave it out."
            )
        part = medium.part
        if self._hides_frames:
            part = {"type": "scene", "scene": ScenePlace(0, range(self.processor.num_rationale_tokens))}
        question = {"type": "text", "text": record.prompt}
        answer = {"type": "text", "text": rationale}
        return [{"role": "user", "content": [part, question]}, {"role": "assistant", "content": [answer]}]

    def _cut(self, row: TokenRow, record: Record) -> TokenRow:
        """Leave out what teaches nothing, and cut the answer; of a record that is dropped, leave the scene alone."""
        trained = (row.labels != IGNORED_LABEL).nonzero()[:, 0]
        row = row.part(0, int(trained[-1]) + 1)
        if self.max_length is None or len(row) <= self.max_length:
            return row
        controls = self._is_in(row.input_ids, [entry["token_id"] for entry in self.processor.control_tokens.values()])
        follower = controls.nonzero()[-1:, 0] + 1
        # The scene, in the first turn, and its question come before the first token that is learned.
        needed = max([int(trained[0]) + 1, *(follower + 1).tolist()])
        if needed <= self.max_length:
            # A cut inside a later prompt leaves an end that teaches nothing.
            kept = trained[trained < self.max_length]
            return row.part(0, max(needed, int(kept[-1]) + 1))
        message = (
            f"Record {record.uid!r} has {len(row)} tokens, of which {needed} must stay (scene, prompt and control tokens), and "
            f"`max_length` is {self.max_length}."
        )
        if self.overlong == "error":
            raise ValueError(f"{message} Raise it, show fewer frames, or pass `overlong='drop'`.")
        self.num_dropped += 1
        if self.num_dropped & (self.num_dropped - 1) == 0:  # the first, second, fourth, ...
            logger.warning("%s Dropped, the %d. record so far.", message, self.num_dropped)
        return row.part(0, max(1, self._num_media_tokens(row))).without_targets()

    @staticmethod
    def _teaches(row: TokenRow) -> bool:
        return bool((row.labels != IGNORED_LABEL).any())

    def _warn_of_empty_batch(self, num_examples: int) -> None:
        if not self._has_warned_of_empty_batch:
            logger.warning(
                "Every record of a batch of %d examples was dropped, so that it teaches nothing. Raise `max_length` (%d), show "
                "fewer frames, or leave such records out of the dataset. This is said once.",
                num_examples,
                self.max_length,
            )
        self._has_warned_of_empty_batch = True

    # ---- rows ----

    def _packed(self, rows: list[TokenRow]) -> TokenRow:
        return pack_questions(rows, num_media_tokens=max(self._num_media_tokens(row) for row in rows))

    def _num_media_tokens(self, row: TokenRow) -> int:
        """Where the last placeholder ends."""
        ids = [self.processor.image_token_id, self.processor.rationale_token_id]
        (positions,) = self._is_in(row.input_ids, ids).nonzero(as_tuple=True)
        return int(positions[-1]) + 1 if len(positions) else 0

    @staticmethod
    def _is_in(input_ids: torch.Tensor, token_ids: list[int]) -> torch.Tensor:
        return torch.isin(input_ids, torch.tensor(token_ids))

    def _padded_questions(self, questions: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        if not questions:
            return {}
        longest = max(len(question) for question in questions)
        ids = torch.full((len(questions), longest), self.processor.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, question in enumerate(questions):
            start = longest - len(question) if self.padding_side == "left" else 0
            ids[row, start : start + len(question)] = question
            mask[row, start : start + len(question)] = 1
        return {"question_input_ids": ids, "question_attention_mask": mask}


def records_of(example: Example) -> list[Record]:
    """Return the records of an example: a record, its dict, or a pack of either."""
    return [_as_record(entry) for entry in (example if isinstance(example, list | tuple) else [example])]


def rationale_of(record: Record, *, from_answer: bool = False) -> str | None:
    """
    Return what `target="rationale"` teaches of a record.

    Args:
        record ([`Record`]): The record.
        from_answer (`bool`, defaults to `False`): A free text of one turn without a rationale is one itself.

    Returns:
        `str`, *optional*: The rationale; None if there is none.
    """
    if record.rationale is None and from_answer and record.kind == "text" and record.turns == 1:
        return record.answer_text
    return record.rationale


def exchanged_scenes(examples: Sequence[Example]) -> dict[tuple, Record]:
    """
    Give each scene another scene of the same dataset, the next one of its kind.

    Args:
        examples (`Sequence`): Records, dicts of records, or packs, as the collator takes them.

    Returns:
        `dict[tuple, Record]`: A record about the other scene, by [`scene_key`]. Empty where a scene has none of its kind
        (video or image, with its number of frames), since it could only be shown itself.
    """
    kinds: dict[tuple, dict[tuple, Record]] = {}
    for number in range(len(examples)):
        record = records_of(examples[number])[0]
        kinds.setdefault((record.media_type, record.num_frames), {}).setdefault(scene_key(record), record)
    exchanged: dict[tuple, Record] = {}
    for scenes in kinds.values():
        if len(scenes) == 1:
            return {}
        records = list(scenes.values())
        exchanged |= dict(zip(scenes, [*records[1:], records[0]], strict=True))
    return exchanged


def _as_record(entry) -> Record:
    if isinstance(entry, Record):
        return entry
    if isinstance(entry, dict):
        return Record.from_dict(entry)
    raise TypeError(f"An example must be a Record, its dict, or a list of these, got {type(entry).__name__}.")


__all__ = ["GeodeDataCollator", "exchanged_scenes", "rationale_of", "records_of"]
