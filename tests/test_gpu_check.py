"""The command for machines with a GPU, where there is none: it runs through on the emulator, and its pages are true."""

import copy
import importlib
import json
import pathlib
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "benchmarks"
COMMAND = [sys.executable, str(SCRIPTS / "gpu_check.py")]

if not (SCRIPTS / "gpu_check.py").exists():
    pytest.skip("no benchmarks beside the tests: these are of an installed package", allow_module_level=True)


@pytest.fixture(scope="module")
def script():
    """Imports a file of benchmarks/."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The record of a run on the emulator, and its folder."""
    if not shutil.which("g++") or sys.platform == "win32":
        pytest.skip("the emulator needs g++ and POSIX")
    folder = tmp_path_factory.mktemp("record")
    words = [*COMMAND, "--emulated", "--out", str(folder), "--seconds", "400"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("emulated-*.json")
    return json.loads(path.read_text()), path


def test_every_step_runs(script, emulated):
    record, _ = emulated
    steps = record["steps"]
    assert list(steps) == list(script("gpu_check").STEPS)
    assert {name: step["failures"] for name, step in steps.items() if step["failures"]} == {}
    assert [name for name, step in steps.items() if step["status"] == "skipped"] == ["sanitizer"]
    assert record["emulated"]
    assert steps["tests"]["details"]["tests"] >= 2
    assert steps["bits"]["details"]["checked"] >= 8
    found = steps["benchmark"]["details"]
    assert not found["not run"]
    for case in found["cases"]:
        (ours,) = case["contenders"]
        assert not ours["wrong"]
        assert set(ours["errors"]) == ({"value", "dy"} if case["outputs"] == "value+dy" else {"value"})


def test_the_report_beside_the_record(emulated):
    _, path = emulated
    text = path.with_suffix(".md").read_text()
    assert "Emulated on a CPU: not one of these times means anything." in text
    assert "| bits | ok |" in text


def test_a_step_alone_is_added_to_the_record(emulated):
    record, path = emulated
    words = [*COMMAND, "--emulated", "--out", str(path.parent), "--only", "large"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads(path.read_text())["steps"]) == set(record["steps"])


def test_what_is_asked_for_and_fails_is_a_failure(script, tmp_path, monkeypatch):
    gpu_check = script("gpu_check")

    def fails(run):
        raise OSError("out of smoke")

    def environment(run):
        run.known = {"gpu": "Toy"}

    monkeypatch.setitem(gpu_check.STEPS, "large", fails)
    monkeypatch.setattr(gpu_check, "environment", environment)
    monkeypatch.setattr(sys, "argv", ["", "--only", "large", "--out", str(tmp_path)])
    assert gpu_check.main() == 1
    (path,) = tmp_path.glob("toy-*.json")
    assert json.loads(path.read_text())["steps"]["large"]["failures"] == ["OSError: out of smoke"]


@pytest.mark.parametrize(
    ("code", "seconds", "found"),
    [("print('x'); raise SystemExit(3)", 60, (3, "x\n")), ("import time; time.sleep(60)", 0, (None, ""))],
)
def test_processes_end(script, tmp_path, code, seconds, found):
    run = script("gpu_check").Run(False, False, tmp_path / "log")
    assert run.start([sys.executable, "-c", code], seconds) == found
    assert shlex.quote(code) in (tmp_path / "log").read_text()


def test_the_page_is_up_to_date(script):
    """After a new record: python benchmarks/gpu_report.py"""
    text = (ROOT / "docs" / "performance.md").read_text()
    assert script("gpu_report").page(text) == text


def test_the_page_takes_the_newest_record_of_a_gpu(script, emulated, tmp_path):
    gpu_report = script("gpu_report")
    text = (ROOT / "docs" / "performance.md").read_text()
    for date in ("2027-01-01", "2027-01-03", "2027-01-02"):
        record = copy.deepcopy(emulated[0])
        record |= {"emulated": date.endswith("3"), "date": f"{date}T00:00:00+00:00"}
        case = record["steps"]["benchmark"]["details"]["cases"][0]
        peer = case["contenders"][0] | {"name": "Peer", "ms": 3 * case["contenders"][0]["ms"], "wrong": True}
        case["contenders"] += [peer, {"name": "Absentee", "absent": "not installed"}]
        record["steps"]["benchmark"]["details"]["not run"] = ["sweep: something"]
        (tmp_path / f"toy-{date}.json").write_text(json.dumps(record))
    made = gpu_report.page(text, tmp_path)
    for words in (
        "2027-01-02",
        "3.00 (wrong)",
        "| Absentee |",
        "not installed",
        "Not run: sweep: some",
        "ahead of Liger-Kernel: not measured",
    ):
        assert words in made
    assert "2027-01-01" not in made
    assert "2027-01-03" not in made  # emulated
    assert gpu_report.NO_GPU not in made
    with pytest.raises(ValueError, match="one section 'gpu'"):
        gpu_report.page(text.replace("<!-- gpu: end -->", ""), tmp_path)


def test_bits_differ_or_not(script):
    gpu_bits = script("gpu_bits")
    a = np.array([[0.0, 1.0, np.nan]], np.float32)
    other_nan = np.array([[0, 0x3F800000, 0xFFC00001]], np.uint32).view(np.float32)
    assert gpu_bits.same_bits(a, other_nan)
    for wrong in (-0.0, 1e-45):
        b = a.copy()
        b[0, 0] = wrong
        assert not gpu_bits.same_bits(a, b)
        assert "1 of 3 differ, first at (0, 0)" in gpu_bits.difference(b, a, True, True)
    assert gpu_bits.difference(a, a[:, :2], True, True)
    near = np.array([1 + 1e-6, np.inf], np.float32)
    assert gpu_bits.difference(near, np.array([1, np.inf], np.float32), False, False) == ""
    assert gpu_bits.difference(near, np.array([1, 1], np.float32), False, False)


def test_all_cases_are_planned(script):
    gpu_bench = script("gpu_bench")
    tasks = gpu_bench.tasks(emulated=False, quick=False)
    assert len({task.key for task in tasks}) == len(tasks)
    compared = {task.case for task in tasks if len(task.contenders) > 1}
    expected = {
        gpu_bench.Case(*size, dtype, space, outputs)
        for size in gpu_bench.SIZES
        for dtype in ("float32", "bfloat16", "float16")
        for space in ("probs", "log_probs", "logits")
        for outputs in gpu_bench.OUTPUTS
    }
    assert compared == expected
    assert all(task.case.n == 128_256 or task.case.n == 32_768 for task in tasks[:24])


def test_a_benchmark_goes_on_behind_what_killed_it(script, tmp_path, monkeypatch):
    gpu_bench = script("gpu_bench")
    cases = [gpu_bench.Case(3, n, "float32", "probs", "value") for n in (2, 3, 4)]
    tasks = [gpu_bench.Task("first", case, ("klcore", "JAX jit")) for case in cases]
    asked = []

    class Memory:
        emulated = True

        def copies(self):
            return {"copy": 1.0}

        def memory(self):
            return 1 << 30

        def free(self):
            pass

    def run_task(task, data, copy, skipped, begin):
        begin("JAX jit")
        asked.append(task.case.n)
        if task.case.n == 3 and f"{task.key}: JAX jit" not in skipped:
            raise RuntimeError("an illegal memory access was encountered")
        return {}

    class Data:
        def __init__(self, gpu, case):
            self.case = case

    monkeypatch.setattr(gpu_bench, "run_task", run_task)
    monkeypatch.setattr(gpu_bench, "Data", Data)
    monkeypatch.setattr(gpu_bench, "overhead", lambda gpu: {})
    lines = tmp_path / "lines"
    with pytest.raises(RuntimeError, match="illegal"):
        gpu_bench._run(lines, Memory(), tasks, float("inf"), None)
    gpu_bench._run(lines, Memory(), tasks, float("inf"), None)
    assert asked == [2, 3, 3, 4]
    assert {e["key"] for e in gpu_bench.read(lines) if "figures" in e} >= {task.key for task in tasks}
    assert {"begin": f"{tasks[1].key}: JAX jit", "died": "ended its process"} in gpu_bench.read(lines)


@pytest.mark.skipif(sys.platform == "darwin", reason="NVIDIA has no compiler for this system")
def test_its_own_kernels_compile(script):
    nvrtc = importlib.import_module("klcore.backends.nvrtc")
    assert nvrtc.compile(script("gpu_device").KERNELS, (), nvrtc.supported()[-1])


def test_the_command_for_the_profiler():
    done = subprocess.run([*COMMAND, "--ncu"], capture_output=True, text=True, check=True)
    words = shlex.split(done.stdout.splitlines()[0])
    assert words[0] == "ncu"
    assert words[-2:] == ["--run", "profile"]
