# SPDX-License-Identifier: Apache-2.0
"""The command line of `precompute`, apart from it so that `geode --help` loads neither torch nor transformers."""

import argparse


SHARD_SIZE = 16  # scenes that an interruption costs at most, for each process
DTYPE_NAMES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `geode.trainers.precompute.run` reads."""
    parser.add_argument("--model", metavar="DIR_OR_ID", required=True, help="a checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit of a checkpoint on the Hub")
    parser.add_argument("--videos", metavar="LIST_OR_FOLDER", required=True, help="a folder, a list, or a .jsonl")
    parser.add_argument("--out", metavar="DIR", required=True, help="the store; run again to resume")
    parser.add_argument(
        "--media-root", metavar="DIR", help="what paths are relative to (default: the folder of --videos)"
    )
    parser.add_argument(
        "--geometry",
        metavar="PATTERN",
        help="geometry of each video below the media root, such as geometry/{stem} (default: the reconstructor's)",
    )
    parser.add_argument("--reconstructor", metavar="DIR_OR_ID", help="VGGT, for a model that has no reconstructor")
    parser.add_argument(
        "--vision-features", action="store_true", help="also store the vision tower's features, which are large"
    )
    parser.add_argument(
        "--no-geometry", dest="store_geometry", action="store_false", help="do not store reconstructed points"
    )
    parser.add_argument("--shard-size", metavar="N", type=int, default=SHARD_SIZE, help="scenes a file (default: 16)")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPE_NAMES), help="of the model that encodes (default: the checkpoint's)"
    )
    parser.add_argument(
        "--store-dtype", choices=sorted(DTYPE_NAMES), help="that features are rounded to (default: none)"
    )
    parser.add_argument("--retry-failed", action="store_true", help="try again what could not be read before")
    parser.add_argument("--strict", action="store_true", help="fail in the end if a video could not be read")


__all__ = ["DTYPE_NAMES", "SHARD_SIZE", "add_arguments"]
