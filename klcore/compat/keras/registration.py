"""Keras, where the process has loaded it: classes of its own kind, and names under which it finds them again."""

import sys
from types import ModuleType
from typing import Any


def loaded() -> ModuleType | None:
    keras = sys.modules.get("keras")
    return keras if hasattr(keras, "metrics") else None  # half-imported, it has no parts yet


def named(ours: type, bases: tuple[type, ...], members: dict[str, Any]) -> type:
    """A class that goes by the name of ours: under it, a saved model finds its way back."""
    return type(ours.__name__, bases, {"__module__": ours.__module__, "__qualname__": ours.__qualname__, **members})


def registered(keras: ModuleType, ours: Any) -> Any:
    """Known to Keras, so that it loads models saved with it."""
    return keras.saving.register_keras_serializable(package="klcore")(ours)
