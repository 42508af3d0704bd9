"""The comparison with other servers: its models, its files, its load, its arithmetic."""

from __future__ import annotations

import asyncio
import itertools
import re
import struct
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from local_engine.bench import gguf, peers, report, roofline, rounds, steps
from local_engine.bench.command import Found, Wanted, compared, markdown, prepared, rooflines, wanted_of
from local_engine.bench.load import ask, ask_all
from local_engine.bench.program import BenchError, Launch, Program, free_port, running
from local_engine.bench.rounds import Plan, Prefix, Run
from local_engine.bench.shapes import END, SHAPES, prompts, write
from local_engine.cli import app
from local_engine.config import Settings
from local_engine.loading import load
from local_engine.memory import Need

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(TINY, tmp_path_factory.mktemp("model"), lambda line: None)


def test_a_prompt_is_as_long_as_asked_for(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    for size in (4, 54, 1000):
        for text in prompts(1, TINY.vocabulary, size, 3):
            messages = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert len(ids) == size
            assert "".join(tokenizer.decode([token]) for token in ids[1:-2]) == text


def test_prompts_are_the_same_for_a_seed_and_differ_otherwise() -> None:
    assert prompts(1, TINY.vocabulary, 54, 4) == prompts(1, TINY.vocabulary, 54, 4)
    assert len({*prompts(1, TINY.vocabulary, 54, 4), *prompts(2, TINY.vocabulary, 54, 4)}) == 8


def test_the_51_m_shape_has_51_m_parameters_and_the_7b_ones_7_b() -> None:
    """Counted from the sizes: embedding, output, and per layer attention, feed-forward and norms."""
    counted = {}
    for name, shape in SHAPES.items():
        attention = 2 * shape.hidden**2 + 2 * shape.hidden * shape.hidden * shape.kv_heads // shape.heads
        layer = attention + 3 * shape.hidden * shape.inner + 2 * shape.hidden
        counted[name] = 2 * shape.vocabulary * shape.hidden + shape.layers * layer + shape.hidden
    assert counted["51m"] == 51_649_024
    assert counted["llama-2-7b"] == 6_738_415_616
    assert counted["mistral-7b"] == 7_241_732_096


class Reader:
    """As much of GGUF as the writer writes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> tuple[int, ...]:
        found = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return found

    def text(self) -> str:
        (size,) = self.take("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self) -> object:
        (kind,) = self.take("I")
        return self.of(kind)

    def of(self, kind: int) -> object:
        if kind == gguf.STRING:
            return self.text()
        if kind == gguf.ARRAY:
            inner, count = self.take("IQ")
            return [self.of(inner) for _ in range(count)]
        return self.take({gguf.UINT32: "I", gguf.INT32: "i", gguf.FLOAT32: "f", gguf.BOOL: "?"}[kind])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_file_holds_the_weights_and_the_tokenizer(model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    reader = Reader(gguf.write(TINY, model, tmp_path / "model.gguf", dtype).read_bytes())
    assert reader.data[:4] == b"GGUF"
    reader.at = 4
    version, tensors, values = reader.take("IQQ")
    assert version == 3
    known = {reader.text(): reader.value() for _ in range(values)}
    assert known["llama.block_count"] == TINY.layers
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert known["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(list(range(TINY.vocabulary)))
    table = []
    for _ in range(tensors):
        name, (dimensions,) = reader.text(), reader.take("I")
        table.append((name, reader.take(f"{dimensions}Q"), reader.take("IQ")))
    begin = -(-reader.at // gguf.ALIGNMENT) * gguf.ALIGNMENT
    weights = load_file(model / "model.safetensors")
    found = {}
    for name, sizes, (kind, offset) in table:
        stored = {number: dtype for dtype, number in gguf.TYPES.items()}[kind]
        count = int(torch.tensor(sizes).prod())
        raw = torch.frombuffer(bytearray(reader.data), dtype=stored, count=count, offset=begin + offset)
        found[name] = raw.view(*reversed(sizes)).float()
    assert found["output.weight"].equal(weights["lm_head.weight"].to(dtype).float())
    assert found["blk.1.ffn_down.weight"].equal(weights["model.layers.1.mlp.down_proj.weight"].to(dtype).float())
    assert found["blk.0.attn_norm.weight"].equal(weights["model.layers.0.input_layernorm.weight"])
    assert len(found) == 3 + 9 * TINY.layers


def test_rows_of_a_head_are_interleaved_within_the_head() -> None:
    weight = torch.arange(8.0)[:, None]
    assert gguf.interleaved(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


SERVER = textwrap.dedent("""
    import http.server, json, sys, time

    class Answers(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def log_message(self, *given): pass
        def do_GET(self):
            self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if HOW == "refuses":
                self.send_response(503); self.send_header("content-length", "0"); self.end_headers(); return
            self.send_response(200); self.send_header("transfer-encoding", "chunked"); self.end_headers()
            count = asked["max_tokens"] - (HOW == "short")
            events = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
            events += [{"choices": [{"delta": {"content": f"w{index} "}}]} for index in range(count)]
            if HOW == "breaks":
                events = [*events[:2], {"error": {"message": "broken"}}]
            events.append({"choices": [], "usage": {"completion_tokens": count}})
            data = "".join(f"data: {json.dumps(event)}\\n\\n" for event in events) + "data: [DONE]\\n\\n"
            for begin in range(0, len(data), 7):  # events are cut anywhere
                piece = data[begin:begin + 7].encode()
                self.wfile.write(b"%x\\r\\n" % len(piece) + piece + b"\\r\\n")
            self.wfile.write(b"0\\r\\n\\r\\n")

    HOW = sys.argv[2]
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
""")


def launch(how: str, name: str = "peer") -> Launch:
    port = free_port()
    return Launch(name, (sys.executable, "-c", SERVER, str(port), how), port, "/health", "bench")


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with running(launch("right"), 1, None, tmp_path_factory.mktemp("log") / "peer.log") as program:
        yield program


def test_an_answer_is_read_whatever_its_chunks_are(peer: Program) -> None:
    answer = asyncio.run(ask(peer.launch, "hello", 5))
    assert answer.text == "w0 w1 w2 w3 w4 "
    assert 0 < answer.first <= answer.total


def test_answers_come_in_the_order_of_their_prompts(peer: Program) -> None:
    answers = asyncio.run(ask_all(peer.launch, ["one", "two", "three", "four", "five"], 2, 3))
    assert [answer.text for answer in answers] == ["w0 w1 w2 "] * 5


@pytest.mark.parametrize(
    ("how", "said"), [("refuses", "answered 503"), ("short", "gave 4 tokens, asked for 5"), ("breaks", "broken")]
)
def test_a_wrong_answer_is_no_throughput(how: str, said: str, tmp_path: Path) -> None:
    with (
        running(launch(how), 1, None, tmp_path / "peer.log") as program,
        pytest.raises(BenchError, match=said),
    ):
        asyncio.run(ask(program.launch, "hello", 5))


def test_a_server_that_fails_is_left_out_with_the_reason_and_the_others_go_on(peer: Program, tmp_path: Path) -> None:
    plan = Plan(streams=(1, 2), rounds=2, new_tokens=3, least_requests=2)
    with running(launch("refuses", "broken"), 1, None, tmp_path / "peer.log") as broken:
        found = rounds.measure([broken, peer], plan, "fp32", TINY.vocabulary, lambda line: None)
    assert "answered 503" in found.failed["broken"]
    assert {(run.server, run.streams, run.round, run.tokens) for run in found.runs} == {
        ("peer", streams, number, 6) for streams in (1, 2) for number in (0, 1)
    }
    assert len(found.prefixes) == 2


def test_a_program_that_ends_while_starting_says_its_last_words(tmp_path: Path) -> None:
    dead = Launch("dead", (sys.executable, "-c", "raise SystemExit('no such flag')"), free_port(), "/", "m")
    with pytest.raises(BenchError, match="no such flag"), running(dead, 1, None, tmp_path / "dead.log"):
        pass


def run(server: str, number: int, seconds: float, *, streams: int = 8, texts: tuple[str, ...] = ("a", "b")) -> Run:
    """Its CPU time is a fourth of what it took."""
    return Run(server, "fp32", streams, number, 96, seconds, seconds / 4, seconds / 8, texts)


def test_a_ratio_is_the_median_of_each_rounds_ratio() -> None:
    """A round in which everything is ten times slower changes nothing."""
    runs = [run("hybridgate", n, s) for n, s in enumerate((1.0, 10.0, 2.0))]
    runs += [run("transformers", n, s) for n, s in enumerate((2.0, 20.0, 3.0))]
    assert report.ratio(runs, "transformers", "fp32", 8, lambda one: one.rate) == 2.0
    assert report.ratio(runs, "llama.cpp", "fp32", 8, lambda one: one.rate) is None
    assert report.ratio(runs, "transformers", "bf16", 8, lambda one: one.rate) is None


@pytest.mark.parametrize(("seconds", "said"), [(1.2, "1.2 ×: met"), (1.19, "1.2 ×: missed")])
def test_a_goal_is_met_or_missed(seconds: float, said: str) -> None:
    table = report.speeds([run("hybridgate", 0, 1.0), run("transformers", 0, seconds)])
    assert said in table
    assert report.speeds([run("hybridgate", 0, 1.0, streams=3), run("transformers", 0, 2.0, streams=3)]).count("×") == 3


def test_goals_are_about_cpu_time_where_the_system_tells_it() -> None:
    """What neighbours take of the core is nobody's fault."""
    runs = [replace(run("hybridgate", 0, 1.0), cpu=0.5), replace(run("transformers", 0, 1.0), cpu=1.0)]
    assert "1.2 ×: met" in report.speeds(runs)
    assert "1.2 ×: missed" in report.speeds([replace(one, cpu=float("nan")) for one in runs])


def test_the_same_answers_are_counted() -> None:
    runs = [run("hybridgate", 0, 1.0), run("transformers", 0, 1.0, texts=("a", "c"))]
    assert report.same_answers(runs, "transformers", "fp32") == 0.5
    assert report.same_answers(runs, "llama.cpp", "fp32") is None


@pytest.mark.parametrize(("again", "said"), [(0.2, "5.0 × | 5 ×: met"), (0.21, "missed")])
def test_a_cached_prefix_has_a_goal(again: float, said: str) -> None:
    assert said in report.prefixes([Prefix("hybridgate", "fp32", 0, 1.0, again)])


def test_what_is_missing_is_in_the_table_with_the_reason() -> None:
    found = Found(runs=[run("hybridgate", 0, 1.0)], missing={"llama.cpp": "install cmake"}, overhead=0.05)
    shown = markdown(found)
    assert "Left out: llama.cpp: install cmake" in shown
    assert "5.0% is not the forward" in shown


def test_a_step_reads_all_weights_but_the_embedding_and_the_cache_of_each_sequence() -> None:
    need = Need("bf16", "bfloat16", weights=1000, kv_per_token=4, activations=0)
    assert roofline.step_bytes(need, 100, batch=2, context=10) == 900 + 80
    assert roofline.Decoded(2, 980, seconds=0.5, bandwidth=9800.0).share == pytest.approx(0.2)
    assert roofline.Decoded(2, 980, seconds=0.5, bandwidth=9800.0).rate == 4.0


def test_a_copy_counts_what_it_reads_and_what_it_writes() -> None:
    assert roofline.copy_bandwidth(torch.device("cpu"), 2**20, 3) > 1e8


def wanted(work: Path, peers: str = "none") -> Wanted:
    plan = Plan(streams=(1, 2), rounds=1, new_tokens=4, prefix_tokens=300, least_requests=1)
    return wanted_of("tiny", "fp32", peers, plan, work, "cpu")


@pytest.mark.slow
def test_the_share_of_the_bandwidth_is_computed_on_a_cpu_as_well(tmp_path: Path) -> None:
    """The command that a GPU is measured with, over a tiny model; its times mean nothing here."""
    shown = rooflines(replace(wanted(tmp_path), precisions=("bf16",)), lambda line: None)
    assert [line.split(" | ")[:2] for line in shown.splitlines()[4:]] == [
        [f"| {quantization}", str(batch)]
        for quantization, batch in itertools.product(("bf16", "int8", "int4"), (1, 64))
    ]


def test_the_engines_own_part_is_a_share(model: Path) -> None:
    settings = Settings(model=str(model), kv_cache_tokens=2048)
    assert 0 < steps.overhead(lambda: load(settings), 4, prompt_tokens=20, new_tokens=8) < 1


@pytest.mark.slow
def test_this_engine_alone_is_measured_over_http(tmp_path: Path) -> None:
    """The whole command but the peers, which nobody needs for the tests."""
    found = compared(wanted(tmp_path), lambda line: None)
    assert {(one.server, one.streams) for one in found.runs} == {("hybridgate", 1), ("hybridgate", 2)}
    assert all(len(text) > 3 and END not in text for one in found.runs for text in one.texts)
    assert found.overhead is not None
    assert "Shape tiny" in markdown(found)


def test_a_shared_environment_installs_nothing(tmp_path: Path) -> None:
    shared = replace(wanted(tmp_path, "transformers"), shared=True)
    programs, missing = prepared(shared, lambda line: None)
    assert (programs, missing) == ({"transformers": Path(sys.executable).parent / "transformers"}, {})
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_llama_cpp_is_left_out_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchError, match="no cc and no c\\+\\+; install a C and C\\+\\+ compiler"):
        peers.install_llama(tmp_path / "work", lambda line: None)


def test_what_is_installed_is_not_installed_again(tmp_path: Path) -> None:
    for install in (peers.install_transformers, peers.install_llama):
        home = tmp_path / f"{install.__name__}"
        said: list[str] = []
        for version in (f"transformers-{peers.TRANSFORMERS}", f"llama-cpp-python-{peers.LLAMA_CPP_PYTHON}"):
            (home / version).mkdir(parents=True)
            (home / version / "installed").touch()
        assert install(home, said.append).is_relative_to(home)
        assert not said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shape", "70b"], "--shape: unknown 70b; known: tiny, 51m"),
        (["--precisions", "fp64"], "--precisions: unknown fp64"),
        (["--peers", "vllm"], "--peers: unknown vllm; known: transformers, llama.cpp, none"),
        (["--streams", "many"], "--streams must be whole numbers"),
    ],
)
def test_a_flag_that_means_nothing_is_one_line(flags: list[str], said: str, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["bench", "--work", str(tmp_path), *flags])
    assert shown.exit_code in (1, 2)
    assert said in shown.stderr
    assert re.fullmatch(r"[^\n]+\n", shown.stderr)
