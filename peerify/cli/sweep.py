"""`peerify sweep`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import click

from peerify.cli.base import cli, common, given_flags, library, overridable, promoted
from peerify.cli.eval import COUNT, shares, test_texts
from peerify.config.recipe import Recipe

RATIO = click.FloatRange(min=0, min_open=True)


@cli.command()
@click.argument("model")
@test_texts
@promoted("--calibration", multiple=True, metavar="TEXT")
@click.option(
    "--active", metavar="SHARES", callback=shares, default="0.125,0.25,0.5,0.75,1", show_default=True,
    help="Shares of the dense layers' bytes to measure, by commas.",
)  # fmt: skip
@click.option(
    "--max-loss",
    type=RATIO,
    metavar="RATIO",
    help="Say which share is the smallest whose perplexity over the dense model's is at most this.  [default: 1.02, "
    "unless --min-speed is given]",
)
@click.option(
    "--min-speed", type=RATIO, metavar="RATIO",
    help="Say which share loses least and decodes at least so many times as fast as the dense model.",
)  # fmt: skip
@click.option("--no-speed", is_flag=True, help="Do not measure speed.")
@click.option("--repeats", type=COUNT, default=5, show_default=True, help="Measurements of each speed.")
@click.option(
    "--max-tokens", type=COUNT, default=8192, show_default=True, metavar="N",
    help="Use only the first N tokens of each test text.",
)  # fmt: skip
@click.option("--batch-size", type=COUNT, default=2, show_default=True, help="Windows run at once.")
@click.option(
    "--against",
    metavar="DENSE",
    help="The dense model of a converted MODEL; by default that one made dense again, as long as it was not trained.",
)
@click.option(
    "--details", is_flag=True, help="Tell what `peerify report` draws, too, as `peerify eval --details` does."
)
@click.option("--plot", metavar="FILE", help="Draw it, as .png, .svg or .pdf; needs `pip install 'peerify[plots]'`.")
@promoted("--layers", metavar="WHICH")
@promoted("--allocation", metavar="HOW")
@promoted("--calibration-tokens", type=int)
@promoted("--context", type=int)
@promoted("--seed", type=int)
@overridable
@promoted("--device")
@promoted("--dtype")
@promoted("--revision", metavar="REV")
@promoted("--trust-remote-code", is_flag=True)
@common
def sweep(
    model: str,
    data: tuple[str, ...],
    active: tuple[float, ...],
    max_loss: float | None,
    min_speed: float | None,
    no_speed: bool,
    details: bool,
    plot: str | None,
    overrides: tuple[str, ...],
    repeats: int,
    max_tokens: int,
    batch_size: int,
    against: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Measure what each share of MODEL costs and gains, and say which one to take. MODEL is left as it is.

    A dense MODEL is converted in memory, once, with the text given by --calibration; a folder that was converted
    before is taken as it is. Then each share is measured on --data as `peerify eval` does, and timed as `peerify
    bench` does, one token at a time, both in the number type of --dtype. At the end stands the share that keeps to
    --max-loss or --min-speed, or comes nearest, and the command that converts with it.

    --context is for calibration and test text. `peerify report` makes a page of what --json tells.

    \b
    Examples:
      peerify sweep HuggingFaceTB/SmolLM2-135M --calibration text.txt --data other.txt
      peerify sweep smol-peer --data other.txt --data code.txt --min-speed 1.2
      peerify sweep smol-peer --data other.txt --active 0.2,0.3,0.4,0.5 --max-loss 1.05 --plot smol.png
      peerify sweep ./llama --calibration text.txt --data other.txt --no-speed --json
    """
    from peerify.choice import MAX_LOSS, Wish
    from peerify.cli import bench_plot, sweep_plot, sweep_tables, tables

    given = {"model": ("MODEL", model), **given_flags(flags)}
    # A recipe names a folder to write; a sweep writes no model.
    recipe = Recipe.load(None, overrides, given | {"output": ("OUT", "OUT")})
    wish = Wish(MAX_LOSS if max_loss is None and min_speed is None else max_loss, min_speed)
    picture = bench_plot.check_plot(plot) if plot is not None else None  # before minutes of measuring
    with library(as_json) as progress:
        from peerify.sweep import sweep_checkpoint

        result = sweep_checkpoint(
            recipe, data=data, active=active, against=against, wish=wish, speed=not no_speed, repeats=repeats,
            max_tokens=max_tokens, batch_size=batch_size, details=details, progress=progress,
        )  # fmt: skip
        result["choice"]["command"] = _command(result, given, overrides)
        if picture is not None:
            sweep_plot.draw(result, picture)
    tables.print_json(result) if as_json else sweep_tables.print_sweep(result)


def _command(result: Mapping[str, Any], given: Mapping[str, tuple[str, Any]], overrides: tuple[str, ...]) -> str:
    """What a person types to have the model at the share that was chosen."""
    active = f"{result['choice']['active']:g}"
    if result["converted"]:  # it has every share already
        return f"AutoModelForCausalLM.from_pretrained({result['model']!r}, peer_active={active})"
    words = ["peerify", "convert", result["model"], "OUT", "--active", active]
    for flag, value in (said for key, said in given.items() if key != "model"):
        for each in value if isinstance(value, list) else [value]:
            words += [flag] if each is True else [flag, str(each)]
    for override in overrides:
        words += ["--set", override]
    return shlex.join(words)
