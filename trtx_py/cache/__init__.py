"""Plans that were built before, kept on disk by what they were made of."""

from ._cache import EngineCache
from ._entry import CacheEntry, CacheReport

__all__ = ["CacheEntry", "CacheReport", "EngineCache"]
