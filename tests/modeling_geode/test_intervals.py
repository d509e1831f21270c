# SPDX-License-Identifier: Apache-2.0
"""Intervals of values: the head's spreads, what decoding and answers make of them, and that without them nothing changes."""

import math
from statistics import NormalDist

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import LogitsProcessorList

from geode.modeling_geode.answers_geode import Answer, Measurement
from geode.modeling_geode.regression_geode import GeodeRegressionHead, decode_values, encode_values
from tests.modeling_geode.common_geode import BOX_TOKEN, REG_TOKEN, tiny_config
from tests.modeling_geode.test_generation_geode import Favour, left_padded_inputs, make_model
from tests.modeling_geode.test_regression_geode import VECTOR, WAYPOINT_TOKEN, make_batch


TOKENS = {REG_TOKEN: "<REG>", BOX_TOKEN: "<3DBBOX>", WAYPOINT_TOKEN: "<way.point>"}


def make_head(**drh) -> GeodeRegressionHead:
    torch.manual_seed(0)
    config = tiny_config(drh_config=drh)
    config.control_tokens = {**config.control_tokens, "<way.point>": VECTOR}
    return GeodeRegressionHead(config)


def pair_of_heads(**drh) -> tuple[GeodeRegressionHead, GeodeRegressionHead]:
    """A head without spreads, and one with the same values and spreads."""
    plain, head = make_head(), make_head(uncertainty=True, **drh)
    missing = head.load_state_dict(plain.state_dict(), strict=False)
    assert sorted(missing.missing_keys) == [
        "spreads.REG.bias",
        "spreads.REG.weight",
        "spreads.way_point.bias",
        "spreads.way_point.weight",
    ]
    return plain, head


def test_spreads_change_neither_values_nor_their_gradients():
    plain, head = pair_of_heads()
    states, input_ids, targets = make_batch()
    outputs, gradients = [], []
    for module in (plain, head):
        leaf = states.clone().requires_grad_()
        outputs.append(module(leaf, input_ids, targets))
        outputs[-1].loss.backward()
        gradients.append({name: parameter.grad for name, parameter in module.heads.named_parameters()})
        gradients[-1]["states"] = leaf.grad
    assert torch.equal(*(output.values.nan_to_num() for output in outputs))
    assert outputs[0].loss != outputs[1].loss
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.spreads.parameters())


def test_loss_adds_the_likelihood_of_numbers_and_vectors():
    plain, head = pair_of_heads()
    states, input_ids, targets = make_batch()
    added = 0.0
    for row, column in ((0, 1), (1, 4)):
        token = TOKENS[int(input_ids[row, column])]
        entry, layers = head.entries[token], head.heads[head.names[token]]
        hidden = layers[:-1](states[row, column])
        spread = head.spreads[head.names[token]](hidden).exp().double()
        error = encode_values(targets[row, column, : entry["dim"]], entry).double() - layers[-1](hidden).double()
        # The density of a Gaussian, without its constant log sqrt(2 pi).
        density = torch.distributions.Normal(0.0, spread).log_prob(error) + 0.5 * math.log(2 * math.pi)
        added -= density.mean().item() / 4  # of four targets
    difference = head(states, input_ids, targets).loss - plain(states, input_ids, targets).loss
    assert difference.item() == pytest.approx(added, abs=1e-5)


def test_head_without_targets_gives_its_spreads_a_zero_gradient():
    _, head = pair_of_heads()
    states, input_ids, _ = make_batch()
    head(states[:, :1], input_ids[:, :1]).loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


@pytest.mark.parametrize(("coverage", "scale"), [(0.9, 1.0), (0.5, 1.0), (0.9, 2.5)])
def test_interval_is_the_gaussians_times_its_scale_in_codec_space(coverage, scale):
    _, head = pair_of_heads(interval_coverage=coverage, interval_scales={"<REG>": scale})
    states, input_ids, _ = make_batch()
    rows, columns = head.control_mask(input_ids).nonzero(as_tuple=True)
    picked, tokens = states[rows, columns], input_ids[rows, columns]
    values, intervals = head.decode_states(picked, tokens), head.decode_intervals(picked, tokens)
    quantile = {0.9: 1.6448536, 0.5: 0.6744898}[coverage]
    for state, token_id, value, ends in zip(picked, tokens.tolist(), values, intervals, strict=True):
        token = TOKENS[token_id]
        if token == "<3DBBOX>":
            assert ends is None
            continue
        entry, layers = head.entries[token], head.heads[head.names[token]]
        hidden = layers[:-1](state)
        mean, spread = layers[-1](hidden), head.spreads[head.names[token]](hidden).exp()
        assert ends.shape == (entry["dim"], 2)
        for column, sign in enumerate((-1, 1)):
            factor = scale if token == "<REG>" else 1.0
            expected = decode_values(mean + sign * quantile * factor * spread, entry)
            torch.testing.assert_close(ends[:, column], expected, rtol=1e-5, atol=1e-5)
        assert (ends[:, 0] < value).all()
        assert (value < ends[:, 1]).all()


def test_settings_of_intervals_can_change_on_a_model_that_is_loaded():
    model = make_model(drh_config={"uncertainty": True})
    state, token = torch.ones(1, model.drh.hidden_size), torch.tensor([REG_TOKEN])

    def half_width():
        (ends,) = model.drh.decode_intervals(state, token)
        low, high = encode_values(ends.T, model.drh.entries["<REG>"]).flatten().tolist()
        return (high - low) / 2

    before = half_width()
    model.config.drh_config.interval_scales = {"<REG>": 2.0}
    assert half_width() == pytest.approx(2 * before, rel=1e-4)
    model.config.drh_config.interval_coverage = 0.5
    assert half_width() == pytest.approx(2 * before * 0.6744898 / 1.6448536, rel=1e-4)


def test_trained_spread_is_that_of_the_noise():
    """Targets of two kinds of state with noise of 0.1 and of 1: the interval holds nine of ten of each."""
    torch.manual_seed(0)
    config = tiny_config(drh_config={"uncertainty": True})
    config.control_tokens = {"<REG>": {**config.control_tokens["<REG>"]}}
    config.control_tokens["<REG>"]["codec"] = {"transform": "identity", "mean": [0.0], "std": [1.0]}
    head = GeodeRegressionHead(config)
    kinds = torch.randn(2, 32)
    which = torch.arange(4000) % 2
    noise = torch.tensor([0.1, 1.0])[which] * torch.randn(4000)
    states, ids = kinds[which][:, None], torch.full((4000, 1), REG_TOKEN)
    targets = torch.full((4000, 1, head.max_dim), torch.nan)
    targets[:, 0, 0] = noise
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        head(states, ids, targets).loss.backward()
        optimizer.step()
    ends = torch.cat(head.decode_intervals(kinds, torch.tensor([REG_TOKEN, REG_TOKEN]))).detach()
    half = (ends[:, 1] - ends[:, 0]) / 2
    quantile = NormalDist().inv_cdf(0.95)
    assert half.tolist() == pytest.approx([0.1 * quantile, quantile], rel=0.1)
    inside = (ends[which, 0] <= noise) & (noise <= ends[which, 1])
    assert [float(inside[which == kind].float().mean()) for kind in (0, 1)] == pytest.approx([0.9, 0.9], abs=0.03)


# ---- generation ----


def generate(model, **options):
    return model.generate(
        **left_padded_inputs(model),
        max_new_tokens=8,
        logits_processor=LogitsProcessorList([Favour(30.0)]),
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_gives_an_interval_around_each_number(num_beams):
    plain, model = make_model(), make_model(drh_config={"uncertainty": True})
    model.load_state_dict(plain.state_dict(), strict=False)
    expected, output = (generate(network, num_beams=num_beams) for network in (plain, model))
    assert expected.intervals is None
    assert torch.equal(expected.sequences, output.sequences)
    found = 0
    for row, values in enumerate(output.values):
        assert len(values) == len(output.intervals[row])
        for value, other, ends in zip(values, expected.values[row], output.intervals[row], strict=True):
            assert torch.equal(value, other)
            assert (ends is None) == (len(value) == 7)
            if ends is not None:
                assert ends[0, 0] < value[0] < ends[0, 1]
                found += 1
    assert found > 3


def test_nothing_to_regress_gives_no_intervals():
    model = make_model(drh_config={"uncertainty": True})
    output = model.generate(**left_padded_inputs(model), max_new_tokens=1, return_dict_in_generate=True)
    assert output.values == output.intervals == [[], [], []]


def test_spreads_survive_saving(tmp_path):
    model = make_model(drh_config={"uncertainty": True, "interval_scales": {"<REG>": 1.75}})
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.drh_config.interval_scales == {"<REG>": 1.75}
    outputs = [generate(network) for network in (model, loaded)]
    ends = [[pair for row in output.intervals for pair in row if pair is not None] for output in outputs]
    assert ends[0]
    assert all(torch.equal(*pairs) for pairs in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("drh", "message"),
    [
        ({"interval_coverage": 1.0}, r"must lie between 0 and 1, got 1\.0"),
        ({"interval_scales": {"<REG>": 0.0}}, r"must hold positive numbers, got 0\.0 for <REG>"),
        ({"interval_scales": {"<REG>": math.inf}}, r"must hold positive numbers, got inf"),
        ({"interval_scales": {"<NUMBER>": 1.0}}, r"names \['<NUMBER>'\]"),
    ],
)
def test_bad_options_are_named(drh, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(drh_config=drh)


# ---- answers ----


def measure(value: float, low: float, high: float, unit: str | None = "m", **options) -> Measurement:
    return Measurement.from_si("<REG>", [value], kind="scalar", unit=unit, interval=[(low, high)], **options)


def test_interval_is_in_the_asked_unit():
    found = measure(1.5, 1.25, 2.0, unit="cm")
    assert (found.value, found.interval, found.si_interval) == (150.0, (125.0, 200.0), (1.25, 2.0))


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (3.2, 1.9, 5.9, (2.0, 5.0)),
        (3.2, 2.0, 4.0, (2.0, 4.0)),
        (3.4, 3.1, 3.7, (3.0, 3.0)),  # no whole number lies in between
        (0.2, -1.5, 0.9, (0.0, 0.0)),
    ],
)
def test_interval_of_a_count_is_whole_and_holds_the_count(value, low, high, expected):
    assert measure(value, low, high, unit="count").interval == expected


def test_interval_of_a_vector_has_a_pair_for_each_entry():
    found = Measurement.from_si("<PATH>", [1.0, 2.0], kind="vector", unit="cm", interval=[(0.5, 1.5), (1.0, 4.0)])
    assert found.interval == found.si_interval == ((0.5, 1.5), (1.0, 4.0))
    assert found.to_dict()["interval"] == [[0.5, 1.5], [1.0, 4.0]]


def test_wide_intervals_are_withheld():
    assert not measure(2.0, 1.5, 2.5, abstain_above=0.25).is_withheld  # a quarter, no more
    found = measure(2.0, 1.5, 2.52, abstain_above=0.25)
    assert (found.is_withheld, found.text, found.value) == (True, "unknown", 2.0)
    assert measure(0.0, 0.0, 0.1, abstain_above=0.25).is_withheld
    answer = Answer.from_segments(
        ["It is ", " m and ", "."],
        ["<REG>", "<3DBBOX>"],
        [[2.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 0.5]],
        kinds={"<REG>": "scalar", "<3DBBOX>": "box3d"},
        unit="m",
        intervals=[[(0.5, 4.0)], None],
        abstain_above=0.25,
    )
    assert answer.text.startswith("It is unknown m and [center")


@pytest.mark.parametrize("limit", [-0.1, math.nan])
def test_limit_that_is_no_share_is_named(limit):
    with pytest.raises(ValueError, match="`abstain_above` must not be negative, got"):
        measure(2.0, 1.5, 2.5, abstain_above=limit)


def test_abstaining_needs_intervals():
    with pytest.raises(ValueError, match=r"`abstain_above=0\.25` needs an interval, and <REG> has none"):
        Measurement.from_si("<REG>", [2.0], kind="scalar", abstain_above=0.25)
