# make demo   train a small DiT on real handwritten digits, sample it with guidance, show the picture
# make test   lint, then the test suite        make lint   only the lint        make format   rewrite in place
# make docs   the docs as a site, in build/docs
# make wheel  dist/: a wheel for Linux with the CPU library, and the CUDA library where there is nvcc; a pure wheel; the sources
# make gpu    everything that needs a GPU, with this machine's own python; results go to benchmarks/results
#
# All but the last make their own virtual environment first. Settings:
#   OUT=dir                            where the demo writes
#   TORCH=2.11.0 PYTHON=python3.12     another stack (requirements/torch-$(TORCH).txt must exist)
#   DITKERNELS_BUILD_CPU=0             demo and test: without the CPU library, which is built where there is a C++ compiler
#   WHEELS=dir                         attention packages that make gpu tries: wheels of xformers, flash-attn 2, 3, 4
#   ARGS="-k adaln"                    passed on to pytest, to the demo, or to make gpu

PYTHON ?= python3
TORCH ?= 2.14.1
OUT ?= demo-out
JOBS ?= 2
ARGS ?=
WHEELS ?=

DEFAULT_TORCH := 2.14.1
VENV ?= $(if $(filter $(DEFAULT_TORCH),$(TORCH)),.venv,.venv-torch$(TORCH))
BIN := $(VENV)/bin
REQUIREMENTS := requirements/torch-$(TORCH).txt requirements/dev.txt
STAMP := $(VENV)/.installed
CXX_FOUND := $(shell command -v $${CXX:-c++} || command -v g++ || command -v clang++)
DITKERNELS_BUILD_CPU ?= $(if $(CXX_FOUND),1,0)
CPU_LIBRARY := $(if $(filter 1,$(DITKERNELS_BUILD_CPU)),ditkernels/_cpu.so)
WHEEL := $(BIN)/python -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps
CPP := $(shell find csrc tests -name "*.cu" -o -name "*.cuh" -o -name "*.cpp" -o -name "*.h")

.PHONY: demo test lint format docs wheel gpu clean

demo: $(STAMP) $(CPU_LIBRARY)
	$(BIN)/python -m ditkernels demo --out "$(OUT)" $(ARGS)

test: lint $(CPU_LIBRARY)
	$(BIN)/python -m pytest -n $(JOBS) --maxschedchunk 1 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

docs: $(STAMP)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q -d build/doctrees docs build/docs

# Three files: a wheel with the libraries for Linux, a pure one for everywhere else, and the sources. libtorch is excluded: the wheel
# uses the one that is installed. The CUDA driver is not linked at all.
wheel: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/wheel.txt
	rm -rf build/wheel build/lib* build/bdist*
	DITKERNELS_GLIBC=2.28 DITKERNELS_BUILD_CPU=1 $(WHEEL) -w build/wheel .
	PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --exclude libtorch_cpu.so -w dist build/wheel/*.whl
	$(BIN)/python -m tools.finish_wheel dist/*linux*.whl
	rm -rf build/lib* build/bdist*
	DITKERNELS_BUILD_CUDA=0 DITKERNELS_BUILD_CPU=0 $(WHEEL) -w dist .
	$(BIN)/python -m build --sdist --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

gpu:
	$(PYTHON) -m benchmarks.gpu.driver $(if $(WHEELS),--wheels "$(WHEELS)") $(ARGS)

$(STAMP): $(REQUIREMENTS) pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix -r ,$(REQUIREMENTS))
	DITKERNELS_BUILD_CUDA=0 DITKERNELS_BUILD_CPU=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps -e .
	touch $@

# One library serves every torch, so that all environments share it.
ditkernels/_cpu.so: $(wildcard csrc/cpu/*) tools/build_native.py ditkernels/ops/schemas.txt ditkernels/_version.py | $(STAMP)
	$(BIN)/python tools/build_native.py cpu build/cpu $@

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache
