# SPDX-License-Identifier: Apache-2.0
"""Arguments of `geode push`, `geode check` and `geode card`, apart from what they do, so that `geode --help` is quick."""

import argparse


def add_commands(commands) -> None:
    """
    Add the commands that publish.

    Args:
        commands (`argparse._SubParsersAction`): The subcommands of `geode`.
    """
    push = commands.add_parser(
        "push",
        help="check a folder and upload it to the Hub",
        description="Check a folder and upload it to the Hub; a model that is not exported yet is exported first. The access token is "
        "that of `hf auth login` or HF_TOKEN. Run it again after an interruption: files that have arrived are not sent again.",
    )
    push.add_argument(
        "source", metavar="DIR_OR_MODEL", help="an exported folder, or a checkpoint's folder or name on the Hub"
    )
    push.add_argument("repo_id", metavar="ORG/NAME", help="the repository; it is made if it is not there")
    add_card_sources(push)
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.add_argument("--revision", metavar="BRANCH", help="branch to upload to; it is made if it is not there")
    push.add_argument("--tag", help="tag of the commit, which must be new")
    push.add_argument("--message", help="the commit's message")
    push.add_argument(
        "--repo-type", choices=("model", "dataset", "space"), default="model", help="what it is (default: model)"
    )
    push.set_defaults(run=_run_push)

    check = commands.add_parser(
        "check",
        help="check a folder or repository as a stranger would find it",
        description="Check a folder, or a repository on the Hub: pickles and access tokens in its files, the recorded hashes, the card, and "
        "then whether it loads and its snippet runs where this package is not installed. That runs its code. An adapter is compared "
        "with its base model and loaded on it instead. One line for each problem; exit code 1 if there is one.",
    )
    check.add_argument("source", metavar="DIR_OR_ID", help="a folder, or a name on the Hub")
    check.add_argument("--revision", help="branch, tag or commit of a name on the Hub")
    check.add_argument("--base", metavar="DIR", help="of an adapter: the folder of its base model")
    check.set_defaults(run=_run_check)

    card = commands.add_parser(
        "card",
        help="write the card of an adapter, a dataset, a metric or the Space",
        description="Write the card, the licence and what belongs to them into a folder. A model gets its card by `geode export`.",
    )
    card.add_argument(
        "kind", choices=("adapter", "dataset", "metric", "space"), help="what the folder holds, or will hold"
    )
    card.add_argument("directory", metavar="DIR", help="the folder; that of a metric or of the Space is made")
    add_card_sources(card)
    card.set_defaults(run=_run_card)


def add_card_sources(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what a card states."""
    parser.add_argument("--facts", metavar="FILE", help="YAML with what the card must state, see docs/hub.md")
    parser.add_argument(
        "--results",
        metavar="DIR",
        action="append",
        default=[],
        help="a folder of `geode eval` for the card; may be repeated",
    )


def _run_push(arguments: argparse.Namespace) -> None:
    from geode.publishing import push

    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "source", "repo_id")}
    push(arguments.source, arguments.repo_id, **options)


def _run_check(arguments: argparse.Namespace) -> int:
    from geode.publishing import print_report

    return print_report(arguments.source, revision=arguments.revision, base=arguments.base)


def _run_card(arguments: argparse.Namespace) -> None:
    from geode.publishing import write_card

    write_card(arguments.kind, arguments.directory, facts=arguments.facts, results=arguments.results)


__all__ = ["add_card_sources", "add_commands"]
