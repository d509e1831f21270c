# SPDX-License-Identifier: Apache-2.0
"""The command `geode`: it parses and dispatches. The work is in modules that are imported when they are needed."""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from geode import __version__
from geode.publishing_arguments import add_card_sources, add_commands
from geode.trainers.plan_arguments import add_arguments as add_plan_arguments
from geode.trainers.precompute_arguments import add_arguments


STAGES = ("alignment", "stage1", "stage2")


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    A mistake of the user (a missing file, a folder without a checkpoint, an absent optional package) ends with one line
    on standard error.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments without the program's name; `None` is those of the process.

    Returns:
        `int`: The exit code: 0, 1 where a check has failed, or 2 after a mistake of the user.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except Exception as error:
        if not isinstance(error, OSError | ValueError | ImportError) and not _is_wrong_setting(error):
            raise
        print(f"geode: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _is_wrong_setting(error: Exception) -> bool:
    """Whether a configuration refused its values, in the library's own kind of error, which is only there once it is loaded."""
    errors = sys.modules.get("huggingface_hub.errors")
    return errors is not None and isinstance(error, errors.StrictDataclassError)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; each subcommand stores the function that runs it as `run`."""
    parser = argparse.ArgumentParser(
        prog="geode", description="Ask a vision-language model about 3D space, and get numbers that were regressed."
    )
    parser.add_argument("--version", action="version", version=f"geode {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="ask the embedded scene its questions, offline")
    demo.add_argument("--out", metavar="DIR", help="where the picture goes (default: geode-demo)")
    demo.add_argument(
        "--ui", dest="is_page", action="store_true", help="serve a page instead, to upload a video and ask about it"
    )
    demo.add_argument(
        "--port", metavar="N", type=int, help="with --ui: the port (default: the first free one from 7860)"
    )
    _add_model(demo, "with --ui: a checkpoint (default: the tiny one of this package)")
    demo.set_defaults(run=_run_demo)

    _add_ask(commands.add_parser("ask", help="ask questions about a video"))
    _add_reconstruct(commands)
    _add_export(commands)
    add_commands(commands)

    precompute = commands.add_parser(
        "precompute",
        help="compute the features of frozen encoders once, for training",
        description="Compute geometry, point tokens and, if wanted, vision features of videos once, for training that reads them. "
        "Run it again to go on; `accelerate launch trainers/precompute.py` takes the same arguments for several processes.",
    )
    add_arguments(precompute)
    precompute.set_defaults(run=_run_precompute)

    train = commands.add_parser(
        "train",
        help="train a stage: alignment, stage1 or stage2",
        description="Train a stage. Its options follow: `--config FILE.yaml`, `--dry-run`, `--help` and many more. "
        "`accelerate launch trainers/STAGE.py` takes the same ones for several processes.",
    )
    train.add_argument("stage", choices=STAGES, help="which stage")
    train.add_argument("options", metavar="OPTION", nargs=argparse.REMAINDER, help="options of the stage")
    train.set_defaults(run=_run_train)

    plan = commands.add_parser(
        "plan",
        help="compute what recipes would cost: hours, memory, bytes and rates",
        description="Compute from recipes and configurations, without weights, data or an accelerator, what training would cost: "
        "accelerator-hours, memory of a process under DDP, FSDP2 and ZeRO, bytes of a feature store, data rates. Prints Markdown "
        "with everything that is assumed, each of which is an option.",
    )
    add_plan_arguments(plan)
    plan.set_defaults(run=_run_plan)

    _add_eval(
        commands.add_parser(
            "eval",
            help="ask a model a benchmark's questions, and score the answers",
            description="Ask a model every question of a benchmark in VSI-Bench's format; each scene is encoded once. Writes "
            "predictions, scores with intervals and chance, and a card. Run it again to go on; several processes: `accelerate launch "
            "-m geode.cli eval ...`.",
        )
    )
    calibrate = commands.add_parser(
        "calibrate",
        help="measure how wide a model's intervals must be",
        description="Measure on scenes that were not trained on how wide the intervals of a model (`drh_config.uncertainty`) must be to "
        "hold the truth as often as they say, and save the model with that. First ask it: `geode eval --split validation`.",
    )
    calibrate.add_argument("predictions", metavar="DIR", help="results of `geode eval` with the same model")
    calibrate.add_argument("--model", metavar="PATH_OR_ID", required=True, help="the model that gave them")
    calibrate.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    calibrate.add_argument("--out", metavar="DIR", required=True, help="where the calibrated model goes")
    calibrate.add_argument(
        "--coverage",
        metavar="SHARE",
        type=float,
        help="how often an interval shall hold the truth (default: the model's)",
    )
    calibrate.set_defaults(run=_run_calibrate)
    _add_data(commands.add_parser("data", help="make the embedded world, and check training data"))
    _add_assemble(commands)
    return parser


def _add_ask(ask: argparse.ArgumentParser) -> None:
    ask.add_argument("video", metavar="VIDEO", help="a video file")
    ask.add_argument("questions", metavar="QUESTION", nargs="+", help="a question, in quotes")
    _add_model(ask)
    geometry = ask.add_mutually_exclusive_group()
    geometry.add_argument(
        "--geometry", metavar="DIR", help="the scene's geometry (default: `geometry` beside the video, if it is there)"
    )
    geometry.add_argument(
        "--no-geometry", dest="use_geometry", action="store_false", help="answer from the frames alone"
    )
    ask.add_argument(
        "--num-frames", metavar="N", type=int, help="frames that the model sees (default: the processor's)"
    )
    ask.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object per question")
    ask.add_argument(
        "--abstain-above",
        metavar="SHARE",
        type=float,
        help='answer "unknown" where a number\'s interval is wider than +-SHARE of it, as 0.25 (models with intervals alone)',
    )
    ask.set_defaults(run=_run_ask)


def _add_reconstruct(commands) -> None:
    reconstruct = commands.add_parser(
        "reconstruct",
        help="turn a video into geometry, cameras and a picture",
        description="Turn a video into geometry, cameras (also as a COLMAP text model), a point cloud and a picture, with VGGT. "
        "Lengths are in metres if one of the sources of scale is given.",
    )
    reconstruct.add_argument("video", metavar="VIDEO", help="a video file or a folder of images")
    reconstruct.add_argument("-o", "--out", metavar="DIR", required=True, help="a folder that is new or empty")
    reconstruct.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        default="facebook/VGGT-1B",
        help="VGGT, or a GEODE model with a reconstructor (default: %(default)s, which is not for commercial use)",
    )
    reconstruct.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    reconstruct.add_argument("--num-frames", metavar="N", type=int, default=16, help="frames to take (default: 16)")
    reconstruct.add_argument(
        "--image-size", metavar="PIXELS", type=int, help="width of the frames for the model (default: the model's)"
    )
    reconstruct.add_argument(
        "--mode", choices=("crop", "pad"), default="crop", help="portrait frames are cropped, or padded with white"
    )
    reconstruct.add_argument(
        "--frames-chunk-size", metavar="N", type=int, help="frames at a time; fewer take less memory"
    )
    reconstruct.add_argument(
        "--min-confidence", metavar="C", type=float, help="drop pixels below (default: the lowest fifth)"
    )
    reconstruct.add_argument(
        "--up",
        metavar=("X", "Y", "Z"),
        nargs=3,
        type=float,
        help="against gravity, in the first camera's axes: right, down, forward (default: the floor's normal)",
    )
    scale = reconstruct.add_mutually_exclusive_group()
    scale.add_argument("--metres-per-unit", metavar="FACTOR", type=float, help="the scale itself")
    scale.add_argument(
        "--camera-height-m", metavar="METRES", type=float, help="height of the first camera over the floor"
    )
    scale.add_argument(
        "--known-length",
        metavar=("FRAME", "U", "V", "FRAME", "U", "V", "METRES"),
        nargs=7,
        type=float,
        help="a distance between two pixels of the frames that are written to colmap/images",
    )
    scale.add_argument(
        "--camera-positions", metavar="FILE", help="a text file with `x y z` in metres for each frame that is taken"
    )
    reconstruct.set_defaults(run=_run_reconstruct)


def _add_export(commands) -> None:
    export = commands.add_parser(
        "export",
        help="write a model as a folder that loads without this package",
        description="Write a model as a folder that loads without this package. Public VGGT weights, such as "
        "facebook/VGGT-1B, become one too.",
    )
    export.add_argument("directory", metavar="DIR", help="a folder that is new or empty")
    _add_model(export)
    export.add_argument(
        "--license", dest="license_id", metavar="ID", help="licence of VGGT weights, where their source tells none"
    )
    add_card_sources(export)
    export.set_defaults(run=_run_export)


def _add_assemble(commands) -> None:
    assemble = commands.add_parser(
        "assemble",
        help="build a checkpoint from its public parts",
        description="Build a checkpoint from its public parts, and print where each tensor comes from. A SOURCE is a folder, a file, "
        "or a name on the Hub: OWNER/REPOSITORY, with /FILE and @REVISION where they are needed. What is neither taken over nor "
        "left out for a stated reason is an error, and nothing is written.",
    )
    assemble.add_argument("directory", metavar="DIR", help="a folder that is new or empty")
    for name, text in (
        ("vision", "InternViT, as OpenGVLab or transformers has it (default: OpenGVLab/InternViT-300M-448px-V2_5)"),
        ("language-model", "language model and tokenizer (default: Qwen/Qwen2.5-1.5B-Instruct)"),
        ("init-from", "InternVL instead of these two, with its projector, such as OpenGVLab/InternVL3-2B-hf"),
        ("points", "Sonata (default: facebook/sonata/sonata.pth)"),
    ):
        assemble.add_argument(f"--{name}", metavar="SOURCE", help=text)
    reconstructor = assemble.add_mutually_exclusive_group()
    reconstructor.add_argument(
        "--reconstructor", metavar="SOURCE", default="facebook/VGGT-1B", help="VGGT (default: %(default)s)"
    )
    reconstructor.add_argument(
        "--no-reconstructor", dest="reconstructor", action="store_const", const=None, help="leave VGGT out"
    )
    assemble.add_argument(
        "--model-overrides", metavar="JSON", default="{}", help='such as \'{"drm_config": {"hidden_size": 512}}\''
    )
    assemble.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights (default: auto, as each part is published, new ones in float32)",
    )
    assemble.add_argument("--seed", metavar="N", type=int, default=0, help="decides the new weights (default: 0)")
    assemble.add_argument(
        "--max-shard-size", metavar="SIZE", default="2GB", help="largest size of a file (default: %(default)s)"
    )
    assemble.add_argument("--dry-run", dest="is_dry_run", action="store_true", help="print the table, write nothing")
    assemble.set_defaults(run=_run_assemble)

    licences = commands.add_parser(
        "licences",
        help="print the terms of every part of a checkpoint",
        description="Print the terms of every part that a checkpoint was assembled from, and those of the whole.",
    )
    licences.add_argument("checkpoint", metavar="DIR_OR_ID", help="a checkpoint, assembled or trained from one")
    licences.add_argument("--revision", help="branch, tag or commit of a checkpoint on the Hub")
    licences.set_defaults(run=_run_licences)


def _add_eval(evaluate: argparse.ArgumentParser) -> None:
    source = evaluate.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--benchmark",
        metavar="PATH_OR_ID",
        help="a folder or file in VSI-Bench's format, or an id such as nyu-visionx/VSI-Bench",
    )
    source.add_argument(
        "--rescore", metavar="DIR", help="only score the predictions in a folder again; needs no model and no GPU"
    )
    evaluate.add_argument("--out", metavar="DIR", help="where the results go; a folder with the same run is completed")
    _add_model(evaluate)
    evaluate.add_argument("--split", default="test", help="split of the benchmark (default: test)")
    evaluate.add_argument(
        "--subset",
        choices=("full", "debiased", "pruned"),
        default="full",
        help="all rows, those whose `pruned` is false, or the others (default: full)",
    )
    evaluate.add_argument(
        "--benchmark-revision", metavar="REVISION", help="branch, tag or commit of a benchmark on the Hub"
    )
    evaluate.add_argument(
        "--media-root", metavar="DIR", help="folder with DATASET/SCENE.mp4 (default: the benchmark's)"
    )
    evaluate.add_argument(
        "--geometry",
        metavar="PATTERN",
        default="geometry/{scene}",
        help="a scene's geometry below the media root (default: %(default)s); without one the reconstructor makes it",
    )
    control = evaluate.add_mutually_exclusive_group()
    for name, text in (
        ("blind", "show nothing"),
        ("no_geometry", "show the frames alone"),
        ("shuffled_geometry", "show the frames with the geometry of the next scene"),
    ):
        control.add_argument(
            f"--{name.replace('_', '-')}", dest="control", action="store_const", const=name, help=f"control: {text}"
        )
    evaluate.add_argument("--num-frames", metavar="N", type=int, help="frames shown (default: the processor's)")
    evaluate.add_argument(
        "--batch-size", metavar="N", type=int, default=16, help="questions about a scene at a time (default: 16)"
    )
    evaluate.add_argument("--max-scenes", metavar="N", type=int, help="only the first scenes")
    evaluate.add_argument(
        "--scorer",
        choices=("official", "lmms_eval"),
        default="official",
        help="whose rules read an answer; figures of two scorers are not to be mixed (default: official)",
    )
    evaluate.set_defaults(run=_run_eval, control="none")


def _add_data(data: argparse.ArgumentParser) -> None:
    commands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    rooms = commands.add_parser(
        "rooms",
        help="make furnished rooms of known truth: videos, geometry and questions",
        description="Make furnished rooms of known truth, as a dataset for the Hub: videos, depth, cameras, boxes, questions with "
        "rationales, and a benchmark in VSI-Bench's format. The same arguments write the same bytes; run it again to go on.",
    )
    rooms.add_argument("--out", metavar="DIR", required=True, help="where the dataset goes")
    rooms.add_argument("--scenes", metavar="N", type=int, required=True, help="number of rooms")
    rooms.add_argument("--seed", metavar="N", type=int, default=0, help="decides everything (default: 0)")
    rooms.add_argument("--workers", metavar="N", type=int, help="processes (default: one for each core)")
    rooms.add_argument(
        "--image-size",
        metavar=("HEIGHT", "WIDTH"),
        nargs=2,
        type=int,
        default=(120, 160),
        help="of the videos, in pixels (default: 120 160)",
    )
    rooms.add_argument("--frames", metavar="N", type=int, default=16, help="frames of each video (default: 16)")
    rooms.add_argument(
        "--supersampling", metavar="N", type=int, default=1, help="samples a pixel along each axis (default: 1)"
    )
    rooms.set_defaults(run=_run_rooms)

    check = commands.add_parser(
        "check",
        help="look for scenes of a benchmark and for bad rows in a mixture",
        description="Read a whole mixture. Fails (exit code 1) if it has a scene of the benchmark, media that do not exist, rows, "
        "units or letters that are not understood, or numbers that no room has.",
    )
    check.add_argument(
        "mixture", metavar="MIXTURE", help="a YAML file, or the name of one that is shipped, such as stage2"
    )
    check.add_argument("--data-root", metavar="DIR", default=".", help="folder of the datasets (default: here)")
    check.add_argument("--benchmark", metavar="NAME_OR_PATH", help="vsi-bench, or files with a column `scene_name`")
    check.add_argument(
        "--skip-media", dest="checks_media", action="store_false", help="do not look for videos and images"
    )
    check.add_argument("--report", metavar="FILE", help="where the report goes (default: MIXTURE-check.json)")
    check.set_defaults(run=_run_check)


def _add_model(
    parser: argparse.ArgumentParser, text: str = "a checkpoint (default: the tiny one of this package)"
) -> None:
    parser.add_argument("--model", metavar="DIR_OR_ID", help=text)
    parser.add_argument("--revision", help="branch, tag or commit of a checkpoint on the Hub")


def _run_demo(arguments: argparse.Namespace) -> None:
    if arguments.is_page:
        if arguments.out is not None:
            raise ValueError(
                f"`--out` is for the picture that `--ui` does not make, got {arguments.out!r}. Leave it out."
            )
        from geode.ui import run_ui

        run_ui(arguments.model, arguments.revision, port=arguments.port)
        return
    for name in ("model", "revision", "port"):
        if getattr(arguments, name) is not None:
            raise ValueError(
                f"`--{name}` is for the page, got {getattr(arguments, name)!r} without `--ui`. Add `--ui`."
            )
    from geode.demo import run_demo

    run_demo(arguments.out or "geode-demo")


def _run_ask(arguments: argparse.Namespace) -> None:
    from geode.commands import ask_video

    ask_video(
        arguments.video,
        arguments.questions,
        model=arguments.model,
        revision=arguments.revision,
        geometry=arguments.geometry,
        use_geometry=arguments.use_geometry,
        num_frames=arguments.num_frames,
        as_json=arguments.as_json,
        abstain_above=arguments.abstain_above,
    )


def _run_reconstruct(arguments: argparse.Namespace) -> None:
    from geode.reconstruct import reconstruct_video

    options = {name: value for name, value in vars(arguments).items() if name not in ("video", "out", "run")}
    scene = reconstruct_video(arguments.video, arguments.out, **options)
    for name, value in scene.summary().items():
        print(f"{name}: {value}")
    print(f"reconstructed: {arguments.out}")


def _run_export(arguments: argparse.Namespace) -> None:
    from geode.commands import export_model

    options = {name: value for name, value in vars(arguments).items() if name not in ("directory", "run")}
    export_model(arguments.directory, **options)


def _run_assemble(arguments: argparse.Namespace) -> None:
    from geode.assemble import Assembly, check_new
    from geode.hub_cards.licences import text_lines, verdict

    names = ("vision", "language_model", "init_from", "points", "reconstructor", "dtype", "seed")
    options = {name: getattr(arguments, name) for name in names}
    try:
        options["model_overrides"] = json.loads(arguments.model_overrides)
    except ValueError as error:
        raise ValueError(
            f"`--model-overrides` must be an object in JSON, got {arguments.model_overrides!r}."
        ) from error
    check_new(arguments.directory)
    assembly = Assembly(**options)
    print(assembly.plan.table())
    print(f"licence of {verdict(assembly.terms)}")
    places = {
        part: {name: Path(arguments.directory) / name for name in names} for part, names in assembly.texts.items()
    }
    print("\n".join(text_lines(assembly.terms, places)), flush=True)
    if arguments.is_dry_run:
        print(f"not written (dry run): {arguments.directory}")
        return
    assembly.write(arguments.directory, max_shard_size=arguments.max_shard_size)
    print(f"assembled: {arguments.directory}")


def _run_licences(arguments: argparse.Namespace) -> None:
    from geode.hub_cards.licences import licence_report

    print(licence_report(arguments.checkpoint, revision=arguments.revision))


def _run_precompute(arguments: argparse.Namespace) -> None:
    from geode.trainers.precompute import run

    run(arguments)


def _run_train(arguments: argparse.Namespace) -> None:
    script = import_module(f"geode.trainers.{arguments.stage}")
    script.run_from_arguments(arguments.options, prog=f"geode train {arguments.stage}")


def _run_plan(arguments: argparse.Namespace) -> None:
    from geode.trainers.plan import run

    print(run(arguments))


def _run_eval(arguments: argparse.Namespace) -> None:
    from geode.evaluating import evaluate_model, report

    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "rescore")}
    if arguments.rescore is not None:
        report(arguments.rescore, scorer=arguments.scorer)
        return
    if arguments.out is None:
        raise ValueError("`--out` must name a folder for the results, got none.")
    evaluate_model(options.pop("benchmark"), options.pop("out"), **options)


def _run_calibrate(arguments: argparse.Namespace) -> None:
    from geode.evaluating import calibrate_model

    calibrate_model(
        arguments.predictions,
        arguments.out,
        model=arguments.model,
        revision=arguments.revision,
        coverage=arguments.coverage,
    )


def _run_rooms(arguments: argparse.Namespace) -> None:
    from geode.data.synthetic_rooms.dataset import build_dataset

    summary = build_dataset(
        arguments.out,
        num_scenes=arguments.scenes,
        seed=arguments.seed,
        num_workers=arguments.workers,
        image_size=tuple(arguments.image_size),
        num_frames=arguments.frames,
        supersampling=arguments.supersampling,
        show_progress=True,
    )
    for name in ("scenes", "questions"):
        print(f"{name}: {', '.join(f'{count:,} for {split}' for split, count in summary[name].items())}")
    print(f"size: {summary['megabytes']} MB")
    print(f"dataset: {arguments.out} (its README.md has the scores of not looking)")


def _run_check(arguments: argparse.Namespace) -> int:
    from geode.data.checks import check_mixture
    from geode.data.mixtures import Mixture

    mixture = Mixture.from_yaml(arguments.mixture)
    report = check_mixture(
        mixture,
        arguments.data_root,
        benchmark=arguments.benchmark,
        checks_media=arguments.checks_media,
        show_progress=True,
    )
    path = arguments.report or f"{mixture.name}-check.json"
    report.save(path)
    print(report.table())
    print(f"report: {path}")
    return 0 if report.has_passed else 1


if __name__ == "__main__":
    sys.exit(main())
