"""`python -m klcore`: the report, and the self-test, which must pass, and must fail for every fault it should
detect."""

import importlib
import pathlib
import re
import runpy
import subprocess
import sys

import numpy as np
import oracle
import pytest
from conftest import DEVICES, as_here, computing_on

import klcore
from klcore import __main__, _cpu, exact, selftest
from klcore.backends import cpu
from klcore.operations import KL_DIV

SCRIPT = pathlib.Path(__file__).parents[1] / "docs" / "exact_answers.py"


def command(*arguments):
    words = [sys.executable, "-m", "klcore", *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=600, **as_here())


# ---- what a user types -----------------------------------------------------------------------------------------------


def test_report(capsys):
    done = command()
    klcore.show_config()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"```text\nklcore:\n  version: {klcore.__version__}\n")
    assert done.stdout.count("```") == 2
    assert capsys.readouterr().out.splitlines()[0] in done.stdout


def test_help_and_wrong_arguments():
    assert "--selftest" in command("--help").stdout
    assert command("--selfcheck").returncode == 2


@pytest.mark.exhaustive
def test_selftest_on_the_cpu():
    """In a separate process, with the user's number of threads and instructions."""
    done = command("--selftest")
    assert (done.returncode, done.stderr) == (0, "")
    assert "FAILED" not in done.stdout
    isa, threads = (re.search(f"{name}: (.*)", done.stdout)[1] for name in ("instruction set in use", "threads"))
    assert f"cpu ({isa}, {threads} threads):" in done.stdout
    for name, usable in _cpu.instruction_sets().items():
        assert (f"bits with {name} instructions: " in done.stdout) == usable
    missing = klcore.show_config("dicts")["cuda"]["available"].removeprefix("no: ")
    assert missing == "yes" or f"cuda: not checked: {missing}\n" in done.stdout


@pytest.mark.exhaustive
@pytest.mark.skipif("emulated" not in DEVICES, reason="the emulator is not among the devices of these tests")
def test_selftest_on_a_gpu(capsys, monkeypatch):
    """Emulated: an available device is checked, with every kernel."""
    used = set()
    with computing_on("emulated"):
        cuda = importlib.import_module("klcore.backends.cuda")  # again, with the emulator as CuPy
        start = cuda._start

        def recorded(launches, plans):
            used.update(launch.name for launch in launches)
            start(launches, plans)

        monkeypatch.setattr(cuda, "_start", recorded)
        assert selftest.run()
        text = capsys.readouterr().out
        assert used == {*importlib.import_module("klcore.backends.cuda.kernels").ENTRIES}
        fault(monkeypatch, cuda, ulp)
        (good, sentence), *_ = selftest._bits("cuda:0")
    assert "cuda:0 (emulated, compute capability 9.0, 8 GiB):\n  ok      values: " in text
    assert text.endswith("klcore keeps its promises on cpu, cuda:0.\n")
    assert not good
    assert sentence.startswith("bits: these differ from numerics v2: kernels (")


# ---- faults ----------------------------------------------------------------------------------------------------------


def fault(monkeypatch, backend, change, when=lambda: True, name="kl_div"):
    """Apply `change` to the results that a backend returns for an operation."""
    right = backend.compute

    def wrong(call):
        results = right(call)
        return change(*results) if call.operation.name == name and when() else results

    monkeypatch.setattr(backend, "compute", wrong)


def ulp(value, *gradients):
    """The last bit of the last number."""
    value = value.copy()
    value.reshape(-1)[-1:].view(f"u{value.dtype.itemsize}")[...] ^= 1
    return value, *gradients


def nan(value, dx, dy):
    return np.full_like(value, np.nan), dx, dy


def naive(value, dx, dy):
    """What the literal formula returns for close distributions."""
    return value - value.dtype.type(1e-6), dx, dy


def steep(value, dx, dy):
    return value, dx, (dy * 1.0001).astype(dy.dtype)


def defined(value, dx, dy):
    """With an epsilon, as in other libraries: no infinities."""
    return np.minimum(value, value.dtype.type(1e30)), dx, dy


def broken(value, dx, dy):
    raise MemoryError("no more room")


def failed(capsys):
    """The lines that say FAILED, without their numbers."""
    text = capsys.readouterr().out
    lines = [line.split("FAILED  ")[1].partition(":")[0] for line in text.splitlines() if line.startswith("  FAILED")]
    assert bool(lines) == ("klcore does NOT keep its promises here" in text)
    return lines


BITS = [f"bits with {name} instructions" for name, usable in _cpu.instruction_sets().items() if usable]
BITS += [f"bits with {n} thread{'s' * (n > 1)}" for n in sorted({1, 2, 3, klcore.get_num_threads()})]


@pytest.fixture
def kl_div_only(monkeypatch):
    """A faster self-test."""
    monkeypatch.setattr(selftest, "OPERATIONS", {"kl_div": KL_DIV})


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (ulp, ["KL(p || p) = 0", *BITS]),
        (steep, ["gradients", *BITS]),
        (nan, ["values", "zeros, infinities and NaN", "KL(p || q) >= 0", "KL(p || p) = 0", *BITS]),
        (naive, ["values", "zeros, infinities and NaN", "KL(p || q) >= 0", "KL(p || p) = 0", *BITS]),
        (defined, ["zeros, infinities and NaN", *BITS]),
        (broken, ["answers", "domain", "signs", "bits"]),
    ],
)
def test_fault(monkeypatch, kl_div_only, capsys, change, found):
    fault(monkeypatch, cpu, change)
    monkeypatch.setattr(sys, "argv", ["klcore", "--selftest"])
    in_use, threads = _cpu.instruction_set(), klcore.get_num_threads()
    assert __main__.main() == 1
    lines = failed(capsys)
    assert lines == found
    assert (_cpu.instruction_set(), klcore.get_num_threads()) == (in_use, threads)


def test_fault_of_threads(monkeypatch, kl_div_only, capsys):
    before = klcore.get_num_threads()
    klcore.set_num_threads(1)
    fault(monkeypatch, cpu, ulp, when=lambda: klcore.get_num_threads() == 3)
    assert not selftest.run()
    klcore.set_num_threads(before)
    assert failed(capsys) == ["bits with 3 threads"]


def test_fault_of_an_instruction_set(monkeypatch, kl_div_only, capsys):
    usable = [name for name, usable in _cpu.instruction_sets().items() if usable]
    if len(usable) == 1:
        pytest.skip("this processor has one instruction set only")
    fault(monkeypatch, cpu, ulp, when=lambda: _cpu.instruction_set() == "generic")
    assert not selftest.run()
    assert failed(capsys) == ["bits with generic instructions"]


@pytest.mark.quick(1)
@pytest.mark.parametrize("operation", [*selftest.OPERATIONS, *selftest.ESTIMATORS])
def test_fault_of_an_operation(monkeypatch, operation):
    """One bit of each result: every dtype's digest notices it, for counts too, and no other operation's does."""
    fault(monkeypatch, cpu, ulp, name=operation)
    good, sentence = next(selftest._bits("cpu"))
    assert not good
    named = {name for name in selftest.DIGESTS if re.search(rf"[:,] {name} \(", sentence)}
    assert named - {"kernels"} == {name for name in selftest.DIGESTS if name.startswith(f"{operation} ")}


def test_without_ml_dtypes(monkeypatch, kl_div_only):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    lines = [*selftest._bits("cpu")]
    assert lines[0] == (True, "bits of bfloat16: not checked, because ml_dtypes is not installed")
    assert [good for good, _ in lines] == [True] * (1 + len(BITS))


# ---- the table -------------------------------------------------------------------------------------------------------


def test_table_is_what_its_script_prints():
    if not SCRIPT.exists():
        pytest.skip("no docs/ beside the tests: these are of an installed package")
    printed = "\n".join(runpy.run_path(str(SCRIPT))["table"]())
    assert printed + "\n" == pathlib.Path(exact.__file__).read_text()


def test_table_is_right():
    """By the other definition."""
    for sx, sy, x, y, value, dx, dy in exact.ANSWERS:
        x, y = np.array([x]), np.array([y])
        assert all((a == a.astype(np.float32)).all() for a in (x, y))
        answer = oracle.exact("kl_div", x, y, space=(sx, sy))
        np.testing.assert_allclose(answer.value, [value], rtol=1e-15)
        np.testing.assert_allclose(answer.dx, [dx], rtol=1e-13)
        np.testing.assert_allclose(answer.dy, [dy], rtol=1e-13)
    values = [a[4] for a in exact.ANSWERS]
    assert min(values) < 1e-12
    assert max(values) > 1e3
