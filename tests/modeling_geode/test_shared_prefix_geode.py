# SPDX-License-Identifier: Apache-2.0
"""Rows behind a shared prefix have the states that they have alone, in every order in which a cache can be used."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model, set_seed

from geode.modeling_geode.shared_prefix_geode import CACHE_NAME, SharedPrefixCache, can_share_prefix, run_rows


PREFIX, HIDDEN = 9, 24


def make_model(**options) -> Qwen2Model:
    set_seed(0)
    config = Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        initializer_range=0.3,
        attn_implementation="sdpa",
        **options,
    )
    return Qwen2Model(config).double().eval()


def embeddings(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def shared_cache(model, prefix: torch.Tensor) -> SharedPrefixCache:
    layers = model(inputs_embeds=prefix, use_cache=True)[CACHE_NAME].layers
    return SharedPrefixCache([layer.keys for layer in layers], [layer.values for layer in layers])


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unlike lengths, padded on the left with noise, and the mask with the prefix before them."""
    longest = max(len(row) for row in rows)
    stacked, mask = embeddings(len(rows), longest, seed=7), torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        stacked[number, longest - len(row) :], mask[number, longest - len(row) :] = row, 1
    return stacked, torch.cat([torch.ones(len(rows), PREFIX, dtype=torch.long), mask], dim=1)


@torch.no_grad()
def alone(model, prefix, row) -> torch.Tensor:
    """The oracle: one row with its own prefix, without a cache."""
    return model(inputs_embeds=torch.cat([prefix, row[None]], dim=1), use_cache=False).last_hidden_state[0, PREFIX:]


def assert_equals_alone(model, prefix, rows, states, start=0) -> None:
    for row, got in zip(rows, states, strict=True):
        want = alone(model, prefix, row)[start:]
        # The library norms, and eager attention takes its softmax, in float32 whatever the dtype.
        torch.testing.assert_close(got[-len(want) :], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(4, 1, 6), (200, 90, 3, 120)], ids=["one group", "groups"])
@torch.no_grad()
def test_states_equal_those_of_each_row_alone(attention, lengths):
    model = make_model()
    model.set_attn_implementation(attention)
    prefix = embeddings(1, PREFIX)
    rows = [embeddings(length, seed=number) for number, length in enumerate(lengths, start=1)]
    cache = shared_cache(model, prefix)
    held = [layer.keys.clone() for layer in cache.layers]
    stacked, mask = padded(rows)
    output = run_rows(model, inputs_embeds=stacked, attention_mask=mask, cache=cache, output_hidden_states=True)
    assert_equals_alone(model, prefix, rows, output.last_hidden_state)
    assert_equals_alone(model, prefix, rows, output.hidden_states[-1])
    assert output.hidden_states[0].shape == stacked.shape
    # Nothing of the prefix is held twice, and padding is not held at all.
    assert cache.get_seq_length() == mask.shape[1]
    for layer, keys in zip(cache.layers, held, strict=True):
        assert layer.keys.shape == (1, 2, PREFIX + sum(lengths), HIDDEN // 4)
        assert torch.equal(layer.keys[:, :, :PREFIX], keys)
    # Two steps more, as decoding takes them.
    for step in (1, 2):
        newest = embeddings(len(rows), 1, seed=20 + step)
        rows = [torch.cat([row, new]) for row, new in zip(rows, newest, strict=True)]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        output = run_rows(model, inputs_embeds=newest, attention_mask=mask, cache=cache)
        assert_equals_alone(model, prefix, rows, output.last_hidden_state, start=-1)
    without_mask = [row[-1:] for row in rows]
    fresh = cache.fork()
    output = run_rows(model, inputs_embeds=torch.stack(without_mask), cache=fresh)
    assert_equals_alone(model, prefix, without_mask, output.last_hidden_state)


@torch.no_grad()
def test_rows_may_be_reordered_and_cut():
    model, prefix = make_model(), embeddings(1, PREFIX)
    rows = [embeddings(length, seed=length) for length in (4, 2, 6)]
    cache = shared_cache(model, prefix)
    stacked, mask = padded(rows)
    run_rows(model, inputs_embeds=stacked, attention_mask=mask, cache=cache)
    order = torch.tensor([2, 0, 2])
    cache.reorder_cache(order)
    run_rows(model, inputs_embeds=embeddings(3, 1, seed=30), cache=cache, attention_mask=more(mask[order]))
    cache.crop(-1)
    newest = embeddings(3, 1, seed=31)
    output = run_rows(model, inputs_embeds=newest, cache=cache, attention_mask=more(mask[order]))
    rows = [torch.cat([rows[number], new]) for number, new in zip(order, newest, strict=True)]
    assert_equals_alone(model, prefix, rows, output.last_hidden_state, start=-1)
    # Rows that are kept go on as if the others had never been.
    kept = torch.tensor([1])
    cache.batch_select_indices(kept)
    assert cache.layers[0].keys.shape[2] == PREFIX + len(rows[1])
    newest = embeddings(1, 1, seed=32)
    output = run_rows(model, inputs_embeds=newest, cache=cache, attention_mask=more(more(mask[order]))[kept])
    assert_equals_alone(model, prefix, [torch.cat([rows[1], newest[0]])], output.last_hidden_state, start=-1)


def more(mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (0, 1), value=1)


@torch.no_grad()
def test_rows_that_lack_their_prefix_are_refused():
    model, prefix = make_model(), embeddings(1, PREFIX)
    cache, states = shared_cache(model, prefix), embeddings(2, 3)
    whole = torch.ones(2, PREFIX + 3, dtype=torch.long)
    left, right = whole.clone(), whole.clone()
    left[1, 0], right[0, -1] = 0, 0
    for mask, message in (
        (left, "between the prefix and the rest"),
        (right, "between the prefix and the rest"),
        (whole[:, 1:], r"must have shape \(2, 12\).*got \(2, 11\)"),
        ({"full_attention": None}, "got dict"),
    ):
        with pytest.raises(ValueError, match=message):
            run_rows(model, inputs_embeds=states, attention_mask=mask, cache=cache)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="`output_attentions` is not supported"):
        run_rows(model, inputs_embeds=states, cache=cache.fork(), output_attentions=True)
    used = cache.fork()
    run_rows(model, inputs_embeds=states, cache=used)
    with pytest.raises(ValueError, match="cannot repeat them 2 times"):
        used.batch_repeat_interleave(2)
    cache.fork().batch_repeat_interleave(2)


def test_only_full_attention_can_share_a_prefix():
    model = make_model()
    assert can_share_prefix(model.config)
    model.config._attn_implementation = "flash_attention_2"
    assert not can_share_prefix(model.config)
    sliding = make_model(use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention"] * 3)
    assert not can_share_prefix(sliding.config)
