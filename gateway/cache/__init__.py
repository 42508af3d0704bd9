"""The exact response cache: the same request of the same tenant with the same labels gets the same answer again, from
one process (`MemoryCache`) or from what replicas share (`RedisCache`), and is computed once where it comes many times
at once (`Flights`)."""

from gateway.cache.answers import Unfit, as_stream, for_another, is_complete, kept_of, whole_of
from gateway.cache.base import EVERYTHING, Cache, CacheUnavailable, Chosen, Claim, Counts, Figures
from gateway.cache.entry import Entry, packed, target_of
from gateway.cache.flights import Flight, Flights
from gateway.cache.key import is_deterministic, key_of, uncacheable
from gateway.cache.memory import MemoryCache
from gateway.cache.redis_cache import RedisCache
from gateway.cache.sealing import Seal, secret_in
from gateway.cache.wanted import Wanted, wanted_in

__all__ = [
    "EVERYTHING",
    "Cache",
    "CacheUnavailable",
    "Chosen",
    "Claim",
    "Counts",
    "Entry",
    "Figures",
    "Flight",
    "Flights",
    "MemoryCache",
    "RedisCache",
    "Seal",
    "Unfit",
    "Wanted",
    "as_stream",
    "for_another",
    "is_complete",
    "is_deterministic",
    "kept_of",
    "key_of",
    "packed",
    "secret_in",
    "target_of",
    "uncacheable",
    "wanted_in",
    "whole_of",
]
