# SPDX-License-Identifier: Apache-2.0
"""The model: parity with InternVL, media in their places, losses, freezing, saving."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils.operations import convert_to_fp32
from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration, set_seed

from geode.modeling_geode.media_geode import pixel_shuffle
from geode.modeling_geode.modeling_geode import (
    GeodeCausalLMOutputWithPast,
    GeodeForConditionalGeneration,
    GeodeModel,
    GeodeModelOutputWithPast,
)
from geode.modeling_geode.shared_prefix_geode import CACHE_NAME
from tests.modeling_geode.common_geode import (
    BOX_TOKEN,
    IMAGE_TOKEN,
    RATIONALE_TOKEN,
    REG_TOKEN,
    TINY_RECONSTRUCTOR,
    prepare_inputs,
    steady_cameras,
    tiny_config,
)


TOKENS_PER_FRAME, FRAMES, RATIONALE = 9, 2, 4
SCENE_START = TOKENS_PER_FRAME  # the image comes first
TEXT_START = SCENE_START + FRAMES * TOKENS_PER_FRAME + RATIONALE
TEXT_LENGTH = 11


def make_model(**overrides) -> GeodeForConditionalGeneration:
    set_seed(0)
    return GeodeForConditionalGeneration(tiny_config(**overrides)).eval()


@pytest.fixture
def model() -> GeodeForConditionalGeneration:
    return make_model()


@pytest.fixture
def inputs(model) -> dict:
    return prepare_inputs(model.config, batch_size=3, has_control_tokens=True)


def targets_for(inputs: dict) -> torch.Tensor:
    """A distance at each `<REG>` and a box at each `<3DBBOX>`, different in every sample."""
    ids = inputs["input_ids"]
    targets = torch.full((*ids.shape, 7), torch.nan)
    for row in range(len(ids)):
        targets[row, (ids[row] == REG_TOKEN).nonzero().item(), 0] = 1.5 + row
        box = torch.tensor([0.2 * row, -1.0, 0.5, 1.2, 0.6, 0.9 + row, 0.3])
        targets[row, (ids[row] == BOX_TOKEN).nonzero().item()] = box
    return targets


def only_image(inputs: dict) -> dict:
    keep = [*range(TOKENS_PER_FRAME), *range(TEXT_START, TEXT_START + TEXT_LENGTH)]
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {**{name: inputs[name][:, keep] for name in names}, "pixel_values": inputs["pixel_values"]}


def only_scene(inputs: dict) -> dict:
    rest = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        rest[name] = rest[name][:, SCENE_START:]
    return rest


def only_text(inputs: dict) -> dict:
    return {name: inputs[name][:, TEXT_START:] for name in ("input_ids", "attention_mask")}


def internvl_like(model: GeodeForConditionalGeneration) -> InternVLForConditionalGeneration:
    """A random InternVL of the same sizes; GEODE's parameters of the same names are set to its weights."""
    set_seed(1)
    config = model.config
    reference = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=copy.deepcopy(config.vision_config),
            text_config=copy.deepcopy(config.text_config),
            image_token_id=config.image_token_id,
            image_seq_length=config.image_seq_length,
            initializer_range=0.2,
        )
    ).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    missing, unexpected = model.load_state_dict(reference.state_dict(), strict=False)
    assert unexpected == []
    assert {name.split(".")[1 if name.startswith("model.") else 0] for name in missing} == {
        "drm",
        "point_encoder",
        "drh",
    }
    return reference


def test_logits_equal_internvl_with_its_weights(model, inputs):
    reference = internvl_like(model)
    image = only_image(inputs)
    expected = reference(**{name: image[name] for name in ("input_ids", "attention_mask", "pixel_values")}).logits
    torch.testing.assert_close(model(**image).logits, expected, atol=1e-5, rtol=1e-5)


def test_logits_of_a_video_without_geometry_equal_internvl_on_its_frames(model, inputs):
    reference = internvl_like(model)
    ids = torch.cat(
        [inputs["input_ids"][:, SCENE_START : TEXT_START - RATIONALE], inputs["input_ids"][:, TEXT_START:]], 1
    )
    frames = inputs["pixel_values_videos"]
    expected = reference(input_ids=ids, pixel_values=frames.flatten(0, 2)).logits
    torch.testing.assert_close(model(input_ids=ids, pixel_values_videos=frames).logits, expected, atol=1e-5, rtol=1e-5)


def test_text_alone_equals_the_language_model(model, inputs):
    text = only_text(inputs)
    hidden = model.model.language_model(**text).last_hidden_state
    torch.testing.assert_close(model(**text).logits, hidden @ model.lm_head.weight.T)


def test_pixel_shuffle_folds_blocks_row_by_row():
    patches = torch.randn(2, 4, 6, 5)
    # Hand-derived: token (0, 1) holds patches (0, 2), (0, 3), (1, 2), (1, 3) one after another.
    shuffled = pixel_shuffle(patches, 2)
    assert shuffled.shape == (2, 6, 20)
    expected = torch.cat([patches[1, 0, 2], patches[1, 0, 3], patches[1, 1, 2], patches[1, 1, 3]])
    torch.testing.assert_close(shuffled[1, 1], expected)


def row_of(inputs: dict, row: int) -> dict:
    return {name: tensor[row : row + 1] for name, tensor in inputs.items()}


def test_batch_equals_single_samples(model, inputs):
    together = model(**inputs)
    for row in range(3):
        alone = model(**row_of(inputs, row))
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            together.regression_values[row], alone.regression_values[0], atol=1e-4, rtol=1e-4, equal_nan=True
        )


def test_batch_order_does_not_matter(model, inputs):
    forward = model(**inputs).logits
    backward = model(**{name: tensor.flip(0) for name, tensor in inputs.items()}).logits
    torch.testing.assert_close(forward, backward.flip(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_logits(model, inputs, side):
    expected = model(**inputs).logits
    amount = (5, 0) if side == "left" else (0, 5)
    padded = dict(inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        padded[name] = torch.nn.functional.pad(inputs[name], amount)
    padded["position_ids"] = (padded["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    logits = model(**padded).logits
    logits = logits[:, 5:] if side == "left" else logits[:, :-5]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part", ["whole", "base"])
def test_a_cache_is_read_by_either_name_and_written_by_that_of_the_library(model, part):
    part = model if part == "whole" else model.model
    input_ids = torch.randint(10, 90, (2, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole, plain = part(input_ids), model.model.language_model(input_ids)
        for name in ("past_key_values", "cache"):
            start = part(input_ids[:, :4], use_cache=True)
            assert [*start][1] == [*plain][1] == CACHE_NAME
            assert start[1] is start[CACHE_NAME] is start.past_key_values is start["past_key_values"]
            rest = part(input_ids[:, 4:], use_cache=True, **{name: start.past_key_values})
            assert rest.past_key_values is start.past_key_values
            torch.testing.assert_close(rest[0], whole[0][:, 4:], atol=1e-5, rtol=1e-5)
            start.past_key_values = None
            assert getattr(start, CACHE_NAME) is None


def test_padded_frames_points_and_cameras_do_not_matter(model, inputs):
    scene = only_scene(inputs)
    expected = model(**scene).logits
    padded = dict(scene)
    shape = scene["pixel_values_videos"].shape
    padded["pixel_values_videos"] = torch.cat([scene["pixel_values_videos"], torch.randn(3, 1, 1, *shape[3:])], dim=2)
    padded["video_frame_mask"] = torch.tensor([True, True, False]).expand(3, 1, 3)
    for name in ("point_features", "point_coords"):
        padded[name] = torch.cat([scene[name], torch.randn(3, 1, 5, scene[name].shape[-1])], dim=2)
    padded["point_grid_coords"] = torch.cat([scene["point_grid_coords"], torch.zeros(3, 1, 5, 3).long()], dim=2)
    padded["point_mask"] = torch.cat([scene["point_mask"], torch.zeros(3, 1, 5).bool()], dim=2)
    padded["camera_poses"] = torch.cat([scene["camera_poses"], torch.randn(3, 1, 2, 11)], dim=2)
    padded["camera_mask"] = torch.cat([scene["camera_mask"], torch.zeros(3, 1, 2).bool()], dim=2)
    torch.testing.assert_close(model(**padded).logits, expected, atol=1e-4, rtol=1e-4)


def test_mixed_batch_of_text_one_scene_and_two_scenes_equals_single_samples(model, inputs):
    """Samples: text alone; one scene; two scenes with only the first rationale tokens of each."""
    scene = only_scene(inputs)
    scene_ids = scene["input_ids"][0, : FRAMES * TOKENS_PER_FRAME + 3]  # three of four rationale tokens
    texts = scene["input_ids"][:, -TEXT_LENGTH:]
    sequences = [texts[0], torch.cat([scene["input_ids"][1]]), torch.cat([scene_ids, scene_ids, texts[2]])]
    length = max(len(sequence) for sequence in sequences)
    media = {name: tensor for name, tensor in scene.items() if tensor.ndim > 2 or name in ("log_scale", "scale_known")}
    pairs = {
        name: torch.stack([tensor[[0, 1]], tensor[[1, 2]], tensor[[2, 0]]])[:, :, 0] for name, tensor in media.items()
    }
    batch = {
        "input_ids": torch.stack([torch.nn.functional.pad(s, (length - len(s), 0)) for s in sequences]),
        "scene_mask": torch.tensor([[False, False], [True, False], [True, True]]),
        **pairs,
    }
    batch["attention_mask"] = torch.stack(
        [torch.nn.functional.pad(torch.ones(len(s)).long(), (length - len(s), 0)) for s in sequences]
    )
    batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    logits = model(**batch).logits
    one = model(**row_of(scene, 1)).logits[0]
    two = model(input_ids=sequences[2][None], **{name: pairs[name][2:] for name in pairs}).logits[0]
    text = model(input_ids=texts[:1]).logits[0]
    torch.testing.assert_close(logits[0, -len(text) :], text, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1, -len(one) :], one, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[2, -len(two) :], two, atol=1e-4, rtol=1e-4)


def test_fewer_rationale_placeholders_take_the_first_tokens(model, inputs):
    scene = row_of(only_scene(inputs), 0)
    features = model(**scene).rationale_hidden_states
    keep = [i for i in range(scene["input_ids"].shape[1]) if i not in (FRAMES * TOKENS_PER_FRAME + 2, TEXT_START - 10)]
    ids = scene["input_ids"][:, keep]
    assert (ids == RATIONALE_TOKEN).sum() == 2
    expected = model(
        input_ids=ids, pixel_values_videos=scene["pixel_values_videos"], rationale_features=features[:, :, :2]
    ).logits
    short = {**scene, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": None}
    torch.testing.assert_close(model(**short).logits, expected)


def test_geometry_reaches_the_logits(model, inputs):
    scene = only_scene(inputs)
    logits = model(**scene).logits
    for name in ("point_coords", "camera_poses"):
        changed = model(**{**scene, name: scene[name] + 0.7}).logits
        assert (changed - logits).abs().max() > 1e-3, name
    unknown = model(**{**scene, "scale_known": torch.zeros_like(scene["scale_known"])}).logits
    assert (unknown - logits).abs().max() > 1e-4
    no_camera = model(**{**scene, "camera_mask": torch.zeros_like(scene["camera_mask"])}).logits
    absent = {name: tensor for name, tensor in scene.items() if name not in ("camera_poses", "camera_mask")}
    torch.testing.assert_close(no_camera, model(**absent).logits)


def test_images_and_scenes_keep_their_places_in_either_order(model, inputs):
    one = row_of(inputs, 0)
    swapped = dict(one)
    order = [*range(SCENE_START, TEXT_START), *range(SCENE_START), *range(TEXT_START, TEXT_START + TEXT_LENGTH)]
    for name in ("input_ids", "mm_token_type_ids"):
        swapped[name] = one[name][:, order]
    embeds, _ = model.model.embed_inputs(**media_arguments(one))
    swapped_embeds, _ = model.model.embed_inputs(**media_arguments(swapped))
    torch.testing.assert_close(swapped_embeds, embeds[:, order])


def media_arguments(inputs: dict) -> dict:
    return {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(pixel_values=x["pixel_values"][:2]), "18 features, 27 placeholders"),
        (lambda x: x.update(mm_token_type_ids=None), "needs `mm_token_type_ids`"),
        (
            lambda x: x.update(pixel_values_videos=x["pixel_values_videos"][:, :, :1]),
            "Video features and video placeholders do not match: 27 features, 54 placeholders",
        ),
        (
            lambda x: x["input_ids"].masked_fill_(x["input_ids"] == RATIONALE_TOKEN, 8)[0].fill_(RATIONALE_TOKEN),
            "features",
        ),
        (lambda x: x["input_ids"][1, TEXT_START:].fill_(RATIONALE_TOKEN), "at most 4: got .4, 15, 4. placeholders"),
        (
            lambda x: [x.pop(name) for name in list(x) if name.startswith("point_")],
            "12 rationale placeholders, but no geom",
        ),
        (lambda x: x["point_mask"][1].fill_(False), "sample 1, scene 0 has none"),
        (lambda x: x["point_coords"][2, 0, 3].fill_(torch.nan), "`point_coords` must be finite, got 3 values"),
        (lambda x: x.update(point_features=x["point_features"][:2]), r"batch_size=3, num_scenes=1, .*got \(2, 1, "),
        (lambda x: x.update(pixel_values_videos=x["pixel_values_videos"][:, 0]), r"got \(3, 2, 3, 24, 24\)"),
    ],
)
def test_wrong_media_raise_with_their_counts(model, inputs, change, message):
    change(inputs)
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_pixels_and_encoder_outputs_together_raise(model, inputs):
    encoded = model.get_image_features(inputs["pixel_values"])
    with pytest.raises(ValueError, match="both pixels of shape"):
        model(**inputs, mm_encoder_outputs={"image": encoded})


def test_encoder_outputs_and_rationale_features_replace_pixels_and_geometry(model, inputs):
    expected = model(**inputs)
    encoded = {
        "image": model.get_image_features(inputs["pixel_values"]),
        "video": model.get_video_features(inputs["pixel_values_videos"]),
    }
    geometry = {
        name: tensor for name, tensor in inputs.items() if name.startswith(("point", "camera", "log", "scale"))
    }
    rationale = model.get_rationale_features(encoded["video"].last_hidden_state, **geometry).rationale_features
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    got = model(**text, mm_encoder_outputs=encoded, rationale_features=rationale)
    torch.testing.assert_close(got.logits, expected.logits)


def test_loss_is_cross_entropy_plus_weighted_regression(inputs):
    model = make_model(drh_config={"loss_weight": 0.3})
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 40, -100)
    output = model(**inputs, labels=labels, regression_targets=targets_for(inputs))
    logits = output.logits[:, :-1].flatten(0, 1)
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.ce_loss, cross_entropy)
    torch.testing.assert_close(output.loss, cross_entropy + 0.3 * output.regression_loss)
    assert output.regression_loss > 0.01


def test_regression_values_are_nan_exactly_off_the_control_tokens(model, inputs):
    values = model(**inputs).regression_values
    ids = inputs["input_ids"]
    assert values.shape == (*ids.shape, 7)
    assert torch.equal(~values[..., 0].isnan(), (ids == REG_TOKEN) | (ids == BOX_TOKEN))
    assert torch.equal(~values[..., 6].isnan(), ids == BOX_TOKEN)
    assert model(**only_text({**inputs, "input_ids": inputs["input_ids"].clamp(min=7)})).regression_values is None


def test_micro_batches_sum_to_the_batch_when_the_token_count_is_global(model, inputs):
    """The contract of `Trainer`: with `num_items_in_batch`, the losses of the micro-batches add up."""
    labels, targets = inputs["input_ids"].clone(), targets_for(inputs)
    labels[:, :TEXT_START] = -100
    whole = model(**inputs, labels=labels, regression_targets=targets)
    items = (labels[:, 1:] != -100).sum()
    parts = [
        model(
            **row_of(inputs, row),
            labels=labels[row : row + 1],
            regression_targets=targets[row : row + 1],
            num_items_in_batch=items,
        )
        for row in range(3)
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss, atol=1e-4, rtol=1e-4)


def test_global_target_count_normalises_the_regression_loss(model, inputs):
    targets = targets_for(inputs)
    targets[0] = torch.nan
    count = 4
    whole = model(**inputs, regression_targets=targets).regression_loss
    parts = [
        model(**row_of(inputs, row), regression_targets=targets[row : row + 1], num_regression_targets=count)
        for row in range(3)
    ]
    assert parts[0].regression_loss == 0
    torch.testing.assert_close(sum(part.regression_loss for part in parts), whole, atol=1e-4, rtol=1e-4)


def test_every_trainable_parameter_gets_a_gradient_and_frozen_ones_none(inputs):
    model = make_model(drm_config={"question_conditioned": True, "inject_features": True})
    with torch.no_grad():
        model.model.feature_injection.gate.fill_(0.5)
    inputs = {**inputs, "question_input_ids": inputs["input_ids"][:, TEXT_START:]}
    inputs["camera_mask"][0] = False
    inputs["scale_known"][1] = False
    model.train()
    model(**inputs, labels=inputs["input_ids"], regression_targets=targets_for(inputs)).loss.backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    without = [name for name, parameter in trainable.items() if parameter.grad is None or not parameter.grad.any()]
    assert without == []
    frozen = {name.split(".")[1] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"vision_tower", "point_encoder"}
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def test_head_gets_zero_gradients_without_control_tokens(model, inputs):
    text = only_text({**inputs, "input_ids": inputs["input_ids"].clamp(min=7)})
    model(**text, labels=text["input_ids"]).loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.drh.parameters())


def test_frozen_encoders_stay_in_eval_mode_until_they_are_unfrozen(model):
    model.train()
    assert model.training
    assert model.model.language_model.training
    assert not model.model.vision_tower.training
    assert not model.model.point_encoder.training
    model.model.vision_tower.requires_grad_(True)
    assert model.train().model.vision_tower.training


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(model, inputs, use_reentrant):
    batch = {**inputs, "labels": inputs["input_ids"], "regression_targets": targets_for(inputs)}
    model.train()
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_save_and_load_is_bitwise(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "a")
    loaded = GeodeForConditionalGeneration.from_pretrained(tmp_path / "a").eval()
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert not any(parameter.requires_grad for parameter in loaded.model.point_encoder.parameters())
    assert loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize(
    "part", ["language_model.layers.1", "vision_tower.encoder", "drm.mamba_layers", "point_encoder"]
)
def test_missing_weights_raise_by_name(model, tmp_path, part):
    state = {
        name: tensor for name, tensor in model.state_dict().items() if part not in name and name != "lm_head.weight"
    }
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=part):
        GeodeForConditionalGeneration.from_pretrained(tmp_path)


def test_a_new_head_may_be_missing(model, tmp_path):
    state = {
        name: tensor for name, tensor in model.state_dict().items() if "drh" not in name and name != "lm_head.weight"
    }
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = GeodeForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.drm.queries, model.model.drm.queries)


def test_regression_is_computed_in_float32_under_half_precision(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    half = GeodeForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.drh.parameters()} == {torch.float32}
    half_inputs = {n: t.bfloat16() if n.startswith("pixel") else t for n, t in inputs.items()}
    output = half(**half_inputs, output_hidden_states=True)
    states = output.hidden_states[-1].float()
    expected = model.drh(states, inputs["input_ids"]).values
    torch.testing.assert_close(output.regression_values, expected, equal_nan=True)
    assert output.regression_values.dtype == torch.float32


def test_resizing_embeddings_keeps_the_tie(model, inputs):
    text = only_text(inputs)
    before = model(**text).logits
    model.resize_token_embeddings(120)
    assert model.config.text_config.vocab_size == 120
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    torch.testing.assert_close(model(**text).logits[..., :99], before)


def test_injected_features_start_at_zero_and_then_matter(inputs):
    plain, injected = make_model(), make_model(drm_config={"inject_features": True})
    injected.load_state_dict(plain.state_dict(), strict=False)
    scene = only_scene(inputs)
    torch.testing.assert_close(injected(**scene).logits, plain(**scene).logits)
    with torch.no_grad():
        injected.model.feature_injection.gate.fill_(1.0)
    assert (injected(**scene).logits - plain(**scene).logits).abs().max() > 1e-2
    tokens = injected(**scene).video_hidden_states - plain(**scene).video_hidden_states
    fused = injected.model.get_rationale_features(
        injected.get_video_features(scene["pixel_values_videos"]).last_hidden_state,
        **{name: tensor for name, tensor in scene.items() if name.startswith(("point", "camera", "log", "scale"))},
    ).fused_features
    expected = injected.model.feature_injection.projection(fused.flatten(0, 2)).flatten(0, 1)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)


def test_question_conditioning_reads_the_question(inputs):
    model = make_model(drm_config={"question_conditioned": True})
    question = inputs["input_ids"][:, TEXT_START:]
    output = model(**inputs, question_input_ids=question).rationale_hidden_states
    other = model(**inputs, question_input_ids=question.flip(1)).rationale_hidden_states
    assert (output - other).abs().max() > 1e-3
    padded = torch.nn.functional.pad(question, (3, 0), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(question), (3, 0))
    masked = model(**inputs, question_input_ids=padded, question_attention_mask=mask).rationale_hidden_states
    torch.testing.assert_close(masked, output, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="needs `question_input_ids`; got none"):
        model(**inputs)


def test_regression_targets_without_tokens_raise(model):
    embeds = torch.randn(1, 4, 32)
    with pytest.raises(ValueError, match="need `input_ids`"):
        model(inputs_embeds=embeds, regression_targets=torch.zeros(1, 4, 7))


def test_feedback_values_raise_where_feedback_is_off(model, inputs):
    with pytest.raises(ValueError, match="value_feedback` is false"):
        model(**inputs, feedback_values=targets_for(inputs))


def test_four_samples_are_overfitted(inputs):
    set_seed(0)
    model = make_model()
    labels = inputs["input_ids"].clone()
    labels[:, :TEXT_START] = -100
    targets = targets_for(inputs)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        output = model(**inputs, labels=labels, regression_targets=targets)
        output.loss.backward()
        optimizer.step()
    assert output.ce_loss < 0.05
    values = model(**inputs).regression_values
    known = ~targets.isnan()
    torch.testing.assert_close(values[known], targets[known], atol=0.15, rtol=0.1)


def test_base_model_loads_from_the_full_checkpoint(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    base = GeodeModel.from_pretrained(tmp_path).eval()
    media = media_arguments(inputs)
    hidden = base(**media).last_hidden_state
    torch.testing.assert_close(hidden @ model.lm_head.weight.T, model(**inputs).logits)


def test_model_without_control_tokens_is_a_plain_vlm(inputs):
    config = tiny_config()
    config.control_tokens = {}
    model = GeodeForConditionalGeneration(config).eval()
    output = model(**inputs, labels=inputs["input_ids"])
    assert output.regression_loss == 0
    torch.testing.assert_close(output.loss, output.ce_loss)
    assert output.regression_values.isnan().all()
    sequences = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert sequences.values == [[], [], []]


def test_device_map_splits_the_model_without_changing_it(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    parts = {"model.vision_tower": "cpu", "model": "cpu", "lm_head": "cpu", "drh": "cpu"}
    loaded = GeodeForConditionalGeneration.from_pretrained(tmp_path, device_map=parts)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert not any(parameter.requires_grad for parameter in loaded.model.vision_tower.parameters())


@torch.no_grad()
def test_offloaded_model_answers_as_the_whole_one(model, inputs):
    """accelerate keeps all weights away but for the layer that computes."""
    expected, digest = model(**inputs), model.model.encoder_digest()
    settings = {"max_new_tokens": 4, "do_sample": False}
    tokens = model.generate(**inputs, **settings)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert offloaded.device == torch.device("cpu")
    found = offloaded(**inputs)
    assert torch.equal(found.logits, expected.logits)
    assert found.keys() == expected.keys()
    assert torch.equal(offloaded.generate(**inputs, **settings), tokens)
    # A copy would remember what was read before.
    vars(offloaded.model).pop("_digests", None)
    assert offloaded.model.encoder_digest() == digest


def test_placeholder_ids_are_those_of_the_fixture(model):
    assert (model.config.image_token_id, model.config.rationale_token_id) == (IMAGE_TOKEN, RATIONALE_TOKEN)


@pytest.mark.parametrize("decoder", ["llama", "gemma2", "qwen3"])
def test_any_decoder_reads_the_scene(decoder, inputs):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 37,
        "vocab_size": 99,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    config = tiny_config()
    config.text_config = AutoConfig.for_model(decoder, **sizes)
    set_seed(0)
    model = GeodeForConditionalGeneration(config).eval()
    output = model(**inputs, labels=inputs["input_ids"], regression_targets=targets_for(inputs))
    assert output.loss.isfinite()
    moved = model(**{**inputs, "point_coords": inputs["point_coords"] + 0.5})
    assert (moved.logits - output.logits).abs().max() > 1e-4
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert generated.sequences.shape[1] == inputs["input_ids"].shape[1] + 3


def test_geometry_frames_take_the_place_of_geometry(inputs):
    """The reconstructor's scenes equal the same geometry given by hand, and padded frames are never seen."""
    model = make_model(reconstructor_config=TINY_RECONSTRUCTOR)
    steady_cameras(model.model.reconstructor)
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(3, 1, 3, 3, 28, 42, generator=generator)
    mask = torch.tensor([[[True, True, False]], [[True, True, True]], [[True, False, False]]])
    rest = {
        name: tensor for name, tensor in inputs.items() if not name.startswith(("point", "camera", "log", "scale"))
    }
    with torch.no_grad():
        expected = model(**rest, **model.model.reconstruct(frames, mask)).logits
        got = model(**rest, geometry_frames=frames, geometry_frame_mask=mask).logits
        frames[0, 0, 2] = 0.5
        padded = model(**rest, geometry_frames=frames, geometry_frame_mask=mask).logits
    assert torch.equal(got, expected)
    assert torch.equal(padded, expected)
    with pytest.raises(ValueError, match="this model has none"):
        make_model()(**rest, geometry_frames=frames)


@pytest.mark.parametrize("kind", [GeodeModelOutputWithPast, GeodeCausalLMOutputWithPast])
@pytest.mark.parametrize("made", [dict, lambda fields: list(fields.items())])
def test_outputs_are_made_from_one_argument_that_holds_all_fields(kind, made):
    """As accelerate makes them anew in mixed precision, and FSDP's hooks do."""
    first = next(iter(kind.__dataclass_fields__))
    kind(**{first: torch.zeros(1)})  # what the class remembers must not matter
    fields = {first: torch.ones(()), "rationale_hidden_states": torch.ones(2)}
    output = kind(made(fields))
    assert {name: output[name] is tensor for name, tensor in fields.items()} == dict.fromkeys(fields, True)
    assert list(output.keys()) == list(fields)
    assert getattr(output, first) is fields[first]
    half = kind(**{name: tensor.bfloat16() for name, tensor in fields.items()})
    whole = convert_to_fp32(half)
    assert type(whole) is kind
    assert {name: tensor.dtype for name, tensor in whole.items()} == dict.fromkeys(fields, torch.float32)


@pytest.mark.parametrize("kind", [GeodeModelOutputWithPast, GeodeCausalLMOutputWithPast])
def test_outputs_are_trees_of_their_tensors(kind):
    hidden = torch.ones(2)
    output = kind(rationale_hidden_states=hidden)
    assert list(output.keys()) == ["rationale_hidden_states"]
    # Distributed training and export look into outputs so.
    (leaf,) = torch.utils._pytree.tree_leaves(output)
    assert leaf is hidden
