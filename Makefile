# `make demo` and `make test` each do all their own set-up on a machine with Python 3.10+, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/installed $(VENV)/built
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test compile-some-kernels compile-kernels compile-kernels-newest bench gpu checks coverage lint lint-project docs sanitize sanitize-subset sanitized-build sanitized-calls sanitized-kernels fuzz package properties programs soak versions clean
.DELETE_ON_ERROR:

# Python keeps what it compiles, also where the environment says otherwise (images of containers often do): tests start
# many processes, and each would compile PyTorch's own files again, more than half of its start.
export PYTHONDONTWRITEBYTECODE :=

demo:
	$(MAKE) -j 2 $(READY)
	$(BIN)/python -m cnnlstm_fast demo

# What malloc returns is poisoned, as fresh tensors are: the kernels' scratch memory too.
PYTEST = MALLOC_PERTURB_=128 $(BIN)/python -m pytest -q -rfEs -n 2 --dist worksteal
test:
	$(MAKE) -j 3 --output-sync checks
	$(PYTEST)

# All of `test` but the tests. More at once than there are cores: installing waits for the network, and compiling ends
# with one long file. The sanitized tests wait longest for theirs, so that the others are nice to it.
checks: sanitize-subset $(READY) lint lint-project docs compile-some-kernels

# Apart from `test`, of which the tracer would be a seventh. It counts what runs in the processes of pytest alone, not in
# those that tests start (the demo, the examples).
coverage: $(READY)
	$(PYTEST) --cov --cov-report=term:skip-covered

# A twentieth of the variants for one architecture each, which ones the seed decides; below all for all three: minutes.
compile-some-kernels: $(READY)
	nice $(BIN)/python tests/native/compile_some.py

compile-kernels: $(READY)
	$(BIN)/python -m cnnlstm_fast doctor --compile-kernels

# By another Triton than torch's own, in a folder of its own that comes before it.
NEWEST_TRITON ?= 3.9.0
compile-kernels-newest: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target build/triton triton==$(NEWEST_TRITON)
	PYTHONPATH=$(CURDIR)/build/triton $(BIN)/python -m cnnlstm_fast doctor --compile-kernels

bench: $(READY)
	mkdir -p build
	$(BIN)/python -m benchmarks run --quick --output build/quick.json
	$(BIN)/python -m benchmarks plot build/quick.json
	$(BIN)/python -m benchmarks regret --blocks 60

# On a machine with a CUDA device: its own Python and torch, no network. Results go under OUT, if set.
# Where nothing can be installed, the kernels are linked to where an installation would put them.
gpu:
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps --no-index -e . || ln -sfn ../kernels cnnlstm_fast/kernels
	$(PYTHON) -m pytest -q -m gpu; tests=$$?; \
	$(PYTHON) -m benchmarks gpu --folder $(if $(OUT),$(OUT)/)benchmarks/results && exit $$tests

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer, with every
# instruction set of this machine. Building takes minutes, so `test` runs a subset.
SANITIZED := -m pytest -q -x -p no:cacheprovider
sanitize: $(VENV)/installed
	CNNLSTM_FAST_CASES=100 $(BIN)/python tests/native/sanitized.py address $(SANITIZED) tests/test_properties.py tests/test_wrong_calls.py
	$(BIN)/python tests/native/sanitized.py address tests/native/fuzz.py --seconds 20
	$(BIN)/python tests/native/sanitized.py thread $(SANITIZED) tests/test_properties.py tests/test_memory.py tests/test_concurrency.py -k "test_properties or get_memory or many_threads or trained_on"

# The baseline kernels and all that is around them under AddressSanitizer and UndefinedBehaviorSanitizer: a
# quarter of what there is to compile. It is compiled once; then two halves may run side by side: wrong calls and
# properties, and the suites of the kernels, one in SHARE of every test's cases, with every limit at its least and
# every buffer fenced (docs/contributing.md), so that small tensors go where large ones do.
SHARE ?= 64
KERNEL_TESTS := $(patsubst %,tests/test_%.py,conv_block_ops functional_conv_block conv_block activations conv_norm epilogue winograd frozen_conv conv_fft python_inside recurrent_ops properties)
# (Those that would take minutes there, and what starts processes or compilers of its own.)
LEFT_OUT := not wrong_calls and not compile and not export and not graph_break and not opcheck and not bounded and not several_chunks and not shared_by_cores and not large and not ctrl_c and not explain and not real_size and not pointwise_strided_in_bfloat16
# Then what multiplies by a processor's unit, by one in plain C++.
UNIT_TESTS := tests/test_packed_pairs.py tests/test_bfloat16.py
OF_UNITS := test_packed_pairs and not again or layers and not other_units and not small or ahead or many_sequences
HAS_SANITIZER := $${CXX:-g++} -print-file-name=libasan.so | grep -q /
BASELINE := CNNLSTM_FAST_ISA=baseline CNNLSTM_FAST_CASES=10
sanitize-subset: sanitized-calls sanitized-kernels

sanitized-build: $(VENV)/build-tools
	@if $(HAS_SANITIZER); then \
		$(BASELINE) $(BIN)/python tests/native/sanitized.py address; \
	else \
		echo "left out: the compiler $${CXX:-g++} has no AddressSanitizer (libasan.so)"; \
	fi

sanitized-calls: sanitized-build $(VENV)/installed
	@if $(HAS_SANITIZER); then \
		export $(BASELINE); \
		$(BIN)/python tests/native/sanitized.py --built address $(SANITIZED) tests/test_properties.py tests/test_wrong_calls.py && \
		$(BIN)/python tests/native/sanitized.py --built address tests/native/fuzz.py --seconds 5; \
	fi

sanitized-kernels: sanitized-build $(VENV)/installed
	@if $(HAS_SANITIZER); then \
		export $(BASELINE) CNNLSTM_FAST_LEAST=1 CNNLSTM_FAST_FENCES=1 CNNLSTM_FAST_SHARE=$(SHARE); \
		$(BIN)/python tests/native/sanitized.py --built address $(SANITIZED) $(KERNEL_TESTS) -k "$(LEFT_OUT)" && \
		CNNLSTM_FAST_BFLOAT16=emulated_amx CNNLSTM_FAST_SHARE=12 \
			$(BIN)/python tests/native/sanitized.py --built address $(SANITIZED) $(UNIT_TESTS) -k "$(OF_UNITS)"; \
	fi

FUZZ_SECONDS ?= 60
fuzz: $(VENV)/installed
	mkdir -p build
	rm -f build/fuzz.json
	$(BIN)/python tests/native/sanitized.py address tests/native/fuzz.py --seconds $(FUZZ_SECONDS) --journal $(CURDIR)/build/fuzz-call.json --output $(CURDIR)/build/fuzz.json

package: $(READY)
	CNNLSTM_FAST_LONG=1 $(BIN)/python -m pytest -q tests/test_packaging.py

CASES ?= 20000
properties: $(READY)
	$(BIN)/python tests/properties.py --cases $(CASES)

PROGRAMS ?= 20000
programs: $(READY)
	$(BIN)/python tests/programs.py --programs $(PROGRAMS)

soak: $(READY)
	$(BIN)/python -m benchmarks soak

# Interpreters with other versions of torch, as in PYTHONS="a/bin/python b/bin/python".
versions: $(READY) compile-kernels-newest
	$(BIN)/python tests/native/versions.py $(PYTHONS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	nice $(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name "*.cpp" -o -name "*.h" -o -name "*.inc") tests/native/*.cpp

# The project's own files, each by its linter. What is in version control must be in the source archive too, which is
# made without torch: importing it four times took most of the time.
lint-project: $(VENV)/installed
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --strict-collection --no-progress --quiet .github
	$(BIN)/pre-commit validate-config .pre-commit-config.yaml
	VALIDATE_PYPROJECT_NO_NETWORK=1 $(BIN)/validate-pyproject pyproject.toml
	@if git rev-parse --git-dir >/dev/null 2>&1; then \
		mkdir -p build/without && echo 'raise ImportError' > build/without/torch.py && \
		PYTHONPATH=$(CURDIR)/build/without $(BIN)/check-manifest --no-build-isolation; \
	else \
		echo "left out: check-manifest, this is no git repository"; \
	fi

# Guides and API reference as one site, build/docs/index.html. A warning is an error.
docs: $(VENV)/installed
	nice $(BIN)/python -m sphinx -q -E -W --keep-going -b html docs build/docs

# What is imported is compiled then; compiling all files of all packages would take a minute.
INSTALL := nice $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check
$(VENV)/build-tools: requirements-build.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements-build.txt
	touch $@

# The kernels are compiled meanwhile, where make may do two things at once.
$(VENV)/installed: $(VENV)/build-tools requirements-dev.txt requirements-data.txt requirements-docs.txt
	$(INSTALL) -r requirements-dev.txt -r requirements-docs.txt
	$(INSTALL) --no-deps -r requirements-data.txt
	touch $@

$(VENV)/built: $(VENV)/build-tools $(SOURCES)
	CNNLSTM_FAST_REQUIRE_EXTENSION=1 nice $(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build dist *.egg-info cnnlstm_fast/_C*.so demo_output $(VENV)
