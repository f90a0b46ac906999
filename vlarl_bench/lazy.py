"""Import a heavy module only when it is first used, so that `--help` and `list` stay instant."""

import importlib
import importlib.util
from types import ModuleType
from typing import Any


class _Lazy(ModuleType):
    """Stands in for a module. Not put into `sys.modules`: libraries (tyro, scipy) look there for torch and touch it."""

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # asked by inspection, not by use
            raise AttributeError(attribute)
        value = getattr(importlib.import_module(self.__name__), attribute)
        setattr(self, attribute, value)
        return value


def lazy_import(name: str) -> ModuleType:
    """Returns module `name`, loaded at its first attribute access."""
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return _Lazy(name)
