"""Presidio's pattern recognizers on the same texts, in an environment of their own.

Owns their version, their installation and which of their entities is which of our kinds. They are called one by one and
without a language model, so that neither its words nor the context that it finds play a part.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench.detectors.data import Sample
from tests.bench.detectors.measure import Result, score
from tests.bench.program import BenchError

VERSION = "2.2.366"
INSTALL_SECONDS = 900
LEAST_SCORE = 0.4  # what presidio is less sure of than this, it calls weak by itself
RECOGNIZERS = {
    "CreditCardRecognizer": "credit_card", "IbanRecognizer": "iban", "UsSsnRecognizer": "us_ssn", "EmailRecognizer": "email",
    "PhoneRecognizer": "phone", "IpRecognizer": "ip_address", "UsPassportRecognizer": "passport", "DePassportRecognizer": "passport",
    "ItPassportRecognizer": "passport", "EsPassportRecognizer": "passport", "DeTaxIdRecognizer": "national_id", "EsNifRecognizer": "national_id",
    "EsNieRecognizer": "national_id", "ItFiscalCodeRecognizer": "national_id", "FiPersonalIdentityCodeRecognizer": "national_id",
    "PlPeselRecognizer": "national_id", "SePersonnummerRecognizer": "national_id", "TrNationalIdRecognizer": "national_id",
    "NhsRecognizer": "national_id", "InAadhaarRecognizer": "national_id", "CaSinRecognizer": "national_id",
}  # fmt: skip
_PROGRAM = """
import json, sys, time
import presidio_analyzer.predefined_recognizers as known
wanted, least = json.loads(sys.argv[1]), float(sys.argv[2])
recognizers = [(getattr(known, name)(), kind) for name, kind in wanted.items()]
texts, found, spent = json.load(sys.stdin), [], 0.0
for text in texts:
    began = time.process_time()
    kinds = {kind for recognizer, kind in recognizers
             if any(one.score >= least for one in recognizer.analyze(text, recognizer.supported_entities, None) or ())}
    took = time.process_time() - began
    found.append([sorted(kinds), took * 1e6])
json.dump(found, sys.stdout)
"""


def install(work: Path) -> Path:
    """Install it once; returns the Python of its environment. Raises `BenchError` where that fails."""
    home = work / f"presidio-{VERSION}"
    python = home / "bin" / "python"
    if (home / "installed").exists():
        return python
    shutil.rmtree(home, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", str(home)],
        [str(python), "-m", "pip", "install", "-q", f"presidio-analyzer=={VERSION}"],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"presidio: not installed after {INSTALL_SECONDS} s") from error
        if done.returncode:
            raise BenchError(f"presidio: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    (home / "installed").touch()
    return python


def judged(work: Path, samples: Sequence[Sample], sentence: int) -> Result:
    """What it finds in the texts. Raises `BenchError` where it cannot be installed or run."""
    done = subprocess.run(
        [str(install(work)), "-c", _PROGRAM, json.dumps(RECOGNIZERS), str(LEAST_SCORE)],
        input=json.dumps([sample.text for sample in samples]), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise BenchError(f"presidio: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    answers = json.loads(done.stdout)
    times = [us for (_, us), sample in zip(answers, samples, strict=True) if len(sample.text) <= sentence]
    found = [frozenset(kinds) for kinds, _ in answers]
    return score(f"presidio {VERSION}", samples, found, sum(times) / len(times))
