"""Traces: three formats, what is wrong with one at its line, what is drawn from a seed, and what a mix adds."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from gateway.simulate.files import read_trace
from gateway.simulate.mix import Mix, private_label, requests
from gateway.simulate.synthetic import synthetic, synthetic_of
from gateway.simulate.trace import Row, Trace, TraceError, parse
from tests.fakes import policy

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:47.1805900,396,109
"""
MOONCAKE = """{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 27482, "input_length": 7322, "output_length": 490, "hash_ids": [0, 14]}
"""
OWN = """arrival_s,prompt_tokens,output_tokens,tenant,slo,labels,tags,model,max_tokens,stream
3.5,10,20,acme,fast,personal secret,web,gpt-4o,64,false
1.5,5,0,,,,,,,
"""


def test_azures_columns() -> None:
    trace = parse("a.csv", AZURE.splitlines(keepends=True))
    assert trace.rows == (Row(0.0, 374, 44), Row(0.5, 396, 109))
    assert trace.began == pytest.approx(1700158546.68)


def test_mooncakes_columns() -> None:
    assert parse("m.jsonl", MOONCAKE.splitlines()).rows == (Row(0.0, 6758, 500), Row(27.482, 7322, 490))


def test_our_own_columns_are_sorted_by_arrival_and_an_answer_has_a_token_at_least() -> None:
    first, second = parse("own.csv", OWN.splitlines()).rows
    assert first == Row(0.0, 5, 1)
    assert second == Row(
        2.0,
        10,
        20,
        tenant="acme",
        slo="fast",
        labels=frozenset({"personal", "secret"}),
        tags=frozenset({"web"}),
        model="gpt-4o",
        max_tokens=64,
        stream=False,
    )


def test_our_own_lines_of_json() -> None:
    lines = ['{"arrival_s": 1, "prompt_tokens": 5, "output_tokens": 6, "labels": ["personal"], "stream": true}']
    assert parse("own.jsonl", lines).rows == (Row(0.0, 5, 6, labels=frozenset({"personal"})),)


def test_a_gzipped_file_is_read_as_a_plain_one(tmp_path: Path) -> None:
    plain, zipped = tmp_path / "a.csv", tmp_path / "a.csv.gz"
    plain.write_text(AZURE)
    zipped.write_bytes(gzip.compress(AZURE.encode()))
    assert read_trace(str(plain)).rows == read_trace(str(zipped)).rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "TIMESTAMP,ContextTokens\nx,1\n",
            'bad:1: column "GeneratedTokens" is missing; found: TIMESTAMP, ContextTokens',
        ),
        ('{"timestamp": 0}\n', 'bad:1: columns "input_length" and "output_length" are missing; found: timestamp'),
        (MOONCAKE + '{"timestamp": 1, "input_length": 2}\n', 'bad:3: column "output_length" is missing; found:'),
        ("a,b\n1,2\n", "bad:1: the columns of no known format are here; known are: arrival_s, prompt_tokens"),
        (OWN.replace("labels", "lables"), 'bad:1: unknown column "lables" (did you mean "labels"?)'),
        (AZURE + "2023-11-16 18:15:48,12.5,3\n", 'bad:4: "ContextTokens" must be a whole number of tokens, 0 or more'),
        (AZURE + "yesterday,12,3\n", 'bad:4: "TIMESTAMP" cannot be read'),
        (AZURE + "2023-11-16 18:15:48,12\n", "bad:4: 2 cells under 3 columns"),
        (OWN + "nan,1,1,,,,,,,\n", 'bad:4: "arrival_s" must be a finite time'),
        (OWN + "1,1,1,,,,,,,perhaps\n", 'bad:4: "stream" must be true or false'),
        ("arrival_s,prompt_tokens,output_tokens\n", "bad:1: no requests are here"),
        ('{"arrival_s": 1,\n', "bad:1: is not JSON"),
        ("", "bad:1: the columns of no known format are here"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text: str, message: str) -> None:
    with pytest.raises(TraceError) as error:
        parse("bad", text.splitlines(keepends=True))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("content", [b"\x1f\x8b broken", b"\xff\xfe", None])
def test_a_file_that_cannot_be_read_is_said(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TraceError, match=r"trace\.csv: (cannot be read|is no text)"):
        read_trace(str(path))


@pytest.mark.parametrize("kind", ["poisson", "bursty"])
def test_a_synthetic_trace_has_the_rate_and_the_lengths_that_were_asked_for(kind: str) -> None:
    asked = synthetic_of(f"{kind},rate=20,seconds=1000,prompt=300,output=50,seed=3")
    trace = synthetic(asked)
    count = len(trace.rows)
    assert count / 1000 == pytest.approx(20, rel=0.15 if kind == "bursty" else 0.03)
    assert sum(row.prompt_tokens for row in trace.rows) / count == pytest.approx(300, rel=0.03)
    assert sum(row.output_tokens for row in trace.rows) / count == pytest.approx(50, rel=0.03)
    assert trace == synthetic(asked)


def test_bursts_vary_more_than_chance_does() -> None:
    def spread(kind: str) -> float:
        counts = [0] * 200
        for row in synthetic(synthetic_of(f"{kind},rate=10,seconds=1000,burst=8")).rows:
            counts[int(row.arrival_s / 5)] += 1
        mean = sum(counts) / len(counts)
        return sum((count - mean) ** 2 for count in counts) / len(counts) / mean

    assert spread("poisson") < 1.5 < 3 < spread("bursty")


@pytest.mark.parametrize(
    "text", ["regular", "poisson,rate=0", "poisson,speed=3", "poisson,rate", "poisson,rate=1e6,seconds=1e6"]
)
def test_a_synthetic_trace_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(TraceError, match=r"^synthetic: "):
        synthetic_of(text)


def test_a_mix_draws_private_requests_and_classes_and_keeps_what_a_row_says() -> None:
    rows = (
        *(Row(float(i), 10, 10) for i in range(4000)),
        Row(4000.0, 1, 1, slo="slow", labels=frozenset({"personal"})),
    )
    mix = Mix(private=0.2, private_label="personal", classes={"fast": 0.3, "slow": 0.1}, time_scale=2.0, seed=1)
    made = requests(Trace("t", rows), mix, policy())
    assert sum(bool(request.facts.labels) for request in made[:-1]) == pytest.approx(800, rel=0.1)
    assert sum(request.facts.slo == "fast" for request in made[:-1]) == pytest.approx(1200, rel=0.1)
    assert sum(request.facts.slo is None for request in made[:-1]) == pytest.approx(2400, rel=0.1)
    assert (made[-1].facts.slo, made[-1].facts.labels) == ("slow", frozenset({"personal"}))
    assert made[10].arrival_s == 5.0


def test_the_same_request_has_the_same_luck_whatever_the_shares_are() -> None:
    trace = Trace("t", tuple(Row(float(i), 10, 10) for i in range(100)))
    few = requests(trace, Mix(private=0.1, private_label="personal"), policy())
    many = requests(trace, Mix(private=0.6, private_label="personal", classes={"fast": 1.0}), policy())
    assert [r.draw for r in few] == [r.draw for r in many]
    assert {r.index for r in few if r.facts.labels} < {r.index for r in many if r.facts.labels}


@pytest.mark.parametrize(
    ("mix", "row", "message"),
    [
        (Mix(private=0.2), Row(0.0, 1, 1), "no invariant of the policy protects a label"),
        (Mix(private=0.2, private_label="secret"), Row(0.0, 1, 1), 'no label "secret"; it has'),
        (Mix(classes={"quick": 0.5}), Row(0.0, 1, 1), 'no latency class "quick"; it has fast, slow'),
        (Mix(classes={"fast": 0.7, "slow": 0.7}), Row(0.0, 1, 1), "more than 1 together"),
        (Mix(), Row(0.0, 1, 1, slo="quick"), 'request 1: the policy has no latency class "quick"; it has fast, slow'),
    ],
)
def test_a_mix_that_the_policy_does_not_know_is_refused(mix: Mix, row: Row, message: str) -> None:
    rows = tuple(Row(float(i), row.prompt_tokens, row.output_tokens, slo=row.slo) for i in range(50))
    with pytest.raises(TraceError, match=message):
        requests(Trace("t", rows), mix, policy())


def test_what_makes_a_request_private_is_what_the_first_invariant_protects() -> None:
    assert private_label(policy()) == "personal"
    assert private_label(policy(invariants=())) == ""
