# SPDX-License-Identifier: Apache-2.0
"""
Tests of the VGGT reconstructor.

The oracle in `tests/fixtures/vggt` is a tiny random model and its outputs, computed with the public implementation named
in `config.json`; `keys_vggt_1b.json` lists the tensors of the public 1B model.
"""

import cmath
import copy
import hashlib
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from geode.configuration.configuration_geode import VggtConfig
from geode.modeling_geode import vggt_conversion_geode, vggt_geode
from geode.modeling_geode.vggt_geode import (
    VggtImageProcessor,
    VggtModel,
    convert_vggt_checkpoint,
    decode_pose,
    encode_pose,
    preprocess_images,
)
from tests.modeling_geode.common_geode import TINY_RECONSTRUCTOR


FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "vggt"
SPEC = json.loads((FIXTURES / "config.json").read_text())
PREPROCESS_CASES = json.loads((FIXTURES / "preprocess" / "cases.json").read_text())["cases"]
# max|a - b| / max|b|. The public model's own float32 rounding is up to 2.2e-6; a real deviation is at least 3e-5.
TOLERANCE = 1e-5
# Reference name to field of the output.
FIELDS = {
    "pose_enc": "pose_encoding",
    "depth": "depth",
    "depth_conf": "depth_confidence",
    "world_points": "world_points",
    "world_points_conf": "world_points_confidence",
    "extrinsics": "extrinsics",
    "intrinsics": "intrinsics",
}
HEAD_FIELDS = {
    "camera": {"pose_encoding", "pose_encodings", "extrinsics", "intrinsics"},
    "depth": {"depth", "depth_confidence"},
    "points": {"world_points", "world_points_confidence"},
}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def load_case(name: str) -> dict[str, torch.Tensor]:
    case = load_file(FIXTURES / f"case_{name}.safetensors")
    case["pixel_values"] = case["images_u8"].float() / 255
    return case


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "model.safetensors")


@pytest.fixture(scope="module")
def model(state) -> VggtModel:
    return convert_vggt_checkpoint(state, SPEC["model"])


@pytest.fixture(scope="module")
def pixel_values() -> torch.Tensor:
    return load_case("a")["pixel_values"]


@pytest.fixture(scope="module")
def full_output(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values, output_tapped_layers=True)


# ----------------------------------------------------------------------------------------------- values


# Native grid, three frames; non-native grid with as many patches, batch of two; a single frame.
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_model_matches_the_public_implementation(model, name):
    case = load_case(name)
    with torch.no_grad():
        output = model(case["pixel_values"], output_tapped_layers=True)
    for stored, field in FIELDS.items():
        assert relative_error(output[field], case[stored]) <= TOLERANCE, field
    assert relative_error(torch.stack(output.pose_encodings), case["pose_enc_list"]) <= TOLERANCE
    assert list(output.tapped_layers) == SPEC["model"]["intermediate_layer_idx"]
    for layer, tokens in output.tapped_layers.items():
        assert relative_error(tokens, case[f"aggregated_{layer}"]) <= TOLERANCE, layer


def test_model_in_float64_matches_the_public_implementation_to_rounding(state):
    want = load_file(FIXTURES / "case_a_float64.safetensors")
    model = convert_vggt_checkpoint(state, SPEC["model"]).double()
    with torch.no_grad():
        output = model(load_case("a")["images_u8"].double() / 255, output_tapped_layers=True)
    assert relative_error(output.tapped_layers[4], want["aggregated_4"]) < 1e-13
    for stored, field in FIELDS.items():
        got = output[field][:, :, ::5, ::5] if stored.startswith(("depth", "world")) else output[field]
        # The public implementation computes intrinsics in float32.
        assert relative_error(got, want[stored]) < (1e-6 if field == "intrinsics" else 1e-13), field


@pytest.mark.convention
def test_depth_and_cameras_unproject_to_the_reference_points(full_output):
    """Depth is z-depth, pixel (0, 0) a pixel centre, extrinsics `cam_from_world`."""
    want = load_case("a")["points_from_depth"].double()
    depth, extrinsics, intrinsics = (full_output[name].double() for name in ("depth", "extrinsics", "intrinsics"))
    height, width = depth.shape[2:4]
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack((u, v, torch.ones_like(u)), dim=-1).double()
    for frame in range(depth.shape[1]):
        points_cam = pixels @ torch.linalg.inv(intrinsics[0, frame]).T * depth[0, frame]
        rotation, translation = extrinsics[0, frame, :, :3], extrinsics[0, frame, :, 3]
        points_world = torch.linalg.solve(rotation, (points_cam - translation)[..., None])[..., 0]
        assert relative_error(points_world, want[0, frame]) < 1e-5


def test_permuting_the_later_frames_permutes_the_predictions(model, pixel_values, full_output):
    order = [0, 2, 1]
    with torch.no_grad():
        permuted = model(pixel_values[:, order])
    for field in FIELDS.values():
        assert relative_error(permuted[field], full_output[field][:, order]) < TOLERANCE
    with torch.no_grad():
        other_first = model(pixel_values[:, [1, 0, 2]], heads=("depth",))
    assert relative_error(other_first.depth, full_output.depth[:, [1, 0, 2]]) > 1e-3


def test_scenes_of_a_batch_do_not_see_each_other(model):
    case = load_case("b")
    with torch.no_grad():
        second = model(case["pixel_values"][1:])
    for stored, field in FIELDS.items():
        assert relative_error(second[field], case[stored][1:]) <= TOLERANCE, field


@pytest.mark.parametrize("size", [1, 2])
def test_chunk_size_does_not_change_the_predictions(model, pixel_values, full_output, size):
    with torch.no_grad():
        output = model(pixel_values, frames_chunk_size=size)
    for field in FIELDS.values():
        assert relative_error(output[field], full_output[field]) < TOLERANCE, field


def test_chunk_size_bounds_what_the_per_frame_parts_see(model, pixel_values):
    seen = []
    parts = [model.trunk, model.layers[1].frame_block, model.layers[1].global_block.mlp, model.depth_head]
    hooks = [part.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0])) for part in parts]
    with torch.no_grad():
        model(pixel_values, heads=("depth",), frames_chunk_size=2)
    for hook in hooks:
        hook.remove()
    assert seen == [2, 1] * 4


@pytest.mark.parametrize("heads", [("camera",), ("depth",), ("points",), ("points", "camera")])
def test_a_subset_of_heads_gives_the_same_values_and_runs_alone(model, pixel_values, full_output, heads, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a head ran that was not asked for")

    modules = {"camera": model.camera_head, "depth": model.depth_head, "points": model.point_head}
    for name in HEAD_FIELDS.keys() - set(heads):
        monkeypatch.setattr(modules[name], "forward", fail)
    with torch.no_grad():
        output = model(pixel_values, heads=heads)
    assert set(output.keys()) == set().union(*(HEAD_FIELDS[name] for name in heads))
    for field in output.keys() - {"pose_encodings"}:
        assert torch.equal(output[field], full_output[field]), field


def test_cameras_alone_keep_no_layer(model, pixel_values, monkeypatch):
    kept, aggregate = [], model._aggregate

    def record(*args, **kwargs):
        tapped, last = aggregate(*args, **kwargs)
        kept.append(list(tapped))
        return tapped, last

    monkeypatch.setattr(model, "_aggregate", record)
    with torch.no_grad():
        for heads in (("camera",), ("depth",)):
            model(pixel_values, heads=heads)
    assert kept == [[], [0, 2, 3, 4]]


def test_tapped_layers_alone_need_no_head(model, pixel_values, full_output):
    with torch.no_grad():
        output = model(pixel_values, heads=(), output_tapped_layers=True)
    assert list(output.keys()) == ["tapped_layers"]
    assert torch.equal(output.tapped_layers[4], full_output.tapped_layers[4])


def test_rotary_embedding_is_a_complex_rotation_at_large_positions():
    """Channel k of a half and its partner k + quarter are one complex number, turned by position * 100^(-2k/half)."""
    config, (height, width), head_dim = VggtConfig(), (29, 37), 16
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 5 + height * width, 3, head_dim, generator=generator, dtype=torch.float64)
    table = vggt_geode._rotary_table((height, width), 5, head_dim=head_dim, config=config, like=states)
    got = vggt_geode._rotate(states, table)
    assert torch.equal(got[:, :5], states[:, :5])
    for row, column in [(0, 0), (28, 0), (3, 36), (28, 36)]:
        token = 5 + row * width + column
        for axis, position in ((0, row + 1), (1, column + 1)):
            for k in range(4):
                real, imaginary = axis * 8 + k, axis * 8 + k + 4
                turn = cmath.exp(1j * position * 100 ** (-2 * k / 8))
                number = complex(states[1, token, 2, real], states[1, token, 2, imaginary]) * turn
                assert got[1, token, 2, real].item() == pytest.approx(number.real, abs=1e-5)
                assert got[1, token, 2, imaginary].item() == pytest.approx(number.imag, abs=1e-5)


@pytest.mark.parametrize("shape", [(16, 28, 37), (8, 1, 5)])
def test_position_map_matches_its_formula(shape):
    channels, height, width = shape
    aspect = 1.321
    got = vggt_geode._add_position_map(torch.zeros(1, *shape), aspect)[0]
    diagonal = math.sqrt(aspect**2 + 1)
    for row in {0, height // 2, height - 1}:
        for column in {0, width // 3, width - 1}:
            limits = aspect / diagonal * (width - 1) / width, 1 / diagonal * (height - 1) / height
            steps = column / (width - 1), 0.5 if height == 1 else row / (height - 1)
            want = []
            for limit, step in zip(limits, steps, strict=True):
                angles = [(2 * step - 1) * limit * 100 ** (-k / (channels // 4)) for k in range(channels // 4)]
                want += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            torch.testing.assert_close(got[:, row, column], 0.1 * torch.tensor(want), atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------- precision, speed, training


@torch.no_grad()
def test_offloaded_model_computes_as_the_whole_one(model, pixel_values, full_output):
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    found = offloaded(pixel_values, output_tapped_layers=True)
    assert torch.equal(found.depth, full_output.depth)
    assert torch.equal(found.world_points, full_output.world_points)


def test_bfloat16_checkpoint_computes_as_autocast_does(model, pixel_values, full_output, tmp_path):
    model.save_pretrained(tmp_path)
    half = VggtModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.layers[0].frame_block.attention.qkv.weight.dtype == torch.bfloat16
    assert half.trunk.encoder.layer[0].attention.q_proj.weight.dtype == torch.bfloat16
    with torch.no_grad():
        got = half(pixel_values, output_tapped_layers=True)
        with torch.autocast("cpu", torch.bfloat16):
            want = model(pixel_values, output_tapped_layers=True)
    for field in FIELDS.values():
        assert got[field].dtype == torch.float32
        assert torch.equal(got[field], want[field]), field
    # Rounding of the weights to 8 bits, spread over the tokens.
    assert 1e-4 < relative_error(got.tapped_layers[4], full_output.tapped_layers[4]) < 0.03


def test_model_cast_to_bfloat16_as_a_whole_warns(state, pixel_values, monkeypatch):
    warned = []
    monkeypatch.setattr(vggt_geode.logger, "warning_once", warned.append)
    with torch.no_grad():
        convert_vggt_checkpoint(state, SPEC["model"]).to(torch.bfloat16)(pixel_values, heads=("depth",))
    assert "heads are in half precision" in warned[0]


def test_attention_implementations_agree(state, pixel_values, full_output):
    model = convert_vggt_checkpoint(state, SPEC["model"])
    model.set_attn_implementation("eager")
    assert model.trunk.config._attn_implementation == "eager"
    with torch.no_grad():
        output = model(pixel_values)
    for field in FIELDS.values():
        assert relative_error(output[field], full_output[field]) < TOLERANCE, field


def test_flash_kernels_get_half_precision_only(model, pixel_values, tmp_path, monkeypatch):
    dtypes = []

    def probe(module, query, key, value, *args, **kwargs):
        dtypes.extend((query.dtype, key.dtype, value.dtype))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    model.save_pretrained(tmp_path)
    half = VggtModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    # The library refuses to load an unknown flash kernel, so the name is set past its check.
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_probe", probe)
    half.config._attn_implementation_internal = "flash_probe"
    with torch.no_grad():
        half(pixel_values)
    # Five frame and five global blocks; the calls of the float32 camera head go elsewhere.
    assert dtypes == [torch.bfloat16] * 3 * 10


def test_forward_is_one_graph():
    model = VggtModel(tiny_config()).eval()
    pixel_values = torch.rand(1, 3, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert relative_error(compiled(pixel_values).world_points, model(pixel_values).world_points) < TOLERANCE


@pytest.mark.slow
def test_export_gives_the_same_outputs_for_another_number_of_frames(tmp_path):
    """As docs/deployment.md shows it: the number of frames stays free where all of them go through at a time."""

    class Reconstruct(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            output = self.model(pixel_values, heads=("camera", "depth"))
            return output.pose_encoding, output.depth, output.depth_confidence

    model = Reconstruct(VggtModel(tiny_config(frames_chunk_size=32)).eval())
    generator = torch.Generator().manual_seed(0)
    example, frames = (torch.rand(1, count, 3, 28, 42, generator=generator) for count in (4, 6))
    count = torch.export.Dim("num_frames", min=3, max=32)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({1: count},))
        torch.export.save(program, tmp_path / "vggt.pt2")
        loaded = torch.export.load(tmp_path / "vggt.pt2").module()
        for got, want in zip(loaded(frames), model(frames), strict=True):
            assert relative_error(got, want) < TOLERANCE


def scalar_loss(output) -> torch.Tensor:
    terms = [encoding.square().mean() for encoding in output.pose_encodings]
    terms += [output[name].log1p().mean() for name in ("depth", "depth_confidence", "world_points_confidence")]
    return sum(terms) + output.world_points.abs().mean()


def test_gradient_reaches_every_trainable_parameter_with_and_without_checkpointing(state):
    pixel_values = load_case("b")["pixel_values"]
    gradients = []
    for checkpointing in (False, True):
        model = convert_vggt_checkpoint(state, SPEC["model"]).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.layers[0].global_block.gradient_checkpointing
        scalar_loss(model(pixel_values)).backward()
        gradients.append({name: param.grad for name, param in model.named_parameters() if param.requires_grad})
    plain, checkpointed = gradients
    assert len(plain) == len(list(model.parameters())) - 1
    assert "trunk.embeddings.mask_token" not in plain
    for name, gradient in plain.items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, checkpointed[name])


def test_the_pose_that_is_fed_back_carries_no_gradient(state, pixel_values):
    """Only the first round reads the initial pose, so a loss on the last round does not move it."""
    model = convert_vggt_checkpoint(state, SPEC["model"])
    output = model(pixel_values, heads=("camera",))
    output.pose_encodings[-1].sum().backward(retain_graph=True)
    assert model.camera_head.initial_pose.grad is None
    assert model.camera_head.pose_embedding.weight.grad.abs().max() > 0
    output.pose_encodings[0].sum().backward()
    assert model.camera_head.initial_pose.grad.abs().max() > 0


# ----------------------------------------------------------------------------------- saving and converting


def tiny_config(**changes) -> VggtConfig:
    values = {"camera_num_iterations": 2, "dense_projection_sizes": [4, 8, 12, 16]}
    return VggtConfig(**(TINY_RECONSTRUCTOR | values | changes))


def test_save_and_load_is_bitwise(model, pixel_values, full_output, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = VggtModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    # The path that it was loaded from, and the names of the classes in the code beside it, are not its sizes.
    added = {"_name_or_path": "", "auto_map": {}}
    assert loaded.config.to_diff_dict() | added == model.config.to_diff_dict() | added
    with torch.no_grad():
        output = loaded(pixel_values)
    for field in FIELDS.values():
        assert torch.equal(output[field], full_output[field]), field


def test_untrained_model_sees_through_finite_cameras():
    torch.manual_seed(0)
    model = VggtModel(tiny_config())
    with torch.no_grad():
        output = model(torch.rand(2, 3, 3, 28, 42), heads=("camera",))
    assert torch.isfinite(output.intrinsics).all()
    assert ((output.pose_encoding[..., 7:] - 1).abs() < 0.9).all()
    assert (output.pose_encoding[..., 6] > 0.3).all()
    assert all(param.isfinite().all() for param in model.parameters())
    assert (model.layers[0].frame_block.layer_scale1 == 0.01).all()


def test_every_tensor_of_the_public_1b_checkpoint_finds_its_place():
    published = json.loads((FIXTURES / "keys_vggt_1b.json").read_text())
    assert len(published["shapes"]) == 1797
    state = {name: torch.empty(shape, device="meta") for name, shape in published["shapes"].items()}
    model = convert_vggt_checkpoint(state)
    assert sum(param.numel() for param in model.parameters()) == published["num_parameters_without_track_head"]
    targets = [vggt_conversion_geode.checkpoint_name(name) for name in model.state_dict()]
    assert len(set(targets)) == len(targets)
    used = {name for name, _ in targets}
    assert used == {name for name in published["shapes"] if not name.startswith("track_head.")}
    with torch.no_grad():
        output = model(torch.empty(1, 9, 3, 392, 518, device="meta"))
    assert output.world_points.shape == (1, 9, 392, 518, 3)
    assert not list(model.buffers(recurse=False))


def test_converter_copies_and_reads_files_alike(state, model, tmp_path):
    mine = {name: tensor.clone() for name, tensor in state.items()}
    converted = convert_vggt_checkpoint(mine, SPEC["model"])
    for tensor in mine.values():
        tensor.zero_()
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pt")
    others = [convert_vggt_checkpoint(tmp_path / name, SPEC["model"]) for name in ("model.safetensors", "model.pt")]
    for name, want in model.state_dict().items():
        for other in (converted, *others):
            assert torch.equal(other.state_dict()[name], want), name


def test_converter_takes_our_config_and_the_published_short_one(state):
    converted = convert_vggt_checkpoint(state, SPEC["model"])
    again = convert_vggt_checkpoint(state, converted.config)
    assert again.config.rope_theta == 100
    assert again.config.tapped_layers == [0, 2, 3, 4]
    short = vggt_conversion_geode._resolve_config({"embed_dim": 1024, "img_size": 518, "patch_size": 14})
    assert short.to_dict() == VggtConfig().to_dict()


def test_converter_drops_the_tracker_aloud_and_does_without_a_mask_token(state, monkeypatch):
    messages = []
    monkeypatch.setattr(vggt_conversion_geode.logger, "warning", messages.append)
    changed = state | {"track_head.a": torch.zeros(1), "track_head.b.weight": torch.zeros(2)}
    del changed["aggregator.patch_embed.mask_token"]
    converted = convert_vggt_checkpoint(changed, SPEC["model"])
    assert messages == ["Dropped the 2 tensors `track_head.*` of the checkpoint: this model does not track points."]
    assert not converted.trunk.embeddings.mask_token.any()


def test_converter_names_every_tensor_that_does_not_fit(state):
    broken = dict(state)
    del broken["camera_head.trunk.1.attn.qkv.bias"]
    broken["aggregator.frame_blocks.0.attn.qkv.weight"] = torch.zeros(93, 32)
    broken["nonsense.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="3 of ") as error:
        convert_vggt_checkpoint(broken, SPEC["model"])
    assert "missing `camera_head.trunk.1.attn.qkv.bias`" in str(error.value)
    assert "unexpected `nonsense.weight`" in str(error.value)
    assert "`aggregator.frame_blocks.0.attn.qkv.weight` has shape (93, 32), expected (96, 32)" in str(error.value)


def test_converter_refuses_other_files_and_configs(state, tmp_path):
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pt or \.pth, got '.*model\.ckpt'"):
        convert_vggt_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"unknown keys \['vit_deep'\]"):
        convert_vggt_checkpoint(state, SPEC["model"] | {"vit_deep": 3})
    torch.save({"hook": logging.getLogger}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"pickled code is never run\. \(Weights only load failed"):
        convert_vggt_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tapped_layers": [0, 0, 0, 0]}, r"the last of them the last layer \(1\), got \[0, 0, 0, 0\]"),
        ({"tapped_layers": [0, 1, 1]}, r"must be four layers .* got \[0, 1, 1\]"),
        ({"dense_projection_sizes": [4, 8, 12, 18]}, r"multiples of 4 .* got \[4, 8, 12, 18\] and 8"),
        ({"num_attention_heads": 8}, "16 for 8 heads"),
        ({"mlp_ratio": 2.5}, "whole number.* got 2.5"),
        ({"camera_num_attention_heads": 5}, "must divide twice the `hidden_size` 16, got 5"),
    ],
)
def test_config_refuses_what_cannot_be_built(changes, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**changes)


# ------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (torch.zeros(3, 3, 28, 42), r"got \(3, 3, 28, 42\)\. Add the batch axis with `pixel_values\[None\]`"),
        (torch.zeros(3, 28, 42), r"must have shape \(batch_size, num_frames, 3, height, width\), got \(3, 28, 42\)"),
        (torch.zeros(1, 2, 28, 42, 3), r"got \(1, 2, 28, 42, 3\)"),
        (torch.zeros(1, 0, 3, 28, 42), r"at least one frame .* got shape \(1, 0, 3, 28, 42\)"),
        (torch.zeros(1, 2, 3, 30, 42), r"multiples of 14, got \(30, 42\)\. Resize to \(28, 42\)"),
        (torch.zeros(1, 2, 3, 28, 5), r"got \(28, 5\)\. Resize to \(28, 14\)"),
        (torch.zeros(1, 2, 3, 28, 42, dtype=torch.uint8), r"got torch\.uint8\. Divide 8-bit frames by 255"),
        (torch.full((1, 2, 3, 28, 42), torch.nan), "must be finite, got values between nan and nan"),
        (torch.full((1, 2, 3, 28, 42), torch.inf), "must be finite, got values between inf and inf"),
        (torch.full((1, 2, 3, 28, 42), 255.0), "between 255 and 255. Divide 8-bit frames by 255"),
        (torch.full((1, 2, 3, 28, 42), -2.25), "between -2.25 and -2.25. Do not normalise"),
    ],
)
def test_forward_refuses_wrong_frames(model, pixel_values, message):
    with pytest.raises(ValueError, match=message):
        model(pixel_values)


def test_forward_takes_rounding_beyond_the_range(model):
    pixel_values = torch.full((1, 1, 3, 14, 28), 1 + 1e-4)
    with torch.no_grad():
        assert model(pixel_values, heads=("depth",)).depth.shape == (1, 1, 14, 28, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": ("depth", "track")}, r"takes any of \('camera', 'depth', 'points'\), got \['track'\]"),
        ({"heads": "depth"}, r"got the string 'depth'\. Pass `heads=\('depth',\)`"),
        ({"heads": ()}, "`heads` is empty"),
        ({"frames_chunk_size": 0}, "at least 1, got 0"),
    ],
)
def test_forward_refuses_wrong_options(model, pixel_values, options, message):
    with pytest.raises(ValueError, match=message):
        model(pixel_values, **options)


# ------------------------------------------------------------------------------------------------- poses


def test_pose_codec_matches_the_public_implementation():
    """All four branches of the quaternion formula are covered by the 24 cameras."""
    codec = load_file(FIXTURES / "pose_codec.safetensors")
    size = tuple(codec["image_hw"].tolist())
    torch.testing.assert_close(encode_pose(codec["extrinsics"], codec["intrinsics"], size), codec["pose_enc"])
    extrinsics, intrinsics = decode_pose(codec["pose_enc"], size)
    torch.testing.assert_close(extrinsics, codec["extrinsics_roundtrip"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(intrinsics, codec["intrinsics_roundtrip"])


@pytest.mark.convention
def test_pose_encoding_of_a_camera_by_hand():
    """A camera turned by 90 degrees about its z axis: x -> y. Focal lengths of a 90 and a 2 * atan(2) degree view."""
    extrinsics = torch.tensor([[0.0, -1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 1.0, 3.0]])
    intrinsics = torch.tensor([[10.0, 0.0, 3.0], [0.0, 14.0, 5.0], [0.0, 0.0, 1.0]])
    half = math.sqrt(0.5)
    want = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, half, half, math.pi / 2, 2 * math.atan(2.0)])
    torch.testing.assert_close(encode_pose(extrinsics, intrinsics, (28, 40)), want)
    got_extrinsics, got_intrinsics = decode_pose(want * torch.tensor([1.0] * 3 + [3.0] * 4 + [1.0] * 2), (28, 40))
    torch.testing.assert_close(got_extrinsics, extrinsics)
    torch.testing.assert_close(got_intrinsics, torch.tensor([[10.0, 0.0, 20.0], [0.0, 14.0, 14.0], [0.0, 0.0, 1.0]]))


def test_pose_codec_is_differentiable_in_every_branch():
    """One camera for each component of the quaternion being the largest; the real part is away from its sign change."""
    quat_xyzw = torch.tensor(
        [[0.1, -0.2, 0.3, 0.9], [0.9, 0.1, -0.3, 0.2], [-0.1, 0.8, 0.3, 0.4], [0.3, 0.2, -0.9, 0.1]]
    )
    rest = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.0, 3.0], [-0.5, 0.25, 1.0], [0.0, 0.0, 4.0]])
    pose = torch.cat((rest, quat_xyzw, rest[:, 2:] / 4, rest[:, 2:] / 3), dim=-1).double().requires_grad_()

    def roundtrip(pose: torch.Tensor) -> torch.Tensor:
        return encode_pose(*decode_pose(pose, (294, 518)), (294, 518))

    want = torch.cat((pose[:, :3], torch.nn.functional.normalize(pose[:, 3:7], dim=-1), pose[:, 7:]), dim=-1)
    torch.testing.assert_close(roundtrip(pose), want)
    assert torch.autograd.gradcheck(roundtrip, (pose,))


def test_pose_codec_refuses_wrong_shapes():
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 9\), got \(2, 8\)"):
        decode_pose(torch.zeros(2, 8), (28, 28))
    with pytest.raises(ValueError, match=r"got \(2, 4, 4\) and \(2, 3, 3\)"):
        encode_pose(torch.zeros(2, 4, 4), torch.zeros(2, 3, 3), (28, 28))
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\) and \(3, 3\)"):
        encode_pose(torch.zeros(2, 3, 4), torch.zeros(3, 3), (28, 28))


# ------------------------------------------------------------------------------------------ preprocessing


@pytest.mark.parametrize("case", PREPROCESS_CASES, ids=lambda case: "+".join(case["inputs"]) + "-" + case["mode"])
def test_preprocessing_is_bitwise_that_of_the_public_loader(case):
    got = preprocess_images([FIXTURES / "preprocess" / name for name in case["inputs"]], mode=case["mode"])
    assert list(got.shape) == case["shape"]
    eight_bit = (got * 255).round().to(torch.uint8)
    assert torch.equal(eight_bit.float() / 255, got)
    wanted = [np.asarray(Image.open(FIXTURES / "preprocess" / name).convert("RGB")) for name in case["outputs"]]
    assert np.array_equal(eight_bit.permute(0, 2, 3, 1).numpy(), np.stack(wanted))
    assert hashlib.sha256(eight_bit.numpy().tobytes()).hexdigest() == case["sha256_u8"]


def test_preprocessing_does_not_depend_on_the_container():
    path = FIXTURES / "preprocess" / "landscape.png"
    image = Image.open(path).convert("RGB")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    want = preprocess_images([path, path])
    for images in (
        [image, array],
        [tensor, tensor.float() / 255],
        np.stack([array, array]),
        tensor.expand(2, -1, -1, -1),
    ):
        assert torch.equal(preprocess_images(images), want)
    assert torch.equal(preprocess_images(str(path)), want[:1])
    # Floating point frames are rounded to the nearest of 256 values, not cut off.
    for shift in (-0.4, 0.4):
        assert torch.equal(preprocess_images(((tensor + shift) / 255).clamp(0, 1)), want[:1])


def ramp(height: int, width: int) -> np.ndarray:
    """Red counts columns, green counts rows, blue is 0: a pixel says where it was."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack((columns, rows, np.zeros_like(rows)), axis=-1).astype(np.uint8)


@pytest.mark.convention
@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("size", [(150, 70), (90, 200), (101, 100)])
def test_transform_leads_back_to_the_original_pixel(mode, size):
    batch = VggtImageProcessor(mode, image_size=112)(ramp(*size))
    pixels = (batch["pixel_values"][0] * 255).double()
    left, top, right, bottom = batch["content_boxes"][0].tolist()
    # Away from the border, where bicubic interpolation of a ramp is a ramp.
    v, u = torch.meshgrid(torch.arange(top + 6, bottom - 6), torch.arange(left + 6, right - 6), indexing="ij")
    homogeneous = torch.stack((u, v, torch.ones_like(u)), dim=-1).double()
    original = homogeneous @ batch["original_from_processed"][0].T
    shown = pixels[:2, v, u].permute(1, 2, 0)
    # Rounding to 8 bits, plus a hair for the resampling weights.
    assert (original[..., :2] - shown).abs().max() < 0.75
    assert (original[..., :2] - shown).mean(dim=(0, 1)).abs().max() < 0.05
    assert batch["original_sizes"].tolist() == [list(size)]
    is_padding = torch.ones(pixels.shape[1:], dtype=torch.bool)
    is_padding[top:bottom, left:right] = False
    assert (pixels[2][is_padding] == 255).all()
    assert (pixels[2][~is_padding] == 0).all()


def test_processor_keeps_each_frames_transform_when_sizes_differ():
    batch = VggtImageProcessor(image_size=112)([ramp(60, 112), ramp(28, 56)])
    # 60 rows become round(60 / 14) * 14 = 56, as do 28 * 2; frames of one size need no padding.
    assert batch["pixel_values"].shape == (2, 3, 56, 112)
    batch = VggtImageProcessor(image_size=112)([ramp(112, 112), ramp(28, 56)])
    assert batch["content_boxes"].tolist() == [[0, 0, 112, 112], [0, 28, 112, 84]]
    # The second frame is doubled and moved down by 28: u = (u' + 0.5) / 2 - 0.5 and v = (v' - 28 + 0.5) / 2 - 0.5.
    want = torch.tensor([[0.5, 0.0, -0.25], [0.0, 0.5, -14.25], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert torch.equal(batch["original_from_processed"][1], want)


def test_processor_saves_and_loads(tmp_path):
    VggtImageProcessor("pad", image_size=56).save_pretrained(tmp_path)
    loaded = VggtImageProcessor.from_pretrained(tmp_path)
    assert (loaded.mode, loaded.image_size, loaded.patch_size) == ("pad", 56, 14)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one frame, got none"),
        ([np.zeros((3, 20, 30), np.uint8)], r"\(height, width, 3\) as ndarray, got \(3, 20, 30\)"),
        ([torch.zeros(20, 30, 3)], r"\(3, height, width\) as Tensor, got \(20, 30, 3\)"),
        ([np.full((20, 30, 3), 255.0)], r"got float64 between 255\.0 and 255\.0"),
        ([np.full((20, 30, 3), np.nan)], "got float64 between nan and nan"),
        ([np.zeros((20, 30, 3), np.int64)], "got int64"),
        ([np.zeros((2, 400, 3), np.uint8)], "frame of 2 x 400 pixels, .* resized to 0 x 518"),
        ([3.5], "paths, PIL images, arrays or tensors, got float"),
    ],
)
def test_preprocessing_refuses_wrong_images(images, message):
    with pytest.raises(ValueError, match=message):
        preprocess_images(images)


def test_processor_refuses_wrong_options():
    with pytest.raises(ValueError, match=r"must be one of \('crop', 'pad'\), got 'stretch'"):
        VggtImageProcessor("stretch")
    with pytest.raises(ValueError, match="multiple of `patch_size`, got 500 and 14"):
        VggtImageProcessor(image_size=500)
