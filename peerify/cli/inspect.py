"""`peerify inspect`."""

from __future__ import annotations

from typing import Any

import click

from peerify.cli.base import cli, common, given_flags, library, overridable, promoted, require_calibration
from peerify.config.recipe import Recipe
from peerify.errors import UsageError

HEADER_ONLY = ("convert.active", "revision", "trust_remote_code")  # what a look at the config alone takes


@cli.command()
@click.argument("model", required=False)
@click.option(
    "--plan",
    is_flag=True,
    help="Load MODEL, measure how sensitive each layer is, and show what convert would do with the same options.",
)
@promoted("--active", type=float, metavar="SHARE")
@promoted("--max-loss", type=float, metavar="RATIO")
@promoted("--layers", metavar="WHICH")
@promoted("--allocation", metavar="HOW")
@promoted("--calibration", multiple=True, metavar="TEXT")
@promoted("--calibration-tokens", type=int)
@promoted("--context", type=int)
@promoted("--device")
@promoted("--dtype")
@click.option("--recipe", "recipe_file", metavar="FILE", help="YAML recipe to plan for; flags win over it.")
@overridable
@promoted("--revision", metavar="REV")
@promoted("--trust-remote-code", is_flag=True)
@common
def inspect(
    model: str | None, plan: bool, recipe_file: str | None, overrides: tuple[str, ...], as_json: bool, **flags: Any
) -> None:
    """Show which layers of MODEL can be converted and what that would save; loads no weights.

    With --plan it does load them, and measures with the text given by --calibration what an error costs in each
    layer: a table shows how much each would retrieve, which ones --layers auto leaves dense, and the perplexity to
    expect. Only --active, --revision and --trust-remote-code work without --plan.

    \b
    Examples:
      peerify inspect HuggingFaceTB/SmolLM2-135M
      peerify inspect ./llama --active 0.25
      peerify inspect model.gguf --json
      peerify inspect ./llama --plan --calibration text.txt --active 0.5
      peerify inspect ./llama --plan --calibration text.txt --layers auto --max-loss 1.1
      peerify inspect --plan --recipe recipe.yaml
    """
    if model is None and not (plan and recipe_file):
        raise click.MissingParameter(param_type="argument", param_hint="'MODEL'")
    given = given_flags(flags)
    if plan:
        _plan(model, recipe_file, overrides, given, as_json)
        return
    header = {key.removeprefix("convert."): given.pop(key)[1] for key in HEADER_ONLY if key in given}
    extra = [flag for flag, _ in given.values()] + ["--recipe"] * bool(recipe_file) + ["--set"] * bool(overrides)
    if extra:
        raise UsageError(f"{extra[0]} is for a plan: add --plan, which loads the model and measures")
    with library(as_json) as progress:
        from peerify.conversion.inspection import inspect_model

        result = inspect_model(str(model), **header, progress=progress)
    from peerify.cli import tables

    tables.print_json(result) if as_json else tables.print_inspection(result)


def _plan(
    model: str | None,
    recipe_file: str | None,
    overrides: tuple[str, ...],
    given: dict[str, tuple[str, Any]],
    as_json: bool,
) -> None:
    if model is not None:
        given["model"] = ("MODEL", model)
    # A recipe names a folder to write; a plan writes nothing.
    recipe = Recipe.load(recipe_file, overrides, given | {"output": ("OUT", "OUT")})
    require_calibration(recipe)
    with library(as_json) as progress:
        from peerify.conversion.preview import plan_checkpoint

        result = plan_checkpoint(recipe, progress=progress)
    from peerify.cli import tables

    tables.print_json(result) if as_json else tables.print_plan(result)
