# One command set, used by people and by CI alike. Everything happens in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: help setup demo demo-short test test-slow lint format type docs bench bench-smoke check clean

help:
	@echo "make demo   train a StarNet on Fashion-MNIST (sets everything up)"
	@echo "make test   run the tests (sets everything up)"
	@echo "make check  lint and type check;  make bench  all vision benchmarks"

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[vision,dev]'
	touch $(STAMP)

setup: $(STAMP)

demo: setup
	$(BIN)/python examples/vision_starnet.py

demo-short: setup
	$(BIN)/python examples/vision_starnet.py --data digits --epochs 8 --batch-size 32 --lr 0.002

test: setup
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup
	$(BIN)/mypy

check: lint type

docs: setup
	$(BIN)/python -m pip install -q -e '.[docs]'
	$(BIN)/mkdocs build --strict

bench: setup
	$(BIN)/python -m benchmarks.vision speed
	$(BIN)/python -m benchmarks.vision demonet
	$(BIN)/python -m benchmarks.vision peers

bench-smoke: setup
	$(BIN)/python -m benchmarks.vision speed --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.vision demonet --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.vision peers --smoke --out runs/smoke

clean:
	rm -rf $(VENV) runs site dist .pytest_cache .mypy_cache .ruff_cache
