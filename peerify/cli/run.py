"""`peerify run`."""

from __future__ import annotations

import click

from peerify.cli.base import cli, common, library, overridable, stopped
from peerify.config.recipe import Recipe


@cli.command()
@click.argument("recipe")
@overridable
@click.option("--overwrite", is_flag=True, help="Begin anew and replace earlier results of this recipe.")
@common
def run(recipe: str, overrides: tuple[str, ...], overwrite: bool, as_json: bool) -> None:
    """Do all of RECIPE: convert, train, evaluate, and publish where it has a `hub:` section.

    What is done already is not done again: the same command goes on where it was stopped (exit code 130 after
    Ctrl-C), in the middle of training from the newest checkpoint.

    \b
    Examples:
      peerify run recipes/smollm2-135m/demo.yaml
      peerify run recipe.yaml --set train.tokens=1000000 --set hub.repo=ada/smol-peer
    """
    loaded = Recipe.load(recipe, overrides)
    with library(as_json) as progress:
        from peerify.pipeline import run_recipe

        result = run_recipe(loaded, overwrite=overwrite, progress=progress)
    from peerify.cli import tables

    if as_json:
        tables.print_json(result)
    else:
        from peerify.conversion.inspection import converted_layers

        tables.print_run(result, converted_layers(loaded.output) if "convert" in result["done"] else [])
    if result["stopped"]:
        training = result[result["stopped"]]
        raise stopped(training["signal"], f"the same command goes on with training after step {training['steps']}")
