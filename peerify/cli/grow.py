"""`peerify grow`."""

from __future__ import annotations

from typing import Any

import click

from peerify.cli.base import cli, common, given_flags, library, overridable, promoted, require_calibration
from peerify.config.recipe import Recipe


@cli.command()
@click.argument("folder")
@click.argument("out")
@click.option("--recipe", "recipe_file", metavar="FILE", help="YAML recipe; what the command line says wins over it.")
@overridable
@promoted("--num-experts", to_grow=True, type=int, metavar="N")
@promoted("--layers", to_grow=True, metavar="WHICH")
@promoted("--share-pool", to_grow=True, is_flag=True)
@promoted("--heads", to_grow=True, type=int)
@promoted("--topk", to_grow=True, type=int)
@promoted("--seed", to_grow=True, type=int)
@promoted("--calibration", multiple=True, metavar="TEXT")
@promoted("--calibration-tokens", type=int)
@promoted("--context", type=int)
@promoted("--device")
@click.option("--dtype", help="Number type of all weights from now on; by default the one they are stored in.")
@promoted("--max-shard-size", metavar="SIZE")
@promoted("--overwrite", is_flag=True)
@common
@click.pass_context
def grow(
    ctx: click.Context,
    folder: str,
    out: str,
    recipe_file: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Give layers of the converted model in FOLDER many more experts, and write it to OUT.

    The new experts lie beside the layer's own, are found by product keys, and add nothing until they are trained: OUT
    computes what FOLDER computes. Keys are fitted to the text given with --calibration, so that all new experts can be
    found from the first step of training. What a token costs hardly depends on their number.

    \b
    Examples:
      peerify grow smol-peer smol-grown --num-experts 1048576 --layers 14 --dtype bfloat16 --calibration text.txt
      peerify grow smol-peer smol-grown --num-experts 65536 --layers 10-14 --share-pool --calibration text.txt
      peerify grow smol-peer smol-grown --set grow.grid=[128,256] --num-experts 32768 --calibration text.txt
    """
    given = {"model": ("FOLDER", folder), "output": ("OUT", out)}
    recipe = Recipe.load(recipe_file, overrides, given | given_flags(flags))
    ctx.meta["peerify.output"] = recipe.output
    require_calibration(recipe, "growth")
    with library(as_json) as progress:
        from peerify.conversion.growth_checkpoint import grow_checkpoint

        result = grow_checkpoint(recipe, progress=progress)
    from peerify.cli import tables
    from peerify.conversion.inspection import converted_layers

    tables.print_json(result) if as_json else tables.print_growth(result, converted_layers(recipe.output))
