"""What `make mutants` found, by module: how many faults the tests notice, and the name of each that they do not.

mutmut's `results` lists survivors alone. A fault counts as noticed when a test fails, the process crashes, mypy objects
or the time runs out; a fault in a function that no quick test calls ("no tests") does not.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from mutmut.stats import status_by_exit_code

UNNOTICED = ("survived", "no tests")


def verdicts(folder: Path) -> dict[str, dict[str, str]]:
    """Of each module below ``folder``, mutmut's, its mutants and mutmut's word for what became of each."""
    modules = {}
    for path in sorted(folder.rglob("*.py.meta")):
        exit_codes: dict[str, int | None] = json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
        if exit_codes:
            name = str(path.relative_to(folder)).removesuffix(".meta")
            modules[name] = {mutant: status_by_exit_code[code] for mutant, code in exit_codes.items()}
    return modules


def main() -> None:
    """Print a line for each module of the folder in the first argument, then each mutant that nothing noticed."""
    modules = verdicts(Path(sys.argv[1]))
    counts = {name: Counter(found.values()) for name, found in modules.items()}
    counts["all"] = sum(counts.values(), Counter())
    words = sorted(counts["all"])
    width = max(map(len, counts))
    print(" " * width, *words, sep="  ")
    for name, count in counts.items():
        print(f"{name:{width}}", *(f"{count[word]:{len(word)}}" for word in words), sep="  ")
    for found in modules.values():
        for mutant, word in found.items():
            if word in UNNOTICED:
                print(f"{word}: {mutant}")


if __name__ == "__main__":
    main()
