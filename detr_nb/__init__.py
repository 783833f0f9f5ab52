"""DETR, built step by step in notebooks that train it: `detr_nb.load("detr_resnet50")("cat.jpg")`.

A name is imported when it is first asked for, so that `import detr_nb` takes no time.
"""
__version__ = "0.1.0"

from importlib import import_module as _import_module

_PLACES = {
    "load": "detector", "evaluate": "detector", "train": None, "boxes": None, "DETR": "detr", "Config": "config",
    "DataConfig": "config", "ModelConfig": "config", "LossConfig": "config", "OptimizerConfig": "config",
    "RunConfig": "config",
}  # the module that defines a name; None: the name is a module
__all__ = list(_PLACES)


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _import_module(f"{__name__}.{_PLACES[name] or name}")
    globals()[name] = value = getattr(module, name) if _PLACES[name] else module
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
