"""How XLA partitions a call over the devices of a mesh: by rows, and by classes.

Every device computes its own rows. Their parts of a total, and of the gradient of an operand that rows share, are added
up over the devices. If the classes are sharded, devices exchange states of their classes, not the classes themselves
(shards.py). JAX calls this file once it knows how the arguments are sharded; nothing here runs when the program does.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from klcore.backends import cpu
from klcore.backends.jax import private, shards
from klcore.backends.jax.programs import BY_CLASS, Program, call_back, is_data, on_buffers

_sum: Any = jax.lax.psum  # without types
_spec: Any = PartitionSpec

# The label of an axis of an argument or result: negative for an axis of the shape of x and y, counted from its end;
# from 0 on for the axes that vmap maps; None for an axis that nothing else has.
Label = int | None
Split = dict[Label, tuple[str, ...]]  # the mesh axes that split each axis


def over_devices(program: Program, context: Any) -> Callable[..., Any]:
    """The function that computes a program within one that XLA partitions."""
    return partial(_partitioned, _Site(program, context))


class Axes:
    """Which axes of a program's arguments and results are the same."""

    def __init__(self, program: Program, arguments: Any, results: Any) -> None:
        self.program = program
        self.arguments = dict(zip(program.names, arguments, strict=True))
        self.lists = "indices" in self.arguments
        value = () if program.pull else ("value",)
        self.results = dict(zip((*value, *program.gradients), results, strict=True))
        self.sizes: dict[Label, int] = {}
        for name, a in self.arguments.items():
            for label, n in zip(self.labels(name, a), a.shape, strict=True):
                self.sizes[label] = max(n, self.sizes.get(label, 1))
        self.sizes[None] = -1  # equals no size
        call = program.call
        self.classes: Label = None if call.operation.is_estimator else call.axis
        # if every class is computed by itself, no device needs the classes of another
        self.by_class = call.reduction == "none" and all(space in BY_CLASS for space in program.spaces.values())
        terms_pulled = call.reduction == "none" and program.pull
        whole = call.operation.is_loss or self.lists  # these need whole rows
        self.may_split_classes = not whole and (self.by_class or not terms_pulled)

    def labels(self, name: str, a: Any) -> tuple[Label, ...]:
        """The labels of the axes of an argument or result; a gradient has those of its operand."""
        program = self.program
        whole: tuple[Label, ...] = tuple(range(-program.ndim, 0))
        of_rows = tuple(label for label in whole if label != program.call.axis)
        of_rows = whole if program.call.operation.is_estimator else of_rows
        listed = tuple(None if self.lists and label == program.call.axis else label for label in whole)
        of_value = {"row": of_rows, "none": listed}.get(program.call.reduction, ())
        of_weights = whole if program.call.operation.is_loss else of_rows
        known = {"x": listed, "indices": listed, "y": whole, "weights": of_weights}
        known |= {"cotangent": of_value, "value": of_value}
        own: tuple[Label, ...] = (None,) if is_data(a) else () if name == "denominator" else known.get(name, of_rows)
        return *range(a.ndim - len(own)), *own

    def rule(self) -> tuple[str, dict[str, Any]]:
        """The sharding rule for Shardy."""
        own = (f"own{k}" for k in itertools.count())
        alone: dict[str, None] = {}  # an ordered set

        def factor(label: Label, n: int) -> str:
            whole = n == self.sizes[label]
            name = _factor(label) if whole else next(own)
            if (whole and label == self.classes and not self.may_split_classes) or (self.lists and label is None):
                alone[name] = None
            return name

        def factors(name: str, a: Any) -> str:
            return " ".join(map(factor, self.labels(name, a), a.shape))

        arguments, results = (
            ", ".join(factors(name, a) for name, a in side.items()) for side in (self.arguments, self.results)
        )
        return f"{arguments} -> {results}", {"need_replication_factors": tuple(alone)}

    def split(self, mesh: Any, *sides: Any) -> Split:
        """Which mesh axes split which axis: as the first argument, or else the first result, that is sharded along it
        says. Axes are split evenly or not at all."""
        split: Split = {}
        used: set[str] = set()
        for side, arrays in zip((self.arguments, self.results), sides, strict=False):
            for name, a in zip(side, arrays, strict=True):
                spec = getattr(a.sharding, "spec", ())
                for label, n, axes in zip(self.labels(name, side[name]), a.shape, spec, strict=False):
                    by = (axes,) if isinstance(axes, str) else axes if isinstance(axes, tuple) else ()
                    whole = n > 0 and n == self.sizes[label] and n % math.prod(mesh.shape[one] for one in by) == 0
                    may = self.may_split_classes or label != self.classes
                    if by and whole and may and label not in split and used.isdisjoint(by):
                        split[label] = by
                        used.update(by)
        return split

    def missing(self, split: Split, name: str) -> tuple[str, ...]:
        """The mesh axes that split an axis over which an operand is broadcast."""
        a = self.arguments[name]
        axes = zip(self.labels(name, a), a.shape, strict=True)
        return tuple(axis for label, n in axes if n != self.sizes[label] for axis in split.get(label, ()))

    def shardings(self, mesh: Any, split: Split, side: dict[str, Any]) -> tuple[Any, ...]:
        def of(name: str, a: Any) -> Any:
            axes = zip(self.labels(name, a), a.shape, strict=True)
            return NamedSharding(
                mesh, _spec(*(split.get(label) if n == self.sizes[label] else None for label, n in axes))
            )

        return tuple(of(name, a) for name, a in side.items())


def in_explicit_mesh(program: Program, function: Callable[..., Any], arrays: dict[str, Any]) -> Any:
    """Call the function. If the arrays are sharded over explicit mesh axes, so are the results; XLA partitions the
    function itself."""
    mesh = private.explicit_mesh(arrays.values())
    if mesh is None:
        return function(arrays)
    named = replace(program, names=tuple(arrays))
    axes = Axes(named, arrays.values(), named.results(list(arrays.values())))
    split = axes.split(mesh, map(jax.typeof, arrays.values()))
    results = list(axes.shardings(mesh, split, axes.results))
    return jax.sharding.auto_axes(function, out_sharding=results)(arrays)


class _Site(Axes):
    """A call in a program that is lowered, with the steps that a device may have to run."""

    def __init__(self, program: Program, context: Any) -> None:
        super().__init__(program, context.avals_in, context.avals_out)
        self.own = _of_own_rows(program)
        self.steps = {name: private.callback(context, *step) for name, step in self._steps().items()}

    def _steps(self) -> dict[Any, tuple[Callable[..., None], int]]:
        """The steps: functions of buffers, and how many buffers each writes."""
        own, count = self.own, len(self.results)
        steps: dict[Any, Any] = {"whole": (own, count)}
        if "denominator" in set(own.names) - set(self.program.names):
            steps["weigh"] = shards.weigh, 1
        if self.may_split_classes and not self.by_class and self.classes is not None:
            for k in range(len(shards.sweeps(own))):
                steps["states", k] = partial(shards.states, own, k), 1
                steps["merge", k] = partial(shards.merge, own, k), 1
            steps["finish"] = partial(shards.finish, own), 1
            terms = own.call.reduction == "none" and not own.pull
            for outputs, results in {"terms": int(terms), "gradients": len(own.gradients)}.items():
                if results:
                    last = len(shards.sweeps(own, outputs)) - 1
                    steps[outputs] = partial(shards.write, own, outputs, last), results
        return {name: (partial(on_buffers, function, True), results) for name, (function, results) in steps.items()}


def _factor(label: Label) -> str:
    return f"mapped{label}" if label is not None and label >= 0 else f"axis{-(label or 0)}"


def _of_own_rows(program: Program) -> Program:
    """The program for the rows of one device: a mean becomes a sum, divided by the denominator of the whole."""
    if not program.total or program.call.operation.is_loss:
        return program
    by_weights = program.divided is None and "denominator" not in program.names
    names = (*program.names, "denominator") if by_weights else program.names
    divided = None if "denominator" in names else program.divided
    call = program.call._replace(reduction="sum", denominator=divided)
    return replace(program, call=call, names=names)


# ---- called by JAX ---------------------------------------------------------------------------------------------------


@partial(custom_partitioning, static_argnums=(0,))
def _partitioned(site: _Site, *arguments: Any) -> Any:
    return call_back(site.program, True, *arguments)


def _partition(site: _Site, mesh: Any, arguments: Any, results: Any) -> Any:
    split = site.split(mesh, arguments, results)
    to_results, to_arguments = (site.shardings(mesh, split, side) for side in (site.results, site.arguments))
    return mesh, partial(_on_device, site, split), to_results, to_arguments


def _infer(site: _Site, mesh: Any, arguments: Any, results: Any) -> Any:
    """For GSPMD, the partitioner before Shardy."""
    return site.shardings(mesh, site.split(mesh, arguments), site.results)


def _rule(site: _Site, mesh: Any, arguments: Any, results: Any) -> Any:
    return site.rule()


_define: Any = _partitioned.def_partition
_define(_partition, _infer, sharding_rule=_rule)


# ---- run by each device ----------------------------------------------------------------------------------------------


def _on_device(site: _Site, split: Split, *arguments: Any) -> Any:
    own = site.own
    arrays = dict(zip(site.program.names, arguments, strict=True))
    of_rows = tuple(
        axis for label, axes in split.items() if (label or 0) < 0 and label != site.classes for axis in axes
    )
    # operands that rows of other devices share: a part of their gradient should not be rounded to 16 bits
    shared = {name: site.missing(split, name) for name in own.gradients}
    for name, axes in shared.items():
        if axes and arrays[name].dtype.itemsize == 2:
            arrays[name] = arrays[name].astype(jnp.float32)
    whole = own.whole(arrays)["x"]
    whole = whole[len(whole) - own.ndim :]
    batch = tuple(n for label, n in zip(range(-own.ndim, 0), whole, strict=True) if label != site.classes)
    terms = own.with_classes(whole, own.shape[own.call.axis]) if site.lists and own.call.reduction == "none" else whole
    if "weigh" in site.steps:
        weights = arrays["weights"]
        mapped = weights.shape[: weights.ndim - len(batch)]
        (sums,) = site.steps["weigh"]([shards.doubles(*mapped, 1)], jnp.broadcast_to(weights, mapped + batch))
        arrays["denominator"] = _gathered(sums, of_rows)
    given = [arrays[name] for name in own.names]
    shape = () if own.total else terms if own.call.reduction == "none" else batch
    types = dict(zip(site.results, replace(own, shape=shape).results(given), strict=True))
    if site.classes in split and not site.by_class:
        found = _by_states(site, split[site.classes], types, own.mapped(given) + batch, given)
    else:
        found = dict(zip(types, site.steps["whole"](list(types.values()), *given), strict=True))
    if own.total and of_rows and "value" in found:
        found["value"] = _sum(found["value"], of_rows)
    for name, axes in shared.items():
        if axes:
            found[name] = _sum(found[name], axes).astype(site.results[name].dtype)
    return tuple(found[name] for name in types)


def _by_states(site: _Site, axes: tuple[str, ...], types: dict[str, Any], rows: tuple[int, ...], given: Any) -> Any:
    """The results if the classes are split by these mesh axes: the states are exchanged after each sweep."""
    own, steps = site.own, site.steps
    x = given[own.names.index("x")]
    chunks = shards.chunks(x.shape[own.call.axis])
    outputs = [name for name in ("terms", "gradients") if name in steps]
    last = {name: len(shards.sweeps(own, name)) - 1 for name in outputs}  # the sweep that writes each output
    numbers = shards.sweeps(own)
    count = max(last.values()) if own.pull or own.call.reduction == "none" else len(numbers)
    stats: list[Any] = [()]  # the stats before each sweep
    for k in range(count):
        (left,) = steps["states", k]([shards.doubles(*rows, numbers[k], chunks)], *given, *stats[k])
        stats += [steps["merge", k]([shards.doubles(*rows, cpu.STATS)], *given, _gathered(left, axes), *stats[k])]
    found = {}
    if "value" in types:
        value, known = ("terms", stats[last["terms"]]) if "terms" in steps else ("finish", stats[-1])
        (found["value"],) = steps[value]([types["value"]], *given, *known)
    if own.gradients:
        gradients = [types[name] for name in own.gradients]
        written = steps["gradients"](gradients, *given, *stats[last["gradients"]])
        found |= dict(zip(own.gradients, written, strict=True))
    return found


def _gathered(a: Any, axes: tuple[str, ...]) -> Any:
    """The arrays of all devices, concatenated along their last axis."""
    return jax.lax.all_gather(a, axes, axis=a.ndim - 1, tiled=True) if axes else a
