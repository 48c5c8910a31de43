# `make demo` and `make test` do all of their set-up, on a machine with nothing but Python (>= 3.10) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What `make demo` converts and reads; empty: SmolLM2-135M and the prose of Python's own documentation.
MODEL ?=
TEXT ?=

.PHONY: help demo test lint slow fuzz zoo docs bench-quality format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    install, convert SmolLM2-135M, compare it with the dense model (about 5 minutes on 2 cores)"
	@echo "             MODEL=user/name|folder|file.gguf and TEXT=file.txt take your own"
	@echo "make test    install, then linters, type checker and tests"
	@echo "make slow    the tests that take longer as well"
	@echo "make fuzz    20,000 damaged files for every reader of what others wrote (COUNT for each, SEED to repeat)"
	@echo "make zoo     convert every architecture of transformers, write docs/architectures.md (about an hour)"
	@echo "make docs    write docs/options.md from the schema of the recipe"
	@echo "make bench-quality MODEL=model CALIBRATION='a.txt b.txt' TEST=c.txt OOD=d.txt"
	@echo "             conversion beside other methods: a table and a plot in .quality/ (hours; goes on where it stopped)"
	@echo "make lint    linters and type checker only"
	@echo "make format  rewrite the code as the linter wants it"
	@echo "make clean   remove the virtual environment, the demo's files and caches"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "peerify needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there)." \
	       "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) comes without venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV) (once; about a minute, longer on a slow line)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input \
	  -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	@$(BIN)/python demo/demo.py $(if $(MODEL),--model '$(MODEL)') $(if $(TEXT),--text '$(TEXT)')

lint: $(READY)
	@echo "ruff check"; $(BIN)/ruff check --quiet .
	@echo "ruff format --check"; $(BIN)/ruff format --check --quiet .
	@echo "mypy"; $(BIN)/mypy

test: lint
	@echo "pytest"; $(BIN)/python -m pytest

slow: lint
	@$(BIN)/python -m pytest -m ''

COUNT ?= 700
fuzz: $(READY)
	@$(BIN)/python tests/fuzzing/fuzz.py --count $(COUNT) $(if $(SEED),--seed $(SEED)) --keep .fuzz

zoo: $(READY)
	@$(BIN)/python tests/zoo/run.py

docs: $(READY)
	@$(BIN)/python docs/write_options.py

# OPTIONS takes everything else that benchmarks/quality/run.py --help lists.
bench-quality: $(READY)
	$(foreach name,MODEL CALIBRATION TEST,$(if $($(name)),,$(error $(name) is missing: `make help` shows how)))
	@$(BIN)/python benchmarks/quality/run.py --model '$(MODEL)' --calibration $(CALIBRATION) --test '$(TEST)' \
	  $(if $(OOD),--ood '$(OOD)') $(OPTIONS)

format: $(READY)
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

clean:
	rm -rf $(VENV) .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
