"""The demo model's tokenizer: byte-level BPE learned from the corpus, and its chat template.

Owns special tokens, vocabulary and template. Refuses nothing: a byte-level alphabet encodes any text and gives it back.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
VOCABULARY = 2560
WINDOW = 1024  # tokens, prompt and answer together

# Content is a string or a list of parts, of which the texts are joined. Roles that the model was not trained on are
# read as the nearest one that it was.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}<|assistant|>
{%- elif message['role'] in ['system', 'developer'] -%}<|system|>
{%- else -%}<|user|>
{%- endif -%}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- elif message['content'] -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{ part['text'] | trim }}{{ '' if loop.last else '\\n' }}
{%- endfor -%}
{%- endif -%}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn the vocabulary. Digits stay single, so that numbers in questions do not use it up."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            # An underscore or a hyphen is a border too, or every header and flag becomes a token of its own.
            pre_tokenizers.Split(Regex(r"[_\-./]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )
