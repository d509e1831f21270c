# SPDX-License-Identifier: Apache-2.0
"""Mamba: a selective scan that is linear in length both ways, and the layer around it."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import maybe_autocast

from geode.configuration.configuration_geode import GeodeDrmConfig


# Optional CUDA kernels. They fail on CPU tensors, so each use also checks the device.
try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:
    selective_scan_fn = None
try:
    from causal_conv1d import causal_conv1d_fn
except ImportError:
    causal_conv1d_fn = None


# Elements of the states that exist at a time, 16 MiB in float32; a chunk is as many steps as give that. Smaller chunks
# fit the cache better and are up to a third faster on one thread, but their many short parallel sections are several
# times slower on threads that share their cores with another program.
SCAN_CHUNK_ELEMENTS = 2**22
# Range of the initial step sizes (Mamba, section 3.6 and appendix).
MIN_TIME_STEP, MAX_TIME_STEP, TIME_STEP_FLOOR = 1e-3, 1e-1, 1e-4


def _to_full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _split(x, A):
    """The chunks, as slices of time."""
    size = max(1, SCAN_CHUNK_ELEMENTS // max(1, x.shape[1] * A.numel()))
    return [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]


def _new_buffers(x, A, count):
    """Room for the states of a chunk. Chunks share it: allocating memory anew costs as much as a pass over it."""
    longest = max((chunk.stop - chunk.start for chunk in _split(x, A)), default=0)
    return [x.new_empty(longest, x.shape[1], *A.shape) for _ in range(count)]


def _chunk_states(x, dt, A, B, state, buffers):
    """Decays and states of a chunk, both `(chunk, batch_size, state_size, num_channels)`, from the state before it."""
    decays, states = (buffer[: len(x)] for buffer in buffers)
    torch.mul(dt[:, :, None], A, out=decays).exp_()
    torch.mul((dt * x)[:, :, None], B[..., None], out=states)
    for decay, step in zip(decays.unbind(0), states.unbind(0), strict=True):
        state = step.addcmul_(decay, state)
    return decays, states


class _SelectiveScan(torch.autograd.Function):
    """
    The recurrence `h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]`, `y[t] = h[t] C[t]`, in chunks.

    Within a chunk the exponentials and outer products are made at once, and the recurrence runs step by step: it
    divides by nothing, so no decay is too strong for it. Only the state at each chunk's start is kept; the backward
    pass recomputes the others, chunk by chunk. Time comes first and channels last, so that a step is contiguous.
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C):
        A = A.t().contiguous()
        x, dt, B, C = (tensor.contiguous().transpose(0, 1) for tensor in (x, dt, B, C))
        y = torch.empty_like(x)
        state = x.new_zeros(x.shape[1], *A.shape)
        starts, buffers = [], _new_buffers(x, A, 2)
        for chunk in _split(x, A):
            starts.append(state)
            _, states = _chunk_states(x[chunk], dt[chunk], A, B[chunk], state, buffers)
            with maybe_autocast(device_type=x.device.type, enabled=False):
                y[chunk] = (C[chunk][:, :, None] @ states).squeeze(2)
            state = states[-1].clone()
        ctx.save_for_backward(x, dt, A, B, C, *starts)
        return y.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, dt, A, B, C, *starts = ctx.saved_tensors
        grad_y = grad_y.contiguous().transpose(0, 1)
        grad_x, grad_dt = torch.empty_like(x), torch.empty_like(x)
        grad_A, grad_B, grad_C = torch.zeros_like(A), torch.empty_like(B), torch.empty_like(C)
        carry, buffers = 0, _new_buffers(x, A, 3)
        for chunk, state in reversed(list(zip(_split(x, A), starts, strict=True))):
            x_, dt_, B_, grad_y_ = x[chunk], dt[chunk], B[chunk], grad_y[chunk]
            decays, states = _chunk_states(x_, dt_, A, B_, state, buffers[:2])
            # Gradients of the states, backwards in time.
            grads = torch.mul(C[chunk][..., None], grad_y_[:, :, None], out=buffers[2][: len(x_)])
            grads[-1] += carry
            steps = grads.unbind(0)
            for step in range(len(steps) - 2, -1, -1):
                steps[step].addcmul_(decays[step + 1], steps[step + 1])
            carry = decays[0] * grads[0]
            # Gradients of dt A.
            exponents = decays.mul_(grads)
            exponents[0] *= state
            exponents[1:] *= states[:-1]
            with maybe_autocast(device_type=x.device.type, enabled=False):
                grad_input = (B_[:, :, None] @ grads).squeeze(2)
            grad_x[chunk] = grad_input * dt_
            grad_C[chunk] = states.mul_(grad_y_[:, :, None]).sum(dim=-1)
            grad_B[chunk] = grads.mul_((dt_ * x_)[:, :, None]).sum(dim=-1)
            grad_dt[chunk] = torch.mul(exponents, A, out=states).sum(dim=2).addcmul_(grad_input, x_)
            grad_A += exponents.mul_(dt_[:, :, None]).sum(dim=(0, 1))
        grad_x, grad_dt, grad_B, grad_C = (grad.transpose(0, 1) for grad in (grad_x, grad_dt, grad_B, grad_C))
        return grad_x, grad_dt, grad_A.t(), grad_B, grad_C


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Run the selective state-space recurrence over a sequence.

    `h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]` and `y[t] = (h[t] C[t] + D x[t]) silu(z[t])`, from `h[-1] = 0`. The
    state is float32 at least, whatever the dtype of the input. Time is linear in length, and memory holds the states
    of one chunk and of the chunks' borders, in the backward pass too.

    Source: Gu and Dao, *Mamba* (2023), Algorithm 2, with the zero-order hold for A and its first-order form for B.
    Checked against the loop in `tests/modeling_geode/test_mamba_geode.py`.

    Args:
        x (`torch.Tensor` of shape `(batch_size, length, num_channels)`): Input.
        dt (`torch.Tensor` of shape `(batch_size, length, num_channels)`): Step sizes, not negative.
        A (`torch.Tensor` of shape `(num_channels, state_size)`): Decay rates, not positive.
        B (`torch.Tensor` of shape `(batch_size, length, state_size)`): Input matrix of each step.
        C (`torch.Tensor` of shape `(batch_size, length, state_size)`): Output matrix of each step.
        D (`torch.Tensor` of shape `(num_channels,)`, *optional*): Skip connection.
        z (`torch.Tensor` of shape `(batch_size, length, num_channels)`, *optional*): Gate.

    Returns:
        `torch.Tensor` of shape `(batch_size, length, num_channels)`: `y`, in the dtype of `x`.

    Raises:
        ValueError: If the shapes do not fit.
    """
    projected = (*x.shape[:2], A.shape[-1])
    if dt.shape != x.shape or A.shape[0] != x.shape[-1] or B.shape != projected or C.shape != projected:
        raise ValueError(
            "`selective_scan` needs `x` and `dt` of one shape (batch_size, length, num_channels), `A` of shape "
            "(num_channels, state_size), `B` and `C` of shape (batch_size, length, state_size), got "
            f"{[tuple(tensor.shape) for tensor in (x, dt, A, B, C)]}. The channels come last here."
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    inputs = [tensor.to(dtype) for tensor in (x, dt, A, B, C)]
    if selective_scan_fn is not None and x.is_cuda and dtype == torch.float32:
        # The kernel has time last, and one dtype for its inputs: float32, because dt needs it.
        x32, dt32, A32, B32, C32 = inputs
        time_last = [tensor.transpose(1, 2).contiguous() for tensor in (x32, dt32, B32, C32)]
        y = selective_scan_fn(time_last[0], time_last[1], A32.contiguous(), time_last[2], time_last[3]).transpose(1, 2)
    else:
        y = _SelectiveScan.apply(*inputs)
    if D is not None:
        y = y + inputs[0] * D.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype)


class GeodeMambaMixer(nn.Module):
    """
    The Mamba block without its norm and residual; parameters are named as in `mamba_ssm`.

    Source: Gu and Dao, *Mamba* (2023), section 3.4.
    """

    def __init__(self, config: GeodeDrmConfig):
        super().__init__()
        inner, self.state_size = config.mamba_expand * config.hidden_size, config.mamba_state_size
        self.time_step_rank = math.ceil(config.hidden_size / 16)
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.mamba_conv_kernel, groups=inner)
        self.x_proj = nn.Linear(inner, self.time_step_rank + 2 * self.state_size, bias=False)
        self.dt_proj = nn.Linear(self.time_step_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, self.state_size))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)
        init_mamba_weights(self)

    # Both are read, not called, so offloaded weights would stay away. Private path, checked on transformers 5.23.
    @force_accelerate_hooks(["conv1d", "dt_proj"])
    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Mix a sequence along time.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, length, hidden_size)`): Normalised input.
            mask (`torch.BoolTensor` of shape `(batch_size, length)`, *optional*): Valid positions. The others add
                nothing to the state; on the left of a sequence they change nothing at all.

        Returns:
            `torch.Tensor` of shape `(batch_size, length, hidden_size)`.
        """
        padding = None if mask is None else ~mask[..., None]
        if padding is not None:
            hidden_states = hidden_states.masked_fill(padding, 0)
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        x = self.convolve(x)
        if padding is not None:
            # The bias of the convolution and its reach into padding.
            x = x.masked_fill(padding, 0)
        sizes = [self.time_step_rank, self.state_size, self.state_size]
        time_step, B, C = self.x_proj(x.to(z.dtype)).split(sizes, dim=-1)
        dt = _to_full_precision(F.linear(time_step, self.dt_proj.weight)) + _to_full_precision(self.dt_proj.bias)
        y = selective_scan(x, F.softplus(dt), -_to_full_precision(self.A_log).exp(), B, C, self.D, z)
        return self.out_proj(y.to(z.dtype))

    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        """Causal convolution of each channel, then SiLU: `(batch_size, length, num_channels)`, in float32 at least."""
        length, width = x.shape[1], self.conv1d.kernel_size[0]
        weight, bias = _to_full_precision(self.conv1d.weight.squeeze(1)), _to_full_precision(self.conv1d.bias)
        # The kernel exists for these widths.
        if causal_conv1d_fn is not None and x.is_cuda and 2 <= width <= 4 and weight.dtype == torch.float32:
            time_last = x.transpose(1, 2).float().contiguous()
            return causal_conv1d_fn(time_last, weight, bias, activation="silu").transpose(1, 2)
        # Shifted sums keep the channels last, which the scan needs: `conv1d` and its transposes take twice the time.
        padded = F.pad(x, (0, 0, width - 1, 0))
        summed = bias
        for shift, tap in enumerate(weight.unbind(1)):
            summed = summed + padded[:, shift : shift + length] * tap
        return F.silu(summed)


@torch.no_grad()
def init_mamba_weights(module: GeodeMambaMixer) -> None:
    """
    Draw new weights for a mixer, as `mamba_ssm` does. Weights that came from a checkpoint stay.

    A starts at -1, -2, ... -N in every channel (S4D-Real); step sizes start log-uniform between 0.001 and 0.1; the
    rest is uniform with the fan-in's bound.

    Source: Gu and Dao, *Mamba* (2023), section 3.6.

    Args:
        module ([`GeodeMambaMixer`]): The mixer.
    """
    for layer in (module.in_proj, module.conv1d, module.x_proj, module.out_proj):
        init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
    bound = module.conv1d.kernel_size[0] ** -0.5
    init.uniform_(module.conv1d.bias, -bound, bound)
    rates = torch.arange(1, module.state_size + 1, dtype=torch.float32, device=module.A_log.device)
    init.copy_(module.A_log, rates.log().expand_as(module.A_log))
    init.ones_(module.D)
    bound = module.time_step_rank**-0.5
    init.uniform_(module.dt_proj.weight, -bound, bound)
    fraction = torch.rand(module.dt_proj.bias.shape, device=module.dt_proj.bias.device)
    dt = (MIN_TIME_STEP * (MAX_TIME_STEP / MIN_TIME_STEP) ** fraction).clamp(min=TIME_STEP_FLOOR)
    # The inverse of softplus: log(exp(dt) - 1), without its cancellation.
    init.copy_(module.dt_proj.bias, dt + torch.log(-torch.expm1(-dt)))


class GeodeMambaLayer(GradientCheckpointingLayer):
    """A pre-norm residual Mamba block: `x + mixer(norm(x))`."""

    def __init__(self, config: GeodeDrmConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = GeodeMambaMixer(config)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Mix a sequence along time.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, length, hidden_size)`): Input.
            mask (`torch.BoolTensor` of shape `(batch_size, length)`, *optional*): Valid positions. The output at the
                others means nothing.

        Returns:
            `torch.Tensor` of shape `(batch_size, length, hidden_size)`.
        """
        return hidden_states + self.mixer(self.norm(hidden_states), mask)


__all__ = ["GeodeMambaLayer", "GeodeMambaMixer", "init_mamba_weights", "selective_scan"]
