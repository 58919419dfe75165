# Commands for users and developers. The virtual environment is created when it is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_ROOT_USER_ACTION := ignore
export PIP_DISABLE_PIP_VERSION_CHECK := 1
GPU_PYTHON ?= $(BIN)/python
READY := $(VENV)/.ready
# The demo's two processes need two GPUs, or else the CPU; a single GPU takes it in one process. GPUs
# older than Ampere have no bf16.
ON_GPU = $(shell $(BIN)/python -c 'from torch import cuda; gpus = cuda.device_count(); \
	print("layout.kind=one" * (gpus == 1), \
	"train.precision=fp16" * (gpus > 0 and not cuda.is_bf16_supported(False)))')

.PHONY: help venv demo report results test test-kernels gpu test-slurm drill check format sample docs clean

help:           ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 12

venv: $(READY)  ## create or update .venv with all dependencies

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@[ -e $(BIN)/alexnet-dist ] || $(PYTHON) -c 'import shutil, sys; \
		gb = shutil.disk_usage(".").free / 1e9; sys.exit(gb < 8 and \
		f"The packages need 8 GB of disk here, and pip some more in /tmp; {gb:.1f} GB are free.")'
	@echo "installing into $(VENV): a few minutes, and about 7 GB"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch torchvision
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,check,export]'
	@touch $@

demo: $(READY)  ## train the two-column network on bundled images: minutes on two CPU cores
	$(BIN)/alexnet-dist prepare fashion_mnist configs/fashion-mnist-sample data/demo
	$(BIN)/alexnet-dist train configs/demo.yaml $(ON_GPU)

report: $(READY) ## write runs/report.html: the paper's results, and those of the runs in runs/
	$(BIN)/alexnet-dist report $(wildcard runs/*) --out runs/report.html

results: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),$(READY)) ## train the networks of docs/results.md, into docs/results.jsonl: hours; continues where it stopped; PARTS=… WITHIN=seconds
	$(GPU_PYTHON) docs/results.py $(PARTS) $(if $(WITHIN),--within $(WITHIN)) $(if $(COMMIT),--commit $(COMMIT))

test: $(READY)  ## run the tests, but for those of the other targets
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		-m "not drill and not slurm and not kernels"

test-kernels: $(READY) ## run the GPU's kernels by Triton's interpreter, in more shapes than `make test`: two minutes
	$(BIN)/python -m pytest -n auto --maxprocesses 3 --dist loadfile -m kernels \
		tests/test_fused_kernels.py tests/test_execution.py tests/test_plan.py

gpu: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),$(READY)) ## test and measure this GPU, into docs/gpu.jsonl: minutes; continues where it stopped; PARTS=…
	$(GPU_PYTHON) docs/gpu.py $(PARTS) $(if $(COMMIT),--commit $(COMMIT))

test-slurm: $(READY) ## run the tests that start a real Slurm: minutes; as root; apt-get install slurm-wlm munge
	$(BIN)/python -m pytest -m slurm -s tests/test_slurm.py

drill: $(READY) ## run fault drills: minutes; DRILLS=full: hours, into docs/drills.jsonl; continues where it stopped
	$(BIN)/python -m pytest -m drill
	FUZZ=20 $(BIN)/python -m pytest tests/test_hostile_sources.py
	$(BIN)/python docs/drills.py $(if $(filter full,$(DRILLS)),--full)
	$(if $(filter full,$(DRILLS)),$(BIN)/python docs/storm.py $(if $(WITHIN),--within $(WITHIN)))

check: $(READY) ## check style, types and package layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=docs:tests $(BIN)/mypy --implicit-reexport --follow-imports=silent docs/*.py tests/test_gpu*.py
	$(BIN)/lint-imports

format: $(READY) ## fix style where possible
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sample: $(READY) ## cut the bundled images again, from Debian's dataset-fashion-mnist
	$(BIN)/python configs/fashion-mnist-sample/cut.py \
		/usr/share/datasets/fashion-mnist configs/fashion-mnist-sample

docs: $(READY)  ## regenerate docs/configuration.md from the dataclasses, and the tables from docs/*.jsonl
	$(BIN)/python docs/document_config.py
	$(BIN)/python docs/gpu.py --document
	$(BIN)/python docs/storm.py --document
	$(BIN)/python docs/results.py --document

clean:          ## remove what `make` made, except data and runs
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache
