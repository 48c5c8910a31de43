"""Checkpoints of a training run, as a stranger may hand them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from checkpoints import text_file, tiny_tokenizer
from fuzzing.harness import Corpus

from peerify.config.train import DataConfig
from peerify.training import state
from peerify.training.data import Windows
from peerify.training.groups import EXPERTS

MODEL_SEED = 0


def _model() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model with a step behind it; the text that it reads is not looked at."""
    torch.manual_seed(MODEL_SEED)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "name": EXPERTS}])
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def _windows(folder: Path) -> Windows:
    sources: Any = [
        {"path": str(folder.parent / "held.txt")},
        {"path": str(folder.parent / "s.txt"), "streaming": True},
    ]
    return Windows(DataConfig(sources=sources, context=16, buffer=4), tiny_tokenizer(), seed=0)


def make(folder: Path) -> None:
    for name in ("held.txt", "s.txt"):
        text_file(folder.parent / name, 400)
    model, optimizer = _model()
    windows = _windows(folder)
    windows.block(5)
    now = state.RunState(step=1, step_in_stage=1, position=windows.position(), losses=[2.5], recipe={"model": "a"})
    state._write(folder, state.weights_of(model), now)
    torch.save(state.optimizer_state(dict(model.named_parameters()), optimizer), folder / "optimizer.pt")


def read(folder: Path) -> None:
    now = state.read_state(folder)
    state.check_same_recipe(now.recipe, {"model": "a"}, folder)
    model, optimizer = _model()
    state.put_weights(model, state.read_weights(folder), str(folder))
    states = state.read_optimizer(folder)
    if states is not None:
        state.put_optimizer_state(dict(model.named_parameters()), optimizer, states, str(folder))
        optimizer.step()
    if now.position is not None:
        windows = _windows(folder)
        windows.seek(now.position)
        json.dumps(windows.block(3).tolist())


CORPORA: dict[str, Corpus] = {
    "state-of-a-run": Corpus(make, "run.json", read, as_json=True),
    "weights-of-a-run": Corpus(make, "model.safetensors", read),
    "optimizer-of-a-run": Corpus(make, "optimizer.pt", read),
}
