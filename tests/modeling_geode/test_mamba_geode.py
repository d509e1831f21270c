# SPDX-License-Identifier: Apache-2.0
"""The oracles are a loop over time in this file, and the mixer of the transformers library."""

import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MambaConfig
from transformers import initialization as init
from transformers.models.mamba.modeling_mamba import MambaMixer

from geode.configuration.configuration_geode import GeodeDrmConfig
from geode.modeling_geode import mamba_geode
from geode.modeling_geode.mamba_geode import (
    GeodeMambaLayer,
    GeodeMambaMixer,
    init_mamba_weights,
    selective_scan,
)


CHUNK_SIZE = 32  # of `make_inputs`


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Chunks of 32 steps for states of 2 x 5 x 3, and of 4 for those of `make_layer`: tiny inputs span many."""
    monkeypatch.setattr(mamba_geode, "SCAN_CHUNK_ELEMENTS", CHUNK_SIZE * 2 * 5 * 3)


def scan_by_loop(x, dt, A, B, C, D=None, z=None):
    """The recurrence, one step at a time, in the dtype of its inputs."""
    state, outputs = x.new_zeros(x.shape[0], *A.shape), []
    for step in range(x.shape[1]):
        decay = torch.exp(dt[:, step, :, None] * A)
        state = decay * state + (dt[:, step] * x[:, step])[:, :, None] * B[:, step, None, :]
        outputs.append((state * C[:, step, None, :]).sum(dim=-1))
    y = torch.stack(outputs, dim=1)
    y = y if D is None else y + D * x
    return y if z is None else y * F.silu(z)


def make_inputs(length: int, dtype=torch.float64, batch_size=2, num_channels=5, state_size=3) -> list[torch.Tensor]:
    """`x, dt, A, B, C, D, z` with four different sizes, so that no two dimensions can be swapped unseen."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        tensor.to(dtype)
        for tensor in (
            normal(batch_size, length, num_channels),
            normal(batch_size, length, num_channels).exp() * 0.2,
            -normal(num_channels, state_size).exp(),
            normal(batch_size, length, state_size),
            normal(batch_size, length, state_size),
            normal(num_channels),
            normal(batch_size, length, num_channels),
        )
    ]


def gradients(function, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = function(*leaves)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return torch.autograd.grad((y * weights).sum(), leaves)


def make_layer(**overrides) -> GeodeMambaLayer:
    torch.manual_seed(0)
    return GeodeMambaLayer(
        GeodeDrmConfig(**{"hidden_size": 20, "num_attention_heads": 4, "mamba_state_size": 3, **overrides})
    )


LENGTHS = [1, 2, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * CHUNK_SIZE + 5]


@pytest.mark.parametrize("length", LENGTHS)
def test_selective_scan_equals_the_loop(length):
    inputs = make_inputs(length)
    torch.testing.assert_close(selective_scan(*inputs), scan_by_loop(*inputs), atol=1e-12, rtol=1e-12)
    single = [tensor.float() for tensor in inputs]
    torch.testing.assert_close(selective_scan(*single).double(), scan_by_loop(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_selective_scan_gradients_equal_those_of_the_loop(length):
    inputs = make_inputs(length)
    expected = gradients(scan_by_loop, inputs)
    for got, want in zip(gradients(selective_scan, inputs), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    for got, want in zip(gradients(selective_scan, [tensor.float() for tensor in inputs]), expected, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-5 * max(1, want.abs().max().item()), rtol=1e-5)


def test_selective_scan_passes_gradcheck_across_chunks(monkeypatch):
    monkeypatch.setattr(mamba_geode, "SCAN_CHUNK_ELEMENTS", 3 * 2 * 3 * 2)
    inputs = [tensor.requires_grad_() for tensor in make_inputs(7, num_channels=3, state_size=2)]
    assert torch.autograd.gradcheck(selective_scan, inputs)
    assert torch.autograd.gradcheck(selective_scan, inputs[:5])


def test_selective_scan_does_not_depend_on_the_chunk_size(monkeypatch):
    inputs = make_inputs(23)
    expected = selective_scan(*inputs)
    for elements in (0, 1, 4 * 30, 4 * 30 + 29, 23 * 30, 2**22):
        monkeypatch.setattr(mamba_geode, "SCAN_CHUNK_ELEMENTS", elements)
        torch.testing.assert_close(selective_scan(*inputs), expected, atol=1e-13, rtol=1e-13)


def test_selective_scan_of_nothing_is_nothing():
    inputs = make_inputs(0)
    assert selective_scan(*inputs).shape == (2, 0, 5)
    assert [gradient.abs().sum().item() for gradient in gradients(selective_scan, inputs)] == [0] * 7


@pytest.mark.parametrize("step_size", [0.0, 1e-8, 30.0, 1e4, 1e30])
def test_selective_scan_is_stable_for_extreme_step_sizes(step_size):
    # Products of 70 decays exp(-30 x 16) underflow in any precision: dividing by them would give NaN.
    x, dt, A, B, C, D, z = make_inputs(2 * CHUNK_SIZE + 6, dtype=torch.float32)
    A, dt = 16 * A, torch.full_like(dt, step_size)
    # Every third step is moderate, so that strong and weak decays meet within a chunk.
    dt[:, ::3] = 0.1
    inputs = [x, dt, A, B, C, D, z]
    expected = scan_by_loop(*[tensor.double() for tensor in inputs])
    torch.testing.assert_close(selective_scan(*inputs).double(), expected, atol=1e-5, rtol=1e-4)
    assert all(gradient.isfinite().all() for gradient in gradients(selective_scan, inputs))


def test_selective_scan_keeps_a_state_over_a_long_sequence():
    # A = 0 never forgets: with x = B = C = 1 the output counts steps, y[t] = dt (t + 1).
    length, dt = 1000, 0.25
    ones = torch.ones(1, length, 1)
    y = selective_scan(ones, dt * ones, torch.zeros(1, 1), ones, ones)
    torch.testing.assert_close(y[0, :, 0], dt * torch.arange(1, length + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_selective_scan_keeps_its_state_in_float32_for_half_inputs(dtype):
    inputs = make_inputs(90, dtype=dtype)
    y = selective_scan(*inputs)
    exact = scan_by_loop(*[tensor.double() for tensor in inputs])
    assert y.dtype == dtype
    # One rounding, of the output. A state in half precision misses this tolerance.
    resolution = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, atol=1e-6, rtol=resolution)
    assert ((scan_by_loop(*inputs).double() - exact).abs() > 1e-6 + resolution * exact.abs()).any()
    assert {gradient.dtype for gradient in gradients(selective_scan, inputs)} == {dtype}


def test_selective_scan_computes_in_float32_under_autocast():
    inputs = make_inputs(40, dtype=torch.float32)
    expected, expected_gradients = selective_scan(*inputs), gradients(selective_scan, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selective_scan(*inputs), expected)
        for got, want in zip(gradients(selective_scan, inputs), expected_gradients, strict=True):
            assert torch.equal(got, want)


class _Allocations(TorchDispatchMode):
    """Counts the elements that operations write, and the largest tensor among them."""

    def __init__(self):
        super().__init__()
        self.written = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.written += output.numel()
            self.largest = max(self.largest, output.numel())
        return output


def test_selective_scan_is_linear_in_length_and_stores_no_states(monkeypatch):
    monkeypatch.setattr(mamba_geode, "SCAN_CHUNK_ELEMENTS", CHUNK_SIZE * 8 * 16)
    counts, saved = {}, {}
    sizes = {"batch_size": 1, "num_channels": 8, "state_size": 16}
    for length in (8 * CHUNK_SIZE, 32 * CHUNK_SIZE):
        inputs = [tensor.requires_grad_() for tensor in make_inputs(length, **sizes)[:5]]
        saved[length] = 0

        def keep(tensor, length=length):
            saved[length] += tensor.numel()
            return tensor

        with _Allocations() as counts[length]:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                y = selective_scan(*inputs)
            y.sum().backward()
    short, long = counts
    # What does not grow: A, and the loop's last step.
    assert counts[long].written / counts[short].written == pytest.approx(4, rel=0.02)
    # The states of the whole sequence would be `length x 8 x 16`; the largest tensor is a chunk's or an input.
    assert counts[long].largest == max(CHUNK_SIZE * 8 * 16, long * 16)
    # x, dt (8 each), B, C (16 each) per step, A, and a state of 8 x 16 per chunk.
    assert saved[long] == long * (8 + 8 + 16 + 16) + 8 * 16 + 32 * 8 * 16


def test_selective_scan_names_shapes_that_do_not_fit():
    x, dt, A, B, C, _, _ = make_inputs(4)
    with pytest.raises(
        ValueError, match=r"\(2, 5, 4\), \(2, 4, 5\), \(5, 3\), \(2, 4, 3\), \(2, 4, 3\).*channels come last"
    ):
        selective_scan(x.transpose(1, 2), dt, A, B, C)
    with pytest.raises(ValueError, match=r"\(2, 4, 2\)"):
        selective_scan(x, dt, A, B[..., :2], C)


def test_kernels_are_not_called_on_cpu_tensors(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("A CUDA kernel got CPU tensors.")

    layer, states = make_layer(), torch.randn(2, 9, 20)
    expected = layer(states)
    monkeypatch.setattr(mamba_geode, "selective_scan_fn", fail)
    monkeypatch.setattr(mamba_geode, "causal_conv1d_fn", fail)
    assert torch.equal(layer(states), expected)


def test_kernels_get_the_layout_that_they_document(monkeypatch):
    # Stand-ins with the kernels' documented interfaces (time last, one dtype), on tensors that claim to be on CUDA.
    calls = []

    def scan_kernel(u, delta, A, B, C):
        calls.append(("scan", [tensor.is_contiguous() for tensor in (u, delta, A, B, C)]))
        assert {tensor.dtype for tensor in (u, delta, A, B, C)} == {torch.float32}
        return scan_by_loop(*[tensor.mT for tensor in (u, delta)], A, B.mT, C.mT).mT

    def convolution_kernel(x, weight, bias, activation):
        calls.append(("convolution", [x.is_contiguous()]))
        assert activation == "silu"
        assert weight.dim() == 2
        padding = weight.shape[1] - 1
        return F.silu(F.conv1d(x, weight[:, None], bias, padding=padding, groups=len(weight))[..., : x.shape[2]])

    layer, states = make_layer(), torch.randn(2, 9, 20)
    mask = torch.arange(9) >= torch.tensor([[0], [3]])
    expected = layer(states, mask)
    monkeypatch.setattr(mamba_geode, "selective_scan_fn", scan_kernel)
    monkeypatch.setattr(mamba_geode, "causal_conv1d_fn", convolution_kernel)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    torch.testing.assert_close(layer(states, mask), expected)
    assert calls == [("convolution", [True]), ("scan", [True] * 5)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_is_the_same_on_cuda(dtype):
    # With `mamba_ssm` and `causal_conv1d` installed this is the kernels' test, without them that of our scan on CUDA.
    layer, states = make_layer(), torch.randn(2, 75, 20)
    mask = torch.arange(75) >= torch.tensor([[0], [30]])
    expected = layer(states, mask)
    got = layer.to("cuda", dtype)(states.to("cuda", dtype), mask.cuda()).float().cpu()
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(got[mask], expected[mask], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("length", [1, 3, 40])
def test_mixer_equals_that_of_transformers(length):
    # hidden_size 20: a time-step rank of ceil(20 / 16) = 2, so that rounding down would fail.
    layer = make_layer(mamba_expand=3, mamba_conv_kernel=5)
    sizes = {"state_size": 3, "expand": 3, "conv_kernel": 5, "num_hidden_layers": 1, "vocab_size": 8}
    library = MambaMixer(MambaConfig(hidden_size=20, **sizes), layer_idx=0)
    library.load_state_dict(layer.mixer.state_dict())
    states = torch.randn(2, length, 20, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(length) >= torch.tensor([[0], [length // 3]])
    results = []
    for mixer in (library, layer.mixer):
        leaf = states.clone().requires_grad_()
        y = mixer(leaf, attention_mask=mask) if mixer is library else mixer(leaf, mask)
        y = y * mask[..., None]
        parameters = [parameter for _, parameter in sorted(mixer.named_parameters())]
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *parameters])])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_layer_adds_the_mixer_of_the_normalised_input():
    layer, states = make_layer(), torch.randn(2, 6, 20)
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 2)
    normalised = (states - states.mean(dim=-1, keepdim=True)) / (
        states.var(dim=-1, keepdim=True, unbiased=False) + 1e-6
    ).sqrt()
    torch.testing.assert_close(layer(states), states + layer.mixer(normalised * layer.norm.weight))


def test_layer_output_does_not_depend_on_later_positions():
    layer, states = make_layer().double(), torch.randn(1, 50, 20, dtype=torch.float64)
    changed = states.clone()
    changed[:, 33] = torch.randn(20)
    assert torch.equal(layer(changed)[:, :33], layer(states)[:, :33])
    # Far beyond the convolution's four steps, through the state alone.
    assert (layer(changed)[:, 45] - layer(states)[:, 45]).abs().max() > 1e-6


def test_left_padding_changes_nothing():
    layer, states = make_layer().double(), torch.randn(3, 41, 20, dtype=torch.float64)
    lengths = [41, 30, 1]
    mask = torch.arange(41) >= torch.tensor([[41 - length] for length in lengths])
    padded = layer(states.masked_fill(~mask[..., None], torch.nan), mask)
    for row, length in enumerate(lengths):
        alone = layer(states[row : row + 1, 41 - length :])
        torch.testing.assert_close(padded[row, 41 - length :], alone[0], atol=1e-13, rtol=1e-13)


def test_masked_positions_neither_give_nor_receive():
    layer = make_layer()
    states = torch.randn(2, 45, 20, requires_grad=True)
    mask = torch.rand(2, 45, generator=torch.Generator().manual_seed(0)) > 0.3
    mixed = layer.mixer(states, mask)
    other = torch.where(mask[..., None], states, 100 * torch.randn(2, 45, 20))
    torch.testing.assert_close(layer.mixer(other, mask)[mask], mixed[mask])
    (gradient,) = torch.autograd.grad(mixed[mask].sum(), states)
    assert not gradient[~mask].any()
    assert gradient[mask].abs().min() > 0
    assert (layer.mixer(states)[mask] - mixed[mask]).abs().max() > 1e-3


def test_right_padding_does_not_change_valid_outputs():
    layer, states = make_layer(), torch.randn(1, 40, 20)
    mask = torch.arange(40)[None] < 37
    torch.testing.assert_close(layer(states, mask)[:, :37], layer(states[:, :37]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_in_half_precision_follows_its_own_weights(dtype):
    layer, states = make_layer(), torch.randn(2, 70, 20).to(dtype)
    half = layer.to(dtype)
    y = half(states)
    exact = half.double()(states.double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, atol=8 * torch.finfo(dtype).eps, rtol=8 * torch.finfo(dtype).eps)


def test_layer_runs_with_offloaded_weights():
    layer, states = make_layer(), torch.randn(2, 9, 20)
    expected = layer(states)
    cpu_offload(layer, execution_device=torch.device("cpu"))
    assert layer.mixer.conv1d.weight.is_meta
    torch.testing.assert_close(layer(states), expected)


def test_initial_weights_are_those_of_mamba():
    torch.manual_seed(0)
    mixer = GeodeMambaMixer(GeodeDrmConfig(hidden_size=500, num_attention_heads=4, mamba_state_size=5))
    torch.testing.assert_close(-mixer.A_log.exp(), -torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).expand(1000, 5))
    assert torch.equal(mixer.D, torch.ones(1000))
    # Log-uniform in [0.001, 0.1]: the logarithm has mean log(0.01) and standard deviation log(100) / sqrt(12) = 1.329.
    logarithms = F.softplus(mixer.dt_proj.bias.detach()).log()
    assert logarithms.min() == pytest.approx(math.log(1e-3), abs=0.05)
    assert logarithms.max() == pytest.approx(math.log(1e-1), abs=0.05)
    assert logarithms.mean() == pytest.approx(math.log(1e-2), abs=0.15)
    assert logarithms.std() == pytest.approx(1.329, abs=0.08)
    # Uniform up to fan_in ** -0.5: the rank is ceil(500 / 16) = 32, the width of the convolution 4.
    for layer, fan_in in ((mixer.dt_proj, 32), (mixer.conv1d, 4), (mixer.in_proj, 500)):
        weight = layer.weight.detach()
        assert weight.abs().max() == pytest.approx(fan_in**-0.5, rel=0.01)
        assert weight.std() == pytest.approx(fan_in**-0.5 / 3**0.5, rel=0.05)


def test_initialisation_leaves_loaded_weights_alone():
    layer = make_layer()
    state = {name: tensor.clone() for name, tensor in layer.mixer.state_dict().items()}
    for parameter in layer.mixer.parameters():
        parameter._is_hf_initialized = True
    del layer.mixer.conv1d.bias._is_hf_initialized
    with init.guard_torch_init_functions():
        init_mamba_weights(layer.mixer)
    changed = [name for name, tensor in layer.mixer.state_dict().items() if not torch.equal(tensor, state[name])]
    assert changed == ["conv1d.bias"]
