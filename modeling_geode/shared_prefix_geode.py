# SPDX-License-Identifier: Apache-2.0
"""
Several questions behind one prefix: its keys and values are held once, whatever the number of questions.

`generate` sees a batch whose rows begin alike. The language model sees one packed row: the prefix, then what is left of
each row, without padding. A mask lets a token see the prefix and, causally, its own row. So the prefix is neither computed
nor copied for each row, and the positions, values and tokens are those that each row has alone.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast


# Rows are computed in groups of at least about this many tokens. In smaller ones a call's overhead outweighs what a group
# saves: the scores between questions that do not see each other.
MIN_GROUP_TOKENS = 256
# transformers 5.24 calls `cache` what was `past_key_values` before, in its models' arguments and outputs and in `generate`.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """
    The cache that a caller gave by either name.

    Raises:
        ValueError: If both are given.
    """
    if past_key_values is None:
        return cache
    if cache is not None:
        raise ValueError("`cache` and `past_key_values` are two names of one argument, got both. Drop one of them.")
    return past_key_values


def can_share_prefix(config) -> bool:
    """
    Whether a language model can read a packed row, which needs a mask of its own in every layer.

    Args:
        config (`PreTrainedConfig`): The language model's.

    Returns:
        `bool`: True for full attention in every layer, by 'sdpa' or 'eager'.
    """
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    return types == {"full_attention"} and config._attn_implementation in ("sdpa", "eager")


class SharedPrefixCache(Cache):
    """
    The keys and values of a prefix, held once, and behind them those of any number of rows that begin with it.

    It goes to `generate` as `cache`, with `input_ids` whose rows all begin with the prefix. Padding stands
    between the prefix and the rest of a row, and `attention_mask` is 0 there. The prefix's own tensors are never written to,
    so many caches may be made of them.

    Args:
        keys (`Sequence[torch.Tensor]`):
            Of each layer, of shape `(1, num_key_value_heads, prefix_length, head_dim)`.
        values (`Sequence[torch.Tensor]`):
            Likewise.
    """

    def __init__(self, keys, values):
        super().__init__(layers=[_layer_of(key, value) for key, value in zip(keys, values, strict=True)])
        self.prefix_length = self.length = keys[0].shape[-2]
        # Which row each packed token behind the prefix belongs to, and its column there.
        self.rows = self.columns = torch.zeros(0, dtype=torch.long, device=keys[0].device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Length of each row so far, padding included."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a row's mask is about."""
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` columns of every row."""
        self.length += min(tokens_to_remove, 0)
        self._keep((self.columns < self.length).nonzero()[:, 0])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Put row `beam_idx[i]` in the place of row `i`, for beam search."""
        found = [(self.rows == row).nonzero()[:, 0] for row in beam_idx.to(self.rows.device)]
        lengths = torch.tensor([len(index) for index in found], device=self.rows.device)
        self._keep(torch.cat(found))
        self.rows = torch.arange(len(found), device=self.rows.device).repeat_interleave(lengths)

    def batch_repeat_interleave(self, repeats: int):
        """Not needed: the prefix serves any number of rows."""
        if len(self.rows):
            raise ValueError(
                f"A `SharedPrefixCache` takes as many rows as it is first given, and cannot repeat them {repeats} times "
                "afterwards. Make a new one of the same prefix."
            )

    def batch_select_indices(self, indices: torch.Tensor):
        """Keep some rows; see `reorder_cache`."""
        rows = torch.arange(int(self.rows.max()) + 1 if len(self.rows) else 0, device=indices.device)
        self.reorder_cache(rows[indices])

    def _keep(self, index: torch.Tensor) -> None:
        """Keep packed tokens behind the prefix, in the order of `index`."""
        packed = torch.cat([torch.arange(self.prefix_length, device=index.device), index + self.prefix_length])
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[:, :, packed], layer.values[:, :, packed]
        self.rows, self.columns = self.rows[index], self.columns[index]

    def fork(self) -> "SharedPrefixCache":
        """Return a new cache of the same prefix, which holds no rows."""
        length = self.prefix_length
        return SharedPrefixCache(
            [layer.keys[:, :, :length] for layer in self.layers],
            [layer.values[:, :, :length] for layer in self.layers],
        )

    def join(self, forks: list["SharedPrefixCache"], first_rows: list[int]) -> None:
        """Take over what `forks` hold behind the prefix; the rows of each are numbered on from its first."""
        for number, layer in enumerate(self.layers):
            parts = [fork.layers[number] for fork in forks]
            layer.keys = torch.cat([layer.keys, *(part.keys[:, :, self.prefix_length :] for part in parts)], dim=2)
            layer.values = torch.cat(
                [layer.values, *(part.values[:, :, self.prefix_length :] for part in parts)], dim=2
            )
        pairs = zip(forks, first_rows, strict=True)
        self.rows = torch.cat([self.rows, *(fork.rows + first for fork, first in pairs)])
        self.columns = torch.cat([self.columns, *(fork.columns for fork in forks)])
        self.length = forks[0].length

    def add(self, rows: torch.Tensor, columns: torch.Tensor, length: int) -> torch.Tensor:
        """
        Announce packed tokens, and say what they see.

        Args:
            rows (`torch.LongTensor` of shape `(num_tokens,)`): The row of each token.
            columns (`torch.LongTensor` of shape `(num_tokens,)`): Its column there.
            length (`int`): Length of a row from now on.

        Returns:
            `torch.BoolTensor` of shape `(num_tokens, prefix_length + num_packed_tokens)`: True where a token sees a key.
        """
        self.rows, self.columns, self.length = torch.cat([self.rows, rows]), torch.cat([self.columns, columns]), length
        seen = (self.rows == rows[:, None]) & (self.columns <= columns[:, None])
        return torch.nn.functional.pad(seen, (self.prefix_length, 0), value=True)


def run_decoder(language_model, *, cache: Cache | None, **kwargs) -> BaseModelOutputWithPast:
    """Run a language model, by [`run_rows`] behind a shared prefix; arguments are those of either."""
    if isinstance(cache, SharedPrefixCache):
        return run_rows(language_model, cache=cache, **kwargs)
    return language_model(**{CACHE_NAME: cache}, **kwargs)


def run_rows(
    language_model,
    *,
    inputs_embeds: torch.Tensor,
    cache: SharedPrefixCache,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> BaseModelOutputWithPast:
    """
    Run a language model over rows behind a shared prefix, as it would run over each row alone.

    Args:
        language_model (`PreTrainedModel`):
            A decoder; see [`can_share_prefix`].
        inputs_embeds (`torch.Tensor` of shape `(num_rows, length, hidden_size)`):
            Embeddings of the rows' next tokens.
        cache ([`SharedPrefixCache`]):
            The prefix, and what was computed of the rows before. It is extended.
        attention_mask (`torch.LongTensor` of shape `(num_rows, past_length + length)`, *optional*):
            0 is padding, which is not computed.
        position_ids (`torch.LongTensor` of shape `(num_rows, length)`, *optional*):
            Positions; by default those that the mask gives.
        **kwargs:
            Passed on.

    Returns:
        [`~modeling_outputs.BaseModelOutputWithPast`]: States of shape `(num_rows, length, hidden_size)`, 0 at padding.

    Raises:
        ValueError: If a row lacks a part of the prefix, its newest token is padding, or attentions are asked for.
    """
    num_rows, length = inputs_embeds.shape[:2]
    start, total = cache.length, cache.length + length
    if attention_mask is None:
        attention_mask = torch.ones(num_rows, total, dtype=torch.long, device=inputs_embeds.device)
    _check_rows(attention_mask, (num_rows, total), cache.prefix_length)
    if position_ids is None:
        position_ids = (attention_mask.cumsum(dim=1) - 1)[:, start:]
    inputs = (inputs_embeds, attention_mask, position_ids.expand(num_rows, length))
    sizes = _group_sizes(attention_mask[:, start:], cache)
    if len(sizes) == 1:
        return _run_packed(language_model, *inputs, cache, **kwargs)
    forks, outputs = [cache.fork() for _ in sizes], []
    for fork, *parts in zip(forks, *(tensor.split(sizes) for tensor in inputs), strict=True):
        outputs.append(_run_packed(language_model, *parts, fork, **kwargs))
    cache.join(forks, torch.tensor([0, *sizes]).cumsum(dim=0)[:-1].tolist())
    hidden_states = None
    if outputs[0].hidden_states is not None:
        layers = zip(*(output.hidden_states for output in outputs), strict=True)
        hidden_states = tuple(None if layer[0] is None else torch.cat(layer) for layer in layers)
    states = torch.cat([output.last_hidden_state for output in outputs])
    return BaseModelOutputWithPast(states, cache, hidden_states)


def _check_rows(attention_mask, shape: tuple[int, int], prefix_length: int) -> None:
    if not isinstance(attention_mask, torch.Tensor) or tuple(attention_mask.shape) != shape:
        got = (
            tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        )
        raise ValueError(f"`attention_mask` must have shape {shape}, a row for each row of the inputs, got {got}.")
    if not bool(attention_mask[:, :prefix_length].all()) or not bool(attention_mask[:, -1].all()):
        raise ValueError(
            f"Rows behind a shared prefix of {prefix_length} tokens must hold all of it and end with a token, and "
            "`attention_mask` is 0 at one of these. Put padding between the prefix and the rest of a row."
        )


def _group_sizes(mask: torch.Tensor, cache: SharedPrefixCache) -> list[int]:
    """
    How many rows to compute together.

    Scores between rows are computed and masked. So that they stay a part of those with the prefix, new rows go in groups of
    half its length. Rows that were begun before share a packed row and stay together.
    """
    if len(cache.rows) or mask.shape[1] == 1:
        return [len(mask)]
    limit, sizes, tokens = max(cache.prefix_length // 2, MIN_GROUP_TOKENS), [0], 0
    for count in mask.sum(dim=1).tolist():
        if sizes[-1] and tokens + count > limit:
            sizes, tokens = [*sizes, 0], 0
        sizes[-1], tokens = sizes[-1] + 1, tokens + count
    return sizes


def _run_packed(language_model, inputs_embeds, attention_mask, position_ids, cache, **kwargs):
    num_rows, length = inputs_embeds.shape[:2]
    start, dtype = cache.length, inputs_embeds.dtype
    rows, offsets = attention_mask[:, start:].nonzero(as_tuple=True)
    seen = cache.add(rows, offsets + start, start + length)
    # Added to the scores, which both kinds of attention take; PyTorch's converts a boolean mask anew in every layer.
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    outputs = language_model(
        inputs_embeds=inputs_embeds[rows, offsets][None],
        attention_mask=mask[None, None],
        position_ids=position_ids[rows, offsets][None],
        **{CACHE_NAME: cache},
        **kwargs,
    )
    if outputs.attentions is not None:
        raise ValueError("`output_attentions` is not supported behind a shared prefix. Ask without it, one by one.")

    def unpack(states: torch.Tensor | None) -> torch.Tensor | None:
        if states is None:
            return None  # a layer whose states nobody asked for
        padded = states.new_zeros(num_rows, length, states.shape[-1])
        padded[rows, offsets] = states[0]
        return padded

    hidden_states = (
        None if outputs.hidden_states is None else tuple(unpack(states) for states in outputs.hidden_states)
    )
    return BaseModelOutputWithPast(unpack(outputs.last_hidden_state), cache, hidden_states)


def _layer_of(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    """A cache layer that holds given tensors. `update` puts new ones in their place and writes to neither."""
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


__all__ = ["CACHE_NAME", "SharedPrefixCache", "can_share_prefix", "one_cache", "run_decoder", "run_rows"]
