"""`peerify inspect`."""

from __future__ import annotations

import click

from peerify.cli.base import cli, common, library, loading


@cli.command()
@click.argument("model")
@click.option(
    "--active",
    type=float,
    default=0.5,
    show_default=True,
    metavar="SHARE",
    help="Share of compute to show the savings for.",
)
@loading
@common
def inspect(model: str, active: float, revision: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """Show which layers of MODEL can be converted and what that would save; loads no weights.

    \b
    Examples:
      peerify inspect HuggingFaceTB/SmolLM2-135M
      peerify inspect ./llama --active 0.25
      peerify inspect model.gguf --json
    """
    with library(as_json) as progress:
        from peerify.inspection import inspect_model

        result = inspect_model(
            model, active=active, revision=revision, trust_remote_code=trust_remote_code, progress=progress
        )
    from peerify import report

    report.print_json(result) if as_json else report.print_inspection(result)
