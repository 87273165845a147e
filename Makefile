# Everything runs in .venv, which the first call creates; PYTHON chooses its interpreter.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(wildcard src/*.h src/*.pyx src/kl_isa_*.cpp)
# Python compiles what is imported; pip would compile everything, which takes longer than to unpack it.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/pip install -q --no-compile

.PHONY: build demo demo-compare examples test test-all test-tensorflow test-oldest fuzz lint docs wheel wheel-test bench accuracy plots pictures asv asv-check asv-compare cuda-check \
	gpu-check gpu-carry gpu-report minimax clean

build: .venv/core
demo: .venv/demo
	$(BIN)/python examples/distill_digits.py
demo-compare: .venv/compare
	$(BIN)/python examples/compare_quantised.py
examples: .venv/examples
	$(BIN)/python examples/torch_distill.py
	$(BIN)/python examples/topk_distillation.py
	$(BIN)/python examples/keras_cnn.py
	$(BIN)/python examples/vae_digits.py
	$(BIN)/python examples/direction.py
	$(BIN)/python examples/drift.py
	$(BIN)/python examples/tensor_parallel.py
	$(BIN)/python examples/linear_distillation.py
test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not exhaustive"
	$(BIN)/python -m pytest -n 2 --dist loadfile -p docs.pages --ignore docs/_extensions README.md docs  # a page is one program
test-all: test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m exhaustive
# Keras on TensorFlow: a process has one backend of Keras', and TensorFlow is not for everybody's .venv.
test-tensorflow: .venv/demo build/tensorflow/installed
	export KERAS_BACKEND=tensorflow PYTHONPATH=$(CURDIR)/build/tensorflow; \
		$(BIN)/python -m pytest -n 2 -k tensorflow tests/test_keras_tensorflow.py tests/test_compat_keras.py \
		&& $(BIN)/python examples/keras_cnn.py
# The adapters with the lower bounds of pyproject.toml; .venv has the newest.
test-oldest: build/oldest/installed
	PYTHONPATH=$(CURDIR)/build/oldest $(BIN)/python -m pytest -n 2 --dist worksteal $(patsubst %,tests/test_%.py,torch torch_topk torch_transforms jax jax_topk jax_sharded compat*)
# Random calls against the oracle, under gcc's sanitizers: make fuzz SECONDS=900 SEED=7, or again what failed: SEED=7 CALL=8
fuzz: SECONDS ?= 60
fuzz: SEED ?= 0
fuzz: .venv/test
	KLCORE_SANITIZE=address,undefined,float-cast-overflow $(BIN)/python setup.py -q build \
		--build-base build/fuzz --build-lib build/fuzz/lib
	$(BIN)/python tests/fuzz.py --sanitized build/fuzz/lib --seconds $(SECONDS) --seed $(SEED) $(if $(CALL),--call $(CALL))
lint: .venv/lint
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && PATH=$(CURDIR)/$(BIN):$$PATH cython-lint src
	$(BIN)/mypy && $(BIN)/stubtest klcore._cpu --ignore-missing-stub --mypy-config-file .ci/stubtest.ini
	$(BIN)/zizmor --offline --quiet .
docs: .venv/docs
	$(BIN)/sphinx-build -EW --keep-going docs docs/_build/html
wheel: .venv/wheel
	rm -rf dist && $(BIN)/python -m build
	[ $$(uname) != Linux ] || PATH=$(CURDIR)/$(BIN):$$PATH auditwheel repair --strip -w dist dist/*-linux_*.whl
	rm -f dist/*-linux_*.whl
# The whole suite against the wheel, with neither the sources nor a compiler at hand.
wheel-test: wheel
	rm -rf build/installed && $(PYTHON) -m venv build/installed && cp -r tests pyproject.toml build/installed
	build/installed/bin/pip install -q --upgrade pip
	build/installed/bin/pip install -q "$$(echo dist/*.whl)[test]"
	cd build/installed && PATH=$$PWD/bin python -m pytest -n 2 --dist worksteal tests --pyargs klcore
bench: .venv/bench
	$(BIN)/python benchmarks/side_by_side.py
	$(BIN)/python benchmarks/adapters.py
	$(BIN)/python benchmarks/family.py speed
	$(BIN)/python benchmarks/topk.py
accuracy: .venv/accuracy
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/accuracy.py --close
	$(BIN)/python benchmarks/family.py accuracy
	$(BIN)/python benchmarks/topk.py --accuracy
plots: .venv/plots
	$(BIN)/python benchmarks/plots.py
# What the examples draw, into docs/pictures.
pictures: demo demo-compare examples
	cp examples/output/*-light.svg examples/output/*-dark.svg docs/pictures
# A range of commits for git ("RANGE=main~5..main"), or NEW: those since the last measurement. Each is built and installed
# in asv_bench/env. Then the pages are written to asv_bench/html; `asv preview` shows them.
asv: RANGE ?= HEAD^!
asv: .venv/asv
	cd asv_bench && ../$(BIN)/asv machine --yes && ../$(BIN)/asv run "$(RANGE)" && ../$(BIN)/asv publish
# Runs every benchmark once, with klcore from .venv; fails if one of them fails. The figures mean nothing.
asv-check: .venv/asv
	cd asv_bench && ../$(BIN)/asv machine --yes && ../$(BIN)/asv check --python=same \
		&& ../$(BIN)/asv run --python=same --quick --show-stderr
# Compares this commit with BASE, in turns; fails if a benchmark is slower, larger or less accurate by more than the factor.
asv-compare: .venv/asv
	cd asv_bench && ../$(BIN)/asv machine --yes && ../$(BIN)/asv continuous -f 1.2 $(BASE) HEAD
cuda-check: .venv/cuda-check
	$(BIN)/python benchmarks/cuda_check.py $(CHECK)
# Without .venv and without network: klcore is built beside the packages that PYTHON has.
CHECKED := first-light tests bits ceilings alone peers more
gpu-check:
	$(PYTHON) -m pip install -q --no-index --no-build-isolation --no-deps --upgrade --target build/gpu-check .
	out=build/gpu-check-$$(date +%Y%m%d-%H%M%S); export PYTHONPATH=$(CURDIR)/build/gpu-check:$$PYTHONPATH; failed=0; \
		$(PYTHON) benchmarks/gpu_run.py $$out $(patsubst %,--only %,$(CHECKED)) $(ARGS) || failed=1; \
		$(PYTHON) benchmarks/report.py $$out && { ! $(PYTHON) -c "import matplotlib" || $(PYTHON) benchmarks/plots.py; } \
		&& exit $$failed
# Prepares what a GPU borrowed for a quarter of an hour needs; gpu_run.py describes how it is used there.
gpu-carry: .venv/gpu-carry
	$(BIN)/python benchmarks/gpu_carry.py $(ARGS)
# Pages of the results of gpu_run.py: make gpu-report RUNS="FIRST SECOND", the folders of its calls.
gpu-report: .venv/plots
	$(BIN)/python benchmarks/report.py $(RUNS) && $(BIN)/python benchmarks/plots.py
minimax: .venv/test
	$(BIN)/python docs/minimax.py
clean:
	rm -rf .venv build docs/_build docs/api asv_bench/env src/kl_cpu.cpp klcore/_cpu*.so

.venv/bin/python:
	$(PYTHON) -m venv .venv && $(PIP) --upgrade pip
.venv/core: .venv/bin/python $(SOURCES)
	$(PIP) -e . && touch $@
# Packages that conflict with those of .venv: installed beside it, and found first.
build/tensorflow/installed: PACKAGES = tensorflow-cpu
build/oldest/installed: PACKAGES := $(shell sed -nE 's/^(torch|jax) = \["([a-z]+)>=([0-9.]+)".*/\2==\3/p' pyproject.toml)
build/%/installed: .venv/test-cpu
	$(PIP) --upgrade --target $(@D) $(PACKAGES) && touch $@
# klcore itself is compiled once: pip finds it installed, and installs whatever else a target needs.
.venv/%: .venv/core
	$(PIP) "klcore[$*]" && touch $@
