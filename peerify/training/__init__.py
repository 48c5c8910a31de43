"""Continued training: heal a converted model from a recipe.

config.py says what can be asked for, data.py turns text into blocks of tokens, routing.py lets gradients reach the
selection of experts, objectives.py has the losses, groups.py and optimizers.py decide what moves and how, state.py
writes checkpoints, stage.py is what happens in a step, loop.py runs it all, plan.py says beforehand what it will take.
Importing this package is cheap.
"""
