"""What a detector found, held against what the texts hold: recall, precision, look-alikes labelled.

Owns the arithmetic and the table. A kind that a sample allows beside its own counts neither way.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tests.bench.detectors.data import KINDS, Sample

# The least recall and precision, and the most look-alikes that may carry a label. None: reported without a bar.
BARS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("credit_card", "iban", "us_ssn", "api_key", "private_key", "jwt", "password"), (0.98, 0.99)),
    "email": (0.95, 0.98),
    "phone": (0.97, 0.90),
}
MOST_LABELLED = 0.02
MOST_US = 15.0
PRESIDIO_US = 750.0
"""The bar for a sentence, and what presidio takes for one on the machine that it is meant for: where presidio runs beside
us, a fiftieth of its time is the bar, which is the same on every machine."""

PASSES = 5
SENTENCE = 200  # characters: what is longer is no sentence


@dataclass(frozen=True, slots=True)
class Score:
    """Of one kind: texts that hold it, texts where it was rightly and wrongly found."""

    samples: int
    found: int
    wrong: int

    @property
    def recall(self) -> float:
        return self.found / self.samples if self.samples else 1.0

    @property
    def precision(self) -> float:
        return self.found / (self.found + self.wrong) if self.found + self.wrong else 1.0


@dataclass(frozen=True)
class Result:
    """Of one detector on one set of samples. `us` is CPU time of a sentence; None where it was not measured."""

    name: str
    scores: dict[str, Score]
    lookalikes: int
    labelled: int
    us: float | None
    mistakes: list[tuple[str, Sample, frozenset[str]]] = field(default_factory=list, repr=False)

    @property
    def labelled_share(self) -> float:
        return self.labelled / self.lookalikes if self.lookalikes else 0.0

    def missed_bars(self, presidio_us: float | None = None) -> list[str]:
        """The bars that are not met, in words. `presidio_us`: what presidio took for a sentence in the same run."""
        missed = [
            f"{kind}: {what} {value:.4f} < {bar}"
            for kind, bars in BARS.items()
            for what, value, bar in zip(
                ("recall", "precision"), (self.scores[kind].recall, self.scores[kind].precision), bars, strict=True
            )
            if value < bar
        ]
        if self.labelled_share > MOST_LABELLED:
            missed.append(f"look-alikes labelled: {self.labelled_share:.4f} > {MOST_LABELLED}")
        most = MOST_US if presidio_us is None else MOST_US * presidio_us / PRESIDIO_US
        if self.us is not None and self.us > most:
            missed.append(f"µs a sentence, with what else this machine does: {self.us:.1f} > {most:.1f}")
        return missed


def score(name: str, samples: Sequence[Sample], found: Sequence[frozenset[str]], us: float | None) -> Result:
    """Hold what was found in each text against what it was made for."""
    total = Counter(sample.kind for sample in samples)
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    labelled = 0
    mistakes: list[tuple[str, Sample, frozenset[str]]] = []
    for sample, kinds in zip(samples, found, strict=True):
        if sample.kind is None:
            labelled += bool(kinds)
        elif sample.kind in kinds:
            right[sample.kind] += 1
        else:
            mistakes.append((f"missed {sample.kind}", sample, kinds))
        for kind in kinds - sample.allowed - {sample.kind}:
            wrong[kind] += 1
            mistakes.append((f"wrong {kind}", sample, kinds))
    scores = {kind: Score(total[kind], right[kind], wrong[kind]) for kind in KINDS}
    return Result(name, scores, total[None], labelled, us, mistakes)


def sentence_us(
    scan: Callable[[Sequence[str]], frozenset[str]], warm: Iterable[Sample], samples: Iterable[Sample]
) -> float:
    """CPU time of a scan of a text that reads like a sentence, in µs: the fastest of several passes over all, as others
    may use the machine, in a process that has scanned texts of their like before."""
    for sample in warm:
        scan((sample.text,))
    texts = [(sample.text,) for sample in samples if len(sample.text) <= SENTENCE]
    passes = []
    for _ in range(PASSES):
        began = time.process_time()
        for text in texts:
            scan(text)
        passes.append((time.process_time() - began) / len(texts) * 1e6)
    return min(passes)


def _time_bar(results: Sequence[Result]) -> str:
    if len(results) > 1 and results[1].us is not None and results[0].us:
        return f"≤ 1/{PRESIDIO_US / MOST_US:.0f} of presidio's: 1/{results[1].us / results[0].us:.0f}"
    return f"≤ {MOST_US:.0f} where presidio takes {PRESIDIO_US:.0f}"


def table(results: Sequence[Result]) -> str:
    """Markdown: a line a kind, recall and precision of each detector."""
    heads = [f"{result.name}: recall | precision" for result in results]
    lines = ["| kind | bar | samples | " + " | ".join(heads) + " |", "|---|---|---:|" + "---:|---:|" * len(results)]
    for kind in KINDS:
        bar = " / ".join(f"{value:.2f}" for value in BARS[kind]) if kind in BARS else ""
        cells = [
            f"{each.recall:.3f} | {each.precision:.3f}" if each.found or each.wrong else "– | –"
            for each in (result.scores[kind] for result in results)
        ]
        lines.append(f"| `{kind}` | {bar} | {results[0].scores[kind].samples} | " + " | ".join(cells) + " |")
    shares = [f"{result.labelled_share:.4f} | " for result in results]
    lines.append(f"| look-alikes labelled | ≤ {MOST_LABELLED} | {results[0].lookalikes} | " + " | ".join(shares) + " |")
    times = [f"{result.us:.1f} | " if result.us is not None else "– | " for result in results]
    lines.append(f"| µs a sentence | {_time_bar(results)} |  | " + " | ".join(times) + " |")
    return "\n".join(lines)
