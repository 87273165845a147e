# Everything happens in .venv, made on the first call; PYTHON chooses its interpreter.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(wildcard src/*.h src/*.pyx)

.PHONY: build demo examples test lint wheel wheel-test bench cuda-check gpu-check minimax clean

build: .venv/core
demo: .venv/demo
	$(BIN)/python examples/distill_digits.py
examples: .venv/examples
	$(BIN)/python examples/torch_distill.py
	$(BIN)/python examples/keras_cnn.py
test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal
lint: .venv/lint
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && PATH=$(CURDIR)/$(BIN):$$PATH cython-lint src
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
cuda-check: .venv/cuda-check
	$(BIN)/python benchmarks/cuda_check.py $(CHECK)
# Not in .venv: with the packages that PYTHON has, beside which klcore is built, and without the network.
gpu-check:
	$(PYTHON) -m pip install -q --no-index --no-build-isolation --no-deps --upgrade --target build/gpu-check .
	PYTHONPATH=$(CURDIR)/build/gpu-check:$$PYTHONPATH $(PYTHON) benchmarks/gpu_check.py $(ARGS)
minimax: .venv/test
	$(BIN)/python docs/minimax.py
clean:
	rm -rf .venv build src/kl_cpu.cpp klcore/_cpu*.so

.venv/bin/python:
	$(PYTHON) -m venv .venv && $(BIN)/pip install -q --upgrade pip
.venv/%: .venv/bin/python $(SOURCES)
	$(BIN)/pip install -q -e ".[$*]" && touch $@
