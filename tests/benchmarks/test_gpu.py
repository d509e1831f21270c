# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_models import SUBJECTS, Setting


def test_the_public_models_have_their_public_sizes():
    # On the meta device: the sizes are there, the weights are not.
    setting = Setting("real", torch.device("meta"), torch.bfloat16, num_questions=1, questions_per_pack=1)
    qwen, internvl, ours = (SUBJECTS[name](setting).model for name in ("Qwen2.5-VL-3B", "InternVL3-2B", "GEODE"))
    # By hand: 36 layers of q and o (2048 x 2048), k and v (2048 x 256), three matrices of 2048 x 11008, biases and norms.
    layer = 2 * 2048**2 + 2048 + 2 * (2048 * 256 + 256) + 3 * 2048 * 11008 + 2 * 2048
    count = sum(parameter.numel() for parameter in qwen.model.language_model.parameters())
    assert count == 36 * layer + 151936 * 2048 + 2048
    # Hub's page of the model: 3.75 B.
    assert sum(parameter.numel() for parameter in qwen.parameters()) == 3_754_622_976
    for part in ("vision_tower", "language_model"):
        sizes = [
            {name: tuple(tensor.shape) for name, tensor in getattr(model.model, part).named_parameters()}
            for model in (ours, internvl)
        ]
        assert sizes[0] == sizes[1]
    assert ours.model.reconstructor is not None
    assert {parameter.dtype for parameter in ours.drh.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a CUDA device, and torch .* sees none.*about 75 GB.*--size tiny --device cpu"),
        (["--device", "cpu"], "`--size real` needs a CUDA device, got `--device cpu`"),
    ],
)
def test_what_it_needs_is_said(arguments, message, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit, match="2"):
        gpu.main(arguments)
    assert re.search(message, capsys.readouterr().err, flags=re.DOTALL)


@pytest.mark.slow
def test_all_steps_run_at_a_tiny_size(capsys):
    sizes = {"rounds": 1, "steps": 2, "questions": 3, "new-tokens": 2, "long-tokens": 5, "questions-per-pack": 2}
    options = [item for name, value in sizes.items() for item in (f"--{name}", str(value))]
    gpu.main(["--size", "tiny", "--device", "cpu", *options, "--json"])
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert list(report["inference"]) == list(report["training"]) == list(SUBJECTS)
    for name, row in report["inference"].items():
        assert 0 < sum(row["part_seconds"].values())
        assert row["many_to_one"]["least"] <= row["many_to_one"]["median"] <= row["many_to_one"]["most"]
        assert any(line.startswith(f"{name}: ") for line in lines)
    for row in report["training"].values():
        # It learns the row that it is shown again and again.
        assert row["losses"][-1] < row["losses"][0]
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_seconds"])
        assert row["mfu"] == pytest.approx(1e12 * row["tflop"] / row["step_seconds"] / report["peak"]["flops"])
    assert report["reconstructor"]["tflop"] > 0
    assert report["peak"]["from"] == "measured matrix product"


@pytest.mark.gpu
def test_all_steps_run_on_a_gpu_at_a_tiny_size(capsys):
    gpu.main(["--size", "tiny", "--rounds", "1", "--steps", "1", "--questions", "2", "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(row["peak_gib"] > 0 for row in report["training"].values())
