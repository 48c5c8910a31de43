"""`peerify report`."""

from __future__ import annotations

import click

from peerify.cli.base import cli, common, library
from peerify.cli.sweep import RATIO


@cli.command()
@click.argument("dirs", metavar="DIRS...", nargs=-1, required=True)
@click.option("--out", metavar="FOLDER", default="report", show_default=True, help="Folder to write the page to.")
@click.option(
    "--max-loss",
    type=RATIO,
    metavar="RATIO",
    help="Recommend the smallest share whose perplexity over the dense model's is at most this, where no sweep does.  "
    "[default: 1.02, unless --min-speed is given]",
)
@click.option(
    "--min-speed", type=RATIO, metavar="RATIO",
    help="Recommend a share that decodes at least so many times as fast as the dense model, where no sweep does.",
)  # fmt: skip
@common
def report(dirs: tuple[str, ...], out: str, max_loss: float | None, min_speed: float | None, as_json: bool) -> None:
    """Make one page of what peerify's commands have written in DIRS; several are compared.

    Each of DIRS is a folder, or a single file: a converted model, a training run, and what `peerify eval`, `sweep` and
    `bench` print with --json, or benchmarks/quality/run.py writes. The page shows what is there: the share to take and
    the price curve, speed beside its limit, which experts are read, layers, training, continuations and the recipe.
    `eval --details` and `sweep --details` tell what some of it needs. A file about a model whose folder is named, too,
    belongs to that. The training of a model DIR is looked for in DIR-run as well.

    FOLDER gets report.html, which holds everything and needs no network, report.json with every figure of it, and the
    pictures as PNG. What an earlier report wrote there is replaced. Needs `pip install 'peerify[plots]'`.

    \b
    Examples:
      peerify report smol-peer
      peerify report smol-peer sweep.json speed.json
      peerify report eval.json --min-speed 1.2
      peerify report smol-peer smol-peer-healed .quality --out comparison
    """
    from peerify.choice import MAX_LOSS, Wish

    wish = Wish(MAX_LOSS if max_loss is None and min_speed is None else max_loss, min_speed)
    with library(as_json) as progress:
        from peerify.report.page import write_report

        result = write_report(dirs, out, wish=wish, progress=progress)
    from peerify.cli import tables

    if as_json:
        tables.print_json(result)
    else:
        click.echo(f"of {', '.join(result['runs'])}")
        click.echo(f"sections: {', '.join(result['sections'])}\npage: {result['page']}")
