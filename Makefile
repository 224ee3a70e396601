# `make demo` and `make test` do all set-up on a fresh machine with python3, g++ and make (nvcc is optional).
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
PIP = $(PY) -m pip --disable-pip-version-check -q
# A process per core; a file's tests share one, and with it what the file compiles.
PYTEST_FLAGS ?= -n auto --dist loadfile
GPU_PYTHON ?= $(if $(wildcard $(PY)),$(PY),$(PYTHON))
CPP_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' '*.inl')

.PHONY: help demo test lint format bench io-complexity build wheel wheel-check gpu-check docs clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

# A virtual environment with torch and the development tools; made again when what it is made from changes.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt "setuptools>=77" ninja wheel
	FAL_CUDA=$${FAL_CUDA:-auto} $(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

build: $(VENV)/.ready  ## compile what changed
	@$(PY) setup.py -q build_ext --inplace

demo: build  ## exactness, speed and a served model on this machine, in under three minutes
	$(PY) -m flashattn_lite demo

test: build  ## the whole test suite; needs no GPU
	$(PY) -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.ready  ## ruff, mypy --strict, clang-format; no file excluded
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)

format: $(VENV)/.ready  ## rewrite the sources as lint wants them
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

bench: build  ## speed against PyTorch on this machine: tables, and JSON in bench/results
	$(PY) -m flashattn_lite bench $(BENCH_FLAGS)

io-complexity: build  ## bytes through device memory, counted: docs/io_complexity.md and its plot
	PYTHONPATH=.:tests $(PY) tests/io_complexity.py

# pip's isolated build: neither torch nor this virtual environment takes part in it.
wheel:  ## build the sdist, the wheel from it, and try the wheel in a fresh environment
	rm -rf dist
	$(PYTHON) -m venv $(VENV)-build
	$(VENV)-build/bin/python -m pip --disable-pip-version-check -q install build twine
	$(VENV)-build/bin/python -m build --outdir dist
	$(VENV)-build/bin/twine check --strict dist/*
	$(VENV)-build/bin/python tests/packaging/check_wheel.py dist/*.whl
	$(VENV)-build/bin/python tests/packaging/check_sdist.py dist/*.tar.gz
	$(MAKE) wheel-check TORCH=$$(sed -n 's/^torch==//p' constraints.txt)

wheel-check:  ## try dist/*.whl under another torch: make wheel-check TORCH=2.11.0
	@test -n "$(TORCH)" || { echo "say which torch: make wheel-check TORCH=2.11.0"; exit 2; }
	rm -rf $(VENV)-torch-$(TORCH)
	$(PYTHON) -m venv $(VENV)-torch-$(TORCH)
	$(VENV)-torch-$(TORCH)/bin/python -m pip --disable-pip-version-check -q install "torch==$(TORCH)" dist/*.whl
	cd dist && ../$(VENV)-torch-$(TORCH)/bin/python ../tests/packaging/smoke.py

gpu-check:  ## on a machine with an NVIDIA GPU and the built library: exactness, sanitizer, speed
	PYTHONPATH=. $(GPU_PYTHON) tests/gpu_check.py $(GPU_CHECK_FLAGS)

docs:  ## the documentation as a site, in site/; no warning passes
	test -x $(VENV)-docs/bin/mkdocs || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip --disable-pip-version-check -q install -r docs/requirements.txt
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --quiet

clean:  ## remove everything that was built
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info flashattn_lite/_C.so tests/native/build site
