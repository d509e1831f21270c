# SPDX-License-Identifier: Apache-2.0
"""
Stage 2: train language model, projector and regression head together, or adapters of them.

```bash
accelerate launch --config_file configuration/accelerate/multi_gpu.yaml trainers/stage2.py \
    --config configuration/recipes/stage2/geode_1.5b_8x80gb.yaml
```

`geode train stage2` takes the same arguments. `--dry-run` prints what would be trained, and stops.
"""

import sys
from collections.abc import Sequence

from trl import TrlParser, get_peft_config

from geode.trainers.launching import build_parser, load_parts, print_dry_run, run
from geode.trainers.stage2_config import GeodeStage2Config
from geode.trainers.stage2_trainer import GeodeStage2Trainer


def make_parser(prog: str | None = None) -> TrlParser:
    """Return the parser of the script."""
    return build_parser(GeodeStage2Config, prog)


def main(script_args, training_args, model_args) -> None:
    """
    Train as the arguments say.

    Args:
        script_args ([`GeodeScriptArguments`]): The script's arguments.
        training_args ([`GeodeStage2Config`]): The stage's.
        model_args ([`~trl.ModelConfig`]): The model's.
    """
    if training_args.dry_run:
        print_dry_run(GeodeStage2Trainer, script_args, training_args, model_args)
        return
    model, processor = load_parts(script_args, training_args, model_args)
    trainer = GeodeStage2Trainer(
        model, training_args, processing_class=processor, peft_config=get_peft_config(model_args)
    )
    run(trainer)


def run_from_arguments(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Parse arguments, by default those of the process, and train."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    main(*make_parser(prog).parse_args_and_config(arguments))


if __name__ == "__main__":
    run_from_arguments()
