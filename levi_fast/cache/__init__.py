"""The activation cache: what a frozen backbone's taps give over a data set, computed once and kept on disk."""

from levi_fast.cache.activation_cache import ActivationCache, Damage
from levi_fast.cache.estimate import Estimate
from levi_fast.cache.key import CacheMismatchError
from levi_fast.cache.reading import CachedTaps

__all__ = ["ActivationCache", "CacheMismatchError", "CachedTaps", "Damage", "Estimate"]
