"""`make audit`: which packages of the lock file have known vulnerabilities, told in a line each.

pip-audit looks them up, in an environment of its own that the Makefile makes. By itself it calls a file in which it
could look up nothing free of vulnerabilities; here that is a failure of its own.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCK = Path("requirements.lock")

CLEAN, VULNERABLE, UNKNOWN = 0, 1, 2
"""Exit statuses."""


def main(pip_audit: str) -> int:
    """Run the program ``pip_audit`` over the lock file and print what it found; returns the exit status."""
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    try:
        done = subprocess.run(
            [pip_audit, "--requirement", str(LOCK), *options], capture_output=True, text=True, timeout=900
        )
        dependencies = json.loads(done.stdout)["dependencies"]
    except (OSError, subprocess.TimeoutExpired) as error:
        return _say([f"pip-audit did not run: {error}"], UNKNOWN)
    except (ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return _say([f"the database of vulnerabilities cannot be reached: {reason[:200]}"], UNKNOWN)
    return _say(*judge(dependencies))


def judge(dependencies: list[dict[str, Any]]) -> tuple[list[str], int]:
    """The lines that tell of pip-audit's ``dependencies``, and the exit status."""
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, "
        f"mended in {', '.join(found['fix_versions']) or 'no version'}"
        for package in dependencies
        for found in package.get("vulns", ())
    ]
    skipped = [package for package in dependencies if "skip_reason" in package]
    if skipped:
        many = f"{len(skipped)} of {len(dependencies)} packages could not be looked up"
        lines.append(f"{many}, so nothing is known of them: {skipped[0]['skip_reason']}")
    if not lines:
        lines = [f"no known vulnerability in {len(dependencies)} packages"]
    vulnerable = any(package.get("vulns") for package in dependencies)
    return lines, VULNERABLE if vulnerable else UNKNOWN if skipped else CLEAN


def _say(lines: list[str], status: int) -> int:
    for line in lines:
        print(f"audit: {line}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
