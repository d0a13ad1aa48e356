"""Which files of calm_core and stages a module imports, directly or not, read from the source alone."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("calm_core", "stages")


def imported_files(path: str) -> set[str]:
    """Repository paths of all modules of ours that the file at ``path`` needs, itself left out."""
    found: set[str] = set()
    open_paths = [path]
    while open_paths:
        for imported in _direct(open_paths.pop()) - found:
            found.add(imported)
            open_paths.append(imported)
    return found - {path}


def _direct(path: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    files = {f"{name.replace('.', '/')}.py" for name in names if name.split(".")[0] in PACKAGES}
    return {file for file in files if (ROOT / file).is_file()}
