# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from geode.configuration import configuration_geode
from geode.data.tokenizer import train_tokenizer
from geode.modeling_geode.export_geode import collect_modules, export_code, shipped_modules
from geode.modeling_geode.hub_geode import CodeOnHubMixin
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.modeling_geode.scene_geode import SceneGeometry
from geode.modeling_geode.video_processing_geode import GeodeImageProcessor
from tests.modeling_geode.common_geode import tiny_config
from tests.modeling_geode.common_hub import put_in_hub_cache, run_stranger


CONFIGURATION = 'class GeodeConfig:\n    model_type = "geode"\n'


def write_modules(folder: Path, **sources: str) -> dict[str, Path]:
    """Write made-up modules and return the mapping that `collect_modules` takes."""
    paths = {}
    for name, source in {"configuration_geode": CONFIGURATION, **sources}.items():
        paths[name] = folder / f"{name}.py"
        paths[name].write_text(source, encoding="utf-8")
    return paths


def test_collect_modules_rewrites_the_configuration_import_and_nothing_else(tmp_path):
    source = (
        "import math\n"
        "\n"
        "from geode.configuration.configuration_geode import GeodeConfig  # why\n"
        "\n"
        '"""geode.configuration.configuration_geode stays in text."""\n'
    )
    modules = write_modules(tmp_path, modeling_geode=source)
    collected = collect_modules(["modeling_geode"], modules)
    expected = source.replace(
        "from geode.configuration.configuration_geode import", "from .configuration_geode import"
    )
    assert collected == {"configuration_geode": CONFIGURATION, "modeling_geode": expected}


def test_collect_modules_rewrites_imports_over_several_lines_and_inside_functions(tmp_path):
    source = (
        "def build():\n"
        "    from geode.configuration.configuration_geode import (\n"
        "        GeodeConfig as Config,\n"
        "    )\n"
        "    return Config\n"
    )
    collected = collect_modules(["modeling_geode"], write_modules(tmp_path, modeling_geode=source))
    assert collected["modeling_geode"].splitlines()[1] == "    from .configuration_geode import ("
    assert len(collected["modeling_geode"].splitlines()) == len(source.splitlines())


def test_collect_modules_follows_chains_and_leaves_out_what_nobody_imports(tmp_path):
    modules = write_modules(
        tmp_path,
        modeling_geode="from .head_geode import Head\n",
        head_geode="from .math_geode import (\n    square,\n)\n\n\nclass Head: ...\n",
        math_geode="def square(x):\n    return x * x\n",
        unused_geode="x = 1\n",
    )
    assert list(collect_modules(["modeling_geode"], modules)) == ["head_geode", "math_geode", "modeling_geode"]


def test_collect_modules_survives_modules_that_import_each_other(tmp_path):
    modules = write_modules(
        tmp_path,
        modeling_geode="def late():\n    from .head_geode import Head\n    return Head\n",
        head_geode="from .modeling_geode import late\n\n\nclass Head: ...\n",
    )
    assert list(collect_modules(["head_geode"], modules)) == ["head_geode", "modeling_geode"]


def test_collect_modules_takes_optional_packages_and_the_exporter_inside_try(tmp_path):
    source = (
        "try:\n"
        "    import mamba_ssm\n"
        "except ImportError:\n"
        "    mamba_ssm = None\n"
        "\n\n"
        "def save():\n"
        "    try:\n"
        "        from .export_geode import export_code\n"
        "    except ImportError:\n"
        "        return\n"
        "    export_code()\n"
    )
    collected = collect_modules(["modeling_geode"], write_modules(tmp_path, modeling_geode=source))
    # Transformers follows a relative import even inside `try`, and the exporter is not in the folder.
    path = tmp_path / "exported.py"
    path.write_text(collected["modeling_geode"])
    assert get_relative_imports(path) == []
    assert get_imports(path) == []
    assert "        from geode.modeling_geode.export_geode import export_code\n" in collected["modeling_geode"]


def test_collect_modules_accepts_names_bound_by_if_try_import_and_assignment(tmp_path):
    head = (
        "import math\n"
        "try:\n    import av\nexcept ImportError:\n    av = None\n"
        "if math.pi > 3:\n    LARGE = True\nelse:\n    SMALL = True\n"
        "FIRST, (SECOND, *REST) = 1, (2, 3)\n"
        "TYPED: int = 4\n"
        "def function(): ...\n"
    )
    names = ["math", "av", "LARGE", "SMALL", "FIRST", "SECOND", "REST", "TYPED", "function"]
    modules = write_modules(tmp_path, head_geode=head, modeling_geode=f"from .head_geode import {', '.join(names)}\n")
    assert list(collect_modules(["modeling_geode"], modules)) == ["head_geode", "modeling_geode"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import math\nimport geode.trainers\n", r"modeling_geode\.py:2 imports `geode\.trainers`"),
        ("from geode import GeodeConfig\n", r":1 imports `geode`.*Use `from \.module import`"),
        ("from geode.configuration import GeodeConfig\n", r":1 imports `geode\.configuration`"),
        ("from ..configuration.configuration_geode import GeodeConfig\n", r"has `from \.\.configuration\."),
        ("from . import head_geode\n", r"has `from \. import`.*flat"),
        ("from .heads.head_geode import Head\n", r"has `from \.heads\.head_geode import`.*flat"),
        ("from .other_geode import Head\n", r"has `from \.other_geode import`.*\['configuration_geode', 'head_geode'"),
        ("from .head_geode import Head, Tail\n", r"imports \['Tail'\] from `head_geode\.py`"),
        ("from .head_geode import hidden\n", r"imports \['hidden'\] from `head_geode\.py`"),
        ("from .head_geode import *\n", r"imports \['\*'\] from `head_geode\.py`"),
        ("from geode.configuration.configuration_geode import Missing\n", r"imports \['Missing'\]"),
        ("import scipy.spatial\n", r":1 imports the package `scipy`.*`try`/`except ImportError`"),
        ("def f():\n    import av\n", r":2 imports the package `av`"),
        ("if True:\n    from einops import rearrange\n", r":2 imports the package `einops`"),
        ("try:\n    import av\nfinally:\n    x = 1\n", r":2 imports the package `av`"),
        ("try:\n    import av\nexcept OSError:\n    av = None\n", r":2 imports the package `av`"),
        ("try:\n    x = 1\nexcept ImportError:\n    import av\n", r":4 imports the package `av`"),
        (
            "from geode.modeling_geode.export_geode import export_code\n",
            r"imports `geode\.modeling_geode\.export_geode`",
        ),
        ("from .export_geode import export_code\n", r"imports `geode\.modeling_geode\.export_geode`"),
        ('"""Example:\n\n    from .head_geode import Head\n"""\n', r"modeling_geode\.py:3 has text that Transformers"),
    ],
)
def test_collect_modules_refuses_what_would_fail_on_the_hub(tmp_path, source, message):
    head = "class Head:\n    def method(self):\n        hidden = 1\n        return hidden\n"
    modules = write_modules(tmp_path, modeling_geode=source, head_geode=head)
    with pytest.raises(ValueError, match=message):
        collect_modules(["modeling_geode"], modules)


def test_collect_modules_finds_the_imports_that_transformers_finds(tmp_path):
    """The oracle is transformers' own scan: after an export it must name copied files and importable packages only."""
    collected = collect_modules(sorted(shipped_modules()), shipped_modules())
    for name, source in collected.items():
        path = tmp_path / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        assert set(get_relative_imports(path)) <= set(collected), name
        assert "geode" not in get_imports(path), name


def test_shipped_modules_leave_out_the_exporter():
    modules = shipped_modules()
    assert "export_geode" not in modules
    assert modules["configuration_geode"].parent.name == "configuration"


def test_export_code_refuses_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold one of \['config\.json', 'preprocessor_config\.json'"):
        export_code(tmp_path)


def test_export_code_refuses_a_foreign_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ValueError, match=r"`model_type` of \['geode', 'geode_sonata', 'geode_vggt'\], got 'qwen2'"):
        export_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_export_code_refuses_a_foreign_processor(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "InternVLProcessor"}))
    with pytest.raises(ValueError, match=r"`processor_class` 'GeodeProcessor', got 'InternVLProcessor'"):
        export_code(tmp_path)


# What somebody runs who has transformers and a folder, and no `geode`.
STRANGER = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

arguments_path, results_path, resaved, *sources = sys.argv[1:]
torch.set_num_threads(1)
chat, options, questions = torch.load(arguments_path, weights_only=True)
results = []


def answer(source, auto_class):
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    model = auto_class.from_pretrained(source, trust_remote_code=True).eval()
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    output = model.generate(**inputs, **options, return_dict_in_generate=True)
    answers = processor.post_process_answers(output, input_ids=inputs["input_ids"])
    video = chat[0]["content"][0]
    scene = model.encode_scene(**processor.prepare_scene(frames=video["video"], geometry=video["geometry"]))
    store = model.open_scene_store(f"{resaved}-store", max_bytes=2**20)
    store.put("scene", scene)
    asked = model.ask(processor, store.get("scene"), questions, **options)
    results.append(
        {
            "classes": [type(part).__name__ for part in (model, processor, processor.image_processor)],
            "modules": [type(part).__module__ for part in (model, processor, processor.image_processor)],
            "inputs": dict(inputs),
            "logits": logits,
            "sequences": output.sequences,
            "answers": [entry.to_dict() for entry in answers],
            "asked": [entry.to_dict() for entry in asked],
        }
    )
    return model, processor


for source, auto_class in zip(sources, (AutoModelForImageTextToText, AutoModelForMultimodalLM)):
    model, processor = answer(source, auto_class)
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    assert type(config).__name__ == "GeodeConfig"
    assert config.control_tokens == model.config.control_tokens
model.save_pretrained(resaved)
processor.save_pretrained(resaved)
answer(resaved, AutoModel)
torch.save(results, results_path)
"""


@pytest.fixture(scope="module")
def tiny_processor() -> GeodeProcessor:
    tokenizer = train_tokenizer(["How far is the chair from the table, in meters? It is 2.31 meters."], 300)
    tokenizer.padding_side = "left"
    image_processor = GeodeImageProcessor(size={"height": 24, "width": 24})
    return GeodeProcessor(image_processor, tokenizer, num_frames=3, num_rationale_tokens=4, image_seq_length=9)


@pytest.fixture(scope="module")
def tiny_model(tiny_processor) -> GeodeForConditionalGeneration:
    config = tiny_config(
        text_config={"vocab_size": len(tiny_processor.tokenizer)},
        image_token_id=tiny_processor.image_token_id,
        rationale_token_id=tiny_processor.rationale_token_id,
    )
    for token, entry in config.control_tokens.items():
        entry["token_id"] = tiny_processor.control_tokens[token]["token_id"]
    torch.manual_seed(0)
    return GeodeForConditionalGeneration(config).eval()


@pytest.fixture
def chat(tmp_path, box_room) -> list[dict]:
    """A video with geometry, read from a folder, and an image without."""
    scene = SceneGeometry.from_rgbd(
        depth=box_room.depth.float(),
        images=np.random.default_rng(0).integers(0, 256, (2, *box_room.image_size, 3), dtype=np.uint8),
        intrinsics=box_room.intrinsics.float(),
        world_from_cam=box_room.world_from_cam.float(),
    )
    scene.save(tmp_path / "geometry")
    pictures = np.random.default_rng(1).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
    Image.fromarray(pictures[3]).save(tmp_path / "picture.png")
    parts = [
        {"type": "video", "video": torch.from_numpy(pictures[:3]), "geometry": str(tmp_path / "geometry")},
        {"type": "image", "path": str(tmp_path / "picture.png")},
        {"type": "text", "text": "How far is the chair from the table, in centimeters?"},
    ]
    return [{"role": "user", "content": parts}]


def test_saved_folder_answers_alike_where_geode_is_absent(tiny_model, tiny_processor, chat, tmp_path):
    folder = tmp_path / "geode-tiny"
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    put_in_hub_cache(folder, "org/geode-tiny", tmp_path / "hf")
    # The reference is loaded too: where a tensor lies in memory decides how it is summed, to the last bit.
    model, processor = GeodeForConditionalGeneration.from_pretrained(folder), GeodeProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    # The bias makes random weights answer with values: every new token is a control token.
    bias = {(model.config.control_tokens["<REG>"]["token_id"],): 100.0}
    options = {"max_new_tokens": 3, "do_sample": False, "sequence_bias": bias}
    output = model.generate(**inputs, **options, return_dict_in_generate=True)
    answers = [answer.to_dict() for answer in processor.post_process_answers(output, input_ids=inputs["input_ids"])]
    assert [value["unit"] for value in answers[0]["values"]] == ["cm"] * 3
    questions = ["How far is the chair from the table, in centimeters?", "How many chairs are there?"]
    video = chat[0]["content"][0]
    scene = model.encode_scene(**processor.prepare_scene(frames=video["video"], geometry=video["geometry"]))
    asked = [answer.to_dict() for answer in model.ask(processor, scene, questions, **options)]
    torch.save((chat, options, questions), tmp_path / "arguments.pt")

    files = (tmp_path / name for name in ("arguments.pt", "results.pt", "resaved"))
    assert run_stranger(STRANGER, *files, folder, "org/geode-tiny", cwd=tmp_path) == ""

    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert len(results) == 3
    for result in results:
        assert result["classes"] == ["GeodeForConditionalGeneration", "GeodeProcessor", "GeodeImageProcessor"]
        assert [name.split(".")[0] for name in result["modules"]] == ["transformers_modules"] * 3
        assert result["inputs"].keys() == inputs.keys()
        assert [name for name in inputs if not torch.equal(inputs[name], result["inputs"][name])] == []
        assert torch.equal(result["logits"], logits)
        assert torch.equal(result["sequences"], output.sequences)
        assert result["answers"] == answers
        assert result["asked"] == asked
    saved, resaved = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("geode-tiny", "resaved"))
    assert resaved == saved


def test_saved_folder_loads_with_geode_without_a_question(tiny_model, tiny_processor, tmp_path, capsys):
    tiny_model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    GeodeForConditionalGeneration.from_pretrained(tmp_path)
    GeodeProcessor.from_pretrained(tmp_path)
    assert "custom code" not in capsys.readouterr().out


def test_saving_twice_writes_the_same_bytes(tiny_model, tmp_path):
    for name in ("first", "second"):
        tiny_model.save_pretrained(tmp_path / name)
    export_code(tmp_path / "second")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert first == second
    assert json.loads(first["config.json"])["auto_map"]["AutoModel"] == "modeling_geode.GeodeForConditionalGeneration"


@pytest.mark.parametrize(
    ("config_name", "module", "class_name"),
    [("SonataConfig", "sonata_geode", "SonataModel"), ("VggtConfig", "vggt_geode", "VggtModel")],
)
def test_export_code_maps_encoders_saved_on_their_own(tmp_path, config_name, module, class_name):
    getattr(configuration_geode, config_name)().save_pretrained(tmp_path)
    written = {path.name for path in export_code(tmp_path)}
    assert {"config.json", "configuration_geode.py", f"{module}.py"} <= written
    assert "modeling_geode.py" not in written
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": f"configuration_geode.{config_name}",
        "AutoModel": f"{module}.{class_name}",
    }


@pytest.mark.parametrize("part", ["tiny_model", "tiny_processor"])
def test_code_is_there_when_an_upload_begins(part, request, tmp_path):
    """The Hub is switched off here, so that the upload ends where it begins; `tests/hub_cards/test_push.py` makes whole ones."""
    owner = request.getfixturevalue(part)
    super(CodeOnHubMixin, owner).save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.py")) == []
    with pytest.raises(OfflineModeIsEnabled):
        owner._upload_modified_files(tmp_path, "org/tiny", files_timestamps={})
    assert (tmp_path / f"{type(owner).__module__.rpartition('.')[2]}.py").is_file()
