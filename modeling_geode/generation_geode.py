# SPDX-License-Identifier: Apache-2.0
"""Generation: media are encoded once, and control tokens come back with their values."""

import copy
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    GenerationMixin,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
)

from .input_checks_geode import (
    check_learned,
    check_no_placeholders,
    check_prompt,
    check_tensors,
    check_token_values,
)
from .shared_prefix_geode import CACHE_NAME, SharedPrefixCache, one_cache, run_decoder


# Arguments of `GeodeModel.embed_inputs`, which `generate` uses up before decoding starts.
MEDIA_INPUTS = (
    "pixel_values",
    "pixel_values_videos",
    "video_features",
    "video_frame_mask",
    "scene_mask",
    "point_features",
    "point_coords",
    "point_grid_coords",
    "point_mask",
    "point_tokens",
    "point_token_positions",
    "point_token_mask",
    "camera_poses",
    "camera_mask",
    "log_scale",
    "scale_known",
    "geometry_frames",
    "geometry_frame_mask",
    "geometry_content_boxes",
    "question_input_ids",
    "question_attention_mask",
    "rationale_features",
    "mm_encoder_outputs",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "use_visual_tokens",
)
ASSISTED_OPTIONS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


@dataclass
class GeodeGenerateOutput(GenerateDecoderOnlyOutput):
    """
    What `generate(..., return_dict_in_generate=True)` returns.

    Args:
        sequences (`torch.LongTensor` of shape `(num_sequences, sequence_length)`): Prompt and generated tokens.
        values (`list[list[torch.Tensor]]`): For each sequence, the values of its generated control tokens in order, each
            float32 of shape `(dim,)` in SI units.
        intervals (`list[list[torch.Tensor]]`, *optional*): Likewise their intervals, each float32 of shape `(dim, 2)`, None for a box;
            with `drh_config.uncertainty` alone.
        prompt_length (`int`): Where the generated tokens start in `sequences`.

    The other fields are those of [`~generation.GenerateDecoderOnlyOutput`].
    """

    values: list | None = None
    intervals: list | None = None
    prompt_length: int | None = None


@dataclass
class GeodeGenerateBeamOutput(GeodeGenerateOutput, GenerateBeamDecoderOnlyOutput):
    """[`GeodeGenerateOutput`] of beam search, with the fields of [`~generation.GenerateBeamDecoderOnlyOutput`]."""


class ValueFeedback:
    """
    Carries values from step to step, so that each is embedded where training put it (`drh_config.value_feedback`).

    Beam search reorders its rows between steps without saying how. A row's parent is the one of the same sample that
    held the same tokens; two such rows would hold the same values.
    """

    def __init__(self, values: torch.Tensor | None, rows_per_sample: int):
        self.history = values
        self.rows_per_sample = rows_per_sample
        self.prompt_length = None
        self.input_ids = self.values = self.last_states = None

    def embeddings(self, head, input_ids: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
        """What to add to the embeddings of the last `length` of `input_ids`, `(num_rows, length, hidden_size)`."""
        if self.input_ids is None:
            self.prompt_length = input_ids.shape[1]
            self.values = torch.full((*input_ids.shape, head.max_dim), torch.nan, device=input_ids.device)
            if self.history is not None:
                known = self.history.to(self.values).repeat_interleave(len(input_ids) // len(self.history), dim=0)
                self.values[:, : known.shape[1]] = known
        else:
            parents = self._parents(input_ids[:, :-1])
            newest = torch.full_like(self.values[:, :1], torch.nan)
            if head.hidden_position == "previous":
                for row in head.control_mask(input_ids[:, -1]).nonzero().flatten().tolist():
                    (value,) = head.decode_states(self.last_states[parents[row]][None], input_ids[row, -1:])
                    newest[row, 0, : len(value)] = value
            self.values = torch.cat([self.values[parents], newest], dim=1)
        self.input_ids = input_ids
        return head.feedback_embeddings(self.values, input_ids, dtype)[:, -length:]

    def update(self, outputs) -> None:
        """Take what a step computed: its states, and the value of its last token if that was generated."""
        self.last_states = outputs.hidden_states[-1][:, -1]
        is_generated = self.input_ids.shape[1] > self.prompt_length
        if is_generated and outputs.regression_values is not None:
            newest = outputs.regression_values[:, -1].to(self.values)
            self.values[:, -1] = torch.where(self.values[:, -1].isnan(), newest, self.values[:, -1])

    def _parents(self, prefixes: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(prefixes), device=prefixes.device)
        if self.rows_per_sample == 1:
            return rows
        sample = rows // self.rows_per_sample
        same = (prefixes[:, None] == self.input_ids[None]).all(dim=-1) & (sample[:, None] == sample[None])
        return same.int().argmax(dim=1)


class GeodeGenerationMixin(GenerationMixin):
    """`generate` that encodes media once and routes control tokens to the regression head (paper, section 2.2)."""

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, logits_processor=None, **kwargs):
        """
        Generate text and values. Arguments are those of [`~generation.GenerationMixin.generate`] and of `forward`.

        A cache may come as `past_key_values` or as `cache`, whichever of the two transformers calls it.
        Placeholder tokens are never generated: no later encoding of the sequence could fill them.

        Returns:
            `torch.LongTensor` of shape `(num_sequences, sequence_length)`, or with `return_dict_in_generate=True`
            [`GeodeGenerateOutput`], whose values equal those of a teacher-forced forward over the same sequence.

        Raises:
            TypeError: If an argument is no tensor, or holds another kind of numbers.
            ValueError: If the prompt and its media do not fit together, or assisted decoding is combined with
                `drh_config.value_feedback`, or two caches are given.
        """

        def option(name):
            for source in (kwargs, vars(generation_config) if generation_config else {}, vars(self.generation_config)):
                if source.get(name) is not None:
                    return source[name]
            return None

        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        self._check_prompt(input_ids, kwargs)
        cached_length = _rename_cache(kwargs)
        history, feedback = kwargs.pop("regression_targets", None), kwargs.pop("feedback_values", None)
        is_assisted = any(option(name) is not None for name in ASSISTED_OPTIONS) or bool(option("use_mtp"))
        state = self._feedback_state(input_ids, history, feedback, option("num_beams") or 1, is_assisted)
        self._merge_media_once(input_ids, kwargs, cached_length)
        kwargs["logits_processor"] = self._forbid_placeholders(logits_processor)
        if state is not None:
            kwargs["feedback_state"] = state
        returns_dict, user_states = option("return_dict_in_generate"), option("output_hidden_states")
        if not returns_dict and "feedback_state" not in kwargs:
            return super().generate(inputs, generation_config, **kwargs)

        wanted = {"return_dict_in_generate": True}
        if not is_assisted:
            # One layer of one position a step; only the first step holds the whole prompt.
            wanted["output_hidden_states"] = -1 if not user_states else _with_last_layer(user_states)
        if generation_config is None:
            kwargs.update(wanted)
        else:
            generation_config = copy.deepcopy(generation_config)
            generation_config.update(**wanted)
            kwargs = {name: value for name, value in kwargs.items() if name not in wanted}
        outputs = super().generate(inputs, generation_config, **kwargs)
        if not returns_dict:
            return outputs.sequences
        states = None if is_assisted else [step[-1] for step in outputs.hidden_states]
        prompt = {
            name: kwargs.get(name) for name in ("attention_mask", "inputs_embeds", "media_embeds", "feedback_state")
        }
        rows, tokens, states = self._control_states(outputs, states, input_ids, prompt, cached_length)
        num_rows = len(outputs.sequences)
        values, intervals = _by_row(rows, self.drh.decode_states(states, tokens), num_rows), None
        if self.drh.spreads is not None:
            intervals = _by_row(rows, self.drh.decode_intervals(states, tokens), num_rows)
        fields = {name: field for name, field in outputs.items() if name != "hidden_states" or user_states}
        prompt_length = 0 if input_ids is None else input_ids.shape[1]
        output_class = GeodeGenerateBeamOutput if "beam_indices" in outputs else GeodeGenerateOutput
        return output_class(**fields, values=values, intervals=intervals, prompt_length=prompt_length)

    def init_continuous_batching(self, *args, **kwargs):
        """
        Refuse continuous batching, and with it `generate_batch`.

        The library's loop returns tokens, but neither media reach it nor states leave it: a control token would have no value.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "Continuous batching (`generate_batch`) takes no media and returns no hidden states, so control tokens would have no "
            "values. Use `generate` with a padded batch, or `model.ask(processor, scene, questions)` for questions about one scene."
        )

    # `inputs_embeds` is named because the library looks for it here before it takes any.
    def prepare_inputs_for_generation(
        self, input_ids, *, inputs_embeds=None, media_embeds=None, feedback_state=None, **kwargs
    ):
        """As the library's, and media and value feedback cut to the tokens of this step."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        feeds_own_state = feedback_state is not None and self.drh.hidden_position == "token"
        model_inputs["return_regression_values"] = feeds_own_state
        step_ids = model_inputs.get("input_ids")
        if step_ids is None:
            return model_inputs
        total, length = input_ids.shape[1], step_ids.shape[1]
        start = total - length
        # Media lie in the prompt: a step that starts after it has them in its cache, or there are none.
        if media_embeds is not None and start < media_embeds.shape[1]:
            padding = max(0, total - media_embeds.shape[1])
            media_embeds = torch.nn.functional.pad(media_embeds, (0, 0, 0, padding))
            model_inputs["media_embeds"] = media_embeds[:, start:total]
        if feedback_state is not None:
            model_inputs["feedback_embeds"] = feedback_state.embeddings(self.drh, input_ids, length, self.dtype)
        return model_inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        # Checked with transformers 5.23 and 5.24: called eagerly after every forward of sampling and of beam search.
        state = model_kwargs.get("feedback_state")
        if state is not None:
            state.update(outputs)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _feedback_state(self, input_ids, history, feedback, rows_per_sample, is_assisted) -> ValueFeedback | None:
        """What carries values from step to step; None if the model feeds none back."""
        if not self.config.drh_config.value_feedback:
            if feedback is not None:
                raise ValueError("`feedback_values` were given, but `drh_config.value_feedback` is false. Drop them.")
            return None
        if is_assisted:
            raise ValueError(
                "Assisted decoding cannot feed values back: candidates are proposed before a value is known. Generate "
                "without an assistant, or use a model with `drh_config.value_feedback=False`."
            )
        if input_ids is None:
            raise ValueError(
                "`drh_config.value_feedback` needs `input_ids` to find control tokens; got `inputs_embeds`."
            )
        values = {"regression_targets": history, "feedback_values": feedback}
        check_learned(self.config, self.drh.max_dim, input_ids, **values)
        return ValueFeedback(history if feedback is None else feedback, rows_per_sample)

    def _check_prompt(self, input_ids: torch.Tensor | None, kwargs: dict) -> None:
        """Raise unless the prompt is one: later steps trust it."""
        inputs_embeds = kwargs.get("inputs_embeds")
        if input_ids is not None:
            check_tensors({"input_ids": input_ids}, self.config)
            check_token_values(input_ids, self.config)
        if input_ids is not None or inputs_embeds is not None:
            others = {name: kwargs.get(name) for name in ("attention_mask", "media_embeds")}
            others["past_key_values"] = one_cache(kwargs.get("cache"), kwargs.get("past_key_values"))
            check_prompt(self.config, input_ids if inputs_embeds is None else None, inputs_embeds, **others)

    def _merge_media_once(self, input_ids: torch.Tensor | None, kwargs: dict, start: int) -> None:
        """
        Replace media in `kwargs` by the embeddings that stand for them, those behind the first `start` tokens, which are cached.

        The library would encode images and videos itself, but expands them for beams by counting placeholders of two
        different ids, and knows nothing of scenes. A tensor aligned with the prompt is expanded right by all of it.
        """
        media = {name: kwargs.pop(name) for name in MEDIA_INPUTS if name in kwargs}
        # The library leaves an empty `mm_encoder_outputs` in what it hands to an assistant model.
        media = {
            name: value
            for name, value in media.items()
            if value is not None and not (isinstance(value, dict) and not value)
        }
        has_content = any(not name.endswith("_mask") and not name.startswith("vision_feature") for name in media)
        inputs_embeds = kwargs.get("inputs_embeds")
        if not has_content:
            if input_ids is not None and inputs_embeds is None and kwargs.get("media_embeds") is None:
                check_no_placeholders(input_ids[:, start:], self.config)
            return
        if input_ids is None and inputs_embeds is None:
            raise ValueError(
                f"Media need the tokens whose placeholders they fill, got no `input_ids` beside {sorted(media)}. Give what the "
                "processor returns as `**inputs`."
            )
        types = kwargs.get("mm_token_type_ids")
        if start and input_ids is not None:
            placeholders = torch.tensor([self.config.image_token_id, self.config.rationale_token_id])
            if not torch.isin(input_ids[:, start:], placeholders.to(input_ids.device)).any():
                return  # the cache holds the media of the turns before
        merged, _ = self.model.embed_inputs(
            None if input_ids is None else input_ids[:, start:],
            None if inputs_embeds is None else inputs_embeds[:, start:],
            mm_token_type_ids=None if types is None else types[:, start:],
            **media,
        )
        if start:
            merged = torch.nn.functional.pad(merged, (0, 0, start, 0))
        kwargs["media_embeds" if inputs_embeds is None else "inputs_embeds"] = merged

    def _forbid_placeholders(self, logits_processor):
        ids = [self.config.image_token_id, self.config.rationale_token_id]
        suppressed = [token_id for token_id in ids if token_id < self.config.text_config.vocab_size]
        forbid = SuppressTokensLogitsProcessor(suppressed, device=self.device)
        return LogitsProcessorList([*(logits_processor or []), forbid])

    def _control_states(self, outputs, states, input_ids, prompt, cached_length) -> tuple:
        """
        What is regressed of every generated control token: from the states of the steps, or else from one more forward.

        Returns the rows of the tokens, the tokens, `(num_tokens,)`, and their states, `(num_tokens, hidden_size)`.
        """
        prompt_length = 0 if input_ids is None else input_ids.shape[1]
        generated = outputs.sequences[:, prompt_length:]
        hits = self.drh.control_mask(generated).nonzero().tolist()
        is_own_state = self.drh.hidden_position == "token"
        picked = [_state_of_step(outputs, states, row, step + is_own_state) for row, step in hits]
        rows = sorted({row for (row, _), state in zip(hits, picked, strict=True) if state is None})
        if rows:
            feedback = self._feedback_of(outputs.sequences, hits, picked, prompt_length, prompt["feedback_state"])
            if states is not None and _holds_all_but_the_last(outputs):
                replayed = self._step_once_more(outputs, rows, prompt, feedback)
            elif cached_length:
                raise ValueError(
                    "The value of a sequence's last token needs the whole prompt, but its first "
                    f"{cached_length} tokens came as a cache. Raise `max_new_tokens` by one."
                )
            else:
                replayed = self._replay(outputs.sequences, rows, input_ids, prompt, feedback)
            replayed = dict(zip(rows, replayed, strict=True))
            start = -generated.shape[1] - (not is_own_state)
            picked = [
                replayed[row][start + step] if state is None else state
                for (row, step), state in zip(hits, picked, strict=True)
            ]
        owners = [row for row, _ in hits]
        tokens = generated[owners, [step for _, step in hits]]
        # Device maps may leave the states of different steps on different devices.
        states = [state.to(tokens.device) for state in picked]
        return owners, tokens, torch.stack(states) if states else self.get_input_embeddings().weight[:0]

    def _feedback_of(self, sequences, hits, picked, prompt_length, feedback_state) -> torch.Tensor | None:
        """The values that were fed back in returned sequences, `(num_sequences, length, max_dim)`, NaN elsewhere."""
        if feedback_state is None:
            return None
        values = torch.full((*sequences.shape, self.drh.max_dim), torch.nan, device=sequences.device)
        if feedback_state.history is not None:
            history = feedback_state.history.to(values)
            values[:, :prompt_length] = history.repeat_interleave(len(values) // len(history), dim=0)
        for (row, step), state in zip(hits, picked, strict=True):
            if state is not None:
                (value,) = self.drh.decode_states(state[None], sequences[row, prompt_length + step][None])
                values[row, prompt_length + step, : len(value)] = value
        return values

    def _step_once_more(self, outputs, rows, prompt, feedback) -> torch.Tensor:
        """States of the last tokens, `(len(rows), 1, hidden_size)`: decoding stops before it reads them."""
        sequences, cache = outputs.sequences, getattr(outputs, CACHE_NAME)
        embeds = self.get_input_embeddings()(sequences[:, -1:])
        if feedback is not None:
            embeds = embeds + self.drh.feedback_embeddings(feedback, sequences, embeds.dtype)[:, -1:]
        mask = torch.ones(len(sequences), cache.get_seq_length() + 1, dtype=torch.long, device=embeds.device)
        if prompt["attention_mask"] is not None:
            known = prompt["attention_mask"].repeat_interleave(len(mask) // len(prompt["attention_mask"]), dim=0)
            mask[:, : known.shape[1]] = known
        stepped = run_decoder(
            self.model.language_model,
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1)[:, -1:],
            cache=cache,
        )
        cache.crop(-1)  # the caller gets the cache as decoding left it
        return stepped.last_hidden_state[rows]

    def _replay(self, sequences, rows, input_ids, prompt, feedback) -> torch.Tensor:
        """Last-layer states of whole sequences, `(len(rows), length, hidden_size)`, in one teacher-forced forward."""
        generated = sequences[rows] if input_ids is None else sequences[rows, input_ids.shape[1] :]
        embeds = prompt["inputs_embeds"] if prompt["media_embeds"] is None else prompt["media_embeds"]
        if embeds is None:
            embeds = self.get_input_embeddings()(input_ids)
        samples = torch.tensor(rows, device=sequences.device) // (len(sequences) // len(embeds))
        embeds = torch.cat([embeds[samples], self.get_input_embeddings()(generated).to(embeds)], dim=1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        if prompt["attention_mask"] is not None:
            mask[:, : prompt["attention_mask"].shape[1]] = prompt["attention_mask"][samples]
        if feedback is not None:
            embeds = embeds + self.drh.feedback_embeddings(feedback[rows], sequences[rows], embeds.dtype)
        outputs = self.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        )
        return outputs.last_hidden_state


def _rename_cache(kwargs: dict) -> int:
    """Put a cache in `kwargs` under the name that transformers has for it, and return its length."""
    cache = one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
    if cache is None:
        return 0
    kwargs[CACHE_NAME] = cache
    return cache.get_seq_length()


def _by_row(rows: list[int], items: list, num_rows: int) -> list[list]:
    """The items of each row, in order."""
    grouped = [[] for _ in range(num_rows)]
    for row, item in zip(rows, items, strict=True):
        grouped[row].append(item)
    return grouped


def _with_last_layer(selection):
    """The user's choice of hidden states, and the last one, which the regression head reads."""
    if selection is True:
        return True
    chosen = [selection] if isinstance(selection, int) else list(selection)
    return chosen if -1 in chosen else [*chosen, -1]


def _holds_all_but_the_last(outputs) -> bool:
    """Whether the cache can take one more token: beams reorder its rows, and a static one may be full."""
    cache = outputs.get(CACHE_NAME)
    if "beam_indices" in outputs or not isinstance(cache, DynamicCache | SharedPrefixCache):
        return False
    return cache.get_seq_length() >= outputs.sequences.shape[1] - 1


def _state_of_step(outputs, states, row: int, step: int) -> torch.Tensor | None:
    """
    The state that step `step` computed for a returned sequence, or None if no step did.

    A beam's rows are reordered between steps; `beam_indices` says which row a step's token came from.
    """
    if states is None or step >= len(states):
        return None
    beam_indices = outputs.get("beam_indices")
    if beam_indices is not None:
        if step >= beam_indices.shape[1] or beam_indices[row, step] < 0:
            return None
        row = int(beam_indices[row, step])
    return states[step][row, -1]


__all__ = ["GeodeGenerateBeamOutput", "GeodeGenerateOutput", "GeodeGenerationMixin"]
