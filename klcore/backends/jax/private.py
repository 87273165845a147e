"""All uses of JAX that its documentation does not promise: the file to check for a new version of JAX."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax._src import dispatch
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec


def varying_axes(a: Any) -> frozenset[str]:
    """The mesh axes along which an array varies, within a jax.shard_map that checks this."""
    kind = jax.typeof(a)
    manual = getattr(kind, "manual_axis_type", None)  # since 0.10
    return frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)


def varying(a: Any, axes: frozenset[str]) -> Any:
    """The array, marked as varying along these axes, too."""
    more = tuple(axes - varying_axes(a))
    return jax.lax.pcast(a, more, to="varying") if more else a


def explicit_mesh(arrays: Iterable[Any]) -> Any:
    """The mesh that shards the arrays, if their types say so (explicit axes), or None."""
    meshes = (getattr(getattr(jax.typeof(a), "sharding", None), "mesh", None) for a in arrays)
    return next((mesh for mesh in meshes if getattr(mesh, "explicit_axes", ())), None)


def result(shape: tuple[int, ...], dtype: Any, arguments: Iterable[Any]) -> Any:
    """The type of a result of these arguments. It has their mesh, in which vmap looks for its axis."""
    meshes = (a.sharding.mesh for a in arguments)
    mesh: Any = next((mesh for mesh in meshes if not mesh.empty), None)
    spec: Any = PartitionSpec  # without types
    of_mesh: Any = {} if mesh is None else {"sharding": NamedSharding(mesh, spec(*[None] * len(shape)))}
    return jax.core.ShapedArray(shape, dtype, **of_mesh)


def needs_devices(primitive: Any) -> None:
    """Let JAX provide the devices when it lowers a program with this primitive: custom_partitioning needs them."""
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def for_export(context: Any) -> bool:
    return bool(context.module_context.lowering_parameters.for_export)


def devices(context: Any) -> int:
    """The number of devices that run the program that is lowered."""
    axes = context.module_context.axis_context
    return int(axes.num_devices if isinstance(axes, mlir.ShardingContext) else axes.mesh.size)


def is_to_be_partitioned(context: Any) -> bool:
    """Whether XLA will partition the program that is lowered over the devices of a mesh."""
    axes = context.module_context.axis_context
    several = isinstance(axes, mlir.ShardingContext) and axes.num_devices > 1
    return several and axes.abstract_mesh is not None and not axes.abstract_mesh.empty


def callback(context: Any, function: Callable[..., None], results: int) -> Callable[..., Any]:
    """Register a function with the program that is lowered, and return what emits a call of it. The function takes a
    context, `results` buffers to write, and the buffers of the arguments. jax.experimental.buffer_callback does the
    same, but cannot be used within what XLA partitions, where the function would not be registered."""
    module = context.module_context
    target = "xla_buffer_python_cpu_callback" if "cpu" in module.platforms else "xla_buffer_python_gpu_callback"

    def called(execution: Any, *buffers: Any) -> tuple[()]:
        function(execution, buffers[-results:], *buffers[:-results])
        return ()

    emit: Any = jax.ffi.ffi_call
    module.add_host_callback(called)
    index = np.uint64(len(module.host_callbacks) - 1)
    return lambda types, *arguments: emit(target, types)(*arguments, index=index)
