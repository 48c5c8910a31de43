"""The command line: thin shells around library functions, and the one place where errors become messages.

Results go to stdout, everything else to stderr. torch and transformers are imported inside the commands only,
so that ``--help`` is instant.
"""

from __future__ import annotations

import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TypeVar

import click

from peerify import __version__
from peerify.errors import PeerifyError, UsageError
from peerify.recipe import CalibrationConfig, PeerConfig, Recipe, describe

Command = TypeVar("Command", bound=Callable[..., Any])

# The keys of a recipe that are also flags of `convert`; their texts and defaults live in the schema.
PROMOTED = {
    "--layers": "convert.layers",
    "--active": "convert.active",
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


class Boundary(click.Group):
    """Turns errors into one sentence on stderr and an exit code; tracebacks need --debug."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit 2 for wrong use, 130 when interrupted, 1 for anything else that failed."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a reader that went away can still be handled
            return result
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except PeerifyError as error:
            message, code, trace = str(error), error.exit_code, traceback.format_exc()
        except KeyboardInterrupt:
            trace = traceback.format_exc()
            output = ctx.meta.get("peerify.output")
            message, code = f"interrupted; {output} left as it was" if output else "interrupted", 130
        except Exception as error:
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            message = f"unexpected {type(error).__name__}: {reason} (--debug shows where)"
            code, trace = 1, traceback.format_exc()
        if ctx.meta.get("peerify.debug"):
            click.echo(trace, err=True, nl=False)
        click.echo(f"peerify: {message}", err=True)
        ctx.exit(code)


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


def common(command: Command) -> Command:
    """The options every command has."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta["peerify.debug"] = value

    command = click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=remember,
        help="Show tracebacks and library messages.",
    )(command)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")(command)


def loading(command: Command) -> Command:
    """The options of the commands that load models without a recipe."""
    command = click.option("--trust-remote-code", is_flag=True, help=describe("trust_remote_code"))(command)
    return click.option("--revision", metavar="REV", help=describe("revision"))(command)


@click.group(cls=Boundary, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="peerify")
def cli() -> None:
    """Turn a dense Hugging Face model into a PEER model.

    Each neuron becomes an expert of its own, and product keys retrieve the few that matter for a token.

    MODEL is a Hub id, a directory or a .gguf file.

    \b
    Examples:
      peerify inspect HuggingFaceTB/SmolLM2-135M
      peerify convert HuggingFaceTB/SmolLM2-135M smol-peer --calibration calibration.txt
      peerify eval smol-peer --against HuggingFaceTB/SmolLM2-135M --data test.txt
    """


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
    with _library(as_json) as progress:
        from peerify.inspection import inspect_model

        result = inspect_model(
            model, active=active, revision=revision, trust_remote_code=trust_remote_code, progress=progress
        )
    from peerify import report

    report.print_json(result) if as_json else report.print_inspection(result)


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
    with _library(as_json) as progress:
        from peerify.folder import convert_checkpoint

        result = convert_checkpoint(recipe, progress=progress)
    from peerify import report
    from peerify.inspection import converted_layers

    report.print_json(result) if as_json else report.print_conversion(result, converted_layers(recipe.output))


@cli.command("eval")
@click.argument("model")
@click.option(
    "--data",
    required=True,
    metavar="TEXT",
    help="Test text: a .txt, .jsonl or .parquet file or a Hub dataset (name:config:split).",
)
@click.option("--against", metavar="DENSE", help="The dense model to compare with.")
@click.option("--context", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens per window.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Use only the first N tokens of the text.", metavar="N")
@click.option("--batch-size", type=click.IntRange(min=1), default=2, show_default=True, help="Windows run at once.")
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

    With --against, also how far it is from the dense model: ratio of perplexities and KL divergence. The
    text is tokenised once, cut into windows that do not overlap, and tokens 2…n of each are predicted.

    \b
    Examples:
      peerify eval smol-peer --data test.txt
      peerify eval smol-peer --against HuggingFaceTB/SmolLM2-135M --data test.txt --max-tokens 16384
      peerify eval gpt2 --data wikitext:wikitext-2-raw-v1:test --json
    """
    with _library(as_json) as progress:
        from peerify.evaluation import evaluate_checkpoint

        result = evaluate_checkpoint(model, progress=progress, **settings)
    from peerify import report

    report.print_json(result) if as_json else report.print_evaluation(result)


@contextmanager
def _library(as_json: bool) -> Iterator[Any]:
    """Run library code: prints go to stderr, chatter is muted unless --debug; yields a progress callable."""
    from peerify.report import progress_on_stderr

    debug = click.get_current_context().meta.get("peerify.debug")
    with warnings.catch_warnings(), redirect_stdout(sys.stderr), progress_on_stderr() as progress:
        if sys.stderr.isatty():  # a log does not need to know
            progress("Starting", 0, 1)
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging

        if not debug:
            warnings.simplefilter("ignore")
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        if not sys.stderr.isatty():
            disable_progress_bars()
        yield progress


def main() -> None:
    """The console script."""
    # A polite kill cleans up like an interrupt: the temporary folder goes, the target stays as it was.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cli(prog_name="peerify")
