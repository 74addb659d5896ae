# One command set, used by people and by CI alike. Everything happens in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: help setup demo demo-short test test-kernels test-slow lint format type docs bench bench-gpu bench-smoke kernels check clean

help:
	@echo "make demo   train a StarNet on Fashion-MNIST (sets everything up)"
	@echo "make test   run the tests (sets everything up)"
	@echo "make check  lint and type check;  make bench  all benchmarks"
	@echo "make kernels  compile every kernel ahead of time: registers, spills, shared memory"

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[vision,nlp,rl,coefficients,deploy,dev]'
	touch $(STAMP)

setup: $(STAMP)

demo: setup
	$(BIN)/python examples/vision_starnet.py

demo-short: setup
	$(BIN)/python examples/vision_starnet.py --data digits --epochs 8 --batch-size 32 --lr 0.002

test: setup test-kernels
	$(BIN)/python -m pytest

# in a process of its own: whether Triton interprets is settled when a kernel is imported
test-kernels: setup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interpret tests/kernels

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
	$(BIN)/python -m benchmarks.nlp quality
	$(BIN)/python -m benchmarks.nlp speed
	$(BIN)/python -m benchmarks.starify quality
	$(BIN)/python -m benchmarks.starify speed
	$(BIN)/python -m benchmarks.rl quality
	$(BIN)/python -m benchmarks.rl speed
	$(BIN)/python -m benchmarks.coefficients dimension
	$(BIN)/python -m benchmarks.coefficients penalties
	$(BIN)/python -m benchmarks.coefficients eigen
	$(BIN)/python -m benchmarks.coefficients cost
	$(BIN)/python -m benchmarks.coefficients searches search
	$(BIN)/python -m benchmarks.coefficients searches tune

bench-gpu: setup
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.gpu --tables

bench-smoke: setup
	$(BIN)/python -m benchmarks.vision speed --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.vision demonet --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.vision peers --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.nlp quality --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.nlp speed --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.starify quality --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.starify speed --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.rl quality --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.rl speed --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.coefficients dimension --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.coefficients penalties --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.coefficients eigen --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.coefficients cost --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.coefficients searches search --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.coefficients searches tune --smoke --out runs/smoke

kernels: setup
	$(BIN)/python -m benchmarks.kernels

clean:
	rm -rf $(VENV) runs site dist .pytest_cache .mypy_cache .ruff_cache
