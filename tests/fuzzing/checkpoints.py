"""Checkpoints of a training run, as a stranger may hand them out."""

from __future__ import annotations

from fuzzing.harness import Corpus

CORPORA: dict[str, Corpus] = {}
