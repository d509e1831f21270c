# SPDX-License-Identifier: Apache-2.0
"""
Publish: write a folder for the Hub, check it as a stranger would, and upload it if a repository is named.

    python examples/publish.py
    python examples/publish.py --model example-lora/merged --facts facts.yaml --repo-id ORG/NAME

The folder has weights, code, card, licence and hashes. `facts.yaml` says what no file tells: docs/hub.md shows one; those of the shipped
checkpoint are known. The check runs the folder's code in a process that does not find this package. Nothing leaves the machine without
`--repo-id`; the access token is that of `hf auth login`.
"""

import argparse
import sys
from pathlib import Path

from geode.commands import export_model
from geode.hub_cards.licences import licence_report
from geode.publishing import print_report, push


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a checkpoint's folder; by default the shipped one")
parser.add_argument("--facts", type=Path, help="YAML with what the card must state")
parser.add_argument("--results", type=Path, action="append", default=[], help="a folder of results for the card")
parser.add_argument("--out", type=Path, default=Path("example-export"), help="a folder that is new or empty")
parser.add_argument("--repo-id", metavar="ORG/NAME", help="upload to this repository, which stays private")
options = parser.parse_args()

export_model(options.out, model=options.model, facts=options.facts, results=options.results, repo_id=options.repo_id)
print(licence_report(options.out))
if print_report(options.out) != 0:
    sys.exit(f"{options.out} has problems, and is not to be published")
if options.repo_id is not None:
    push(options.out, options.repo_id, private=True)
