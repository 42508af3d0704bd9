"""Owns the way from a parsed request to the engine's Job: tokens, limits, structure; refuses HTTP and scheduling."""

from __future__ import annotations

from local_engine import calls
from local_engine.conversation import Conversation
from local_engine.engine import Job, Model
from local_engine.errors import ContextLengthExceeded, InvalidRequest
from local_engine.grammar import Grammar, Wanted
from local_engine.protocol import GenerationRequest, TokenizeRequest, Wishes
from local_engine.sequence import SamplingParams
from local_engine.text import Text


def encode(text: Text, wanted: GenerationRequest | TokenizeRequest) -> list[int]:
    """The prompt's tokens. Raises InvalidRequest."""
    prompt = wanted.prompt
    if isinstance(prompt, str):
        return text.encode(prompt, special_tokens=isinstance(wanted, GenerationRequest) or wanted.special_tokens)
    if isinstance(prompt, Conversation):
        return text.encode_chat(prompt)
    tokens = list(prompt)
    if tokens and max(tokens) >= text.vocab_size:
        raise InvalidRequest(f"prompt: token ids must be below {text.vocab_size}", param="prompt")
    return tokens


def grammar_of(model: Model, wanted: GenerationRequest) -> Grammar | None:
    """What the answer must follow, compiled, which can take long. Raises InvalidRequest."""
    structure = _structure(model, wanted)
    if structure is None:
        return None
    if model.grammars is None:
        raise InvalidRequest("this model's tokenizer cannot follow a structure", param=structure.param)
    return model.grammars.compiled(structure)


def structured(model: Model, wanted: GenerationRequest) -> bool:
    """Whether there is a grammar to compile. Raises InvalidRequest."""
    return _structure(model, wanted) is not None


def job(
    id: str,
    model: Model,
    wanted: GenerationRequest,
    prompt: list[int],
    default_max_tokens: int,
    grammar: Grammar | None = None,
    wishes: Wishes | None = None,
) -> Job:
    """The request of that id for this model. Raises InvalidRequest, ContextLengthExceeded."""
    params = _params(wanted, _max_tokens(len(prompt), wanted, default_max_tokens, model))
    if any(token >= model.text.vocab_size for token, _ in params.logit_bias):
        raise InvalidRequest(f"logit_bias: token ids must be below {model.text.vocab_size}", param="logit_bias")
    family = model.text.family
    wishes = wishes or Wishes()
    return Job(
        id,
        tuple(prompt),
        params,
        wishes.priority,
        wishes.first_token_by,
        grammar,
        salt=wanted.cache_salt.encode(),
        shown=frozenset() if wanted.tools is None or family is None else frozenset(family.marks),
    )


def _structure(model: Model, wanted: GenerationRequest) -> Wanted | None:
    """What the answer must look like: calls where one is required, or what a structure says, or either of them. Raises
    InvalidRequest where both cannot be had."""
    tools, structure, text = wanted.tools, wanted.structure, model.text
    if tools is None or text.family is None:
        return structure
    if not tools.must and structure is None:
        return None
    if structure is not None and (tools.must or structure.kind != "json_schema"):
        raise InvalidRequest(
            f"tools and {structure.param}: only a JSON Schema goes together with tools, and only where no call is "
            "required",
            param=structure.param,
        )
    form = calls.grammar(
        text.family,
        tools.callable,
        text.special_token,
        parallel=tools.parallel,
        or_answer=None if structure is None else structure.text,
    )
    return Wanted("lark", form, "tools")


def _params(wanted: GenerationRequest, max_tokens: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        seed=wanted.seed,
        stop=wanted.stop,
        min_p=wanted.min_p,
        repetition_penalty=wanted.repetition_penalty,
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
        logit_bias=wanted.logit_bias,
        min_tokens=min(wanted.min_tokens, max_tokens),
        ignore_eos=wanted.ignore_eos,
        logprobs=wanted.logprobs,
    )


def _max_tokens(prompt: int, wanted: GenerationRequest, default: int, model: Model) -> int:
    """How many tokens may be generated behind a prompt of so many. Raises InvalidRequest."""
    limit, asked = model.limits.capacity, wanted.max_tokens
    field = "messages" if wanted.chat else "prompt"
    which = "context window" if limit == model.limits.window else "KV cache"
    if prompt == 0:
        raise InvalidRequest("the prompt is empty", param=field)
    if prompt >= limit:
        raise ContextLengthExceeded(
            f"the prompt has {prompt} tokens, the model's {which} holds {limit} with the answer; shorten the prompt",
            param=field,
        )
    if asked is not None and prompt + asked > limit:
        raise ContextLengthExceeded(
            f"the prompt has {prompt} tokens and max_tokens is {asked}, together more than the {limit} of the model's "
            f"{which}; shorten one of them",
            param="max_tokens",
        )
    return asked if asked is not None else min(default, limit - prompt)
