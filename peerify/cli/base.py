"""What all commands share: the one place where errors become messages, common options, progress."""

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
from peerify.config.grow import GrowConfig
from peerify.config.peer import PeerConfig
from peerify.config.recipe import CalibrationConfig, Recipe, describe
from peerify.errors import PeerifyError, StoppedError, Terminated, UsageError
from peerify.hub_calls import redact

Command = TypeVar("Command", bound=Callable[..., Any])

# The keys of a recipe that are also flags; their texts and defaults live in the schema.
PROMOTED = {
    "--layers": "convert.layers",
    "--active": "convert.active",
    "--max-loss": "convert.max_loss",
    "--allocation": "convert.allocation",
    "--num-heads": "convert.num_heads",
    "--topk": "convert.topk",
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
# Likewise of `peerify grow`, where some of the same flags are other keys.
PROMOTED_TO_GROW = {
    "--num-experts": "grow.num_experts",
    "--layers": "grow.layers",
    "--share-pool": "grow.share_pool",
    "--heads": "grow.num_heads",
    "--topk": "grow.topk",
    "--seed": "grow.seed",
}


class Boundary(click.Group):
    """Turns errors into one sentence on stderr and an exit code; tracebacks need --debug."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit 2 for wrong use, 130 after Ctrl-C, 143 after SIGTERM, 1 for all else that failed."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a reader that went away can still be handled
            return result
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except PeerifyError as error:
            message, code, trace = str(error), error.exit_code, traceback.format_exc()
        except KeyboardInterrupt as error:
            trace = traceback.format_exc()
            output = ctx.meta.get("peerify.output")
            state = f"; {error}" if str(error) else f"; {output} left as it was" if output else ""
            word, code = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
            message = f"{word}{state}"
        except Exception as error:
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            message = f"unexpected {type(error).__name__}: {reason} (--debug shows where)"
            code, trace = 1, traceback.format_exc()
        if ctx.meta.get("peerify.debug"):
            click.echo(redact(trace), err=True, nl=False)
        if message:
            click.echo(f"peerify: {redact(message)}", err=True)
        ctx.exit(code)


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


def overridable(command: Command) -> Command:
    """The option that sets any key of a recipe."""
    text = "Set any key of the recipe, such as convert.gates=sigmoid or train.tokens=2000000; repeatable."
    return click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=text)(command)


def promoted(flag: str, *, to_grow: bool = False, **settings: Any) -> Callable[[Command], Command]:
    """A flag that is a key of the recipe, described there; `to_grow`: that of `peerify grow`."""
    key = (PROMOTED_TO_GROW if to_grow else PROMOTED)[flag]
    section, _, name = key.rpartition(".")
    sections = {"convert": PeerConfig, "grow": GrowConfig, "calibration": CalibrationConfig, "": Recipe}
    model: Any = sections[section]
    default = model.model_fields[name].default
    # The click default stays None, "not said", so that a recipe's own value is not overruled.
    is_plain = isinstance(default, str | int | float) and not isinstance(default, bool)
    text = f"{describe(key)}  [default: {default}]" if is_plain else describe(key)
    return click.option(flag, key.replace(".", "__"), default=None, help=text, **settings)


def given_flags(flags: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """What was said of the promoted flags, as `Recipe.load` takes it."""
    given: dict[str, tuple[str, Any]] = {}
    for flag, key in [*PROMOTED.items(), *PROMOTED_TO_GROW.items()]:
        value = flags.get(key.replace(".", "__"))
        if value is not None and value is not False and value != ():  # 0 was said, too
            given[key] = (flag, list(value) if isinstance(value, tuple) else value)
    return given


def require_calibration(recipe: Recipe, what: str = "conversion") -> None:
    """Raise UsageError where `recipe` names no calibration text, which `what` needs."""
    if not recipe.calibration.sources:
        raise UsageError(
            f"{what} needs calibration text: pass --calibration with a .txt file or a Hub dataset such as "
            "wikitext:wikitext-2-raw-v1"
        )


def stopped(number: int, state: str) -> StoppedError:
    """The error that ends a command which a signal stopped, once its result is printed."""
    return StoppedError(f"{'terminated' if number == signal.SIGTERM else 'interrupted'}; {state}", number)


def loading(command: Command) -> Command:
    """The options of the commands that load models without a recipe."""
    command = click.option("--trust-remote-code", is_flag=True, help=describe("trust_remote_code"))(command)
    return click.option("--revision", metavar="REV", help=describe("revision"))(command)


@click.group(cls=Boundary, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="peerify")
def cli() -> None:
    """Convert a Hugging Face model so that its feed-forward layers use only the neurons that matter for each token.

    Each neuron becomes an expert of its own, and the router of a PEER layer picks the experts for each token.

    MODEL is a Hub id, a directory or a .gguf file.

    \b
    Examples:
      peerify inspect HuggingFaceTB/SmolLM2-135M
      peerify convert HuggingFaceTB/SmolLM2-135M smol-peer --calibration calibration.txt
      peerify eval smol-peer --against HuggingFaceTB/SmolLM2-135M --data test.txt
      peerify push smol-peer ada/smol-peer

    \b
    Exit codes: 0 done, 1 failed, 2 wrong use, 130 after Ctrl-C, 143 after SIGTERM.
    """


@contextmanager
def library(as_json: bool) -> Iterator[Any]:
    """Run library code: prints go to stderr, chatter is muted unless --debug; yields a progress callable."""
    from peerify.cli.progress_report import STARTING, progress_on_stderr

    debug = click.get_current_context().meta.get("peerify.debug")
    with warnings.catch_warnings(), redirect_stdout(sys.stderr), progress_on_stderr() as progress:
        if sys.stderr.isatty():  # a log does not need to know
            progress(STARTING, 0, 1)
        from huggingface_hub.utils import disable_progress_bars
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging

        if not debug:
            warnings.simplefilter("ignore")
            hub_logging.set_verbosity_error()  # a line for each try to reach the Hub
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        if not sys.stderr.isatty():
            disable_progress_bars()
        yield progress
