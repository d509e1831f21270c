# SPDX-License-Identifier: Apache-2.0
"""
Tests of `geode push`, and of `save_pretrained(push_to_hub=True)`, with the real client of the Hub in processes of its own.

The Hub is `tests/common_hub_server.py`. A request that it does not know fails the test that made it.
"""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

import geode
from geode.publishing import write_card
from tests.common_hub_server import Blob, serve
from tests.modeling_geode.common_hub import BLOCKER


TOKEN = f"hf_{'a1B2' * 9}"


class Client:
    """Runs programs with a home of their own against one Hub, and keeps all they print."""

    def __init__(self, hub, home: Path):
        self.hub, self.home, self.printed = hub, home, ""

    def run(self, *command: object, token: str | None = TOKEN) -> tuple[int, str, str]:
        environment = self.hub.environment(self.home, token=token)
        result = subprocess.run(
            [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300
        )
        self.printed += result.stdout + result.stderr
        return result.returncode, result.stdout, result.stderr

    def geode(self, *arguments: object, token: str | None = TOKEN) -> tuple[int, str, str]:
        return self.run("-m", "geode.cli", *arguments, token=token)

    def succeed(self, *arguments: object) -> str:
        code, out, err = self.geode(*arguments)
        assert (code, err) == (0, ""), out + err
        return out

    def fail(self, *arguments: object, token: str | None = TOKEN) -> str:
        code, out, err = self.geode(*arguments, token=token)
        assert (code, out) == (2, "")
        assert err.startswith("geode: error: ")
        assert err.count("\n") == 1, err
        return err


@pytest.fixture
def hub():
    with serve(TOKEN) as found:
        yield found
    assert found.unknown == []


@pytest.fixture
def client(hub, tmp_path):
    found = Client(hub, tmp_path / "home")
    yield found
    # Whatever a test does, the token is in nothing that was printed, written here or sent as a file.
    assert TOKEN not in found.printed
    written = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert written == []
    for repository in hub.repositories.values():
        for files in repository.commits.values():
            assert [name for name, blob in files.items() if TOKEN.encode() in blob.data] == []


def files_of(hub, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
    repository = hub.repositories[kind, name]
    files = repository.commits[repository.resolve(revision)]
    return {path: blob.data for path, blob in files.items() if path != ".gitattributes"}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download

name, revision, target = sys.argv[1:]
snapshot_download(name, revision=revision, local_dir=target)
"""


def test_a_private_repository_is_pushed_tagged_changed_and_downloaded_at_its_tag(hub, client, folder, tmp_path):
    first = contents(folder)
    out = client.succeed("push", folder, "org/tiny", "--private", "--tag", "v1")
    repository = hub.repositories["model", "org/tiny"]
    commit = repository.tags["v1"]
    assert out == f"pushed: {hub.url}/org/tiny/commit/{commit}\ntagged: v1\n"
    assert repository.is_private
    assert files_of(hub, "org/tiny") == first
    # Weights go as large files, the rest as it is.
    assert {name for name, blob in repository.commits[commit].items() if blob.is_large} == {"model.safetensors"}

    # The next version has another card, and lacks a module that is there: it goes there, too.
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("## Use", "Second.\n\n## Use"))
    repository.commit("main", {**repository.commits[commit], "old_geode.py": Blob(b"x = 1\n", False)})
    client.succeed("push", folder, "org/tiny", "--tag", "v2", "--message", "Second")
    assert files_of(hub, "org/tiny") == contents(folder) != first
    assert list(hub.uploads.values()) == [1]  # the weights are the same and were not sent again

    code, _, err = client.run("-c", DOWNLOAD, "org/tiny", "v1", tmp_path / "v1")
    assert code == 0, err
    assert contents(tmp_path / "v1") == {**first, ".gitattributes": b"*.safetensors filter=lfs\n"}
    assert client.run("-c", DOWNLOAD, "org/tiny", "v1", tmp_path / "none", token=None)[0] == 1


@pytest.mark.slow
def test_revisions_are_pinned_and_tags_are_set_once(hub, client, folder, tmp_path):
    first = contents(folder)
    client.succeed("push", folder, "org/tiny", "--tag", "v1")
    commit = hub.repositories["model", "org/tiny"].tags["v1"]
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("## Use", "Second.\n\n## Use"))
    client.succeed("push", folder, "org/tiny", "--tag", "v2")
    for revision, want in (("v1", first), ("v2", contents(folder)), (commit, first), ("main", contents(folder))):
        assert client.run("-c", DOWNLOAD, "org/tiny", revision, tmp_path / revision)[0] == 0
        assert contents(tmp_path / revision) == {**want, ".gitattributes": b"*.safetensors filter=lfs\n"}
    assert "Revision Not Found" in client.fail("check", "org/tiny", "--revision", "v9")
    assert "`tag` must be new, and org/tiny has 'v1' already" in client.fail("push", folder, "org/tiny", "--tag", "v1")


@pytest.mark.slow
def test_a_branch_is_made_and_leaves_the_main_one_alone(hub, client, folder):
    client.succeed("push", folder, "org/tiny", "--revision", "next/one")
    assert files_of(hub, "org/tiny") == {}
    assert files_of(hub, "org/tiny", "next/one") == contents(folder)
    client.succeed("push", folder, "org/tiny", "--revision", "next/one")


@pytest.mark.slow
def test_of_a_private_repository_a_stranger_learns_nothing(hub, client, folder):
    client.succeed("push", folder, "org/secret", "--private")
    errors = [client.fail("check", name, token=None) for name in ("org/secret", "org/nothing")]
    assert errors[0] == errors[1].replace("org/nothing", "org/secret")
    assert "401" in errors[0]
    assert "404" in client.fail("check", "org/nothing")
    # What is public does not become private by being called so.
    client.succeed("push", folder, "org/open")
    before = len(hub.repositories["model", "org/open"].commits)
    assert "org/open is there and public" in client.fail("push", folder, "org/open", "--private")
    assert len(hub.repositories["model", "org/open"].commits) == before


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Three splits, which go as large files, with a card."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for number, split in enumerate(("test", "train", "validation")):
        pq.write_table(
            pa.table({"question": [f"How many in {split}?"] * 3, "value_si": [1.0 + number] * 3}),
            folder / f"{split}.parquet",
        )
    (tmp_path / "facts.yaml").write_text(
        "name: Questions\nsummary: Three questions.\nlicense: cc-by-4.0\nintended_use: Tests.\n"
        "limitations: [They are few.]\ndata: {}\n"
    )
    return folder


def test_a_failed_upload_is_repeated_without_sending_finished_files_again(hub, client, dataset, tmp_path):
    write_card("dataset", dataset, facts=tmp_path / "facts.yaml")
    broken = (dataset / "train.parquet").read_bytes()
    others_are_here = threading.Event()

    def refuse(data: bytes) -> bool:
        if data == broken:  # not before the others have arrived, or the test would prove nothing
            assert others_are_here.wait(60)
            return True
        return False

    hub.refuse = refuse
    watcher = threading.Thread(target=lambda: _wait_until(lambda: len(hub.uploads) == 2, others_are_here))
    watcher.start()
    error = client.fail("push", dataset, "org/questions", "--repo-type", "dataset")
    watcher.join()
    assert "Error while uploading 'train.parquet'" in error
    assert "403" in error
    assert "Run it again: files that have arrived are not sent again" in error
    assert files_of(hub, "org/questions", kind="dataset") == {}  # no commit is half of it
    assert sorted(hub.uploads.values()) == [1, 1]

    hub.refuse = lambda data: False
    client.succeed("push", dataset, "org/questions", "--repo-type", "dataset")
    assert sorted(hub.uploads.values()) == [1, 1, 1]
    assert files_of(hub, "org/questions", kind="dataset") == contents(dataset)


def _wait_until(is_true, event: threading.Event, timeout_s: float = 60.0) -> None:
    tick = threading.Event()
    for _ in range(int(timeout_s / 0.02)):
        if is_true():
            event.set()
            return
        tick.wait(0.02)


def test_nothing_is_sent_of_a_folder_with_a_problem(hub, client, folder, tmp_path):
    (folder / "mamba_geode.py").write_text("x = 1\n")
    error = client.fail("push", folder, "org/tiny")
    assert f"{folder} has 1 problem and was not uploaded. mamba_geode.py: its SHA-256 is not the one" in error
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "app.bin").write_bytes(b"\x80\x04.")
    error = client.fail("push", tmp_path / "space", "org/app", "--repo-type", "space")
    assert "2 problems" in error
    assert "app.bin: is a pickle" in error
    assert "README.md: there is no card" in error
    assert hub.requests == []


@pytest.mark.slow
def test_what_cannot_be_pushed_is_said(hub, client, folder, exported):
    assert "Repo id must be" in client.fail("push", exported, "org/a/b")
    assert "`facts` and `results` are for a model that is not exported yet" in client.fail(
        "push", exported, "org/tiny", "--facts", "facts.yaml"
    )
    assert hub.requests == []
    error = client.fail("push", exported, "org/tiny", token=None)
    assert "hf auth login" in error
    # The Hub has the last word on a header.
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("license: apache-2.0\n", "license: My Own\n", 1))
    assert "\"license\" must be a licence, got 'My Own'" in client.fail("push", folder, "org/tiny")
    assert files_of(hub, "org/tiny") == {}


@pytest.mark.slow
def test_check_of_a_repository_asks_the_hub_about_its_card(hub, client, exported):
    client.succeed("push", exported, "org/tiny")
    repository = hub.repositories["model", "org/tiny"]
    files = dict(repository.commits[repository.branches["main"]])
    text = files["README.md"].data.decode().replace("license: apache-2.0\n", "license: My Own\n", 1)
    repository.commit("main", {**files, "README.md": Blob(text.encode(), False)})
    code, out, _ = client.geode("check", "org/tiny")
    assert code == 1
    assert "problem: README.md: the Hub refuses its header: " in out
    assert "'My Own'" in out


@pytest.mark.slow
def test_a_metric_is_pushed_as_a_space(hub, client, tmp_path):
    client.succeed("card", "metric", tmp_path / "vsi_bench")
    client.succeed("push", tmp_path / "vsi_bench", "org/vsi_bench", "--repo-type", "space")
    assert set(files_of(hub, "org/vsi_bench", kind="space")) == {"README.md", "LICENSE", "index.html", "vsi_bench.py"}


UPLOAD = """
import sys

import geode
from geode import GeodeForConditionalGeneration, GeodeProcessor, VggtImageProcessor

checkpoint, folder = geode.tiny_checkpoint(), sys.argv[1]
model, processor = GeodeForConditionalGeneration.from_pretrained(checkpoint), GeodeProcessor.from_pretrained(checkpoint)
model.save_pretrained(folder, push_to_hub=True, repo_id="org/model", private=True)
processor.save_pretrained(folder, push_to_hub=True, repo_id="org/model")
VggtImageProcessor().save_pretrained(folder + "-vggt", push_to_hub=True, repo_id="org/vggt")
model.push_to_hub("org/pushed")
"""


@pytest.mark.slow
def test_save_pretrained_uploads_the_code_with_the_model(hub, client, exported, tmp_path):
    """transformers uploads within its own `save_pretrained`: what we add afterwards would come too late."""
    code, _, err = client.run("-c", UPLOAD, tmp_path / "saved")
    assert code == 0, err
    want = contents(exported)
    uploaded = files_of(hub, "org/model")
    # The card is the library's; licence and hashes are of an export.
    assert set(uploaded) == set(want) - {"LICENSE", "geode_export.json"}
    assert {name: data for name, data in uploaded.items() if name.endswith(".py")} == {
        name: data for name, data in want.items() if name.endswith(".py")
    }
    assert json.loads(uploaded["config.json"])["auto_map"]["AutoModel"]
    assert json.loads(uploaded["processor_config.json"])["auto_map"]["AutoProcessor"]
    assert hub.repositories["model", "org/model"].is_private
    assert "vggt_processing_geode.py" in files_of(hub, "org/vggt")
    assert json.loads(files_of(hub, "org/vggt")["preprocessor_config.json"])["auto_map"]["AutoImageProcessor"]
    pushed = files_of(hub, "org/pushed")
    assert pushed["modeling_geode.py"] == want["modeling_geode.py"]
    assert json.loads(pushed["config.json"])["auto_map"]["AutoModel"]


STRANGER = """
import json, sys
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

name, revision, target = sys.argv[1:]
model = AutoModel.from_pretrained(name, revision=revision, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.org.")
save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, target)
"""


@pytest.mark.slow
def test_a_pinned_model_of_a_private_repository_loads_by_its_name(hub, client, folder, exported, tmp_path):
    client.succeed("push", folder, "org/secret", "--private", "--tag", "v1")
    repository = hub.repositories["model", "org/secret"]
    broken = {**repository.commits[repository.branches["main"]], "modeling_geode.py": Blob(b"raise OSError\n", False)}
    repository.commit("main", broken)
    script = BLOCKER + STRANGER
    code, _, err = client.run("-W", "ignore", "-c", script, "org/secret", "v1", tmp_path / "loaded.safetensors")
    assert code == 0, err
    loaded, want = load_file(tmp_path / "loaded.safetensors"), load_file(exported / "model.safetensors")
    assert all((loaded[name] == tensor).all() for name, tensor in want.items())
    assert client.run("-W", "ignore", "-c", script, "org/secret", "main", tmp_path / "x.safetensors")[0] == 1
    assert client.run("-c", script, "org/secret", "v1", tmp_path / "x.safetensors", token=None)[0] == 1


@pytest.mark.slow
def test_a_model_that_is_not_exported_is_exported_and_names_its_repository(hub, client, tmp_path):
    out = client.succeed("push", geode.tiny_checkpoint(), "org/tiny", "--tag", "v1")
    assert out.splitlines()[1].startswith("pushed: ")
    files = files_of(hub, "org/tiny")
    assert b'name = "org/tiny"' in files["README.md"]
    assert b'revision = "v1"  # of a repository' in files["README.md"]
    assert {"LICENSE", "geode_export.json", "modeling_geode.py", "processing_geode.py"} <= set(files)
    assert "no problems" in client.succeed("check", "org/tiny", "--revision", "v1")
    shutil.copytree(geode.tiny_checkpoint(), tmp_path / "mine")
    assert "`facts` must name a YAML file for the card" in client.fail("push", tmp_path / "mine", "org/mine")
