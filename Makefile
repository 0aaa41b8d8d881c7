# The verbs of the project. Every one of them sets up its own virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Override anything of the recipe: make train ARGS="train.total_tokens=200000"
ARGS ?=
NPROC ?= 2
# Threads of one process: its share of the cores. torchrun takes one where nothing is said, and says so in a banner.
OMP_NUM_THREADS ?= $(shell cores=$$(nproc); echo $$((cores > $(NPROC) ? cores / $(NPROC) : 1)))
# Some benchmarks only: make bench BENCHMARKS="step_time kernels"
BENCHMARKS ?=
# The ranks of a test share the cores, so each stays on one thread.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
TEST_JOBS ?= 2

.PHONY: train train-moe test test-cpus test-slow parity peft-suite checks style docs bench claims setup clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools wheel ninja numpy
	# DeepSpeed's build imports torch, so it cannot be built in isolation; it compiles nothing now.
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

train: $(READY)
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/torchrun --nproc-per-node $(NPROC) launch/train.py --config recipes/quickstart.yaml $(ARGS)

# The same with a mixture of experts.
train-moe: $(READY)
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/torchrun --nproc-per-node $(NPROC) launch/train.py --config recipes/moe_quickstart.yaml $(ARGS)

test: $(READY)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadgroup

# The vector code of torch that the processor can run: the kernels give the same beside each of them.
test-cpus: $(READY)
	@for capability in default $$($(BIN)/python -c "import torch; has = torch.cpu.get_capabilities().get; \
	print(*(name for name, flag in (('avx2', 'avx2'), ('avx512', 'avx512_vl')) if has(flag)))"); do \
		echo "ATEN_CPU_CAPABILITY=$$capability"; \
		ATEN_CPU_CAPABILITY=$$capability $(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadgroup \
			tests/kernels tests/parallel/test_precision.py || exit 1; \
	done

test-slow: $(READY)
	$(TEST_ENV) $(BIN)/python -m pytest -m slow

# Every layout beside one process, parameter by parameter; goes on where it was cut off. A part: ARGS="--share 0.1".
parity: $(READY)
	$(TEST_ENV) $(BIN)/python -m tests.parity.run $(ARGS)

# PEFT's own tests, of its source distribution, on the methods that it has from us.
peft-suite: $(READY)
	$(TEST_ENV) $(BIN)/python benchmarks/peft_suite/run.py

checks: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python benchmarks/perf/run.py $(BENCHMARKS)
	$(BIN)/python benchmarks/figures.py

# What papers say of their methods, three seeds each; finished runs are not repeated.
claims: $(READY)
	$(BIN)/python benchmarks/claims/run.py
	$(BIN)/python benchmarks/figures.py

clean:
	rm -rf $(VENV) build dist site *.egg-info
