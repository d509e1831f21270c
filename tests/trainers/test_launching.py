# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from geode.cli import main
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.trainers import stage2
from geode.trainers.dry_run import find_config
from geode.trainers.launching import load_parts
from tests.trainers.common_collator import make_media, make_model, make_processor


ROOT = Path(__file__).resolve().parents[2]
TOKEN = f"hf_{'a1B2' * 9}"
SMALL = ["--use_cpu", "--bf16", "false", "--activation_checkpointing", "false", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, its processor, media, and a mixture of eight rows with rationales."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "media").mkdir()
    make_media(folder / "media")
    processor = make_processor()
    make_model(processor).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "rows").mkdir()
    rows = [
        {"media": "rooms/one.mp4", "prompt": f"How long is {number}?", "answer": 2, "unit": "m", "rationale": "Long."}
        for number in range(8)
    ]
    (folder / "rows" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    mixture = "sources:\n  - {reader: jsonl, path: rows, media_root: media}\n"
    (folder / "rows.yaml").write_text(mixture, encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        f"model_name_or_path: {folder / 'model'}\nmixture: {folder / 'rows.yaml'}\ndata_root: {folder}\n"
        f"cache_dir: {folder / 'cache'}\ngeometry: 'geometry/{{stem}}'\nmax_steps: 1\nwarmup_steps: 0\nquestions_per_pack: 4\n",
        encoding="utf-8",
    )
    return folder


def test_all_stages_run_one_after_another_from_the_command_line(world, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def train(stage, *options):
        arguments = ["train", stage, "--config", str(world / "recipe.yaml"), *SMALL]
        assert main([*arguments, "--output_dir", str(tmp_path / stage), *options]) == 0

    train("alignment")
    train("stage1", "--model_name_or_path", str(tmp_path / "alignment"))
    evaluated = ("--eval_mixture", str(world / "rows.yaml"), "--num_eval_examples", "1", "--max_new_tokens", "2")
    train(
        "stage2",
        "--model_name_or_path",
        str(tmp_path / "alignment"),
        "--drm-path",
        str(tmp_path / "stage1"),
        *evaluated,
    )
    assert TOKEN not in "".join(capfd.readouterr())
    written = [path for folder in (tmp_path, world) for path in folder.rglob("*") if path.is_file()]
    assert "training_args.bin" in {path.name for path in written}
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    assert sorted(path.name for path in (tmp_path / "stage1").glob("*.safetensors")) == ["drm.safetensors"]
    card = (tmp_path / "stage2" / "README.md").read_text("utf-8")
    assert "`eval_mra/<REG>`" in card
    assert f"- Base model: `{tmp_path / 'alignment'}`" in card
    models = [
        GeodeForConditionalGeneration.from_pretrained(folder) for folder in (world / "model", tmp_path / "stage2")
    ]
    assert not torch.equal(*(model.drh.heads["REG"][0].weight for model in models))
    assert not torch.equal(*(model.model.drm.queries for model in models))
    assert (tmp_path / "stage2" / "processor_config.json").is_file()


@pytest.mark.slow
def test_script_runs_from_a_checkout(world, tmp_path):
    command = [sys.executable, "trainers/stage2.py", "--config", str(world / "recipe.yaml"), "--dry-run", *SMALL]
    result = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"model: {world / 'model'}" in result.stdout
    assert f"data: found at {world / 'rows'}" in result.stdout
    assert "steps: 1" in result.stdout
    assert not (tmp_path / "out").exists()


def test_dry_run_counts_what_training_would_train(world, capsys, tmp_path):
    options = ["--config", str(world / "recipe.yaml"), "--dry_run", *SMALL, "--output_dir", str(tmp_path)]
    assert main(["train", "stage1", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    model = make_model(make_processor())
    drm = sum(parameter.numel() for parameter in model.model.drm.parameters())
    (line,) = [line for line in lines if line.split()[0] == "all" and "GiB" not in line]
    assert line.split()[1:] == [f"{drm:,}", "of", f"{model.num_parameters():,}"]
    assert "effective batch: 8 rows of up to 4 questions, 32 in all (1 devices x 8 x 1)" in lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model_config", "geode-7b", "--dry_run"], "`model_config` must be one of ['geode-1.5b'], got 'geode-7b'"),
        (["--dry_run"], "give `model_name_or_path`, or for a dry run `model_config`"),
        (["--model_config", "geode-1.5b"], "`model_name_or_path` must name a checkpoint, got None"),
        (["--overlong", "cut"], "`overlong` must be one of ('error', 'drop'), got 'cut'"),
    ],
)
def test_mistakes_end_with_one_line(options, message, capsys, tmp_path):
    assert main(["train", "stage2", *SMALL, "--output_dir", str(tmp_path), *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_adapters_are_for_stage_2(capsys, world, tmp_path):
    options = ["--config", str(world / "recipe.yaml"), *SMALL, "--output_dir", str(tmp_path), "--use_peft"]
    assert main(["train", "stage1", *options]) == 2
    assert "only stage 2 trains an adapter" in capsys.readouterr().err


# peft still reads the old name of the library's `is_activation_checkpointing`.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_qlora_trains_adapters_on_a_language_model_in_4_bits(world, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `quantization`")
    options = [
        "--config",
        str(world / "recipe.yaml"),
        *SMALL,
        "--output_dir",
        str(tmp_path),
        "--use_peft",
        "--load_in_4bit",
    ]
    parsed = stage2.make_parser().parse_args_and_config(options)
    model, _ = load_parts(*parsed)
    quantised = {name for name, weight in model.named_parameters() if isinstance(weight, bitsandbytes.nn.Params4bit)}
    assert {name.split(".layers.")[0] for name in quantised} == {"model.language_model"}
    assert main(["train", "stage2", *options]) == 0
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    moved = [name for name, tensor in adapter.items() if "lora_B" in name and tensor.any()]
    assert len(moved) == len(quantised)


def test_unknown_keys_of_a_recipe_are_refused(world, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rat: 1.0e-5\n", encoding="utf-8")
    with pytest.raises(ValueError, match="learning_rat"):
        stage2.make_parser().parse_args_and_config(["--config", str(recipe), *SMALL])


def test_help_of_a_stage_is_the_script_s(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "stage2", "--help"])
    shown = capsys.readouterr().out
    assert "usage: geode train stage2" in shown
    assert "--drh_learning_rate" in shown


def test_model_that_is_neither_here_nor_stood_in_for_is_an_error(tmp_path):
    with pytest.raises(OSError, match="none"):
        find_config(str(tmp_path / "none"), None)
    config, source = find_config(str(tmp_path / "none"), "geode-1.5b")
    assert config.text_config.hidden_size == 1536
    assert f"{tmp_path / 'none'} is not here" in source
