"""Named entries of one kind: methods, models, texts, tensors, metrics, tracks. A new one is a small file that adds itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from tensornet_compress.errors import TensorNetError


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """What users write to choose it."""
        ...


Entry = TypeVar("Entry", bound=Named)
Case = TypeVar("Case")
Made = TypeVar("Made")


class Registry(Generic[Entry]):
    """Entries by name, in the order in which they were added. ``what``: the singular that messages use."""

    def __init__(self, what: str):
        self.what = what
        self._entries: dict[str, Entry] = {}

    def add(self, entry: Entry) -> Entry:
        """Add an entry.

        Raises:
            TensorNetError: another one has its name.
        """
        if entry.name in self._entries:
            raise TensorNetError(f"there is a {self.what} {entry.name!r} already; give the new one another name")
        self._entries[entry.name] = entry
        return entry

    def remove(self, name: str) -> None:
        """Take an entry out again."""
        del self._entries[name]

    def __getitem__(self, name: str) -> Entry:
        """An entry by name.

        Raises:
            TensorNetError: there is none of this name; the message lists those that exist.
        """
        if name not in self._entries:
            raise TensorNetError(f"unknown {self.what} {name!r}; choose from {', '.join(self._entries)}")
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def choose(self, names: Sequence[str] | None) -> list[Entry]:
        """The named entries, or all of them for ``None``."""
        return list(self) if names is None else [self[name] for name in dict.fromkeys(names)]


@dataclass(frozen=True)
class Method(Generic[Case, Made]):
    """A way to compress a case. ``run``: (case, size asked for) -> what was made; raises ``Unavailable`` when it cannot.

    The size is in bits per weight, bits per element or relative error, by benchmark. ``ours``: this package's own search and
    allocation, not a peer's method.
    """

    name: str
    run: Callable[[Case, float], Made]
    explanation: str = ""
    ours: bool = False
