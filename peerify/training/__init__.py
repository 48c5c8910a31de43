"""Continued training: heal a converted model from a recipe.

config/train.py has the options. data.py turns text into blocks of tokens, straight_through.py passes gradients through
the selection of experts, objectives.py has the losses, groups.py and optimizers.py decide what trains and how, state.py
writes checkpoints. stage.py is one step, loop.py runs all stages, train.py begins and ends a run, and dry_run.py states
beforehand what it will take. Importing this package is cheap.
"""
