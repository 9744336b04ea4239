# Everything runs from .venv, which the first target that needs it builds: real SGLang on a machine
# without a GPU. Beside a full SGLang on a GPU machine install with `pip install --no-deps .` instead.
PYTHON ?= python3
PORT ?= 30000
MODEL ?=
ARGS ?=

BIN := .venv/bin
STAMP := .venv/installed
TORCH := torch==2.13.0 torchvision==0.28.0
TRITON := triton==3.6.0
SGLANG := sglang==0.5.17
MODEL_FLAG := $(if $(MODEL),--model "$(MODEL)")

.PHONY: setup demo serve test lint

setup: $(STAMP)

demo: setup
	$(BIN)/python -m sglang_spherical demo $(MODEL_FLAG) $(ARGS)

serve: setup
	$(BIN)/python -m sglang_spherical serve $(MODEL_FLAG) --port $(PORT) -- $(ARGS)

# Two processes with a thread each: most tests are too small for more threads.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# pip takes a CPU build of torch where its configuration offers one. That build brings no Triton, a
# CUDA build brings the release it was made with. SGLang's own requirements are CUDA builds: --no-deps.
$(STAMP): pyproject.toml Makefile patches/spherical_patches/torchvision_cpu.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11: set PYTHON=python3.11 or newer" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install $(TRITON)
	$(BIN)/python -m pip install --editable '.[cpu,eval,test]'
	$(BIN)/python -m pip install --no-deps $(SGLANG)
	$(BIN)/python -m spherical_patches.torchvision_cpu
	touch $@
