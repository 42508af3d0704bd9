"""What private data and secrets look like.

Owns the table of detectors: `ROWS`, each a pattern with its check, and `Numbers`, what digits alone can be.
Refuses to run the patterns (`labels.py` does), and any text that is not folded (`fold.py`).
"""

from gateway.detectors import accounts, credentials, documents, passwords, people
from gateway.detectors.base import Place, Row
from gateway.detectors.numbers import DIGIT_KINDS, FIRST_FREE_CLUE, RUN, Numbers

# What several of them find at the same place has the name of the first.
ROWS: tuple[Row, ...] = (*passwords.ROWS, *people.ROWS, *accounts.ROWS, *documents.ROWS, *credentials.ROWS)
KINDS: frozenset[str] = DIGIT_KINDS | {row.kind for row in ROWS}

__all__ = ["DIGIT_KINDS", "FIRST_FREE_CLUE", "KINDS", "ROWS", "RUN", "Numbers", "Place", "Row"]
