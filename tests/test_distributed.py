"""DTensors and data-parallel training, in meshes of two processes, of three and of two by two.

Each process makes all checks of its meshes: a DTensor's results are compared with those of the whole batch, which
klcore computes in one process. The first exception ends all of them, and is what the test shows.
"""

import datetime
import math
import re
import sys
import time

import oracle
import pytest
from conftest import COMMON, call, some_pairs

import klcore
from klcore.compat import mxnet, pytorch
from klcore.operations import OPERATIONS

torch = pytest.importorskip("torch", reason="no PyTorch: its adapter is not tested")
if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

import torch.nn.functional as F  # noqa: E402
from torch import distributed, multiprocessing  # noqa: E402
from torch.distributed import tensor as dt  # noqa: E402

SECONDS = 240  # after which all are ended
TOTALS = ("sum", "rowmean", "batchmean", "mean")
REDUCTIONS = ("row", "none", *TOTALS)
S, R, P = dt.Shard, dt.Replicate(), dt.Partial()


# ---- in each process -------------------------------------------------------------------------------------------------


def random(*shape, space="logits", seed=0, axis=-1):
    """The same in all processes."""
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    into = {"probs": t.softmax, "log_probs": t.log_softmax, "logits": lambda _: t, "counts": lambda _: t.exp()}
    return into[space](axis).float()


def operands(operation, space, *shape, axis=-1):
    both = [random(*shape, space=s, seed=k, axis=axis) for k, s in enumerate(space)]
    return both[: 1 if OPERATIONS[operation].single else 2]


def placed(t, mesh, *placements):
    """The DTensor whose whole is `t`."""
    return dt.distribute_tensor(t, mesh, placements)


def whole(t):
    return t.full_tensor() if isinstance(t, dt.DTensor) else t


def temperature_of(space):
    return {"temperature": 2.0} if "logits" in space else {}


def same(got, expected, what):
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), what
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    assert torch.equal(got.contiguous().view(bits), expected.contiguous().view(bits)), (what, got, expected)


def near(got, expected, what):
    """Two results of klcore, each within its bound."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), what
    dtype = str(got.dtype).removeprefix("torch.")
    base = "float64" if dtype == "float64" else "float32"
    bound = oracle.TOLERANCES["gradient", base] + 2 * oracle.TOLERANCES["rounding", dtype]
    got, expected = got.double(), expected.double()
    scale = max([0.0, *expected[expected.isfinite()].abs().tolist()])
    torch.testing.assert_close(
        got, expected, rtol=bound, atol=bound * scale, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def compare(judge, operation, space, arrays, mesh, placements, *, graded=True, **words):
    """Compare DTensors with these placements with the whole, by autograd and by return_grad=, and the value's
    placements."""
    what = operation, space, [a.shape for a in arrays], placements, words
    of_whole = {name: whole(word) for name, word in words.items()}
    of = OPERATIONS[operation].gradients if graded else None
    expected = call(operation, arrays[0], arrays[-1], space, return_grad=of, **of_whole)
    sharded = [placed(a, mesh, *p).requires_grad_(graded) for a, p in zip(arrays, placements, strict=True)]
    found = call(operation, sharded[0], sharded[-1], space, return_grad=of, **words)
    if not graded:
        found, expected = (found,), (expected,)
    for got, right in zip(found, expected, strict=True):
        assert not got.requires_grad
        judge(got.full_tensor(), right, what)
    if graded:
        cotangent = 1 if expected[0].ndim == 0 else random(*expected[0].shape, seed=9)
        histories = []
        for operands, keywords in ((arrays, of_whole), (sharded, words)):
            leaves = [a.detach().requires_grad_() for a in operands]
            value = call(operation, leaves[0], leaves[-1], space, **keywords)
            (whole(value) * cotangent).sum().backward()
            histories.append([value, *(a.grad for a in leaves)])
        for right, got in zip(*histories, strict=True):
            judge(whole(got).detach(), right.detach(), what)
    return found[0].placements


def raises(error, words, function):
    """pytest's version would end a process without a message."""
    message = ""
    try:
        function()
    except error as found:
        message = str(found)
    assert re.search(words, message), (error, words, message)


# ---- rows


def operations(mesh):
    """All operations, in two processes."""
    return OPERATIONS if mesh.size() == 2 else COMMON


def check_rows_of_all_operations(mesh):
    for name in operations(mesh):
        for space in some_pairs(name):
            arrays = operands(name, space, 5, 7)
            placements = compare(
                same, name, space, arrays, mesh, [[S(0)]] * len(arrays), reduction="row", **temperature_of(space)
            )
            assert placements == (S(0),)


def check_totals(mesh):
    space = ("logits", "logits")
    arrays = operands("kl_div", space, 5, 7)
    numbers = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])
    huge = torch.full((5,), 1e308, dtype=torch.float64)
    for weights in (
        None,
        2.0,
        *(placed(w, mesh, p) for w in (numbers, huge) for p in (S(0), R)),
        placed(numbers[:1], mesh, R),
    ):
        for reduction in TOTALS:
            if reduction != "rowmean" and weights is not None and whole(weights) is huge:
                continue
            for p in (S(0), R):
                found = compare(near, "kl_div", space, arrays, mesh, [[p]] * 2, reduction=reduction, weights=weights)
                assert found == ((P,) if p is not R else (R,))
    for denominator in (3.0, torch.tensor(3.0), placed(torch.tensor(3.0), mesh, R)):
        compare(near, "kl_div", space, arrays, mesh, [[S(0)]] * 2, reduction="sum", denominator=denominator)


def check_against_pytorch(mesh):
    """Compare with PyTorch's own loss."""
    x, y = (placed(t, mesh, S(0)) for t in operands("kl_div", ("logits", "logits"), 5, 7))
    for reduction in ("batchmean", "sum"):
        mine, theirs = (y.detach().requires_grad_() for _ in range(2))
        found = klcore.kl_div(x, mine, space="logits", reduction=reduction)
        right = F.kl_div(theirs.log_softmax(-1), x.log_softmax(-1), reduction=reduction, log_target=True)
        found.backward()
        right.backward()
        assert mine.grad.placements == theirs.grad.placements
        torch.testing.assert_close(found.full_tensor(), right.full_tensor())
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad.full_tensor())


def check_axes(mesh):
    """Wherever the classes are, and whichever other axes are sharded."""
    space = ("logits", "logits")
    for axis, sharded, left in ((1, 0, 0), (1, 2, 1), (-2, 2, 1), (0, 1, 0), (2, 1, 1)):
        arrays = operands("kl_div", space, 3, 4, 5, axis=axis)
        placements = [[S(sharded)]] * 2
        assert compare(same, "kl_div", space, arrays, mesh, placements, axis=axis) == (S(left),)
        found = compare(same, "kl_div", space, arrays, mesh, placements, axis=axis, reduction="none")
        assert found == (S(sharded),)
        batch = [n for k, n in enumerate((3, 4, 5)) if k != axis % 3]
        weights = placed(random(*batch).abs(), mesh, S(left))
        compare(near, "kl_div", space, arrays, mesh, placements, axis=axis, reduction="rowmean", weights=weights)


def check_broadcast(mesh):
    """The gradient of an operand that rows share is summed over the processes."""
    space = ("logits", "logits")
    for shape in ((7,), (1, 7)):
        arrays = [random(5, 7), random(*shape, seed=1)]
        for p in (S(0), S(1)):
            of_y = R if p == S(0) else S(len(shape) - 1)
            for reduction in REDUCTIONS:
                graded = reduction != "none" or p == S(0)
                compare(near, "kl_div", space, arrays, mesh, [[p], [of_y]], reduction=reduction, graded=graded)


def check_unlike_placements(mesh):
    space = ("logits", "logits")
    arrays = operands("kl_div", space, 5, 7)
    for p, q, found in (
        (S(0), R, S(0)),
        (R, S(0), S(0)),
        (S(0), S(1), S(0)),
        (S(1), S(0), S(0)),
        (R, R, R),
        (R, S(1), R),
    ):
        assert compare(near, "kl_div", space, arrays, mesh, [[p], [q]]) == (found,)
    parts = dt.DTensor.from_local(arrays[0] / mesh.size(), mesh, [P], run_check=False)
    for q in (S(0), S(1), R):  # a pending reduction
        found = klcore.kl_div(parts, placed(arrays[1], mesh, q), space="logits").full_tensor()
        torch.testing.assert_close(found, klcore.kl_div(*arrays, space="logits"))


def check_empty(mesh):
    space = ("logits", "logits")
    for shape in ((1, 7), (2, 7), (0, 7)):
        for reduction in REDUCTIONS:
            compare(near, "kl_div", space, operands("kl_div", space, *shape), mesh, [[S(0)]] * 2, reduction=reduction)


def check_lists_of_classes(mesh):
    """x has some classes of y: their rows may be sharded in any way, the classes may not."""
    space, y = ("probs", "logits"), random(5, 7, seed=1)
    x, indices = random(5, 7, space="probs").topk(3)
    mass = random(5, seed=2).sigmoid()
    for p, q, r in ((S(0), S(0), S(0)), (R, S(0), S(1)), (S(0), R, R), (R, R, S(0))):
        for reduction in ("row", "none", "rowmean", "mean"):
            words = {"reduction": reduction, "indices": placed(indices, mesh, r)}
            for others in ({"tail": "bucket", "tail_mass": placed(mass, mesh, R)}, {"tail": "renorm"}):
                compare(near, "js_div", space, [x, y], mesh, [[p], [q]], **words, **others)
    lists = placed(indices, mesh, S(0))
    compare(near, "kl_div", space, [x[0], y], mesh, [[R], [S(0)]], indices=lists, tail="bucket")

    def kl(x, y, **words):
        return lambda: klcore.kl_div(x, y, space=space, **{"indices": lists, "tail": "bucket", **words})

    for p, q in ((S(0), S(1)), (S(1), R), (S(1), S(1))):
        both = placed(x, mesh, p), placed(y, mesh, q)
        raises(TypeError, r"sharded, but not the classes; .*redistribute.* or full_tensor\(\)", kl(*both))
    x, y = placed(x, mesh, S(0)), placed(y, mesh, S(0))
    for words in ({"indices": indices}, {"tail_mass": mass}, {"indices": indices.tolist()}):
        raises(TypeError, "but other arguments are DTensors", kl(x, y, **words))
    raises(TypeError, "^tail_mass requires a gradient", kl(x, y, tail_mass=placed(mass, mesh, R).requires_grad_()))
    raises(ValueError, "x and indices must have the same number of classes", kl(y, y))


def check_losses_and_estimators(mesh):
    x, y = operands("kl_div", ("log_probs", "probs"), 5, 7)
    for p in (S(0), S(1)):
        leaf, right = placed(x, mesh, p).requires_grad_(), x.clone().requires_grad_()
        found = pytorch.kl_div(leaf, placed(y, mesh, p), reduction="batchmean")
        expected = pytorch.kl_div(right, y, reduction="batchmean")
        found.backward()
        expected.backward()
        near(found.full_tensor().detach(), expected.detach(), p)
        same(leaf.grad.full_tensor(), right.grad, p)
        for reduction in ("none", "sum", "mean"):
            found = klcore.kl_estimate(placed(x, mesh, p), placed(y, mesh, p), reduction=reduction)
            near(found.full_tensor(), klcore.kl_estimate(x, y, reduction=reduction), (p, reduction))


# ---- classes


def check_classes_of_all_operations(mesh):
    """The bits of one process if all shards but the last are multiples of 1024 classes; otherwise the bounds."""
    sizes = ((1024 * mesh.size() - 1, same, operations(mesh)), (10, near, COMMON))
    weights = placed(torch.tensor([0.5, 0.0, 2.0]), mesh, R)
    for n, judge, names in sizes:
        for name in names:
            for space in some_pairs(name):
                arrays = operands(name, space, 3, n)
                ways, words = [[S(1)]] * len(arrays), temperature_of(space)
                assert compare(judge, name, space, arrays, mesh, ways, weights=weights, **words) == (R,)
                if OPERATIONS[name].has_terms:
                    compare(judge, name, space, arrays, mesh, ways, reduction="none", graded=False, **words)


def check_totals_over_classes(mesh):
    space = ("logits", "logits")
    for dtype in (torch.float64, torch.bfloat16):
        arrays = [a.to(dtype) for a in operands("kl_div", space, 5, 1024 * mesh.size())]
        for weights in (None, placed(torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0]), mesh, R)):
            for reduction in TOTALS:
                found = compare(same, "kl_div", space, arrays, mesh, [[S(1)]] * 2, reduction=reduction, weights=weights)
                assert found == (R,)


def check_temperature_of_each_row(mesh):
    space = ("logits", "logits")
    arrays, temperature = operands("kl_div", space, 5, 1024 * mesh.size()), torch.tensor([1.0, 2.0, 0.5, 4.0, 3.0])
    for p in (S(0), S(1)):
        for t in (placed(temperature, mesh, R), placed(temperature, mesh, S(0)), placed(torch.tensor(2.0), mesh, R)):
            compare(same, "kl_div", space, arrays, mesh, [[p]] * 2, temperature=t)


def check_shards_without_classes(mesh):
    space = ("logits", "logits")
    for n in (1, 2, 4):
        compare(near, "kl_div", space, operands("kl_div", space, 3, n), mesh, [[S(1)]] * 2)


def check_axes_over_classes(mesh):
    space = ("logits", "probs")
    for axis in (0, 1, -2):
        arrays = operands("kl_div", space, 10, 9, 2, axis=axis)
        compare(near, "kl_div", space, arrays, mesh, [[S(axis % 3)]] * 2, axis=axis)


def check_nothing_but_states_is_exchanged(mesh):
    """A row's logits take thousands of bytes; and backward exchanges nothing."""
    from torch.distributed.tensor.debug import CommDebugMode

    x, y = (placed(t, mesh, S(1)) for t in operands("kl_div", ("logits", "logits"), 3, 4096))
    y.requires_grad_()
    with CommDebugMode() as counted:
        value = klcore.kl_div(x, y, space="logits").sum()
    assert counted.get_total_counts() == 1
    with CommDebugMode() as counted:
        value.backward()
    assert counted.get_total_counts() == 0


# ---- options and messages


def check_messages(mesh):
    plain = operands("kl_div", ("logits", "logits"), 4, 6)
    x, y = (placed(t, mesh, S(0)) for t in plain)
    classes = [placed(t, mesh, S(1)).requires_grad_() for t in plain]

    def kl(x, y, **words):
        return lambda: klcore.kl_div(x, y, space="logits", **words)

    for pair, name in (
        ((x, plain[1]), "y"),
        ((plain[0], y), "x"),
        ((x, plain[1].numpy()), "y"),
        ((plain[0].numpy(), y), "x"),
    ):
        raises(TypeError, f"^{name} is a .* but other arguments are DTensors", kl(*pair))
    for weights in (torch.ones(4), [1, 1, 1, 1], torch.ones(4).numpy()):
        raises(TypeError, "^weights is a .*distribute_tensor", kl(x, y, weights=weights))
    raises(TypeError, "but other arguments are DTensors", kl(*plain, weights=placed(torch.ones(4), mesh, R)))
    raises(TypeError, "^out= is not supported with DTensors", kl(x, y, out=torch.empty(4)))
    raises(ValueError, "^device='cpu', but DTensors", kl(x, y, device="cpu"))
    raises(ValueError, "same number of classes .* found 6 and 5", kl(x, placed(plain[1][:, :5], mesh, S(0))))
    raises(ValueError, "batch shapes .* that broadcast", kl(x, placed(plain[1][:3], mesh, S(0))))
    raises(ValueError, "weights of shape .*3.* do not broadcast", kl(x, y, weights=placed(torch.ones(3), mesh, R)))
    raises(ValueError, "^reduction must be one of", kl(x, y, reduction="total"))
    raises(TypeError, "weights requires a gradient", kl(x, y, weights=placed(torch.ones(4), mesh, R).requires_grad_()))
    raises(NotImplementedError, "reduction='none' has no gradient", kl(*classes, reduction="none"))
    alone = torch.tensor(2.0, requires_grad=True)
    raises(TypeError, "^temperature requires a gradient, of which each process", kl(x, y, temperature=alone))
    of_all = placed(torch.ones(4), mesh, R).requires_grad_()
    raises(TypeError, "no gradient for it if the classes", kl(*classes, temperature=of_all))
    raises(TypeError, "must not be sharded", lambda: mxnet.KLDivLoss(from_logits=False)(*classes))
    value = klcore.kl_div(*classes, space="logits").sum()
    (first,) = torch.autograd.grad(value, classes[1], create_graph=True)
    if first.grad_fn is not None:  # older PyTorch's to_local forgets what its gradient depends on
        raises(RuntimeError, "first derivatives", first.sum().backward)
    other = dt.DeviceMesh("cpu", torch.arange(mesh.size())[None], _init_backend=False)
    raises(
        ValueError, "on different meshes", kl(x, dt.DTensor.from_local(y.to_local(), other, [R, S(0)], run_check=False))
    )


def check_compiled(mesh):
    """Without graph breaks."""

    def loss(x, y, weights):
        options = {"space": "logits", "reduction": "rowmean", "weights": weights}
        return klcore.js_div(x, y, **options), klcore.js_div(x, y, return_grad="x", **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    arrays = operands("js_div", ("logits", "logits"), 5, 1024 * mesh.size())
    weights = placed(torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0]), mesh, S(0))
    for p in (S(0), S(1)):
        x = placed(arrays[0], mesh, p)
        results = []
        for function in (loss, compiled):
            leaf = placed(arrays[1], mesh, p).requires_grad_()
            value, (again, of_x) = function(x, leaf, weights)
            value.backward()
            results.append([t.full_tensor().detach() for t in (value, again, of_x, leaf.grad)])
        for right, found in zip(*results, strict=True):
            same(found, right, p)


def check_data_parallel(mesh):
    """Two processes with half of the rows each take the steps of one process with all rows."""
    group = mesh.get_group()
    teacher, inputs = random(6 * mesh.size(), 9), random(6 * mesh.size(), 4, seed=1)
    mine = slice(6 * mesh.get_local_rank(), 6 * mesh.get_local_rank() + 6)
    for words in ({"reduction": "rowmean"}, {"reduction": "sum", "denominator": len(teacher) / mesh.size()}):
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 9)))
        whole, part = models[0], torch.nn.parallel.DistributedDataParallel(models[1], process_group=group)
        for model, rows, options in ((whole, slice(None), {"reduction": "rowmean"}), (part, mine, words)):
            optimizer = torch.optim.SGD(model.parameters(), 0.5)
            for _ in range(5):
                optimizer.zero_grad()
                klcore.kl_div(teacher[rows], model(inputs[rows]), space="logits", **options).backward()
                optimizer.step()
        for a, b in zip(whole.parameters(), part.parameters(), strict=True):
            torch.testing.assert_close(a, b)


# ---- two dimensions


def check_rows_and_classes(mesh):
    space = ("logits", "logits")
    ways = (
        ([S(0), S(1)], same),
        ([S(1), S(0)], same),
        ([S(0), S(0)], same),
        ([S(1), S(1)], near),
        ([S(1), R], same),
        ([P, S(1)], near),
    )
    for placements, judge in ways:
        for name, reduction in (("kl_div", "row"), ("js_div", "row"), ("kl_div", "rowmean"), ("kl_div", "none")):
            arrays = operands(name, space, 5, 2048)
            of_y = [R if p == P else p for p in placements]
            judge = near if reduction == "rowmean" else judge
            weights = placed(torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0]), mesh, R, S(0)) if reduction != "none" else None
            words = {"reduction": reduction, "weights": weights, "graded": reduction != "none"}
            compare(judge, name, space, arrays, mesh, [placements, of_y], **words)
    arrays = operands("kl_div", space, 5, 4096)
    compare(same, "kl_div", space, arrays, mesh, [[S(1), S(1)]] * 2)


OF_ONE_DIMENSION = (
    check_rows_of_all_operations, check_totals, check_against_pytorch, check_axes, check_broadcast,
    check_unlike_placements, check_empty, check_lists_of_classes, check_losses_and_estimators,
    check_classes_of_all_operations, check_totals_over_classes,
    check_temperature_of_each_row, check_shards_without_classes, check_axes_over_classes,
    check_nothing_but_states_is_exchanged, check_messages,
)  # fmt: skip
SOME = [((2,), check) for check in (*OF_ONE_DIMENSION, check_data_parallel)]
OTHERS = [((2,), check_compiled), *(((3,), check) for check in OF_ONE_DIMENSION), ((2, 2), check_rows_and_classes)]


def work(rank, folder, processes, checks):
    torch.set_num_threads(1)
    klcore.set_num_threads(1)
    timeout = datetime.timedelta(seconds=SECONDS)
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", timeout, processes, rank)
    for shape, name in checks:
        mesh = dt.DeviceMesh("cpu", torch.arange(math.prod(shape)).reshape(shape))
        if mesh.get_coordinate() is not None:
            begun = time.perf_counter()
            globals()[name](mesh)
            if rank == 0:
                print(f"{name} {shape}: {time.perf_counter() - begun:.2f} s", file=sys.stderr)
    distributed.barrier()
    distributed.destroy_process_group()


# ---- in pytest's process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "checks"), [(2, SOME), pytest.param(4, OTHERS, marks=pytest.mark.exhaustive)], ids=["2", "4"]
)
def test_processes(tmp_path, processes, checks):
    checks = [(shape, check.__name__) for shape, check in checks]
    run = multiprocessing.spawn(work, (tmp_path, processes, checks), processes, join=False)
    ends = time.monotonic() + SECONDS
    while not run.join(timeout=max(0, ends - time.monotonic())):
        if time.monotonic() > ends:
            for process in run.processes:
                process.kill()
            pytest.fail(f"not ready after {SECONDS} seconds")
