"""The `calm` command: a mistake of the user's is one line and exit status 2."""

import sys
from typing import Annotated

import typer

from calm_core.errors import CalmError
from calm_core.params import load_params
from calm_core.presets import apply_preset, preset_names

app = typer.Typer(
    help="Reproduce CALM. Start with `dvc repro`, then open results/report.html; change params.yaml and run it again.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def check() -> None:
    """Validate params.yaml."""
    load_params()
    typer.echo("params.yaml is valid")


@app.command()
def preset(name: Annotated[str, typer.Argument(help="A file of presets/, without its ending.")] = "") -> None:
    """Write a preset over params.yaml; without a name, list the presets."""
    if not name:
        typer.echo("\n".join(preset_names()))
        return
    apply_preset(name)
    typer.echo(f"params.yaml now follows presets/{name}.yaml; `git diff params.yaml` shows how, `dvc repro` runs it")


def main() -> None:
    """Run the command line."""
    try:
        app()
    except CalmError as error:
        print(f"calm: {error}", file=sys.stderr)
        sys.exit(2)
