# SPDX-License-Identifier: Apache-2.0
"""The Direct Regression Head (DRH): the state of a control token becomes a number or a box."""

import functools
import math
import re
from collections.abc import Iterable
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from geode.configuration.configuration_geode import GeodeConfig


# Decoded numbers lie within +-exp(30), about 1e13: a wild state gives a large value, and float32 never overflows.
MAX_LOG = 30.0
# exp(-15) - 1 is the smallest value of `log1p` that float32 tells from -1, which has no logarithm.
MIN_LOG1P = -15.0
# Below this length, sine and cosine of twice the yaw are noise, and the gradient of their angle would overflow.
MIN_YAW_NORM = 1e-6
# Spreads lie between exp(-7) and exp(7) standard deviations of the codec.
MAX_LOG_SPREAD = 7.0


class RegressionOutput(NamedTuple):
    """
    What the regression head makes of a sequence.

    Not a `ModelOutput`: one with a field `values` is no dictionary any more, and tools that look into outputs fail on it.

    Args:
        values (`torch.Tensor` of shape `(batch_size, sequence_length, max_dim)`):
            Predicted values in SI units at control tokens, in their first `dim` entries; NaN elsewhere.
        loss (`torch.Tensor` of shape `()`): Eq. 6 in the codecs' space; without targets, a zero that depends on every
            parameter of the head. With `drh_config.uncertainty` the negative logarithm of the likelihood of the targets under
            the spreads is added.
        num_targets (`torch.LongTensor` of shape `()`): Targets in this batch.
    """

    values: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    num_targets: torch.Tensor | None = None


def encoded_dim(entry: dict) -> int:
    """Size of an encoded value: a box's yaw takes two entries, everything else one."""
    return 8 if entry["kind"] == "box3d" else entry["dim"]


def _to_full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _statistics(entry: dict, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codec = entry["codec"]
    return like.new_tensor(codec["mean"]), like.new_tensor(codec["std"])


def _forward_transform(values: torch.Tensor, transform: str) -> torch.Tensor:
    if transform == "log":
        return values.log()
    if transform == "log1p":
        return values.log1p()
    if transform == "symlog":
        return values.sign() * values.abs().log1p()
    return values


def _inverse_transform(values: torch.Tensor, transform: str) -> torch.Tensor:
    if transform == "log":
        return values.clamp(-MAX_LOG, MAX_LOG).exp()
    if transform == "log1p":
        return values.clamp(MIN_LOG1P, MAX_LOG).expm1()
    if transform == "symlog":
        return values.sign() * values.abs().clamp(max=MAX_LOG).expm1()
    return values.clamp(-math.exp(MAX_LOG), math.exp(MAX_LOG))


def encode_values(values: torch.Tensor, entry: dict) -> torch.Tensor:
    """
    Map values in SI units to the space in which they are regressed (decision 10 of docs/architecture.md).

    Scalars and vectors are transformed (`symlog` is `sign(v) log(1 + |v|)`), then standardised. A box's centre and the
    logarithms of its sizes are standardised; its yaw, which is only defined up to half a turn, becomes sine and cosine
    of twice the angle.

    Args:
        values (`torch.Tensor` of shape `(..., dim)`): Finite values in SI units; a box is cx cy cz dx dy dz yaw.
        entry (`dict`): The control token's entry in `config.control_tokens`.

    Returns:
        `torch.Tensor` of shape `(..., encoded_dim(entry))`: Codec space, float32 at least.

    Raises:
        ValueError: If a value lies outside the codec's domain.

    Example:
        ```python
        >>> entry = {"kind": "scalar", "dim": 1, "codec": {"transform": "log", "mean": [1.0], "std": [2.0]}}
        >>> encode_values(torch.tensor([1.0]), entry)  # (log(1) - 1) / 2
        tensor([-0.5000])
        >>> decode_values(torch.tensor([-0.5]), entry)
        tensor([1.])

        ```
    """
    values = _to_full_precision(values)
    _check_domain(values, entry)
    mean, std = _statistics(entry, values)
    if entry["kind"] != "box3d":
        return (_forward_transform(values, entry["codec"]["transform"]) - mean) / std
    double = 2 * values[..., 6:]
    lengths = torch.cat([values[..., :3], values[..., 3:6].log()], dim=-1)
    return torch.cat([(lengths - mean) / std, double.sin(), double.cos()], dim=-1)


def decode_values(encoded: torch.Tensor, entry: dict) -> torch.Tensor:
    """
    Invert [`encode_values`].

    Any finite input gives finite values that [`encode_values`] accepts: numbers are clamped to +-exp(30), sizes and
    `log` values to at least exp(-30), `log1p` values to at least exp(-15) - 1. A yaw whose sine and cosine are both
    below 1e-6 is undefined, and 0.

    Args:
        encoded (`torch.Tensor` of shape `(..., encoded_dim(entry))`): Codec space.
        entry (`dict`): The control token's entry in `config.control_tokens`.

    Returns:
        `torch.Tensor` of shape `(..., dim)`: SI units, float32 at least; a box's yaw in radians, in (-pi/2, pi/2].
    """
    encoded = _to_full_precision(encoded)
    mean, std = _statistics(entry, encoded)
    if entry["kind"] != "box3d":
        return _inverse_transform(encoded * std + mean, entry["codec"]["transform"])
    lengths = encoded[..., :6] * std + mean
    center, sizes = _inverse_transform(lengths[..., :3], "identity"), _inverse_transform(lengths[..., 3:], "log")
    sine, cosine = encoded[..., 6:7], encoded[..., 7:8]
    # Both are replaced, because the gradient of atan2 is not finite at the origin.
    is_undefined = torch.maximum(sine.abs(), cosine.abs()) < MIN_YAW_NORM
    sine, cosine = sine.masked_fill(is_undefined, 0.0), cosine.masked_fill(is_undefined, 1.0)
    yaw = 0.5 * torch.atan2(sine, cosine)
    return torch.cat([center, sizes, torch.where(yaw <= -math.pi / 2, yaw + math.pi, yaw)], dim=-1)


def _check_domain(values: torch.Tensor, entry: dict) -> None:
    transform = entry["codec"].get("transform")
    bad, requirement = ~values.isfinite(), "be finite"
    if not bad.any() and entry["kind"] == "box3d":
        bad, requirement = values[..., 3:6] <= 0, "have positive sizes (its entries 3 to 5)"
    elif not bad.any() and transform == "log":
        bad, requirement = values <= 0, "be positive for the codec's transform 'log'"
    elif not bad.any() and transform == "log1p":
        bad, requirement = values <= -1, "be above -1 for the codec's transform 'log1p'"
    if bad.any():
        raise ValueError(
            f"`values` of kind {entry['kind']!r} must {requirement}, got {values[bad.any(dim=-1)][0].tolist()}. "
            "Correct the target, or choose another `codec` for its token in `config.control_tokens`."
        )


def _like_forward(method):
    """
    Let a method besides `forward` find its weights where FSDP2 has sharded the head as a unit of its own.

    The first call registers it with the sharded module, which nobody else could know of.
    """

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        name = method.__name__
        if name not in vars(self) and torch.distributed.is_available() and torch.distributed.is_initialized():
            from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

            if isinstance(self, FSDPModule):
                register_fsdp_forward_method(self, name)
                return getattr(self, name)(*args, **kwargs)
        return method(self, *args, **kwargs)

    return run


class GeodeRegressionHead(nn.Module):
    """
    The Direct Regression Head: one small MLP per control token, from the token's state to its value.

    Source: paper, section 2.2, Eqs. 5 and 6. It computes in float32 whatever the model's dtype: bfloat16 keeps three
    digits.
    """

    def __init__(self, config: GeodeConfig):
        super().__init__()
        drh = config.drh_config
        self.entries = dict(config.control_tokens)
        self.max_dim = config.max_value_dim
        self.hidden_position = drh.hidden_position
        self.loss_name, self.huber_delta = drh.loss, float(drh.huber_delta)
        self.hidden_size = config.text_config.hidden_size
        hidden = drh.hidden_size or self.hidden_size
        widths = [self.hidden_size] + [hidden] * drh.num_hidden_layers
        self.names = _module_names(self.entries)
        self.heads = nn.ModuleDict()
        for token, entry in self.entries.items():
            layers = []
            for width in widths[:-1]:
                layers += [nn.Linear(width, hidden), nn.GELU()]
            self.heads[self.names[token]] = nn.Sequential(*layers, nn.Linear(widths[-1], encoded_dim(entry)))
        self.feedback = None
        if drh.value_feedback:
            self.feedback = nn.ModuleDict(
                {
                    self.names[token]: nn.Linear(encoded_dim(entry), self.hidden_size)
                    for token, entry in self.entries.items()
                }
            )
        self.drh_config, self.spreads = drh, None
        if drh.uncertainty:
            # A box has none: what the interval of a yaw is, and whether its entries hold together, is another question.
            self.spreads = nn.ModuleDict(
                {
                    self.names[token]: nn.Linear(widths[-1], entry["dim"])
                    for token, entry in self.entries.items()
                    if entry["kind"] != "box3d"
                }
            )

    @property
    def control_token_ids(self) -> list[int]:
        """Ids of the control tokens, in the order of the configuration."""
        return [entry["token_id"] for entry in self.entries.values()]

    def control_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Where control tokens stand, of the shape of `input_ids`."""
        return torch.isin(input_ids, torch.tensor(self.control_token_ids, device=input_ids.device, dtype=torch.long))

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        regression_targets: torch.Tensor | None = None,
        num_regression_targets: torch.Tensor | int | None = None,
    ) -> RegressionOutput:
        """
        Regress the value of every control token, and the loss where its target is known.

        Eq. 6 is taken in the codecs' space: a mean over a target's entries, then a mean over targets. Without targets
        the loss is a zero that depends on every parameter, so that no rank of a distributed run lacks gradients.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Last-layer states.
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The tokens.
            regression_targets (`torch.Tensor` of shape `(batch_size, sequence_length, max_dim)`, *optional*):
                True values in SI units, NaN where there is none. A control token without one is not supervised.
            num_regression_targets (`torch.Tensor` of shape `()` or `int`, *optional*):
                What the summed loss is divided by, as the number of targets in the global batch; default the number
                of targets here.

        Returns:
            [`RegressionOutput`]

        Raises:
            ValueError: If a target is not at a control token, is incomplete, or lies outside its codec's domain, or if
                `hidden_position` is `"previous"` and a control token has nothing before it.
        """
        if regression_targets is not None:
            self._check_targets(input_ids, regression_targets)
        # The sum over nothing keeps a model without control tokens differentiable.
        loss = _to_full_precision(hidden_states[:0]).sum()
        values = loss.new_full((*input_ids.shape, self.max_dim), torch.nan)
        num_targets = torch.zeros((), dtype=torch.long, device=loss.device)
        for token, entry in self.entries.items():
            rows, columns = (input_ids == entry["token_id"]).nonzero(as_tuple=True)
            features = self._features(token, self._states(hidden_states, rows, columns))
            encoded = self._encoded(token, features)
            decoded = F.pad(decode_values(encoded, entry), (0, self.max_dim - entry["dim"]), value=torch.nan)
            values = values.index_put((rows, columns), decoded)
            log_spread = self._log_spread(token, features)
            loss = loss + encoded[:0].sum() + (0.0 if log_spread is None else log_spread[:0].sum())
            if self.feedback is not None:
                loss = loss + self._embedded(token, encoded[:0]).sum()
            if regression_targets is not None:
                targets = regression_targets[rows, columns, : entry["dim"]]
                is_known = ~targets.isnan().any(dim=-1)
                known, expected = encoded[is_known], encode_values(targets[is_known], entry).to(encoded)
                loss, num_targets = loss + self._distance(known, expected).sum(), num_targets + is_known.sum()
                if log_spread is not None:
                    loss = loss + _gaussian_nll((expected - known).detach(), log_spread[is_known]).sum()
        if num_regression_targets is None:
            num_regression_targets = num_targets
        # A global batch may hold no target at all; its loss is 0.
        divisor = torch.as_tensor(num_regression_targets, device=loss.device).clamp(min=1)
        return RegressionOutput(values=values, loss=loss / divisor, num_targets=num_targets)

    @_like_forward
    def decode_states(self, states: torch.Tensor, token_ids: torch.Tensor) -> list[torch.Tensor]:
        """
        Values of states that are already picked, as decoding does.

        Args:
            states (`torch.Tensor` of shape `(num_tokens, hidden_size)`): The states that `hidden_position` names.
            token_ids (`torch.LongTensor` of shape `(num_tokens,)`): Their control tokens.

        Returns:
            `list[torch.Tensor]`: For each state a float32 tensor of shape `(dim,)`, SI units.

        Raises:
            ValueError: If a token is no control token.
        """
        values: dict[int, torch.Tensor] = {}
        for token in dict.fromkeys(self._tokens(token_ids)):
            (rows,) = (token_ids == self.entries[token]["token_id"]).nonzero(as_tuple=True)
            decoded = decode_values(self._encoded(token, self._features(token, states[rows])), self.entries[token])
            values |= dict(zip(rows.tolist(), decoded, strict=True))
        return [values[row] for row in range(len(states))]

    @_like_forward
    def decode_intervals(self, states: torch.Tensor, token_ids: torch.Tensor) -> list[torch.Tensor | None]:
        """
        Intervals of states that are already picked (`drh_config.uncertainty`).

        In the codec's space they are the value and `interval_scales` times a Gaussian's interval of `interval_coverage` around
        it; its ends are decoded as values are.

        Args:
            states (`torch.Tensor` of shape `(num_tokens, hidden_size)`): The states that `hidden_position` names.
            token_ids (`torch.LongTensor` of shape `(num_tokens,)`): Their control tokens.

        Returns:
            `list[torch.Tensor]`: For each state a float32 tensor of shape `(dim, 2)`, lower and upper end in SI units; None for
            a box, and where the head has no spreads.

        Raises:
            ValueError: If a token is no control token.
        """
        found = []
        for state, token in zip(states, self._tokens(token_ids), strict=True):
            features = self._features(token, state[None])
            log_spread = self._log_spread(token, features)
            if log_spread is None:
                found.append(None)
                continue
            scale = self.drh_config.interval_scales.get(token, 1.0)
            half = scale * gaussian_quantile(self.drh_config.interval_coverage) * log_spread.exp()
            encoded = self._encoded(token, features)
            ends = decode_values(torch.cat([encoded - half, encoded + half]), self.entries[token])
            found.append(ends.T)
        return found

    @_like_forward
    def value_embeddings(self, values: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """
        Embed values, each by the layer of its control token (decision 16 of docs/architecture.md).

        Args:
            values (`torch.Tensor` of shape `(num_tokens, max_dim)`): SI units; entries beyond a token's `dim` do not
                matter.
            token_ids (`torch.LongTensor` of shape `(num_tokens,)`): Their control tokens.

        Returns:
            `torch.Tensor` of shape `(num_tokens, hidden_size)`, float32 at least.

        Raises:
            ValueError: If the model has no value feedback, a token is no control token, or a value lies outside its
                codec's domain.
        """
        return self._value_embeddings(values, token_ids)

    def _value_embeddings(self, values: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        if self.feedback is None:
            raise ValueError(
                "Embedding values needs `drh_config.value_feedback=True`, got False: this head has no such layers. "
                "Train a model with it."
            )
        tokens = self._tokens(token_ids)
        embeddings = _to_full_precision(values).new_zeros(len(values), self.hidden_size)
        for token in dict.fromkeys(tokens):
            entry = self.entries[token]
            (rows,) = (token_ids == entry["token_id"]).nonzero(as_tuple=True)
            embedded = self._embedded(token, encode_values(values[rows, : entry["dim"]], entry))
            embeddings = embeddings.index_put((rows,), embedded)
        if torch.is_grad_enabled():
            # A rank without a value takes part in the exchange of gradients as well.
            for token, entry in self.entries.items():
                nothing = embeddings.new_zeros(0, encoded_dim(entry))
                embeddings = embeddings + self._embedded(token, nothing).sum()
        return embeddings

    @_like_forward
    def feedback_embeddings(self, values: torch.Tensor, input_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """
        What known values add to the input embeddings (decision 16 of docs/architecture.md).

        A value reaches the first input that comes after it is known: the token after its control token, or the control
        token itself where the state before it is regressed.

        Args:
            values (`torch.Tensor` of shape `(batch_size, sequence_length, max_dim)`): SI units; NaN where unknown.
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The tokens.
            dtype (`torch.dtype`): Of the input embeddings.

        Returns:
            `torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`: Zero where nothing is fed back.
        """
        self._check_targets(input_ids, values, name="values")
        length, shift = input_ids.shape[1], int(self.hidden_position == "token")
        rows, columns = (~values.isnan()).any(dim=-1).nonzero(as_tuple=True)
        embedded = self._value_embeddings(values[rows, columns], input_ids[rows, columns])
        added = embedded.new_zeros(len(input_ids), length + shift, self.hidden_size)
        return added.index_put((rows, columns + shift), embedded)[:, :length].to(dtype)

    def _tokens(self, token_ids: torch.Tensor) -> list[str]:
        tokens = {entry["token_id"]: token for token, entry in self.entries.items()}
        unknown = [token_id for token_id in token_ids.tolist() if token_id not in tokens]
        if unknown:
            raise ValueError(
                f"`token_ids` must be control tokens ({self.control_token_ids}), got {unknown[0]}. Pick them with "
                "`control_mask`."
            )
        return [tokens[token_id] for token_id in token_ids.tolist()]

    def _states(self, hidden_states: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        if self.hidden_position == "previous":
            if (columns == 0).any():
                raise ValueError(
                    "`hidden_position='previous'` regresses from the state before a control token, got one at "
                    f"position 0 of sample {rows[columns == 0][0].item()}. Put text before it."
                )
            columns = columns - 1
        return hidden_states[rows, columns]

    def _features(self, token: str, states: torch.Tensor) -> torch.Tensor:
        """The MLP's last hidden state, in float32 even inside autocast or after `model.to(torch.bfloat16)`."""
        states = _to_full_precision(states)
        with maybe_autocast(device_type=states.device.type, enabled=False):
            for layer in self.heads[self.names[token]][:-1]:
                states = _apply_linear(layer, states) if isinstance(layer, nn.Linear) else layer(states)
        return states

    def _encoded(self, token: str, features: torch.Tensor) -> torch.Tensor:
        """Codec-space prediction, `(num_tokens, encoded_dim)`."""
        with maybe_autocast(device_type=features.device.type, enabled=False):
            return _apply_linear(self.heads[self.names[token]][-1], features)

    def _log_spread(self, token: str, features: torch.Tensor) -> torch.Tensor | None:
        """
        Logarithm of the standard deviation in codec space, `(num_tokens, dim)`.

        It sees the features and does not change them: values are those of a head without spreads.
        """
        if self.spreads is None or self.names[token] not in self.spreads:
            return None
        with maybe_autocast(device_type=features.device.type, enabled=False):
            spread = _apply_linear(self.spreads[self.names[token]], features.detach())
        return spread.clamp(-MAX_LOG_SPREAD, MAX_LOG_SPREAD)

    def _embedded(self, token: str, encoded: torch.Tensor) -> torch.Tensor:
        with maybe_autocast(device_type=encoded.device.type, enabled=False):
            return _apply_linear(self.feedback[self.names[token]], encoded)

    def _distance(self, predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss of each target, the mean over its entries, `(num_targets,)`."""
        if self.loss_name == "l2":
            return (predicted - target).square().mean(dim=-1)
        if self.loss_name == "l1":
            return (predicted - target).abs().mean(dim=-1)
        return F.huber_loss(predicted, target, reduction="none", delta=self.huber_delta).mean(dim=-1)

    def _check_targets(self, input_ids: torch.Tensor, targets: torch.Tensor, name: str = "regression_targets") -> None:
        expected = (*input_ids.shape, self.max_dim)
        if tuple(targets.shape) != expected:
            raise ValueError(
                f"`{name}` must have shape {expected} to match `input_ids`, got {tuple(targets.shape)}. Its last "
                "dimension is that of the largest value; fill the rest of a smaller one with NaN."
            )
        dims = torch.zeros_like(input_ids)
        for entry in self.entries.values():
            dims = dims.masked_fill(input_ids == entry["token_id"], entry["dim"])
        is_given = ~targets.isnan()
        is_used = torch.arange(self.max_dim, device=targets.device) < dims[..., None]
        is_wrong = (is_given != is_used).any(dim=-1) & is_given.any(dim=-1)
        if is_wrong.any():
            row, column = is_wrong.nonzero()[0].tolist()
            dim, token_id = dims[row, column].item(), input_ids[row, column].item()
            rule = (
                f"a control token, which takes {dim} numbers, then NaN"
                if dim
                else "no control token, so takes NaN only"
            )
            raise ValueError(
                f"`{name}` at sample {row}, position {column}: token {token_id} is {rule}, got "
                f"{targets[row, column].tolist()}. Move or complete the value, or make all its entries NaN to drop it."
            )


def gaussian_quantile(coverage: float) -> float:
    """
    Half the width of the interval around its mean in which a Gaussian lies that often, in standard deviations.

    Example:
        ```python
        >>> round(gaussian_quantile(0.9), 4)
        1.6449

        ```
    """
    return NormalDist().inv_cdf((1.0 + coverage) / 2.0)


def _gaussian_nll(error: torch.Tensor, log_spread: torch.Tensor) -> torch.Tensor:
    """Negative logarithm of a Gaussian's likelihood but for a constant, the mean over entries, `(num_targets,)`."""
    return (0.5 * (error * (-log_spread).exp()).square() + log_spread).mean(dim=-1)


def _apply_linear(layer: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """Apply a layer in the dtype of `states`, whatever its own."""
    if layer.weight.dtype == states.dtype:
        # Called, so that hooks on it run: offloading, adapters.
        return layer(states)
    return F.linear(states, layer.weight.to(states.dtype), layer.bias.to(states.dtype))


def _module_names(tokens: Iterable[str]) -> dict[str, str]:
    """A name for the module of each token: `<REG>` is `REG`."""
    names = {}
    for token in tokens:
        name = re.sub(r"\W", "_", token.strip("<>")) or "token"
        # A module cannot be called like something that `ModuleDict` already has, as `keys`.
        name = name + "_" if hasattr(nn.ModuleDict, name) else name
        if name in names.values():
            raise ValueError(
                f"`control_tokens` must differ in letters and digits, which name their heads, got {list(tokens)}. "
                "Rename one."
            )
        names[token] = name
    return names


__all__ = [
    "GeodeRegressionHead",
    "RegressionOutput",
    "decode_values",
    "encode_values",
    "encoded_dim",
    "gaussian_quantile",
]
