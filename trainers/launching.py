# SPDX-License-Identifier: Apache-2.0
"""What the launchable scripts of the stages share."""

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from geode.data.whole_files import writing
from geode.data.yaml_files import read_yaml
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


class RecipeParser(TrlParser):
    """trl's parser, which takes a recipe for what it says: this one looks at the file first."""

    def parse_args_and_config(self, args: Iterable[str] | None = None, **options):
        """
        Parse arguments and the recipe behind `--config`; see [`~trl.TrlParser`].

        Args:
            args (`Iterable[str]`, *optional*): The arguments; None are those of the process.
            **options: Of trl's parser.

        Returns:
            `tuple`: The dataclasses.

        Raises:
            FileNotFoundError: If there is no such recipe.
            ValueError: If it is not YAML, is no mapping, or an option does not exist or has the wrong type.
        """
        args = sys.argv[1:] if args is None else list(args)
        if "--config" in args:
            check_recipe(args[args.index("--config") + 1 : args.index("--config") + 2])
        try:
            return super().parse_args_and_config(args, **options)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            # What the classes of options, ours and the library's, do with values of other types than their fields'.
            raise ValueError(
                f"Every option must have the type that `--help` says, got another ({type(error).__name__}: {error})."
            ) from error


def check_recipe(paths: Sequence[str]) -> None:
    """
    Raise unless a recipe is a YAML file of options.

    Args:
        paths (`Sequence[str]`): What follows `--config`: one path.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, or no mapping.
    """
    if not paths or not Path(paths[0]).is_file():
        raise FileNotFoundError(
            f"`--config` must name a recipe, a YAML file, and there is none at {''.join(paths)!r:.200}."
        )
    content = read_yaml(paths[0], "The recipe")
    if not isinstance(content, dict) or not all(isinstance(name, str) and name != "help" for name in content):
        raise ValueError(
            f"The recipe {paths[0]} must be a mapping of options, `name: value` in each line, got {content!r:.80}."
        )


def build_parser(config_class: type[GeodeTrainingConfig], prog: str | None = None) -> TrlParser:
    """Return the parser of a stage's script."""
    return RecipeParser((GeodeScriptArguments, config_class, ModelConfig), prog=prog)


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
