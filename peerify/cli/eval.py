"""`peerify eval`."""

from __future__ import annotations

from typing import Any

import click

from peerify.cli.base import cli, common, library, loading
from peerify.config.recipe import describe

COUNT = click.IntRange(min=1, max=2**31)


def shares(_: Any, __: Any, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(","))) if text is not None else ()
    except ValueError:
        raise click.BadParameter(f"{text} is no list of shares such as 0.25,0.5,1") from None


test_texts = click.option(
    "--data",
    required=True,
    multiple=True,
    metavar="TEXT",
    help="Test text: a .txt, .jsonl or .parquet file or a Hub dataset (name:config:split). Give it again for another.",
)


@cli.command("eval")
@click.argument("model")
@test_texts
@click.option(
    "--active",
    metavar="SHARES",
    callback=shares,
    help="Budgets to measure, as shares of the dense layers' bytes, by commas; by default the model's own.",
)
@click.option("--against", metavar="DENSE", help="The dense model to compare with.")
@click.option(
    "--context", type=click.IntRange(min=2, max=2**31), default=512, show_default=True, help="Tokens per window."
)
@click.option("--max-tokens", type=COUNT, help="Use only the first N tokens of each text.", metavar="N")
@click.option("--batch-size", type=COUNT, default=2, show_default=True, help="Windows run at once.")
@click.option(
    "--details", is_flag=True,
    help="Tell what `peerify report` draws, too: how often experts are read, and continuations of some prompts with "
    "the bytes of each token. Only --json shows them.",
)  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help=describe("device"))
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Number type to compute in.",
)
@loading
@common
def evaluate(model: str, as_json: bool, **settings: Any) -> None:
    """Measure the perplexity of MODEL, dense or converted, and how its experts are used.

    With --against, also how far it is from the dense model: ratio of perplexities, KL divergence, how often
    both find the same token most likely, and how many tokens both add to a prompt before they part, of up to
    64 and always the most likely one. The text is tokenised once, cut into windows that do not overlap, and
    tokens 2…n of each are predicted, every one at the budget.

    Several texts are measured each by itself, with models loaded once; --json then lists them under "texts",
    each as it would be alone.

    \b
    Examples:
      peerify eval smol-peer --data test.txt
      peerify eval smol-peer --against HuggingFaceTB/SmolLM2-135M --data test.txt --max-tokens 16384
      peerify eval smol-peer --against HuggingFaceTB/SmolLM2-135M --data test.txt --active 0.25,0.5,1
      peerify eval smol-peer --against HuggingFaceTB/SmolLM2-135M --data wiki.txt --data code.txt
      peerify eval smol-peer --against HuggingFaceTB/SmolLM2-135M --data test.txt --details --json
      peerify eval gpt2 --data wikitext:wikitext-2-raw-v1:test --json
    """
    with library(as_json) as progress:
        from peerify.evaluation import evaluate_checkpoint

        result = evaluate_checkpoint(model, progress=progress, **settings)
    from peerify.cli import evaluation_tables, tables

    tables.print_json(result) if as_json else evaluation_tables.print_evaluation(result)
