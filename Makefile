# make demo   train a small DiT on real handwritten digits, sample it with guidance, show the picture
# make test   lint, then the test suite        make lint   only the lint        make format   rewrite in place
#
# Each makes its own virtual environment first. Settings:
#   OUT=dir                            where the demo writes
#   TORCH=2.11.0 PYTHON=python3.12     another stack (requirements/torch-$(TORCH).txt must exist)
#   ARGS="-k adaln"                    passed on to pytest, or to the demo

PYTHON ?= python3
TORCH ?= 2.14.1
OUT ?= demo-out
JOBS ?= 2
ARGS ?=

DEFAULT_TORCH := 2.14.1
VENV ?= $(if $(filter $(DEFAULT_TORCH),$(TORCH)),.venv,.venv-torch$(TORCH))
BIN := $(VENV)/bin
REQUIREMENTS := requirements/torch-$(TORCH).txt requirements/dev.txt
STAMP := $(VENV)/.installed

.PHONY: demo test lint format clean

demo: $(STAMP)
	$(BIN)/ditkernels demo --out "$(OUT)" $(ARGS)

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --maxschedchunk 1 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): $(REQUIREMENTS) pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix -r ,$(REQUIREMENTS))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache
