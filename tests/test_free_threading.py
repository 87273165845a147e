"""Many threads at once in klcore: the same bits as one after another, while others change every setting.

With the global interpreter lock this shows what happens while kernels compute without it; on a free-threaded Python,
what happens in klcore itself.
"""

import importlib
import itertools
import sys
import sysconfig
import threading
import time
import types

import numpy as np
import pytest

import klcore
from klcore import _cpu

registry = importlib.import_module("klcore.backends")
SECONDS = 2
WORKERS = 8
SHAPES = ((7,), (3, 5), (40, 1025), (2, 20_500), (6, 2, 700))
DTYPES = ("float64", "float32", "float16")
CALLS = list(itertools.product(SHAPES, DTYPES, ("probs", "logits"), ("row", "sum"), (None, ("x", "y"))))


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python is not free-threaded")
def test_importing_leaves_the_lock_off(python):
    code = f"import sys, klcore; klcore.kl_div({[0.5, 0.5]}, {[0.9, 0.1]}); print(sys._is_gil_enabled())"
    assert python(code) == "False\n"  # Python warns, here an error, if an extension module enables the lock


def compute(shape, dtype, space, reduction, gradient):
    """The bytes of a call's results; every call makes its own arrays."""
    x, y = np.random.default_rng(len(shape)).random((2, *shape)).astype(dtype)
    found = klcore.kl_div(x, y, space=space, reduction=reduction, return_grad=gradient)
    return [np.asarray(a).tobytes() for a in (found if gradient else (found,))]


def in_threads(*works):
    """Run each of `works`, functions of a stop flag, in a thread, for SECONDS; raise what they raise."""
    stop, errors, ready = threading.Event(), [], threading.Barrier(len(works))

    def run(work):
        try:
            ready.wait()
            work(stop)
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    stop.wait(SECONDS)
    stop.set()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_same_bits_while_everything_changes(monkeypatch):
    expected = [compute(*call) for call in CALLS]
    before, isa = klcore.get_num_threads(), _cpu.instruction_set()
    usable = [name for name, supported in _cpu.instruction_sets().items() if supported and name != "generic"] or [isa]
    monkeypatch.setattr(registry, "_MODULES", dict(registry._MODULES))
    done = [0] * WORKERS

    def worker(number):
        def work(stop):
            for k in itertools.count(number * len(CALLS) // WORKERS):
                if done[number] and stop.is_set():  # on a busy machine a thread may not have had its turn yet
                    return
                at = k % len(CALLS)
                with klcore.threads(1 + k % 3):
                    assert compute(*CALLS[at]) == expected[at], CALLS[at]
                    assert klcore.get_num_threads() == 1 + k % 3
                done[number] += 1

        return work

    def turn_knobs(stop):
        for k in itertools.count():
            if stop.is_set():
                return
            klcore.set_num_threads(1 + k % 4)
            _cpu.use_instruction_set(usable[k % len(usable)])
            klcore.register_backend(f"library{k % 50}", "nowhere")
            assert klcore.list_backends()["numpy"] == "klcore.backends.cpu"
            assert klcore.get_num_threads() in range(1, 5)
            assert klcore.show_config("dicts")["cpu"]["instruction set in use"] in usable
            time.sleep(1e-4)

    try:
        in_threads(*(worker(number) for number in range(WORKERS)), turn_knobs, turn_knobs)
    finally:
        klcore.set_num_threads(before)
        _cpu.use_instruction_set(isa)
    assert min(done) > 0


def test_a_backend_registered_while_its_arrays_arrive(monkeypatch):
    """Calls made after register_backend has returned get the new backend, whatever other threads were finding
    meanwhile."""
    monkeypatch.setattr(registry, "_MODULES", dict(registry._MODULES))
    for number in range(2):
        module = types.ModuleType(f"backend{number}")
        module.compute = lambda call, number=number: number
        monkeypatch.setitem(sys.modules, module.__name__, module)
    klcore.register_backend("toylib", "backend0")

    def new_array():
        return type("Array", (), {"__module__": "toylib"})()

    def call(stop):
        while not stop.is_set():
            array = new_array()
            assert klcore.kl_div(array, array) in (0, 1)

    def register(stop):
        for k in itertools.count(1):
            if stop.is_set():
                return
            klcore.register_backend("toylib", f"backend{k % 2}")
            array = new_array()
            assert klcore.kl_div(array, array) == k % 2

    in_threads(register, *[call] * (WORKERS - 1))


def test_the_first_call_keeps_what_another_thread_sets(monkeypatch):
    threads = importlib.import_module("klcore.backends.threads")

    def slow_default():
        klcore.set_num_threads(3)  # as another thread may do meanwhile
        return 1

    monkeypatch.setattr(threads, "_default", slow_default)
    monkeypatch.setattr(threads, "_set", None)
    monkeypatch.setattr(threads, "_found", None)
    assert klcore.get_num_threads() == 1
    assert klcore.get_num_threads() == 3
