"""The run on a GPU, without one: it completes on the emulator, loses nothing, and its pages are correct."""

import copy
import importlib
import json
import math
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import oracle
import pytest
from conftest import BENCHMARKS, DTYPES, as_here

from klcore.operations import OPERATIONS

ROOT = pathlib.Path(__file__).resolve().parents[1]
SPACES = ("probs", "log_probs", "logits")
KINDS = oracle.CALLS
TOOL = """#!/bin/bash
while [[ $1 == -* ]]; do shift 2; done
"$@"
status=$?
echo "========= ERROR SUMMARY: 0 errors"
exit $status
"""


@pytest.fixture(scope="module")
def start(script, tmp_path_factory):
    """Start an emulated run, with stand-ins for NVIDIA's tools that run the commands they would inspect."""
    if not shutil.which("g++") or sys.platform == "win32":
        pytest.skip("the emulator needs g++ and POSIX")
    tools = tmp_path_factory.mktemp("tools")
    for name in ("compute-sanitizer", "ncu"):
        (tools / name).write_text(TOOL)
        (tools / name).chmod(stat.S_IRWXU)
    keywords = as_here(PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    keywords["env"] = {k: v for k, v in keywords["env"].items() if not k.startswith("PYTEST_")}

    def start(out, keep, *arguments):
        carry = keep / "carry"
        carry.mkdir(parents=True, exist_ok=True)
        (carry / "liger_kernel-0-py3-none-any.whl").touch()  # not a wheel: prepared files may be unusable
        words = [sys.executable, str(BENCHMARKS / "gpu_run.py"), str(out), "--emulated", "--keep", str(keep)]
        words += ["--carry", str(carry), *arguments]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **keywords)

    return start


@pytest.fixture(scope="module")
def emulated(start, tmp_path_factory):
    """The lines of a first call, its folder, and what it keeps for a second."""
    out, keep = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("keep")
    process = start(out, keep)
    printed = process.communicate()[0]
    assert process.returncode == 0, printed + (out / "log.txt").read_text()
    assert printed.endswith((out / "table.txt").read_text())
    return lines_of(out), out, keep


def lines_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.exhaustive
def test_every_stage_runs(script, emulated):
    lines, out, _ = emulated
    gpu_run, report = script("gpu_run"), script("report")
    record = report.record_of(lines)
    assert list(record["stages"]) == gpu_run.NAMES
    assert {stage["status"] for stage in record["stages"].values()} == {"ok"}
    assert not any(stage["failures"] or stage["not_run"] for stage in record["stages"].values())
    assert record["stages"]["bits"]["checked"] >= 8
    assert {line["tool"] for line in lines if "tool" in line} == set(gpu_run.TOOLS)
    assert len(list(out.iterdir())) == 4 + len(gpu_run.TOOLS)  # at most eight
    assert (out / "ncu.txt").read_text().count("ERROR SUMMARY") == 1
    assert len((out / "table.txt").read_text().splitlines()) < 50
    found = record["benchmark"]
    assert not found["not run"]
    assert {case["part"] for case in found["cases"]} == set(report.BENCHMARKS)
    for case in found["cases"]:
        (ours,) = case["contenders"]
        assert not ours["wrong"]
        assert set(ours["errors"]) == ({"value", "dy"} if case["outputs"] == "value+dy" else {"value"})
        assert ours["percent of copy"] > 0


@pytest.mark.exhaustive
def test_what_stages_launch(emulated):
    lines, _, _ = emulated
    for stage in ("first-light", "bits", "sanitizer memcheck"):
        launched = [line["launched"] for line in lines if line["stage"] == stage and "launched" in line]
        assert {"kl_narrow", "kl_units", "kl_fold", "kl_rows"} <= set().union(*launched), stage


@pytest.mark.exhaustive
def test_a_second_call_does_what_is_left(script, start, emulated, tmp_path):
    lines, _, keep = emulated
    (memory,) = keep.glob("results-*.jsonl")
    kept = tmp_path / "keep"
    kept.mkdir()

    def is_lost(line):
        items = {"kl_div logits logits float32", "float16 probs"}
        return line.get("item") in items or (line["stage"] == "large" and "status" in line)

    text = "".join(f"{json.dumps(line)}\n" for line in lines if not is_lost(line))
    (kept / memory.name).write_text(text)
    process = start(tmp_path / "out", kept, "--second")
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    second = lines_of(tmp_path / "out")
    assert second[0]["stages"] == ["environment", "bits", "large"]
    begun = [line["item"] for line in second if "begin" in line]
    assert begun == ["kl_div logits logits float32", "float16 probs"]
    assert "kl_rows" not in printed
    record = script("report").record_of([line for line in lines if not is_lost(line)] + second)
    assert {stage["status"] for stage in record["stages"].values()} == {"ok"}


@pytest.mark.exhaustive
def test_who_is_killed_leaves_complete_lines(script, start, emulated, tmp_path):
    out = tmp_path / "out"
    process = start(out, tmp_path / "keep", "--only", "ceilings", "--only", "alone", "--only", "peers")
    results = out / "results.jsonl"
    while process.poll() is None and not (results.exists() and '"figures": {"rows"' in results.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lines = lines_of(out)
    report = script("report")
    record = report.record_of(lines)
    assert record["benchmark"]["cases"]
    assert record["benchmark"]["ceilings"]
    assert record["stages"]["alone"]["status"] in ("cut off", "ok")
    assert record["stages"]["peers"]["status"] in ("not run", "cut off")
    page = report.write(record, tmp_path)[1].read_text()
    assert "Emulated on a CPU: these times mean nothing." in page
    assert "| alone |" in page
    assert report.table(lines)
    done = subprocess.run([sys.executable, BENCHMARKS / "report.py", out], capture_output=True, text=True)
    assert "no record of a GPU" in done.stderr  # in docs/benchmarks


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """A run, in this process, with the test's own stages."""
    gpu_run, gpu_lines = script("gpu_run"), script("gpu_lines")
    monkeypatch.setenv(gpu_lines.FILES, str(tmp_path / gpu_lines.NAME))
    monkeypatch.setenv(gpu_lines.CALL, "1")
    return gpu_run.Run(tmp_path, True, math.inf, tmp_path, tmp_path, tmp_path)


def test_limits_are_kept(script, run):
    gpu_run = script("gpu_run")
    run.end = time.time() + gpu_run.LAST + 4

    def sleeps(run):
        run.wait(run.start([sys.executable, "-c", "import time; time.sleep(600)"]))
        return []

    stages = [gpu_run.Stage(name, limit, sleeps) for name, limit in (("a", 0.1), ("b", math.inf), ("c", 9))]
    gpu_run.run_stages(run, stages, True)
    assert not run.children
    found = {line["stage"]: line["status"] for line in lines_of(run.out) if "status" in line}
    assert found == {"a": "not run", "b": "out of time", "c": "not run"}


def test_a_failure_ends_its_stage_and_no_other(script, run, monkeypatch):
    gpu_run, report = script("gpu_run"), script("report")

    def fails(run):
        raise OSError("out of smoke")

    def stops(run):
        raise gpu_run.Stop("dark")

    def skips(run):
        raise gpu_run.Skip("no tool")

    kinds = {"a": fails, "b": skips, "c": stops, "d": fails}
    gpu_run.run_stages(run, [gpu_run.Stage(name, 9, kind) for name, kind in kinds.items()], False)
    found = {name: report.judge(name, lines_of(run.out)) for name in kinds}
    assert {name: verdict.status for name, verdict in found.items()} == {
        "a": "failed", "b": "skipped", "c": "failed", "d": "not run",
    }  # fmt: skip
    assert found["a"].failures == ["OSError: out of smoke"]
    assert found["d"].why == "c failed"
    monkeypatch.setattr(gpu_run, "STAGES", [gpu_run.Stage("a", 9, fails)])
    monkeypatch.setattr(sys, "argv", ["", str(run.out / "out"), "--keep", str(run.out / "keep")])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    assert gpu_run.main() == 1


def test_who_dies_is_passed_over(script, run, monkeypatch):
    """By the process that continues, but not by a second call."""
    gpu_lines, report = script("gpu_lines"), script("report")
    code = f"""
import os, sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
from gpu_lines import each
def work(name):
    if name == "b":
        os.abort()
    if name == "c":
        raise ValueError("wrong")
    if name == "d":
        time.sleep(600)
    return {{"wrong": []}}
each("s", "abcde", work, time.time() + 1e6, patience=0.1)
"""
    monkeypatch.setattr(run, "work", lambda *arguments: run.start([sys.executable, "-c", code]))
    run.deadline = math.inf
    assert run.items("s") == []
    verdict = report.judge("s", lines_of(run.out))
    assert (verdict.done, verdict.not_run) == (3, 2)
    assert verdict.failures == [
        "b: its process ended, exit status -6",
        "c: ValueError: wrong",
        "d: its process ended, exit status 1",
    ]
    monkeypatch.setenv(gpu_lines.CALL, "2")
    again = []
    gpu_lines.each("s", "abcdef", lambda name: again.append(name) or {}, math.inf)
    assert again == ["f", "b", "d"]  # an item that ended a process comes last
    assert report.judge("s", lines_of(run.out)).not_run == 0


# ---- what is planned for hardware ------------------------------------------------------------------------------------


@pytest.fixture
def h100(script):
    with script("stub").installed() as cupy:
        yield script("gpu_carry").Planned(cupy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_rows_are_held_or_read_again(script, h100, dtype):
    """Both ways of sweeping them twice are taken, by the cases meant for each."""
    gpu_bits = script("gpu_bits")
    light = gpu_bits.light_cases(h100)
    held = gpu_bits.held_rows(h100), gpu_bits.HELD
    again = {"kl_units", "kl_fold"}
    chosen = {"kl_rows"} if dtype == "float32" else again
    for shape, kernels in (
        (light["float32, held"][0], chosen),
        (light[f"{dtype}, read again"][0], again),
        (held, chosen),
    ):
        x = h100.fill(*shape, dtype, "logits", 0, 0)
        with script("gpu_device").launched() as found:
            gpu_bits.light_call(h100, (x, x.copy()), "logits")
        assert set(found) == kernels, shape
    assert f"{held}, gradient y" in gpu_bits.cases(h100, f"kl_div logits logits {dtype}")


def test_what_is_carried(script):
    options = {frozenset(found) for found in script("gpu_carry").planned()}
    assert len(options) > 1000
    codes = {"float32": 1, "bfloat16": 3}
    for code in codes.values():
        for kernel in ("UNITS", "NARROW", "FOLD", *(["ROWS"] if code == 1 else [])):
            wanted = {f"-DKL_X={code}", f"-DKL_{kernel}", "-DKL_SPACE_X=2", "-DKL_SPACE_Y=2", "-DKL_OUTPUTS=2"}
            assert any(wanted <= found for found in options), wanted
    for macro in ("UNITS", "NARROW", "ROWS", "FOLD", "SUM", "SUMMED"):
        assert any(f"-DKL_{macro}" in found for found in options), macro


def test_all_cases_are_planned(script):
    gpu_bench = script("gpu_bench")
    stages = {stage: gpu_bench.tasks(stage, False) for stage in script("report").BENCHMARKS}
    names = [task.name for tasks in stages.values() for task in tasks]
    assert len(set(names)) == len(names)
    alone, others = ({t.case for t in stages["alone"] if t.part == part} for part in ("alone", "operations"))
    assert alone == {
        gpu_bench.Case(*size, dtype, space, outputs)
        for size in (*gpu_bench.FIRST, *gpu_bench.NAMED, *gpu_bench.FEW)
        for dtype in ("float32", "bfloat16")
        for space in ("probs", "log_probs", "logits")
        for outputs in ("value", "value+dy")
    }
    kinds = {(c.operation, c.spaces) for c in others} | {(c.operation, c.spaces) for c in alone}
    assert kinds == set(KINDS)
    assert len(others) == 4 * (len(KINDS) - 3)  # two dtypes, value and gradient
    assert len(stages["peers"]) == 8
    assert all(len(task.contenders) == len(gpu_bench.CONTENDERS) for task in stages["peers"])


@pytest.mark.skipif(sys.platform == "darwin", reason="NVIDIA has no compiler for this system")
def test_its_own_kernels_compile(script, tmp_path, monkeypatch):
    nvrtc = importlib.import_module("klcore.backends.cuda.nvrtc")
    monkeypatch.setenv("KLCORE_CACHE_DIR", str(tmp_path))
    path = script("gpu_device").own_kernels(nvrtc.supported()[-1])
    assert path.stat().st_size
    assert script("gpu_device").own_kernels(nvrtc.supported()[-1]) == path


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


@pytest.mark.parametrize("size", [2.0**-20, 1e-3])  # the first is subnormal in float16
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_gradients_of_16_bits_may_be_one_unit_apart(script, name, size):
    gpu_bits, dtype = script("gpu_bits"), DTYPES[name]
    a = np.full((1, 3), size, dtype)
    for units in (1, 2):
        b = (a.view(np.uint16) + np.array([0, 0, units], np.uint16)).view(dtype)
        assert bool(gpu_bits.difference(b, a, False, True)) == (units > 1)


@pytest.mark.parametrize(("operation", "spaces"), KINDS)
def test_what_the_benchmark_takes_for_right(script, operation, spaces):
    """klcore's results on the CPU pass the check, and others do not."""
    gpu_bench, gpu_device = script("gpu_bench"), script("gpu_device")
    numpy = gpu_device.Emulated.__new__(gpu_device.Emulated)  # without the emulator
    numpy.put, numpy.get = (lambda a: a), np.asarray
    of = OPERATIONS[operation].gradients[-1]
    case = gpu_bench.Case(20, 7, "float64", " ".join(spaces), f"value+d{of}", operation)
    data = gpu_bench.Data(numpy, case)
    arrays, space = (data.sets[0][:1], spaces[0]) if of == "x" else (data.sets[0], spaces)
    function = getattr(importlib.import_module("klcore"), operation)
    value, gradient = function(*arrays, space=space, reduction="sum", return_grad=of)
    errors = data.error(float(value), [gradient[: gpu_bench.SAMPLE]])
    assert set(errors) == {"value", f"d{of}"}
    assert max(errors.values()) < 1e-9
    assert min(data.error(1.001 * value, [1.001 * gradient[: gpu_bench.SAMPLE]]).values()) > 1e-4


NCU = """==PROF== Connected to process 508 (/usr/bin/python3.12)
(8192, 32768) float32 probs value+dy
==PROF== Profiling "kl_rows": 0%....50%....100% - 18 passes
(9, 3) float32 logits value
==PROF== Profiling "kl_narrow": 0%....50%....100% - 18 passes
==PROF== Disconnected from process 508
[508] python3.12@127.0.0.1
  kl_rows (4224, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Elapsed Cycles                cycle    1,690,427
    DRAM Throughput                   %        77.38
    Duration                         us       861.22
    Compute (SM) Throughput           %        61.39
    Registers Per Thread   register/thread                       124
  kl_narrow (4224, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         ms         1.91
"""


def test_what_a_profiler_says(script):
    report = script("report")
    rows, narrow = report.profile_of(NCU)
    call = {"call": "(8192, 32768) float32 probs value+dy", "kernel": "kl_rows"}
    assert rows == call | {"DRAM %": 77.38, "ms": pytest.approx(0.86122), "SM %": 61.39, "registers": 124}
    assert narrow == {"call": "(9, 3) float32 logits value", "kernel": "kl_narrow", "ms": 1.91}
    made = report.profile_table([rows, narrow])
    assert "| (8192, 32768) float32 probs value+dy: kl_rows | 0.861 | 77.4 | 61.4 |  | 124 |" in made


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_up_to_date(script):
    """After a new record: make gpu-report"""
    text = (ROOT / "docs" / "performance.md").read_text()
    assert script("report").page(text) == text


def test_the_page_takes_the_newest_record_of_a_gpu(script, tmp_path):
    report = script("report")
    text = (ROOT / "docs" / "performance.md").read_text()
    ours = {"name": "klcore", "ms": 1.0, "wall us": 9.0, "extra bytes": 0, "wrong": False}
    ours["errors"] = {"value": 1e-7}
    peer = ours | {"name": "Peer", "ms": 3.0, "wrong": True}
    case = {"rows": 8192, "n": 32_768, "dtype": "float32", "space": "probs", "outputs": "value", "part": "peers"}
    case["contenders"] = [ours, peer, peer | {"name": "torch.compile", "ms": 0.9}]
    case["contenders"].append({"name": "Absentee", "absent": "not installed"})
    run = {"stage": "run", "stages": ["peers", "more"], "commit": "c", "sources": "s", "emulated": False}
    copies = {"read": 3e12, "copy by the driver": 1.1e12, "copy by a kernel": 8192 * 32_768 * 4 * 2 / 0.89e-3}
    lines = [
        {"stage": "environment", "found": {"gpu": "NVIDIA H200", "versions": {}}},
        {"stage": "ceilings", "item": "copies", "figures": copies},
        {"stage": "peers", "planned": ["a", "b"]},
        {"stage": "peers", "item": "a", "figures": case},
    ]
    for date in ("2027-01-01", "2027-01-03", "2027-01-02"):
        line = run | {"date": f"{date}T00:00:00+00:00", "emulated": date.endswith("3")}
        record = report.record_of([line, *copy.deepcopy(lines)])
        assert report.write(record, tmp_path)[0].name == f"nvidia-h200-{date}-c.json"
    made = report.page(text, tmp_path)
    for words in (
        "2027-01-02",
        "3.00 (wrong)",
        "Absent from some cases: Absentee: not installed",
        "Cases not run: b",
        'here "copy by a kernel"',
        "| 1.000 | **89** |",
        "| float32 probs, inputs of 1 GB and more: 85 % of a copy | met | 1 of 1 |",
        "| float32 logits, inputs of 1 GB and more: 85 % of a copy | not measured |",
        "| ahead of torch.compile | **missed** | 0 of 1 | (8192, 32768) float32 probs value 0.90 |",
        "| ahead of Liger-Kernel | not measured |",
        "Not run, so nothing is known about it: first-light, alone, profile, bits, sanitizer, tests, large, more",
        "plots/gpu-light.svg",
        "Earlier records: [nvidia-h200-2027-01-01-c](benchmarks/nvidia-h200-2027-01-01-c.json)",
    ):
        assert words in made
    assert "2027-01-03" not in made  # emulated
    assert report.NO_GPU not in made
    with pytest.raises(ValueError, match="one section 'gpu'"):
        report.page(text.replace("<!-- gpu: end -->", ""), tmp_path)
    with pytest.raises(ValueError, match="not the results of one run"):
        report.record_of([run | {"date": ""}, run | {"date": "", "sources": "t"}])
