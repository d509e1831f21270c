# SPDX-License-Identifier: Apache-2.0
"""Many questions about one scene: it is encoded once, and what all questions begin with is computed once."""

import dataclasses
import os
from collections.abc import Sequence

import torch

from .answers_geode import Answer, check_limit
from .batching_geode import check_count
from .scene_encoding_geode import SceneEncoding, ScenePrefix, check_encoder_digest
from .scene_store_geode import SceneStore
from .shared_prefix_geode import CACHE_NAME, SharedPrefixCache, can_share_prefix
from .shown_geode import shown


class GeodeAskingMixin:
    """`ask`, `prefill_scene` and `open_scene_store` of [`GeodeForConditionalGeneration`]."""

    @torch.no_grad()
    def ask(
        self,
        processor,
        scene: SceneEncoding,
        questions: Sequence[str],
        *,
        batch_size: int = 32,
        use_geometry: bool = True,
        num_rationale_tokens: int | None = None,
        abstain_above: float | None = None,
        max_new_tokens: int = 64,
        **options,
    ) -> list[Answer]:
        """
        Answer questions about one scene, in batches, by greedy decoding unless `options` say otherwise.

        Each answer is that of the question alone. What the prompts begin with, up to the scene's last token, goes through the
        language model once, and its keys and values are held once for all questions. A language model with other attention
        than full by 'sdpa' or 'eager' cannot do this: there each question computes them for itself.

        Several threads may ask one model and one processor at a time: a call keeps its state to itself. They share the cores, so
        one call with all questions is faster.

        Args:
            processor ([`GeodeProcessor`]):
                The model's processor.
            scene ([`SceneEncoding`]):
                What [`~GeodeForConditionalGeneration.encode_scene`] returned or a [`SceneStore`] holds. With a prefix, see
                [`~GeodeForConditionalGeneration.prefill_scene`], not even the first question computes it.
            questions (`Sequence[str]`):
                The questions, one user turn each.
            batch_size (`int`, defaults to 32):
                Questions that are answered together.
            use_geometry (`bool`, defaults to `True`):
                False leaves the rationale tokens out.
            num_rationale_tokens (`int`, *optional*):
                Rationale tokens that a question sees; default of the processor.
            abstain_above (`float`, *optional*):
                See [`~GeodeProcessor.post_process_answers`].
            max_new_tokens (`int`, defaults to 64):
                Longest answer.
            **options:
                Further options of `generate`.

        Returns:
            `list[Answer]`: An answer to each question, in order.

        Raises:
            TypeError: If `scene` is no encoded scene, or `questions` is a single string.
            ValueError: If the scene is of other encoders or its prefix of another language model, or `batch_size` is not
                positive.
        """
        _check_questions(questions)
        check_count("batch_size", batch_size)
        if abstain_above is not None:
            check_limit(abstain_above)
        if not hasattr(processor, "post_process_answers"):
            raise TypeError(f"`processor` must be the model's GeodeProcessor, got {type(processor).__name__}.")
        self._check_scene(scene)
        if not questions:
            return []
        scene = scene.to(self.device)
        rows = self._prompts(processor, scene, questions, use_geometry, num_rationale_tokens)
        prefix = None
        if can_share_prefix(self.model.language_model.config):
            prefix = self._prefix_of(scene, rows)
        options = {"do_sample": False, "num_beams": 1, **options, "max_new_tokens": max_new_tokens}
        answers: list[Answer] = []
        for start in range(0, len(questions), batch_size):
            batch = {name: tensor[start : start + batch_size] for name, tensor in rows.items()}
            if prefix is None:
                inputs = {**batch, **scene.to_model_inputs(len(batch["input_ids"]))}
            else:
                inputs = _behind(prefix, batch)
            output = self.generate(**inputs, **options, return_dict_in_generate=True)
            answers += processor.post_process_answers(
                output, input_ids=batch["input_ids"], abstain_above=abstain_above
            )
        return answers

    @torch.no_grad()
    def prefill_scene(
        self,
        processor,
        scene: SceneEncoding,
        *,
        use_geometry: bool = True,
        num_rationale_tokens: int | None = None,
    ) -> SceneEncoding:
        """
        Compute what all questions about a scene begin with, for later calls of [`~GeodeForConditionalGeneration.ask`].

        It is large beside the scene's tokens: two tensors of `num_key_value_heads * head_dim` numbers for each token and layer.

        Args:
            processor ([`GeodeProcessor`]):
                The model's processor.
            scene ([`SceneEncoding`]):
                The scene.
            use_geometry (`bool`, defaults to `True`):
                As the questions will have it.
            num_rationale_tokens (`int`, *optional*):
                As the questions will have it.

        Returns:
            [`SceneEncoding`]: The same with its `prefix`.

        Raises:
            ValueError: If the language model cannot share a prefix, or the scene is of other encoders.
        """
        self._check_scene(scene)
        config = self.model.language_model.config
        if not can_share_prefix(config):
            raise ValueError(
                "A prefix needs full attention by 'sdpa' or 'eager' in every layer of the language model, got "
                f"{config._attn_implementation!r} and layers {getattr(config, 'layer_types', None)}. Load the model with "
                "`attn_implementation='sdpa'` if that is why, or ask without a prefix."
            )
        scene = dataclasses.replace(scene, prefix=None).to(self.device)
        prefix = self._prefix_of(scene, self._prompts(processor, scene, [""], use_geometry, num_rationale_tokens))
        prefix = dataclasses.replace(prefix, language_digest=self.model.language_digest())
        return dataclasses.replace(scene, prefix=prefix)

    def open_scene_store(self, folder: str | os.PathLike, *, max_bytes: int) -> SceneStore:
        """
        Open a folder that keeps this model's encoded scenes; see [`SceneStore`].

        Args:
            folder (`str` or `os.PathLike`):
                The folder, which is created if absent.
            max_bytes (`int`):
                Largest size of its scenes together.

        Returns:
            [`SceneStore`]: The store.
        """
        return SceneStore(folder, self, max_bytes=max_bytes)

    def _prompts(self, processor, scene, questions, use_geometry, num_rationale_tokens) -> dict[str, torch.Tensor]:
        """The prompts of questions, padded on the left: `input_ids`, `attention_mask` and `mm_token_type_ids`."""
        part = {"type": "scene", "scene": scene}
        chats = [[{"role": "user", "content": [part, {"type": "text", "text": text}]}] for text in questions]
        inputs = processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            padding_side="left",
            use_geometry=use_geometry,
            num_rationale_tokens=num_rationale_tokens,
        )
        return dict(inputs.to(self.device))

    def _prefix_of(self, scene: SceneEncoding, rows: dict[str, torch.Tensor]) -> ScenePrefix:
        """What prompts share up to the scene's last token: the scene's own prefix if it is that, or else a new one."""
        is_token = rows["attention_mask"][0].bool()
        input_ids, types = rows["input_ids"][0, is_token], rows["mm_token_type_ids"][0, is_token]
        placeholders = input_ids.new_tensor([self.config.image_token_id, self.config.rationale_token_id])
        length = int(torch.isin(input_ids, placeholders).nonzero().max()) + 1
        input_ids, known = input_ids[:length], scene.prefix
        if known is not None and torch.equal(known.input_ids, input_ids):
            if known.language_digest != self.model.language_digest():
                raise ValueError(
                    "The prefix of the scene was computed by another language model than this one. Compute it again with "
                    "`model.prefill_scene(...)`, or drop it: `dataclasses.replace(scene, prefix=None)`."
                )
            return known
        embeds, _ = self.model.embed_inputs(
            input_ids[None], mm_token_type_ids=types[None, :length], **scene.to_model_inputs()
        )
        layers = getattr(self.model.language_model(inputs_embeds=embeds, use_cache=True), CACHE_NAME).layers
        return ScenePrefix(input_ids, tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers))

    def _check_scene(self, scene) -> None:
        # By name: a scene of a model that was loaded with remote code is of another class object.
        if type(scene).__name__ != SceneEncoding.__name__:
            raise TypeError(
                f"`scene` must be a SceneEncoding, got {type(scene).__name__}. `model.encode_scene(**processor.prepare_scene("
                "video=...))` makes one."
            )
        check_encoder_digest(scene.encoder_digest, self.model.encoder_digest())
        width, own = scene.visual_tokens.shape[-1], self.config.text_config.hidden_size
        if width != own:
            raise ValueError(f"The tokens of `scene` must have the model's width {own}, got {width}. Encode it again.")


def _check_questions(questions) -> None:
    if isinstance(questions, str):
        raise TypeError(
            f"`questions` must be a sequence of strings, got the string {shown(questions)}. Put it in a list."
        )
    if not isinstance(questions, Sequence) or isinstance(questions, bytes):
        raise TypeError(
            f"`questions` must be a sequence of strings, got {shown(questions)} of type {type(questions).__name__}."
        )
    for question in questions:
        if not isinstance(question, str):
            raise TypeError(f"`questions` must hold strings, got {shown(question)} of type {type(question).__name__}.")


def _behind(prefix: ScenePrefix, rows: dict[str, torch.Tensor]) -> dict:
    """Arguments of `generate` for rows padded on the left that begin with a prefix: the padding goes behind it."""
    length, width = len(prefix.input_ids), rows["input_ids"].shape[1]
    num_padding = width - rows["attention_mask"].sum(dim=1, keepdim=True)
    column = torch.arange(width, device=num_padding.device).expand(len(num_padding), -1)
    moved = torch.where(column < length + num_padding, column - length, column)
    order = torch.where(column < length, column + num_padding, moved)
    input_ids, mask = rows["input_ids"].gather(1, order), rows["attention_mask"].gather(1, order)
    if not bool((input_ids[:, :length] == prefix.input_ids).all()):
        raise ValueError(
            "The prompts of questions about one scene must begin alike, up to the scene's last token. Use a chat template that "
            "puts a turn's media before its text."
        )
    cache = SharedPrefixCache(prefix.keys, prefix.values)
    return {"input_ids": input_ids, "attention_mask": mask, CACHE_NAME: cache}


__all__ = ["GeodeAskingMixin"]
