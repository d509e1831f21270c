# SPDX-License-Identifier: Apache-2.0
import itertools
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import geode.data.mixtures as mixtures
from geode.data.mixtures import Mixture, MixtureSource, mixture_path
from geode.data.readers.common import RECORD_FEATURES
from geode.data.schemas import Record, bare_prompt
from geode.data.synthetic_rooms.questions import COUNTING
from tests.data.common_mixtures import make_data, vsi_row, write_lines


SHIPPED = sorted(path.stem for path in mixture_path("stage2").parent.glob("*.yaml"))
PAPER = ("alignment", "stage1", "stage2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def stage2(**options):
    sources = [
        MixtureSource(reader="vsi_590k", path="VSI-590K", weight=3.0),
        MixtureSource(reader="vlm_3r", path="VLM-3R-DATA", weight=1.0),
    ]
    return Mixture(name="two", sources=sources, **options)


def uids(stream):
    return [record["uid"] for record in stream]


def test_shipped_mixtures_are_the_papers_and_the_rooms():
    assert SHIPPED == sorted([*PAPER, *(f"{name}_10pct" for name in PAPER), "rooms"])


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_mixture_is_read_and_says_what_it_is_for(name):
    text = mixture_path(name).read_text()
    assert Mixture.from_yaml(name).name == name
    for word in ("# Purpose:", "# Data:", "# Run:      geode data check " + name + " ", "# Expect:"):
        assert word in text


def test_alignment_mixture_has_the_shares_of_the_paper():
    """281k ViCA base, 25 % of about 480k S-MiT captions, 10 % of 2,513,164 Cambrian rows: about 650k."""
    found = {source.reader: source for source in Mixture.from_yaml("alignment").sources}
    assert {name: source.fraction for name, source in found.items()} == {
        "vica": 1.0,
        "smit": 0.25,
        "cambrian_alignment": 0.1,
    }
    assert found["vica"].data_files == ["*/base/*.json"]
    rows = {"vica": 281_359, "smit": 0.25 * 480_000, "cambrian_alignment": 0.1 * 2_513_164}
    for name, count in rows.items():
        assert found[name].weight == pytest.approx(count / 1000, rel=0.01)


@pytest.mark.parametrize("name", PAPER)
def test_tenth_mixture_is_the_whole_one_at_a_tenth(name):
    whole, tenth = Mixture.from_yaml(name), Mixture.from_yaml(f"{name}_10pct")
    for one, other in zip(whole.sources, tenth.sources, strict=True):
        assert other.fraction == pytest.approx(one.fraction / 10)
        assert (one.reader, one.path, one.data_files, one.weight) == (
            other.reader,
            other.path,
            other.data_files,
            other.weight,
        )


def test_stream_gives_every_record_once_and_in_the_same_order_again(data):
    first, again = uids(stage2().stream(data)), uids(stage2().stream(data))
    assert first == again
    assert len(first) == len(set(first)) == 420
    assert uids(stage2(seed=1).stream(data)) != first
    assert uids(stage2().stream(data, epoch=1)) != first


def test_stream_interleaves_by_weight(data):
    sources = Counter(record["source"] for record in itertools.islice(stage2().stream(data), 300))
    # 300 draws with p = 3/4 have a deviation of 7.5.
    assert abs(sources["VSI-590K"] - 225) < 30


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_and_workers_together_read_each_record_once(data, world_size, num_workers):
    parts = [stage2().stream(data, rank=rank, world_size=world_size) for rank in range(world_size)]
    loaders = [torch.utils.data.DataLoader(part, batch_size=None, num_workers=num_workers) for part in parts]
    shares = [uids(loader) for loader in loaders]
    assert sorted(itertools.chain(*shares)) == sorted(uids(stage2().stream(data)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("count", [0, 1, 137, 420])
def test_stream_goes_on_from_its_state(data, count):
    whole = uids(stage2().stream(data))
    stream = stage2().stream(data)
    head = uids(itertools.islice(stream, count))
    resumed = stage2().stream(data)
    resumed.load_state_dict(stream.state_dict())
    assert head + uids(resumed) == whole


def test_fraction_takes_its_share_of_rows_and_smaller_ones_are_nested(data):
    def taken(fraction, seed=0):
        source = MixtureSource(reader="vsi_590k", path="VSI-590K", fraction=fraction)
        return set(uids(source.stream(data, seed=seed)))

    tenth, half = taken(0.1), taken(0.5)
    # Binomial: 150 +- 8.7 and 30 +- 5.2.
    assert abs(len(half) - 150) < 35
    assert abs(len(tenth) - 30) < 21
    assert tenth < half
    assert taken(0.5, seed=1) != half


def test_reworded_fraction_asks_its_share_in_other_words(tmp_path):
    rows = [{"video": "a.mp4", "prompt": COUNTING.format("chair"), "answer": number % 5 + 2} for number in range(200)]
    rows += [{"video": "a.mp4", "prompt": "How many chairs?", "answer": 3} for _ in range(20)]
    write_lines(tmp_path / "mine" / "train.jsonl", rows)

    def records(**options):
        source = MixtureSource(reader="jsonl", path="mine", **options)
        return {record["uid"]: record for record in source.stream(tmp_path)}

    plain, some, every = records(), records(reworded_fraction=0.5), records(reworded_fraction=1.0)
    known = {uid for uid in plain if every[uid]["prompt"] != plain[uid]["prompt"]}
    changed = {uid for uid in plain if some[uid] != plain[uid]}
    assert plain.keys() == some.keys()
    assert len(known) == 200
    assert changed < known
    assert all(some[uid] == every[uid] for uid in changed)
    # Four standard deviations of the binomial.
    assert abs(len(changed) - 100) < 2 * 200**0.5
    assert all(every[uid]["value_si"] == plain[uid]["value_si"] for uid in plain)


def test_bare_fraction_takes_the_benchmarks_lines_from_its_share_of_prompts(data):
    def prompts(**options):
        source = MixtureSource(reader="vsi_590k", path="VSI-590K", **options)
        return {record["uid"]: record["prompt"] for record in source.stream(data)}

    plain, bare = prompts(), prompts(bare_fraction=0.5)
    wordy = {uid for uid, prompt in plain.items() if bare_prompt(prompt) != prompt}
    changed = {uid for uid, prompt in plain.items() if bare[uid] != prompt}
    assert plain.keys() == bare.keys()
    assert prompts(bare_fraction=1.0) == {uid: bare_prompt(prompt) for uid, prompt in plain.items()}
    assert changed < wordy
    assert all(bare[uid] == bare_prompt(plain[uid]) for uid in changed)
    # Four standard deviations of the binomial; of a share of the rows, the same share is bare.
    assert abs(len(changed) - len(wordy) / 2) < 2 * len(wordy) ** 0.5
    fewer = prompts(bare_fraction=0.5, fraction=0.5)
    assert abs(len(changed & fewer.keys()) - len(wordy) / 4) < 2 * len(wordy) ** 0.5
    assert {uid: bare[uid] for uid in fewer} == fewer


def test_load_gives_the_records_of_the_stream_at_random_access(data, tmp_path):
    loaded = stage2().load(data, cache_dir=tmp_path)
    assert loaded.features == RECORD_FEATURES
    assert sorted(loaded["uid"]) == sorted(uids(stage2().stream(data)))
    assert loaded["uid"] != sorted(loaded["uid"])
    by_uid = {record["uid"]: record for record in stage2().stream(data)}
    for row in (loaded[0], loaded[419]):
        assert Record.from_dict(row) == Record.from_dict(by_uid[row["uid"]])
    assert loaded["uid"] == stage2().load(data, cache_dir=tmp_path)["uid"]
    assert loaded["uid"] != stage2().load(data, cache_dir=tmp_path, epoch=1)["uid"]


def test_load_notices_a_changed_file(tmp_path):
    source = MixtureSource(reader="vsi_590k", path="VSI-590K")
    mixture = Mixture(name="one", sources=[source])
    file = tmp_path / "VSI-590K" / "vsi_590k.jsonl"
    write_lines(file, [vsi_row(index) for index in range(3)])
    assert len(mixture.load(tmp_path, cache_dir=tmp_path / "cache")) == 3
    write_lines(file, [vsi_row(index) for index in range(5)])
    assert len(mixture.load(tmp_path, cache_dir=tmp_path / "cache")) == 5


@pytest.mark.parametrize(("choice", "rows", "suspect"), [("mask", 420, 60), ("keep", 420, 0), ("drop", 360, 0)])
def test_suspect_labels_are_masked_kept_or_dropped(data, choice, rows, suspect):
    records = list(stage2(suspect_labels=choice).stream(data))
    assert len(records) == rows
    assert sum(record["label_suspect"] for record in records) == suspect


def test_data_files_choose_a_part_of_a_dataset(data):
    source = MixtureSource(reader="vica", path="ViCA-322K", data_files=["*/complex/*.json"])
    assert {record["subset"] for record in source.stream(data)} == {"complex"}


def test_load_notices_the_list_of_withdrawn_rows(tmp_path):
    make_data(tmp_path)
    mixture = Mixture(name="one", sources=[MixtureSource(reader="vlm_3r", path="VLM-3R-DATA")])
    before = mixture.load(tmp_path, cache_dir=tmp_path / "cache")
    assert (len(before), sum(before["label_suspect"])) == (120, 60)
    erratum = tmp_path / "VLM-3R-DATA" / "vstibench_train" / "erratum_dropped_items.json"
    erratum.write_text('["camera_displacement-3"]')
    after = mixture.load(tmp_path, cache_dir=tmp_path / "cache")
    assert (len(after), sum(after["label_suspect"])) == (119, 0)
    erratum.unlink()
    assert sum(mixture.load(tmp_path, cache_dir=tmp_path / "cache")["label_suspect"]) == 60


def test_load_names_a_bad_row_or_skips_it(tmp_path):
    mixture = Mixture(name="one", sources=[MixtureSource(reader="vsi_590k", path="VSI-590K")])
    rows = [vsi_row(0), {**vsi_row(1), "conversations": []}, vsi_row(2)]
    write_lines(tmp_path / "VSI-590K" / "vsi_590k.jsonl", rows)
    with pytest.raises(ValueError, match=r"vsi_590k cannot be written: Row 1 of vsi_590k\.jsonl .* `on_error='skip'`"):
        mixture.load(tmp_path, cache_dir=tmp_path / "cache")
    assert len(mixture.load(tmp_path, cache_dir=tmp_path / "cache", on_error="skip")) == 2


def test_rows_without_their_media_are_left_out_if_asked(tmp_path, caplog):
    make_data(tmp_path, num_vsi=70)
    (tmp_path / "VSI-590K" / "scannet" / "scene0002_00.mp4").unlink()
    source = MixtureSource(reader="vsi_590k", path="VSI-590K", skip_missing_media=True)
    with caplog.at_level(logging.WARNING):
        kept = list(source.stream(tmp_path))
    # Of 70 rows about 7 scenes, ten are about the third.
    assert len(kept) == 60
    assert "skipped 10 rows without their video or image; scannet/scene0002_00.mp4 is not in" in caplog.text
    assert len(Mixture(name="one", sources=[source]).load(tmp_path, cache_dir=tmp_path / "cache")) == 60


def test_options_reach_the_reader(tmp_path):
    make_data(tmp_path)
    options = {"dropped_ids": ["camera_displacement-3"]}
    source = MixtureSource(reader="vlm_3r", path="VLM-3R-DATA", options=options)
    assert len(list(source.stream(tmp_path))) == 119


def test_patterns_include_the_list_of_withdrawn_rows():
    source = MixtureSource(reader="vlm_3r", path="VLM-3R-DATA", data_files=["vstibench_train/*.json"])
    assert source.patterns == ["vstibench_train/*.json", "vstibench_train/erratum_dropped_items.json"]


def write(tmp_path, text):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return path


def test_from_yaml_takes_the_name_of_its_file(tmp_path):
    path = write(tmp_path, "sources:\n  - {reader: smit, path: S-MiT}\n")
    assert Mixture.from_yaml(path) == Mixture(name="own", sources=[MixtureSource(reader="smit", path="S-MiT")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [", "is not a YAML file"),
        ("just text", "must have the keys .* got 'just text'"),
        ("weights: 1\nsources: []", r"got also \['weights'\]"),
        ("sources: {}", "`sources` .* must be a list"),
        ("sources: []", "at least one dataset"),
        ("sources: [{reader: vica, path: x, fractoin: 1}]", r"got also \['fractoin'\]"),
        ("sources: [{reader: vico, path: x}]", "`reader` must be one of .* got 'vico'"),
        ("sources: [{reader: vica, path: x, fraction: 0}]", r"`fraction` of vica must lie in \(0, 1\], got 0"),
        ("sources: [{reader: vica, path: x, fraction: 1.5}]", "got 1.5"),
        ("sources: [{reader: vica, path: x, fraction: 1e-1}]", "got '1e-1'"),  # YAML reads this as text
        ("sources: [{reader: vica, path: x, weight: -1}]", "`weight` of vica"),
        (
            "sources: [{reader: vica, path: x, reworded_fraction: -0.1}]",
            r"`reworded_fraction` of vica must lie in \[0, 1\], got -0.1",
        ),
        (
            "sources: [{reader: vica, path: x, bare_fraction: 2}]",
            r"`bare_fraction` of vica must lie in \[0, 1\], got 2",
        ),
        ("sources: [{reader: vica, path: x, revision: 1234567}]", "`revision` .* in quotes .* got 1234567"),
        ("sources: [{reader: vica, path: x, data_files: y}]", "`data_files` of vica must be a list"),
        (
            "sources: [{reader: vica, path: x, data_files: []}]",
            r"`data_files` of vica must be a list of patterns, got \[\]",
        ),
        ("sources: [{reader: vica}]", r"lacks \['path'\]"),
        ("sources: [{reader: [a], path: x}]", r"`reader` must be one of .* got \['a'\]"),
        ("sources: [{reader: vica, path: x, weight: .inf}]", "got inf"),
        ("sources: [{reader: vica, path: x, skip_missing_media: 1}]", "must be true or false, got 1"),
        ("sources: [{reader: vica, path: x, options: [a]}]", r"must be a mapping, got \['a'\]"),
        ("suspect_labels: hide\nsources: [{reader: vica, path: x}]", "`suspect_labels` must be one of"),
        ("seed: -1\nsources: [{reader: vica, path: x}]", "`seed` must be a whole number from 0, got -1"),
    ],
)
def test_from_yaml_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Mixture.from_yaml(write(tmp_path, text))


def test_from_yaml_runs_no_code(tmp_path):
    path = write(tmp_path, f"sources: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    with pytest.raises(ValueError, match="is not a YAML file"):
        Mixture.from_yaml(path)
    assert not (tmp_path / "made").exists()


def test_mixture_path_names_the_shipped_ones():
    with pytest.raises(FileNotFoundError, match=r"no mixture at stage3.*'stage2'"):
        mixture_path("stage3")


def test_stream_refuses_a_rank_outside_its_world(data):
    with pytest.raises(ValueError, match=r"`rank` must lie in \[0, 2\), got 2"):
        stage2().stream(data, rank=2, world_size=2)


def test_source_without_folder_or_hub_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"smit needs its files in {tmp_path}/S-MiT"):
        MixtureSource(reader="smit", path="S-MiT").root(tmp_path)


@pytest.mark.parametrize("revision", [None, "b" * 40])
def test_source_without_folder_is_fetched_from_the_hub_at_one_commit(tmp_path, monkeypatch, caplog, revision):
    """The Hub's client is replaced: only which commit and which files are asked for is tested here."""
    asked = []

    class Api:
        def dataset_info(self, repo_id):
            return type("Info", (), {"sha": "a" * 40})

    def download(repo_id, **options):
        asked.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(mixtures, "HfApi", Api)
    monkeypatch.setattr(mixtures, "snapshot_download", download)
    source = MixtureSource(reader="vica", path="none", data_files=["*/base/*.json"], revision=revision)
    with caplog.at_level(logging.WARNING):
        assert source.root(tmp_path) == tmp_path
    ((repo_id, options),) = asked
    assert repo_id == "nkkbr/ViCA-322K"
    assert options == {
        "repo_type": "dataset",
        "revision": revision or "a" * 40,
        "allow_patterns": ["*/base/*.json"],
    }
    assert ("is not pinned: took commit " + "a" * 40 in caplog.text) == (revision is None)


SCRIPT = """
import sys
from geode.data.mixtures import Mixture
rank = int(sys.argv[1])
for record in Mixture.from_yaml(sys.argv[2]).stream(sys.argv[3], rank=rank, world_size=2):
    print(record["uid"])
"""


def test_two_processes_together_read_each_record_once(data, tmp_path):
    path = write(
        tmp_path,
        "sources:\n  - {reader: vsi_590k, path: VSI-590K, fraction: 0.5}\n  - {reader: vlm_3r, path: VLM-3R-DATA}\n",
    )
    environment = {**os.environ, "PYTHONHASHSEED": "random"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(path), str(data)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    shares = [run.communicate()[0].split("\n")[:-1] for run in runs]
    assert all(run.returncode == 0 for run in runs)
    assert all(shares)
    assert sorted(shares[0] + shares[1]) == sorted(uids(Mixture.from_yaml(path).stream(data)))


def test_shipped_mixtures_are_in_the_package():
    assert (
        mixture_path("stage2").parent == Path(mixtures.__file__).parents[1] / "configuration" / "recipes" / "mixtures"
    )
