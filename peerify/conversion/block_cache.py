"""Run a model from a changed layer on: the blocks before it answer from memory.

Measuring each of n layers by the model's output runs n (n + 1) / 2 blocks instead of n^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from peerify.conversion.calibration import hooked, inside
from peerify.discovery.sites import Site
from peerify.modules import blocks_around

SAME = 1e-6  # nats


class BlockCache:
    """What the blocks around `sites` answered for some inputs. An input is known by its place in the order recorded."""

    def __init__(self, model: nn.Module, sites: list[Site]) -> None:
        self._blocks = {path: model.get_submodule(path) for path in blocks_around(model, (site.path for site in sites))}
        self._answers: list[dict[str, Any]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While the model runs on one more input."""
        answers: dict[str, Any] = {}
        again: set[str] = set()
        with ExitStack() as stack:
            for path, block in self._blocks.items():

                def note(_: Any, __: Any, output: Any, path: str = path) -> None:
                    if path in answers or not _plain(output):
                        again.add(path)
                    answers[path] = _copied(output)

                stack.enter_context(hooked(block.register_forward_hook(note)))
            yield
        # A block that runs twice, or says what cannot be kept, runs as ever.
        self._answers.append({path: output for path, output in answers.items() if path not in again})

    def check(self, distance: Callable[[], float], site: Site) -> None:
        """Forget everything where blocks pass on more than what they answer, such as keys that later ones use as well.

        Args:
            distance: how far the first input's output is from what it was.
            site: the last one.
        """
        try:
            with self.answering(0, site):
                same = distance() < SAME
        except Exception:  # whatever a block misses; without answers nothing is different from before
            same = False
        if not same:
            self._answers = [{} for _ in self._answers]

    @contextmanager
    def answering(self, place: int, site: Site) -> Iterator[None]:
        """While the model runs on the input of that `place` again with another layer at `site`."""
        answers = self._answers[place]
        order = list(answers)
        own = next((i for i, path in enumerate(order) if inside(site.path, path)), 0)
        changed = [self._blocks[path] for path in order[:own]]
        try:
            for path, block in zip(order[:own], changed, strict=True):
                # Copied once more, since some blocks add to what they are given in place.
                block.forward = lambda *_, path=path, **__: _copied(answers[path])
            yield
        finally:
            for block in changed:
                vars(block).pop("forward", None)  # the method of the class shows again


def _plain(output: Any) -> bool:
    return isinstance(output, Tensor) or (
        type(output) is tuple and all(part is None or isinstance(part, Tensor) for part in output)
    )


def _copied(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(_copied(part) for part in output)
    return output.clone() if isinstance(output, Tensor) else output
