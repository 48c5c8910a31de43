"""`peerify bench` and `peerify env`."""

from __future__ import annotations

from typing import Any

import click

from peerify.cli.base import cli, common, library, loading
from peerify.cli.eval import COUNT, shares
from peerify.config.recipe import describe


def _counts(_: Any, __: Any, text: str) -> tuple[int, ...]:
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise click.BadParameter(f"{text} is no list of counts such as 1,4,16")
    return found


@cli.command()
@click.argument("model")
@click.option("--against", metavar="DENSE", required=True, help="The dense model that was converted.")
@click.option(
    "--active",
    metavar="SHARES",
    callback=shares,
    help="Budgets to measure, as shares of the dense layers' bytes, by commas; by default the model's own.",
)
@click.option(
    "--batch", "batches", metavar="COUNTS", callback=_counts, default="1,4,16", show_default=True,
    help="How many prompts are continued at once, by commas.",
)  # fmt: skip
@click.option("--prompt", type=COUNT, default=512, show_default=True, help="Tokens of the prompt that is read at once.")
@click.option("--new", type=COUNT, default=32, show_default=True, help="Tokens by which prompts are continued.")
@click.option("--repeats", type=COUNT, default=5, show_default=True, help="Measurements of each kind.")
@click.option("--device", default="cpu", show_default=True, help=describe("device"))
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Number type to compute in.",
)
@click.option("--train", is_flag=True, help="Measure a step of training, too, in which the PEER layers train.")
@click.option("--train-full", is_flag=True, help="Likewise a step in which everything trains.")
@click.option("--plot", metavar="FILE", help="Draw it, as .png, .svg or .pdf; needs `pip install 'peerify[plots]'`.")
@loading
@common
def bench(model: str, train: bool, train_full: bool, plot: str | None, as_json: bool, **settings: Any) -> None:
    """Measure how fast the converted MODEL decodes, reads prompts and trains beside its dense one.

    Both take turns in one run, generating from random prompts. "limit" is how much faster the model would be if the
    converted layers took just their share of the dense layers' time; what else the model does bounds it.

    A step of training is one of the recipes: two windows of --prompt tokens, next token and the divergence from the
    dense model, which is loaded a second time as the teacher, AdamW in float32 with mixed precision where --dtype
    asks for it. Of the dense model those layers train then that were converted.

    \b
    Examples:
      peerify bench smol-peer --against HuggingFaceTB/SmolLM2-135M
      peerify bench smol-peer --against HuggingFaceTB/SmolLM2-135M --active 0.25,0.5 --dtype bfloat16
      peerify bench smol-peer --against HuggingFaceTB/SmolLM2-135M --batch 1 --json
      peerify bench smol-peer --against HuggingFaceTB/SmolLM2-135M --train --dtype bfloat16
      peerify bench smol-peer --against HuggingFaceTB/SmolLM2-135M --active 0.75,0.5,0.25 --plot speed.png
    """
    from peerify.cli import bench_plot, bench_tables, tables

    picture = bench_plot.check_plot(plot) if plot is not None else None  # before minutes of measuring
    with library(as_json) as progress:
        from peerify.bench import bench_checkpoint

        trains: list[Any] = [*(["peer"] if train else []), *(["full"] if train_full else [])]
        result = bench_checkpoint(model, train=trains, progress=progress, **settings)
        if picture is not None:
            bench_plot.draw(result, picture)
    tables.print_json(result) if as_json else bench_tables.print_bench(result)


@cli.command()
@common
def env(as_json: bool) -> None:
    """Show versions, devices, and which fast paths are there, or why not.

    \b
    Examples:
      peerify env
      peerify env --json
    """
    with library(as_json):
        from peerify.environment import environment

        result = environment()
    from peerify.cli import bench_tables, tables

    tables.print_json(result) if as_json else bench_tables.print_environment(result)
