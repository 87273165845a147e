"""If Keras is loaded: classes that are Keras's, too, and the names under which Keras finds them."""

import sys
from types import ModuleType
from typing import Any


def loaded() -> ModuleType | None:
    keras = sys.modules.get("keras")
    return keras if hasattr(keras, "metrics") else None  # missing while Keras is being imported


def named(ours: type, bases: tuple[type, ...], members: dict[str, Any]) -> type:
    """A subclass with the name of our class, under which saved models find it."""
    return type(ours.__name__, bases, {"__module__": ours.__module__, "__qualname__": ours.__qualname__, **members})


def registered(keras: ModuleType, ours: Any) -> Any:
    """Register a class or function with Keras, so that it can load models saved with it."""
    return keras.saving.register_keras_serializable(package="klcore")(ours)
