# SPDX-License-Identifier: Apache-2.0
"""Assembling at the public widths: what it computes, and how much memory it takes. See `test_assemble.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import InternVLVisionConfig, InternVLVisionModel, Qwen2Config, Qwen2ForCausalLM

import geode
from geode.assemble import Assembly
from geode.assembly_plan import make_tensor
from geode.modeling_geode.sonata_geode import convert_sonata_checkpoint
from geode.part_files import TensorReader

from .common_parts import (
    FIXTURES,
    SMALL_DRM,
    TEXT,
    TINY_TEXT,
    TINY_VISION,
    VISION,
    make_geometry,
    make_qwen,
    make_tokenizer,
    make_vision,
    opengvlab_vision,
    public_vision_config,
    write_empty,
)


pytestmark = pytest.mark.slow

# Prints the resident memory before the work and the largest one, in bytes.
MEASURED = """
import resource, sys

from geode import assemble, cli

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert cli.main(["assemble", *sys.argv[1:]]) == 0
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("memory", before * 1024, peak * 1024)
"""


def first_of_each_kind(shapes: dict, patterns: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Random tensors of the public shapes, without the layers after the first."""
    kept = {name: shape for name, shape in shapes.items() if not any(later(name, pattern) for pattern in patterns)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in kept.items()}


def later(name: str, pattern: str) -> bool:
    _, found, after = name.partition(pattern)
    return bool(found) and after.split(".")[0].isdigit() and int(after.split(".")[0]) > 0


def test_one_layer_of_each_kind_of_the_geometry_parts_at_full_width(tmp_path):
    make_qwen(tmp_path / "qwen", sizes=TINY_TEXT)
    make_vision(tmp_path / "vision", sizes=TINY_VISION)
    published = json.loads((FIXTURES / "vggt" / "keys_vggt_1b.json").read_text())["shapes"]
    kinds = ("patch_embed.blocks.", "frame_blocks.", "global_blocks.", "camera_head.trunk.")
    state = first_of_each_kind({key: shape for key, shape in published.items() if not key.startswith("track")}, kinds)
    (tmp_path / "vggt").mkdir()
    save_file(state, tmp_path / "vggt" / "model.safetensors")
    sizes = {"depth": 1, "vit_depth": 1, "camera_trunk_depth": 1, "intermediate_layer_idx": [0, 0, 0, 0]}
    (tmp_path / "vggt" / "config.json").write_text(json.dumps(sizes))
    published = json.loads((FIXTURES / "sonata" / "keys_sonata.json").read_text())
    state = first_of_each_kind(published["keys"], tuple(f"enc.enc{stage}.block" for stage in range(5)))
    torch.save(
        {"config": {**published["_config"], "enc_depths": [1] * 5}, "state_dict": state}, tmp_path / "sonata.pth"
    )

    sources = {"points": str(tmp_path / "sonata.pth"), "reconstructor": str(tmp_path / "vggt")}
    assembly = Assembly(vision=str(tmp_path / "vision" / "public"), language_model=str(tmp_path / "qwen"), **sources)
    converted = {
        "model.point_encoder.": convert_sonata_checkpoint(sources["points"]),
        "model.reconstructor.": geode.convert_vggt_checkpoint(sources["reconstructor"]),
    }
    with TensorReader() as reader:
        for prefix, model in converted.items():
            want = model.state_dict()
            steps = [step for step in assembly.plan.steps if step.name.startswith(prefix)]
            assert {step.name.removeprefix(prefix) for step in steps} == want.keys()
            for step in steps:
                got = make_tensor(step, reader, assembly.vocabulary, {})
                assert torch.equal(got, want[step.name.removeprefix(prefix)]), step.name


@pytest.mark.parametrize("max_shard_size_mb", [2000, 300])
def test_memory_is_that_of_the_largest_file_and_of_the_model(tmp_path, max_shard_size_mb):
    """The bound of the first size is that of the issue; smaller files of the result need less."""
    layers = 6
    with torch.device("meta"):
        qwen = Qwen2ForCausalLM(
            Qwen2Config(**TEXT, num_hidden_layers=layers, vocab_size=151936, tie_word_embeddings=True)
        )
        vision = InternVLVisionModel(InternVLVisionConfig(**VISION, num_hidden_layers=6, attention_bias=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in qwen.state_dict().items() if name != "lm_head.weight"}
    halves = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for name, shape in shapes.items():
        is_first = "embed" in name or name.startswith("model.layers.0.")
        halves[f"model-0000{1 if is_first else 2}-of-00002.safetensors"][name] = shape
    folder = tmp_path / "qwen"
    for file, part in halves.items():
        write_empty(folder / file, part, "BF16")
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    qwen.config.save_pretrained(folder)
    make_tokenizer(num_words=151643).save_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in opengvlab_vision(vision.state_dict(), 6).items()}
    write_empty(tmp_path / "vision" / "model.safetensors", shapes, "BF16")
    (tmp_path / "vision" / "config.json").write_text(json.dumps(public_vision_config(VISION, 6)))
    points, _ = make_geometry(tmp_path)
    arguments = {
        "--vision": tmp_path / "vision",
        "--language-model": folder,
        "--points": points,
        "--model-overrides": json.dumps(SMALL_DRM),
        "--max-shard-size": f"{max_shard_size_mb}MB",
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "out"), *words, "--no-reconstructor"]
    root = Path(geode.__file__).resolve().parents[1]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    before, peak = map(int, result.stdout.splitlines()[-1].split()[1:])
    inputs = [
        path.stat().st_size for path in (*folder.glob("*.safetensors"), *(tmp_path / "vision").glob("*.safetensors"))
    ]
    outputs = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert sum(outputs) > 1e9
    assert len(outputs) == (1 if max_shard_size_mb == 2000 else 4)
    # One tensor, the embedding, is larger than the smaller size of a file.
    assert peak - before <= 1.3 * max(inputs) + max(outputs)
