"""`peerify push`."""

from __future__ import annotations

from typing import Any

import click

from peerify.cli.base import cli, common, library
from peerify.config.recipe import Recipe, describe
from peerify.errors import PublishError, UsageError
from peerify.reading import local_path, read_object


@cli.command()
@click.argument("folder", required=False)
@click.argument("repo", required=False)
@click.option("--recipe", "recipe_file", metavar="FILE", help="YAML recipe with a `hub:` section; flags win over it.")
@click.option("--private/--public", default=None, help=describe("hub.private"))
@click.option("--revision", metavar="BRANCH", help=describe("hub.revision"))
@click.option("--tag", metavar="TAG", help=describe("hub.tag"))
@click.option("--create-pr", is_flag=True, default=None, help=describe("hub.create_pr"))
@click.option("--message", metavar="TEXT", help=describe("hub.message"))
@click.option("--include", multiple=True, metavar="PATTERN", help=describe("hub.include"))
@click.option("--exclude", multiple=True, metavar="PATTERN", help=describe("hub.exclude"))
@click.option(
    "--results",
    multiple=True,
    metavar="FILE",
    help="Output of `peerify eval --json`, for the table in the model card; kept in FOLDER's peerify.json.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run code in FOLDER that peerify did not write, to check it.")
@click.option("--dry-run", is_flag=True, help="Check everything, show files, sizes and card, and send nothing.")
@common
def push(
    folder: str | None,
    repo: str | None,
    recipe_file: str | None,
    results: tuple[str, ...],
    dry_run: bool,
    trust_remote_code: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Publish the converted model in FOLDER on the Hugging Face Hub as REPO, and prove that it arrived.

    The model is checked, sent in one commit, and loaded back by a fresh process without peerify, which must
    get the same answers to the bit. What you edited in the model card, here or on the Hub, stays. An interrupted
    push goes on where it was; pushing twice changes nothing. Log in with `hf auth login` or set HF_TOKEN.

    \b
    Examples:
      peerify push smol-peer ada/smol-peer --dry-run
      peerify push smol-peer ada/smol-peer --private --tag v1
      peerify push smol-peer ada/smol-peer --results eval.json --message Healed
      peerify push smol-peer someone/smol-peer --create-pr
      peerify push --recipe recipe.yaml
    """
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in flags.items()}
    given = {key: value for key, value in given.items() if value is not None and value != []}
    if repo is not None:
        given["repo"] = repo
    if recipe_file is not None:
        spoken = {f"hub.{key}": (f"--{key.replace('_', '-')}", value) for key, value in given.items()}
        recipe = Recipe.load(recipe_file, (), spoken | ({"output": ("FOLDER", folder)} if folder else {}))
        hub, folder = recipe.hub, recipe.output
        if hub is None:
            raise UsageError(f"{recipe_file} has no `hub:` section: write `hub: {{repo: user/name}}`, or name REPO")
        trust_remote_code = trust_remote_code or recipe.trust_remote_code
    elif folder is None or repo is None:
        raise UsageError("push needs FOLDER and REPO (user/name), or --recipe with a `hub:` section")
    else:
        hub = None
    settings: dict[str, Any] = hub.model_dump(exclude={"every"}) if hub else given
    with library(as_json) as progress:
        from peerify.checkpoint.card import record_results
        from peerify.publishing.push import check_folder, push

        path = local_path(folder, PublishError)
        if results:
            check_folder(path)
        for result_file in results:
            record_results(path, _result(result_file))
        result = push(
            *(folder, settings.pop("repo")),
            **settings,
            dry_run=dry_run,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    from peerify.cli import tables

    tables.print_json(result) if as_json else tables.print_push(result)


def _result(path: str) -> dict[str, Any]:
    from peerify.checkpoint.record import check_result

    remedy = "give what `peerify eval --json` writes"
    try:
        result = read_object(local_path(path, UsageError), UsageError, remedy)
        return dict(check_result(result, path, UsageError))
    except UsageError as error:
        raise UsageError(f"--results {error}") from None
