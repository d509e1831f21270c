# SPDX-License-Identifier: Apache-2.0
"""The point encoder against outputs of the public reference (random weights), slow loops, and invariances."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from geode.configuration.configuration_geode import SonataConfig
from geode.modeling_geode import sonata_geode
from geode.modeling_geode.serialization_geode import (
    VoxelGrid,
    attention_layout,
    attention_windows,
    neighbor_pairs,
    serialize,
    voxel_keys,
)
from geode.modeling_geode.sonata_geode import (
    SonataBlock,
    SonataModel,
    SonataPooling,
    SonataStageContext,
    SonataSubmanifoldConv,
    convert_sonata_checkpoint,
)


FIXTURES = Path(__file__).parent.parent / "fixtures" / "sonata"
CASES = {path.stem.removeprefix("case_"): path for path in sorted(FIXTURES.glob("case_*.safetensors"))}
# The reference's spread between two of its own convolutions is 1e-5.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def reference_checkpoint() -> dict:
    config = json.loads((FIXTURES / "config.json").read_text())
    return {"config": config, "state_dict": load_file(FIXTURES / "weights.safetensors")}


@pytest.fixture(scope="module")
def reference_model() -> SonataModel:
    """Build the model of the fixtures: 5 stages, widths 16 to 48, windows of 8 to 32."""
    return convert_sonata_checkpoint(reference_checkpoint())


@pytest.fixture
def tiny_model() -> SonataModel:
    """Build a new model of two stages with weights that are far from zero."""
    torch.manual_seed(0)
    config = tiny_config(initializer_range=0.2)
    return SonataModel(config).eval()


def tiny_config(**changes) -> SonataConfig:
    values = {
        "stride": [2],
        "enc_depths": [2, 1],
        "enc_channels": [12, 16],
        "enc_num_head": [3, 2],
        "enc_patch_size": [16, 8],
        "drop_path": 0.0,
    }
    return SonataConfig(**(values | changes))


def random_inputs(sizes: list[int], side: int = 11, seed: int = 0) -> dict[str, torch.Tensor]:
    """Unique voxels in random order, with features, for clouds of given sizes."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.cat([torch.randperm(side**3, generator=generator)[:size] for size in sizes])
    grid_coord = torch.stack([flat // side**2, flat // side % side, flat % side], dim=1)
    return {
        "feat": torch.randn(len(flat), 9, generator=generator),
        "coord": 0.02 * (grid_coord + torch.rand(len(flat), 3, generator=generator)),
        "grid_coord": grid_coord,
        "offset": torch.tensor(sizes).cumsum(0),
    }


def case_inputs(name: str) -> tuple[dict, dict]:
    case = load_file(CASES[name])
    inputs = {
        "feat": case["in.feat"],
        "coord": case["in.coord"],
        "grid_coord": case["in.grid_coord"].long(),
        "offset": case["in.offset"].long(),
    }
    if "in.mask" in case:
        inputs["mask"] = case["in.mask"]
    if "order_perm" in case:
        inputs["order_permutation"] = case["order_perm"].long()
    return case, inputs


def set_window_rule(model: SonataModel, case_name: str) -> None:
    model.config.window_rule = "cloud" if case_name.endswith(("varlen", "shuffled")) else "batch"


def sorted_grid(inputs: dict[str, torch.Tensor]) -> VoxelGrid:
    """Sort by (cloud, x, y, z) with Python's sort."""
    sizes = torch.diff(inputs["offset"], prepend=torch.zeros(1, dtype=torch.long))
    batch = torch.arange(len(sizes)).repeat_interleave(sizes)
    rows = sorted([b, *v] for b, v in zip(batch.tolist(), inputs["grid_coord"].tolist(), strict=True))
    batch, grid_coord = torch.tensor(rows)[:, 0], torch.tensor(rows)[:, 1:]
    max_index = int(grid_coord.max())
    return VoxelGrid(grid_coord, batch, voxel_keys(grid_coord, batch, max_index), max_index, sizes.tolist())


def slow_convolution(grid: VoxelGrid, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Sum the 27 neighbours of each voxel, found in a dictionary."""
    places = {
        (b, *v): row for row, (b, v) in enumerate(zip(grid.batch.tolist(), grid.grid_coord.tolist(), strict=True))
    }
    out = []
    for cloud, px, py, pz in places:
        total = bias
        for a, b, c in itertools.product(range(3), repeat=3):
            neighbor = places.get((cloud, px + a - 1, py + b - 1, pz + c - 1))
            if neighbor is not None:
                total = total + weight[:, a, b, c] @ x[neighbor]
        out.append(total)
    return torch.stack(out)


def slow_attention(
    block: SonataBlock, grid: VoxelGrid, x: torch.Tensor, order: str, window: int, scale
) -> torch.Tensor:
    """Softmax attention, one window and one head at a time."""
    curve = serialize(grid.grid_coord, grid.batch, depth=grid.depth, order=order).argsort()
    heads, width = block.attn.num_heads, x.shape[1]
    query, key, value = block.attn.qkv(x).split(width, dim=1)
    out, start = torch.zeros_like(x), 0
    for size in grid.sizes:
        cloud = curve[start : start + size]
        start += size
        for first in range(0, size, window):
            queries = cloud[first : first + window]
            keys = queries if len(queries) == window else cloud[-window:]
            for columns in torch.arange(width).chunk(heads):
                scores = query[queries][:, columns] @ key[keys][:, columns].T * (scale or (width // heads) ** -0.5)
                out[queries[:, None], columns] = torch.softmax(scores, dim=1) @ value[keys][:, columns]
    return block.attn.proj(out)


@pytest.mark.parametrize("name", CASES)
def test_model_matches_reference(reference_model, name):
    case, inputs = case_inputs(name)
    set_window_rule(reference_model, name)
    with torch.no_grad():
        output = reference_model(**inputs)
    torch.testing.assert_close(output.last_hidden_state, case["final.feat"], **TOLERANCE)
    compared = 0
    for stage in range(5):
        for field, values in (("feat_out", output.hidden_states), ("coord", output.coords)):
            if f"s{stage}.{field}" in case:
                torch.testing.assert_close(values[stage], case[f"s{stage}.{field}"], **TOLERANCE)
                compared += 1
        for field, values in (
            ("grid_coord", output.grid_coords),
            ("offset", output.offsets),
            ("pooling_inverse", output.pooling_inverses),
        ):
            if f"s{stage}.{field}" in case:
                assert values[stage].tolist() == case[f"s{stage}.{field}"].tolist()
                compared += 1
    assert compared >= 10


@pytest.mark.parametrize("name", ["batch_AB", "batch_AB_shuffled", "small_S"])
def test_upcast_matches_reference(reference_model, name):
    case, inputs = case_inputs(name)
    set_window_rule(reference_model, name)
    with torch.no_grad():
        output = reference_model(**inputs)
    rows = case["final.upcast_rows"].long()
    torch.testing.assert_close(reference_model.upcast(output, 4)[rows], case["final.upcast_concat_all"], **TOLERANCE)
    features = reference_model.upcast(output, 2)
    for stage in (2, 1):
        features = features[output.pooling_inverses[stage]]
    torch.testing.assert_close(features[rows], case["final.upcast_demo2"], **TOLERANCE)
    assert torch.equal(reference_model.upcast(output, 0), output.last_hidden_state)
    with pytest.raises(ValueError, match=r"`levels` must lie in \[0, 4\], the number of poolings, got 5"):
        reference_model.upcast(output, 5)


@pytest.mark.parametrize("stage", [0, 4])
def test_block_parts_match_reference(reference_model, stage):
    case, inputs = case_inputs("batch_AB")
    set_window_rule(reference_model, "batch_AB")
    block, seen = reference_model.stages[stage].blocks[0], {}
    parts = {"cpe_conv": block.position.conv, "cpe": block.position, "attn": block.attn}
    hooks = [
        part.register_forward_hook(lambda _, __, value, key=key: seen.update({key: value}))
        for key, part in parts.items()
    ]
    with torch.no_grad():
        reference_model(**inputs)
    for hook in hooks:
        hook.remove()
    batch, voxels = case[f"s{stage}.batch"].tolist(), case[f"s{stage}.grid_coord"].tolist()
    order = sorted(range(len(batch)), key=lambda row: [batch[row], *voxels[row]])
    for key in parts:
        torch.testing.assert_close(seen[key], case[f"s{stage}.block0.{key}"][order], **TOLERANCE)


@pytest.mark.parametrize("name", ["single_A", "batch_ASB_varlen"])
def test_gradients_match_reference(name):
    model = convert_sonata_checkpoint(reference_checkpoint())
    set_window_rule(model, name)
    golden = json.loads((FIXTURES / "grads.json").read_text())[name]
    _, inputs = case_inputs(name)
    inputs["feat"].requires_grad_()
    final = model(**inputs).last_hidden_state.double()
    rows, columns = torch.arange(final.shape[0])[:, None], torch.arange(final.shape[1])
    (final * torch.sin(0.1 * rows.double() + 0.37 * columns)).sum().backward()
    torch.testing.assert_close(inputs["feat"].grad[:8], torch.tensor(golden["feat_grad_rows0_8"]), **TOLERANCE)
    got = {
        sonata_geode.published_name(key): value.grad.double().norm().item()
        for key, value in model.named_parameters()
        if value.grad is not None
    }
    want = {key: norm for key, norm in golden["loss_grad_norms"].items() if norm and key in model_names(model)}
    # Only the mask token is unused. The key's bias shifts all scores of a query alike, so a third of qkv.bias is zero.
    assert model_names(model) - want.keys() == {"embedding.mask_token"}
    assert got == pytest.approx(want, rel=1e-4)


def model_names(model: SonataModel) -> set[str]:
    return {sonata_geode.published_name(key) for key, _ in model.named_parameters()}


def test_convolution_matches_dictionary_of_voxels():
    grid = sorted_grid(random_inputs([40, 1, 70], side=6))
    conv = SonataSubmanifoldConv(5).double()
    torch.manual_seed(0)
    torch.nn.init.normal_(conv.weight)
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(111, 5, dtype=torch.float64)
    want = slow_convolution(grid, x, conv.weight, conv.bias)
    torch.testing.assert_close(conv(x, neighbor_pairs(grid)), want, atol=1e-12, rtol=0)


def test_convolution_does_not_depend_on_the_chunk_size(monkeypatch):
    grid = sorted_grid(random_inputs([200], side=7))
    conv = SonataSubmanifoldConv(4).double()
    torch.manual_seed(0)
    torch.nn.init.normal_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    x, pairs = torch.randn(200, 4, dtype=torch.float64), neighbor_pairs(grid)
    whole = conv(x, pairs)
    monkeypatch.setattr(sonata_geode, "ROWS_CHUNK_SIZE", 7)
    torch.testing.assert_close(conv(x, pairs), whole, atol=1e-12, rtol=0)


def test_convolution_gradients_are_numerical_gradients():
    pairs = neighbor_pairs(sorted_grid(random_inputs([9, 4], side=3)))
    torch.manual_seed(0)
    x = torch.randn(13, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    apply = sonata_geode._SubmanifoldConvolution.apply
    assert torch.autograd.gradcheck(lambda *tensors: apply(*tensors, pairs), (x, weight, bias))


@pytest.mark.parametrize(
    "changes",
    [{}, {"pre_norm": False}, {"layer_scale": 0.3}, {"qk_scale": 0.7, "qkv_bias": False, "mlp_ratio": 2.5}],
    ids=str,
)
def test_block_matches_slow_block(changes):
    config = tiny_config(initializer_range=0.3, **changes)
    grid = sorted_grid(random_inputs([37, 5, 48], side=6))
    torch.manual_seed(0)
    block = SonataModel(config).double().stages[0].blocks[0]
    x = torch.randn(90, 12, dtype=torch.float64)
    layout = attention_layout(grid.sizes, 16, x.device)
    context = SonataStageContext(
        90, neighbor_pairs(grid), [attention_windows(grid, order, layout) for order in ("z", "hilbert-trans")]
    )
    with torch.no_grad():
        got = block(x, context, 3)
        conv, linear, norm = block.position.conv, block.position.linear, block.position.norm
        x = x + norm(linear(slow_convolution(grid, x, conv.weight, conv.bias)))
        gain = 1.0 if config.layer_scale is None else torch.full((12,), 0.3).double()
        before = block.norm1 if config.pre_norm else torch.nn.Identity()
        x = x + gain * slow_attention(block, grid, before(x), "hilbert-trans", 16, config.qk_scale)
        x = x if config.pre_norm else block.norm1(x)
        before = block.norm2 if config.pre_norm else torch.nn.Identity()
        hidden = before(x) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + gain * (hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
        want = x if config.pre_norm else block.norm2(x)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_pooling_takes_the_maximum_of_projected_members():
    torch.manual_seed(0)
    pooling = SonataPooling(tiny_config(), 1).double()
    x, inverse = torch.randn(7, 12, dtype=torch.float64, requires_grad=True), torch.tensor([1, 0, 1, 2, 0, 1, 1])
    projected = x @ pooling.proj.weight.T + pooling.proj.bias
    want = torch.stack([projected[inverse == voxel].max(dim=0).values for voxel in range(3)])
    got = pooling(x, inverse, 3)
    torch.testing.assert_close(got, F.gelu(F.layer_norm(want, (16,))), atol=1e-12, rtol=0)
    # `max` sends its gradient to one row, so this compares the routing too.
    weights = torch.randn(3, 16, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (got, F.gelu(F.layer_norm(want, (16,))))]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_row_order_of_the_input_does_not_change_a_bit(tiny_model):
    inputs = random_inputs([60, 90])
    shuffle = torch.cat([torch.randperm(60), 60 + torch.randperm(90)])
    shuffled = {name: value if name == "offset" else value[shuffle] for name, value in inputs.items()}
    with torch.no_grad():
        output, other = tiny_model(**inputs), tiny_model(**shuffled)
    assert torch.equal(other.hidden_states[0], output.hidden_states[0][shuffle])
    assert torch.equal(other.pooling_inverses[1], output.pooling_inverses[1][shuffle])
    for name in ("hidden_states", "coords", "grid_coords", "offsets"):
        assert torch.equal(getattr(other, name)[1], getattr(output, name)[1])


def test_clouds_of_a_batch_are_independent_when_windowed_by_cloud(tiny_model):
    # Every cloud reaches the same largest index, because the depth of the codes is that of the batch.
    clouds = [random_inputs([size], seed=size) for size in (70, 5, 101)]
    for cloud in clouds:
        cloud["grid_coord"][0] = 10
        assert len(cloud["grid_coord"].unique(dim=0)) == len(cloud["grid_coord"])
    batch = {name: torch.cat([cloud[name] for cloud in clouds]) for name in ("feat", "coord", "grid_coord")}
    with torch.no_grad():
        together = tiny_model(**batch, offset=torch.tensor([70, 75, 176]))
        alone = [tiny_model(**cloud) for cloud in clouds]
        tiny_model.config.window_rule = "batch"
        by_batch = tiny_model(**batch, offset=torch.tensor([70, 75, 176]))
    for stage in range(2):
        want = torch.cat([output.hidden_states[stage] for output in alone])
        torch.testing.assert_close(together.hidden_states[stage], want, atol=2e-5, rtol=0)
        sizes = torch.tensor([len(output.hidden_states[stage]) for output in alone])
        assert together.offsets[stage].tolist() == sizes.cumsum(0).tolist()
    assert (by_batch.last_hidden_state - together.last_hidden_state).abs().max() > 1e-2


def test_mask_replaces_the_embedding(tiny_model):
    inputs = random_inputs([50])
    mask = torch.arange(50) % 3 == 0
    other = inputs | {"feat": torch.where(mask[:, None], 7.0, inputs["feat"])}
    with torch.no_grad():
        tiny_model.embedding.mask_token.fill_(0.5)
        masked, unread = tiny_model(**inputs, mask=mask), tiny_model(**other, mask=mask)
        plain = tiny_model(**inputs)
    assert torch.equal(masked.last_hidden_state, unread.last_hidden_state)
    assert (masked.last_hidden_state - plain.last_hidden_state).abs().max() > 1e-2


def test_orders_are_permuted_in_training_only_and_every_stage_draws(tiny_model):
    tiny_model.config.shuffle_orders = True
    inputs = random_inputs([120])
    names = list(tiny_model.config.order)
    assert tiny_model._stage_orders(None) == [names, names]
    tiny_model.train()
    torch.manual_seed(3)
    drawn = tiny_model(**inputs).last_hidden_state
    torch.manual_seed(3)
    permutation = torch.stack([torch.randperm(4), torch.randperm(4)])
    assert permutation.tolist() != [[0, 1, 2, 3]] * 2
    assert tiny_model._stage_orders(permutation)[1] == [names[index] for index in permutation[1].tolist()]
    assert torch.equal(tiny_model(**inputs, order_permutation=permutation).last_hidden_state, drawn)
    assert not torch.equal(tiny_model.eval()(**inputs).last_hidden_state, drawn)


def test_stochastic_depth_drops_rows_and_keeps_the_mean():
    block = SonataModel(tiny_config(drop_path=0.25)).stages[1].blocks[0].train()
    assert block.drop_path == 0.25
    torch.manual_seed(0)
    update = block._branch(torch.ones(20000, 12), None)
    assert update.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(update.amin(dim=1), update.amax(dim=1))
    assert update.mean().item() == pytest.approx(1.0, abs=0.02)  # 3 sigma is 0.012
    assert torch.equal(block.eval()._branch(update, None), update)


def test_drop_path_rates_rise_linearly_over_all_blocks():
    model = SonataModel(tiny_config(drop_path=0.3, enc_depths=[2, 2]))
    rates = [block.drop_path for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none(tiny_model):
    tiny_model.train()
    inputs = random_inputs([90, 40])
    mask = torch.arange(130) < 20
    gradients = []
    for _ in range(2):
        tiny_model.zero_grad()
        tiny_model(**inputs, mask=mask).last_hidden_state.square().sum().backward()
        gradients.append({name: value.grad.clone() for name, value in tiny_model.named_parameters()})
        tiny_model.activation_checkpointing_enable()
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_frozen_model_keeps_no_graph(tiny_model):
    tiny_model.requires_grad_(False)
    output = tiny_model(**random_inputs([30]))
    assert not any(hidden.requires_grad for hidden in output.hidden_states)


def test_frozen_model_passes_the_gradient_to_features(tiny_model):
    tiny_model.requires_grad_(False).double()
    inputs = random_inputs([6], side=3)
    feat = inputs.pop("feat").double().requires_grad_()
    assert torch.autograd.gradcheck(lambda feat: tiny_model(feat, **inputs).last_hidden_state, feat, fast_mode=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_weights_stay_close(tiny_model, dtype, tolerance):
    inputs = random_inputs([150, 60])
    with torch.no_grad():
        want = tiny_model(**inputs).last_hidden_state
        output = tiny_model.to(dtype)(**inputs)
    assert output.last_hidden_state.dtype == dtype
    assert output.coords[1].dtype == torch.float32
    assert (output.last_hidden_state.float() - want).norm() / want.norm() < tolerance


def test_half_precision_convolution_accumulates_in_float32():
    grid = sorted_grid({"grid_coord": torch.cartesian_prod(*[torch.arange(3)] * 3), "offset": torch.tensor([27])})
    conv = SonataSubmanifoldConv(1).bfloat16()
    with torch.no_grad():
        conv.bias.zero_()
        conv.weight.fill_(1.0)[0, 1, 1, 1] = 256.0
        out = conv(torch.ones(27, 1, dtype=torch.bfloat16), neighbor_pairs(grid))
    # The middle voxel has 26 neighbours. In bfloat16, whose step is 2 there, 256 + 1 would stay 256.
    assert out[13].item() == 282.0


def test_half_precision_embedding_reads_coordinates_in_float32(tiny_model):
    feat = torch.zeros(30, 9)
    feat[:, 0] = torch.linspace(5.0, 5.03, 30)
    assert len(feat.bfloat16().unique(dim=0)) <= 2
    feat[:, 1:] = torch.linspace(-1.0, 1.0, 8)
    want = tiny_model.embedding(feat, None)
    got = tiny_model.embedding.bfloat16()(feat, None)
    rounded = tiny_model.embedding(feat.bfloat16(), None)
    assert len(got.unique(dim=0)) > 2 >= len(rounded.unique(dim=0))
    torch.testing.assert_close(got.float(), want, atol=0.03, rtol=0)


def test_autocast_stays_close(tiny_model):
    inputs = random_inputs([150, 60])
    want = tiny_model(**inputs).last_hidden_state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tiny_model(**inputs)
    output.last_hidden_state.float().sum().backward()
    assert tiny_model.stages[0].blocks[0].position.conv.weight.grad.dtype == torch.float32
    assert (output.last_hidden_state.float() - want).norm() / want.norm() < 0.1


def test_save_and_load_is_bitwise(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded = SonataModel.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == tiny_model.state_dict().keys()
    assert all(torch.equal(value, tiny_model.state_dict()[name]) for name, value in loaded.state_dict().items())
    # A loaded tensor lies where it lay in the file; MKL rounds differently where memory is not aligned, so copy first.
    loaded, inputs = copy.deepcopy(loaded), random_inputs([80])
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).last_hidden_state, tiny_model(**inputs).last_hidden_state)
    assert list(loaded.buffers()) == []
    with pytest.raises(ValueError, match=r"holds a model of type 'geode_sonata'\. Load it with `from_pretrained`"):
        convert_sonata_checkpoint(tmp_path)


def test_initial_weights_are_those_of_the_reference():
    torch.manual_seed(0)
    model = SonataModel(tiny_config(layer_scale=0.1, enc_channels=[24, 32]))
    conv = model.stages[1].blocks[0].position.conv
    assert conv.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert conv.bias.abs().max() == 0
    assert model.stages[1].blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.embedding.mask_token.abs().max() == 0
    assert model.stages[0].blocks[0].gamma1.unique().tolist() == pytest.approx([0.1])
    assert model.stages[1].pooling.norm.weight.unique().tolist() == [1.0]


@pytest.mark.parametrize("name", ["sonata", "sonata_small"])
def test_published_names_and_shapes_are_ours(name):
    published = json.loads((FIXTURES / f"keys_{name}.json").read_text())
    with torch.device("meta"):
        model = SonataModel(sonata_geode.config_from_published(published.pop("_config")))
    got = {sonata_geode.published_name(key): list(value.shape) for key, value in model.state_dict().items()}
    assert got == published["keys"]
    # The counts of the released files.
    count = {"sonata": 108_461_376, "sonata_small": 38_648_992}[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_default_config_is_the_released_model():
    published = json.loads((FIXTURES / "keys_sonata.json").read_text())["_config"]
    converted, default = sonata_geode.config_from_published(published), SonataConfig()
    for name in sonata_geode._REFERENCE_DEFAULTS.keys() - {"shuffle_orders"}:
        assert list_of(getattr(converted, name)) == list_of(getattr(default, name)), name


def list_of(value):
    return list(value) if isinstance(value, tuple) else value


def test_conversion_reads_all_published_forms(tmp_path):
    checkpoint = reference_checkpoint()
    torch.save(checkpoint, tmp_path / "sonata.pth")
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_text(json.dumps(checkpoint["config"]))
    save_file(checkpoint["state_dict"], hub / "model.safetensors")
    states = [convert_sonata_checkpoint(form).state_dict() for form in (checkpoint, tmp_path / "sonata.pth", str(hub))]
    for state in states:
        assert len(state) == len(checkpoint["state_dict"]) == 129
        for key, value in state.items():
            assert torch.equal(value, checkpoint["state_dict"][sonata_geode.published_name(key)])


def test_conversion_shares_no_memory():
    checkpoint = reference_checkpoint()
    before = checkpoint["state_dict"]["embedding.stem.linear.weight"].clone()
    with torch.no_grad():
        convert_sonata_checkpoint(checkpoint).embedding.linear.weight.zero_()
    assert torch.equal(checkpoint["state_dict"]["embedding.stem.linear.weight"], before)


@pytest.mark.parametrize("claimed", [True, False])
def test_conversion_follows_the_tensors_about_the_mask_token(claimed):
    checkpoint = reference_checkpoint()
    checkpoint["config"]["mask_token"] = claimed
    token = checkpoint["state_dict"]["embedding.mask_token"]
    assert torch.equal(convert_sonata_checkpoint(checkpoint).embedding.mask_token, token)
    del checkpoint["state_dict"]["embedding.mask_token"]
    model = convert_sonata_checkpoint(checkpoint)
    assert model.embedding.mask_token is None
    inputs = random_inputs([20])
    with pytest.raises(ValueError, match=r"`mask` needs a model with a mask token, and `config\.mask_token` is False"):
        model(**inputs, mask=torch.zeros(20, dtype=torch.bool))


def test_conversion_names_what_is_wrong_with_tensors():
    key = "enc.enc2.block1.attn.qkv.weight"
    missing, unexpected, cut = (reference_checkpoint() for _ in range(3))
    del missing["state_dict"][key]
    unexpected["state_dict"]["dec.dec0.up.proj.weight"] = torch.zeros(1)
    cut["state_dict"][key] = cut["state_dict"][key][:-1]
    with pytest.raises(ValueError, match=f"1 problems: missing `{key}`"):
        convert_sonata_checkpoint(missing)
    with pytest.raises(ValueError, match=r"1 problems: unexpected `dec\.dec0\.up\.proj\.weight`"):
        convert_sonata_checkpoint(unexpected)
    with pytest.raises(ValueError, match=rf"`{key}` of shape \(95, 32\) instead of \(96, 32\)"):
        convert_sonata_checkpoint(cut)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_rpe": True}, "must have `enable_rpe` False, got True: relative position bias is not built"),
        ({"enc_mode": False}, "must have `enc_mode` True, got False: a decoder is not built"),
        ({"pdnorm_bn": True}, r"unknown entries \['pdnorm_bn'\]"),
    ],
)
def test_conversion_refuses_configurations_it_cannot_reproduce(changes, message):
    checkpoint = reference_checkpoint()
    checkpoint["config"] |= changes
    with pytest.raises(ValueError, match=message):
        convert_sonata_checkpoint(checkpoint)


def test_conversion_uses_the_defaults_of_the_reference():
    config = sonata_geode.config_from_published({"enc_mode": True})
    assert (config.in_channels, config.order, config.window_rule) == (6, ["z", "z-trans"], "cloud")
    assert sonata_geode.config_from_published({"enc_mode": True, "enable_flash": False}).window_rule == "batch"
    with pytest.raises(ValueError, match="must have `enc_mode` True, got False"):
        sonata_geode.config_from_published({})
    with pytest.raises(ValueError, match=r"`checkpoint` must hold 'config' and 'state_dict', got \['model'\]"):
        convert_sonata_checkpoint({"model": {}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": torch.tensor([20, 20, 30])}, r"cloud 1 has 0 in \[20, 20, 30\]. Leave empty clouds out"),
        ({"offset": torch.tensor([20, 31])}, "`offset` must end with the number of rows of `feat`, 30, got 31"),
        ({"offset": torch.tensor([], dtype=torch.long)}, r"at least one, got shape \(0,\)"),
        ({"offset": torch.tensor([30.0])}, r"`offset` must hold integers, got torch.float32"),
        ({"feat": torch.zeros(30, 6)}, r"`feat` must have shape \(30, 9\), with the rows of `feat`, got \(30, 6\)"),
        ({"coord": torch.zeros(29, 3)}, r"`coord` must have shape \(30, 3\), .* got \(29, 3\)"),
        ({"grid_coord": torch.zeros(30, 3)}, "`grid_coord` must hold integers, got torch.float32"),
        ({"grid_coord": torch.arange(90).view(30, 3) - 4}, "`grid_coord` must not be negative, got -4"),
        ({"grid_coord": torch.arange(90).view(30, 3) * 737}, "`grid_coord` must be below 65535, .* got 65593"),
        ({"mask": torch.zeros(30)}, r"`mask` must be boolean of shape \(30,\), got torch.float32"),
        ({"order_permutation": torch.tensor([[0, 1, 2, 3], [0, 1, 2, 2]])}, r"got \[\[0, 1, 2, 3\], \[0, 1, 2, 2\]\]"),
    ],
)
def test_model_refuses_bad_inputs(tiny_model, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**(random_inputs([10, 20]) | changes))


def test_model_refuses_voxels_that_repeat_inside_a_cloud(tiny_model):
    inputs = random_inputs([10, 20])
    inputs["grid_coord"][3] = inputs["grid_coord"][12]  # the same voxel in two clouds is fine
    tiny_model(**inputs)
    inputs["grid_coord"][25] = inputs["grid_coord"][12]
    voxel = tuple(inputs["grid_coord"][12].tolist())
    with pytest.raises(
        ValueError, match=rf"cloud 1 holds voxel \({voxel[0]}, {voxel[1]}, {voxel[2]}\) more than once"
    ):
        tiny_model(**inputs)


def test_one_point_is_a_cloud(tiny_model):
    inputs = random_inputs([1])
    with torch.no_grad():
        output = tiny_model(**inputs)
        # Alone in its window, a point attends to itself with weight one: attention is the value's projection.
        x = tiny_model.embedding(inputs["feat"], None)
        for block in tiny_model.stages[0].blocks:
            conv = block.position.conv
            x = x + block.position.norm(block.position.linear(x @ conv.weight[:, 1, 1, 1].T + conv.bias))
            x = x + block.attn.proj(block.attn.qkv(block.norm1(x))[:, 24:])
            x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(output.hidden_states[0], x, atol=1e-5, rtol=0)
    assert output.grid_coords[1].tolist() == (inputs["grid_coord"] // 2).tolist()
