# SPDX-License-Identifier: Apache-2.0
"""A scene is encoded once: its tokens stand for its frames and geometry. And reconstructors come and go."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

import geode
from geode.demo import read_questions
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.scene_encoding_geode import SceneEncoding
from geode.modeling_geode.scene_geode import SceneGeometry
from geode.modeling_geode.vggt_geode import VggtImageProcessor
from geode.modeling_geode.video_processing_geode import GeodeImageProcessor
from tests.modeling_geode.common_geode import prepare_inputs, tiny_vggt
from tests.modeling_geode.test_modeling_geode import make_model, only_scene


SCENE_INPUTS = (
    "pixel_values_videos",
    "point_features",
    "point_coords",
    "point_grid_coords",
    "point_mask",
    "camera_poses",
    "camera_mask",
    "log_scale",
    "scale_known",
)


def one_scene(model) -> dict:
    """Everything of a sample with one scene, in a batch of one."""
    return only_scene(prepare_inputs(model.config, batch_size=1, has_control_tokens=True))


def of_scene(inputs: dict) -> dict:
    return {name: tensor for name, tensor in inputs.items() if name in SCENE_INPUTS}


def of_text(inputs: dict) -> dict:
    return {name: tensor for name, tensor in inputs.items() if name not in SCENE_INPUTS}


def pictures(count=3, size=(30, 44)) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8))


@pytest.mark.parametrize("inject_features", [False, True])
def test_encoded_scene_gives_the_logits_of_its_frames_and_geometry(inject_features):
    model = make_model(drm_config={"inject_features": inject_features})
    if inject_features:
        torch.nn.init.constant_(model.model.feature_injection.gate, 0.7)
    inputs = one_scene(model)
    with torch.no_grad():
        expected = model(**inputs)
    scene = model.encode_scene(**of_scene(inputs))
    assert scene.visual_tokens.shape == (2, 9, 32)
    assert scene.rationale_tokens.shape == (4, 32)
    with torch.no_grad():
        got = model(**of_text(inputs), **scene.to_model_inputs())
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.regression_values, expected.regression_values, equal_nan=True, atol=1e-4, rtol=1e-4)
    # The tokens are what decides: another scene's give other logits.
    other = model.encode_scene(**{**of_scene(inputs), "point_coords": inputs["point_coords"] + 0.5})
    with torch.no_grad():
        moved = model(**of_text(inputs), **other.to_model_inputs())
    assert (moved.logits - expected.logits).abs().max() > 1e-4


def test_encoded_scene_survives_its_file_and_serves_generation(tmp_path):
    model = make_model()
    inputs = one_scene(model)
    model.encode_scene(**of_scene(inputs)).save(tmp_path / "scene.safetensors")
    scene = SceneEncoding.load(tmp_path / "scene.safetensors")
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options)
    got = model.generate(**of_text(inputs), **scene.to_model_inputs(), **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert scene.encoder_digest == model.model.encoder_digest()
    assert scene.summary["num_points"] == 40
    assert scene.summary["num_cameras"] == 3
    assert scene.summary["is_metric"] is True
    extent = inputs["point_coords"].amax(dim=2) - inputs["point_coords"].amin(dim=2)
    assert scene.summary["extent"] == extent[0, 0].tolist()


def test_a_scene_without_geometry_has_no_rationale():
    model = make_model()
    pixels = one_scene(model)["pixel_values_videos"]
    scene = model.encode_scene(pixel_values_videos=pixels)
    assert scene.rationale_tokens.shape == (0, 32)
    assert scene.summary == {}
    assert list(scene.to_model_inputs()) == ["mm_encoder_outputs"]


def test_frames_alone_are_enough_for_a_model_with_a_reconstructor():
    """Frames go the way that the processor prepares: vision tower at its size, reconstructor at its own, padding known."""
    model = make_model()
    model.attach_reconstructor(tiny_vggt(image_size=42))
    frames = [*pictures(2), *pictures(1, size=(44, 30))]
    scene = model.encode_scene(frames=frames)
    pixels = GeodeImageProcessor(size={"height": 24, "width": 24})(frames, return_tensors="pt")["pixel_values"]
    batch = VggtImageProcessor(image_size=42)(frames)
    assert (batch["content_boxes"][0] != batch["content_boxes"][2]).any()
    by_hand = model.encode_scene(
        pixel_values_videos=pixels[None, None],
        geometry_frames=batch["pixel_values"][None, None],
        geometry_frame_mask=torch.ones(1, 1, 3, dtype=torch.bool),
        geometry_content_boxes=batch["content_boxes"][None, None],
    )
    assert torch.equal(scene.visual_tokens, by_hand.visual_tokens)
    torch.testing.assert_close(scene.rationale_tokens, by_hand.rationale_tokens, atol=1e-5, rtol=1e-4)
    assert scene.summary == by_hand.summary
    assert scene.summary["scale_source"] == "unknown"
    assert scene.summary["num_cameras"] == 3
    white_included = model.encode_scene(
        pixel_values_videos=pixels[None, None], geometry_frames=batch["pixel_values"][None, None]
    )
    assert white_included.summary["num_points"] > scene.summary["num_points"]


def test_measured_geometry_replaces_the_reconstructor():
    model = make_model()
    geometry = SceneGeometry.load(geode.embedded_scene() / "geometry")
    scene = model.encode_scene(frames=pictures(), geometry=geometry)
    assert scene.summary == geometry.summary()
    assert scene.rationale_tokens.isfinite().all()


def test_encode_scene_refuses_what_it_cannot_encode():
    model = make_model()
    scene = of_scene(one_scene(model))
    geometry = SceneGeometry.load(geode.embedded_scene() / "geometry")
    two = {name: torch.cat([tensor, tensor]) for name, tensor in scene.items()}
    for call, message in (
        (lambda: model.encode_scene(), "got both or neither"),
        (lambda: model.encode_scene(frames=pictures(), **scene), "got both or neither"),
        (lambda: model.encode_scene(geometry=geometry, **scene), "`geometry` belongs to `frames`"),
        (lambda: model.encode_scene(**two), "takes one scene, got 2 samples of 1 scenes"),
        (lambda: model.encode_scene(frames=pictures()), r"this model has none.*attach_reconstructor"),
        (lambda: model.encode_scene(frames="room.mp4"), r"got the path room\.mp4. `prepare_scene"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    conditioned = make_model(drm_config={"question_conditioned": True})
    with pytest.raises(ValueError, match="encoded anew for each question"):
        conditioned.encode_scene(**scene)


def test_digest_tells_encoders_apart(tmp_path):
    model = make_model()
    digest = model.model.encoder_digest()
    model.save_pretrained(tmp_path)
    again = GeodeForConditionalGeneration.from_pretrained(tmp_path)
    assert again.model.encoder_digest() == digest
    # The language model and the reconstructor do not touch a scene's tokens.
    again.attach_reconstructor(tiny_vggt())
    with torch.no_grad():
        again.model.language_model.layers[0].mlp.up_proj.weight.mul_(2)
    assert again.model.encoder_digest() == digest
    # Another reconstructor has a digest of its own, though its tensors may lie where those of the first lay.
    first = again.model.reconstructor_digest()
    again.detach_reconstructor()
    assert again.model.reconstructor_digest() is None
    again.attach_reconstructor(tiny_vggt(image_size=42))
    assert again.model.reconstructor_digest() not in (None, first)
    for part in ("drm", "vision_tower", "point_encoder", "multi_modal_projector"):
        parameter = next(getattr(model.model, part).parameters())
        with torch.no_grad():
            parameter.view(-1)[0] += 1e-3
        assert model.model.encoder_digest() != digest, part
        digest = model.model.encoder_digest()
    settings = make_model(point_config={"window_rule": "batch"})
    assert settings.model.encoder_digest() != make_model().model.encoder_digest()


def test_attached_reconstructor_is_frozen_saved_and_detached_again(tmp_path):
    model = make_model()
    vggt = tiny_vggt()
    vggt.save_pretrained(tmp_path / "vggt")
    model.attach_reconstructor(tmp_path / "vggt")
    model.train()
    attached = model.model.reconstructor
    assert not attached.training
    assert not any(parameter.requires_grad for parameter in attached.parameters())
    model.eval()
    expected = model.encode_scene(frames=pictures())

    model.save_pretrained(tmp_path / "with")
    again = GeodeForConditionalGeneration.from_pretrained(tmp_path / "with")
    assert again.config.reconstructor_config.image_size == 28
    for name, tensor in vggt.state_dict().items():
        assert torch.equal(again.model.reconstructor.state_dict()[name], tensor), name
    torch.testing.assert_close(again.encode_scene(frames=pictures()).rationale_tokens, expected.rationale_tokens)

    taken = again.detach_reconstructor()
    assert type(taken).__name__ == "VggtModel"
    assert again.detach_reconstructor() is None
    again.save_pretrained(tmp_path / "without")
    bare = GeodeForConditionalGeneration.from_pretrained(tmp_path / "without")
    assert bare.model.reconstructor is None
    assert bare.config.reconstructor_config is None
    bare.model.attach_reconstructor(taken)
    torch.testing.assert_close(bare.encode_scene(frames=pictures()).rationale_tokens, expected.rationale_tokens)


def test_attach_reconstructor_refuses_another_model():
    model = make_model()
    with pytest.raises(TypeError, match="must be a VggtModel, a path or a Hub id, got GeodeForConditionalGeneration"):
        model.attach_reconstructor(make_model())
    with pytest.raises(TypeError, match="got NoneType"):
        model.attach_reconstructor(None)


def test_tiny_checkpoint_answers_from_an_encoded_scene():
    """One encoding, two questions: the answers are those that the video gives."""
    checkpoint, room = geode.tiny_checkpoint(), geode.embedded_scene()
    model, processor = AutoModel.from_pretrained(checkpoint).eval(), AutoProcessor.from_pretrained(checkpoint)
    scene = model.encode_scene(**processor.prepare_scene(video=str(room / "room.mp4"), geometry=room / "geometry"))
    video = {"type": "video", "path": str(room / "room.mp4"), "geometry": str(room / "geometry")}
    rows = {row["question_type"]: row for row in read_questions(room / "questions.jsonl")}
    for question in ("Locate the sofa.", rows["room_size_estimation"]["question"]):
        answers = []
        for part, extra in ((video, {}), ({"type": "scene", "scene": scene}, scene.to_model_inputs())):
            messages = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            output = model.generate(**inputs, **extra, max_new_tokens=32, return_dict_in_generate=True)
            (answer,) = processor.post_process_answers(output, input_ids=inputs["input_ids"])
            answers.append(answer.to_dict())
        assert answers[0] == answers[1]
        assert answers[0]["values"] or answers[0]["boxes"]
