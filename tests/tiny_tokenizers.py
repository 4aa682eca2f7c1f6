"""Tokenizers of few tokens, chat templates as known models have them, and chats."""

import re

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from swaa_flex.cli.passkey import FILLER, NEEDLE, QUESTION

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3: thinking only in the last answer, an empty block where it has none, and a switch in the generation prompt.
HYBRID = (
    "{% for m in messages %}{% set text = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in text else '' %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{% set text = '<think>\n' + thought + '\n</think>\n\n' + text %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# As Qwen3-Thinking-2507: the generation prompt opens the thinking.
THINKING = HYBRID.replace("{{ '<|im_start|>assistant\n' }}{%", "{{ '<|im_start|>assistant\n<think>\n' }}{%")
# As Llama 3: a BOS token, and contents trimmed.
BEGINS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral: particular about roles, and a blank before answers that the generation prompt has not.
PARTICULAR = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
# As gpt-oss: answers go to a channel, which the model writes.
CHANNELS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}{% if m['role'] == 'assistant' %}"
    "{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


def byte_tokenizer(template, adds_bos=False):
    """A token per byte, one for two newlines, and special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate([*letters, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ("<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>", "<|channel|>", "<|message|>")
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    if adds_bos:
        bos = ("<|bos|>", tokenizer.token_to_id("<|bos|>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=template,
    )


MARKS = ["<pad>", "<user>", "<assistant>", "<end>", "<think>", "</think>"]
WORDS = ["red", "green", "blue", "one", "two", "three"]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% if think is defined %}{{ '<think>' }}{% endif %}{% endif %}"
)


def words_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*MARKS, *WORDS])}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(MARKS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", chat_template=TEMPLATE
    )


def passkey_tokenizer():
    """A token per word of the prompts and per digit, and one for all other words."""
    words = re.findall(r"[a-zA-Z]+|[^\w\s]", " ".join((*FILLER, NEEDLE, QUESTION)))
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", *"0123456789", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>")


def chat(*contents):
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def texts(tokenizer, example):
    """The runs of prompt and of answer, from the first prompt on."""
    runs = [[]]
    for number, (token, answer) in enumerate(zip(example.input_ids, example.decode_rows, strict=True)):
        if number and answer != example.decode_rows[number - 1]:
            runs.append([])
        runs[-1].append(token)
    assert not example.decode_rows[0]
    return [tokenizer.decode(run) for run in runs]
