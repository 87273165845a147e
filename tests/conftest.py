"""What all tests share: devices and dtypes to run over, Hypothesis' profile for CI, and a fresh interpreter."""

import collections
import contextlib
import ctypes
import gc
import importlib
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings

import klcore
from klcore import _cpu
from klcore.operations import OPERATIONS

_cpu.pretend_processors(64)  # numbers of threads are compared, on however small a machine

# "cpu"; "emulated": the CUDA kernels, executed on the CPU by tests/emulator; "cuda": a GPU, by CuPy
EMULATOR = ["emulated"] if shutil.which("g++") and sys.platform != "win32" else []
CHOSEN = [name.strip() for name in os.environ.get("KLCORE_TEST_DEVICES", "").split(",") if name.strip()]
DEVICES = CHOSEN or ["cpu", *EMULATOR]
GPUS = [name for name in DEVICES if name != "cpu"]
collect_ignore = ["sharded_jax.py"]  # but for a process that names it, as test_jax_sharded.py does
collect_ignore += [] if "cuda" in DEVICES else ["test_torch_cuda.py"]
DTYPES = {
    "float64": np.dtype("float64"),
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

# CI must not fail by chance, nor because its machine is slow.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")


class Device:
    """Where a test computes: `put` moves a NumPy array there, `get` brings a result back."""

    def __init__(self, name):
        self.name = name
        self.klcore_name = "cpu" if name == "cpu" else "cuda"  # for `device=`
        self.numpy = name == "cpu"  # results are NumPy arrays
        self.emulated = name == "emulated"
        self.xp = np if self.numpy else importlib.import_module("cupy")

    def put(self, array):
        return array if self.numpy else self.xp.asarray(array)

    def get(self, array):
        return array if self.numpy else self.xp.asnumpy(array)

    def array_type(self):
        return self.xp.ndarray


@contextlib.contextmanager
def computing_on(name):
    """The Device called `name`. One that is missing fails the test: a skip would hide that nothing ran."""
    with contextlib.ExitStack() as stack:
        try:
            if name == "emulated":
                emulator = importlib.import_module("emulator.device")
                emulator.install()
                stack.callback(emulator.uninstall)
            device = Device(name)
            klcore.kl_div([0.5, 0.5], [0.25, 0.75], device=device.klcore_name)
        except (klcore.BackendUnavailableError, ValueError, ImportError) as error:
            pytest.fail(f"KLCORE_TEST_DEVICES asks for {name!r}, which cannot be used: {error}")
        yield device


# Of a module, not of the session: the emulator takes CuPy's place for all that runs meanwhile.
@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    """Every device of KLCORE_TEST_DEVICES."""
    with computing_on(request.param) as device:
        yield device


@pytest.fixture(scope="module", params=GPUS)
def gpu(request):
    """Those that run the CUDA kernels."""
    with computing_on(request.param) as device:
        yield device


# ---- arrays of other libraries ---------------------------------------------------------------------------------------


class Arrays:
    """Where a test computes: `put` converts a NumPy array to the library, `get` converts a result back."""

    def __init__(self, name, put, get):
        self.name, self._put, self.get = name, put, get

    def put(self, array, dtype=None):
        array = np.asarray(array) if not isinstance(array, np.ndarray) else array
        return self._put(array, dtype or array.dtype.name)

    def __repr__(self):
        return self.name


def torch_arrays():
    torch = pytest.importorskip("torch", reason="not run: PyTorch is not installed")

    def put(array, dtype):
        return torch.from_numpy(np.array(array)).to(getattr(torch, dtype))

    def get(tensor):
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()

    return Arrays("torch", put, get)


def jax_arrays():
    jax = pytest.importorskip("jax", reason="not run: JAX is not installed")
    return Arrays("jax", lambda array, dtype: jax.numpy.asarray(array, dtype), np.asarray)


@pytest.fixture(scope="module")
def arrays(request):
    """Arrays of a device of KLCORE_TEST_DEVICES, or of "torch" or "jax"; golden.runs parametrizes it."""
    if request.param in ("torch", "jax"):
        yield {"torch": torch_arrays, "jax": jax_arrays}[request.param]()
        return
    with computing_on(request.param) as device:
        yield Arrays(
            request.param, lambda a, dtype: device.put(a.astype(DTYPES.get(dtype, dtype), copy=False)), device.get
        )


@pytest.fixture
def without_keras(request, monkeypatch):
    """Hide Keras, which other tests may have loaded, unless the test asks for it."""
    if "keras" not in request.fixturenames:
        monkeypatch.delitem(sys.modules, "keras", raising=False)


@pytest.fixture
def keras():
    os.environ.setdefault("KERAS_BACKEND", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Keras's own imports
        return pytest.importorskip("keras", reason="not run: Keras is not installed")


# ---- what `make test` leaves to `make test-all` ----------------------------------------------------------------------


def name_of(case):
    return case.nodeid.partition("[")[0]


def values_of(parameters):
    """What a case tries: the value of each parameter; of a dict, each entry."""
    for name, value in parameters.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        yield from ((name, entry, repr(of_entry)) for entry, of_entry in entries)


def few(cases):
    """The numbers of a few cases, which are sets of values, in which each value occurs. Those that bring the most new
    values are first, so that the parameters change together."""
    seen, chosen = set(), []
    for new in range(max(map(len, cases)), 0, -1):
        for number, values in enumerate(cases):
            if len(values - seen) >= new:
                seen |= values
                chosen.append(number)
    return chosen


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by -m
def pytest_collection_modifyitems(items):
    """Of a test's cases on a device, `few` stay: at most as many as the mark `quick` says, or one on the emulated GPU,
    where each compiles kernels. The others are exhaustive."""
    tests = collections.defaultdict(list)
    for case in items:
        if not case.get_closest_marker("exhaustive"):
            parameters = case.callspec.params if hasattr(case, "callspec") else {}
            device = parameters.get("device") or parameters.get("gpu")
            tests[name_of(case), device].append((case, set(values_of(parameters))))
    for (_, device), cases in tests.items():
        mark = cases[0][0].get_closest_marker("quick")
        at_most = mark.args[0] if mark else 1 if device == "emulated" else len(cases)
        chosen = few([values for _, values in cases])[:at_most]
        for number, (case, values) in enumerate(cases):
            if values and number not in chosen:
                case.add_marker(pytest.mark.exhaustive)


def trim():
    """Give free memory back to the system."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc, not musl
        libc.malloc_trim(0)


def pytest_collection_finish(session):
    """Less memory, and less work for the garbage collector: a process of pytest-xdist forgets the cases that are not
    selected, which pytest keeps for a report of its own. What is left is there until the end, and not visited again."""
    if hasattr(session.config, "workerinput"):
        session.config.pluginmanager.get_plugin("terminalreporter").stats.pop("deselected", None)
    gc.collect()
    gc.freeze()
    trim()


@pytest.hookimpl(trylast=True)  # after the fixtures of the test and of the file
def pytest_runtest_teardown(item, nextitem):
    """A process stays below 1.5 GB. After each test's last case JAX forgets its programs, of which it keeps all; after
    each file's, PyTorch forgets what it compiled, and free memory goes back to the system."""
    if (nextitem is None or name_of(nextitem) != name_of(item)) and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    if nextitem is None or nextitem.path != item.path:
        if "torch._dynamo" in sys.modules:
            sys.modules["torch._dynamo"].reset()
        trim()


# ---- how much was compared, for the summary --------------------------------------------------------------------------

COMPARED = pytest.StashKey[collections.Counter]()


def pytest_configure(config):
    config.stash[COMPARED] = collections.Counter()


@pytest.fixture(scope="session")
def compared(request):
    """Counts comparisons, by what they show."""
    return request.config.stash[COMPARED]


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["compared"] = dict(session.config.stash[COMPARED])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """A worker of pytest-xdist hands over its counts."""
    node.config.stash[COMPARED].update(getattr(node, "workeroutput", {}).get("compared", {}))


def pytest_terminal_summary(terminalreporter, config):
    for what, count in sorted(config.stash[COMPARED].items()):
        terminalreporter.write_line(f"{count:,} {what}")


# ---- operations by name ----------------------------------------------------------------------------------------------

RATIOS = [name for name, o in OPERATIONS.items() if o.form == _cpu.BY_RATIO]
# Slow tests try every pair of spaces for the first operation of each form, and only SOME pairs for the others.
FIRST = {(o.form, o.single): name for name, o in reversed(OPERATIONS.items())}.values()
SOME = (("probs", "probs"), ("logits", "logits"), ("probs", "logits"))

# Of the divergence's relatives, which are computed alike, the first stands for all; test_family.py asks for each.
COMMON = {name: o for name, o in OPERATIONS.items() if o.form != _cpu.BY_CLASS or name in FIRST}

OF_TWO = [name for name, o in COMMON.items() if not o.single]  # arguments


def pairs(operation):
    """Without counts beside another space, which test_counts.py tests."""
    return [pair for pair in OPERATIONS[operation].pairs if "counts" not in pair or pair == ("counts", "counts")]


def some_pairs(operation):
    return [pair for pair in pairs(operation) if operation in FIRST or pair in SOME]


def operands(operation, x, y):
    return (x,) if OPERATIONS[operation].single else (x, y)


def call(operation, x, y, space="probs", **options):
    """The public function of that name; of one argument, with x and its space."""
    space = space[0] if OPERATIONS[operation].single and not isinstance(space, str) else space
    options = {**OPERATIONS[operation].needed, **options}
    return getattr(klcore, operation)(*operands(operation, x, y), space=space, **options)


# ---- scripts, parameters and processes -------------------------------------------------------------------------------


BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    """Import a file of benchmarks/."""
    if not BENCHMARKS.exists():
        pytest.skip("no benchmarks beside the tests: these are of an installed package")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def as_here(**environment):
    """Keywords of `subprocess` for a Python that is to find what this process finds: klcore need not be installed.

    Without PYTHONPATH the child would find only what is installed. It starts elsewhere than beside the sources, because
    Python looks first in the current folder, and the sources there may not be built.
    """
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    given = {name: str(value) for name, value in environment.items()}
    return {"cwd": os.path.dirname(__file__), "env": {**os.environ, "PYTHONPATH": paths, **given}}


@pytest.fixture(scope="session")
def python():
    """Run code in a fresh interpreter, for what only a process of its own can show. Returns what it printed."""

    def run(code, *arguments, timeout=600, warnings="error", fails=False, within=(), **environment):
        keywords = as_here(**environment)
        ours = ("KLCORE_NUM", "KLCORE_ISA", "OMP_")
        keywords["env"] = {k: v for k, v in keywords["env"].items() if k in environment or not k.startswith(ours)}
        filters = warnings if isinstance(warnings, tuple) else (warnings,)
        done = subprocess.run(
            [*within, sys.executable, *(f"-W{w}" for w in filters), "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            **keywords,
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    return run
