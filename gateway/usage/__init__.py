"""Usage: one line a request for the invoice, where it is kept, and what it sums to."""

from gateway.usage.entry import Entry, Tried, entry_from_json, entry_of
from gateway.usage.summing import Key, Total, total_by

__all__ = ["Entry", "Key", "Total", "Tried", "entry_from_json", "entry_of", "total_by"]
