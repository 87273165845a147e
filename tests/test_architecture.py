"""Which module may import which, what an import costs, that formulas are in one place, and what is shipped."""

import ast
import importlib
import importlib.resources
import inspect
import itertools
import json
import pathlib
import re
import shutil
import struct
import sys
from importlib.machinery import EXTENSION_SUFFIXES

import pytest
from conftest import few

import klcore
from klcore import _cpu, operations

PACKAGE = pathlib.Path(klcore.__file__).parent
REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
SOURCES = importlib.resources.files("klcore._src")
OPERATIONS = tuple(operations.OPERATIONS)
# the attribute klcore.backends is the public function, so the module is imported by name
BACKENDS = sorted(klcore.list_backends().values())

# ---- imports ---------------------------------------------------------------------------------------------------------

STANDARD = set(sys.stdlib_module_names) | {"typing_extensions"}  # for type checkers: see what an import loads
REGISTRY_ERROR = "klcore.backends:BackendUnavailableError"  # an exception has to be defined above those who raise it
# module (the first pattern that matches) -> what it may import, besides the standard library
CHECKED = {f"klcore.backends.{name}" for name in ("arguments", "options", "destinations", "rows")}  # of every call
ROOMS = {
    r"klcore": {
        "klcore._cpu", "klcore.divergence", "klcore.estimate", "klcore.family", "klcore.backends",
        "klcore.backends.threads", "klcore.config", "klcore.shard", "klcore.summary", "klcore.version",
    },
    # the parameters of a function are only that function's concern
    r"klcore\.shard": {
        "numpy", "klcore.backends:Unevaluated", "klcore.backends.cpu", "klcore.backends.parts", "klcore.divergence",
        "klcore.family", "klcore.operations", "klcore.parameters", "klcore.typing",
    },
    # within a function: it makes a summary of dask arrays lazy
    r"klcore\.summary": {
        "numpy", "klcore.backends.host", "klcore.backends.dask", "klcore.parameters", "klcore.normal",
    },
    r"klcore\.operations": {"klcore._cpu"},
    r"klcore\.(divergence|estimate|family)": {
        "klcore.backends", "klcore.operations", "klcore.parameters", "klcore.typing",
    },
    r"klcore\.typing": {"numpy"},  # for type checkers
    r"klcore\.(version|exact|normal)": set(),
    r"klcore\.parameters": {"numpy"},
    r"klcore\.__main__": {"klcore.config", "klcore.selftest", "klcore.compare.command"},
    # klcore compare, which uses only the public functions; libraries for files and plots within functions
    r"klcore\.compare(\.errors)?": set(),
    r"klcore\.compare\.files": {"numpy", "safetensors", "ml_dtypes", "klcore.compare.errors"},
    r"klcore\.compare\.llama": {"numpy", "klcore.compare.errors", "klcore.compare.files"},
    r"klcore\.compare\.figures": {
        "numpy", "klcore.backends.threads", "klcore.compare.llama", "klcore.divergence", "klcore.family",
    },
    r"klcore\.compare\.tally": {"numpy", "klcore.compare.figures", "klcore.summary"},
    r"klcore\.compare\.comparison": {
        "numpy", "klcore.backends.threads",
        *(f"klcore.compare.{name}" for name in ("errors", "figures", "files", "llama", "tally")),
    },
    r"klcore\.compare\.report": {
        *(f"klcore.compare.{name}" for name in ("comparison", "figures", "tally")), "klcore.summary", "klcore.version",
    },
    r"klcore\.compare\.plots": {
        "numpy", "matplotlib", "matplotlib.figure",
        *(f"klcore.compare.{name}" for name in ("errors", "report", "tally")),
    },
    r"klcore\.compare\.page": {"klcore.compare.report"},
    r"klcore\.compare\.outputs": {"numpy", "klcore.compare.errors"},
    r"klcore\.compare\.command": {
        "numpy", "tqdm", "klcore.backends.threads", "klcore.compare", "klcore.divergence",
        *(f"klcore.compare.{name}" for name in (
            "comparison", "errors", "figures", "files", "llama", "outputs", "page", "plots", "report", "tally",
        )),
    },
    r"klcore\.selftest": {
        "numpy", "ml_dtypes", "klcore._cpu", "klcore.backends.threads", "klcore.config", "klcore.divergence",
        "klcore.estimate", "klcore.exact", "klcore.family", "klcore.operations",
    },
    r"klcore\.config": {
        "numpy", "cupy", "klcore._cpu", "klcore.backends", "klcore.backends.threads", "klcore.backends.cpu",
        "klcore.backends.cuda", "klcore.backends.cuda.nvrtc", "klcore.version",
    },
    r"klcore\.backends": {"klcore.backends.torch", "klcore.operations"},  # within a function, and for type checkers
    r"klcore\.backends\.host": {
        "numpy", "klcore.backends:library", "klcore.backends.arguments", "klcore.backends.torch.memory",
        "klcore.backends.dlpack",
    },
    r"klcore\.backends\.parts": {"klcore.backends:find", "klcore.backends.torch.parts", "klcore.operations"},
    r"klcore\.backends\.labels": {"numpy"},
    r"klcore\.backends\.arguments": {"numpy", "klcore._cpu", "klcore.backends.labels"},
    r"klcore\.backends\.options": {
        "numpy", "klcore._cpu", "klcore.backends.arguments", "klcore.operations", "klcore.parameters",
    },
    r"klcore\.backends\.destinations": {"numpy", "klcore.backends.arguments"},
    r"klcore\.backends\.rows": {
        "numpy", "klcore._cpu", "klcore.backends.arguments", "klcore.backends.destinations", "klcore.backends.labels",
        "klcore.backends.options", "klcore.operations", "klcore.parameters",
    },
    r"klcore\.backends\.threads": set(),
    r"klcore\.backends\.examples": {"numpy", "klcore._cpu", *CHECKED, "klcore.operations"},
    r"klcore\.backends\.sparse": {
        "numpy", "klcore._cpu", "klcore.backends.labels", *CHECKED, "klcore.operations",
    },
    r"klcore\.backends\.cpu": {
        "numpy", "klcore._cpu", *CHECKED, "klcore.backends.sparse", "klcore.backends.threads",
        "klcore.operations",
    },
    r"klcore\.backends\.cuda\.nvrtc": {"cuda", "klcore._src", REGISTRY_ERROR},  # compiles without CuPy
    r"klcore\.backends\.cuda\.devices": {
        "numpy", "cupy", *CHECKED, "klcore.backends.cuda.nvrtc", REGISTRY_ERROR,
    },
    r"klcore\.backends\.cuda\.kernels": {
        "klcore._cpu", *CHECKED, "klcore.backends.cuda.devices", "klcore.backends.cuda.nvrtc",
        "klcore.operations",
    },
    r"klcore\.backends\.cuda\.plans": {
        "numpy", "klcore._cpu", "klcore.backends.cuda.devices", "klcore.backends.cuda.nvrtc",
    },
    r"klcore\.backends\.cuda\.launches": {
        "klcore._cpu", *CHECKED, "klcore.backends.cuda.devices", "klcore.backends.cuda.kernels",
        "klcore.backends.cuda.plans", "klcore.operations",
    },
    r"klcore\.backends\.cuda\.preparation": {
        "numpy", *CHECKED, "klcore.backends.cuda.kernels", "klcore.backends.cuda.launches",
        "klcore.backends.cuda.plans",
    },
    r"klcore\.backends\.cuda\.parts": {
        *CHECKED, "klcore.operations",
        *(f"klcore.backends.cuda.{name}" for name in ("kernels", "launches", "plans", "preparation")),
    },
    r"klcore\.backends\.cuda\.listed": {
        "numpy", "klcore._cpu", *CHECKED,
        *(f"klcore.backends.cuda.{name}" for name in ("devices", "kernels", "launches", "plans", "preparation")),
    },
    r"klcore\.backends\.cuda": {
        "numpy", *CHECKED, "klcore.backends.sparse", "klcore.operations",
        *(
            f"klcore.backends.cuda.{name}"
            for name in ("devices", "kernels", "launches", "listed", "parts", "plans", "preparation")
        ),
    },
    r"klcore\.backends\.jax\.private": {"numpy", "jax"},
    r"klcore\.backends\.jax\.programs": {
        "numpy", "jax", "klcore.backends.cpu", "klcore.backends.cuda", *CHECKED, "klcore.operations",
    },
    r"klcore\.backends\.jax\.shards": {
        "numpy", "jax", "klcore._cpu", "klcore.backends.cpu", *CHECKED, "klcore.backends.jax.programs",
        "klcore.operations",
    },
    r"klcore\.backends\.jax\.partition": {
        "numpy", "jax", "klcore.backends.cpu",
        *(f"klcore.backends.jax.{name}" for name in ("private", "programs", "shards")),
    },
    r"klcore\.backends\.jax\.primitives": {
        "jax", *CHECKED,
        *(f"klcore.backends.jax.{name}" for name in ("partition", "private", "programs")),
    },
    r"klcore\.backends\.jax": {
        "numpy", "jax", "klcore.backends.cpu", "klcore.backends.cuda", "klcore.backends.labels", *CHECKED,
        "klcore.backends.sparse", "klcore.operations", REGISTRY_ERROR,
        *(f"klcore.backends.jax.{name}" for name in ("partition", "primitives", "private", "programs")),
    },
    r"klcore\.backends\.(?P<library>dask|dlpack)": {
        "numpy", "cupy", "ml_dtypes", "klcore.backends.cpu", "klcore.backends.cuda", *CHECKED,
        "klcore.backends.threads", "klcore.backends.labels", "klcore.backends.sparse", "klcore.operations",
        REGISTRY_ERROR,
    },
    r"klcore\.backends\.torch\.private": {"torch"},
    r"klcore\.backends\.torch\.memory": {
        "numpy", "torch", "ml_dtypes", "klcore.backends.cpu", "klcore.backends.cuda", *CHECKED,
        "klcore.backends.torch.private", REGISTRY_ERROR,
    },
    r"klcore\.backends\.torch\.kernels": {
        "numpy", "torch", "klcore.backends.cpu", "klcore.backends.examples", *CHECKED,
        "klcore.backends.torch.memory", "klcore.operations",
    },
    r"klcore\.backends\.torch\.operator": {"torch", "klcore.backends.torch.kernels", "klcore.operations"},
    r"klcore\.backends\.torch\.batches": {"klcore.backends.torch.kernels", "klcore.operations"},
    r"klcore\.backends\.torch\.autograd": {
        "torch", "klcore.operations",
        *(f"klcore.backends.torch.{name}" for name in ("batches", "kernels", "operator", "private")),
    },
    r"klcore\.backends\.torch\.parts": {
        "torch", "klcore.backends.cpu", "klcore.backends.parts", "klcore.operations",
        *(f"klcore.backends.torch.{name}" for name in ("kernels", "memory", "private")),
    },
    r"klcore\.backends\.torch\.sharded": {
        "numpy", "torch", "klcore._cpu", "klcore.backends.cpu", *CHECKED, "klcore.backends.sparse",
        "klcore.operations",
        *(f"klcore.backends.torch.{name}" for name in ("autograd", "kernels", "memory", "operator")),
    },
    r"klcore\.backends\.torch": {
        "numpy", "torch", "klcore.backends.cpu", "klcore.backends.labels", *CHECKED, "klcore.operations",
        *(f"klcore.backends.torch.{name}" for name in ("autograd", "kernels", "memory", "private", "sharded")),
    },
    r"klcore\.compat": {"klcore.compat"},
    r"klcore\.compat\._arguments": {"numpy", *CHECKED, "klcore.parameters"},
    r"klcore\.compat\.rtorch": {"klcore.compat._arguments", "klcore.compat.pytorch"},  # one library in R as well
    # a library is named only for type checkers: see what importing it loads
    r"klcore\.compat\.keras\.registration": set(),
    r"klcore\.compat\.keras\.tensorflow": {"tensorflow", "klcore.compat._arguments"},  # within functions
    r"klcore\.compat\.keras\.arguments": {
        "numpy", "klcore.compat._arguments", "klcore.compat.keras.registration", "klcore.compat.keras.tensorflow",
    },
    r"klcore\.compat\.keras\.functions": {
        "numpy", "klcore.divergence", "klcore.compat._arguments", "klcore.compat.keras.arguments",
        "klcore.compat.keras.registration", "klcore.compat.keras.tensorflow",
    },
    r"klcore\.compat\.keras\.(loss|metric)": {
        "keras", "klcore.compat._arguments",
        *(f"klcore.compat.keras.{name}" for name in ("arguments", "functions", "registration", "tensorflow")),
    },
    r"klcore\.compat\.keras": {
        *(f"klcore.compat.keras.{name}" for name in ("functions", "loss", "metric", "registration")),
    },
    r"klcore\.compat\.pytorch": {"torch", "klcore.divergence", "klcore.compat._arguments"},
    r"klcore\.compat\._distillation": {"torch", "klcore.family", "klcore.compat._arguments"},
    r"klcore\.compat\.(trl|liger)": {
        "klcore.divergence", "klcore.family", "klcore.compat._arguments", "klcore.compat._distillation",
    },
    r"klcore\.compat\.\w+": {"numpy", "klcore.divergence", "klcore.compat._arguments"},
    r"klcore\._src": set(),
}  # fmt: skip


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def is_module(name):
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir() or name in ("klcore._cpu", "klcore._src")


def imported(path):
    """What a file imports, as `module` or `module:name`, anywhere in the file, import_module("...") included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if is_module(whole) else f"{node.module}:{alias.name}"
        elif isinstance(node, ast.Call) and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func)):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


def allowed(module, edge):
    match = next((m for m in (re.fullmatch(pattern, module) for pattern in ROOMS) if m), None)
    assert match, f"{module} has no room in this table"
    may = ROOMS[match.re.pattern]
    name = edge.partition(":")[0]
    root = name.partition(".")[0]
    own = match.groupdict().get("library")
    if root != "klcore":
        return root in STANDARD or root in may or root == own
    return edge in may or name in may


def test_imports_run_one_way():
    edges = {(module, edge) for module, path in modules() for edge in imported(path)}
    assert ("klcore.divergence", "klcore.backends:find") in edges  # the parser finds something
    assert ("klcore.backends.cpu", "klcore._cpu") in edges
    assert sorted(edge for edge in edges if not allowed(*edge)) == []


@pytest.mark.parametrize(
    ("module", "edge"),
    [
        ("klcore.divergence", "numpy"),
        ("klcore.divergence", "klcore.backends.cpu"),
        ("klcore.backends", "klcore.backends.cpu"),
        ("klcore.backends", "numpy"),
        ("klcore.backends.rows", "cupy"),
        ("klcore.backends.threads", "numpy"),
        ("klcore.backends.cpu", "klcore.backends:find"),
        ("klcore.backends.cpu", "klcore.divergence:kl_div"),
        ("klcore.backends.cuda", "klcore.backends:find"),
        ("klcore.backends.cuda", "klcore.backends.cpu"),
        ("klcore.backends.cuda.nvrtc", "cupy"),
        ("klcore.backends.cuda.nvrtc", "klcore.backends.cuda.devices"),
        ("klcore.backends.cuda.plans", "klcore.backends.cuda.launches"),
        ("klcore.backends.torch", "klcore.divergence"),
        ("klcore.backends.torch", "jax"),
        ("klcore.backends.torch.memory", "klcore.backends.torch.kernels"),
        ("klcore.backends.torch.operator", "klcore.backends.torch"),
        ("klcore.compat.keras.functions", "klcore.backends.cpu"),
        ("klcore.compat.keras.loss", "klcore.compat.keras.metric"),
    ],
)
def test_edges_that_must_not_be(module, edge):
    assert not allowed(module, edge)


def test_private_interfaces_of_pytorch_are_in_one_file():
    asking = {m for m, path in modules() if re.search(r"torch\._C|forward_ad\._|torch\._\w+\.", path.read_text())}
    assert asking == {"klcore.backends.torch.private"}


def test_private_interfaces_of_jax_are_in_one_file():
    asking = {m for m, path in modules() if re.search(r"jax\._src|module_context", path.read_text())}
    assert asking == {"klcore.backends.jax.private"}


def test_few_cases_try_every_value():
    """What `make test` runs of a test with many cases."""
    cases = [set(enumerate(case)) for case in itertools.product("abcd", range(3), (False, True))]
    chosen = few(cases)
    assert set.union(*(cases[number] for number in chosen)) == set.union(*cases)
    assert len(chosen) == 4  # "abcd"
    assert cases[chosen[0]] | cases[chosen[1]] == {(0, "a"), (0, "b"), (1, 0), (1, 1), (2, False), (2, True)}
    assert few([set()]) == []


@pytest.mark.exhaustive
def test_the_emulator_can_be_left_out(python):
    """As where a wheel is tested, perhaps without a compiler."""
    code = "import pytest; raise SystemExit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', '.']))"
    found = python(code, KLCORE_TEST_DEVICES="cpu", warnings="default")
    assert "test_containers.py" in found
    assert [line for line in found.splitlines() if re.search(r"\[.*\bemulated\b", line)] == []


def test_oracle_is_independent():
    path = pathlib.Path(__file__).with_name("oracle.py")
    roots = {re.split(r"[.:]", edge)[0] for edge in imported(path)}
    assert "klcore" not in roots


def test_import_brings_numpy_at_most(python):
    code = """
import json, sys
before = set(sys.modules)
import klcore
after_import = set(sys.modules) - before
klcore.kl_div([0.5, 0.5], [0.25, 0.75], weights=1)
assert "numpy.ma" not in sys.modules  # NumPy imports it at its first use, which takes a third of a first call
print(json.dumps([sorted(after_import), sorted(set(sys.modules) - before)]))
"""
    after_import, after_call = (
        {name.partition(".")[0] for name in names if not name.startswith(("_cython", "cython_runtime"))}
        - set(sys.stdlib_module_names)
        - {"klcore"}
        for names in json.loads(python(code))
    )
    assert after_import <= {"numpy"}
    assert after_call <= {"numpy"}


def test_other_processes_find_what_this_one_finds(python, tmp_path, monkeypatch):
    """Tests may be started where there are sources of klcore without the built extension."""
    (tmp_path / "klcore.py").write_text("raise ImportError('another klcore')")
    monkeypatch.chdir(tmp_path)
    found = python("import klcore, klcore._cpu; print(klcore.__file__, klcore._cpu.__file__)").split()
    assert found == [klcore.__file__, _cpu.__file__]


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (None, "ImportError: klcore is not compiled for this Python in {folder}, which Python found before the "),
        ("no machine code", "ImportError: "),
        ("import libgomp", "ModuleNotFoundError: No module named 'libgomp'"),
    ],
)
def test_an_import_that_fails_says_why(python, tmp_path, kernel, message):
    """Without a kernel, as in a clone beside the installed package; with one that does not load, its own message."""
    folder = tmp_path / "klcore"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("_cpu*", "_src", "__pycache__"))
    if kernel:
        suffix = ".py" if kernel.startswith("import") else EXTENSION_SUFFIXES[0]
        (folder / f"_cpu{suffix}").write_text(kernel)
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]  # has the kernel of a checkout
sys.path.insert(0, sys.argv[1])
import klcore
"""
    said = python(code, tmp_path, fails=True)
    assert message.format(folder=folder) in said
    assert "circular" not in said
    assert ("not compiled" in said) == (kernel is None)


def test_import_leaves_subnormal_numbers_alone(python):
    """A library linked with fast-math disables them for the whole process."""
    code = "import numpy as np, klcore; klcore.kl_div([1.0], [1.0]); print(np.float32(1e-45) * np.float32(1) > 0)"
    assert python(code).strip() == "True"


def test_all_is_complete():
    public = {name for name, value in vars(klcore).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public | {"__version__"} == set(klcore.__all__)
    assert list(klcore.__all__) == sorted(klcore.__all__)


# ---- one contract for all backends -----------------------------------------------------------------------------------


def parameters(function):
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.fixture(params=BACKENDS)
def backend(request):
    library = request.param.rpartition(".")[2]
    if library in ("torch", "jax", "dask"):
        pytest.importorskip(library, reason=f"not run: {library} is not installed")
    return importlib.import_module(request.param)


def test_contract(backend):
    assert [name for name, _ in parameters(backend.compute)] == ["call"]


def test_signatures_of_what_adapters_call():
    cpu, cuda = (importlib.import_module(f"klcore.backends.{name}") for name in ("cpu", "cuda"))
    assert parameters(cpu.block) == parameters(cuda.block)


@pytest.mark.parametrize("operation", OPERATIONS[1:])
def test_public_signatures_are_alike(operation):
    like = inspect.signature(klcore.kl_div).parameters
    found = inspect.signature(getattr(klcore, operation)).parameters
    row = operations.OPERATIONS[operation]
    lists = () if row.takes_indices else ("indices", "tail", "tail_mass")
    names = [n for n in like if n not in lists and (n != "y" or not row.single)]
    assert list(found) == [*names[:2], *row.parameters, *names[2:]]
    assert all((found[n].kind, found[n].default) == (like[n].kind, like[n].default) for n in names)


# ---- native sources --------------------------------------------------------------------------------------------------

ELEMENTARY = (
    "log", "log1p", "log2", "log10", "logb", "exp", "exp2", "exp10", "expm1", "pow", "tanh", "atanh", "sinh", "cosh",
    "sin", "cos", "tan", "erf", "tgamma", "lgamma", "cbrt", "hypot", "ldexp", "frexp", "scalbn",
)  # fmt: skip
INTRINSIC = ("fast_?", "__", "__builtin_", "std::", r"(?<![\w>])::", "_mm\\d*_", "Sleef_")


def native():
    return {s.name: s.read_text() for s in SOURCES.iterdir() if s.name.endswith((".h", ".cu", ".pyx"))}


def without_comments(name, text):
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    return re.sub(r"#.*" if name.endswith(".pyx") else r"//.*", "", text)


CODE = {name: without_comments(name, text) for name, text in native().items()}


@pytest.mark.parametrize("name", CODE)
def test_no_elementary_function_but_our_own(name):
    """libm differs between machines. What is called log is kl::log, defined in kl_math.h."""
    functions = "|".join(ELEMENTARY)
    foreign = rf"(?:{'|'.join(INTRINSIC)})(?:{functions})f?l?(?:_p[sd])?\s*\("
    assert re.findall(foreign, CODE[name]) == []
    assert re.findall(r"libc\.math|using\s+(?:namespace\s+std|std::)", CODE[name]) == []
    if name != "kl_math.h":
        assert re.findall(rf"KL_FN\s+\w+\s+(?:{functions})f?\s*\(", CODE[name]) == []


def test_formulas_are_in_one_file():
    """Terms and polynomials: all other files call them. The terms of other systems have a separate file, and so do the
    estimators; the terms of the divergence's relatives are generated in one place of theirs."""
    assert re.search(r"struct Term<KL_DIV, PROBS, PROBS>[^{;]*{", CODE["kl_math.h"])
    assert len(re.findall(r"\bhorner\(", CODE["kl_math.h"])) > 4
    for name in CODE.keys() - {"kl_math.h"}:
        assert re.findall(r"\bhorner\(|0x1\.[0-9a-f]{4,}p", CODE[name]) == [], name
    tables = {"kl_compat.h": operations.LOSSES, "kl_estimate.h": operations.ESTIMATORS}
    files = {name.upper(): file for file, table in tables.items() for name in table}
    for name in CODE:
        terms = re.findall(r"struct Term<(\w+)[^>]*>[^{;]*{", CODE[name])
        wrong = [t for t in terms if name != files.get(t, "kl_math.h") and (name, t) != ("kl_family.h", "name")]
        assert wrong == [], name
        members = re.findall(r"struct Member<(\w+)>[^{;]*{", CODE[name])
        family = {o.name for o in operations.OPERATIONS.values() if o.form == _cpu.BY_CLASS and o.has_terms}
        assert {m.lower() for m in members} == (family if name == "kl_family.h" else set())


def test_kl_math_includes_nothing():
    assert re.findall(r"#\s*include.*", CODE["kl_math.h"]) == []


@pytest.mark.parametrize("name", CODE)
def test_no_order_left_to_chance(name):
    """OpenMP reductions and atomic additions of floats add up in the order in which threads arrive."""
    text = CODE[name]
    assert re.findall(r"#\s*pragma\s+omp.*\b(?:reduction|atomic|critical)\b", text) == []
    assert re.findall(r"std::atomic<\s*(?:float|double)|atomicAdd|atomic_ref|std::reduce|std::execution", text) == []


FAST = r"fast-math|Ofast|funsafe|fassociative|freciprocal|ffinite-math|fp:fast|ffp-contract=(?:fast|on)|use_fast_math"


@pytest.mark.parametrize("name", CODE)
def test_no_fast_math_in_sources(name):
    assert re.findall(rf"{FAST}|STDC\s+FP_CONTRACT\s+ON|ftz=true|fmad=true", CODE[name]) == []


def test_no_fast_math_in_the_build():
    path = REPOSITORY / "setup.py"
    if not path.exists():
        pytest.skip("no setup.py beside the tests: these are of an installed package")
    constants = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
    strings = " ".join(c for c in constants if isinstance(c, str))
    assert re.findall(FAST, strings) == []
    assert "-ffp-contract=off" in strings
    assert "/fp:precise" in strings


def undefined_symbols(path):
    """Names that a 64-bit ELF library imports from others."""
    data = path.read_bytes()
    if data[:5] != b"\x7fELF\x02":
        pytest.skip("reads 64-bit ELF files only")
    offset, size, count = struct.unpack_from("<Q", data, 40)[0], *struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + k * size) for k in range(count)]
    (table,) = (s for s in sections if s[1] == 11)  # SHT_DYNSYM
    strings = sections[table[6]]
    for k in range(table[5] // table[9]):
        name, _, _, section, _, _ = struct.unpack_from("<IBBHQQ", data, table[4] + k * table[9])
        if section == 0 and name:
            start = strings[4] + name
            yield data[start : data.index(b"\0", start)].decode()


def test_no_elementary_function_is_linked():
    """The same for the compiled code: the compiler may turn a loop or a builtin into a call."""
    found = set(undefined_symbols(pathlib.Path(_cpu.__file__)))
    assert "memcpy" in found or "malloc" in found
    named = rf"(?:__|_ZGV\w*_)?(?:{'|'.join(ELEMENTARY)})(?:f|l)?(?:_finite)?"
    assert sorted(name for name in found if re.fullmatch(named, name)) == []


# ---- what is shipped -------------------------------------------------------------------------------------------------


def test_headers_are_shipped():
    shipped = {s.name for s in SOURCES.iterdir()}
    assert {"kl_math.h", "kl_tree.h"} <= shipped
    here = REPOSITORY / "src"
    if here.exists():
        assert {p.name for p in [*here.glob("*.h"), *here.glob("*.cu")]} <= shipped
    included = {name for text in CODE.values() for name in re.findall(r'#\s*include\s*"([^"]+)"', text)}
    assert included <= shipped


def test_typing_marker_is_shipped():
    assert importlib.resources.files("klcore").joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", [name for name, _ in modules()])
def test_every_file_says_what_it_holds(name):
    assert ast.get_docstring(ast.parse(dict(modules())[name].read_text()))
