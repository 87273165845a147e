# Everything happens in .venv, made on the first call; PYTHON chooses its interpreter.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(wildcard src/*.h src/*.pyx src/kl_isa_*.cpp)
# Python compiles what is imported; pip would compile everything, which takes longer than to unpack it.
PIP := $(BIN)/pip install -q --no-compile

.PHONY: build demo demo-compare examples test test-all test-tensorflow test-oldest fuzz lint docs wheel wheel-test bench accuracy plots asv asv-check asv-compare cuda-check \
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
		$(BIN)/python -m pytest -n 2 -k tensorflow tests/test_keras_tensorflow.py tests/test_compat.py \
		&& $(BIN)/python examples/keras_cnn.py
# The adapters with the lower bounds of pyproject.toml; .venv has the newest.
test-oldest: build/oldest/installed
	PYTHONPATH=$(CURDIR)/build/oldest $(BIN)/python -m pytest -n 2 --dist worksteal $(patsubst %,tests/test_%.py,torch torch_topk torch_transforms jax jax_topk jax_sharded compat)
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
	$(BIN)/sphinx-build -W --keep-going docs docs/_build/html
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
	$(BIN)/python benchmarks/family.py accuracy
	$(BIN)/python benchmarks/topk.py --accuracy
plots: .venv/plots
	$(BIN)/python benchmarks/plots.py
# Commits as git names them ("RANGE=main~5..main"), or NEW: since the last measured ones. Each is built and installed in
# asv_bench/env. Then the pages: asv_bench/html, to be looked at with `asv preview`.
asv: RANGE ?= HEAD^!
asv: .venv/asv
	cd asv_bench && ../$(BIN)/asv machine --yes && ../$(BIN)/asv run "$(RANGE)" && ../$(BIN)/asv publish
# Every benchmark once, of klcore as it is in .venv; fails if one of them does. The figures mean nothing.
asv-check: .venv/asv
	cd asv_bench && ../$(BIN)/asv machine --yes && ../$(BIN)/asv check --python=same \
		&& ../$(BIN)/asv run --python=same --quick --show-stderr
# This commit beside BASE, in turns; fails where one of them is slower, larger or less exact by more than the factor.
asv-compare: .venv/asv
	cd asv_bench && ../$(BIN)/asv machine --yes && ../$(BIN)/asv continuous -f 1.2 $(BASE) HEAD
cuda-check: .venv/cuda-check
	$(BIN)/python benchmarks/cuda_check.py $(CHECK)
# Not in .venv: with the packages that PYTHON has, beside which klcore is built, and without the network.
CHECKED := first-light tests bits ceilings alone peers more
gpu-check:
	$(PYTHON) -m pip install -q --no-index --no-build-isolation --no-deps --upgrade --target build/gpu-check .
	out=build/gpu-check-$$(date +%Y%m%d-%H%M%S); export PYTHONPATH=$(CURDIR)/build/gpu-check:$$PYTHONPATH; failed=0; \
		$(PYTHON) benchmarks/gpu_run.py $$out $(patsubst %,--only %,$(CHECKED)) $(ARGS) || failed=1; \
		$(PYTHON) benchmarks/gpu_report.py $$out && { ! $(PYTHON) -c "import matplotlib" || $(PYTHON) benchmarks/plots.py; } \
		&& exit $$failed
# What a GPU that can be had for a quarter of an hour should have with it; gpu_run.py says how it is used there.
gpu-carry: .venv/gpu-carry
	$(BIN)/python benchmarks/gpu_carry.py $(ARGS)
# Pages of what gpu_run.py brought home: make gpu-report RUNS="FIRST SECOND", the folders of its calls.
gpu-report: .venv/plots
	$(BIN)/python benchmarks/gpu_report.py $(RUNS) && $(BIN)/python benchmarks/plots.py
minimax: .venv/test
	$(BIN)/python docs/minimax.py
clean:
	rm -rf .venv build docs/_build docs/api asv_bench/env src/kl_cpu.cpp klcore/_cpu*.so

.venv/bin/python:
	$(PYTHON) -m venv .venv && $(PIP) --upgrade pip
.venv/core: .venv/bin/python $(SOURCES)
	$(PIP) -e . && touch $@
# Beside .venv and before it: what its other packages do not go with.
build/tensorflow/installed: PACKAGES = tensorflow-cpu
build/oldest/installed: PACKAGES := $(shell sed -nE 's/^(torch|jax) = \["([a-z]+)>=([0-9.]+)".*/\2==\3/p' pyproject.toml)
build/%/installed: .venv/test-cpu
	$(PIP) --upgrade --target $(@D) $(PACKAGES) && touch $@
# klcore itself is compiled once: pip finds it installed, and brings what else a target needs.
.venv/%: .venv/core
	$(PIP) "klcore[$*]" && touch $@
