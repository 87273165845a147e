"""The table of operations: every list has all of them; and a toy divergence, added as CONTRIBUTING describes."""

import ast
import copy
import inspect
import itertools
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import textwrap

import oracle
import pytest
import relatives

import klcore
from klcore import _cpu, selftest
from klcore.operations import ESTIMATORS, LOSSES, OPERATIONS, PAIRS, SPACES, Call

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
ROWS = [o for table in (OPERATIONS, LOSSES, ESTIMATORS) for o in table.values()]
needs_repository = pytest.mark.skipif(
    not (REPOSITORY / "docs").is_dir(), reason="klcore is tested without its repository"
)


# ---- nobody is forgotten ---------------------------------------------------------------------------------------------


def test_every_kernel_has_a_row():
    assert {o.name for o in ROWS} == set(_cpu.OPERATIONS)
    assert len({o.code for o in ROWS}) == len(_cpu.OPERATIONS)


@pytest.mark.parametrize("operation", ROWS, ids=lambda o: o.name)
def test_rows_are_found_again(operation):
    assert pickle.loads(pickle.dumps(operation)) is copy.deepcopy(operation) is operation


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_public(name):
    """A function with its name, whose keywords are fields of a call, and a unit, which becomes a factor."""
    assert name in klcore.__all__, f"klcore/__init__.py does not export {name}"
    parameters = list(inspect.signature(getattr(klcore, name)).parameters)
    assert parameters[: 2 - OPERATIONS[name].single] == ["x", "y"][: 2 - OPERATIONS[name].single]
    assert set(parameters) <= {*Call._fields, "base", *OPERATIONS[name].parameters}
    assert (OPERATIONS[name].pairs == PAIRS) != OPERATIONS[name].single


def test_the_oracle_knows_all():
    """Its definitions are independent of the table."""
    relations = {o.name for o in OPERATIONS.values() if o.form == _cpu.BY_CLASS}
    assert set(relatives.PARAMETERS) == relations, "tests/relatives.py: PARAMETERS, Definitions"
    table = {o.name: (o.single, o.form == _cpu.BY_COST) for o in OPERATIONS.values() if o.name not in relations}
    assert {name: (d.single, d.cost) for name, d in oracle.DEFINITIONS.items()} == table, "tests/oracle.py: DEFINITIONS"
    assert (*oracle.SPACES, "counts") == SPACES, "tests/oracle.py; test_counts.py has an oracle of its own"


def test_the_self_test_knows_all():
    """`python -m klcore --selftest` prints what it found in place of a missing digest."""
    narrow = [name for name, o in OPERATIONS.items() if o.form != _cpu.BY_CLASS]
    groups = [
        *itertools.product(OPERATIONS, ("float64", "float32")),
        *itertools.product(narrow, ("float16", "bfloat16")),
        *itertools.product(ESTIMATORS, ("float64", "float32")),
        *itertools.product(OPERATIONS, ("counts",)),
        *itertools.product((name for name, o in OPERATIONS.items() if o.takes_indices), ("listed",)),
    ]
    assert set(selftest.DIGESTS) == {"kernels", *map(" ".join, groups)}, "klcore/selftest.py: DIGESTS"


# __all__; definitions; what zeros contribute; columns for each of three; an identity of three; looks; what has no unit
LISTS = {
    "klcore/__init__.py", "tests/oracle.py", "tests/relatives.py", "tests/test_family.py", "tests/test_values.py",
    "tests/test_properties.py", "benchmarks/plots.py", "tests/test_words.py", "tests/test_topk.py",
}  # fmt: skip


@needs_repository
def test_there_is_no_other_list():
    """Tests and benchmarks iterate over all operations of the table."""
    found = set()
    folders = "klcore", "tests", "benchmarks", "asv_bench/benchmarks"
    for path in (path for folder in folders for path in REPOSITORY.glob(f"{folder}/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", None)
            if len({p.value for p in parts or () if isinstance(p, ast.Constant)} & OPERATIONS.keys()) > 2:
                found.add(path.relative_to(REPOSITORY).as_posix())
    assert found == LISTS, "read klcore.operations instead"


PAGES = [
    ("README.md", r"`{}`"),
    ("docs/api.rst", r"^   {}$"),
    ("docs/maths.md", r"^\| `{}` \|"),
    ("docs/choosing.md", r"`{}[`(]"),
]


@needs_repository
@pytest.mark.parametrize(("page", "pattern"), PAGES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_on_the_pages(name, page, pattern):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert re.search(pattern.format(name), text, re.MULTILINE), f"{page} says nothing of {name}"


@needs_repository
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_front_end(name):
    calls = (path.read_text() for path in (REPOSITORY / "klcore" / "compat").rglob("*.py"))
    assert any(re.search(rf"loss\(\s*\"{name}\"|\"{name}\"", text) for text in calls)


# ---- a toy divergence ------------------------------------------------------------------------------------------------

# What CONTRIBUTING says to add: an entry of a list and a term, a row, a function and its name. Where, and what.
TOY = {
    "src/kl_math.h": (
        ("ROW(ENTROPY, BY_COST, 1) KL", "ROW(ENTROPY, BY_COST, 1) ROW(TOY_DIST, BY_TERM, 2) KL"),
        (
            "// ---- all terms ---",
            """template <int SX, int SY> struct Term<TOY_DIST, SX, SY> : Plain {   // (x - y)^2 / 2
  template <typename T> static KL_FN T gap(T x, T y) { return prob<SX>(x) - prob<SY>(y); }
  template <typename T> static KL_FN T value(T x, T y) { return T(0.5) * gap(x, y) * gap(x, y); }
  template <typename T> static KL_FN T dx(T x, T y) { return SX == PROBS ? gap(x, y) : prob<SX>(x) * gap(x, y); }
  template <typename T> static KL_FN T dy(T x, T y) { return SY == PROBS ? -gap(x, y) : -(prob<SY>(y) * gap(x, y)); }
};

// ---- all terms ---""",
        ),
    ),
    "klcore/operations.py": (
        ("OPERATIONS = {o", 'TOY_DIST = _divergence("toy_dist")\nOPERATIONS = {o'),
        ("CROSS_ENTROPY, ENTROPY, *FAMILY)}", "CROSS_ENTROPY, ENTROPY, *FAMILY, TOY_DIST)}"),
    ),
    "klcore/divergence.py": (
        (
            "def loss(",
            """def toy_dist(
    x, y, *, space="probs", axis=-1, reduction="row", weights=None, temperature=1.0, return_grad=None, out=None,
    device=None
):
    return find(x, y, device).compute(
        Call(TOY_DIST, x, y, space, axis, reduction, weights, temperature, return_grad, out, device)
    )


def loss(""",
        ),
        ("import CROSS_ENTROPY,", "import TOY_DIST, CROSS_ENTROPY,"),
    ),
    "klcore/__init__.py": (
        ("import cross_entropy,", "import toy_dist, cross_entropy,"),
        ('    "threads",\n', '    "threads",\n    "toy_dist",\n'),
    ),
}

TRY_IT = """
    import contextlib, importlib, sys
    import numpy as np
    import klcore
    assert klcore.__file__.startswith(sys.argv[1]), klcore.__file__
    rng = np.random.default_rng(0)
    x, y = rng.dirichlet(np.ones(300), (2, 7))
    expected = 0.5 * (x - y) ** 2
    np.testing.assert_allclose(klcore.toy_dist(x, y), expected.sum(1), rtol=1e-13)
    value, dx, dy = klcore.toy_dist(x, y, reduction="none", return_grad=("x", "y"))
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    np.testing.assert_array_equal(dx, x - y)
    np.testing.assert_array_equal(dy, y - x)
    for space in ("log_probs", "logits", ("logits", "probs"), ("log_probs", "logits")):
        pair = (space, space) if isinstance(space, str) else space
        a, b = (p if s == "probs" else np.log(p) for p, s in zip((x, y), pair))
        np.testing.assert_allclose(klcore.toy_dist(a, b, space=space), expected.sum(1), rtol=1e-11)
    torch = importlib.import_module("torch")
    a, b = (torch.tensor(np.log(p), requires_grad=True) for p in (x[:2, :9], y[:2, :9]))
    assert torch.autograd.gradcheck(lambda a, b: klcore.toy_dist(a, b, space="logits"), (a, b))
    compiled = torch.compile(lambda a, b: klcore.toy_dist(a, b, space="logits", reduction="mean"), backend="aot_eager")
    compiled(a, b).backward()
    emulator = importlib.import_module("emulator.device")
    emulator.install()
    x, y = x[:2].astype(np.float32), y[:2].astype(np.float32)
    for space in ("probs", "logits"):
        for on_gpu, on_cpu in zip(
            klcore.toy_dist(x, y, space=space, return_grad=("x", "y"), device="cuda"),
            klcore.toy_dist(x, y, space=space, return_grad=("x", "y")),
        ):
            assert (on_gpu.get() == on_cpu).all()
    print("works")
"""


@pytest.mark.exhaustive
@needs_repository
@pytest.mark.skipif(sys.platform == "win32", reason="builds with g++")
def test_a_toy_divergence(tmp_path):
    """It builds, and works on NumPy, PyTorch and the emulated GPU; and the tests above report what it lacks."""
    pytest.importorskip("torch", reason="torch is not installed")
    for part in ("src", "klcore", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (REPOSITORY / part).is_dir() else shutil.copy
        ignored = {"ignore": shutil.ignore_patterns("*.so", "*.pyd", "_src", "__pycache__", "kl_cpu.cpp")}
        copy(REPOSITORY / part, tmp_path / part, **(ignored if copy is shutil.copytree else {}))
    for name, changes in TOY.items():
        path = tmp_path / name
        text = path.read_text(encoding="utf-8")
        for old, new in changes:
            assert text.count(old) == 1, f"{name} is not as the toy takes it to be: {old!r}"
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
    assert len(TOY) <= 5
    (tmp_path / "klcore" / "_src").symlink_to("../src")
    environment = {**os.environ, "KLCORE_SANITIZE": "undefined"}  # one instruction set, little optimised
    environment.pop("KLCORE_ISA", None)
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tmp_path, env=environment, check=True, timeout=1200)

    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(pathlib.Path(__file__).parent)])
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 1200}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(TRY_IT), str(tmp_path)], **run)
    assert done.stdout == "works\n", done.stderr
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "not toy_divergence"]
    missing = subprocess.run(tests, **run).stdout
    failed = set(re.findall(r"^FAILED \S+::(\S+)", missing, re.MULTILINE))
    pages = {f"test_every_operation_is_on_the_pages[toy_dist-{page}" for page, _ in PAGES}
    assert {name.partition("-")[0] for name in failed} == {
        "test_the_oracle_knows_all",
        "test_the_self_test_knows_all",
        *(p.partition("-")[0] for p in pages),
    }
    assert len(failed) == 2 + len(pages), missing
