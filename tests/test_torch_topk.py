"""Lists of classes as PyTorch tensors: the bits of NumPy's results, PyTorch's own derivatives, and every way to call.

The meaning of a list is tested with NumPy arrays; the definitions here are those of relatives.py, through PyTorch's
autograd in float64, over all classes of y at once.
"""

import functools
import itertools
import types

import pytest
import relatives
from conftest import DTYPES
from test_gradient import REDUCTIONS
from test_torch import array, compiled, logits, same, tensor  # noqa: F401  # `compiled` is a fixture
from test_torch_transforms import equal, of_examples, value_and_gradients, with_gradients

import klcore
from klcore.backends.options import TAILS
from klcore.operations import OPERATIONS

torch = pytest.importorskip("torch", reason="no PyTorch: its adapter is not tested")

NAMES = [name for name, o in OPERATIONS.items() if o.takes_indices]
OF_PROBS, OF_LOGITS = ("probs", "logits"), ("logits", "logits")
MASS = torch.tensor([0.1, 0.02, 1.0, 0.3])
WAYS = [("bucket", None), ("bucket", MASS), ("zero", None), ("renorm", None)]
ways = pytest.mark.parametrize(("tail", "mass"), WAYS, ids=["bucket", "mass", "zero", "renorm"])


def best(rows=4, n=9, k=3, dtype=torch.float64, seed=0):
    """The top k of a teacher's n classes, their indices, and a student's scores."""
    x, indices = logits(rows, n, seed=seed).softmax(-1).topk(k)
    return x.to(dtype), logits(rows, n, seed=seed + 1).to(dtype), indices


def kl(x, y, indices, tail="bucket", **options):
    return klcore.kl_div(x, y, **{"indices": indices, "tail": tail, "space": OF_PROBS, **options})


# ---- the definition --------------------------------------------------------------------------------------------------

TERMS = relatives.Definitions(types.SimpleNamespace(log=lambda t: torch.where(t > 0, t, 1).log(), mpf=float))


def by_definition(name, x, y, indices, tail, mass, space, temperature=1.0):
    """The values of the rows. All classes are present; unlisted ones have p = q = 1, and so no divergence."""
    term = getattr(TERMS, name)
    t = torch.as_tensor(temperature).unsqueeze(-1)
    into = {"probs": lambda a: a, "logits": lambda a: (a / t).softmax(-1)}
    into |= {"log_probs": torch.exp, "counts": lambda a: a / a.sum(-1, keepdim=True)}
    q = into[space[1]](y).expand(len(indices), -1)
    x = x.expand(indices.shape)
    there, at = indices >= 0, indices.clamp(min=0)
    x = x.masked_fill(~there, -1e9 if space[0] == "logits" else 0)
    p = torch.zeros_like(q).scatter_add(-1, at, into[space[0]](x) * there)
    listed = torch.zeros_like(q).scatter_add(-1, at, there.double()) > 0
    rest_p = 1 - p.sum(-1) if mass is None and tail == "bucket" else torch.zeros(len(q)) if mass is None else mass
    rest_q = (q * ~listed).sum(-1)
    if tail == "renorm":
        p, q = (a / (a * listed).sum(-1, keepdim=True) for a in (p, q))
    terms = term(*(torch.where(listed, a, 1) for a in (p, q))) * listed
    return terms.sum(-1) if tail == "renorm" else terms.sum(-1) + term(rest_p.double().clamp(min=0), rest_q)


def lists(space, dtype=torch.float64):
    """x, y and indices, in which one class is -1, and one is listed twice."""
    x, y, indices = best()
    indices[0, 1], indices[1, 2], x[0, 1] = -1, indices[1, 0], 0.2
    x = {"probs": x, "log_probs": x.log(), "logits": x.log() + 3, "counts": 100 * x}[space[0]]
    y = {"logits": y, "log_probs": y.log_softmax(-1), "probs": y.softmax(-1), "counts": y.exp()}[space[1]]
    return x.to(dtype), y.to(dtype), indices


def ours(name, x, y, indices, tail, mass, space, temperature=1.0):
    words = {"indices": indices, "tail": tail, "tail_mass": mass, "space": space, "temperature": temperature}
    return getattr(klcore, name)(x, y, **words)


def compare(leaves, *about):
    """Values, and gradients with respect to x, y and the temperature, if there is one."""
    name, *rest = about
    found, expected = (
        value_and_gradients(lambda x, y, *t, f=f: f(name, x, y, *rest, *t), *leaves) for f in (ours, by_definition)
    )
    if expected[0].isinf().any():  # PyTorch's gradients are NaN there
        found, expected = found[:1], expected[:1]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13, msg=lambda text: f"{about}: {text}")


@ways
@pytest.mark.parametrize("name", NAMES)
def test_beside_the_definition(name, tail, mass):
    pairs = [OF_PROBS, ("log_probs", "logits"), ("probs", "probs"), ("log_probs", "log_probs"), ("probs", "counts")]
    pairs += [OF_LOGITS, ("counts", "logits"), ("logits", "probs")] if tail == "renorm" else []
    for space in pairs:
        x, y, indices = lists(space)
        t = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
        compare((x, y, t) if "logits" in space else (x, y), name, indices, tail, mass, space)


@ways
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction, tail, mass):
    x, y, indices = lists(OF_PROBS)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0])

    def loss(x, y):
        return kl(x, y, indices, tail, tail_mass=mass, reduction=reduction, weights=weights)

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), y.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize(("space", "tail"), [(OF_PROBS, "bucket"), (OF_LOGITS, "renorm")])
def test_temperatures_of_what_rows_share(space, tail):
    """One per row, for rows that share x, or y; one for all."""
    x, y, indices = best()
    of_rows = torch.linspace(0.5, 2, 4, dtype=torch.float64)
    for a, b in ((x[0], y), (x, y[:1]), (x[1], y[2])):
        for t in (of_rows, of_rows[1]):
            compare((a, b, t), "kl_div", indices, tail, None, space)


def test_temperature_beside_what_is_not_read():
    """Unlisted classes, and numbers at -1: they shift none of those that count."""
    x, y, indices = best(dtype=torch.float32)
    t = torch.tensor(1.7, requires_grad=True)
    expected = torch.autograd.grad(kl(x.log(), y, indices, "renorm", space=OF_LOGITS, temperature=t).sum(), t)
    for junk in (1e30, float("nan"), float("inf")):
        y = torch.full_like(y, junk).scatter(-1, indices, y.gather(-1, indices))
        more = torch.cat([x.log(), torch.full((4, 1), junk)], -1), torch.cat([indices, torch.full((4, 1), -1)], -1)
        value = kl(more[0], y, more[1], "renorm", space=OF_LOGITS, temperature=t)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), t), expected)


# ---- bits ------------------------------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_numpy(dtype, tail, mass):
    """In every eager way: plain, with requested gradients, out=, backward."""
    kinds = (OF_PROBS, -1), (("log_probs", "log_probs"), 0)
    for (space, axis), reduction in itertools.product(kinds, ("row", "none", "rowmean", "mean")):
        x, y, indices = lists(space, getattr(torch, dtype))
        x, y, indices = (t.movedim(-1, axis) for t in (x, y, indices))
        options = {"space": space, "reduction": reduction, "axis": axis, "weights": torch.tensor([1.0, 0.5, 0.0, 2.0])}
        words = {"tail": tail, "tail_mass": mass, **options}
        of_numpy = {k: array(v) if isinstance(v, torch.Tensor) else v for k, v in words.items()}
        expected = klcore.kl_div(array(x), array(y), indices=array(indices), **of_numpy, return_grad=("x", "y"))
        same(kl(x, y, indices, **words), expected[0])
        found = kl(x, y, indices, **words, return_grad=("x", "y"))
        out = tuple(torch.full_like(t, 7) for t in found)
        for got, into, e in zip(
            kl(x, y, indices, **words, return_grad=("x", "y"), out=out), out, expected, strict=True
        ):
            assert got is into
            same(got, e)
        for got, e in zip(found, expected, strict=True):
            same(got, e)
        value, *gradients = value_and_gradients(lambda *t, i=indices, w=words: kl(*t, i, **w), x, y)
        same(value, expected[0])
        for got, e in zip(gradients, expected[1:], strict=True):
            if reduction == "none":  # a separate cotangent for every term: another computation
                torch.testing.assert_close(got, tensor(e))
            else:
                same(got, e)


def test_every_kind_of_indices():
    x, y, indices = best()
    expected = kl(x, y, indices)
    for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "uint64"):
        equal(kl(x, y, indices.to(getattr(torch, name))), expected)
    wide = torch.full((8, 6), 99)
    wide[::2, ::2] = indices
    views = indices.T.contiguous().T, wide[::2, ::2], indices.numpy(), indices.numpy()[::-1].copy()[::-1]
    for kind in (*views, indices.tolist()):
        equal(kl(x, y, kind), expected)
        equal(value_and_gradients(lambda y, k=kind: kl(x, y, k), y)[1], kl(x, y, indices, return_grad="y")[1])
    equal(kl(x[:1], y, indices[0].expand(4, 3)), kl(x[:1].expand(4, 3), y, indices[:1]))
    equal(kl(x.numpy(), y, indices, tail_mass=MASS.numpy()), kl(x, y.numpy(), indices.numpy(), tail_mass=MASS))
    equal(kl(x, y, indices, tail_mass=0.5), kl(x, y, indices, tail_mass=torch.full((4,), 0.5)))
    equal(kl(x[:, :0], y, []), kl(x[:, :0], y, indices[:, :0]))
    full = torch.arange(9).expand(4, 9)
    torch.testing.assert_close(kl(y.softmax(-1), y * 2, full), klcore.kl_div(y.softmax(-1), y * 2, space=OF_PROBS))


def test_arrays_that_change_before_backward():
    x, y, indices = best()
    expected = value_and_gradients(lambda y: kl(x, y, indices, tail_mass=MASS), y)[1]
    given, mass, leaf = indices.clone().numpy(), MASS.clone().numpy(), y.clone().requires_grad_()
    value = kl(x, leaf, given, tail_mass=mass)
    given[...], mass[...] = 0, 0
    equal(torch.autograd.grad(value.sum(), leaf)[0], expected)
    value = kl(x, leaf, indices, tail_mass=MASS)
    indices.zero_()  # PyTorch detects this for tensors
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


# ---- other roads -----------------------------------------------------------------------------------------------------


def test_backward_again_and_second_derivatives():
    x, y, indices = best()
    for reduction in ("row", "sum"):
        leaf = y.clone().requires_grad_()
        value = kl(x, leaf, indices, reduction=reduction).sum()
        first = torch.autograd.grad(value, leaf, retain_graph=True)
        equal(torch.autograd.grad(value, leaf, retain_graph=True), first)
        (with_history,) = torch.autograd.grad(value, leaf, create_graph=True)
        equal(with_history.detach(), first[0])
        with pytest.raises(RuntimeError, match="a second derivative was requested"):
            with_history.sum().backward()
    rows = torch.autograd.functional.jacobian(lambda y: kl(x, y, indices), y, vectorize=True)
    equal(rows, torch.autograd.functional.jacobian(lambda y: kl(x, y, indices), y))
    equal(rows, torch.func.jacrev(lambda y: kl(x, y, indices))(y))


def loss(x, y, indices, mass, temperature=1.0, tail="bucket", reduction="rowmean"):
    return kl(x, y, indices, tail, tail_mass=mass, temperature=temperature, reduction=reduction)


def test_compile(compiled):  # noqa: F811
    """Few programs for all shapes, masses and temperatures, with eager bits; gradients too."""
    program = compiled(loss, dynamic=True)
    for rows, n, k, mass in ((4, 9, 3, 0.1), (5, 20, 4, 0.2), (7, 10, 2, 0.7)):
        (*both, indices), masses, t = best(rows, n, k, torch.float32), torch.full((rows,), mass), 1 + mass
        for words in ((masses, t), (masses, torch.full((rows,), t)), (mass, t)):
            results = (
                value_and_gradients(lambda x, y, f=f, of=(indices, *words): f(x, y, *of), *both)
                for f in (loss, program)
            )
            equal(*results)
    assert program.counter.frame_count <= 4  # numbers and tensors; and PyTorch starts again with numbers
    t = torch.tensor(1.5, requires_grad=True)
    equal(*(torch.autograd.grad(f(*both, indices, masses, t), t) for f in (program, loss)))


def test_compile_terms(compiled):  # noqa: F811
    """Their shape is that of the list."""
    *both, indices = best()
    for tail in TAILS:
        options = {"tail": tail, "reduction": "none"}
        results = (
            value_and_gradients(lambda x, y, f=f, words=options: f(x, y, indices, None, **words), *both)
            for f in (loss, compiled(loss))
        )
        equal(*results)


def test_numbers_are_looked_at_when_a_program_runs(compiled):  # noqa: F811
    x, y, indices = best()
    for f in (compiled(loss), loss, torch.func.vmap(loss)):
        with pytest.raises(ValueError, match=r"indices must lie in \[0, 9\), .*; found 9"):
            f(x, y, torch.where(indices == indices[2, 1], 9, indices), MASS)
        with pytest.raises(ValueError, match=r"tail_mass must lie in \[0, 1\]; found 1.5"):
            f(x, y, indices, torch.tensor([0.0, 1.5, 0.0, 0.0]))


def test_export():
    """For any number of rows, of classes and of listed classes; a single operator."""

    class Loss(torch.nn.Module):
        def forward(self, x, y, indices, mass):
            return loss(x, y, indices, mass)

    rows, n, k = (torch.export.Dim(name) for name in ("rows", "classes", "listed"))
    sizes = ({0: rows, 1: k}, {0: rows, 1: n}, {0: rows, 1: k}, {0: rows})
    exported = torch.export.export(Loss(), (*best(), MASS), dynamic_shapes=sizes)
    inputs = *best(6, 12, 5), MASS[:1].expand(6)
    equal(exported.module()(*inputs), loss(*inputs))
    assert [n.target for n in exported.graph.nodes if n.op == "call_function"] == [torch.ops.klcore.value.default]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced():
    """By make_fx, symbolic_trace and torch.jit."""
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs, others = (*best(), MASS), (*best(seed=7), MASS.flip(0))
    both = torch.func.grad_and_value(lambda x, y, i, m: loss(x, y, i, m), argnums=(0, 1))
    for mode in ("real", "fake", "symbolic"):
        equal(make_fx(both, tracing_mode=mode)(*inputs)(*others), both(*others))
    equal(torch.fx.symbolic_trace(lambda x, y, i, m: loss(x, y, i, m))(*others), loss(*others))
    for k, of_one in ((2, lambda i: loss(*inputs[:2], i, MASS)), (3, lambda m: loss(*inputs[:3], m))):
        equal(torch.fx.symbolic_trace(of_one)(others[k]), of_one(others[k]))  # the function holds the other arguments
    equal(torch.jit.trace(lambda x, y, i, m: loss(x, y, i, m), inputs)(*others), loss(*others))


@ways
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_memory(reduction, tail, mass):
    """Shapes and dtypes are known for tensors without memory."""
    x, y, indices = best(dtype=torch.float32)
    for dtypes in ((torch.float32, torch.float64), (torch.bfloat16, torch.float16)):
        arguments = x.to(dtypes[0]), y.to(dtypes[1]), indices
        options = {"reduction": reduction, "tail": tail, "return_grad": ("x", "y")}
        there = [t.to("meta") for t in arguments]
        found = kl(*there, **options, tail_mass=mass if mass is None else mass.to("meta"))
        expected = kl(*arguments, **options, tail_mass=mass)
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]
        assert all(t.is_meta for t in found)


# ---- torch.func.vmap -------------------------------------------------------------------------------------------------

DIMS = [(0, 0, 0, 0), (None, 0, 0, 0), (0, None, None, 0), (None, None, 0, None), (None, None, None, 0), (1, 2, 1, 1)]


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bits_of_examples(reduction, dims):
    """The bits of each example alone, and its gradients."""
    x, y, indices = (t.reshape(3, 4, -1) for t in best(12, dtype=torch.float32))
    masses = torch.linspace(0, 1, 12).reshape(3, 4)
    batches = [t[0] if d is None else t.movedim(0, d) for t, d in zip((x, y, indices, masses), dims, strict=True)]
    each = [t.expand(3, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(batches, dims, strict=True)]
    f = functools.partial(loss, reduction=reduction)
    for function in (f, with_gradients(f)):
        equal(torch.func.vmap(function, dims)(*batches), of_examples(function, *each))


def test_examples_of_more_axes():
    """Within an example x and y may have fewer axes than indices."""
    x, y, indices = best(12)
    indices = indices.reshape(3, 4, 3)

    def of_one(x, y, i, reduction):
        return kl(x, y, i, reduction=reduction, tail_mass=0.2)

    for reduction in REDUCTIONS:
        f = with_gradients(functools.partial(of_one, reduction=reduction))
        found, expected = torch.func.vmap(f)(x[:3], y[:3], indices), of_examples(f, x[:3], y[:3], indices)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


# ---- what is refused -------------------------------------------------------------------------------------------------

X, Y, INDICES = best()
WITH_HISTORY = MASS.clone().requires_grad_()
REFUSED = {
    "no tail": ({"tail": None}, TypeError, "tail='bucket'", "tail='zero'", "tail='renorm'", "truncated"),
    "no indices": ({"indices": None, "x": Y}, TypeError, "tail=", "pass indices, too"),
    "tail": ({"tail": "rest"}, ValueError, "'bucket', 'zero', 'renorm'", "'rest'"),
    "mass": ({"tail": "zero", "tail_mass": MASS}, ValueError, "tail_mass needs tail='bucket'"),
    "logits": ({"space": "logits"}, ValueError, "x is logits", "tail='renorm'; with"),
    "floats": ({"indices": INDICES.double()}, TypeError, "indices must be integers", "torch.float64"),
    "a list of floats": ({"indices": INDICES.double().tolist()}, TypeError, "indices must be integers"),
    "booleans": ({"indices": INDICES > 2}, TypeError, "indices must be integers", "torch.bool"),
    "device": ({"indices": INDICES.to("meta")}, ValueError, "different devices", "indices on meta"),
    "mass's device": ({"tail_mass": MASS.to("meta")}, ValueError, "different devices", "tail_mass on meta"),
    "sparse": ({"indices": INDICES.to_sparse()}, TypeError, "indices is a tensor of layout", "indices.to_dense()"),
    "length": ({"x": X[:, :2]}, ValueError, "x and indices must have the same number of classes", "(4, 2)", "(4, 3)"),
    "batch": ({"y": Y[:3]}, ValueError, "x, indices and y must have batch shapes", "(3, 9)"),
    "too many": ({"y": Y[:, :2]}, ValueError, "list 3 classes", "y has only 2"),
    "axis": ({"axis": 2}, ValueError, "axis 2 is out of range"),
    "index": ({"indices": INDICES + 9}, ValueError, "indices must lie in [0, 9)", "11 more"),
    "negative": ({"indices": INDICES - 9}, ValueError, "for no class"),
    "negative mass": ({"tail_mass": -MASS}, ValueError, "tail_mass must lie in [0, 1]"),
    "history": ({"tail_mass": WITH_HISTORY}, TypeError, "no gradient for it; pass tail_mass.detach()"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    """With and without a gradient, or `out`; and nothing is written before."""
    keywords, error, *words = REFUSED[case]
    given = {"x": X, "y": Y, "indices": INDICES, "tail": "bucket", "space": OF_PROBS, **keywords}
    out = torch.full((4,), 7, dtype=torch.float64)
    for more in ({}, {"y": given["y"].clone().requires_grad_()}, {"out": out}, {"return_grad": "y"}):
        with pytest.raises(error) as raised:
            klcore.kl_div(**{**given, **more})
        assert [word for word in words if word not in str(raised.value)] == [], str(raised.value)
    assert (out == 7).all()


def test_masses_with_a_history():
    """Refused by torch.func and compilers, too; without requires_grad a mass is accepted."""
    with pytest.raises(TypeError, match=r"pass tail_mass.detach\(\)"):
        torch.func.grad(lambda m: loss(X, Y, INDICES, m))(MASS)
    with torch.no_grad():
        equal(kl(X, Y, INDICES, tail_mass=WITH_HISTORY), kl(X, Y, INDICES, tail_mass=MASS))


def test_operations_without_lists():
    for name in set(OPERATIONS) - set(NAMES):
        both = (Y,) if OPERATIONS[name].single else (Y, Y)
        with pytest.raises(TypeError, match="indices"):
            getattr(klcore, name)(*both, space="logits", indices=INDICES, tail="renorm", **OPERATIONS[name].needed)
    assert set(TAILS) == {tail for tail, _ in WAYS}


def test_labels():
    """Row labels are compared; the class labels of x are not those of y."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    x, y, indices = best(2)
    rows = {"index": ["a", "b"]}
    frame, mass = pandas.DataFrame(indices.numpy(), **rows), pandas.Series([0.1, 0.2], **rows)
    equal(kl(x, y, frame, tail_mass=mass), kl(x, y, indices, tail_mass=torch.tensor([0.1, 0.2], dtype=torch.float64)))
    with pytest.raises(ValueError, match="indices and axis 0 of tail_mass have different labels"):
        kl(x, y, frame, tail_mass=mass[::-1])
