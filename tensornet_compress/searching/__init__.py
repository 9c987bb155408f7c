"""Which layout, topology, ranks and formats one tensor should have; null controls. The front door is ``search``."""

from tensornet_compress.options.offered import SEARCH_FAMILIES as FAMILIES
from tensornet_compress.searching.bounds import search_within
from tensornet_compress.searching.layout_search import ORDERINGS, search
from tensornet_compress.searching.result import Event, Found, Null, SearchResult
from tensornet_compress.searching.store import SpectrumStore

__all__ = [
    "FAMILIES",
    "ORDERINGS",
    "Event",
    "Found",
    "Null",
    "SearchResult",
    "SpectrumStore",
    "search",
    "search_within",
]
