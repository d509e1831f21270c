# SPDX-License-Identifier: Apache-2.0
"""What `geode push`, `geode check` and `geode card` do, and what `geode export` adds to the files of a model."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import RepoCard

from geode.hub_cards.adapter_check import ADAPTER_CONFIG
from geode.hub_cards.check import check
from geode.hub_cards.facts import FACTS, CardFacts, read_facts
from geode.hub_cards.manifest import MANIFEST, write_manifest
from geode.hub_cards.push import push_folder
from geode.hub_cards.terms import OWN_LICENSE, Part, apache_text, license_file


METRIC = "vsi_bench"
METRIC_PAGE = """<!doctype html>
<title>{title}</title>
<p>This Space holds a metric for <code>evaluate.load</code>; its card says how it is used.</p>
"""


def save_model(
    folder: Path,
    checkpoint,
    facts: CardFacts,
    *,
    results: Sequence[str | os.PathLike] = (),
    repo_id: str | None = None,
) -> None:
    """
    Save a GEODE model and its processor with what a repository needs beside them: card, licence, results, record of the files.

    Args:
        folder (`Path`): Where to.
        checkpoint ([`Checkpoint`]): Model and processor.
        facts ([`CardFacts`]): What the card states and the model does not tell.
        results (`Sequence[str | os.PathLike]`): Folders that `geode eval` has written for this model.
        repo_id (`str`, *optional*): Its name on the Hub, for the snippet of the card.

    Raises:
        FileNotFoundError: If there are no results where some are named.
        ValueError: If the facts miss a part of the model, or results are those of another model.
    """
    from geode.evaluating import model_revision
    from geode.evaluation.results import commit_of_code
    from geode.hub_cards.cards import build_model_card, read_results

    for source, scores in zip(results, read_results(results), strict=True):
        revision = model_revision(checkpoint.model)
        if scores["run"]["model_revision"] != revision:
            raise ValueError(
                f"The results in {source} must be of this model ({revision}), got those of {scores['run']['model']} "
                f"({scores['run']['model_revision']}). Ask this model with `geode eval`."
            )
    # Before the weights, which may be large, whatever may be refused.
    card = build_model_card(
        checkpoint.model, checkpoint.processor, facts, results=results, repo_id=repo_id, commit=commit_of_code()
    )
    folder.mkdir(parents=True, exist_ok=True)
    copy_results(folder, results)
    checkpoint.model.save_pretrained(folder)
    checkpoint.processor.save_pretrained(folder)
    complete(folder, card, facts.license, facts.parts)


def complete(
    folder: Path, card: RepoCard, license_id: str | None, parts: Sequence[Part], *, is_recorded: bool = True
) -> None:
    """
    Add to a folder what is not its content: licence, card, and the record of its files.

    Args:
        folder (`Path`): The folder.
        card (`RepoCard`): Its card.
        license_id (`str`, *optional*): Licence of what was trained or made here; None where nothing was.
        parts (`Sequence[Part]`): What it is made of.
        is_recorded (`bool`, defaults to `True`): False leaves out the record, which is for models and adapters.
    """
    (folder / "LICENSE").write_text(license_file(license_id, parts), encoding="utf-8")
    card.save(folder / "README.md")
    if is_recorded:
        write_manifest(folder, license_id=license_id or OWN_LICENSE, parts=parts)


def copy_results(folder: Path, results: Sequence[str | os.PathLike]) -> None:
    """
    Copy the results that the Hub reads, one file for each benchmark; of a benchmark that is not on the Hub there are none.

    Args:
        folder (`Path`): Where to.
        results (`Sequence[str | os.PathLike]`): Folders of `geode eval`.

    Raises:
        ValueError: If two of them are of the same benchmark and subset.
    """
    files: dict[str, list[dict]] = {}
    for source in results:
        for path in sorted((Path(source) / ".eval_results").glob("*.yaml")):
            entries = files.setdefault(path.name, [])
            for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
                if entry["dataset"] in [other["dataset"] for other in entries]:
                    raise ValueError(f"Two of the results are of {entry['dataset']}. Leave one out.")
                entries.append(entry)
    for name, entries in files.items():
        (folder / ".eval_results").mkdir(exist_ok=True)
        (folder / ".eval_results" / name).write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")


def push(
    source: str | os.PathLike,
    repo_id: str,
    *,
    facts: str | os.PathLike | None = None,
    results: Sequence[str | os.PathLike] = (),
    repo_type: str = "model",
    **options,
) -> None:
    """
    Upload a folder as it is if it was exported, or holds an adapter, a dataset or a Space; else export it first. Prints where.

    Args:
        source (`str` or `os.PathLike`): A folder, or a checkpoint's name on the Hub.
        repo_id (`str`): The repository.
        facts (`str` or `os.PathLike`, *optional*): For the card of a model that is not exported yet, see `export_model`.
        results (`Sequence[str | os.PathLike]`): Likewise.
        repo_type (`str`, defaults to `"model"`): See `geode.hub_cards.push.push_folder`.
        **options: Others of it.

    Raises:
        ValueError: See `push_folder` and `export_model`; or if facts are given for a folder that has its card.
    """
    folder = Path(source)
    is_ready = repo_type != "model" or any((folder / name).is_file() for name in (MANIFEST, ADAPTER_CONFIG))
    if is_ready and (facts is not None or results):
        raise ValueError(
            f"`facts` and `results` are for a model that is not exported yet, and {source} is. Leave them out."
        )
    if is_ready:
        pushed = push_folder(folder, repo_id, repo_type=repo_type, **options)
    else:
        from geode.commands import export_model

        with tempfile.TemporaryDirectory(prefix="geode-push-") as place:
            folder = Path(place) / repo_id.rpartition("/")[2]
            export_model(folder, model=source, facts=facts, results=results, repo_id=repo_id)
            pin_snippet(folder / "README.md", options.get("tag"))
            pushed = push_folder(folder, repo_id, repo_type=repo_type, **options)
    print(f"pushed: {pushed.url}")
    if pushed.tag is not None:
        print(f"tagged: {pushed.tag}")


def pin_snippet(card: Path, tag: str | None) -> None:
    """Let the snippet of a new card load the tag that its commit will have; a commit cannot name itself."""
    if tag is not None:
        text = card.read_text(encoding="utf-8")
        card.write_text(text.replace('revision = "main"', f'revision = "{tag}"', 1), encoding="utf-8", newline="\n")


def print_report(
    source: str | os.PathLike, *, revision: str | None = None, base: str | os.PathLike | None = None
) -> int:
    """
    Check a folder or repository, and print what is wrong, a line each.

    Args:
        source (`str` or `os.PathLike`): See `geode.hub_cards.check.check`.
        revision (`str`, *optional*): See there.
        base (`str` or `os.PathLike`, *optional*): See there.

    Returns:
        `int`: 1 if anything is wrong, else 0.
    """
    report = check(source, revision=revision, base=base)
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems:
        print(f"problem: {problem}")
    print(f"checked: {source}, {len(report.problems) or 'no'} problem{'' if len(report.problems) == 1 else 's'}")
    return 1 if report.problems else 0


def write_card(
    kind: str,
    directory: str | os.PathLike,
    *,
    facts: str | os.PathLike | None = None,
    results: Sequence[str | os.PathLike] = (),
) -> None:
    """
    Write the card of an adapter, a dataset, a metric or the Space, and what belongs to it. Prints its path.

    Args:
        kind (`str`): `"adapter"`, `"dataset"`, `"metric"` or `"space"`.
        directory (`str` or `os.PathLike`): The folder; that of a metric or of the Space is made, with its files in it.
        facts (`str` or `os.PathLike`, *optional*): See `geode.hub_cards.facts.read_facts`; of a metric the shipped ones are the default,
            and the Space has none.
        results (`Sequence[str | os.PathLike]`): For the card of an adapter: folders of `geode eval`.

    Raises:
        FileNotFoundError: If folder, facts or results are missing.
        ValueError: If the facts are not complete, there are none, they name another base model than the adapter does, or results have
            no place on the card.
    """
    from geode.hub_cards.cards import build_adapter_card, build_dataset_card, build_metric_card

    folder = Path(directory)
    if kind == "space":
        if facts is not None or results:
            raise ValueError(
                "The card of the Space takes neither `facts` nor `results`. Leave them out, and edit its README.md."
            )
        _write_space(folder)
        print(f"card: {folder / 'README.md'}")
        return
    if facts is None and kind != "metric":
        raise ValueError(
            f"`facts` must name a YAML file, got none: the card of a {kind} states more than its files tell."
        )
    if results and kind != "adapter":
        raise ValueError(f"`results` are for models and adapters, got {list(results)} for a {kind}. Leave them out.")
    if kind != "metric" and not folder.is_dir():
        raise FileNotFoundError(f"`directory` must be a folder, and there is none at {str(folder)!r}.")
    found = read_facts(FACTS / f"{METRIC}.yaml" if facts is None else facts, kind)
    if kind == "adapter":
        card, parts = build_adapter_card(folder, found, results=results), [found.base_model]
        _name_base(folder / ADAPTER_CONFIG, found.base_model)
        copy_results(folder, results)
    elif kind == "dataset":
        card, parts = build_dataset_card(folder, found), found.data
    else:
        card, parts = build_metric_card(found), []
        _write_metric(folder, found)
    complete(folder, card, found.license, parts, is_recorded=kind == "adapter")
    print(f"card: {folder / 'README.md'}")


def _name_base(path: Path, base: Part) -> None:
    """Let the settings of an adapter name the base model that its card states, where training has left a path or no commit."""
    if not base.is_on_hub:
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    stated = {"base_model_name_or_path": base.source, "revision": base.revision}
    for key, value in stated.items():
        known = settings.get(key)
        if value is None or known in (None, "", value) or (key != "revision" and not Part(key, known, None).is_on_hub):
            continue
        raise ValueError(
            f"`base_model` of the facts is {base.source!r} at {base.revision!r}, and {path} has {known!r} as `{key}`. Correct the facts."
        )
    settings |= {key: value for key, value in stated.items() if value is not None}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_metric(folder: Path, facts: CardFacts) -> None:
    from geode.evaluation.vsi_bench import vsi_bench

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(vsi_bench.__file__, folder / f"{METRIC}.py")
    (folder / "index.html").write_text(METRIC_PAGE.format(title=facts.name), encoding="utf-8")


def _write_space(folder: Path) -> None:
    from geode.hub_cards import space

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("README.md", "app.py", "requirements.txt"):
        shutil.copy(Path(space.__file__).with_name(name), folder / name)
    (folder / "LICENSE").write_text(apache_text(), encoding="utf-8")


__all__ = ["complete", "copy_results", "pin_snippet", "print_report", "push", "save_model", "write_card"]
