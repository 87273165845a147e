"""What JAX' documentation does not promise, in one place: who runs on which versions of it, looks here."""

from typing import Any

import jax


def varying_axes(a: Any) -> frozenset[str]:
    """The axes of a mesh along which an array differs, within jax.shard_map with its checks."""
    kind = jax.typeof(a)
    manual = getattr(kind, "manual_axis_type", None)  # since 0.10
    return frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)


def varying(a: Any, axes: frozenset[str]) -> Any:
    """The array, as one that differs along these axes as well."""
    more = tuple(axes - varying_axes(a))
    if not more:
        return a
    lax: Any = jax.lax
    return lax.pcast(a, more, to="varying") if hasattr(lax, "pcast") else lax.pvary(a, more)  # the former since 0.8


def for_export(context: Any) -> bool:
    return bool(context.module_context.lowering_parameters.for_export)
