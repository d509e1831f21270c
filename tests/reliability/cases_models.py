# SPDX-License-Identifier: Apache-2.0
"""Bad input of the model, its store and its configurations, and mistakes at the command line."""

import dataclasses
import shutil
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from geode.configuration.configuration_geode import (
    GeodeConfig,
    GeodeDrhConfig,
    GeodeDrmConfig,
    SonataConfig,
    VggtConfig,
)
from geode.modeling_geode.vggt_processing_geode import VggtImageProcessor
from tests.reliability.common_reliability import DEEP, GARBAGE, PICTURE, Case, ExitCode2, World


def encoded(**changes):
    return lambda world: world.model.encode_scene(**{**world.scene_inputs, **changes})


def asked(questions, **options):
    return lambda world: world.model.ask(world.processor, world.scene, questions, **options)


def store(call, *, max_bytes: int = 10**8):
    return lambda world: call(world, world.model.open_scene_store(world.folder / "store", max_bytes=max_bytes))


def config(kind: type, **fields):
    return lambda world: kind(**fields)


def command(*arguments: str):
    """Run `geode`; `VIDEO` and `GEOMETRY` stand for those of the embedded scene, `FOLDER` for one without a checkpoint."""

    def call(world: World):
        names = {"VIDEO": world.video, "GEOMETRY": world.geometry, "FOLDER": str(world.folder)}
        world.command(*(names.get(argument, argument) for argument in arguments))

    return call


def damaged(name: str, content: bytes):
    """Ask a checkpoint of which one file is other than it was."""

    def call(world: World):
        folder = world.folder / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        (Path(shutil.copytree(world.checkpoint, folder)) / name).write_bytes(content)
        world.command("ask", world.video, "How far?", "--model", str(folder))

    return call


def written(name: str, content: bytes | str, *arguments: str):
    """Run `geode` with a file, whose path is `FILE` in the arguments."""

    def call(world: World):
        names = {"FILE": str(world.write(name, content)), "FOLDER": str(world.folder)}
        world.command(*(names.get(argument, argument) for argument in arguments))

    return call


TOKEN = {"token_id": 5, "dim": 1, "kind": "scalar", "codec": {"transform": "log1p", "mean": [0.0], "std": [0.0]}}
_ENCODE, _ASK, _PREFILL = "`model.encode_scene`", "`model.ask`", "`model.prefill_scene`"
_STORE, _CONFIG, _VGGT = "`model.open_scene_store`, `SceneStore`", "Configurations", "`VggtImageProcessor`"

CASES = (
    Case(_ENCODE, "nothing", lambda world: world.model.encode_scene(), ValueError, "got both or neither", "what `GeodeProcessor.prepare_scene` returns"),
    Case(_ENCODE, "a path", lambda world: world.model.encode_scene(frames="room.mp4"), ValueError, "got the path room.mp4", "`prepare_scene(video=...)` reads videos"),
    Case(_ENCODE, "a list for a tensor", encoded(point_coords=[1]), TypeError, "got list", "must be a tensor of `prepare_scene`"),
    Case(_ENCODE, "an unknown tensor", encoded(foo=torch.zeros(1)), TypeError, "got also ['foo']", "`prepare_scene` makes them"),
    Case(_ENCODE, "frames of wrong shape", encoded(pixel_values_videos=torch.zeros(2, 3)), ValueError, "got (2, 3)", "`prepare_scene` makes them"),
    Case(_ENCODE, "frames of another size", encoded(pixel_values_videos=torch.zeros(1, 1, 1, 3, 8, 8)), ValueError, "got (1, 3, 8, 8)", "`GeodeProcessor` resizes them"),
    Case(_ENCODE, "two scenes", lambda world: world.model.encode_scene(**{name: torch.cat([tensor, tensor]) for name, tensor in world.scene_inputs.items()}), ValueError, "got 2 samples of 1 scenes", "takes one scene"),
    Case(_ENCODE, "points of NaN", lambda world: encoded(point_coords=world.scene_inputs["point_coords"] * torch.nan)(world), ValueError, "values that are not", "Drop those points"),
    Case(_ENCODE, "voxels in floating point", lambda world: encoded(point_grid_coords=world.scene_inputs["point_grid_coords"].float())(world), TypeError, "got torch.float32", "must hold whole numbers"),
    Case(_ENCODE, "voxels beyond 16 bits", lambda world: encoded(point_grid_coords=world.scene_inputs["point_grid_coords"] * 10**6)(world), ValueError, "000000", "use larger voxels"),
    Case(_ENCODE, "cameras of wrong shape", encoded(camera_poses=torch.zeros(1, 1, 2, 3)), ValueError, "got (1, 1, 2, 3)", "(batch_size=1, num_scenes=1, num_cameras, 11)"),
    Case(_ASK, "a scene that is none", lambda world: world.model.ask(world.processor, "a.safetensors", ["a"]), TypeError, "got str", "`model.encode_scene(**processor.prepare_scene("),
    Case(_ASK, "no processor", lambda world: world.model.ask(None, world.scene, ["a"]), TypeError, "got NoneType", "must be the model's GeodeProcessor"),
    Case(_ASK, "a scene of other encoders", lambda world: world.model.ask(world.processor, dataclasses.replace(world.scene, encoder_digest="x"), ["a"]), ValueError, "its `encoder_digest` is x", "Encode it again"),
    Case(_ASK, "a scene of another width", lambda world: world.model.ask(world.processor, dataclasses.replace(world.scene, visual_tokens=world.scene.visual_tokens[..., :3], rationale_tokens=world.scene.rationale_tokens[..., :3]), ["a"]), ValueError, "got 3", "Encode it again"),
    Case(_ASK, "None", asked(None), TypeError, "got None", "must be a sequence of strings"),
    Case(_ASK, "a single question", asked("How far?"), TypeError, "got the string 'How far?'", "Put it in a list"),
    Case(_ASK, "numbers", asked([3]), TypeError, "got 3", "must hold strings"),
    Case(_ASK, "half a character", asked(["\ud800"]), ValueError, "half of a surrogate pair at 0", "Write the whole character"),
    Case(_ASK, "`batch_size` of 0", asked(["a"], batch_size=0), ValueError, "got 0", "whole number of at least 1"),
    Case(_ASK, "`max_new_tokens` of 0", asked(["a"], max_new_tokens=0), ValueError, "but is 0", "must be greater than 0"),
    Case(_ASK, "`abstain_above` in words", asked(["a"], abstain_above="x"), ValueError, "got 'x'", "must not be negative"),
    Case(_PREFILL, "None", lambda world: world.model.prefill_scene(world.processor, None), TypeError, "got NoneType", "must be a SceneEncoding"),
    Case(_STORE, "`max_bytes` of 0", store(lambda world, found: None, max_bytes=0), ValueError, "got 0", "whole number of at least 1"),
    Case(_STORE, "a file for a folder", lambda world: world.model.open_scene_store(world.video, max_bytes=9), NotADirectoryError, "got the file", "must be a folder of scenes"),
    Case(_STORE, "no such video", store(lambda world, found: found.encode(world.processor, "no.mp4")), FileNotFoundError, "There is no video at no.mp4", "Check the path"),
    Case(_STORE, "geometry that is none", store(lambda world, found: found.encode(world.processor, world.video, geometry=world.folder)), FileNotFoundError, "has no geometry.json", "must be the folder of a saved scene"),
    Case(_STORE, "a key that leaves the folder", store(lambda world, found: found.put("../a", world.scene)), ValueError, "got '../a'", "must be letters, digits and dashes"),
    Case(_STORE, "a scene that is none", store(lambda world, found: found.put("a", None)), TypeError, "got NoneType", "must be a SceneEncoding"),
    Case(_STORE, "a scene beyond `max_bytes`", store(lambda world, found: found.put("a", world.scene), max_bytes=10), ValueError, "got 10", "Raise it"),
    Case(_VGGT, "`image_size` of 13", lambda world: VggtImageProcessor(image_size=13)([PICTURE]), ValueError, "13", "multiple of"),
    Case(_CONFIG, "a number for a part", config(GeodeConfig, text_config=3), StrictDataclassError, "with value 3", "doesn't match any type"),
    Case(_CONFIG, "a ratio of 0", config(GeodeConfig, downsample_ratio=0.0), StrictDataclassError, "got 0.0", "must lie in (0, 1]"),
    Case(_CONFIG, "a negative token", config(GeodeConfig, image_token_id=-1), StrictDataclassError, "got -1", "must not be negative"),
    Case(_CONFIG, "a control token without a codec", config(GeodeConfig, control_tokens={"<REG>": {}}), StrictDataclassError, "lacks ['codec', 'dim', 'kind', 'token_id']", "`control_tokens['<REG>']`"),
    Case(_CONFIG, "a codec with a deviation of 0", config(GeodeConfig, control_tokens={"<REG>": TOKEN}), StrictDataclassError, "'std': [0.0]", "positive stds"),
    Case(_CONFIG, "a width that heads do not divide", config(GeodeDrmConfig, num_attention_heads=7), StrictDataclassError, "got 1024 and 7", "must be divisible by"),
    Case(_CONFIG, "0 heads", config(VggtConfig, num_attention_heads=0), StrictDataclassError, "and 0", "must be divisible by"),
    Case(_CONFIG, "a field misspelt", config(GeodeDrmConfig, hidden_sise=3), ValueError, "no field `hidden_sise`", "Did you mean `hidden_size`"),
    Case(_CONFIG, "an unknown choice", config(GeodeDrhConfig, loss="x"), StrictDataclassError, "got 'x'", "must be one of ('l2'"),
    Case(_CONFIG, "a weight of NaN", config(GeodeDrhConfig, loss_weight=float("nan")), StrictDataclassError, "got nan", "must not be negative"),
    Case(_CONFIG, "lists of several lengths", config(SonataConfig, enc_channels=[1]), StrictDataclassError, "got [1]", "needs 5 entries for 5 stages"),
    Case("`geode`", "no such command", command("foo"), ExitCode2, "invalid choice: 'foo'", "choose from"),
    Case("`geode ask`", "no such video", command("ask", "no.mp4", "a"), ExitCode2, "'no.mp4'", "`video` must be a file"),
    Case("`geode ask`", "no such geometry", command("ask", "VIDEO", "a", "--geometry", "no"), ExitCode2, "'no'", "`geometry` must be a folder"),
    Case("`geode ask`", "a folder without a checkpoint", command("ask", "VIDEO", "a", "--model", "FOLDER"), ExitCode2, "holds no config.json", "must be a checkpoint's folder"),
    Case("`geode ask`", "`--num-frames` in words", command("ask", "VIDEO", "a", "--num-frames", "x"), ExitCode2, "invalid int value: 'x'", "--num-frames"),
    Case("`geode ask`", "`config.json` of garbage", damaged("config.json", GARBAGE), ExitCode2, "UnicodeDecodeError", "Write it again"),
    Case("`geode ask`", "`config.json` of 100,000 brackets", damaged("config.json", DEEP), ExitCode2, "RecursionError", "must be JSON"),
    Case("`geode ask`", "`tokenizer.json` that is a list", damaged("tokenizer.json", b"[]"), ExitCode2, "tokenizer.json", "must hold a JSON object"),
    Case("`geode demo`", "`--port` without a page", command("demo", "--port", "1"), ExitCode2, "got 1 without `--ui`", "Add `--ui`"),
    Case("`geode reconstruct`", "no such video", command("reconstruct", "no.mp4", "-o", "new"), ExitCode2, "geode: error:", "no.mp4"),
    Case("`geode export`", "a folder that is not empty", written("x/a", "a", "export", "FOLDER"), ExitCode2, "is not", "must be new or empty"),
    Case("`geode licences`", "no checkpoint", command("licences", "./no"), ExitCode2, "geode: error:", "no"),
    Case("`geode train`", "no such recipe", command("train", "stage2", "--config", "no.yaml"), ExitCode2, "'no.yaml'", "must name a recipe"),
    Case("`geode train`", "a recipe that is a list", written("r.yaml", "[1]", "train", "stage1", "--config", "FILE"), ExitCode2, "got [1]", "must be a mapping of options"),
    Case("`geode plan`", "no such recipe", command("plan", "no.yaml"), ExitCode2, "no.yaml", "geode: error:"),
    Case("`geode eval`", "neither folder nor id", command("eval", "--benchmark", "./no", "--out", "FOLDER"), ExitCode2, "'./no'", "must be a file, a folder or an id on the Hub"),
    Case("`geode eval`", "a benchmark of garbage", written("b.jsonl", GARBAGE, "eval", "--benchmark", "FILE", "--out", "o"), ExitCode2, "cannot be read", "Fetch it again"),
    Case("`geode eval`", "results that are none", command("eval", "--rescore", "FOLDER"), ExitCode2, "must hold predictions.jsonl", "Run `geode eval"),
    Case("`geode calibrate`", "results that are none", command("calibrate", "FOLDER", "--model", "FOLDER", "--out", "c"), ExitCode2, "must hold predictions.jsonl", "Run `geode eval"),
    Case("`geode data rooms`", "0 rooms", command("data", "rooms", "--out", "FOLDER", "--scenes", "0"), ExitCode2, "got 0", "at least"),
    Case("`geode data check`", "no such mixture", command("data", "check", "no"), ExitCode2, "There is no mixture at no", "Give a YAML file"),
    Case("`geode assemble`", "overrides that are no JSON", command("assemble", "new", "--model-overrides", "{"), ExitCode2, "got '{'", "must be an object in JSON"),
    Case("`geode check`", "no folder", command("check", "./no"), ExitCode2, "geode: error:", "no"),
    Case("`geode precompute`", "no such model", command("precompute", "--model", "./no", "--videos", "FOLDER", "--out", "o"), ExitCode2, "geode: error:", "no"),
)  # fmt: skip

__all__ = ["CASES"]
