# SPDX-License-Identifier: Apache-2.0
"""`geode push`: upload a folder to a repository on the Hub once it was checked."""

import hashlib
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import DatasetCard, HfApi, RepoFile, SpaceCard
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from geode.hub_cards.check import Problem, check_contents, check_files
from geode.hub_cards.manifest import hash_file


REPO_TYPES = ("model", "dataset", "space")
# Code and weights of an earlier export that this one no longer has.
STALE = ("*.py", "*.safetensors", "*.safetensors.index.json", ".eval_results/*")
CARDS = {"dataset": DatasetCard, "space": SpaceCard}


class Pushed(NamedTuple):
    """Where a folder went: the page of the last commit, its hash, and the tag, if one was set."""

    url: str
    commit: str
    tag: str | None


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    message: str | None = None,
) -> Pushed:
    """
    Upload a folder after it was checked; the repository and the branch are made if they are not there.

    An upload that was interrupted is repeated by the same call: large files that have arrived are not sent again. Where `hf_xet`
    is installed, the client may take several commits for a large folder; the tag goes to the last. The access token is the one
    that `hf auth login` or `HF_TOKEN` has set; it goes to the Hub's client alone.

    Args:
        folder (`str` or `os.PathLike`): What `geode export` has written, an adapter or dataset with its card, or a Space.
        repo_id (`str`): Name on the Hub, `ORG/NAME`.
        repo_type (`str`, defaults to `"model"`): `"model"`, `"dataset"` or `"space"`.
        private (`bool`, defaults to `False`): Make the repository private; one that is there and public is refused.
        revision (`str`, *optional*): Branch; it starts from the main one.
        tag (`str`, *optional*): Tag for the commit, which must be new, unless it names this content already: then an earlier call was
            interrupted after it had set it.
        message (`str`, *optional*): The commit's message.

    Returns:
        [`Pushed`]: Commit and tag.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If something is wrong with the folder, the name or the tag, or the repository is public against `private`.
        OSError: If there is no token, or the Hub refuses or is not reached.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` must be a folder, and there is none at {str(folder)!r}.")
    if repo_type not in REPO_TYPES:
        raise ValueError(f"`repo_type` must be one of {REPO_TYPES}, got {repo_type!r}.")
    validate_repo_id(repo_id)
    problems = check_files(folder) if repo_type == "model" else _check_other(folder, repo_type)
    if problems:
        listed = "; ".join(str(problem) for problem in problems[:3])
        raise ValueError(
            f"{folder} has {len(problems)} problem{'s' if len(problems) > 1 else ''} and was not uploaded. {listed}"
            f"{' ...' if len(problems) > 3 else ''} `geode check {folder}` lists all."
        )
    disable_progress_bars()
    api = HfApi()
    api.whoami()  # first, as its error says how to log in
    sdk = {"space_sdk": SpaceCard.load(folder / "README.md").data.sdk} if repo_type == "space" else {}
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True, **sdk).repo_id
    head, is_tagged = _check_repository(
        api, repo_id, repo_type, private=private, tag=tag, folder=folder, branch=revision
    )
    if head is not None:  # an earlier call was interrupted after all had arrived, or nothing has changed
        kind = "" if repo_type == "model" else f"{repo_type}s/"
        pushed = Pushed(f"{api.endpoint}/{kind}{repo_id}/commit/{head}", head, tag)
    else:
        pushed = _upload(api, repo_id, repo_type, folder, revision=revision, tag=tag, message=message)
    if tag is not None and not is_tagged:
        api.create_tag(repo_id, tag=tag, revision=pushed.commit, repo_type=repo_type)
    return pushed


def _upload(api: HfApi, repo_id: str, repo_type: str, folder: Path, *, revision, tag, message) -> Pushed:
    if revision is not None:
        api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    try:
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            revision=revision,
            delete_patterns=list(STALE) if repo_type == "model" else None,
            commit_message=message or f"Upload {folder.resolve().name}",
        )
    except RuntimeError as error:  # the client's, around the error of one file
        reason = error.__cause__ or error
        raise OSError(f"{error} ({reason}). Run it again: files that have arrived are not sent again.") from error
    return Pushed(str(commit.commit_url), commit.oid, tag)


def _check_repository(
    api: HfApi, repo_id: str, repo_type: str, *, private: bool, tag: str | None, folder: Path, branch: str | None
) -> tuple[str | None, bool]:
    """
    Refuse, before anything is sent, a public repository where a private one is wanted, and a tag that is taken.

    Returns the branch's last commit, if it has just what would be uploaded, and whether it has the tag.
    """
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise ValueError(
            f"`private` is true, and {repo_id} is there and public. Make it private on the Hub first, or leave it out."
        )
    refs = api.list_repo_refs(repo_id, repo_type=repo_type)
    heads = [ref.target_commit for ref in refs.branches if ref.name == (branch or "main")]
    head = heads[0] if heads and _is_there(api, repo_id, repo_type, folder, revision=heads[0]) else None
    tagged = [ref.target_commit for ref in refs.tags if ref.name == tag]
    if tagged and tagged != [head]:
        raise ValueError(
            f"`tag` must be new, and {repo_id} has {tag!r} already. Choose another one, or delete it on the Hub."
        )
    return head, bool(tagged)


def _is_there(api: HfApi, repo_id: str, repo_type: str, folder: Path, *, revision: str) -> bool:
    """Tell whether a commit has every file of a folder, by their hashes, and none that an upload would delete."""
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type)
    found = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    own = {path for path in paths if not path.startswith((".git/", ".cache/huggingface/"))}
    others = found.keys() - own if repo_type == "model" else ()
    if not own <= found.keys() or any(fnmatch(name, pattern) for name in others for pattern in STALE):
        return False
    return all(_has_content(found[name], folder / name) for name in own)


def _has_content(entry: RepoFile, path: Path) -> bool:
    if entry.lfs is not None:
        return entry.lfs.sha256 == hash_file(path)
    content = path.read_bytes()
    # Of a small file the Hub gives the hash that Git has for it.
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _check_other(folder: Path, repo_type: str) -> list[Problem]:
    problems = check_contents(folder)
    path = folder / "README.md"
    if not path.is_file():
        return [*problems, Problem("README.md", "there is no card", "Write one with `geode card`")]
    try:
        card = CARDS[repo_type].load(path, ignore_metadata_errors=False)
    except ValueError as error:
        return [*problems, Problem("README.md", f"its header cannot be read: {error}", "Correct it")]
    for name in ("license", *(["sdk"] if repo_type == "space" else [])):
        if not card.data.get(name):
            problems.append(Problem("README.md", f"its header has no `{name}`", "State it there"))
    return problems


__all__ = ["REPO_TYPES", "Pushed", "push_folder"]
