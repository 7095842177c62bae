# make demo   set everything up, select learnwares for real tasks, and use them
# make test   lint, types, and all tests
# make docs   the documentation as a site: site/index.html
# make bench  the benchmarks that docs/speed.md quotes; beside peers after pip install ".[bench,parity]"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Language models allocate gigabytes at each step: with large pages a step of
# training takes three quarters of the time on Linux.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: venv demo test docs bench
venv: $(STAMP)

$(STAMP): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -qq --editable ".[test]"
	touch $(STAMP)

demo: venv
	$(BIN)/python -m experiments.select --config=configs/select.py:quickstart

test: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m learnware_jax.dock.materials
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: venv
	$(BIN)/python -m experiments.bench_reduce --config=configs/bench_reduce.py
	$(BIN)/python -m experiments.bench_rank --config=configs/bench_rank.py
	$(BIN)/python -m experiments.bench_slm --config=configs/bench_slm.py
	$(BIN)/python -m experiments.bench_pave --config=configs/bench_pave.py
