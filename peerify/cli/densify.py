"""`peerify densify`."""

from __future__ import annotations

import click

from peerify.cli.base import cli, common, library
from peerify.config.recipe import describe


@cli.command()
@click.argument("folder")
@click.argument("out")
@click.option("--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help=describe("max_shard_size"))
@common
def densify(folder: str, out: str, max_shard_size: str, as_json: bool) -> None:
    """Write the converted model in FOLDER to OUT as an ordinary dense checkpoint.

    For programs that know no PEER layers, or to have the model back after training. OUT computes what FOLDER computes
    with every expert active. It takes single neurons with unit gates, as many as the dense layer has: what `peerify
    convert` makes by default.

    \b
    Examples:
      peerify densify smol-peer smol-dense
      peerify densify smol-peer-healed smol-healed --json
    """
    with library(as_json) as progress:
        from peerify.conversion.densify import densify_checkpoint

        result = densify_checkpoint(folder, out, max_shard_size=max_shard_size, progress=progress)
    from peerify.cli import tables

    tables.print_json(result) if as_json else tables.print_densified(result)
