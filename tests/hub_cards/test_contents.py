# SPDX-License-Identifier: Apache-2.0
"""Tests of what a file is told to be from its content. Pickles are made by their own writers, and opened by nobody."""

import gzip
import io
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from geode.hub_cards.contents import HEAD_BYTES, find_danger, is_pickle


class Caller:
    """Would call `print` if it were opened."""

    def __reduce__(self):
        return print, ("opened",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_that_call_something_are_recognised_in_every_protocol(protocol):
    assert is_pickle(io.BytesIO(pickle.dumps(Caller(), protocol=protocol)))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_harmless_binary_pickles_are_recognised_too(protocol):
    assert is_pickle(io.BytesIO(pickle.dumps({"a": [1, 2]}, protocol=protocol)))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b".",
        b"# A card\n\nIt says something.\n",
        b'{"a": 1}\n',
        b"import os\n\n\ndef f():\n    return 1\n",
        b"I1\n.",  # a pickle of the number 1, which calls nothing
        "\u00e9t\u00e9".encode(),
    ],
)
def test_text_is_no_pickle(text):
    assert not is_pickle(io.BytesIO(text))


def test_a_pickle_that_calls_something_after_a_long_text_is_recognised():
    data = pickle.dumps(["x" * (2 * HEAD_BYTES), Caller()], protocol=0)
    assert is_pickle(io.BytesIO(data))
    assert not is_pickle(io.BytesIO(data[:-20]))  # cut off, it can call nothing


def write_picture(path):
    Image.fromarray(np.zeros((3, 4, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("README.md", lambda path: path.write_text("# \u00e9t\u00e9\n", encoding="utf-8")),
        ("empty.txt", lambda path: path.touch()),
        ("model.safetensors", lambda path: save_file({"a": torch.zeros(2, 3)}, path)),
        ("picture.png", write_picture),
        ("picture.jpg", write_picture),
        ("picture.webp", write_picture),
    ],
)
def test_what_belongs_in_a_repository_is_left_alone(tmp_path, name, write):
    write(tmp_path / name)
    assert find_danger(tmp_path / name) is None


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "nothing")


def write_damaged(path):
    save_file({"a": torch.zeros(2, 3)}, path)
    path.write_bytes(path.read_bytes()[:-4])


def write_longer(path):
    save_file({"a": torch.zeros(2, 3)}, path)
    path.write_bytes(path.read_bytes() + pickle.dumps(Caller()))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        # By content, whatever the name says.
        (
            "model.safetensors",
            lambda path: torch.save({"a": torch.zeros(2)}, path),
            "archive with the pickle .*data.pkl",
        ),
        (
            "model.safetensors",
            lambda path: torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False),
            "is a pickle",
        ),
        ("README.md", lambda path: path.write_bytes(pickle.dumps(Caller(), protocol=0)), "is a pickle"),
        ("tokenizer.json", lambda path: path.write_bytes(pickle.dumps(Caller())), "is a pickle"),
        ("picture.png", lambda path: path.write_bytes(pickle.dumps({"a": 1})), "is a pickle"),
        ("values.npy", lambda path: np.save(path, np.array([{"a": 1}], dtype=object)), "ends in .npy"),
        ("training_args.bin", lambda path: path.write_text("text"), "ends in .bin"),
        ("code.zip", write_zip, "is an archive, so that nobody sees"),
        ("data.json.gz", lambda path: path.write_bytes(gzip.compress(b"{}")), "is compressed"),
        ("data.txt", lambda path: path.write_bytes(b"\xff\xfe\x00\x01"), "is binary"),
        ("data.csv", lambda path: path.write_bytes(b"a,b\0"), "is binary"),
        ("model.safetensors", write_damaged, "is cut off"),
        ("model.safetensors", write_longer, "is cut off or has bytes after its tensors"),
        ("model.safetensors", lambda path: path.write_text("<html>"), "not in safetensors format"),
        ("model.safetensors", lambda path: path.write_bytes(b"\x02" + b"\0" * 7 + b"[]"), "header cannot be read"),
        ("notes.md", lambda path: path.write_text(f"token: hf_{'a1B2' * 9}\n"), "access token"),
    ],
)
def test_what_does_not_belong_there_is_named(tmp_path, name, write, message):
    write(tmp_path / name)
    found = find_danger(tmp_path / name)
    assert re.search(message, found), found


def test_a_token_is_not_repeated(tmp_path):
    token = f"hf_{'a1B2' * 9}"
    (tmp_path / "notes.md").write_text(token)
    assert token not in find_danger(tmp_path / "notes.md")
