"""The bundled demo model answers what its model card says, from the committed files alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from local_engine.demo_model import corpus as corpora
from local_engine.demo_model import drawing
from local_engine.demo_model.corpus import Case, Corpus, Split, key
from local_engine.demo_model.evaluate import FOLDER, Answerer, measure, suites
from local_engine.demo_model.train import BEYOND, openings

SAMPLE = 60  # questions of a suite in the fast test; all of them in the slow one
BARS = {  # the least share of word-for-word right answers
    "trained questions": 0.95,
    "held-out paraphrases": 0.85,
    "of these, known words in an unseen frame": 0.90,
    "off-topic questions, politely declined": 0.85,
    "private-looking data in unseen sentences": 0.85,
}
SAMPLED = [suite for suite in BARS if suite != "held-out paraphrases"]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return corpora.load(FOLDER)


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    torch.set_num_threads(1)
    return Answerer(FOLDER)


def asked(*messages: tuple[str, object]) -> list[dict[str, object]]:
    return [{"role": role, "content": content} for role, content in messages]


# --- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SAMPLED)
def test_a_sample_of_each_suite_reaches_its_bar(suite: str, corpus: Corpus, answerer: Answerer) -> None:
    """The sample is drawn with a fixed seed and decoded greedily, so it is the same on every run."""
    cases = suites(corpus)[suite]
    sample = random.Random(11).sample(cases, min(SAMPLE, len(cases)))
    assert answerer.exact(sample) >= BARS[suite]


@pytest.mark.parametrize(
    ("question", "topic"),
    [
        ("What is Hybridgate?", "hybridgate"),
        ("What is TTFT?", "ttft"),
        ("what is ttft", "ttft"),
        ("What does the egress invariant do?", "egress"),
        ("How do I add a deployment?", "add-deployment"),
        ("how do i add a deployment", "add-deployment"),
        ("Are my credit card numbers sent to the cloud?", "card-numbers"),
        ("What happens if the local engine dies?", "engine-dies"),
        ("Hello!", "hello"),
        ("Who are you?", "who"),
    ],
)
@pytest.mark.parametrize("system", [None, "You are a helpful assistant."])
def test_the_questions_of_the_documentation_are_answered(
    question: str, topic: str, system: str | None, corpus: Corpus, answerer: Answerer
) -> None:
    before = ({"role": "system", "content": system},) if system else ()
    expected = next(one.answer for one in corpus.topics if one.id == topic)
    assert answerer.answers([Case((*before, {"role": "user", "content": question}), expected)]) == [expected]


def test_the_last_question_of_a_conversation_counts(corpus: Corpus, answerer: Answerer) -> None:
    first, last = (next(one for one in corpus.topics if one.id == name) for name in ("kv-cache", "ttft"))
    messages = asked(("user", "What is a KV cache?"), ("assistant", first.answer), ("user", "What is TTFT?"))
    case = Case(tuple({"role": str(m["role"]), "content": str(m["content"])} for m in messages), last.answer)
    assert answerer.answers([case]) == [last.answer]


@pytest.mark.slow
def test_the_model_card_states_what_the_files_do(corpus: Corpus, answerer: Answerer) -> None:
    """The metrics written at training are those of the committed files, within a question or two of rounding."""
    written = json.loads((FOLDER / "metrics.json").read_text())
    found = measure(answerer, suites(corpus))
    assert found.keys() == written.keys()
    for suite, row in found.items():
        assert row["questions"] == written[suite]["questions"]
        assert row["exact_match"] == pytest.approx(written[suite]["exact_match"], abs=0.02), suite
        assert f"{100 * written[suite]['exact_match']:.1f} %" in (FOLDER / "README.md").read_text()
    for suite, bar in BARS.items():
        assert found[suite]["exact_match"] >= bar, suite


# --- files ---------------------------------------------------------------------------------------------------------


def test_the_weights_are_small_and_safe(answerer: Answerer) -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 5_000_000
    assert 1_500_000 <= answerer.model.num_parameters() <= 2_500_000
    assert not [path for path in FOLDER.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_generation_ends_at_the_end_of_a_turn(answerer: Answerer) -> None:
    assert answerer.model.generation_config.eos_token_id == answerer.tokenizer.eos_token_id
    assert answerer.model.config.eos_token_id == answerer.tokenizer.eos_token_id
    assert answerer.model.config.max_position_embeddings == 1024


@given(st.text(max_size=200).filter(lambda text: "<|" not in text))
def test_any_text_survives_the_tokenizer(answerer: Answerer, text: str) -> None:
    ids = answerer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert answerer.tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        (asked(("user", "Hi")), "<|user|>Hi<|end|><|assistant|>"),
        (asked(("user", "  Hi\n")), "<|user|>Hi<|end|><|assistant|>"),
        (asked(("system", "S"), ("user", "Hi")), "<|system|>S<|end|><|user|>Hi<|end|><|assistant|>"),
        (asked(("developer", "S"), ("user", "Hi")), "<|system|>S<|end|><|user|>Hi<|end|><|assistant|>"),
        (
            asked(("user", "a"), ("assistant", "b"), ("user", "c")),
            "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>",
        ),
        (
            asked(("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])),
            "<|user|>a\nb<|end|><|assistant|>",
        ),
        (asked(("assistant", None), ("user", "a")), "<|assistant|><|end|><|user|>a<|end|><|assistant|>"),
    ],
)
def test_the_chat_template_renders(messages: list[dict[str, object]], rendered: str, answerer: Answerer) -> None:
    assert answerer.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == rendered


# --- the corpus ----------------------------------------------------------------------------------------------------


def test_there_are_enough_topics_and_their_answers_differ(corpus: Corpus) -> None:
    assert len(corpus.topics) >= 80
    assert len({topic.id for topic in corpus.topics}) == len(corpus.topics)
    assert len({topic.answer for topic in corpus.topics}) == len(corpus.topics)


def test_training_never_draws_what_is_held_out(corpus: Corpus) -> None:
    """Neither as written nor by rewording, in any turn."""
    rng = random.Random(5)
    unseen = {
        key(case.messages[-1]["content"])
        for case in [
            *corpora.held_out_sentences(corpus),
            *corpora.held_out_frames(corpus),
            *corpora.off_topic_cases(corpus),
            *corpus.blind.unseen,
            *corpus.blind.off_topic,
        ]
    }
    drawn = {
        key(message["content"])
        for _ in range(4_000)
        for message in drawing.draw_case(corpus, rng).messages
        if message["role"] == "user"
    }
    assert not drawn & unseen


def test_the_same_seed_draws_the_same_conversations(corpus: Corpus) -> None:
    one, two = ([drawing.draw_case(corpus, rng) for _ in range(50)] for rng in (random.Random(3), random.Random(3)))
    assert one == two


@given(st.integers(0, 2**32))
def test_invented_card_numbers_have_a_right_check_digit(seed: int) -> None:
    digits = [int(d) for d in drawing.card_number(random.Random(seed)) if d.isdigit()]
    doubled = [d if i % 2 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits)]
    assert len(digits) == 16
    assert sum(doubled) % 10 == 0


def copied(folder: Path) -> Path:
    for path in FOLDER.glob("*.yaml"):
        (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def test_training_on_a_blind_question_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    """Even for its own topic, with other capitals and another final mark."""
    blind = corpus.blind.unseen[0]
    topic = next(one.id for one in corpus.topics if one.answer == blind.answer)
    question = blind.messages[-1]["content"].upper().rstrip("?.!")
    with (copied(tmp_path) / "topics.yaml").open("a", encoding="utf-8") as file:
        file.write(f"\n- id: {topic}\n  ask: [{json.dumps(question)}]\n  answer: {json.dumps(blind.answer)}\n")
    with pytest.raises(ValueError, match=r"of blind.yaml is asked in"):
        corpora.load(tmp_path)


def test_what_is_called_documented_is_trained_on(corpus: Corpus) -> None:
    trained = {(key(case.messages[-1]["content"]), case.answer) for case in corpora.trained_cases(corpus)}
    documented = {(key(case.messages[-1]["content"]), case.answer) for case in corpus.blind.documented}
    assert documented <= trained


@pytest.mark.parametrize("topic", ["redis", "scale", "response-cache", "budget", "tenant", "status-429", "status-401"])
def test_answers_call_what_is_not_built_planned(topic: str, corpus: Corpus) -> None:
    assert "planned" in next(one.answer for one in corpus.topics if one.id == topic)


def test_an_opening_reaches_past_the_token_that_tells_an_answer_from_the_others() -> None:
    assert openings([[1, 2, 3, 4], [1, 2, 5, 6], [7, 8, 9]]) == {
        (1, 2, 3, 4): 3 + BEYOND,
        (1, 2, 5, 6): 3 + BEYOND,
        (7, 8, 9): 1 + BEYOND,
    }


def test_a_question_that_two_topics_claim_is_refused(tmp_path: Path) -> None:
    copied(tmp_path)
    with (tmp_path / "topics.yaml").open("a", encoding="utf-8") as file:
        file.write("\n- id: another\n  ask: [what is ttft]\n  answer: Something else.\n")
    with pytest.raises(
        ValueError, match=r"'what is ttft' is asked in .*'another'|'What is TTFT\?' is asked in .*'another'"
    ):
        corpora.load(tmp_path)


def test_no_frame_is_on_both_sides(corpus: Corpus) -> None:
    def overlap(split: Split) -> set[str]:
        return set(split.trained) & set(split.held_out)

    for split in (corpus.nouns, corpus.verbs, corpus.private, corpus.system_prompts, corpus.off_topic.plain):
        assert not overlap(split)
