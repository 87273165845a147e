"""How benchmarks/cuda_check.py counts the instructions of a CUDA kernel."""

import importlib
import re

import pytest

import klcore
from klcore.operations import KL_DIV

nvrtc = importlib.import_module("klcore.backends.cuda.nvrtc")

SOURCE = """#line 1 "kl_cuda.cu"
KL_DEVICE void spread_outputs(const Wide& at) {
  for (int step = 0; step < at.steps(); step++) {
    if (far) for (int e = 0; e < 8; e++) rare(e);
    else write(step);
  }
}
extern "C" __global__ void __launch_bounds__(256, 2) kl_rows(const Plan p) {
  for (int c = warp_of(), j = 0; c < chunks; c += W, j++) {
    spread_outputs(at);
  }
}
"""
# The shortest way through the steps is the rare one; but it stores nothing.
SASS = """
.text.kl_rows:
	//## File "/tmp/kl_cuda.cu", line 7
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
	//## File "/tmp/kl_cuda.cu", line 8
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_1:
	//## File "/tmp/kl_cuda.cu", line 3 inlined at "/tmp/kl_cuda.cu", line 9
	//## File "/tmp/kl_cuda.cu", line 9
        /*0020*/                   LDS.128 R4, [R0] ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
	//## File "/tmp/kl_cuda.cu", line 4 inlined at "/tmp/kl_cuda.cu", line 9
	//## File "/tmp/kl_cuda.cu", line 9
        /*0040*/                   FADD R4, R4, R5 ;
        /*0050*/                   STS.128 [R0], R4 ;
        /*0060*/                   BRA `(.L_x_3) ;
.L_x_2:
	//## File "/tmp/kl_cuda.cu", line 3 inlined at "/tmp/kl_cuda.cu", line 9
	//## File "/tmp/kl_cuda.cu", line 9
        /*0070*/                   FMUL R4, R4, R5 ;
        /*0080*/               @P2 BRA `(.L_x_2) ;
.L_x_3:
	//## File "/tmp/kl_cuda.cu", line 2 inlined at "/tmp/kl_cuda.cu", line 9
	//## File "/tmp/kl_cuda.cu", line 9
        /*0090*/                   IADD3 R3, R3, 0x1, RZ ;
        /*00a0*/              @!P0 BRA `(.L_x_1) ;
	//## File "/tmp/kl_cuda.cu", line 8
        /*00b0*/                   ISETP.NE.AND P0, PT, R1, R2, PT ;
BACK
.L_x_4:
        /*00e0*/                   EXIT ;
"""
BACK = "        /*00c0*/              @!P3 BRA `(.L_x_0) ;"
BACK_BY_CALL = """        /*00c0*/               @P3 CALL.REL.NOINC `(.L_x_4) ;
        /*00d0*/                   BRA `(.L_x_0) ;"""


@pytest.fixture(scope="module")
def tool(script):
    pytest.importorskip("tqdm")
    return script("cuda_check")


def count(tool, sass, source=SOURCE):
    ((name, code),) = tool.read(sass, tool.places_of(source))
    return tool.Counting(code, 4).whole(name)


@pytest.mark.parametrize(("back", "per_chunk"), [(BACK, 3), (BACK_BY_CALL, 4)])
def test_loops_are_counted_with_their_rounds(tool, back, per_chunk):
    """Four steps of seven instructions, without the rare loop; and what is around the steps."""
    parts = count(tool, SASS.replace("BACK", back))
    assert parts == {"writing sweep": 4 * 7 * 32 / 1024, "per chunk": per_chunk * 32 / 1024}


def test_a_loop_that_is_not_known_is_no_silence(tool):
    with pytest.raises(LookupError, match="strange"):
        count(tool, SASS.replace("BACK", BACK), SOURCE.replace("int step", "int strange"))


def test_what_the_counting_looks_for_is_in_the_source(tool):
    places = list(tool.places_of(nvrtc.source()).values())
    patterns = [*tool.UNITS.values(), *tool.RARE.split("|"), *tool.WANTED.split("|")]
    patterns += [f"^{sweep}: " for sweep in tool.SWEEPS]
    patterns += [name for _, unrelated in tool.SWEEPS.values() for name in unrelated.split("|")]
    patterns += [line for pattern, _, _ in tool.LOOPS for line in pattern.split(r"\n")]
    assert [p for p in patterns if not any(re.search(p, place) for place in places)] == []


@pytest.fixture(scope="module")
def logits(tool):
    """What is counted for kl_rows with float32 logits: without and with a gradient."""
    try:
        nvrtc.version()
        tool.prepare(nvrtc.source(), None, tool.tool("cuobjdump"), tool.tool("nvdisasm"))
    except (klcore.BackendUnavailableError, SystemExit) as error:  # not in CI: make cuda-check would fail
        pytest.skip(str(error))
    kernels = importlib.import_module("klcore.backends.cuda.kernels")
    found = []
    for outputs in (0, 2):
        options = kernels.macros(KL_DIV, (2, 2), (1, 1), False, outputs, ("kl_rows",))
        (kernel,), wrong = tool.check(tool.Job("logits", options, ("kl_rows",), ("kl_rows",), 90))
        assert wrong == []
        found.append(kernel)
    return found


@pytest.mark.exhaustive
def test_real_kernels_are_counted_whole(logits):
    value, gradient = logits
    assert set(value.parts) == {"staging", "reading sweep", "per chunk"}
    assert set(gradient.parts) == {"reading sweep", "writing sweep", "copy-out", "per chunk"}  # staged beforehand
    for part, least in {"staging": 1, "reading sweep": 20, "per chunk": 3}.items():
        assert value.parts[part] > least
        assert part == "staging" or gradient.parts[part] >= 0.9 * value.parts[part]
    assert gradient.parts["writing sweep"] > 3.5  # of what was kept: an fma, two products, three accesses per four
    assert gradient.a_class + value.parts["staging"] - value.a_class > gradient.parts["writing sweep"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("kernel", ["kl_rows", "kl_units"])
@pytest.mark.parametrize("outputs", [0, 2])
def test_rows_that_are_swept_once_are_not_staged(logits, tool, kernel, outputs):
    kernels = importlib.import_module("klcore.backends.cuda.kernels")
    options = kernels.macros(KL_DIV, (0, 0), (1, 1), False, outputs, (kernel,))
    (found,), wrong = tool.check(tool.Job("probs", options, (kernel,), (kernel,), 90))
    assert wrong == []
    assert set(found.parts) == {"reading sweep", "per chunk"}
    assert 30 < found.parts["reading sweep"] < 60  # with the stores of gradients, without the slow way for zeros


@pytest.mark.exhaustive
def test_a_kernel_that_takes_more_than_it_may(tool, logits, monkeypatch):
    kernels = importlib.import_module("klcore.backends.cuda.kernels")
    options = kernels.macros(KL_DIV, (0, 0), (1, 1), False, 0, ("kl_rows",))
    job = tool.Job("kl_div probs float32 value", options, ("kl_rows",), ("kl_rows",), tool.BUDGETED)
    assert tool.check(job)[1] == []
    monkeypatch.setitem(tool.BUDGETS, r"kl_div (probs|log_probs) float32 value: kl_rows", tool.Budget(1, 2))
    (wrong,) = tool.check(job)[1]
    assert "more than the 2 that it may take" in wrong


def test_every_budget_is_of_a_build(tool):
    names = [f"{build.name}: {kernel}" for build in tool.every_build() for kernel in build.hot]
    assert [pattern for pattern in tool.BUDGETS if not any(re.fullmatch(pattern, name) for name in names)] == []
