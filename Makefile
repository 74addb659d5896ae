# One command set, used by people and by CI alike. Everything happens in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

# one process a core and one thread a process; RUNNERS=4 on four cores
RUNNERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(RUNNERS) --dist worksteal
INTERPRETED = tests/kernels tests/rl tests/surgery
SAMPLE ?= 100
SEED ?= 0

.PHONY: help setup demo demo-short test test-rest test-all test-kernels coverage mutants lint imports \
	notebooks notebooks-save dist format type docs docs-check bench bench-gpu bench-smoke evidence \
	kernels check clean

help:
	@echo "make demo   train a StarNet on Fashion-MNIST (sets everything up)"
	@echo "make test   run the quick tests (sets everything up);  make test-all  run all"
	@echo "make check  lint, imports and types;  make bench  all benchmarks"
	@echo "make coverage  branch coverage;  make mutants  a sample of mutants"
	@echo "make notebooks  execute the notebooks;  make dist  wheel and sdist"
	@echo "make docs   build the site;  make docs-check  its links, and its pages in Chromium"
	@echo "make kernels  compile every kernel ahead of time: registers, spills, shared memory"

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[all,dev]'
	touch $(STAMP)

setup: $(STAMP)

demo: setup
	$(BIN)/python examples/vision_starnet.py

demo-short: setup
	$(BIN)/python examples/vision_starnet.py --data digits --epochs 8 --batch-size 32 --lr 0.002

# the quick tier: every public behaviour once
test: setup
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) -m 'interpret and not slow' $(INTERPRETED)

# what the quick tier leaves out; a process of its own for the interpreter, because whether Triton
# interprets is settled when a kernel is imported
test-rest: notebooks
	$(PYTEST) -m '(slow or export or hf or studies) and not interpret'
	TRITON_INTERPRET=1 $(PYTEST) -m 'interpret and slow' $(INTERPRETED)

test-all: test test-rest

# each in a kernel of its own, from top to bottom
notebooks: setup
	$(PYTEST) --nbmake --nbmake-timeout=900 notebooks

# the same, and keep the outputs
notebooks-save: setup
	$(PYTEST) --nbmake --nbmake-timeout=900 --overwrite notebooks
	$(BIN)/python -m tests.notebooks

# what a release uploads
dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation

test-kernels: setup
	TRITON_INTERPRET=1 $(PYTEST) -m interpret $(INTERPRETED)

# branch coverage of the quick tier, then of both
coverage: setup
	$(BIN)/python -m tests.tiers

# a sample of mutants of the library, each run against the tests that reach its line
mutants: setup
	$(BIN)/python -m tests.mutants --sample $(SAMPLE) --seed $(SEED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

check: lint imports type

docs: setup
	$(BIN)/mkdocs build --strict

# links and anchors, and every page in Chromium: --save (SAVE=--save) writes the screenshots
docs-check: setup
	$(BIN)/python -m tests.site.check $(SAVE)

# the pages under docs/evidence/, from the records of the studies
evidence: setup
	$(BIN)/python -m benchmarks.evidence

bench: setup
	$(BIN)/python -m benchmarks.core overhead
	$(BIN)/python -m benchmarks.core host
	$(BIN)/python -m benchmarks.core sweep
	$(BIN)/python -m benchmarks.core start
	$(BIN)/python -m benchmarks.vision speed
	$(BIN)/python -m benchmarks.vision demonet
	$(BIN)/python -m benchmarks.vision peers
	$(BIN)/python -m benchmarks.vision engines
	$(BIN)/python -m benchmarks.nlp quality
	$(BIN)/python -m benchmarks.nlp speed
	$(BIN)/python -m benchmarks.starify quality
	$(BIN)/python -m benchmarks.starify speed
	$(BIN)/python -m benchmarks.starify liger
	$(BIN)/python -m benchmarks.starify families
	$(BIN)/python -m benchmarks.rl quality
	$(BIN)/python -m benchmarks.rl speed
	$(BIN)/python -m benchmarks.coefficients dimension
	$(BIN)/python -m benchmarks.coefficients penalties
	$(BIN)/python -m benchmarks.coefficients eigen
	$(BIN)/python -m benchmarks.coefficients cost
	$(BIN)/python -m benchmarks.coefficients searches search
	$(BIN)/python -m benchmarks.coefficients searches tune
	$(BIN)/python -m benchmarks.evidence

bench-gpu: setup
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.gpu --tables

bench-smoke: export OMP_NUM_THREADS = 1
bench-smoke: setup
	$(BIN)/python -m benchmarks.core overhead --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.core host --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.core sweep --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.core start --smoke --processes 1 --out runs/smoke
	$(BIN)/python -m benchmarks.vision speed --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.vision demonet --smoke --processes 1 --out runs/smoke
	$(BIN)/python -m benchmarks.vision peers --smoke --processes 1 --out runs/smoke
	$(BIN)/python -m benchmarks.vision engines --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.nlp quality --smoke --processes 1 --out runs/smoke
	$(BIN)/python -m benchmarks.nlp speed --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.starify quality --smoke --processes 1 --out runs/smoke
	$(BIN)/python -m benchmarks.starify speed --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.starify liger --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.starify families --smoke --processes 1 --out runs/smoke
	$(BIN)/python -m benchmarks.rl quality --smoke --processes 1 --out runs/smoke
	$(BIN)/python -m benchmarks.rl speed --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.coefficients dimension --smoke --processes 1 --out runs/smoke
	$(BIN)/python -m benchmarks.coefficients penalties --smoke --processes 1 --out runs/smoke
	$(BIN)/python -m benchmarks.coefficients eigen --smoke --processes 1 --out runs/smoke
	$(BIN)/python -m benchmarks.coefficients cost --smoke --out runs/smoke
	$(BIN)/python -m benchmarks.coefficients searches search --smoke --processes 1 --out runs/smoke
	$(BIN)/python -m benchmarks.coefficients searches tune --smoke --processes 1 --out runs/smoke
	$(BIN)/python -m benchmarks.gpu --dry-run
	$(BIN)/python -m benchmarks.gpu --dry-run --tune

kernels: setup
	$(BIN)/python -m benchmarks.kernels

clean:
	rm -rf $(VENV) runs site dist .pytest_cache .mypy_cache .ruff_cache
