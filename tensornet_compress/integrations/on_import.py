"""Registering with transformers the moment it is imported, whichever of the two packages comes first."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from tensornet_compress.errors import MissingExtraError

# Holds transformers' table of quantisation methods.
_TABLE = "transformers.quantizers.auto"


def register() -> None:
    """Teach transformers to read folders written by ``tnc.save``: ``AutoModelForCausalLM.from_pretrained(folder)``.

    Importing ``tensornet_compress`` does this too, before or after transformers is imported; calling it again changes nothing.

    >>> import tensornet_compress as tnc
    >>> tnc.register()

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        # First of all, since the import may register by itself.
        importlib.import_module(_TABLE)
    except ImportError as error:
        raise MissingExtraError(
            f"loading through transformers needs the 'hf' extra ({error}); pip install 'tensornet-compress[hf]'"
        ) from error
    importlib.import_module("tensornet_compress.integrations.hf").add_to_tables()


class _Waiting(MetaPathFinder):
    """Looks out for the import of the table, and is gone after it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec that Python finds by itself, with ``register`` to follow when the module has run."""
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_on_import() -> None:
    """``register`` now if transformers has its table loaded, otherwise as soon as it does; imports nothing itself."""
    if _TABLE in sys.modules:
        register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
