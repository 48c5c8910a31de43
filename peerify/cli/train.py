"""`peerify train`."""

from __future__ import annotations

import click

from peerify.cli.base import cli, common, library, overridable, stopped
from peerify.config.recipe import Recipe


@cli.command()
@click.argument("recipe")
@overridable
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of this recipe's run.")
@click.option("--overwrite", is_flag=True, help="Start anew where an earlier run or result lies, and replace it.")
@click.option("--dry-run", is_flag=True, help="Print what would train, and what that takes; train nothing.")
@common
@click.pass_context
def train(
    ctx: click.Context,
    recipe: str,
    overrides: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train the converted model of RECIPE further, towards the dense model it came from.

    A short training wins back most of what conversion lost. The model is the recipe's `output`, the dense teacher
    its `model`; `train:` says on which text, with which losses, and what trains. Checkpoints, the log and curves go
    to the folder OUTPUT-run. Ctrl-C writes a checkpoint and ends the run with exit code 130; --resume goes on with
    it as if nothing had happened.

    \b
    Examples:
      peerify train recipe.yaml --dry-run
      peerify train recipe.yaml --set train.tokens=1000000
      peerify train recipe.yaml --resume
      accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m peerify train recipe.yaml
    """
    loaded = Recipe.load(recipe, overrides)
    from peerify.cli import tables

    if dry_run:
        with library(as_json) as progress:
            from peerify.training.dry_run import plan_training

            plan = plan_training(loaded, progress=progress)
        tables.print_json(plan) if as_json else tables.print_training_plan(plan)
        return
    with library(as_json) as progress:
        from peerify.training.train import train_checkpoint

        ctx.meta["peerify.output"] = loaded.trained_output
        result = train_checkpoint(loaded, resume=resume, overwrite=overwrite, progress=progress)
    if result is not None:  # the main process
        tables.print_json(result) if as_json else tables.print_training(result)
        if result["stopped"]:
            raise stopped(result["signal"], f"the same command with --resume goes on after step {result['steps']}")
