# SPDX-License-Identifier: Apache-2.0
"""Codecs and the regression head. Literals are derived beside them; the head's oracle is a loop over positions."""

import math

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from geode.modeling_geode.regression_geode import GeodeRegressionHead, decode_values, encode_values, encoded_dim
from tests.modeling_geode.common_geode import BOX_TOKEN, REG_TOKEN, tiny_config


WAYPOINT_TOKEN = 8
BOX = {
    "token_id": BOX_TOKEN,
    "dim": 7,
    "kind": "box3d",
    "codec": {"mean": [1.0, -2.0, 0.5, -1.0, 0.0, 0.25], "std": [2.0, 4.0, 0.5, 0.5, 2.0, 1.0]},
}
VECTOR = {
    "token_id": WAYPOINT_TOKEN,
    "dim": 3,
    "kind": "vector",
    "codec": {"transform": "symlog", "mean": [0.5, 0.0, -0.5], "std": [1.5, 1.0, 0.5]},
}
SOME_BOX = [2.0, 2.0, 0.25, 1.0, math.e, 2.0, math.pi / 3]


def scalar(transform: str, mean: float = 0.0, std: float = 1.0) -> dict:
    return {"token_id": 9, "dim": 1, "kind": "scalar", "codec": {"transform": transform, "mean": [mean], "std": [std]}}


def make_head(drh: dict | None = None, tokens: dict | None = None) -> GeodeRegressionHead:
    torch.manual_seed(0)
    config = tiny_config(drh_config=drh or {})
    config.control_tokens = {**config.control_tokens, "<way.point>": VECTOR} if tokens is None else tokens
    return GeodeRegressionHead(config)


def make_batch(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, tokens and targets: two scalars (one unsupervised), two boxes and a vector in three samples."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 6, 32, generator=generator).to(dtype)
    input_ids = torch.tensor(
        [
            [11, REG_TOKEN, 12, BOX_TOKEN, 13, 14],
            [11, 12, 13, 14, WAYPOINT_TOKEN, BOX_TOKEN],
            [11, 12, REG_TOKEN, 13, 14, 15],
        ]
    )
    targets = torch.full((3, 6, 7), torch.nan)
    targets[0, 1, 0] = 2.5
    targets[0, 3] = torch.tensor(SOME_BOX)
    targets[1, 4, :3] = torch.tensor([-3.0, 0.0, 40.0])
    targets[1, 5] = torch.tensor([0.3, -1.0, 0.8, 0.5, 1.5, 0.7, -1.2])
    return states, input_ids, targets


def mlp_by_hand(layers, state: torch.Tensor) -> torch.Tensor:
    """One state through Linear, GELU, Linear in float64: GELU(x) = x (1 + erf(x / sqrt 2)) / 2."""
    first, last = layers[0], layers[2]
    hidden = first.weight.double() @ state.double() + first.bias.double()
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return last.weight.double() @ hidden + last.bias.double()


def loss_by_loop(head, states, input_ids, targets, distance, shift: int = 0) -> torch.Tensor:
    """Eq. 6, one target after another."""
    terms = []
    for token, entry in head.entries.items():
        layers = {"<REG>": "REG", "<3DBBOX>": "3DBBOX", "<way.point>": "way_point"}[token]
        for row, column in (input_ids == entry["token_id"]).nonzero().tolist():
            target = targets[row, column, : entry["dim"]]
            if not target.isnan().any():
                predicted = mlp_by_hand(head.heads[layers], states[row, column - shift])
                terms.append(distance(predicted - encode_values(target.double(), entry)).mean())
    return torch.stack(terms)


@pytest.mark.parametrize(
    ("entry", "value", "encoded"),
    [
        (scalar("identity", 3.0, 2.0), 4.0, 0.5),  # (4 - 3) / 2
        (scalar("log", 1.0, 2.0), math.e**5, 2.0),  # (5 - 1) / 2
        (scalar("log1p", 1.0, 0.5), math.e**3 - 1, 4.0),  # (3 - 1) / 0.5
        (scalar("log1p", 0.0, 1.0), 0.0, 0.0),
        (scalar("symlog", 1.0, 2.0), 1 - math.e**5, -3.0),  # -(log(1 + e^5 - 1)) = -5, (-5 - 1) / 2
        (scalar("symlog", 1.0, 2.0), 0.0, -0.5),
    ],
)
def test_scalar_codecs_have_the_values_of_their_formulas(entry, value, encoded):
    values = torch.tensor([[value]], dtype=torch.float64)
    torch.testing.assert_close(encode_values(values, entry), torch.tensor([[encoded]], dtype=torch.float64))
    torch.testing.assert_close(decode_values(torch.tensor([[encoded]], dtype=torch.float64), entry), values)


def test_vector_codec_standardises_each_entry_by_its_own_statistics():
    # symlog of (e - 1, 0, 1 - e^2) is (1, 0, -2); standardised (1 - 0.5) / 1.5, 0, (-2 + 0.5) / 0.5.
    values = torch.tensor([math.e - 1, 0.0, 1 - math.e**2])
    torch.testing.assert_close(encode_values(values, VECTOR), torch.tensor([1 / 3, 0.0, -3.0]))


def test_box_codec_has_the_values_of_its_formula():
    # Centre: (2 - 1) / 2, (2 + 2) / 4, (0.25 - 0.5) / 0.5. Logs of sizes: 0, 1, log 2.
    # Yaw 60 degrees: sine and cosine of 120 degrees.
    expected = torch.tensor([0.5, 1.0, -0.5, 2.0, 0.5, math.log(2) - 0.25, math.sqrt(3) / 2, -0.5])
    torch.testing.assert_close(encode_values(torch.tensor(SOME_BOX), BOX), expected)
    torch.testing.assert_close(decode_values(expected, BOX), torch.tensor(SOME_BOX))
    assert [encoded_dim(entry) for entry in (BOX, VECTOR, scalar("log"))] == [8, 3, 1]


def test_box_codec_does_not_see_half_a_turn():
    turned = torch.tensor(SOME_BOX) + torch.tensor([0, 0, 0, 0, 0, 0, math.pi])
    torch.testing.assert_close(
        encode_values(turned, BOX), encode_values(torch.tensor(SOME_BOX), BOX), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("sine", "cosine", "yaw"),
    [
        (0.0, -1.0, math.pi / 2),
        (-0.0, -1.0, math.pi / 2),
        (-1e-12, -1.0, math.pi / 2),
        (0.0, 2.0, 0.0),
        (3.0, 0.0, math.pi / 4),
        (-3.0, 0.0, -math.pi / 4),
        (1e-3, 1e-3, math.pi / 8),
        (0.0, 0.0, 0.0),
        (1e-20, -1e-20, 0.0),
    ],
)
def test_decoded_yaw_lies_in_its_half_open_interval(sine, cosine, yaw):
    encoded = torch.tensor([0.0] * 6 + [sine, cosine], requires_grad=True)
    decoded = decode_values(encoded, BOX)
    assert decoded[6].item() == pytest.approx(yaw, abs=1e-6)
    (gradient,) = torch.autograd.grad(decoded.sum(), encoded)
    assert gradient.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["identity", "log", "log1p", "symlog"]),
    st.floats(1e-3, 1e4),
    st.booleans(),
    st.floats(-3, 3),
    st.floats(0.1, 5),
)
def test_scalar_codecs_are_invertible(transform, magnitude, is_negative, mean, std):
    value = -magnitude if is_negative and transform in ("identity", "symlog") else magnitude
    entry = scalar(transform, mean, std)
    values = torch.tensor([value])
    assert decode_values(encode_values(values, entry), entry).item() == pytest.approx(value, rel=2e-5, abs=2e-5)
    exact = values.double()
    torch.testing.assert_close(decode_values(encode_values(exact, entry), entry), exact, rtol=1e-11, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=3, max_size=3),
    st.lists(st.floats(0.01, 50), min_size=3, max_size=3),
    st.floats(-math.pi / 2, math.pi / 2, exclude_min=True),
)
def test_box_codec_is_invertible(center, size, yaw):
    box = torch.tensor([*center, *size, yaw], dtype=torch.float64)
    decoded = decode_values(encode_values(box, BOX), BOX)
    torch.testing.assert_close(decoded[:6], box[:6], rtol=1e-11, atol=1e-11)
    # Near half a turn rounding may choose the other end of the interval, which is the same box.
    assert math.remainder(decoded[6].item() - yaw, math.pi) == pytest.approx(0, abs=1e-9)
    assert -math.pi / 2 < decoded[6].item() <= math.pi / 2


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["identity", "log", "log1p", "symlog", "box3d"]),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
)
def test_decoded_values_are_finite_and_can_be_encoded_whatever_the_state(kind, state):
    entry = BOX if kind == "box3d" else scalar(kind, 1.0, 5.0)
    encoded = torch.full((encoded_dim(entry),), state, requires_grad=True)
    decoded = decode_values(encoded, entry)
    assert decoded.isfinite().all()
    assert encode_values(decoded, entry).isfinite().all()
    (gradient,) = torch.autograd.grad(decoded.sum(), encoded)
    assert gradient.isfinite().all()


def test_decoded_values_are_clamped_at_the_documented_bounds():
    bounds = {
        "identity": (-math.exp(30), math.exp(30)),
        "log": (math.exp(-30), math.exp(30)),
        "log1p": (math.exp(-15) - 1, math.exp(30) - 1),
        "symlog": (1 - math.exp(30), math.exp(30) - 1),
    }
    for transform, (low, high) in bounds.items():
        wild = decode_values(torch.tensor([[-1e20], [1e20]], dtype=torch.float64), scalar(transform))
        assert wild.flatten().tolist() == pytest.approx([low, high], rel=1e-12)
        # A clamp too tight would bend values that a scene can have.
        sane = torch.tensor([[1e9]], dtype=torch.float64)
        torch.testing.assert_close(decode_values(encode_values(sane, scalar(transform)), scalar(transform)), sane)


def test_codecs_pass_gradcheck():
    for entry in [scalar(transform, 0.3, 0.7) for transform in ("identity", "log", "log1p", "symlog")] + [BOX, VECTOR]:
        values = 0.5 + torch.rand(4, entry["dim"], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        encoded = encode_values(values, entry)
        assert torch.autograd.gradcheck(lambda v, entry=entry: encode_values(v, entry), values.requires_grad_())
        assert torch.autograd.gradcheck(
            lambda v, entry=entry: decode_values(v, entry), encoded.detach().requires_grad_()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codecs_compute_half_precision_in_float32(dtype):
    values = torch.tensor(SOME_BOX).to(dtype)
    encoded = encode_values(values, BOX)
    assert torch.equal(encoded, encode_values(values.float(), BOX))
    assert torch.equal(decode_values(encoded.to(dtype), BOX), decode_values(encoded.to(dtype).float(), BOX))
    assert encoded.dtype == torch.float32


@pytest.mark.parametrize(
    ("entry", "values", "message"),
    [
        (scalar("identity"), [[1.0], [math.inf]], r"must be finite, got \[inf\]"),
        (scalar("identity"), [[math.nan]], r"must be finite, got \[nan\]"),
        (scalar("log"), [[1.0], [0.0]], r"must be positive for the codec's transform 'log', got \[0\.0\]"),
        (scalar("log1p"), [[2.0], [-1.0]], r"must be above -1 for the codec's transform 'log1p', got \[-1\.0\]"),
        (
            BOX,
            [SOME_BOX, [1.0, 2.0, 3.0, 4.0, 0.0, 6.0, 0.5]],
            r"positive sizes .* got \[1\.0, 2\.0, 3\.0, 4\.0, 0\.0, 6",
        ),
        (BOX, [[1.0, 2.0, -math.inf, 4.0, 5.0, 6.0, 0.5]], r"must be finite, got \[1\.0, 2\.0, -inf"),
    ],
)
def test_values_outside_a_codecs_domain_are_named(entry, values, message):
    with pytest.raises(ValueError, match=message + ".*(?s:.*)Correct the target"):
        encode_values(torch.tensor(values), entry)


def test_values_at_the_edge_of_a_domain_pass():
    assert encode_values(torch.tensor([-0.999]), scalar("log1p")).item() == pytest.approx(math.log(0.001), rel=1e-4)
    assert encode_values(torch.tensor([-5.0]), scalar("symlog")).item() == pytest.approx(-math.log(6))


@pytest.mark.parametrize(("hidden_position", "shift"), [("token", 0), ("previous", 1)])
def test_head_regresses_the_state_that_hidden_position_names(hidden_position, shift):
    head, (states, input_ids, _) = make_head({"hidden_position": hidden_position}), make_batch()
    values = head(states, input_ids).values
    names = {"<REG>": "REG", "<3DBBOX>": "3DBBOX", "<way.point>": "way_point"}
    expected = torch.full((3, 6, 7), torch.nan)
    for token, entry in head.entries.items():
        for row, column in (input_ids == entry["token_id"]).nonzero().tolist():
            encoded = mlp_by_hand(head.heads[names[token]], states[row, column - shift])
            expected[row, column, : entry["dim"]] = decode_values(encoded, entry).float()
    assert values.dtype == torch.float32
    assert expected.isfinite().sum() == 1 + 7 + 3 + 7 + 1
    torch.testing.assert_close(values, expected, equal_nan=True, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("drh", "distance"),
    [
        ({"loss": "l2"}, torch.square),
        ({"loss": "l1"}, torch.abs),
        # Huber: d^2 / 2 up to delta, then delta (|d| - delta / 2).
        (
            {"loss": "huber", "huber_delta": 0.4},
            lambda d: torch.where(d.abs() <= 0.4, d**2 / 2, 0.4 * (d.abs() - 0.2)),
        ),
        ({"loss": "l2", "hidden_position": "previous"}, torch.square),
    ],
)
def test_loss_is_the_mean_over_targets_of_the_mean_over_entries(drh, distance):
    head, (states, input_ids, targets) = make_head(drh), make_batch()
    output = head(states, input_ids, targets)
    terms = loss_by_loop(head, states, input_ids, targets, distance, shift=int("hidden_position" in drh))
    assert len(terms) == 4
    assert output.num_targets.item() == 4
    torch.testing.assert_close(output.loss.double(), terms.mean(), atol=1e-6, rtol=1e-6)


def test_loss_of_parts_over_the_global_count_equals_the_whole():
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(REG_TOKEN, WAYPOINT_TOKEN + 4, (8, 7), generator=generator)
    states = torch.randn(8, 7, 32, generator=generator)
    head = make_head()
    targets = torch.full((8, 7, 7), torch.nan)
    for entry in head.entries.values():
        rows, columns = (input_ids == entry["token_id"]).nonzero(as_tuple=True)
        targets[rows, columns, : entry["dim"]] = 0.1 + torch.rand(len(rows), entry["dim"], generator=generator)
    # Unequal parts: the mean of means would differ.
    targets[:2] = torch.nan

    def step(slices, count):
        head.zero_grad()
        losses = []
        for part in slices:
            output = head(states[part], input_ids[part], targets[part], num_regression_targets=count)
            output.loss.backward()
            losses.append(output.loss.detach())
        return sum(losses), [parameter.grad.clone() for parameter in head.parameters()]

    count = head(states, input_ids, targets).num_targets
    whole, whole_gradients = step([slice(0, 8)], None)
    for given_count in (count, int(count)):
        parts, gradients = step([slice(start, start + 2) for start in range(0, 8, 2)], given_count)
        torch.testing.assert_close(parts, whole)
        for got, want in zip(gradients, whole_gradients, strict=True):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("has_targets", [True, False])
@pytest.mark.parametrize("value_feedback", [True, False])
@pytest.mark.parametrize("count", [None, 0, 5])
def test_batch_without_control_tokens_gives_zero_gradients_to_every_parameter(has_targets, value_feedback, count):
    head = make_head({"value_feedback": value_feedback})
    states = torch.randn(2, 4, 32, requires_grad=True)
    input_ids = torch.tensor([[11, 12, 13, 14], [15, 16, 17, 18]])
    targets = torch.full((2, 4, 7), torch.nan) if has_targets else None
    output = head(states, input_ids, targets, num_regression_targets=count)
    assert output.loss.item() == 0
    assert output.values.isnan().all()
    output.loss.backward()
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in head.parameters())
    assert torch.equal(states.grad, torch.zeros_like(states))


def test_control_tokens_without_targets_are_not_supervised():
    head, (states, input_ids, targets) = make_head(), make_batch()
    states.requires_grad_()
    loss = head(states, input_ids, targets).loss
    (gradient,) = torch.autograd.grad(loss, states)
    is_supervised = ~targets.isnan().all(dim=-1)
    assert torch.equal(gradient.abs().sum(dim=-1) > 0, is_supervised)
    with torch.no_grad():
        broken = torch.where(is_supervised[..., None], states, torch.inf)
        assert torch.equal(head(broken, input_ids, targets).loss, loss)


def test_values_are_differentiable_without_nan():
    head, (states, input_ids, _) = make_head(), make_batch()
    states.requires_grad_()
    values = head(states, input_ids).values
    valid = ~values.isnan()
    for total in (values[valid].sum(), torch.where(valid, values, 0.0).sum()):
        gradients = torch.autograd.grad(total, [states, *head.parameters()], retain_graph=True)
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert torch.equal(gradients[0].abs().sum(dim=-1) > 0, head.control_mask(input_ids))
        assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_head_passes_gradcheck():
    head, (states, input_ids, targets) = make_head({"hidden_size": 3}).double(), make_batch(torch.float64)
    is_valid = ~head(states, input_ids).values.isnan()

    def loss_and_values(states, *parameters):
        output = head(states, input_ids, targets.double())
        return output.loss, output.values[is_valid]

    inputs = [states.requires_grad_(), *head.parameters()]
    assert torch.autograd.gradcheck(loss_and_values, inputs)


@pytest.mark.parametrize("uses_autocast", [False, True])
def test_head_computes_in_float32_under_half_precision(uses_autocast):
    head, (states, input_ids, targets) = make_head({"value_feedback": True}).bfloat16(), make_batch(torch.bfloat16)
    rounded = make_head({"value_feedback": True})
    rounded.load_state_dict({name: tensor.float() for name, tensor in head.state_dict().items()})
    expected = rounded(states.float(), input_ids, targets)
    expected_embeddings = rounded.feedback_embeddings(targets, input_ids, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=uses_autocast):
        for module in (head, rounded):
            output = module(states, input_ids, targets)
            assert torch.equal(output.values.nan_to_num(), expected.values.nan_to_num())
            assert torch.equal(output.loss, expected.loss)
            embeddings = module.feedback_embeddings(targets, input_ids, torch.float32)
            assert torch.equal(embeddings, expected_embeddings)


def test_tools_that_look_into_outputs_pass_the_head():
    head = make_head()
    states, input_ids, targets = make_batch()
    # It counts by module, and for that flattens what each returns.
    with FlopCounterMode(display=False) as counter:
        output = head(states, input_ids, targets)
    assert counter.get_flop_counts()["GeodeRegressionHead"]
    assert output.loss.requires_grad


def test_head_runs_with_offloaded_weights():
    head, (states, input_ids, targets) = make_head(), make_batch()
    expected = head(states, input_ids, targets)
    cpu_offload(head, execution_device=torch.device("cpu"))
    assert head.heads["REG"][0].weight.is_meta
    assert torch.equal(head(states, input_ids, targets).loss, expected.loss)


@pytest.mark.parametrize("num_hidden_layers", [0, 3])
def test_head_has_the_configured_layers(num_hidden_layers):
    head = make_head({"num_hidden_layers": num_hidden_layers, "hidden_size": 17})
    widths = [tuple(layer.weight.shape) for layer in head.heads["3DBBOX"] if isinstance(layer, torch.nn.Linear)]
    assert widths == {0: [(8, 32)], 3: [(17, 32), (17, 17), (17, 17), (8, 17)]}[num_hidden_layers]


def test_decode_states_equals_forward_in_any_order():
    head, (states, input_ids, _) = make_head(), make_batch()
    values = head(states, input_ids).values
    places = [(1, 5), (0, 1), (1, 4), (2, 2)]
    rows, columns = torch.tensor(places).T
    decoded = head.decode_states(states[rows, columns], input_ids[rows, columns])
    assert [len(value) for value in decoded] == [7, 1, 3, 1]
    for (row, column), value in zip(places, decoded, strict=True):
        torch.testing.assert_close(value, values[row, column, : len(value)])
    assert head.decode_states(states[0, :0], input_ids[0, :0]) == []


@pytest.mark.parametrize(("hidden_position", "shift"), [("token", 1), ("previous", 0)])
def test_feedback_lands_on_the_first_input_after_the_value_is_known(hidden_position, shift):
    head = make_head({"value_feedback": True, "hidden_position": hidden_position})
    _, input_ids, targets = make_batch()
    expected = torch.zeros(3, 6, 32)
    for token, name in (("<REG>", "REG"), ("<3DBBOX>", "3DBBOX"), ("<way.point>", "way_point")):
        entry, layer = head.entries[token], head.feedback[name]
        for row, column in (input_ids == entry["token_id"]).nonzero().tolist():
            value = targets[row, column, : entry["dim"]]
            # The value at the last position of sample 1 has no later input, and sample 2's is unknown.
            if column + shift < 6 and not value.isnan().any():
                expected[row, column + shift] = layer.weight @ encode_values(value, entry) + layer.bias
    added = head.feedback_embeddings(targets, input_ids, torch.float32)
    torch.testing.assert_close(added, expected)
    assert (expected.abs().sum(dim=-1) > 0).sum() == 4 - shift
    assert head.feedback_embeddings(targets, input_ids, torch.bfloat16).dtype == torch.bfloat16


def test_value_embeddings_are_those_of_the_tokens_in_order():
    head = make_head({"value_feedback": True})
    _, _, targets = make_batch()
    token_ids, values = torch.tensor([BOX_TOKEN, REG_TOKEN, BOX_TOKEN]), targets[[1, 0, 0], [5, 1, 3]]
    embedded = head.value_embeddings(values, token_ids)
    for row, (entry, name) in enumerate([("<3DBBOX>", "3DBBOX"), ("<REG>", "REG"), ("<3DBBOX>", "3DBBOX")]):
        encoded = encode_values(values[row, : head.entries[entry]["dim"]], head.entries[entry])
        torch.testing.assert_close(embedded[row], head.feedback[name](encoded))
    embedded.square().sum().backward()
    assert head.feedback["3DBBOX"].weight.grad.abs().min() > 0


def test_what_the_head_predicts_can_be_fed_back():
    head, (states, input_ids, _) = make_head({"value_feedback": True}), make_batch()
    with torch.no_grad():
        values = head(1e4 * states, input_ids).values
    assert head.feedback_embeddings(values, input_ids, torch.float32).isfinite().all()


def test_feedback_without_its_layers_raises():
    _, input_ids, targets = make_batch()
    with pytest.raises(ValueError, match=r"`drh_config.value_feedback=True`, got False"):
        make_head().feedback_embeddings(targets, input_ids, torch.float32)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((2, 4), [1.5], r"sample 2, position 4: token 14 is no control token, .* got \[1\.5, nan"),
        (
            (2, 2),
            [1.5, 2.5],
            r"sample 2, position 2: token 5 is a control token, which takes 1 numbers, .* got \[1\.5, 2\.5",
        ),
        (
            (1, 4),
            [1.5, math.nan, 0.5],
            r"sample 1, position 4: token 8 .* takes 3 numbers, then NaN, got \[1\.5, nan, 0\.5",
        ),
        ((2, 2), [math.inf], r"must be finite, got \[inf\]"),
        ((2, 2), [-1.0], r"above -1 .* got \[-1\.0\]"),
        (
            (0, 3),
            [0.0, 0.0, 0.0, 1.0, 1.0, -2.0, 0.0],
            r"positive sizes .* got \[0\.0, 0\.0, 0\.0, 1\.0, 1\.0, -2\.0, 0\.0\]",
        ),
    ],
)
def test_bad_targets_are_named_with_their_place(place, value, message):
    head, (states, input_ids, targets) = make_head(), make_batch()
    targets[place] = torch.tensor(value + [math.nan] * (7 - len(value)))
    with pytest.raises(ValueError, match=message):
        head(states, input_ids, targets)


def test_targets_of_the_wrong_shape_raise():
    head, (states, input_ids, targets) = make_head(), make_batch()
    with pytest.raises(ValueError, match=r"`regression_targets` must have shape \(3, 6, 7\).*got \(3, 6, 1\)"):
        head(states, input_ids, targets[..., :1])


def test_control_token_without_a_previous_state_raises():
    head, (states, input_ids, _) = make_head({"hidden_position": "previous"}), make_batch()
    input_ids[1, 0] = REG_TOKEN
    with pytest.raises(ValueError, match="position 0 of sample 1"):
        head(states, input_ids)


def test_tokens_that_are_not_control_tokens_raise():
    head = make_head()
    with pytest.raises(ValueError, match=r"control tokens \(\[5, 6, 8\]\), got 11"):
        head.decode_states(torch.zeros(2, 32), torch.tensor([REG_TOKEN, 11]))


def test_heads_are_named_after_their_tokens():
    tokens = {"<keys>": {**scalar("log"), "token_id": 20}, "<a.b c>": {**scalar("log"), "token_id": 21}}
    assert list(make_head(tokens=tokens).heads) == ["keys_", "a_b_c"]
    with pytest.raises(ValueError, match=r"got \['<a-b>', '<a\.b>'\]. Rename one"):
        make_head(tokens={"<a-b>": {**scalar("log"), "token_id": 20}, "<a.b>": {**scalar("log"), "token_id": 21}})


def test_head_without_control_tokens_in_the_configuration_is_empty():
    output = make_head(tokens={})(torch.randn(2, 3, 32), torch.tensor([[5, 6, 7], [8, 9, 10]]))
    assert output.loss.item() == 0
    assert output.num_targets.item() == 0
    assert torch.equal(output.values.isnan(), torch.ones(2, 3, 1, dtype=torch.bool))
