"""Which module computes, with how many threads and which instructions: the registry, its options, its errors."""

import asyncio
import importlib
import inspect
import sys
import threading
import types

import numpy as np
import pytest
from conftest import operands

import klcore
from klcore import _cpu
from klcore.operations import LOSSES, OPERATIONS, Call

# the attribute klcore.backends is the public function, so the module is imported by name
registry = importlib.import_module("klcore.backends")


@pytest.fixture
def clean_registry(monkeypatch):
    """A registry that forgets what the test adds."""
    monkeypatch.setattr(registry, "_MODULES", dict(registry._MODULES))
    yield
    monkeypatch.undo()
    registry._libraries.clear()
    registry._loaded.clear()


def array_class(module, name="Array", base=object):
    return type(name, (base,), {"__module__": module})


@pytest.fixture
def toy(clean_registry, monkeypatch):
    """A backend with its own library, which returns its arguments."""
    module = types.ModuleType("toy_backend")
    module.calls = []

    def compute(call):
        module.calls.append(call)
        return "computed", call.operation.name

    module.compute = compute
    monkeypatch.setitem(sys.modules, "toy_backend", module)
    klcore.register_backend("toylib", "toy_backend")
    return module


# ---- the registry ----------------------------------------------------------------------------------------------------


def test_backends_is_a_copy():
    found = klcore.list_backends()
    assert found["numpy"] == "klcore.backends.cpu"
    assert found["cupy"] == "klcore.backends.cuda"
    found["numpy"] = "elsewhere"
    assert klcore.list_backends()["numpy"] == "klcore.backends.cpu"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_toy_backend(toy, operation):
    """It gets every argument of the public function."""
    x, y = array_class("toylib")(), array_class("toylib")()
    arrays = operands(operation, x, y)
    lists = {"indices": object(), "tail": object(), "tail_mass": object()}
    keywords = {
        "space": "logits",
        "axis": 3,
        "reduction": "rowmean",
        "weights": object(),
        "denominator": object(),
        "temperature": 2.5,
        "base": None,
        **(lists if OPERATIONS[operation].takes_indices else {}),
        "return_grad": "x",
        "out": object(),
        "device": None,
    }
    assert getattr(klcore, operation)(*arrays, **keywords, **OPERATIONS[operation].needed) == ("computed", operation)
    x, y = arrays if len(arrays) == 2 else (*arrays, None)
    row = OPERATIONS[operation]
    assert [c._replace(parameter=0.0) for c in toy.calls] == [
        Call(row, x, y, **{k: v for k, v in keywords.items() if k != "base"})
    ]
    public = [name for name in inspect.signature(getattr(klcore, operation)).parameters if name not in "xy"]
    assert public == [*row.parameters, *keywords]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_defaults(toy, operation):
    x = array_class("toylib")()
    arrays = operands(operation, x, x)
    getattr(klcore, operation)(*arrays, **OPERATIONS[operation].needed)
    expected = Call(OPERATIONS[operation], *(*arrays, None)[:2], "probs", -1, "row")
    expected = expected._replace(weights=None, temperature=1.0, return_grad=None, out=None, device=None)
    assert [c._replace(parameter=0.0) for c in toy.calls] == [expected]


def test_registered_backend_is_listed_and_can_be_replaced(toy, monkeypatch):
    assert klcore.list_backends()["toylib"] == "toy_backend"
    klcore.entropy(array_class("toylib")())
    other = types.ModuleType("other_backend")
    other.compute = lambda call: "from the other"
    monkeypatch.setitem(sys.modules, "other_backend", other)
    klcore.register_backend("toylib", "other_backend")
    assert klcore.entropy(array_class("toylib")()) == "from the other"


def test_unknown_type_may_be_registered_later(clean_registry, monkeypatch):
    x = array_class("laterlib")()
    with pytest.raises(TypeError, match="laterlib"):
        klcore.entropy(x)
    module = types.ModuleType("later_backend")
    module.compute = lambda call: "computed"
    monkeypatch.setitem(sys.modules, "later_backend", module)
    klcore.register_backend("laterlib", "later_backend")
    assert klcore.entropy(x) == "computed"


def test_losses_come_to_backends(toy):
    """The backend can tell calls from klcore.compat: they are losses."""
    x = array_class("toylib")()
    klcore.divergence.loss("pytorch", x, x, space=("probs", "log_probs"), factors=7, denominator=3)
    (found,) = toy.calls
    assert found.operation == LOSSES["pytorch"]
    assert found.operation.is_loss
    assert (found.weights, found.denominator, found.reduction) == (7, 3, "row")


def test_base_classes_are_looked_through(toy):
    derived = array_class("their.package", "Derived", array_class("toylib.core.array"))
    assert klcore.entropy(derived()) == ("computed", "entropy")

    class Mine(np.ndarray):
        pass

    assert klcore.entropy(np.array([0.5, 0.5]).view(Mine)) == klcore.entropy([0.5, 0.5])


def test_nearest_base_class_decides(toy):
    """An array type that is also a numpy.ndarray belongs to its own library."""
    both = type("Both", (np.ndarray,), {"__module__": "toylib.array"})
    assert klcore.entropy(np.zeros(2).view(both)) == ("computed", "entropy")


@pytest.mark.parametrize("other", [1, 0.5, True, [1.0], (1.0, 2.0), 1j])
@pytest.mark.parametrize("swap", [False, True])
def test_python_numbers_go_with_the_array(toy, other, swap):
    arrays = (other, array_class("toylib")()) if swap else (array_class("toylib")(), other)
    assert klcore.kl_div(*arrays) == ("computed", "kl_div")
    assert toy.calls[0][1:3] == arrays


@pytest.mark.parametrize(
    "modules",
    [("toylib", "toylib.nn.parameter"), ("toylib.core", "toylib.array"), ("toylib.nn", "toylib.nn")],
)
def test_types_of_different_modules_of_one_library(toy, modules):
    x, y = (array_class(module)() for module in modules)
    assert klcore.kl_div(x, y) == ("computed", "kl_div")


def test_types_of_different_modules_of_numpy():
    record = np.array([0.5, 0.5]).view(np.recarray)
    assert klcore.kl_div(record, np.array([0.25, 0.75])) == klcore.kl_div([0.5, 0.5], [0.25, 0.75])


@pytest.mark.parametrize("number", [np.ones(2), np.float32(1)])
@pytest.mark.parametrize("swap", [False, True])
def test_mixed_libraries(toy, number, swap):
    arrays = (number, array_class("toylib")()) if swap else (array_class("toylib")(), number)
    of = ("numpy", "toylib") if swap else ("toylib", "numpy")
    with pytest.raises(TypeError, match=rf"x is a {of[0]} array and y is a {of[1]} array; convert one"):
        klcore.kl_div(*arrays)
    assert not toy.calls


def test_device_is_for_the_backend_to_honour(toy):
    """It decides between NumPy and CuPy; another library's backend receives it."""
    assert klcore.entropy(array_class("toylib")(), device="cpu") == ("computed", "entropy")
    assert toy.calls[0].device == "cpu"
    with pytest.raises(TypeError, match="x is a toylib array and y is a numpy array; convert one"):
        klcore.kl_div(array_class("toylib")(), np.ones(2), device="cpu")


@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_unknown_type(operation, device):
    unknown = array_class("strange.core", "Tensor")()
    arrays = operands(operation, unknown, unknown)
    with pytest.raises(TypeError) as raised:
        getattr(klcore, operation)(*arrays, device=device, **OPERATIONS[operation].needed)
    for word in ("strange.core.Tensor", "numpy", "cupy", "lists", "register_backend"):
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("library", "module", "error", "words"),
    [
        (1, "m", TypeError, ("library", "string", "int")),
        ("lib", None, TypeError, ("module", "string", "NoneType")),
        ("lib", sys, TypeError, ("module", "string", "module")),
        (np.ndarray, "m", TypeError, ("library", "string", "type")),
        ("", "m", ValueError, ("library", "''")),
        ("a lib", "m", ValueError, ("library", "'a lib'")),
        ("lib.array", "m", ValueError, ("library", "top-level package", "'lib.array'")),
        ("lib", "", ValueError, ("module", "''")),
        ("lib", "my-module", ValueError, ("module", "'my-module'")),
        ("lib", "package..module", ValueError, ("module", "'package..module'")),
        ("lib", ".relative", ValueError, ("module", "'.relative'")),
    ],
)
def test_register_wrong_names(clean_registry, library, module, error, words):
    before = klcore.list_backends()
    with pytest.raises(error) as raised:
        klcore.register_backend(library, module)
    assert [word for word in words if word not in str(raised.value)] == []
    assert klcore.list_backends() == before


def test_backend_that_cannot_be_imported(clean_registry):
    klcore.register_backend("toylib", "no_such_module_anywhere")
    for _ in range(2):  # the failure is not remembered as a success
        with pytest.raises(klcore.BackendUnavailableError, match=r"toylib.*no_such_module_anywhere"):
            klcore.entropy(array_class("toylib")())


# ---- device="cuda" ---------------------------------------------------------------------------------------------------

CUDA = """
import sys
import numpy as np
sys.modules["cupy"] = None
import klcore
from klcore.operations import OPERATIONS
out = np.full((), 7.0)
for arrays in (([0.5, 0.5], [0.25, 0.75]), (np.ones(2), np.ones(2))):
    for name, row in OPERATIONS.items():
        for device in ("cuda", "cuda:0", "cuda:1"):
            try:
                getattr(klcore, name)(*arrays[: 2 - row.single], device=device, out=out, **row.needed)
            except klcore.BackendUnavailableError as error:
                assert isinstance(error, RuntimeError)
                print(error)
            else:
                raise AssertionError("computed somewhere else in silence")
assert out == 7
"""


def test_no_other_device_is_used_instead(python):
    """test_cuda.py covers what else may be missing, and the messages."""
    messages = python(CUDA).splitlines()
    assert len(messages) == 2 * 3 * len(OPERATIONS)
    for message in messages:
        assert [word for word in ("CUDA", "CuPy", "pip install") if word not in message] == []


def test_device_cpu_computes(device):
    x, y = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    value = klcore.kl_div(device.put(x), device.put(y), device="cpu")
    assert type(value) is np.float64
    assert value == klcore.kl_div(x, y)


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def restored_threads():
    before = klcore.get_num_threads()
    yield
    klcore.set_num_threads(before)


def test_set_num_threads(restored_threads):
    klcore.set_num_threads(3)
    assert klcore.get_num_threads() == 3
    klcore.set_num_threads(np.int64(4))
    assert klcore.get_num_threads() == 4
    seen = []
    other = threading.Thread(target=lambda: seen.append(klcore.get_num_threads()))
    other.start()
    other.join()
    assert seen == [4]


def test_threads_nest_and_end(restored_threads):
    klcore.set_num_threads(7)
    with klcore.threads(3):
        assert klcore.get_num_threads() == 3
        with klcore.threads(5):
            klcore.set_num_threads(6)  # for all, but not within `threads`
            assert klcore.get_num_threads() == 5
        assert klcore.get_num_threads() == 3
    assert klcore.get_num_threads() == 6
    with pytest.raises(ZeroDivisionError), klcore.threads(2):
        raise ZeroDivisionError
    assert klcore.get_num_threads() == 6


def test_threads_are_of_this_thread_only(restored_threads):
    klcore.set_num_threads(7)
    inside, checked = threading.Event(), threading.Event()

    def other():
        with klcore.threads(2):
            inside.set()
            checked.wait(600)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(600)
    found = klcore.get_num_threads()
    checked.set()
    thread.join()
    assert found == 7


def test_threads_are_of_this_task_only(restored_threads):
    klcore.set_num_threads(7)

    async def task(n):
        with klcore.threads(n):
            await asyncio.sleep(0)
            return klcore.get_num_threads()

    async def several():
        return await asyncio.gather(*(task(n) for n in (1, 2, 3)))

    assert asyncio.run(several()) == [1, 2, 3]
    assert klcore.get_num_threads() == 7


def within(n):
    with klcore.threads(n):
        pass


@pytest.mark.parametrize("function", [klcore.set_num_threads, within])
@pytest.mark.parametrize(
    ("n", "error", "found"),
    [
        (0, ValueError, "0"),
        (-1, ValueError, "-1"),
        (1.5, TypeError, "1.5"),
        (None, TypeError, "None"),
        ("2", TypeError, "'2'"),
        ([2], TypeError, r"\[2\]"),
    ],
)
def test_wrong_number_of_threads(restored_threads, function, n, error, found):
    before = klcore.get_num_threads()
    with pytest.raises(error, match=f"number of threads must be .*found {found}$"):
        function(n)
    assert klcore.get_num_threads() == before


HOW_MANY = "import klcore; print(klcore.get_num_threads())"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"KLCORE_NUM_THREADS": 3}, 3),
        ({"OMP_NUM_THREADS": 4}, 4),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"KLCORE_NUM_THREADS": 3, "OMP_NUM_THREADS": 4}, 3),
        ({"KLCORE_NUM_THREADS": "", "OMP_NUM_THREADS": " 4 "}, 4),
    ],
)
def test_threads_of_the_environment(python, environment, expected):
    assert int(python(HOW_MANY, **environment)) == expected


@pytest.mark.parametrize("text", ["many", "0", "-2"])
def test_wrong_threads_in_the_environment(python, text):
    """klcore's own variable is validated; values that OpenMP ignores in its variables, klcore ignores."""
    message = python(HOW_MANY, fails=True, KLCORE_NUM_THREADS=text).splitlines()[-1]
    assert message.startswith("ValueError: the environment variable KLCORE_NUM_THREADS must be a whole number")
    assert f"found '{text}'; unset it" in message
    assert python(HOW_MANY, OMP_NUM_THREADS=text) == python(HOW_MANY)


@pytest.mark.skipif(not hasattr(__import__("os"), "sched_setaffinity"), reason="no CPU affinity on this system")
def test_threads_are_as_many_as_this_process_may_use(python):
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    assert int(python(code + HOW_MANY)) == 1


USED = """
import os, numpy as np, klcore
from klcore import _cpu
from klcore.operations import LOSSES, OPERATIONS, Call
_cpu.pretend_processors(4)
x = np.random.default_rng(0).random((200, 1000))
count = lambda: len(os.listdir("/proc/self/task"))
klcore.kl_div(x[:2], x[:2])
counts = [count()]
for n in (1, 2, 4):
    with klcore.threads(n):
        klcore.kl_div(x[:2], x[:2])  # too small for a second thread
        klcore.kl_div(x, x)
    counts.append(count())
print([c - counts[0] for c in counts])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.skipif(not _cpu.OPENMP, reason="built without OpenMP")
def test_threads_are_used(python):
    assert python(USED, OPENBLAS_NUM_THREADS=1, MKL_NUM_THREADS=1).strip() == "[0, 0, 1, 3]"


# ---- instruction sets ------------------------------------------------------------------------------------------------

VALUE = "import klcore; print(klcore.kl_div([0.5, 0.5], [0.25, 0.75]).hex())"
IN_USE = "import klcore; print(klcore.show_config('dicts')['cpu']['instruction set in use'])"
PRETEND = "import klcore._cpu; klcore._cpu.instruction_sets = lambda: {'generic': True, 'avx9': False}; "


@pytest.mark.parametrize("isa", [name for name, supported in _cpu.instruction_sets().items() if supported])
def test_instruction_set_of_the_environment(python, isa):
    assert python(IN_USE, KLCORE_ISA=isa).strip() == isa


@pytest.mark.parametrize("environment", [{}, {"KLCORE_ISA": ""}])
def test_best_instruction_set_is_the_default(python, environment):
    best = [name for name, supported in _cpu.instruction_sets().items() if supported][-1]
    assert python(IN_USE, **environment).strip() == best
    assert python(PRETEND + IN_USE, **environment).strip() == "generic"


@pytest.mark.parametrize(
    ("isa", "setup", "words"),
    [
        ("sse9", "", ("KLCORE_ISA", "'sse9'", *_cpu.instruction_sets())),
        ("AVX2", "", ("KLCORE_ISA", "'AVX2'", "generic")),
        ("avx9", PRETEND, ("KLCORE_ISA=avx9", "this processor does not support it", "generic")),
    ],
)
def test_wrong_instruction_set(python, isa, setup, words):
    message = python(setup + VALUE, fails=True, KLCORE_ISA=isa).splitlines()[-1]
    assert message.startswith("ValueError: ")
    assert [word for word in words if word not in message] == []


def test_wrong_instruction_set_is_refused_every_time(python):
    code = """
import klcore
for _ in range(2):
    try:
        klcore.kl_div([1.0], [1.0])
    except ValueError as error:
        print(error)
    else:
        raise AssertionError("computed with another instruction set in silence")
"""
    first, second = python(code, KLCORE_ISA="sse9").splitlines()
    assert first == second


# ---- show_config -----------------------------------------------------------------------------------------------------


def test_show_config(capsys):
    config = klcore.show_config("dicts")
    assert capsys.readouterr().out == ""
    assert config["klcore"] == {"version": klcore.__version__, "numerics": "v2"}
    assert config["libraries"]["numpy"] == np.__version__
    assert config["cpu"]["threads"] == klcore.get_num_threads()
    assert config["cpu"]["instruction set in use"] == _cpu.instruction_set()
    assert config["cpu"]["instruction sets built"].split(", ") == list(_cpu.instruction_sets())
    assert config["cpu"]["compiler"] == _cpu.COMPILER
    assert config["cpu"]["OpenMP"].isdecimal() == bool(_cpu.OPENMP)
    assert config["cuda"]["available"] == "yes" or config["cuda"]["available"].startswith("no: ")
    assert config["backends"] == klcore.list_backends()
    assert klcore.show_config() is None
    text = capsys.readouterr().out
    for section, entries in config.items():
        assert f"{section}:\n" in text
        for name, value in entries.items():
            assert f"  {name}: {value}\n" in text


def test_show_config_names_variables_and_imports_no_library(python):
    code = """
import sys, klcore
environment = klcore.show_config("dicts")["environment"]
print([environment.get(name) for name in ("KLCORE_NUM_THREADS", "OMP_PLACES", "HOME")], "torch" in sys.modules)
"""
    assert python(code, KLCORE_NUM_THREADS=3, OMP_PLACES="cores").strip() == "['3', 'cores', None] False"


def test_show_config_of_an_unknown_mode():
    with pytest.raises(ValueError, match="'stdout' or 'dicts'; found 'json'"):
        klcore.show_config("json")


def test_import_reads_no_environment(python):
    """An invalid variable is reported by the first call, not by an import that may never compute."""
    assert python("import klcore; print('imported')", KLCORE_ISA="?", KLCORE_NUM_THREADS="?").strip() == "imported"
