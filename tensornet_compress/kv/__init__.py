"""The key-value cache as a tensor network: calibration, codecs, and drop-in ``transformers`` caches."""

from tensornet_compress.kv.cache import BlockCache, CacheReport
from tensornet_compress.kv.calibrate import calibrate
from tensornet_compress.kv.codec import IdentityCodec
from tensornet_compress.kv.joint import JointCodec
from tensornet_compress.kv.profile import Profile

__all__ = ["BlockCache", "CacheReport", "IdentityCodec", "JointCodec", "Profile", "calibrate"]
