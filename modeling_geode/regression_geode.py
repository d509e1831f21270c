# SPDX-License-Identifier: Apache-2.0
"""The Direct Regression Head (DRH): the state of a control token becomes a number or a box."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from geode.configuration.configuration_geode import GeodeConfig


# Logarithms are clamped here when decoding, so that a wild state gives a large finite value: exp(30) is 1e13.
MAX_LOG = 30.0


@dataclass
class RegressionOutput(ModelOutput):
    """
    What the regression head makes of a sequence.

    Args:
        values (`torch.Tensor` of shape `(batch_size, sequence_length, max_dim)`):
            Predicted values in SI units at control tokens, in their first `dim` entries; NaN elsewhere.
        loss (`torch.Tensor` of shape `()`, *optional*): Eq. 6 in the codecs' space; None without targets.
        num_targets (`torch.Tensor` of shape `()`, *optional*): Targets in this batch.
    """

    values: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    num_targets: torch.Tensor | None = None


def encoded_dim(entry: dict) -> int:
    """Size of an encoded value: a box's yaw takes two entries, everything else one."""
    return 8 if entry["kind"] == "box3d" else entry["dim"]


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
        return values.clamp(-MAX_LOG, MAX_LOG).expm1()
    if transform == "symlog":
        return values.sign() * values.abs().clamp(max=MAX_LOG).expm1()
    return values


def encode_values(values: torch.Tensor, entry: dict) -> torch.Tensor:
    """
    Map values in SI units to the space in which they are regressed (decision 10 of docs/architecture.md).

    Scalars and vectors are transformed, then standardised. A box's centre and the logarithms of its sizes are
    standardised; its yaw, which is only defined up to half a turn, becomes sine and cosine of twice the angle.

    Args:
        values (`torch.Tensor` of shape `(..., dim)`): Finite values in SI units; a box is cx cy cz dx dy dz yaw.
        entry (`dict`): The control token's entry in `config.control_tokens`.

    Returns:
        `torch.Tensor` of shape `(..., encoded_dim(entry))`: Codec space, float32 at least.

    Raises:
        ValueError: If a value lies outside the codec's domain.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    _check_domain(values, entry)
    mean, std = _statistics(entry, values)
    if entry["kind"] != "box3d":
        return (_forward_transform(values, entry["codec"]["transform"]) - mean) / std
    double = 2 * values[..., 6:]
    lengths = torch.cat([values[..., :3], values[..., 3:6].log()], dim=-1)
    return torch.cat([(lengths - mean) / std, double.sin(), double.cos()], dim=-1)


def decode_values(encoded: torch.Tensor, entry: dict) -> torch.Tensor:
    """
    Invert [`encode_values`]. Logarithms are clamped to +-30, so any finite input gives finite values.

    Args:
        encoded (`torch.Tensor` of shape `(..., encoded_dim(entry))`): Codec space.
        entry (`dict`): The control token's entry in `config.control_tokens`.

    Returns:
        `torch.Tensor` of shape `(..., dim)`: SI units; a box's yaw in radians, in (-pi/2, pi/2].
    """
    mean, std = _statistics(entry, encoded)
    if entry["kind"] != "box3d":
        return _inverse_transform(encoded * std + mean, entry["codec"]["transform"])
    lengths = encoded[..., :6] * std + mean
    # atan2 has no gradient at the origin, where the angle is undefined.
    sine, cosine = encoded[..., 6], encoded[..., 7]
    undefined = (sine == 0) & (cosine == 0)
    yaw = 0.5 * torch.atan2(sine, torch.where(undefined, torch.ones_like(cosine), cosine))
    sizes = lengths[..., 3:].clamp(-MAX_LOG, MAX_LOG).exp()
    return torch.cat([lengths[..., :3], sizes, yaw[..., None]], dim=-1)


def _check_domain(values: torch.Tensor, entry: dict) -> None:
    transform = entry["codec"].get("transform")
    bad, requirement = ~values.isfinite(), "must be finite"
    if not bad.any() and entry["kind"] == "box3d":
        bad, requirement = values[..., 3:6] <= 0, "box sizes must be positive"
    elif not bad.any() and transform == "log":
        bad, requirement = values <= 0, "must be positive for the codec `log`"
    elif not bad.any() and transform == "log1p":
        bad, requirement = values <= -1, "must be above -1 for the codec `log1p`"
    if bad.any():
        raise ValueError(
            f"Regression targets {requirement}, got {values[bad.any(dim=-1)][0].tolist()}. Correct the target, or choose "
            "another codec in `config.control_tokens`."
        )


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
        width = config.text_config.hidden_size
        hidden = drh.hidden_size or width
        self.heads = nn.ModuleDict()
        for token, entry in self.entries.items():
            layers = []
            for layer in range(drh.num_hidden_layers):
                layers += [nn.Linear(hidden if layer else width, hidden), nn.GELU()]
            layers.append(nn.Linear(hidden if drh.num_hidden_layers else width, encoded_dim(entry)))
            self.heads[_module_name(token)] = nn.Sequential(*layers)
        self.feedback = None
        if drh.value_feedback:
            self.feedback = nn.ModuleDict(
                {_module_name(token): nn.Linear(encoded_dim(entry), width) for token, entry in self.entries.items()}
            )
        self.hidden_size = width

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

        Without a control token the loss is a zero that depends on every parameter, so that no rank of a distributed
        run lacks gradients.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Last-layer states.
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The tokens.
            regression_targets (`torch.Tensor` of shape `(batch_size, sequence_length, max_dim)`, *optional*):
                True values in SI units; NaN where there is none.
            num_regression_targets (`torch.Tensor` of shape `()` or `int`, *optional*):
                What the summed loss is divided by; default the number of targets here.

        Returns:
            [`RegressionOutput`]

        Raises:
            ValueError: If a target is not at a control token, is incomplete, or lies outside its codec's domain.
        """
        if regression_targets is not None:
            self._check_targets(input_ids, regression_targets)
        values = hidden_states.new_full((*input_ids.shape, self.max_dim), torch.nan, dtype=torch.float32)
        # The sum over nothing keeps a model without control tokens differentiable.
        loss, num_targets = hidden_states[:0].float().sum(), 0
        for token, entry in self.entries.items():
            rows, columns = (input_ids == entry["token_id"]).nonzero(as_tuple=True)
            encoded = self._encoded(token, self._states(hidden_states, rows, columns))
            decoded = F.pad(decode_values(encoded, entry), (0, self.max_dim - entry["dim"]), value=torch.nan)
            values = values.index_put((rows, columns), decoded)
            loss = loss + 0.0 * encoded.sum()
            if regression_targets is not None:
                targets = regression_targets[rows, columns, : entry["dim"]]
                known = ~targets.isnan().any(dim=-1)
                loss = loss + self._distance(encoded[known], encode_values(targets[known], entry)).sum()
                num_targets = num_targets + known.sum()
        if num_regression_targets is None:
            num_regression_targets = torch.as_tensor(num_targets, device=loss.device).clamp(min=1)
        return RegressionOutput(
            values=values,
            loss=loss / num_regression_targets,
            num_targets=torch.as_tensor(num_targets, device=loss.device),
        )

    def decode_states(self, states: torch.Tensor, token_ids: torch.Tensor) -> list[torch.Tensor]:
        """
        Values of states that are already picked, as decoding does.

        Args:
            states (`torch.Tensor` of shape `(num_tokens, hidden_size)`): The states that `hidden_position` names.
            token_ids (`torch.LongTensor` of shape `(num_tokens,)`): Their control tokens.

        Returns:
            `list[torch.Tensor]`: For each state a float32 tensor of shape `(dim,)`, SI units.
        """
        tokens = {entry["token_id"]: token for token, entry in self.entries.items()}
        return [
            decode_values(self._encoded(tokens[token_id], state[None])[0], self.entries[tokens[token_id]])
            for state, token_id in zip(states, token_ids.tolist(), strict=True)
        ]

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
        length, shift = input_ids.shape[1], int(self.hidden_position == "token")
        added = values.new_zeros(input_ids.shape[0], length + shift, self.hidden_size, dtype=torch.float32)
        for token, entry in self.entries.items():
            known = ~values[..., : entry["dim"]].isnan().any(dim=-1)
            rows, columns = ((input_ids == entry["token_id"]) & known).nonzero(as_tuple=True)
            encoded = encode_values(values[rows, columns, : entry["dim"]].float(), entry)
            layer = self.feedback[_module_name(token)]
            with torch.autocast(values.device.type, enabled=False):
                embedded = F.linear(encoded, layer.weight.float(), layer.bias.float())
            added = added.index_put((rows, columns + shift), embedded)
        return added[:, :length].to(dtype)

    def _states(self, hidden_states: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        if self.hidden_position == "previous":
            if (columns == 0).any():
                raise ValueError(
                    "A control token at position 0 has no state before it, which `hidden_position='previous'` regresses "
                    f"from; got one in sample {rows[columns == 0][0].item()}. Put text before it."
                )
            columns = columns - 1
        return hidden_states[rows, columns]

    def _encoded(self, token: str, states: torch.Tensor) -> torch.Tensor:
        """Codec-space prediction, in float32 even inside autocast or after `model.to(torch.bfloat16)`."""
        with torch.autocast(states.device.type, enabled=False):
            states = states.float()
            for layer in self.heads[_module_name(token)]:
                if isinstance(layer, nn.Linear):
                    states = F.linear(states, layer.weight.float(), layer.bias.float())
                else:
                    states = layer(states)
        return states

    def _distance(self, predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss of each target, the mean over its entries, `(num_targets,)`."""
        if self.loss_name == "l2":
            return (predicted - target).square().mean(dim=-1)
        if self.loss_name == "l1":
            return (predicted - target).abs().mean(dim=-1)
        return F.huber_loss(predicted, target, reduction="none", delta=self.huber_delta).mean(dim=-1)

    def _check_targets(self, input_ids: torch.Tensor, targets: torch.Tensor) -> None:
        expected = (*input_ids.shape, self.max_dim)
        if tuple(targets.shape) != expected:
            raise ValueError(f"`regression_targets` must have shape {expected}, got {tuple(targets.shape)}.")
        given = ~targets.isnan()
        dims = torch.zeros_like(input_ids)
        for entry in self.entries.values():
            dims = dims.masked_fill(input_ids == entry["token_id"], entry["dim"])
        used = torch.arange(self.max_dim, device=targets.device) < dims[..., None]
        stray = given & ~used
        if stray.any():
            row, column, _ = stray.nonzero()[0].tolist()
            raise ValueError(
                f"`regression_targets` has {targets[row, column].tolist()} at sample {row}, position {column}, where the "
                f"token {input_ids[row, column].item()} takes {dims[row, column].item()} entries. Targets belong at control tokens."
            )
        partial = (given != used).any(dim=-1) & given.any(dim=-1)
        if partial.any():
            row, column = partial.nonzero()[0].tolist()
            raise ValueError(
                f"A target needs all {dims[row, column].item()} entries, got {targets[row, column].tolist()} at sample "
                f"{row}, position {column}. Leave all of them NaN to skip it."
            )


def _module_name(token: str) -> str:
    """A name that a module may have: `<REG>` is `REG`."""
    return "".join(character if character.isalnum() else "_" for character in token.strip("<>")) or "token"


__all__ = ["GeodeRegressionHead", "RegressionOutput", "decode_values", "encode_values", "encoded_dim"]
