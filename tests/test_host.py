"""The cost of a call on a GPU before its kernels run: allocations, launches, and that repeated calls stay cheap.

benchmarks/host_time.py measures the microseconds; a test must not. The arrays are those of benchmarks/stub.py.
"""

import sys

import numpy as np
import pytest

import klcore
from klcore.operations import KL_DIV, Call


@pytest.fixture(scope="module")
def modules(script):
    return script("stub"), script("host_time")


@pytest.fixture
def cupy(modules):
    with modules[0].installed() as cupy:
        yield cupy


def cuda(part=""):
    return sys.modules[f"klcore.backends.cuda{part}"]


# results that are new arrays, one allocation for all working memory (and one for a converted mask); launches, three
# of them for rows that are read again
COUNTS = {
    "row": (1, 1),
    "row, out=": (0, 1),
    "sum": (2, 3),
    "sum, out=": (1, 3),
    "logits, batchmean": (2, 3),
    "logits, row + dy": (3, 3),
    "logits, row + dy, out=": (1, 3),
    "logits, sum + dy": (3, 5),
    "logits, sum + dy, out=": (1, 5),
    "logits, batchmean + dx + dy, out=": (1, 5),
    "16 bits, logits, sum + dy, out=": (1, 5),
    "weighted rowmean + dy": (3, 7),
    "weighted rowmean + dy, out=": (1, 7),
    "rowmean + dy, a mask": (4, 7),
    "entropy, mean": (2, 3),
}


def test_every_kind_of_call_is_counted(modules, cupy):
    assert list(modules[1].calls(cupy)) == list(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_allocations_and_launches(modules, cupy, name):
    stub, host_time = modules
    call = host_time.calls(cupy)[name]
    for _ in range(3):  # the first call prepares what the others reuse, and allocates no more than they do
        stub.counts.clear()
        call()
        assert (stub.counts["allocations"], stub.counts["launches"]) == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_a_call_that_is_known_is_not_arranged_again(modules, cupy, monkeypatch, name):
    call = modules[1].calls(cupy)[name]
    call()
    monkeypatch.setattr(cuda().rows, "arrange", None)
    monkeypatch.setattr(cuda(), "prepare", None)
    call()


def test_addresses_are_the_calls_own(modules, cupy, monkeypatch):
    """In each of two similar calls, the kernels read and write the arrays of that call."""
    seen = []
    klcore.kl_div(cupy.empty((500, 9000)), cupy.empty((500, 9000)))  # imports the backend
    monkeypatch.setattr(cuda(), "_start", lambda launches, plans: seen.append(plans))
    fields = {name: cuda(".plans").AT[name] for name in ("x", "y", "weights", "value", "dx", "dy")}
    for _ in range(3):
        x, y, dx, dy = (cupy.empty((500, 9000), "float32") for _ in range(4))
        w, value = cupy.empty(500, "float32"), cupy.empty(500, "float32")
        klcore.kl_div(x, y, space="logits", weights=w, return_grad=("x", "y"), out=(value, dx, dy))
        given = {"x": x, "y": y, "weights": w, "value": value, "dx": dx, "dy": dy}
        for plan in seen.pop().view(np.int64).reshape(-1, cuda(".plans").WORDS):
            assert {name: plan[at] for name, at in fields.items()} == {name: a.data.ptr for name, a in given.items()}
    assert len(cuda()._kept) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"reduction": "sum"}, {"space": "log_probs"}, {"axis": 0}, {"return_grad": "x"}, {"temperature": 2.0},
        {"weights": (300, "float64")}, {"weights": (300, "float32")}, {"x": "float64"}, {"x": "rows apart"},
        {"y": "one row"}, {"out": True},
    ],
    ids=str,
)  # fmt: skip
def test_calls_that_differ_do_not_share(cupy, monkeypatch, change):
    """Whatever changes the kernels, or their arguments."""

    def call(change):
        x, y = (cupy.empty((300, 300), "float32") for _ in "xy")
        keywords = {"space": "logits"} | {k: v for k, v in change.items() if k not in ("x", "y")}
        if "weights" in change:
            keywords["weights"] = cupy.empty(*change["weights"])
        if "out" in change:
            keywords["out"] = cupy.empty(300, "float32")
        if change.get("x") == "float64":
            x = cupy.empty((300, 300), "float64")
        if change.get("x") == "rows apart":
            x = cupy.empty((600, 300), "float32")[::2]
        if "y" in change:
            y = y[:1]
        klcore.kl_div(x, y, **keywords)

    call({})
    before = len(cuda()._kept)
    call({})
    assert len(cuda()._kept) == before
    call(change)
    assert len(cuda()._kept) == before + 1


def test_words_that_are_equal_and_mean_another_thing(cupy):
    """1.0 == 1, but an axis is an integer: no call accepts what the first one refused."""
    x, y = cupy.empty((4, 5)), cupy.empty((4, 5))
    for axis in (1, np.int64(1), True):
        klcore.kl_div(x, y, axis=axis)
    with pytest.raises(TypeError, match="axis must be an integer, found float"):
        klcore.kl_div(x, y, axis=1.0)
    for words in ({"space": ["logits", "logits"]}, {"return_grad": ["x", "y"]}):  # unhashable
        klcore.kl_div(x, y, **words)
    with pytest.raises(ValueError, match="return_grad"):
        klcore.kl_div(x, y, return_grad=[["x"]])


class Schedule:
    """A temperature that changes in place, as a tensor may."""

    value = 1.5

    def __float__(self):
        return self.value


def test_a_temperature_that_changes_in_place(cupy, monkeypatch):
    x, seen = cupy.empty((3, 5)), []
    klcore.kl_div(x, x)
    monkeypatch.setattr(cuda(), "_start", lambda launches, plans: seen.append(plans.view(np.float64)))
    schedule = Schedule()
    for schedule.value in (1.5, 4.0, 1.5):
        klcore.kl_div(x, x, space="logits", temperature=schedule)
    at = cuda(".plans").AT["inverse_temperature"]
    assert [plans[at] for plans in seen] == [1 / 1.5, 1 / 4.0, 1 / 1.5]
    before = len(cuda()._kept)
    for value in (1.5, np.float32(1.5), np.array(1.5), Schedule()):
        klcore.kl_div(x, x, space="logits", temperature=value)
    assert len(cuda()._kept) == before


@pytest.mark.parametrize(
    ("known", "change"),
    [
        (True, {}),
        (True, {"weights": "bool"}),
        (True, {"weights": "int64"}),
        (True, {"weights": "float16"}),
        (True, {"y": "one row"}),
        (False, {"weights": "list"}),
        (False, {"x": "int64"}),
        (False, {"y": "numbers"}),
        (False, {"space": ["logits", "logits"]}),
        (False, {"x": "empty"}),
    ],
    ids=str,
)
def test_which_calls_are_known_again(cupy, known, change):
    """Those whose arrays the kernels read in place, and whose options are hashable; others are prepared again."""
    x = (
        cupy.empty((0, 40), "float32")
        if change.get("x") == "empty"
        else cupy.empty((30, 40), change.get("x", "float32"))
    )
    y = {"one row": x[:1], "numbers": [0.5] * 40}.get(change.get("y"), x)
    keywords = {"space": change.get("space", "logits")}
    if "weights" in change:
        keywords["weights"] = [1.0] * 30 if change["weights"] == "list" else cupy.empty(30, change["weights"])
    for _ in range(2):
        klcore.kl_div(x, y, **keywords)
    assert len(cuda()._kept) == known


def test_a_gradient_alone_adds_up_no_value(modules, cupy, monkeypatch):
    """In products with a cotangent the value is not needed."""
    stub = modules[0]
    x, y, dy = (cupy.empty((300, 900), "float16") for _ in range(3))
    klcore.kl_div(x, y)
    for reduction, cotangent in (("sum", cupy.empty((), "float32")), ("row", cupy.empty(300, "float16"))):
        for _ in range(2):
            before = len(cuda()._kept)
            stub.counts.clear()
            call = Call(KL_DIV, x, y, "logits", -1, reduction, return_grad="y", out=(dy,), cotangent=cotangent)
            cuda().compute(call)
            assert stub.counts["launches"] == 1
            assert stub.counts["allocations"] <= 2  # a scalar for the value, and the cotangent in the kernels' dtype
        assert len(cuda()._kept) == before


def test_what_a_first_call_refuses(cupy):
    """A valid call like it does not make it valid."""
    x, value = cupy.empty((3, 5)), cupy.empty(3)
    for good, bad, error in (
        ({"return_grad": "x", "out": value}, {"return_grad": "x", "out": (value,)}, ValueError),
        ({"return_grad": "x"}, {"return_grad": "x", "out": (None,)}, ValueError),
        ({"space": "logits", "temperature": 3}, {"space": "logits", "temperature": 3 + 0j}, TypeError),
        ({"axis": 1}, {"axis": 1.0}, TypeError),
    ):
        klcore.kl_div(x, x, **good)
        with pytest.raises(error):
            klcore.kl_div(x, x, **bad)


class Axis:
    value = 0

    def __index__(self):
        return self.value


def test_an_axis_that_changes_in_place(cupy):
    x, axis = cupy.empty((3, 5)), Axis()
    for axis.value, shape in ((0, (5,)), (1, (3,)), (0, (5,))):
        assert klcore.kl_div(x, x, axis=axis).shape == shape


@pytest.mark.parametrize("shared", [64, 96, 99, 163, 227])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_no_launch_asks_for_more_than_there_is(modules, monkeypatch, shared, dtype):
    """However long the rows: if no block can hold a row's states, they are spread over the device."""
    stub, asked = modules[0], []
    device = {"MaxSharedMemoryPerBlockOptin": shared << 10, "MaxSharedMemoryPerMultiprocessor": (shared + 1) << 10}
    with stub.installed(**device) as cupy:
        klcore.kl_div(cupy.empty((2, 3)), cupy.empty((2, 3)))
        monkeypatch.setattr(cuda(), "_start", lambda launches, plans: asked.extend(launches))
        for n in (1, 100, 1_000, 9_000, 130_000, 500_000, 800_000, 1_048_576):
            x = cupy.empty((4096, n), dtype)
            for space in ("probs", "logits", ("probs", "logits")):
                for wanted in (None, ("x", "y")):
                    klcore.kl_div(x, x, space=space, return_grad=wanted)
    assert max(launch.shared for launch in asked) <= shared << 10


def test_what_is_kept_is_bounded(cupy, monkeypatch):
    x = cupy.empty((3, 4))
    klcore.kl_div(x, x)
    monkeypatch.setattr(cuda(), "_MOST_KEPT", 5)
    for n in range(1, 40):
        y = cupy.empty((3, n))
        klcore.kl_div(y, y)
        assert len(cuda()._kept) <= 5


def test_what_kernels_may_use(modules, cupy, monkeypatch):
    """Kernels that keep chunks in shared memory may use all of it: the number of blocks was computed with that."""
    stub, made = modules[0], {}
    kernel = stub.RawModule.get_function

    def watched(module, name):
        return made.setdefault(name, kernel(module, name))

    monkeypatch.setattr(stub.RawModule, "get_function", watched)
    for shape in ((300, 5), (300, 500), (3000, 4000), (2, 50_000)):
        x = cupy.empty(shape, "float32")
        klcore.kl_div(x, x, space="logits", reduction="sum", return_grad="y")
    klcore.kl_div(x, x[:1], space="logits", return_grad="y")
    klcore.kl_div(x, x, reduction="rowmean", weights=cupy.empty(2))
    staging = {"kl_narrow", "kl_units", "kl_rows", "kl_summed"}
    assert set(made) == staging | {"kl_fold", "kl_sum", "kl_weights", "kl_summed_fold"}
    for name, k in made.items():
        assert k.preferred_shared_memory_carveout == (100 if name in staging else -1)
        assert k.max_dynamic_shared_size_bytes == ((227 if name in staging else 48) << 10)


def test_the_script_says_what_it_measured(modules, capsys, monkeypatch):
    host_time = modules[1]
    monkeypatch.setattr(host_time, "measure_in", lambda tree: {"a": {"us": 30.0, "allocations": 1, "launches": 2}})
    monkeypatch.setattr(sys, "argv", ["", "--against", "."])
    host_time.main()
    text = capsys.readouterr().out
    assert text.splitlines()[1].split() == ["a", "30.0", "30.0", "1", "2"]
    assert text.endswith("target: 20 us; missed by a\n")
