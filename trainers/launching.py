# SPDX-License-Identifier: Apache-2.0
"""What the launchable scripts of the stages share."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from geode.data.whole_files import writing
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.trainers.dry_run import dry_run, find_config
from geode.trainers.stopping import SaveOnSigterm, StoppedBySignal
from geode.trainers.training_config import GeodeTrainingConfig
from geode.trainers.training_setup import load_model


logger = logging.getLogger(__name__)


@dataclass
class GeodeScriptArguments:
    """
    Arguments of the scripts, beside the stage's options and [`~trl.ModelConfig`].

    Args:
        model_config (`str`, *optional*):
            A named configuration, such as `"geode-1.5b"`, that stands in for the model in a dry run if it is not there.
        processor_name_or_path (`str`, *optional*):
            Folder or Hub id of the processor; the default is the model's.
    """

    model_config: str | None = field(default=None, metadata={"help": "Stands in for an absent model in a dry run."})
    processor_name_or_path: str | None = field(default=None, metadata={"help": "The processor, if not the model's."})


def build_parser(config_class: type[GeodeTrainingConfig], prog: str | None = None) -> TrlParser:
    """Return the parser of a stage's script."""
    return TrlParser((GeodeScriptArguments, config_class, ModelConfig), prog=prog)


def print_dry_run(trainer_class, script_args, training_args, model_args) -> None:
    """Print what a run would train, from the first process alone."""
    config, source = find_config(
        model_args.model_name_or_path, script_args.model_config, revision=model_args.model_revision
    )
    report = dry_run(
        trainer_class,
        training_args,
        config=config,
        source=source,
        dtype=model_args.dtype,
        peft_config=get_peft_config(model_args),
    )
    if training_args.process_index == 0:
        print(report)  # noqa: T201 - the output of the command


def load_parts(
    script_args: GeodeScriptArguments, training_args: GeodeTrainingConfig, model_args: ModelConfig
) -> tuple[GeodeForConditionalGeneration, GeodeProcessor]:
    """
    Load the model and the processor of a run.

    Args:
        script_args ([`GeodeScriptArguments`]): The script's arguments.
        training_args ([`GeodeTrainingConfig`]): The stage's.
        model_args ([`~trl.ModelConfig`]): The model's.

    Returns:
        The model, with overrides and quantization, and the processor.

    Raises:
        ValueError: If no model is named.
    """
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError(
            f"`model_name_or_path` must name a checkpoint, got None; `model_config` {script_args.model_config!r} has no weights and "
            "serves dry runs only."
        )
    quantization = get_quantization_config(model_args)
    options = {}
    if quantization is not None:
        options["quantization_config"] = quantization
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    model = load_model(
        name,
        overrides=training_args.model_overrides,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        **options,
    )
    processor_name = script_args.processor_name_or_path
    revision = {"revision": model_args.model_revision} if processor_name is None else {}
    return model, GeodeProcessor.from_pretrained(processor_name or name, **revision)


def run(trainer) -> None:
    """
    Train, evaluate, save, and write the card. After SIGTERM save a checkpoint, and end.

    Args:
        trainer ([`GeodeTrainer`]): The trainer.

    Raises:
        OSError: If a process that reads data was killed, or something cannot be written.
        ValueError: If `enable_jit_checkpoint` is set, which does that in another way.
    """
    if trainer.args.enable_jit_checkpoint:
        raise ValueError(
            "`enable_jit_checkpoint` must be false: SIGTERM makes this command save after the step it is at, and end, and a resumed "
            "run then equals one that was not stopped. Leave it out."
        )
    stopper = SaveOnSigterm(trainer.accelerator)
    trainer.add_callback(stopper)
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except StoppedBySignal as stopped:
        logger.warning("%s", stopped)
        trainer.end()
        return
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(
            f"{error} Perhaps memory ran out: fewer `dataloader_num_workers` need less. The same command with "
            "`--resume_from_checkpoint true` goes on from the last checkpoint."
        ) from error
    finally:
        stopper.release()
    finish(trainer)


def finish(trainer) -> None:
    """
    Evaluate, save, and write the card.

    Args:
        trainer ([`GeodeTrainer`]): A trainer that has trained.
    """
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    if trainer.args.should_save:
        # The writer of safetensors has a random name for a file that is under way, which a kill leaves behind.
        for path in Path(trainer.args.output_dir).glob(".tmp??????"):
            path.unlink(missing_ok=True)
    with writing(trainer.args.output_dir):
        trainer.save_model(trainer.args.output_dir)
        trainer.save_state()
        trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=trainer.args.mixture)
    trainer.end()


__all__ = ["GeodeScriptArguments", "build_parser", "finish", "load_parts", "print_dry_run", "run"]
