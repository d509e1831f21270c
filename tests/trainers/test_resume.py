# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, at any step and while it saves, goes on as if nothing had happened."""

import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from geode.cli import main
from geode.trainers.alignment_config import GeodeAlignmentConfig
from geode.trainers.alignment_trainer import GeodeAlignmentTrainer
from geode.trainers.checkpoints import checkpoint_to_resume, find_damage, last_whole_checkpoint
from geode.trainers.launching import run
from geode.trainers.stage1_config import GeodeStage1Config
from geode.trainers.stage1_trainer import GeodeStage1Trainer
from geode.trainers.stage2_config import GeodeStage2Config
from geode.trainers.stage2_trainer import GeodeStage2Trainer
from tests.trainers.common_collator import make_model, make_processor, make_records, text_record
from tests.trainers.common_launch import ROOT, environment
from tests.trainers.common_training import NUM_STEPS, arguments_of, assert_same_run, history_of, make_world, settings


# peft still reads the old name of the library's `is_activation_checkpointing`.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes have it that are compared to the last bit."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The run that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(arguments_of(world, out)) == 0
    return out


def run_and_kill(world: Path, out: Path, step: int, *options: str, delay: float = 0.0, timeout: float = 180) -> None:
    """Start the command, and kill it once it begins to save a step, or some seconds later."""
    with open(out.parent / "killed.log", "ab") as log:
        command = [sys.executable, "-m", "geode.cli", *arguments_of(world, out, *options)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    deadline = time.monotonic() + timeout
    try:
        while not (out / f"checkpoint-{step}").is_dir():
            assert process.poll() is None, (out.parent / "killed.log").read_text("utf-8")[-4000:]
            assert time.monotonic() < deadline, f"No checkpoint of step {step} after {timeout} seconds."
            time.sleep(0.002)
        time.sleep(delay)
    finally:
        process.kill()
        code = process.wait()
    # It may have come to its end in the meantime.
    assert code in (-signal.SIGKILL, 0)


# ---- kill -9 ----


def test_epochs_are_short_and_values_are_not_in_every_step(whole):
    """Otherwise the tests below would see less than they should."""
    history = history_of(whole)
    assert history[3]["epoch"] > 1
    assert len({entry["loss/ce"] for entry in history}) == NUM_STEPS
    assert len({entry["learning_rate"] for entry in history}) > 3


def test_killed_run_goes_on_as_the_uninterrupted_one(world, whole, tmp_path):
    out = tmp_path / "out"
    run_and_kill(world, out, 4, "--save_total_limit", "2")
    assert not (out / "model.safetensors").exists()
    assert main(arguments_of(world, out, "--save_total_limit", "2", "--resume_from_checkpoint", "true")) == 0
    assert_same_run(out, whole)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-7", "checkpoint-8"]


@pytest.mark.slow
@pytest.mark.invariant
def test_run_that_is_killed_again_and_again_is_the_uninterrupted_one(world, whole, tmp_path):
    out, generator = tmp_path / "out", random.Random(0)
    for step in (1, 3, 4, 6, 7):
        run_and_kill(world, out, step, "--resume_from_checkpoint", "true", delay=generator.choice((0.0, 0.02, 0.1)))
    assert main(arguments_of(world, out, "--resume_from_checkpoint", "true")) == 0
    assert_same_run(out, whole)


@pytest.mark.parametrize(
    "step", [3, *(pytest.param(step, marks=pytest.mark.invariant) for step in (1, 2, 4, 5, 6, 7, 8))]
)
def test_every_step_can_be_resumed(world, whole, tmp_path, step):
    """Within an epoch, and at its end, where the packs are dealt anew; of a finished run nothing is left to do."""
    out = tmp_path / "out"
    shutil.copytree(whole / f"checkpoint-{step}", out / f"checkpoint-{step}")
    assert main(arguments_of(world, out, "--resume_from_checkpoint", str(out / f"checkpoint-{step}"))) == 0
    assert_same_run(out, whole)


# ---- half-written checkpoints ----


FILES = ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture
def broken(whole, tmp_path):
    """The checkpoints of steps 2 and 3, for a test to break the later one."""
    for step in (2, 3):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_torn_checkpoint_is_skipped_with_a_warning(broken, name, caplog):
    assert last_whole_checkpoint(broken) == str(broken / "checkpoint-3")
    path = broken / "checkpoint-3" / name
    content = path.read_bytes()
    for size in (0, len(content) // 2, len(content) - 2):
        path.write_bytes(content[:size])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert last_whole_checkpoint(broken) == str(broken / "checkpoint-2"), size
        (message,) = caplog.messages
        assert "checkpoint-3 is skipped" in message
        assert f"{name} ends too early" in message


@pytest.mark.parametrize("name", FILES[:3])
def test_checkpoint_without_one_of_its_files_is_skipped(broken, name):
    (broken / "checkpoint-3" / name).unlink()
    assert last_whole_checkpoint(broken) == str(broken / "checkpoint-2")


def test_first_checkpoint_that_is_torn_leaves_nothing_to_resume(broken, caplog):
    shutil.rmtree(broken / "checkpoint-3")
    (broken / "checkpoint-2" / "trainer_state.json").unlink()
    args = GeodeStage2Config(str(broken), use_cpu=True, bf16=False)
    with caplog.at_level(logging.WARNING):
        assert checkpoint_to_resume(True, args) is None
    assert "the run begins" in caplog.messages[-1]


def test_named_checkpoint_must_be_whole(broken):
    (broken / "checkpoint-3" / "optimizer.pt").unlink()
    args = GeodeStage2Config(str(broken), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=r"got '.*checkpoint-3', and it has no optimiser\. Take an earlier one"):
        checkpoint_to_resume(str(broken / "checkpoint-3"), args)
    with pytest.raises(ValueError, match="it is not there"):
        checkpoint_to_resume(str(broken / "checkpoint-9"), args)
    args.save_only_model = True
    assert checkpoint_to_resume(str(broken / "checkpoint-3"), args) == str(broken / "checkpoint-3")


@pytest.mark.parametrize(
    ("value", "step"), [(None, None), (False, None), ("false", None), (True, 3), ("true", 3), ("True", 3)]
)
def test_words_of_the_command_line(broken, value, step):
    args = GeodeStage2Config(str(broken), use_cpu=True, bf16=False)
    assert checkpoint_to_resume(value, args) == (step and str(broken / f"checkpoint-{step}"))


def test_checkpoints_of_sharded_runs_and_of_large_models_are_known(broken):
    folder = broken / "checkpoint-3"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    assert find_damage(folder) == "it has no model-00002-of-00002.safetensors"
    for path in [*folder.glob("model*"), folder / "optimizer.pt"]:
        path.unlink()
    assert find_damage(folder) == "it has no weights"
    (folder / "pytorch_model_fsdp_0").mkdir()
    assert find_damage(folder) == "it has no optimiser"
    (folder / "optimizer_0").mkdir()
    assert find_damage(folder) is None
    (folder / "pytorch_model_fsdp_0").rmdir()
    (folder / "optimizer_0").rmdir()
    (folder / "global_step3").mkdir()
    assert find_damage(folder) is None


# ---- in one process: each stage ----


@pytest.fixture(scope="module")
def trainer_of(world):
    processor = make_processor()

    def trainer_of(stage: str, folder: Path, **changes):
        classes = {
            "alignment": (GeodeAlignmentTrainer, GeodeAlignmentConfig),
            "stage1": (GeodeStage1Trainer, GeodeStage1Config),
            "stage2": (GeodeStage2Trainer, GeodeStage2Config),
        }
        trainer_class, config_class = classes[stage.removesuffix(" adapter")]
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "learning_rate": 1.0e-3, **changes}
        rationales = [text_record(uid=str(number), rationale=f"It is {number}.") for number in range(6)]
        model = make_model(processor)
        model.config.text_config.attention_dropout = 0.2
        extra = {"peft_config": LoraConfig(r=2, lora_dropout=0.2)} if "adapter" in stage else {}
        return trainer_class(
            model,
            config_class(**settings(folder, world / "media", **options)),
            train_dataset=rationales if stage == "stage1" else make_records(count=6),
            eval_dataset=[text_record(rationale="So.")] if changes.get("load_best_model_at_end") else None,
            processing_class=processor,
            **extra,
        )

    return trainer_of


@pytest.mark.parametrize(
    "stage",
    ["stage2 adapter", *(pytest.param(stage, marks=pytest.mark.invariant) for stage in ("alignment", "stage1"))],
)
def test_other_stages_resume_as_exactly(trainer_of, tmp_path, stage):
    whole = trainer_of(stage, tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    (tmp_path / "again" / "checkpoint-3").mkdir()
    again = trainer_of(stage, tmp_path / "again")
    again.train(resume_from_checkpoint=True)

    def history(trainer):
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    assert [entry["step"] for entry in history(again)] == [1, 2, 3, 4]
    assert history(again) == history(whole)
    pairs = zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True)
    assert [name for (name, tensor), other in pairs if not torch.equal(tensor, other)] == []


def with_scripted_accuracy(trainer, values: list[float]):
    """Let a trainer's evaluations have these accuracies, one after another."""
    run, waiting = trainer._counted_loop, iter(values)

    def counted_loop(*arguments):
        output = run(*arguments)
        output.metrics["eval_mra/<REG>"] = next(waiting)
        return output

    trainer._counted_loop = counted_loop
    return trainer


@pytest.mark.parametrize(
    "stage", ["stage2", *(pytest.param(stage, marks=pytest.mark.invariant) for stage in ("stage2 adapter", "stage1"))]
)
def test_best_checkpoint_by_relative_accuracy_is_kept_and_loaded(trainer_of, tmp_path, stage):
    trainer = trainer_of(
        stage,
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=2,
        metric_for_best_model="mra/<REG>",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    weights = []
    with_scripted_accuracy(trainer, [0.1, 0.5, 0.3, 0.4])
    evaluate = trainer.evaluate

    def evaluate_and_copy(*arguments, **options):
        weights.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        return evaluate(*arguments, **options)

    trainer.evaluate = evaluate_and_copy
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "checkpoint-2"
    assert trainer.state.best_metric == 0.5
    # The best one and, to go on from, the last.
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    found = trainer.model.state_dict()
    assert [name for name, tensor in weights[1].items() if not torch.equal(tensor, found[name])] == []
    assert any(not torch.equal(tensor, weights[3][name]) for name, tensor in found.items())


def test_stage_1_checkpoint_holds_the_module_by_name_and_its_moments(trainer_of, tmp_path):
    trainer = trainer_of("stage1", tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    names = set(trainer.model.model.drm.state_dict())
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        (path,) = folder.glob("*.safetensors")
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == names
    moments = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt", weights_only=True)["state"]
    assert len(moments) == len(list(trainer.model.model.drm.parameters()))


def test_stage_1_checkpoint_holds_everything_if_asked_for(trainer_of, tmp_path):
    trainer = trainer_of("stage1", tmp_path, max_steps=1, save_full_model=True)
    trainer.train()
    found = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    for part in ("language_model", "vision_tower", "point_encoder", "drm"):
        assert any(name.startswith(f"model.{part}.") for name in found), part
    assert not (tmp_path / "checkpoint-1" / "drm.safetensors").exists()


def test_library_option_that_stops_at_another_moment_is_refused(trainer_of, tmp_path):
    """It would save between the gradients and their step: `tests/faults/test_stopping.py` sees what is there in its place."""
    trainer = trainer_of("stage2", tmp_path, enable_jit_checkpoint=True)
    try:
        with pytest.raises(ValueError, match=r"`enable_jit_checkpoint` must be false"):
            run(trainer)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the library has taken it when the trainer was made
    assert not list(tmp_path.glob("checkpoint-*"))


# ---- writing ----


def test_state_of_an_earlier_run_does_not_vouch_for_a_torn_checkpoint(trainer_of, tmp_path):
    """The step is saved once more, and the run dies before its end."""
    trainer = trainer_of("stage2", tmp_path, max_steps=1)
    trainer.train()
    assert find_damage(tmp_path / "checkpoint-1") is None

    def die(*arguments):
        raise KeyboardInterrupt

    trainer = trainer_of("stage2", tmp_path, max_steps=1)
    trainer._save_optimizer_and_scheduler = die
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert find_damage(tmp_path / "checkpoint-1") == "it has no trainer_state.json, which is written last"


def test_adapter_of_a_checkpoint_is_an_adapter(trainer_of, tmp_path):
    trainer = trainer_of("stage2 adapter", tmp_path, max_steps=1)
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert find_damage(tmp_path / "checkpoint-1") is None
    assert not (tmp_path / "checkpoint-1" / "model.safetensors").exists()


def test_flipped_bit_of_any_file_is_seen(broken, caplog):
    """Weights, moments and random numbers with one wrong bit load without a word."""
    folder, generator = broken / "checkpoint-3", random.Random(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {"checksums.json", "model.safetensors", "optimizer.pt", "rng_state.pth"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        for _ in range(3):
            position = generator.randrange(len(content))
            flipped = content[position] ^ (1 << generator.randrange(8))
            path.write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                assert last_whole_checkpoint(broken) == str(broken / "checkpoint-2"), (path, position)
            (message,) = caplog.messages
            assert path.name in message or "ends too early" in message
        path.write_bytes(content)
    assert last_whole_checkpoint(broken) == str(folder)


def test_checkpoint_without_its_random_numbers_is_skipped(broken):
    """The library would go on with others, and not say so."""
    (broken / "checkpoint-3" / "rng_state.pth").unlink()
    assert last_whole_checkpoint(broken) == str(broken / "checkpoint-2")


def test_checkpoint_of_an_earlier_version_has_no_checksums(broken):
    (broken / "checkpoint-3" / "checksums.json").unlink()
    assert last_whole_checkpoint(broken) == str(broken / "checkpoint-3")
