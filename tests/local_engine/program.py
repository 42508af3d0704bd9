"""`hybridgate-engine serve` without a model: the same process, whose tokens are a few lines of arithmetic.

It starts in a fraction of a second, and its answers are as long as asked for, at 2 ms a token, so that tests can look
at how processes begin and end.

    python program.py PATH|HOST:PORT DRAIN_SECONDS LOAD_SECONDS [--exit-with-parent]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from local_engine.batch import Batch
from local_engine.config import Limits, Settings
from local_engine.engine import Model
from local_engine.sequence import Likelihood, Pick
from local_engine.serve import Address, serve
from local_engine.text import Text

WINDOW = 100_000
STEP_SECONDS = 0.002


def letters() -> Tokenizer:
    """A token for each small letter."""
    alphabet = {chr(ord("a") + index): index for index in range(26)}
    made = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


class Counting:
    """The next token is the last one's successor in the alphabet."""

    def forward(self, batch: Batch) -> list[int]:
        time.sleep(STEP_SECONDS)
        return [chunk.tokens[-1] for chunk in batch if chunk.samples]

    def sample(self, logits: list[int], rows: Sequence[int], picks: Sequence[Pick]) -> list[int | None]:
        return [(logits[row] + 1) % 26 for row in rows]

    def likelihoods(
        self, logits: list[int], rows: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
    ) -> list[Likelihood]:
        return [Likelihood(token, 0.0) for token in tokens]


def model() -> Model:
    text = Text(
        letters(),
        lambda shown: "".join(message["content"] for message in shown.messages),
        chat_template="",
        bos_token=None,
        eos_token=None,
        eos_token_id=None,
    )
    return Model("letters", Counting(), text, Limits(num_blocks=10_000, window=WINDOW), frozenset(), "26 letters")


def main(place: str, drain_seconds: str, load_seconds: str, *flags: str) -> int:
    def load() -> Model:
        time.sleep(float(load_seconds))
        return model()

    host, colon, port = place.rpartition(":")
    return serve(
        Settings(model="letters", drain_seconds=float(drain_seconds)),
        Address(host=host, port=int(port)) if colon else Address(uds=place),
        load,
        exit_with_parent="--exit-with-parent" in flags,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
