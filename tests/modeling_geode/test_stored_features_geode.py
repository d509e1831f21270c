# SPDX-License-Identifier: Apache-2.0
"""What frozen encoders computed before stands in place of their inputs, and changes nothing."""

import pytest
import torch
from transformers import set_seed

from geode.modeling_geode.collation_geode import collate_scenes
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from tests.modeling_geode.common_geode import prepare_inputs, tiny_config, tiny_geometry


CLOUD = ("point_features", "point_coords", "point_grid_coords", "point_mask")
TOKENS = ("point_tokens", "point_token_positions", "point_token_mask")


def make_model(**drm) -> GeodeForConditionalGeneration:
    set_seed(1)
    model = GeodeForConditionalGeneration(tiny_config(drm_config=drm)).eval()
    if model.model.feature_injection is not None:
        torch.nn.init.normal_(model.model.feature_injection.gate)  # at zero nothing would be added
    return model


def two_scenes(config) -> dict:
    """
    Two samples: one of two scenes of 3 and 2 frames, one of a single scene of 1 frame. Text has targets.

    Clouds have different numbers of points, and one has no camera.
    """
    generator = torch.Generator().manual_seed(4)
    media = {
        "scene_mask": torch.tensor([[True, True], [True, False]]),
        "video_frame_mask": torch.tensor(
            [[[True, True, True], [True, True, False]], [[True, False, False], [False] * 3]]
        ),
        "pixel_values_videos": torch.randn(2, 2, 3, 3, *config.vision_config.image_size, generator=generator),
        **tiny_geometry(generator, 2, 2),
    }
    media["camera_mask"][0, 1] = False
    media["scale_known"][1, 0] = False
    seq, num_rationale = config.image_seq_length, config.drm_config.num_rationale_tokens
    first = [config.image_token_id] * (3 * seq) + [config.rationale_token_id] * num_rationale
    first += [config.image_token_id] * (2 * seq) + [config.rationale_token_id] * num_rationale
    second = [config.image_token_id] * seq + [config.rationale_token_id] * num_rationale
    text = [9, 5, 20, 6, 31]  # `<REG>` is 5, `<3DBBOX>` is 6
    length = len(first) + len(text)
    rows = [first + text, [0] * (length - len(second) - len(text)) + second + text]
    input_ids = torch.tensor(rows)
    targets = torch.full((2, length, 7), torch.nan)
    targets[:, -4, 0] = torch.tensor([2.5, 0.7])
    targets[:, -2] = torch.tensor([0.5, -1.0, 0.4, 1.0, 0.5, 0.8, 0.3])
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != 0).long(),
        "mm_token_type_ids": 2 * (input_ids == config.image_token_id).long(),
        "labels": input_ids.masked_fill((input_ids < 5) | (input_ids == 0), -100),
        "regression_targets": targets,
        **media,
    }


@torch.no_grad()
def stored(model, inputs: dict, *, points: bool = True, frames: bool = True) -> dict:
    """The same inputs after their encoders ran."""
    result = dict(inputs)
    if points:
        cloud = {name: result.pop(name) for name in CLOUD}
        result |= model.get_point_tokens(**cloud, scene_mask=inputs.get("scene_mask"))
    if frames:
        pixels = result.pop("pixel_values_videos")
        masks = {name: inputs[name] for name in ("video_frame_mask", "scene_mask") if name in inputs}
        result["video_features"] = model.get_video_features(pixels, **masks).last_hidden_state
    return result


def loss_and_gradients(model, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    values = {"loss": output.loss.detach(), "values": output.regression_values.detach().nan_to_num(-1e9)}
    return {**values, "logits": output.logits.detach(), **gradients}


@pytest.mark.parametrize("inject_features", [False, True])
@pytest.mark.parametrize("forms", [{"frames": False}, {"points": False}, {}], ids=["points", "frames", "both"])
def test_stored_features_give_bitwise_the_same_loss_values_and_gradients(forms, inject_features):
    model = make_model(inject_features=inject_features).train()
    inputs = two_scenes(model.config)
    fly = loss_and_gradients(model, inputs)
    read = loss_and_gradients(model, stored(model, inputs, **forms))
    assert fly.keys() == read.keys()
    assert [name for name in fly if not torch.equal(fly[name], read[name])] == []
    # Everything that trains had a gradient, the projector and the rationale module among it.
    trained = {name.split(".")[1] for name in fly if name.startswith("model.")}
    injection = {"feature_injection"} if inject_features else set()
    assert trained == {"language_model", "multi_modal_projector", "drm"} | injection


def test_encoders_do_not_run_on_stored_features():
    model = make_model()
    inputs = stored(model, two_scenes(model.config))

    def refuse(*_):
        raise AssertionError("an encoder ran")

    model.model.vision_tower.register_forward_hook(refuse)
    model.model.point_encoder.register_forward_hook(refuse)
    assert model(**inputs).loss.isfinite()


def test_scenes_encoded_one_by_one_agree_with_a_batch_to_rounding():
    """Matrices of other heights may round otherwise: alone and in a batch, tokens agree to 1e-5 of their size."""
    model = make_model()
    inputs = two_scenes(model.config)
    scenes = []
    for row, column in inputs["scene_mask"].nonzero().tolist():
        one = {name: inputs[name][row : row + 1, column : column + 1] for name in CLOUD}
        with torch.no_grad():
            tokens = model.get_point_tokens(**one)
            frames = inputs["pixel_values_videos"][row, column][inputs["video_frame_mask"][row, column]]
            features = model.get_video_features(frames[None, None]).last_hidden_state
        scenes.append(
            {
                "point_tokens": tokens["point_tokens"][0, 0],
                "point_token_positions": tokens["point_token_positions"][0, 0],
                "camera_poses": inputs["camera_poses"][row, column][inputs["camera_mask"][row, column]],
                "log_scale": inputs["log_scale"][row, column],
                "scale_known": inputs["scale_known"][row, column],
                "video_features": features[0, 0],
            }
        )
    media = collate_scenes([scenes[:2], scenes[2:]])
    assert media["video_frame_mask"].tolist() == inputs["video_frame_mask"].tolist()
    assert media["scene_mask"].tolist() == inputs["scene_mask"].tolist()
    packed = stored(model, inputs)
    torch.testing.assert_close(media["point_tokens"], packed["point_tokens"], atol=1e-5, rtol=1e-5)
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "labels", "regression_targets")
    read = model(**{name: inputs[name] for name in names}, **media)
    fly = model(**inputs)
    torch.testing.assert_close(read.logits, fly.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read.loss, fly.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window_rule", ["cloud", "batch"])
def test_tokens_of_a_scene_do_not_depend_on_larger_scenes_beside_it(window_rule):
    """
    Beside a room of more voxels along an axis, the codes of a cloud would have more bits, its curve another path and its
    windows other members: far more than rounding.
    """
    settings = {"enc_depths": [4, 4], "enc_patch_size": [16, 16], "window_rule": window_rule}
    set_seed(0)
    model = GeodeForConditionalGeneration(tiny_config(point_config=settings)).eval()
    clouds = [cloud_of(width, seed) for seed, width in enumerate((20, 300, 18))]
    empty = {"camera_poses": torch.zeros(0, 11), "log_scale": torch.zeros(()), "scale_known": torch.tensor(True)}

    def encode(*samples):
        batch = collate_scenes([[{**cloud, **empty} for cloud in sample] for sample in samples])
        with torch.no_grad():
            return model.get_point_tokens(**{name: batch[name] for name in CLOUD}, scene_mask=batch["scene_mask"])

    together = encode(clouds[:2], clouds[2:])
    for (row, column), cloud in zip([(0, 0), (0, 1), (1, 0)], clouds, strict=True):
        alone = encode([cloud])
        keep = together["point_token_mask"][row, column]
        assert int(keep.sum()) == int(alone["point_token_mask"].sum())
        for name in TOKENS[:2]:
            torch.testing.assert_close(together[name][row, column][keep], alone[name][0, 0], atol=1e-5, rtol=1e-5)


def cloud_of(width: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grid = torch.unique(torch.randint(0, width, (400, 3), generator=generator), dim=0)
    coords = 0.02 * grid
    colors_normals = torch.rand(len(grid), 6, generator=generator)
    return {
        "point_features": torch.cat([coords - coords.mean(dim=0), colors_normals], dim=1),
        "point_coords": coords,
        "point_grid_coords": grid,
    }


def test_padding_of_stored_features_is_not_read():
    model = make_model()
    inputs = stored(model, two_scenes(model.config))
    expected = model(**inputs).logits
    inputs["video_features"][~inputs["video_frame_mask"]] = torch.nan
    for name in ("point_tokens", "point_token_positions"):
        inputs[name][~inputs["point_token_mask"]] = torch.nan
    assert torch.equal(model(**inputs).logits, expected)


def test_generate_takes_stored_features():
    model = make_model()
    inputs = two_scenes(model.config)
    inputs = {name: tensor for name, tensor in inputs.items() if name not in ("labels", "regression_targets")}
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    fly = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**stored(model, inputs), **options), fly)


def test_encode_scene_takes_stored_features():
    model = make_model()
    inputs = prepare_inputs(model.config, batch_size=1)
    inputs = {name: inputs[name] for name in ("pixel_values_videos", *tiny_geometry(torch.Generator(), 1))}
    fly, read = model.encode_scene(**inputs), model.encode_scene(**stored(model, inputs))
    assert torch.equal(read.visual_tokens, fly.visual_tokens)
    assert torch.equal(read.rationale_tokens, fly.rationale_tokens)
    assert read.summary == {"num_cameras": 3, "is_metric": True}


def test_stored_frames_and_given_clouds_may_be_of_half_precision():
    model = make_model().to(torch.bfloat16)
    inputs = two_scenes(model.config)
    features = stored(model, inputs)
    assert features["point_tokens"].dtype == features["video_features"].dtype == torch.bfloat16
    assert features["point_token_positions"].dtype == torch.float32
    assert torch.equal(model(**features).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ["point_features", "point_coords"])
def test_both_forms_of_geometry_are_refused(name):
    model = make_model()
    inputs = two_scenes(model.config)
    with pytest.raises(
        ValueError, match=rf"got \['{name}', 'point_tokens', 'point_token_positions'\]. Give all of one"
    ):
        model(**stored(model, inputs), **{name: inputs[name]})


def test_half_a_form_of_geometry_is_refused():
    model = make_model()
    inputs = stored(model, two_scenes(model.config))
    del inputs["point_token_positions"]
    with pytest.raises(ValueError, match=r"got \['point_tokens'\]"):
        model(**inputs)


def test_both_forms_of_frames_are_refused():
    model = make_model()
    inputs = two_scenes(model.config)
    with pytest.raises(ValueError, match=r"in place of `pixel_values_videos`, got both, .*\(2, 2, 3, 3, 24, 24\)"):
        model(**stored(model, inputs), pixel_values_videos=inputs["pixel_values_videos"])


def test_stored_frames_of_another_tower_are_refused():
    model = make_model()
    inputs = stored(model, two_scenes(model.config))
    inputs["video_features"] = inputs["video_features"][..., :8]
    with pytest.raises(ValueError, match=r"the last two \(36, 16\) for this model, got \(2, 2, 3, 36, 8\)"):
        model(**inputs)


def test_stored_frames_cannot_choose_a_layer():
    model = make_model()
    inputs = stored(model, two_scenes(model.config))
    with pytest.raises(ValueError, match=r"cannot be chosen, got \(-2, None\)"):
        model(**inputs, vision_feature_layer=-2)


def test_tokens_of_other_scenes_are_refused():
    model = make_model()
    inputs = stored(model, two_scenes(model.config))
    inputs |= {name: inputs[name][:, :1] for name in TOKENS}
    with pytest.raises(
        ValueError, match=r"`point_tokens` must have shape \(batch_size=2, num_scenes=2, .*got \(2, 1, "
    ):
        model(**inputs)


def test_tokens_that_are_not_finite_are_refused():
    model = make_model()
    inputs = stored(model, two_scenes(model.config))
    inputs["point_tokens"][1, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="`point_tokens` must be finite, got 1 values that are not"):
        model(**inputs)


def test_collate_scenes_refuses_clouds_beside_tokens():
    cloud = {name: torch.ones(2, 3) for name in (*CLOUD[:3], "camera_poses")}
    tokens = {name: torch.ones(2, 3) for name in (*TOKENS[:2], "camera_poses")}
    with pytest.raises(ValueError, match=r"\['point_features', .*\] and with \['point_tokens'"):
        collate_scenes([[cloud], [tokens]])
    with pytest.raises(ValueError, match="same tensors"):
        collate_scenes([[tokens, {**tokens, "video_features": torch.ones(2, 3, 4)}]])
