"""Where the interface has the KV cache; see :mod:`.decoding.kv_cache`."""

from olmo_core.nn.attention.decoding.kv_cache import KVCacheManager

__all__ = ["KVCacheManager"]
