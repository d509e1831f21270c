# SPDX-License-Identifier: Apache-2.0
"""
Look the packages of an environment up in PyPI's record of known vulnerabilities, and list them as a CycloneDX bill of materials.

Ends with 0 if none has any, 1 if one has, and 2 if the record could not be asked: then nothing is known.
"""

import json
import subprocess
import sys
from pathlib import Path


def audit(tools: Path, environment: Path, out: Path) -> int:
    """Write `sbom.cdx.json` and `audit.json` into `out`, and print what was found. `tools` and `environment` are venvs."""
    out.mkdir(parents=True, exist_ok=True)
    sbom, report = out / "sbom.cdx.json", out / "audit.json"
    command = [tools / "bin" / "cyclonedx-py", "environment", environment, "--of", "JSON", "-o", sbom]
    subprocess.run([str(part) for part in command], check=True)
    print(f"bill of materials: {sbom}")
    (packages,) = environment.glob("lib/python3*/site-packages")
    report.unlink(missing_ok=True)
    command = [
        tools / "bin" / "pip-audit",
        "--path",
        packages,
        "--progress-spinner",
        "off",
        "-f",
        "json",
        "-o",
        report,
    ]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    entries = json.loads(report.read_text("utf-8"))["dependencies"] if report.is_file() else []
    asked = [entry for entry in entries if "vulns" in entry]
    if not asked:
        reason = entries[0]["skip_reason"] if entries else run.stderr.strip().splitlines()[-1]
        print(
            f"audit: PyPI's record of vulnerabilities could not be asked, so nothing is known: {reason}",
            file=sys.stderr,
        )
        return 2
    for entry in asked:
        for found in entry["vulns"]:
            mended = ", ".join(found["fix_versions"]) or "no version"
            print(f"{entry['name']} {entry['version']}: {found['id']}, mended in {mended}")
    unknown = [entry["name"] for entry in entries if "vulns" not in entry]
    print(f"audited: {len(asked)} packages; not in the record: {', '.join(unknown) or 'none'}")
    return int(any(entry["vulns"] for entry in asked))


if __name__ == "__main__":
    sys.exit(audit(*map(Path, sys.argv[1:])))
