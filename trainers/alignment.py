# SPDX-License-Identifier: Apache-2.0
"""
Train the 2D projector.

```bash
accelerate launch --config_file configuration/accelerate/multi_gpu.yaml trainers/alignment.py \
    --config configuration/recipes/alignment/geode_1.5b_8x80gb.yaml
```

`geode train alignment` takes the same arguments. `--dry-run` prints what would be trained, and stops.
"""

import sys
from collections.abc import Sequence

from trl import TrlParser

from geode.trainers.alignment_config import GeodeAlignmentConfig
from geode.trainers.alignment_trainer import GeodeAlignmentTrainer
from geode.trainers.launching import build_parser, load_parts, print_dry_run, run


def make_parser(prog: str | None = None) -> TrlParser:
    """Return the parser of the script."""
    return build_parser(GeodeAlignmentConfig, prog)


def main(script_args, training_args, model_args) -> None:
    """
    Train as the arguments say.

    Args:
        script_args ([`GeodeScriptArguments`]): The script's arguments.
        training_args ([`GeodeAlignmentConfig`]): The stage's.
        model_args ([`~trl.ModelConfig`]): The model's.
    """
    if model_args.use_peft:
        raise ValueError("`use_peft` must be false, got true: only stage 2 trains an adapter.")
    if training_args.dry_run:
        print_dry_run(GeodeAlignmentTrainer, script_args, training_args, model_args)
        return
    model, processor = load_parts(script_args, training_args, model_args)
    run(GeodeAlignmentTrainer(model, training_args, processing_class=processor))


def run_from_arguments(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Parse arguments, by default those of the process, and train."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    main(*make_parser(prog).parse_args_and_config(arguments))


if __name__ == "__main__":
    run_from_arguments()
