"""`peerify convert`."""

from __future__ import annotations

from typing import Any

import click

from peerify.cli.base import cli, common, given_flags, library, overridable, promoted, require_calibration
from peerify.config.recipe import Recipe


@cli.command()
@click.argument("model", required=False)
@click.argument("out", required=False)
@click.option("--recipe", "recipe_file", metavar="FILE", help="YAML recipe; what the command line says wins over it.")
@overridable
@promoted("--layers", metavar="WHICH")
@promoted("--active", type=float, metavar="SHARE")
@promoted("--max-loss", type=float, metavar="RATIO")
@promoted("--allocation", metavar="HOW")
@promoted("--num-heads", type=int)
@promoted("--topk", type=int)
@promoted("--num-experts", type=int)
@promoted("--preset", metavar="NAME")
@promoted("--calibration", multiple=True, metavar="TEXT")
@promoted("--calibration-tokens", type=int)
@promoted("--context", type=int)
@promoted("--seed", type=int)
@promoted("--device")
@promoted("--dtype")
@promoted("--max-shard-size", metavar="SIZE")
@promoted("--overwrite", is_flag=True)
@promoted("--revision", metavar="REV")
@promoted("--trust-remote-code", is_flag=True)
@common
@click.pass_context
def convert(
    ctx: click.Context,
    model: str | None,
    out: str | None,
    recipe_file: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Convert the dense model MODEL into a PEER model in the folder OUT.

    Its feed-forward layers then spend less compute on each token (--active), at some loss of quality. The neurons
    become the experts; the text given with --calibration decides how they are arranged and retrieved. --layers auto
    with --active or --max-loss turns a stated price into a plan of layers and shares, which `peerify inspect --plan`
    shows beforehand. OUT appears when everything is done: an interrupted run leaves it as it was.

    \b
    Examples:
      peerify convert HuggingFaceTB/SmolLM2-135M smol-peer --calibration calibration.txt
      peerify convert ./llama llama-peer --calibration wikitext:wikitext-2-raw-v1 --active 0.25
      peerify convert ./llama llama-peer --calibration text.txt --layers auto --max-loss 1.1
      peerify convert gpt2 gpt2-peer --calibration calibration.txt --layers 4-11 --num-heads 8 --topk 64
      peerify convert --recipe recipe.yaml --set convert.gates=sigmoid --overwrite
    """
    given: dict[str, tuple[str, Any]] = {}
    if model is not None:
        given["model"] = ("MODEL", model)
    if out is not None:
        given["output"] = ("OUT", out)
    recipe = Recipe.load(recipe_file, overrides, given | given_flags(flags))
    ctx.meta["peerify.output"] = recipe.output
    require_calibration(recipe)
    with library(as_json) as progress:
        from peerify.conversion.checkpoint import convert_checkpoint

        result = convert_checkpoint(recipe, progress=progress)
    from peerify.cli import tables
    from peerify.conversion.inspection import converted_layers

    tables.print_json(result) if as_json else tables.print_conversion(result, converted_layers(recipe.output))
