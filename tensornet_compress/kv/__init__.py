"""The key-value cache as a tensor network: calibration, codecs, and drop-in ``transformers`` caches."""

from importlib.util import find_spec

from tensornet_compress.errors import MissingExtraError

if find_spec("transformers") is None:
    raise MissingExtraError("the KV cache needs transformers; run: python -m pip install 'tensornet-compress[hf]'")

from tensornet_compress.kv.cache import CompressedCache
from tensornet_compress.kv.context import compressed
from tensornet_compress.kv.live.cache import LiveCache
from tensornet_compress.kv.planning import CacheCost, CacheReport, costs, front
from tensornet_compress.kv.profile.calibrate import calibrate
from tensornet_compress.kv.profile.profile import Profile
from tensornet_compress.kv.storage.cache import StorageCache
from tensornet_compress.kv.storage.codec import IdentityCodec

__all__ = [
    "CacheCost",
    "CacheReport",
    "CompressedCache",
    "IdentityCodec",
    "LiveCache",
    "Profile",
    "StorageCache",
    "calibrate",
    "compressed",
    "costs",
    "front",
]
