# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints from public parts. The parts are made up, in the exact form of the public ones: see `common_parts.py`.

What is assembled must compute what transformers' own class, or our converter, computes from the same made-up weights.
"""

import contextlib
import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import InternVLVisionConfig, InternVLVisionModel, Qwen2Config, Qwen2ForCausalLM

import geode
from geode.assemble import Assembly
from geode.assembly_plan import make_tensor
from geode.cli import main
from geode.configuration.configuration_geode import GeodeConfig
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.modeling_geode.sonata_geode import convert_sonata_checkpoint
from geode.part_files import TensorReader, find_part
from tests.modeling_geode.common_hub import COMMIT, put_in_hub_cache, run_stranger

from .common_parts import (
    FIXTURES,
    INTERNVL_TOKENS,
    SMALL_DRM,
    TEXT,
    TINY_TEXT,
    TINY_VISION,
    VISION,
    make_geometry,
    make_internvl,
    make_qwen,
    make_tokenizer,
    make_vision,
    opengvlab_vision,
    public_vision_config,
    randomise,
    write_empty,
)


NEW_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<spatio>", "<REG>", "<3DBBOX>"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> dict:
    """One layer of each kind at the public width, assembled from OpenGVLab's form, and the models that the parts were made from."""
    folder = tmp_path_factory.mktemp("wide")
    made = {"qwen": make_qwen(folder / "qwen"), "vision": make_vision(folder / "vision")}
    points, reconstructor = make_geometry(folder)
    sources = {
        "vision": str(folder / "vision" / "public"),
        "language_model": str(folder / "qwen"),
        "points": points,
        "reconstructor": reconstructor,
    }
    Assembly(**sources, model_overrides=SMALL_DRM).write(folder / "out", max_shard_size="100MB", show_progress=False)
    model = GeodeForConditionalGeneration.from_pretrained(folder / "out").eval()
    return {**made, "sources": sources, "folder": folder / "out", "model": model}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """Small parts in the public form, for what depends on no width, and the folder that the command makes of them."""
    folder = tmp_path_factory.mktemp("small")
    make_qwen(folder / "qwen", sizes=TINY_TEXT)
    make_vision(folder / "vision", sizes=TINY_VISION)
    points, reconstructor = make_geometry(folder)
    sources = {
        "vision": str(folder / "vision" / "public"),
        "language_model": str(folder / "qwen"),
        "points": points,
        "reconstructor": reconstructor,
    }
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        assert main(["assemble", str(folder / "made" / "out"), *arguments_of(sources)]) == 0
    return {
        "sources": sources,
        "folder": folder / "made" / "out",
        "output": output.getvalue(),
        "errors": errors.getvalue(),
    }


@pytest.fixture
def tiny(small, tmp_path) -> dict[str, str]:
    """A copy of the small parts, which a test may change."""
    copies = {}
    for part, source in small["sources"].items():
        path = Path(source)
        if path.is_dir():
            copies[part] = str(shutil.copytree(path, tmp_path / "parts" / path.name))
        else:
            copies[part] = str(shutil.copytree(path.parent, tmp_path / "parts" / path.parent.name) / path.name)
    return copies


def assemble(folder: Path, sources: dict, **options) -> GeodeForConditionalGeneration:
    Assembly(**sources, **{"model_overrides": SMALL_DRM, **options}).write(folder, show_progress=False)
    return GeodeForConditionalGeneration.from_pretrained(folder).eval()


def tensors_of(assembly: Assembly, prefix: str) -> dict[str, torch.Tensor]:
    """What would be written under some names."""
    with TensorReader() as reader:
        steps = [step for step in assembly.plan.steps if step.name.startswith(prefix)]
        return {step.name: make_tensor(step, reader, assembly.vocabulary, {}) for step in steps}


def arguments_of(sources: dict) -> list[str]:
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in sources.items()]
    return [*(word for pair in pairs for word in pair), "--model-overrides", json.dumps(SMALL_DRM)]


def assert_same_state(got: torch.nn.Module, want: torch.nn.Module) -> None:
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


# ---- the parts compute what they computed ----


def test_vision_tower_in_the_public_form_computes_the_same(wide):
    pixels = torch.randn(2, 3, 448, 448, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        got = wide["model"].model.vision_tower(pixels).last_hidden_state
        want = wide["vision"](pixels).last_hidden_state
    assert torch.equal(got, want)


def test_language_model_computes_the_same_where_no_token_is_new(wide):
    ids = torch.randint(0, 322, (2, 9), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        got, want = wide["model"](input_ids=ids).logits, wide["qwen"](input_ids=ids).logits
    assert torch.equal(got[..., :322], want[..., :322])
    assert torch.equal(got[..., 328:], want[..., 328:])


def test_rows_of_new_tokens_are_the_mean_of_the_known_ones(wide):
    processor = GeodeProcessor.from_pretrained(wide["folder"])
    ids = processor.tokenizer.convert_tokens_to_ids(NEW_TOKENS)
    assert ids == list(range(322, 328))  # 256 bytes, 44 words and 22 special tokens come first
    old, new = wide["qwen"].model.embed_tokens.weight, wide["model"].get_input_embeddings().weight
    torch.testing.assert_close(new[322:328], old[:322].mean(dim=0).expand(6, -1), rtol=1e-5, atol=1e-7)
    assert torch.equal(new[322], new[327])
    assert torch.equal(new[328:], old[328:])
    assert torch.equal(new[:322], old[:322])
    assert wide["model"].lm_head.weight is new


def test_point_encoder_and_reconstructor_are_those_of_the_converters(wide):
    base = wide["model"].model
    assert_same_state(base.point_encoder, convert_sonata_checkpoint(wide["sources"]["points"]))
    assert_same_state(base.reconstructor, geode.convert_vggt_checkpoint(wide["sources"]["reconstructor"]))
    assert base.point_encoder.config.enc_patch_size == [32, 32, 16, 16, 8]  # not the default


def test_vision_tower_in_the_form_of_transformers_gives_the_same_tensors(wide):
    public = Path(wide["sources"]["vision"])
    assembly = Assembly(**{**wide["sources"], "vision": str(public.with_name("own"))}, model_overrides=SMALL_DRM)
    want = wide["model"].model.vision_tower.state_dict()
    got = tensors_of(assembly, "model.vision_tower.")
    assert got.keys() == {f"model.vision_tower.{name}" for name in want}
    assert all(torch.equal(got[f"model.vision_tower.{name}"], want[name]) for name in want)
    configs = [config.vision_config.to_dict() for config in (assembly.config, wide["model"].config)]
    assert {**configs[0], "dtype": None} == {**configs[1], "dtype": None}


def test_new_parts_are_those_of_a_new_model(small):
    got = load_file(small["folder"] / "model.safetensors")
    want = GeodeForConditionalGeneration(GeodeConfig.from_pretrained(small["folder"])).state_dict()
    names = [name for name in want if name.startswith(("model.drm.", "drh.", "model.multi_modal_projector."))]
    assert len(names) == 76
    for name in names:
        if want[name].unique().numel() == 1 or name.endswith("A_log"):  # what is not random
            assert torch.equal(got[name], want[name]), name
        elif want[name].numel() > 200:
            torch.testing.assert_close(got[name].std(), want[name].std(), rtol=0.3, atol=0, msg=name)
        else:
            assert not torch.equal(got[name], torch.zeros_like(got[name])), name


def test_seed_decides_the_new_parts_and_nothing_else(small, tmp_path):
    state = torch.random.get_rng_state()
    Assembly(**small["sources"], model_overrides=SMALL_DRM, seed=1).write(tmp_path / "other", show_progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    # That the same seed gives the same bytes is seen where the parts come from the Hub.
    first, other = (load_file(folder / "model.safetensors") for folder in (small["folder"], tmp_path / "other"))
    differing = {name for name in first if not torch.equal(first[name], other[name])}
    assert differing
    assert all(name.startswith(("model.drm.", "drh.", "model.multi_modal_projector.")) for name in differing)


# ---- InternVL ----


@pytest.mark.parametrize(
    ("form", "is_tied", "widths"),
    [
        pytest.param("own", False, (VISION, TEXT), marks=pytest.mark.slow),
        ("own", False, (TINY_VISION, TINY_TEXT)),
        ("flat", True, (TINY_VISION, TINY_TEXT)),
        ("public", False, (TINY_VISION, TINY_TEXT)),
    ],
)
def test_internvl_answers_as_before(form, is_tied, widths, tmp_path):
    original = make_internvl(tmp_path / "internvl", vision=widths[0], text=widths[1], is_tied=is_tied)
    points, _ = make_geometry(tmp_path)
    sources = {"init_from": str(tmp_path / "internvl" / form), "points": points, "reconstructor": None}
    model = assemble(tmp_path / "out", sources)
    tokenizer = GeodeProcessor.from_pretrained(tmp_path / "out").tokenizer
    image, side = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), widths[0]["image_size"]
    ids = torch.tensor([[5, 17, *[image] * model.config.image_seq_length, 9, 300, 42]])
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        want = original(input_ids=ids, pixel_values=pixels).logits
        got = model(input_ids=ids, pixel_values=pixels, mm_token_type_ids=(ids == image).long()).logits
    known = len(make_tokenizer(extra=INTERNVL_TOKENS))
    assert got.shape[-1] == known + 3  # <spatio>, <REG> and <3DBBOX> are the only ones that it has not
    torch.testing.assert_close(got[..., :known], want, rtol=0, atol=2e-5)
    assert model.config.tie_word_embeddings is is_tied
    heads = (model.lm_head.weight, original.lm_head.weight)
    torch.testing.assert_close(heads[0][known:], heads[1].mean(dim=0).expand(3, -1), rtol=1e-5, atol=1e-6)


def test_output_layer_that_equals_the_embedding_is_skipped_and_one_that_differs_is_kept(tiny):
    path = Path(tiny["language_model"]) / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, path, metadata={"format": "pt"})
    plan = Assembly(**tiny).plan
    assert [(found.source.key, found.reason) for found in plan.skipped] == [
        ("lm_head.weight", "equal to the embedding")
    ]
    assert "lm_head.weight" not in {step.name for step in plan.steps}
    # The configuration says that they are tied. The weights, which say otherwise, are what it was trained with.
    state["lm_head.weight"][3, 5] += 1
    save_file(state, path, metadata={"format": "pt"})
    assembly = Assembly(**tiny)
    assert not assembly.config.tie_word_embeddings
    assert not assembly.config.text_config.tie_word_embeddings
    assert torch.equal(tensors_of(assembly, "lm_head.")["lm_head.weight"][:322], state["lm_head.weight"][:322])
    assert assembly.plan.skipped == ()


def test_output_layer_that_the_configuration_names_and_the_file_lacks_is_missing(tiny):
    configure(tiny["language_model"], tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"qwen lacks `lm_head.weight`"):
        Assembly(**tiny)


# ---- the public sizes ----


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> dict[str, str]:
    """All parts of geode-1.5b with every tensor of the public files, and no values: 9 GB that take no room."""
    folder = tmp_path_factory.mktemp("public")
    with torch.device("meta"):
        qwen = Qwen2ForCausalLM(
            Qwen2Config(
                **TEXT,
                num_hidden_layers=28,
                vocab_size=151936,
                max_position_embeddings=32768,
                tie_word_embeddings=True,
            )
        )
        vision = InternVLVisionModel(InternVLVisionConfig(**VISION, num_hidden_layers=24, attention_bias=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in qwen.state_dict().items() if name != "lm_head.weight"}
    write_empty(folder / "qwen" / "model.safetensors", shapes, "BF16")
    qwen.config.save_pretrained(folder / "qwen")
    make_tokenizer(num_words=151643).save_pretrained(folder / "qwen")
    shapes = {name: tuple(tensor.shape) for name, tensor in opengvlab_vision(vision.state_dict(), 24).items()}
    write_empty(folder / "vision" / "model.safetensors", shapes, "BF16")
    (folder / "vision" / "config.json").write_text(json.dumps(public_vision_config(VISION, 24)))
    published = json.loads((FIXTURES / "vggt" / "keys_vggt_1b.json").read_text())["shapes"]
    write_empty(
        folder / "vggt" / "model.safetensors", {name: tuple(shape) for name, shape in published.items()}, "F32"
    )
    (folder / "vggt" / "config.json").write_text('{"embed_dim": 1024, "img_size": 518, "patch_size": 14}')
    for name in ("sonata", "sonata_small"):
        published = json.loads((FIXTURES / "sonata" / f"keys_{name}.json").read_text())
        # One value stands for all of a tensor.
        state = {key: torch.zeros(1).expand(shape) for key, shape in published["keys"].items()}
        torch.save({"config": published["_config"], "state_dict": state}, folder / f"{name}.pth")
    return {
        "vision": str(folder / "vision"),
        "language_model": str(folder / "qwen"),
        "points": str(folder / "sonata.pth"),
        "reconstructor": str(folder / "vggt"),
    }


@pytest.fixture(scope="module")
def public_assembly(public) -> Assembly:
    return Assembly(**public)


def test_public_parts_are_geode_1_5b(public_assembly):
    assembly = public_assembly
    with torch.device("meta"):
        model = GeodeForConditionalGeneration(GeodeConfig())
    want = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert {step.name: step.shape for step in assembly.plan.steps} == want
    got, default = assembly.config.to_dict(), GeodeConfig().to_dict()
    for name in (
        "image_token_id",
        "rationale_token_id",
        "control_tokens",
        "drm_config",
        "drh_config",
        "downsample_ratio",
    ):
        clean = [
            {**value, "dtype": None} if name.endswith("_config") else value for value in (got[name], default[name])
        ]
        assert clean[0] == clean[1], name
    # The published order of the tokenizer and of the new tokens: the defaults of `GeodeConfig` are not made up.
    assert got["image_token_id"] == 151667
    assert assembly.vocabulary == (151936, 151665, tuple(range(151665, 151671)), 151936)
    assert len(assembly.plan.skipped) == 394
    table = assembly.plan.table()
    for line in (
        "vision_tower: 340 tensors read and 0 skipped of 340, 436 written, 608.0 MB",
        "language_model: 338 tensors read and 0 skipped of 338, 338 written, 3,087.4 MB",
        "point_encoder: 453 tensors read and 0 skipped of 453, 453 written, 433.8 MB",
        "reconstructor: 1403 tensors read and 394 skipped of 1797, 1499 written, 4,762.4 MB",
        "in all: 2802 tensors, 9.086 GB",
        "vocabulary: 151936 rows, 6 of them set to the mean of the 151665 known ones",
    ):
        assert line in table
    assert re.search(
        r"vision_tower +encoder\.layers\.\*\.attn\.qkv\.weight +\S+ +3072x1024 +bfloat16 +24 +split", table
    )
    assert re.search(r"reconstructor +track_head\.\* .* 394 +skipped: points are not tracked", table)


def test_lines_of_the_table_account_for_every_tensor(public_assembly):
    plan = public_assembly.plan
    lines = plan.table().split("\n\n")[0].splitlines()[1:]
    numbers = [re.search(r"  (\d+) +(?:mapped|split|new|skipped|zeros)", line) for line in lines]
    assert all(numbers)
    total = sum(int(number[1]) for number in numbers)
    assert total == 340 + 338 + 453 + 1797 + sum(step.action == "new" for step in plan.steps)


def test_small_sonata_and_no_reconstructor(public):
    small = public["points"].replace("sonata.pth", "sonata_small.pth")
    assembly = Assembly(**{**public, "points": small, "reconstructor": None})
    assert assembly.config.point_config.enc_channels == [32, 64, 128, 256, 512]
    assert assembly.config.reconstructor_config is None
    assert "point_encoder: 273 tensors read and 0 skipped of 273" in assembly.plan.table()
    assert assembly.make_processor().geometry_frame_size is None


def test_dry_run_prints_the_table_and_writes_nothing(capsys, small, tmp_path):
    assert main(["assemble", str(tmp_path / "out"), *arguments_of(small["sources"]), "--dry-run"]) == 0
    output = capsys.readouterr().out
    table = small["output"].split("\nassembled: ")[0]
    assert output.startswith(table)
    assert "in all: 632 tensors" in table
    assert f"not written (dry run): {tmp_path / 'out'}\n" in output
    assert list(tmp_path.iterdir()) == []


# ---- the folder ----


def test_command_writes_a_folder_that_loads_without_geode(small, tmp_path):
    assert small["output"].endswith(f"\nassembled: {small['folder']}\n")
    assert {"Hashing parts:", "Writing:"} <= set(re.findall(r"Hashing parts:|Writing:", small["errors"]))
    assert [path.name for path in small["folder"].parent.iterdir()] == ["out"]
    shutil.copytree(small["folder"], tmp_path / "out")
    script = """
import torch
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("out", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("out", trust_remote_code=True)
print(type(model).__name__, type(processor).__name__, processor.tokenizer.padding_side)
inputs = processor.apply_chat_template(
    [{"role": "user", "content": "word300"}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
print(model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] - inputs["input_ids"].shape[1])
"""
    assert run_stranger(script, cwd=tmp_path).split() == [
        "GeodeForConditionalGeneration",
        "GeodeProcessor",
        "left",
        "3",
    ]


def test_saving_what_was_loaded_changes_nothing(small, tmp_path):
    model = GeodeForConditionalGeneration.from_pretrained(small["folder"])
    model.save_pretrained(tmp_path / "again")
    first, again = (load_file(folder / "model.safetensors") for folder in (small["folder"], tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) and first[name].dtype == again[name].dtype for name in first)
    for name in ("config.json", "generation_config.json"):
        texts = [(folder / name).read_text() for folder in (small["folder"], tmp_path / "again")]
        assert json.loads(texts[0]) == json.loads(texts[1]), name
    # What is trained from it still says what it was made from.
    assert [part["name"] for part in model.config.parts] == [
        "vision_tower",
        "language_model",
        "point_encoder",
        "reconstructor",
    ]


def test_shards_in_bfloat16_are_what_loading_in_it_gives(small, tmp_path):
    assembly = Assembly(**small["sources"], model_overrides=SMALL_DRM, dtype="bfloat16")
    assembly.write(tmp_path / "half", max_shard_size="100KB", show_progress=False)
    want = GeodeForConditionalGeneration.from_pretrained(small["folder"], dtype=torch.bfloat16)
    got = GeodeForConditionalGeneration.from_pretrained(tmp_path / "half")
    assert_same_state(got, want)
    assert got.dtype == torch.bfloat16
    shards = {path.name: load_file(path) for path in sorted((tmp_path / "half").glob("*.safetensors"))}
    stored = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    types = want.state_dict()
    assert {name: tensor.dtype for name, tensor in stored.items()} == {name: types[name].dtype for name in stored}
    assert stored["drh.heads.REG.0.weight"].dtype == torch.float32
    index = json.loads((tmp_path / "half" / "model.safetensors.index.json").read_text())
    assert sum(map(len, shards.values())) == len(stored) == 632
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())


def test_each_part_keeps_its_type_by_default(tiny):
    path = Path(tiny["language_model"]) / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assembly = Assembly(**tiny)
    types = {(step.name.startswith("model.language_model."), step.dtype) for step in assembly.plan.steps}
    assert types == {(True, torch.bfloat16), (False, torch.float32)}
    assert assembly.config.dtype == assembly.config.vision_config.dtype == torch.bfloat16
    rows = tensors_of(assembly, "model.language_model.embed_tokens")["model.language_model.embed_tokens.weight"]
    old = load_file(path)["model.embed_tokens.weight"]
    torch.testing.assert_close(rows[325], old[:322].float().mean(dim=0).bfloat16(), rtol=1e-2, atol=1e-5)


def test_overrides_size_the_new_parts_and_add_control_tokens(tiny, tmp_path):
    point = {"dim": 3, "kind": "vector", "codec": {"transform": "identity", "mean": [0.0] * 3, "std": [1.0] * 3}}
    overrides = {
        "drm_config": {**SMALL_DRM["drm_config"], "num_rationale_tokens": 5},
        "control_tokens": {"<POINT>": point},
    }
    model = assemble(tmp_path / "out", tiny, model_overrides=overrides)
    processor = GeodeProcessor.from_pretrained(tmp_path / "out")
    assert model.model.drm.queries.shape == (5, 16)
    assert processor.num_rationale_tokens == 5
    token = processor.tokenizer.convert_tokens_to_ids("<POINT>")
    assert model.config.control_tokens == {"<POINT>": {**point, "token_id": token}}
    row = model.get_input_embeddings().weight[token]
    assert torch.equal(row, model.get_input_embeddings().weight[processor.rationale_token_id])
    with pytest.raises(ValueError, match=r"`GeodeDrmConfig`, got \['width'\]"):
        Assembly(**tiny, model_overrides={"drm_config": {"width": 3}})


def test_embedding_grows_where_the_vocabulary_has_no_spare_rows(tiny):
    shutil.rmtree(tiny["language_model"])
    qwen = make_qwen(Path(tiny["language_model"]), sizes=TINY_TEXT, rows=322)
    assembly = Assembly(**tiny)
    assert assembly.config.text_config.vocab_size == 328
    (rows,) = tensors_of(assembly, "model.language_model.embed_tokens").values()
    assert torch.equal(rows[:322], qwen.model.embed_tokens.weight)
    torch.testing.assert_close(rows[322:], rows[:322].mean(dim=0).expand(6, -1), rtol=1e-5, atol=1e-6)


# ---- the Hub ----


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch) -> dict[str, str]:
    """The small parts as downloads under their public names."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    names = {
        "vision": "OpenGVLab/InternViT-300M-448px-V2_5",
        "language_model": "Qwen/Qwen2.5-1.5B-Instruct",
        "reconstructor": "facebook/VGGT-1B",
        "points": "facebook/sonata",
    }
    (Path(tiny["language_model"]) / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for part, name in names.items():
        path = Path(tiny[part])
        put_in_hub_cache(path if path.is_dir() else path.parent, name, tmp_path / "hf")
    return {**names, "points": "facebook/sonata/sonata.pth"}


def test_parts_from_the_hub_are_the_default_and_their_facts_written(hub, small, tiny, tmp_path, capsys):
    assert main(["assemble", str(tmp_path / "out"), "--model-overrides", json.dumps(SMALL_DRM)]) == 0
    reason = "not for commercial use, because of point_encoder and reconstructor"
    assert f"\nlicence of the whole: cc-by-nc-4.0, {reason}\n" in capsys.readouterr().out
    weights = [folder / "model.safetensors" for folder in (tmp_path / "out", small["folder"])]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    facts = json.loads((tmp_path / "out" / "parts.json").read_text())
    found = {part["name"]: (part["source"], part["revision"], part["license"]) for part in facts["parts"]}
    assert found == {
        "vision_tower": (hub["vision"], COMMIT, "mit"),
        "language_model": (hub["language_model"], COMMIT, "apache-2.0"),
        "point_encoder": ("facebook/sonata", COMMIT, "cc-by-nc-4.0"),
        "reconstructor": (hub["reconstructor"], COMMIT, "cc-by-nc-4.0"),
    }
    assert (facts["license"], facts["is_commercial"]) == ("cc-by-nc-4.0", False)
    assert facts["new_tokens"] == NEW_TOKENS
    assert facts["new_parts"] == ["drh", "drm", "multi_modal_projector"]
    points, path = facts["parts"][2], Path(tiny["points"])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert points["files"] == {"sonata.pth": {"sha256": digest, "bytes": path.stat().st_size}}
    assert points["tensors"] == {"read": 129, "skipped": 0}
    # What the configuration says is the same, so that it stays with what is trained from the model.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["parts"] == [
        {key: value for key, value in part.items() if key != "tensors"} for part in facts["parts"]
    ]

    assert main(["licences", str(tmp_path / "out")]) == 0
    report = capsys.readouterr().out
    assert re.search(
        rf"language_model +Qwen/Qwen2.5-1.5B-Instruct@{COMMIT[:12]} +apache-2.0 +publisher +yes\n", report
    )
    assert re.search(rf"point_encoder +facebook/sonata@{COMMIT[:12]} +cc-by-nc-4.0 +publisher +no\n", report)
    assert report.endswith(f"\nthe whole: cc-by-nc-4.0, {reason}\n")


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_revision_of_the_hub_is_followed_to_its_commit(hub, revision):
    part = find_part(f"facebook/sonata/sonata.pth@{revision}")
    assert (part.name, part.revision, part.folder.name) == ("facebook/sonata", COMMIT, COMMIT)


@pytest.mark.parametrize(
    ("source", "fragments"),
    [
        ("facebook/sonata@v9", ["'facebook/sonata@v9' is neither here nor"]),
        ("facebook/none", ["'facebook/none' is neither here nor"]),
        ("facebook/sonata", ["'facebook/sonata' must hold one of model.safetensors", "'owner/repository/file.pth'"]),
        ("facebook/sonata/none.pth", ["'facebook/sonata' has no file 'none.pth'"]),
        ("./none", ["there is nothing at './none'", "relative to"]),
        ("a/b/c/d", ["there is nothing at 'a/b/c/d'"]),
    ],
)
def test_a_source_that_is_not_found_is_named(hub, source, fragments):
    with pytest.raises(FileNotFoundError) as caught:
        find_part(source)
    for fragment in fragments:
        assert fragment in str(caught.value)


# ---- what does not fit ----


def rewrite(source: str, change) -> None:
    path = Path(source) / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def configure(source: str, **settings) -> None:
    path = Path(source) / "config.json"
    config = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("part", "change", "fragments"),
    [
        (
            "vision",
            lambda s: s.pop("encoder.layers.0.attn.qkv.bias"),
            ["(problems: 1): public lacks `encoder.layers.0.attn.qkv.bias`"],
        ),
        (
            "vision",
            lambda s: s.update({"head.weight": torch.ones(2)}),
            ["public has `head.weight`, which is not expected"],
        ),
        (
            "vision",
            lambda s: s.update({"encoder.layers.0.attn.q_norm.weight": torch.ones(32)}),
            ["`encoder.layers.0.attn.q_norm.weight`, which is not expected"],
        ),
        (
            "vision",
            lambda s: s.update({"encoder.layers.0.attn.qkv.bias": torch.ones(95)}),
            ["`encoder.layers.0.attn.qkv.bias` of shape (95,), and (96,) is expected"],
        ),
        (
            "language_model",
            lambda s: s.update({"model.norm.weight": torch.ones(24, dtype=torch.int8)}),
            ["qwen has `model.norm.weight` of type I8, and F32, F16, BF16 are read"],
        ),
        (
            "language_model",
            lambda s: s.update({"model.norm.weight": torch.ones(24, dtype=torch.float64)}),
            ["`model.norm.weight` of type F64"],
        ),
        (
            "language_model",
            lambda s: s.update({"model.embed_tokens.weight": torch.ones(335, 24)}),
            ["`model.embed_tokens.weight` of shape (335, 24), and (336, 24) is expected"],
        ),
        (
            "reconstructor",
            lambda s: s.pop("camera_head.trunk_norm.bias"),
            ["vggt lacks `camera_head.trunk_norm.bias`"],
        ),
        (
            "reconstructor",
            lambda s: s.update({"track_tail.bias": torch.ones(2)}),
            ["vggt has `track_tail.bias`, which is not expected"],
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_written(capsys, tiny, tmp_path, part, change, fragments):
    rewrite(tiny[part], change)
    assert main(["assemble", str(tmp_path / "out"), *arguments_of(tiny)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for fragment in ["Nothing was written", *fragments]:
        assert fragment in captured.err
    assert not list(tmp_path.glob("*out*"))


def test_norms_of_queries_and_keys_are_taken_where_the_configuration_has_them(tiny):
    config = InternVLVisionConfig(
        **TINY_VISION, num_hidden_layers=1, attention_bias=False, use_qk_norm=True, norm_type="rms_norm"
    )
    own = randomise(InternVLVisionModel(config)).state_dict()
    layer = "encoder.layer.0."
    # The form of the 6B model: no bias of q, k and v, and norms without one.
    lacking = {f"{layer}attention.{third}_proj.bias": torch.zeros(32) for third in "qkv"}
    lacking |= {f"{layer}layernorm_{place}.bias": torch.zeros(32) for place in ("before", "after")}
    state = opengvlab_vision({**own, **lacking}, 1)
    for name in ("attn.qkv.bias", "norm1.bias", "norm2.bias"):
        del state[f"encoder.layers.0.{name}"]
    for norm in ("q_norm", "k_norm"):
        state[f"encoder.layers.0.attn.{norm}.weight"] = own[f"{layer}attention.{norm}.weight"]
    save_file(state, Path(tiny["vision"]) / "model.safetensors", metadata={"format": "pt"})
    configure(tiny["vision"], qkv_bias=False, qk_normalization=True, norm_type="rms_norm")
    got = tensors_of(Assembly(**tiny), "model.vision_tower.")
    assert got.keys() == {f"model.vision_tower.{name}" for name in own}
    assert all(torch.equal(got[f"model.vision_tower.{name}"], own[name]) for name in own)


def test_a_tensor_of_sonata_that_does_not_fit_is_named(tiny):
    content = torch.load(tiny["points"], weights_only=True)
    del content["state_dict"]["embedding.stem.norm.bias"]
    content["state_dict"]["enc.enc0.block0.cpe.0.bias"] = torch.ones(17)
    torch.save(content, tiny["points"])
    with pytest.raises(
        ValueError, match=r"problems: 2\): sonata.pth lacks `embedding.stem.norm.bias`; .*\(17,\), and \(16,\)"
    ):
        Assembly(**tiny)


def test_absent_mask_tokens_are_no_mistake(tiny):
    rewrite(tiny["reconstructor"], lambda state: state.pop("aggregator.patch_embed.mask_token"))
    content = torch.load(tiny["points"], weights_only=True)
    del content["state_dict"]["embedding.mask_token"]
    torch.save(content, tiny["points"])
    assembly = Assembly(**tiny)
    assert assembly.config.point_config.mask_token is False
    (mask,) = tensors_of(assembly, "model.reconstructor.trunk.embeddings.mask_token").values()
    assert torch.equal(mask, torch.zeros(1, 32))
    assert re.search(r"mask_token .* 1 +zeros: for pre-training only", assembly.plan.table())


@pytest.mark.parametrize(
    ("part", "settings", "fragments"),
    [
        ("vision", {"qkv_bias": None, "norm_type": None}, ["must state ['norm_type', 'qkv_bias']"]),
        ("vision", {"num_hidden_layers": 2}, ["lacks `encoder.layers.1.ls1`"]),
        ("vision", {"qk_normalization": True}, ["lacks `encoder.layers.0.attn.q_norm.weight`"]),
        ("vision", {"model_type": "siglip"}, ["must be an InternViT", "'siglip'"]),
        ("language_model", {"model_type": "newer"}, ["architecture that transformers has", "'newer'"]),
        ("language_model", {"quantization_config": {"bits": 4}}, ["'qwen' is quantised"]),
        ("vision", {"hidden_size": "wide"}, ["do not make a GEODE model"]),
        ("language_model", {"hidden_size": "wide"}, ["does not describe a model of type 'qwen2'"]),
        ("language_model", {"vocab_size": 300}, ["has 322 tokens, and its model 300 rows"]),
        ("reconstructor", {"model_type": "geode_vggt"}, ["publisher's form", "'geode_vggt'"]),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(capsys, tiny, tmp_path, part, settings, fragments):
    configure(tiny[part], **settings)
    assert main(["assemble", str(tmp_path / "out"), *arguments_of(tiny)]) == 2
    error = capsys.readouterr().err
    for fragment in fragments:
        assert fragment in error
    assert not list(tmp_path.glob("*out*"))


def test_options_that_exclude_each_other(capsys, tiny, tmp_path):
    assert main(["assemble", str(tmp_path / "out"), *arguments_of(tiny), "--init-from", "a/b"]) == 2
    assert "`init_from` 'a/b' holds vision tower and language model" in capsys.readouterr().err
    assert main(["assemble", str(tmp_path / "out"), "--model-overrides", "{"]) == 2
    assert "`--model-overrides` must be an object in JSON, got '{'" in capsys.readouterr().err
    assert main(["assemble", str(tmp_path / "out"), "--model-overrides", "[1]"]) == 2
    assert "`model_overrides` must be a mapping" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_refused_first(capsys, tmp_path):
    (tmp_path / "notes.txt").touch()
    assert main(["assemble", str(tmp_path), "--vision", "no/such"]) == 2
    assert "`directory` must be new or empty" in capsys.readouterr().err


def test_a_file_of_sonata_with_code_in_it_is_refused_and_not_run(tiny, tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    content = torch.load(tiny["points"], weights_only=True)
    torch.save({**content, "extra": Payload()}, tiny["points"])
    with pytest.raises(ValueError, match=r"sonata.pth' .* cannot be read as weights"):
        Assembly(**tiny)
    assert not (tmp_path / "ran").exists()


def test_shards_must_be_those_of_their_index(tiny):
    folder = Path(tiny["language_model"])
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    halves = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, part in halves.items():
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    weight_map = {name: file for file, part in halves.items() for name in part}

    def find(mapping):
        index.write_text(json.dumps({"weight_map": mapping}))
        return find_part(str(folder))

    assert find(weight_map).tensors.keys() == state.keys()
    with pytest.raises(ValueError, match=rf"disagree about 1 tensors, such as `{names[0]}`"):
        find({**weight_map, names[0]: "b.safetensors"})
    with pytest.raises(ValueError, match=rf"disagree about 1 tensors, such as `{names[-1]}`"):
        find({name: file for name, file in weight_map.items() if name != names[-1]})
    with pytest.raises(FileNotFoundError, match=r"names \['c.safetensors'\], not found"):
        find({**weight_map, names[0]: "c.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"names \['../a.safetensors'\], not found"):
        find({**weight_map, names[0]: "../a.safetensors"})
    save_file({**{name: state[name] for name in names[7:]}, names[0]: state[names[0]]}, folder / "b.safetensors")
    with pytest.raises(ValueError, match=rf"'qwen' holds `{names[0]}` twice, in a.safetensors and b.safetensors"):
        find(weight_map)


def test_a_failure_on_the_way_leaves_nothing(tiny, tmp_path):
    assembly = Assembly(**tiny, model_overrides=SMALL_DRM)
    path = Path(tiny["reconstructor"]) / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"model\.safetensors .* is damaged or incomplete"):
        assembly.write(tmp_path / "out", max_shard_size="1MB", show_progress=False)
    assert not list(tmp_path.glob("*out*"))
