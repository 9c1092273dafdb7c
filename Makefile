# `make demo` and `make test` each do all their own set-up on a machine with Python 3.10+, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*)

.PHONY: demo test bench gpu lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/built
	$(BIN)/python -m cnnlstm_fast demo

test: $(VENV)/built lint
	$(BIN)/python -m cnnlstm_fast doctor --compile-kernels
	$(BIN)/python -m pytest -q

bench: $(VENV)/built
	mkdir -p build
	$(BIN)/python -m benchmarks run --quick --output build/quick.json
	$(BIN)/python -m benchmarks plot build/quick.json

# On a machine with a CUDA device: its own Python and torch, no network. Results go under OUT, if set.
# Where nothing can be installed, the kernels are linked to where an installation would put them.
gpu:
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps --no-index -e . || ln -sfn ../kernels cnnlstm_fast/kernels
	$(PYTHON) -m pytest -q -m gpu; tests=$$?; \
	$(PYTHON) -m benchmarks gpu --folder $(if $(OUT),$(OUT)/)benchmarks/results && exit $$tests

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cpu/*.inc

$(VENV)/installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	CNNLSTM_FAST_REQUIRE_EXTENSION=1 $(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build dist *.egg-info cnnlstm_fast/_C*.so demo_output $(VENV)
