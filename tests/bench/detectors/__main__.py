"""`python -m tests.bench.detectors`: generate labelled texts, scan them, print recall and precision of every kind."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from gateway.labels import KINDS, Scanner
from tests.bench.detectors import presidio
from tests.bench.detectors.data import FAMILIES, Sample, samples
from tests.bench.detectors.measure import SENTENCE, Result, score, sentence_us, table
from tests.bench.program import ROOT, BenchError

SEED = 2026
EACH = 1500
SHOWN = 12


def ours(family: str, seed: int, each: int) -> tuple[list[Sample], Result]:
    """The texts, and what our detectors find in them."""
    drawn = list(samples(family, seed, each))
    scanner = Scanner(KINDS)
    us = sentence_us(scanner.scan, samples(family, seed + 1, each), drawn)
    found = [scanner.scan((sample.text,)) for sample in drawn]
    return drawn, score("hybridgate", drawn, found, us)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.detectors", description="Recall and precision of the detectors."
    )
    parser.add_argument(
        "--family", choices=[*FAMILIES, "all"], default="all", help="which ways of writing (default: all)"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--each", type=int, default=EACH, help=f"texts of each kind (default: {EACH})")
    parser.add_argument("--no-presidio", action="store_true", help="do not install or run presidio")
    parser.add_argument("--mistakes", action="store_true", help="show some texts that were judged wrongly")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args(arguments)


def _show(result: Result) -> None:
    grouped: dict[str, list[str]] = defaultdict(list)
    for what, sample, kinds in result.mistakes:
        grouped[what if sample.kind is not None or what.startswith("missed") else f"{what} in {sample.family}"].append(
            f"{sample.text!r:.160} → {', '.join(sorted(kinds)) or 'nothing'}"
        )
    for what, texts in sorted(grouped.items()):
        print(f"\n{what}: {len(texts)}")
        print("\n".join(f"    {text}" for text in texts[:SHOWN]))


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    told: dict[str, object] = {"seed": options.seed, "each": options.each}
    missed = 0
    for family in FAMILIES if options.family == "all" else (options.family,):
        drawn, result = ours(family, options.seed, options.each)
        results = [result]
        print(f"\n### {family}, seed {options.seed}\n")
        if not options.no_presidio:
            try:
                results.append(presidio.judged(ROOT / ".bench", drawn, SENTENCE))
            except BenchError as error:
                print(f"presidio is unavailable: {error}\n")
        print(table(results))
        bars = result.missed_bars(results[1].us if len(results) > 1 else None)
        missed += len(bars)
        print("\n" + ("All bars are met." if not bars else "\n".join(f"NOT MET: {bar}" for bar in bars)))
        if options.mistakes:
            _show(result)
        told[family] = {
            each.name: {
                "kinds": {kind: {"recall": kept.recall, "precision": kept.precision, "samples": kept.samples} for kind, kept in each.scores.items()},
                "lookalikes_labelled": each.labelled_share, "us_a_sentence": each.us,
            }
            for each in results
        }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
