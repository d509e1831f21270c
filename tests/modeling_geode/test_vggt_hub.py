# SPDX-License-Identifier: Apache-2.0
"""
Tests of VGGT as a model of its own: saved, loaded and converted, from files, folders and the Hub's cache.

`tests/fixtures/vggt` holds a tiny random model in the public form; `keys_vggt_1b.json` names the tensors of VGGT-1B.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

import geode
from geode.configuration.configuration_geode import SonataConfig, VggtConfig
from geode.modeling_geode import hub_geode, vggt_conversion_geode
from geode.modeling_geode.hub_geode import CodeOnHubMixin
from geode.modeling_geode.sonata_geode import SonataModel
from geode.modeling_geode.vggt_geode import VggtModel, convert_vggt_checkpoint
from geode.modeling_geode.vggt_processing_geode import VggtImageProcessor
from tests.modeling_geode.common_hub import COMMIT, put_in_hub_cache, run_stranger


FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "vggt"
SIZES = json.loads((FIXTURES / "config.json").read_text())["model"]
CODE = {
    "checked_files_geode.py",
    "configuration_geode.py",
    "hub_geode.py",
    "shown_geode.py",
    "vggt_conversion_geode.py",
    "vggt_geode.py",
    "vggt_processing_geode.py",
    "video_processing_geode.py",
}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "model.safetensors")


@pytest.fixture
def model(state) -> VggtModel:
    return convert_vggt_checkpoint(state, SIZES)


@pytest.fixture
def public_folder(tmp_path) -> Path:
    """The tiny model as a folder in the public form, with its sizes under the public names."""
    folder = tmp_path / "public"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((FIXTURES / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps(SIZES))
    return folder


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub, in which the offline libraries look."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    return tmp_path / "hf"


def assert_same_weights(got: VggtModel, want: VggtModel) -> None:
    got_state, want_state = got.state_dict(), want.state_dict()
    assert got_state.keys() == want_state.keys()
    assert [name for name, tensor in want_state.items() if not torch.equal(got_state[name], tensor)] == []


# ------------------------------------------------------------------------------------------------- our form


STRANGER = """
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel

frames_path, results_path, resaved, *sources = sys.argv[1:]
torch.set_num_threads(1)
frames = torch.load(frames_path, weights_only=True)
results = []


def reconstruct(source):
    processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=True)
    model = AutoModel.from_pretrained(source, trust_remote_code=True).eval()
    assert type(AutoConfig.from_pretrained(source, trust_remote_code=True)).__name__ == "VggtConfig"
    inputs = processor(frames)
    with torch.no_grad():
        output = model(inputs["pixel_values"][None])
    results.append(
        {
            "classes": [type(part).__name__ for part in (model, processor)],
            "modules": [type(part).__module__ for part in (model, processor)],
            "inputs": dict(inputs),
            "outputs": {name: output[name] for name in ("pose_encoding", "depth", "world_points", "intrinsics")},
        }
    )
    return model, processor


for source in sources:
    model, processor = reconstruct(source)
model.save_pretrained(resaved)
processor.save_pretrained(resaved)
reconstruct(resaved)
torch.save(results, results_path)
"""


def test_saved_folder_reconstructs_alike_where_geode_is_absent(model, tmp_path):
    folder = tmp_path / "vggt-tiny"
    model.save_pretrained(folder)
    VggtImageProcessor("pad", image_size=56).save_pretrained(folder)
    put_in_hub_cache(folder, "org/vggt-tiny", tmp_path / "hf")
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 3, 40, 60), generator=generator, dtype=torch.uint8)
    torch.save(frames, tmp_path / "frames.pt")
    # Loaded as well: where a tensor lies in memory decides how it is summed, to the last bit.
    inputs = VggtImageProcessor.from_pretrained(folder)(frames)
    with torch.no_grad():
        output = VggtModel.from_pretrained(folder)(inputs["pixel_values"][None])

    files = (tmp_path / name for name in ("frames.pt", "results.pt", "resaved"))
    assert run_stranger(STRANGER, *files, folder, "org/vggt-tiny", cwd=tmp_path) == ""

    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert len(results) == 3
    for result in results:
        assert result["classes"] == ["VggtModel", "VggtImageProcessor"]
        assert [name.split(".")[0] for name in result["modules"]] == ["transformers_modules"] * 2
        assert result["inputs"].keys() == inputs.keys()
        assert [name for name in inputs if not torch.equal(inputs[name], result["inputs"][name])] == []
        assert [name for name, value in result["outputs"].items() if not torch.equal(output[name], value)] == []
    saved, resaved = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("vggt-tiny", "resaved"))
    assert resaved == saved
    assert set(saved) == CODE | {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_saving_twice_writes_the_same_bytes(model, tmp_path):
    model.save_pretrained(tmp_path / "first")
    VggtModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert first == second


def test_processor_alone_carries_its_code(tmp_path):
    (written,) = VggtImageProcessor(image_size=56).save_pretrained(tmp_path)
    assert Path(written).name == "preprocessor_config.json"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "preprocessor_config.json",
        "checked_files_geode.py",
        "hub_geode.py",
        "shown_geode.py",
        "vggt_processing_geode.py",
        "video_processing_geode.py",
    }
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == {
        "auto_map": {"AutoImageProcessor": "vggt_processing_geode.VggtImageProcessor"},
        "image_processor_type": "VggtImageProcessor",
        "image_size": 56,
        "mode": "crop",
        "patch_size": 14,
    }


@pytest.mark.parametrize("part", ["depth_head.norm.bias", "trunk.encoder.layer.0.attention.k_proj.weight"])
def test_a_missing_tensor_is_refused_by_name_and_listed_on_request(model, tmp_path, part):
    weights = model.state_dict()
    del weights[part]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=f"lacks 1 tensors of VggtModel: {re.escape(part)}\\. They would be random"):
        VggtModel.from_pretrained(tmp_path)
    _, info = VggtModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {part}


def test_sonata_is_saved_with_its_code_and_refuses_a_missing_tensor(tmp_path):
    torch.manual_seed(0)
    sizes = {"enc_depths": [1, 1], "enc_channels": [12, 24], "enc_num_head": [2, 4], "enc_patch_size": [8, 8]}
    model = SonataModel(SonataConfig(stride=[2], **sizes))
    weights = model.state_dict()
    del weights["stages.1.pooling.norm.bias"]
    model.save_pretrained(tmp_path, state_dict=weights)
    assert {"sonata_geode.py", "serialization_geode.py", "hub_geode.py"} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"lacks 1 tensors of SonataModel: stages\.1\.pooling\.norm\.bias"):
        SonataModel.from_pretrained(tmp_path)


def test_published_weights_are_sent_to_their_converter(public_folder, tmp_path):
    with pytest.raises(ValueError, match=r"needs a `model_type` .*public.* has none.*`convert_vggt_checkpoint`"):
        VggtModel.from_pretrained(public_folder)
    with pytest.raises(ValueError, match="`convert_sonata_checkpoint`"):
        SonataModel.from_pretrained(public_folder)


def test_published_weights_on_the_hub_are_told_by_the_revision_that_is_asked_for(public_folder, hub_cache):
    put_in_hub_cache(public_folder, "org/public", hub_cache)
    # Only the commit is there, and no branch.
    (hub_cache / "hub" / "models--org--public" / "refs" / "main").unlink()
    with pytest.raises(ValueError, match="'org/public' has none"):
        VggtModel.from_pretrained("org/public", revision=COMMIT)


def test_code_is_there_when_an_upload_begins(tmp_path):
    """The Hub is switched off here, so that the upload ends where it begins; `tests/hub_cards/test_push.py` makes whole ones."""
    super(CodeOnHubMixin, VggtImageProcessor()).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    with pytest.raises(OfflineModeIsEnabled):
        VggtImageProcessor()._upload_modified_files(tmp_path, "org/vggt", files_timestamps={})
    assert (tmp_path / "vggt_processing_geode.py").is_file()
    assert "auto_map" in (tmp_path / "preprocessor_config.json").read_text()


def test_code_of_remote_classes_is_left_to_transformers(tmp_path):
    remote = type("Remote", (), {"__module__": "transformers_modules.org.model"})()
    hub_geode.save_code(remote, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_auto_classes_load_the_folder_without_a_question(model, tmp_path, capsys, monkeypatch):
    warned = []
    monkeypatch.setattr("transformers.models.auto.image_processing_auto.logger.warning_once", warned.append)
    model.save_pretrained(tmp_path)
    VggtImageProcessor("pad", image_size=56).save_pretrained(tmp_path)
    geode.register_auto_classes()
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is VggtModel
    assert_same_weights(loaded, model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is VggtConfig
    assert type(AutoConfig.for_model("geode_sonata")) is SonataConfig
    processor = AutoImageProcessor.from_pretrained(tmp_path, image_size=28)
    assert type(processor) is VggtImageProcessor
    assert (processor.mode, processor.image_size) == ("pad", 28)
    # Installed code goes before the folder's, also for those who trust it.
    assert type(AutoModel.from_pretrained(tmp_path, trust_remote_code=True)) is VggtModel
    assert "custom code" not in capsys.readouterr().out
    # Such as that a backend is missing.
    assert warned == []


def test_package_offers_the_processor_and_the_converter():
    assert geode.VggtImageProcessor is VggtImageProcessor
    assert geode.convert_vggt_checkpoint is convert_vggt_checkpoint


# ---------------------------------------------------------------------------------------------- public form


def shard(folder: Path) -> None:
    """Put the weights of a folder in two files, with the index that transformers writes."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "model.pt")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("change", [lambda folder: None, shard, pickled], ids=["safetensors", "shards", "pt"])
def test_folders_and_hub_names_convert_alike(public_folder, hub_cache, model, change):
    change(public_folder)
    assert_same_weights(convert_vggt_checkpoint(str(public_folder)), model)
    put_in_hub_cache(public_folder, "org/vggt", hub_cache)
    assert_same_weights(convert_vggt_checkpoint("org/vggt"), model)
    (hub_cache / "hub" / "models--org--vggt" / "refs" / "main").unlink()
    assert_same_weights(convert_vggt_checkpoint("org/vggt", revision=COMMIT), model)


def test_safetensors_go_before_pickled_weights(public_folder, model):
    torch.save({}, public_folder / "model.pt")
    assert_same_weights(convert_vggt_checkpoint(public_folder), model)


def test_a_given_config_goes_before_that_of_the_folder(public_folder):
    other = convert_vggt_checkpoint(public_folder, SIZES | {"rope_freq": 50})
    assert other.config.rope_theta == 50
    (public_folder / "config.json").unlink()
    assert_same_weights(convert_vggt_checkpoint(public_folder, other.config), other)
    # Without any sizes it is taken for VGGT-1B.
    with pytest.raises(ValueError, match=r"does not fit `config` in \d+ of 1403 tensors"):
        convert_vggt_checkpoint(public_folder)


def test_switches_of_the_publishers_program_are_left_out_aloud(public_folder, model, monkeypatch):
    """A published config may state what only the publisher's constructor knows; sizes that are wrong still show."""
    messages = []
    monkeypatch.setattr(vggt_conversion_geode.logger, "warning", messages.append)
    (public_folder / "config.json").write_text(json.dumps(SIZES | {"enable_track": True, "enable_point": True}))
    assert_same_weights(convert_vggt_checkpoint(public_folder), model)
    assert messages == ["Of config.json, ['enable_point', 'enable_track'] say nothing to this model."]
    with pytest.raises(ValueError, match=r"unknown keys \['enable_track'\]"):
        convert_vggt_checkpoint(public_folder, SIZES | {"enable_track": True})


def test_our_form_is_sent_to_from_pretrained(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"type 'geode_vggt'\. Load it with `VggtModel.from_pretrained`"):
        convert_vggt_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"'geode_vggt'"):
        convert_vggt_checkpoint(tmp_path, SIZES)
    with pytest.raises(ValueError, match=r"\d+ of ours, such as `camera_token`.*`VggtModel.from_pretrained`"):
        convert_vggt_checkpoint(tmp_path / "model.safetensors", SIZES)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match=r"holds a model of type 'qwen2'\. Load it with its own class"):
        convert_vggt_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("nothing", r"must be a folder, a file ending in .* 'facebook/VGGT-1B', and there is nothing at 'nothing'"),
        ("./org/vggt", r"there is nothing at '\./org/vggt'"),
        (Path("org/vggt"), r"there is nothing at 'org/vggt'"),
        ("org/vggt.safetensors", r"there is no file 'org/vggt\.safetensors'"),
        (
            "org/vggt",
            r"one of model\.safetensors, .* or model\.pt, and the Hub \(offline, its cache\), where 'org/vggt'",
        ),
    ],
)
def test_what_is_not_there_is_said(checkpoint, message, hub_cache):
    with pytest.raises(FileNotFoundError, match=message):
        convert_vggt_checkpoint(checkpoint)


def test_a_name_that_the_hub_refuses_is_said_with_its_reason(hub_cache, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("401: the repository is gated")

    monkeypatch.setattr("geode.modeling_geode.vggt_conversion_geode.hf_hub_download", refuse)
    with pytest.raises(
        FileNotFoundError, match=r"'org/vggt' is no folder .* at revision 'v1': 401: the repository is"
    ):
        convert_vggt_checkpoint("org/vggt", revision="v1")


def test_folder_without_weights_names_what_was_looked_for(public_folder):
    (public_folder / "model.safetensors").rename(public_folder / "vggt.safetensors")
    message = (
        r"one of model\.safetensors, model\.safetensors\.index\.json or model\.pt, and the folder '.*public' has none"
    )
    with pytest.raises(FileNotFoundError, match=message):
        convert_vggt_checkpoint(public_folder)


def test_broken_index_and_missing_shard_are_named(public_folder):
    shard(public_folder)
    index = public_folder / "model.safetensors.index.json"
    (public_folder / "model-00002-of-00002.safetensors").rename(public_folder.parent / "elsewhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"names 'model-00002-of-00002\.safetensors', which is not beside it"):
        convert_vggt_checkpoint(public_folder)
    index.write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"names '\.\./elsewhere\.safetensors', which is not beside it"):
        convert_vggt_checkpoint(public_folder)
    index.write_text('{"weights": 1}')
    with pytest.raises(ValueError, match=r"index\.json must hold a `weight_map`"):
        convert_vggt_checkpoint(public_folder)
    index.write_text("[1]")
    with pytest.raises(ValueError, match=r"index\.json must hold an object in JSON, got a list"):
        convert_vggt_checkpoint(public_folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_damaged_weights_are_named_with_their_size(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{]")
    with pytest.raises(ValueError, match=rf"{re.escape(name)}' \(10 bytes\) cannot be read as weights"):
        convert_vggt_checkpoint(tmp_path / name)


def test_damaged_config_is_named(public_folder):
    (public_folder / "config.json").write_text("<html>")
    with pytest.raises(ValueError, match=r"config\.json must be a file in JSON"):
        convert_vggt_checkpoint(public_folder)
    (public_folder / "config.json").write_text(json.dumps(SIZES | {"embed_dim": "wide"}))
    with pytest.raises(ValueError, match=r"`config` does not describe a VGGT model: .*hidden_size"):
        convert_vggt_checkpoint(public_folder)


def test_revision_is_refused_where_it_has_no_effect(public_folder, state):
    for checkpoint in (public_folder, public_folder / "model.safetensors", state):
        with pytest.raises(ValueError, match=r"`revision` is for names on the Hub, got 'v1'"):
            convert_vggt_checkpoint(checkpoint, SIZES, revision="v1")


def test_entries_that_are_not_weights_are_named_with_the_remedy(state, tmp_path):
    with pytest.raises(ValueError, match=r"holds others under \['model'\]\. .* such as `checkpoint\['model'\]`"):
        convert_vggt_checkpoint({"model": state, "step": 7}, SIZES)
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"`checkpoint\['state_dict'\]`"):
        convert_vggt_checkpoint(tmp_path / "model.pt", SIZES)
    with pytest.raises(ValueError, match=r"in 2 entries it does not: `step` is a int; `mask` is of torch\.int64"):
        convert_vggt_checkpoint(state | {"step": 7, "mask": torch.zeros(2, dtype=torch.int64)}, SIZES)
    with pytest.raises(ValueError, match="must be or hold a state dict, got list"):
        convert_vggt_checkpoint([state], SIZES)


@pytest.mark.slow
def test_public_widths_convert_save_load_and_run(tmp_path):
    """One block of each kind, with the names and shapes of VGGT-1B and random values: 0.2 billion parameters."""
    published = json.loads((FIXTURES / "keys_vggt_1b.json").read_text())["shapes"]
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator).mul_(0.02)
        for name, shape in published.items()
        if re.search(r"(?:blocks|trunk)\.[1-9]", name) is None and not name.startswith("track_head.")
    }
    sizes = {"embed_dim": 1024, "img_size": 518, "patch_size": 14}
    blocks = {"depth": 1, "vit_depth": 1, "camera_trunk_depth": 1, "intermediate_layer_idx": [0, 0, 0, 0]}
    model = convert_vggt_checkpoint(state, sizes | blocks)
    assert sum(tensor.numel() for tensor in model.parameters()) == sum(tensor.numel() for tensor in state.values())
    fused = state["aggregator.patch_embed.blocks.0.attn.qkv.weight"]
    assert torch.equal(model.trunk.encoder.layer[0].attention.k_proj.weight, fused[1024:2048])
    model.save_pretrained(tmp_path)
    loaded = VggtModel.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    # pytest keeps the folders of the last runs, and this one is large.
    (tmp_path / "model.safetensors").unlink()
    with torch.no_grad():
        output = loaded(torch.rand(1, 2, 3, 28, 42, generator=generator))
    for name in ("pose_encoding", "depth", "depth_confidence", "world_points", "world_points_confidence"):
        assert torch.isfinite(output[name]).all(), name
        assert output[name].std() > 0, name
