"""`peerify convert`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from peerify.cli.base import Command, cli, common, library
from peerify.errors import UsageError
from peerify.recipe import CalibrationConfig, PeerConfig, Recipe, describe

# The keys of a recipe that are also flags of `convert`; their texts and defaults live in the schema.
PROMOTED = {
    "--layers": "convert.layers",
    "--active": "convert.active",
    "--max-loss": "convert.max_loss",
    "--allocation": "convert.allocation",
    "--num-heads": "convert.num_heads",
    "--topk": "convert.topk",
    "--candidates": "convert.candidates",
    "--num-experts": "convert.num_experts",
    "--preset": "convert.preset",
    "--calibration": "calibration.data",
    "--calibration-tokens": "calibration.tokens",
    "--context": "calibration.context",
    "--seed": "convert.seed",
    "--device": "device",
    "--dtype": "dtype",
    "--revision": "revision",
    "--max-shard-size": "max_shard_size",
    "--overwrite": "overwrite",
    "--trust-remote-code": "trust_remote_code",
}


def promoted(flag: str, **settings: Any) -> Callable[[Command], Command]:
    """A flag of `convert` that is a key of the recipe, described there."""
    key = PROMOTED[flag]
    section, _, name = key.rpartition(".")
    model: Any = {"convert": PeerConfig, "calibration": CalibrationConfig, "": Recipe}[section]
    default = model.model_fields[name].default
    # The click default stays None, "not said", so that a recipe's own value is not overruled.
    is_plain = isinstance(default, str | int | float) and not isinstance(default, bool)
    text = f"{describe(key)}  [default: {default}]" if is_plain else describe(key)
    return click.option(flag, key.replace(".", "__"), default=None, help=text, **settings)


@cli.command()
@click.argument("model", required=False)
@click.argument("out", required=False)
@click.option("--recipe", "recipe_file", metavar="FILE", help="YAML recipe; what the command line says wins over it.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set any key of the recipe, such as convert.gates=sigmoid; repeatable.",
)
@promoted("--layers", metavar="WHICH")
@promoted("--active", type=float, metavar="SHARE")
@promoted("--max-loss", type=float, metavar="RATIO")
@promoted("--allocation", metavar="HOW")
@promoted("--num-heads", type=int)
@promoted("--topk", type=int)
@promoted("--candidates", type=int)
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

    The neurons become the experts; the text given with --calibration decides how they are arranged and
    retrieved. OUT appears when everything is done: an interrupted run leaves it as it was.

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
    for flag, key in PROMOTED.items():
        value = flags[key.replace(".", "__")]
        if value is not None and value is not False and value != ():  # 0 was said, too
            given[key] = (flag, list(value) if isinstance(value, tuple) else value)
    recipe = Recipe.load(recipe_file, overrides, given)
    ctx.meta["peerify.output"] = recipe.output
    if not recipe.calibration.sources:
        raise UsageError(
            "conversion needs calibration text: pass --calibration with a .txt file or a Hub dataset such as "
            "wikitext:wikitext-2-raw-v1"
        )
    with library(as_json) as progress:
        from peerify.folder import convert_checkpoint

        result = convert_checkpoint(recipe, progress=progress)
    from peerify import report
    from peerify.inspection import converted_layers

    report.print_json(result) if as_json else report.print_conversion(result, converted_layers(recipe.output))
