"""Fine-tuning data: rows of a file become samples, samples become tokens, tokens become batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, did_you_mean
from ..hf.labels import IGNORED
from .reasoning import Marks, marks_of

ROLES = ("system", "developer", "user", "assistant", "tool")
DATE = datetime(2025, 1, 1)
"""The day in every prompt whose chat template writes the date: a run that goes on later has the same tokens."""


@dataclass(frozen=True)
class Sample:
    """A conversation, and what is known about its right answer.

    Attributes:
        messages: Chat messages, dicts of `role` and `content`; the last one may be the assistant's or not.
        answer: The reference answer, if there is one.
        question: The question without the text around it, if the file has it.
        row: Number of the row in the file, from 0.
    """

    messages: tuple[dict[str, str], ...]
    answer: str | None
    question: str | None
    row: int

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        """The messages without an assistant's last one: what is to be answered."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages


@dataclass(frozen=True)
class Example:
    """The tokens of a conversation, and which of them the model is to write itself.

    Attributes:
        input_ids: `[len]`.
        decode_rows: `[len]`, True for the tokens of the assistant's answers up to and including the one that ends the
            turn. These are the decode rows of generation; all others are read as part of a prompt.

    Examples:
        >>> Example(input_ids=[5, 6, 7], decode_rows=[False, True, True]).labels
        [-100, 6, 7]
    """

    input_ids: list[int]
    decode_rows: list[bool]

    @property
    def labels(self) -> list[int]:
        """`[len]`, the token where it is a decode row, else -100."""
        return [token if answer else IGNORED for token, answer in zip(self.input_ids, self.decode_rows, strict=True)]


def read_samples(path: str | Path) -> tuple[list[Sample], list[str]]:
    """Reads fine-tuning or distillation data.

    A row has either `prompt` (all of the user's text) or `messages` (a list of `role` and `content`, which counts
    where a row has both), and may have `answer` (the reference) and `question`. Without `answer`, the reference is the
    assistant's message at the end of `messages`, if there is one. Other columns are not looked at.

    Args:
        path: a `.jsonl` file, a `.json` file that holds a list, or a `.parquet` file.

    Returns:
        The samples in order, and a line for each row that is none: its number, from 0, and what is wrong with it.

    Raises:
        ConfigError: if the file is of another kind or has no usable row; says what was found and expected.
        ImportError: if the file is parquet and pyarrow is missing.
    """
    file = Path(path)
    columns: dict[str, None] = {}
    samples: list[Sample] = []
    bad: list[str] = []
    for number, row in enumerate(_rows(file, _COLUMNS)):
        if row is _BLANK:
            continue
        if isinstance(row, dict):
            columns.update(dict.fromkeys(row))
        try:
            samples.append(_sample(row, number))
        except _BadRowError as error:
            bad.append(f"row {number}: {error}")
    if samples:
        return samples, bad
    if not bad:
        raise ConfigError(f"{path} is empty; expected one row per conversation")
    if columns and not columns.keys() & {"prompt", "messages"}:
        raise ConfigError(
            f"{path}: found columns {', '.join(columns)}, expected 'prompt' (text) or 'messages' (a list of role and "
            "content), with 'answer' and 'question' if there are any; rename the columns"
        )
    raise ConfigError(f"{path}: none of its {len(bad)} rows can be used; correct them. The first: {bad[0]}")


def prompt_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], **template: Any) -> list[int]:
    """The tokens a model is given when it is to answer.

    That is the chat template with its generation prompt, applied once. If it writes the date, that is 1 January 2025,
    on any day. A tokenizer without a template gets the contents joined by newlines, with the special tokens that it
    adds to any text.

    Args:
        tokenizer: of transformers.
        messages: the conversation up to the answer.
        template: further arguments of `apply_chat_template`, such as `enable_thinking=False`.

    Returns:
        Token ids `[len]`.

    Raises:
        ConfigError: if the messages are malformed or the template refuses them.
    """
    _check(messages)
    return _prompt_tokens(tokenizer, _prompt_text(tokenizer, messages, template), template)


def opened_thinking(tokenizer: Any, messages: Sequence[Mapping[str, str]], **template: Any) -> str:
    """The mark of a thinking block with which a prompt ends, such as `"<think>"`, and whitespace; or the empty text.

    A model does not write it again, so it is missing from what `generate` returns. Which mark it is, the tokenizer
    says (`swaa_flex.tuning.reasoning`).

    Args:
        tokenizer: of transformers.
        messages: the conversation up to the answer.
        template: further arguments of `apply_chat_template`.

    Raises:
        ConfigError: as `prompt_ids`.
    """
    _check(messages)
    return marks_of(tokenizer, template).opening(_prompt_text(tokenizer, messages, template))


def encode(tokenizer: Any, messages: Sequence[Mapping[str, str]], **template: Any) -> Example:
    """The tokens of a conversation in which the assistant has the last word, with its answers as decode rows.

    What comes before an answer is what generation sees there, token by token: `prompt_ids` of the messages before it.
    The answer is its content as written, a thinking block included, then what the template ends an answer with. Only
    an opening that the template writes on both sides is not doubled: a `<think>` that the generation prompt already
    holds, or a prefix of answers that is not part of the generation prompt, which is added where it is missing.

    Args:
        tokenizer: of transformers.
        messages: the conversation; the last message is the assistant's.
        template: further arguments of `apply_chat_template`, such as `enable_thinking=False`.

    Returns:
        The example. What the template writes after the token that ends the turn, usually a newline, belongs to the
        next prompt.

    Raises:
        ConfigError: if the messages are malformed or do not end with an answer; if the template refuses them, or does
            not end answers with a special token; or if it renders an earlier answer differently once later messages
            follow, as templates of thinking models do: then no single row is what generation sees (`encode_each`).
    """
    _check(messages, answered=True)
    return _encode(tokenizer, messages, _answers(messages), template)


def encode_each(tokenizer: Any, messages: Sequence[Mapping[str, str]], **template: Any) -> list[Example]:
    """One example per answer of a conversation: the answer is decode rows, all before it is its prompt.

    For templates that show the model earlier answers in another form than the one it wrote, which `encode` refuses.
    Costs the tokens of the earlier turns once more per answer.

    Args:
        tokenizer: of transformers.
        messages: the conversation; the last message is the assistant's.
        template: further arguments of `apply_chat_template`.

    Raises:
        ConfigError: as `encode`, but for the last reason.
    """
    _check(messages, answered=True)
    return [_encode(tokenizer, messages, [turn], template) for turn in _answers(messages)]


def choices(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], answers: Sequence[str], **template: Any
) -> tuple[list[int], list[list[int]]]:
    """The tokens of a prompt and of several answers to it, whose likelihoods are to be compared.

    Answers begin where the model would begin them. What the template writes between its generation prompt and an
    answer, such as a newline or an empty thinking block, is no part of them, and so belongs to the prompt here. They
    have no token that ends them.

    Args:
        tokenizer: of transformers.
        messages: the conversation up to the answer.
        answers: texts. Without a chat template a blank is put before each.
        template: further arguments of `apply_chat_template`.

    Returns:
        Token ids of the prompt `[len]`, and those of each answer.

    Raises:
        ConfigError: as `prompt_ids`; or if the template has the model think before it answers.
    """
    _check(messages)
    prompt = _prompt_text(tokenizer, messages, template)
    tokens = _prompt_tokens(tokenizer, prompt, template)
    opening = _around(tokenizer, messages, prompt, template)[0] if _templated(tokenizer, template) else " "
    if marks_of(tokenizer, template).opening(prompt + opening):
        raise ConfigError(
            "the chat template has the model think before it answers, so that choices would be scored as thoughts; "
            "take template={'enable_thinking': False} if it knows of that, or another chat_template="
        )
    before = opening.rstrip(" ")  # blanks may be one token with the word after them
    tokens += _after(tokenizer, prompt, tokens, before, template)
    prompt += before
    texts = [opening[len(before) :] + answer for answer in answers]
    return tokens, [_after(tokenizer, prompt, tokens, text, template) for text in texts]


def fit(examples: Sequence[Example], max_length: int) -> tuple[list[Example], list[str]]:
    """Leaves out the examples that are too long, for a part of one would have no question or no answer.

    Args:
        examples: any.
        max_length: tokens that an example may have.

    Returns:
        The others in order, and a line for each that was left out.

    Raises:
        ConfigError: if `max_length` is not positive.

    Examples:
        >>> kept, dropped = fit([Example([5, 6, 7], [False, True, True]), Example([8, 9], [False, True])], 2)
        >>> len(kept), dropped
        (1, ['example 0: 3 tokens, more than max_length=2'])
    """
    if max_length < 1:
        raise ConfigError(f"max_length={max_length}: expected at least 1 token")
    kept = [example for example in examples if len(example.input_ids) <= max_length]
    dropped = [
        f"example {number}: {len(example.input_ids)} tokens, more than max_length={max_length}"
        for number, example in enumerate(examples)
        if len(example.input_ids) > max_length
    ]
    return kept, dropped


def unreadable(config: Any, tokens: Sequence[int], new_tokens: int = 0) -> str | None:
    """Says why a model cannot read a text and go on from there, None if it can.

    Args:
        config: the model's, one of transformers.
        tokens: token ids `[len]`.
        new_tokens: how many tokens the model is to write after them.
    """
    text = config.get_text_config()
    if not tokens:
        return "it has no tokens"
    lowest, highest = min(tokens), max(tokens)
    if lowest < 0 or highest >= text.vocab_size:
        return f"token ids from {lowest} to {highest}, and the model has {text.vocab_size}"
    positions = getattr(text, "max_position_embeddings", None)
    rotary = getattr(text, "rope_parameters", None) is not None  # goes on beyond the longest text of the training
    if positions is not None and not rotary and len(tokens) + new_tokens > positions:
        written = f" and {new_tokens} to be written" if new_tokens else ""
        return f"{len(tokens)} tokens{written}, and the model has {positions} positions"
    return None


@dataclass(frozen=True)
class Collator:
    """Makes a batch of examples, padded or packed.

    Called with a list of examples (`Example`, or dicts with `input_ids`, `decode_rows` and, if they differ from the
    decode rows, `labels`) it returns tensors. Padded: `input_ids`, `attention_mask`, `labels` and `decode_rows`
    `[batch, len]`. Packed: `input_ids`, `position_ids` (from 0 in each example), `labels` and `decode_rows`
    `[1, tokens]`; the first token of an example has no label, since what comes before it is another example.

    Attributes:
        pad_token_id: Token for the padding.
        padding_side: "right" or "left".
        packing: One row without padding instead of one row per example.

    Raises:
        ConfigError: if there is no pad token, or no such side.

    Examples:
        >>> batch = Collator(pad_token_id=0)([Example([5, 6, 7], [False, True, True]), Example([8, 9], [False, True])])
        >>> batch["labels"].tolist()
        [[-100, 6, 7], [-100, 9, -100]]
    """

    pad_token_id: int
    padding_side: str = "right"
    packing: bool = False

    def __post_init__(self) -> None:
        if self.pad_token_id is None:
            raise ConfigError(
                "pad_token_id=None: expected a token id; take tokenizer.eos_token_id if the tokenizer has no pad token"
            )
        if self.padding_side not in ("right", "left"):
            raise ConfigError(
                f"padding_side={self.padding_side!r}: expected 'right' or 'left'"
                f"{did_you_mean(self.padding_side, ('right', 'left'))}"
            )

    def __call__(self, examples: Sequence[Example | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Returns the batch."""
        rows = [_columns(example) for example in examples]
        return self._packed(rows) if self.packing else self._padded(rows)

    def _padded(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED, "decode_rows": False}
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, row: dict[str, list[int]]) -> list[int]:
            pads = [fill[name]] * (longest - len(row[name]))
            return row[name] + pads if self.padding_side == "right" else pads + row[name]

        for row in rows:
            row["attention_mask"] = [1] * len(row["input_ids"])
        return {name: torch.tensor([padded(name, row) for row in rows]) for name in fill}

    def _packed(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        for row in rows:
            row["position_ids"] = list(range(len(row["input_ids"])))
            row["labels"][:1] = [IGNORED]
        names = ("input_ids", "position_ids", "labels", "decode_rows")
        return {name: torch.tensor([list(chain.from_iterable(row[name] for row in rows))]) for name in names}


def _columns(example: Example | Mapping[str, Any]) -> dict[str, list[int]]:
    """Lists of the collator's own."""
    if isinstance(example, Example):
        columns: Mapping[str, Any] = {"labels": example.labels, **vars(example)}
    else:
        derived = Example(list(example["input_ids"]), list(example["decode_rows"]))
        columns = {"labels": derived.labels, **example}
    return {name: list(columns[name]) for name in ("input_ids", "decode_rows", "labels")}


# --- rows of a file ------------------------------------------------------------------------------------------


_BLANK = object()
_COLUMNS = ("prompt", "messages", "answer", "question")


class _BadRowError(Exception):
    """What is wrong with a row."""


def _rows(file: Path, columns: Sequence[str]) -> Iterator[object]:
    """The rows of a file in order: what JSON holds, `_BLANK`, or a `_BadRowError`.

    Args:
        file: its suffix says which kind it is.
        columns: what is looked at. Others may be missing from the rows, or be None in them.
    """
    if file.suffix == ".parquet":
        return _parquet(file, columns)
    if file.suffix not in _READERS:
        kinds = ", ".join((*_READERS, ".parquet"))
        raise ConfigError(f"{file}: expected a file that ends in {kinds}; convert it, one row per conversation")
    return _READERS[file.suffix](file)


def _jsonl(file: Path) -> Iterator[object]:
    with file.open("rb") as lines:
        for line in lines:
            try:
                yield json.loads(line) if line.strip() else _BLANK
            except (ValueError, RecursionError) as error:
                yield _BadRowError(f"no JSON ({error})")


def _json(file: Path) -> Iterator[object]:
    try:
        rows = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file}: no JSON ({error}); a file with one JSON object per line must end in .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise ConfigError(f"{file}: expected a JSON list of rows, got {_kind(rows)}; put the rows into one list")
    yield from rows


def _parquet(file: Path, columns: Sequence[str]) -> Iterator[object]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{file}: reading parquet takes pyarrow: pip install 'swaa-flex[eval]'") from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            wanted = [name for name in names if name in columns]
            for name in wanted:
                if wanted.count(name) > 1:
                    times = wanted.count(name)
                    raise ConfigError(f"{file}: column {name!r} is there {times} times; rename the others")
            for batch in table.iter_batches(batch_size=64, columns=wanted):
                for place in range(batch.num_rows):
                    yield _parquet_row(batch, place, dict.fromkeys(names))
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(
            f"{file}: not a parquet file, or damaged ({error}); write it again, or take .jsonl"
        ) from error


def _parquet_row(batch: Any, place: int, row: dict[str, Any]) -> object:
    """Fills in a row of a batch. A value that cannot be read is a fault of this row only."""
    for name in batch.schema.names:
        try:
            row[name] = batch.column(name)[place].as_py()
        except (ValueError, OverflowError) as error:  # no UTF-8, or nothing that Python has, such as the year 10000
            return _BadRowError(f"{name} cannot be read ({error})")
    return row


_READERS = {".jsonl": _jsonl, ".json": _json}


def _sample(row: object, number: int) -> Sample:
    if isinstance(row, _BadRowError):
        raise row
    if not isinstance(row, dict):
        raise _BadRowError(f"expected an object with 'prompt' or 'messages', got {_kind(row)}")
    answer, question = (_optional(row.get(name), name) for name in ("answer", "question"))
    if row.get("messages") is None:
        if row.get("prompt") is None:
            raise _BadRowError("neither 'prompt' nor 'messages'")
        return Sample(({"role": "user", "content": _text(row["prompt"], "prompt")},), answer, question, number)
    if not isinstance(row["messages"], list):
        raise _BadRowError(f"messages is {_kind(row['messages'])}, expected a list of role and content")
    messages = tuple(_message(message, place) for place, message in enumerate(row["messages"]))
    if all(message["role"] == "assistant" for message in messages):
        raise _BadRowError("messages holds nothing to be answered")
    if messages[-1]["role"] == "assistant":
        answer = answer or messages[-1]["content"]
    return Sample(messages, answer, question, number)


_EMPTY: tuple[object, ...] = (None, "", [], {})


def _message(message: object, place: int) -> dict[str, str]:
    name = f"message {place}"
    if not isinstance(message, Mapping):
        raise _BadRowError(f"{name} is {_kind(message)}, expected role and content")
    # Parquet fills in nulls, and other writers empty lists. Any other field would change what the template writes, so
    # it is not passed over.
    others = [key for key, value in message.items() if key not in ("role", "content") and value not in _EMPTY]
    if others:
        raise _BadRowError(f"{name} has {', '.join(map(repr, others))}; expected role and content only")
    role = message.get("role")
    if role not in ROLES:
        raise _BadRowError(f"{name} has role {role!r}, expected one of {', '.join(ROLES)}{did_you_mean(role, ROLES)}")
    return {"role": role, "content": _text(message.get("content"), f"content of {name}")}


def _text(value: object, name: str) -> str:
    if value is None:
        raise _BadRowError(f"{name} is missing")
    if not isinstance(value, str):
        raise _BadRowError(f"{name} is {_kind(value)}, expected text")
    if not value.strip():
        raise _BadRowError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRowError(f"{name} is no valid Unicode ({error.reason})") from error
    return value


def _optional(value: object, name: str) -> str | None:
    return None if value is None or value == "" else _text(value, name)


def _kind(value: object) -> str:
    kinds = {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        bytes: "bytes",
        list: "a list",
    }
    return kinds.get(type(value), "an object")


# --- tokens --------------------------------------------------------------------------------------------------

_ANSWER = "\ue000answer\ue000"
"""Stands in for an answer when the template is asked what it writes around one."""

_CODES = [f"%{flag}{code}" for flag in ("", "-") for code in "aAbBcdefhHIjmMpRSTuUVwWxXyYzZDFG"]
# The function that transformers gives to templates, defined anew by a template that is put before theirs: a function
# cannot be passed to one, since of what is passed transformers 5.24 leaves only plain data.
_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace({code!r}, {DATE.strftime(code)!r})" for code in _CODES)
    + " }}{% endmacro %}\n"
)


def _check(messages: Sequence[Mapping[str, str]], *, answered: bool = False) -> None:
    try:
        for place, message in enumerate(messages):
            _message(message, place)
    except _BadRowError as error:
        raise ConfigError(f"messages: {error}") from error
    if not messages:
        raise ConfigError("messages: there are none; expected at least a user's")
    if answered and messages[0]["role"] == "assistant":
        raise ConfigError(
            "messages: the first one has role 'assistant', expected a prompt before each answer; add one"
        )
    if answered and messages[-1]["role"] != "assistant":
        raise ConfigError(
            f"messages: the last one has role {messages[-1]['role']!r}, expected 'assistant': there is no answer to "
            "learn from behind it; add one, or leave the message out"
        )


def _answers(messages: Sequence[Mapping[str, str]]) -> list[int]:
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def _encode(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], turns: Sequence[int], template: Mapping[str, Any]
) -> Example:
    """With the answers at `turns`, in order, as decode rows, up to and including the last of them."""
    prompts = [_prompt_text(tokenizer, messages[:turn], template) for turn in turns]
    ids: list[int] = []
    rows: list[bool] = []
    for number, (turn, prompt) in enumerate(zip(turns, prompts, strict=True)):
        tokens = _prompt_tokens(tokenizer, prompt, template)
        later = prompts[number + 1] if number + 1 < len(prompts) else prompt
        if tokens[: len(ids)] != ids or not later.startswith(prompt):
            changed = turns[number] if tokens[: len(ids)] == ids else turns[number - 1]
            raise ConfigError(
                f"message {changed}: the chat template shows this answer in another form to the turns after it "
                "(thinking is left out, for instance), so no single row is what generation sees; split the "
                "conversation into one sample per answer: encode_each"
            )
        answer, rest = _answer_tokens(tokenizer, messages[: turn + 1], prompt, tokens, template)
        rows += [False] * (len(tokens) - len(rows)) + [True] * len(answer) + [False] * len(rest)
        ids = tokens + answer + rest
    return Example(ids, rows)


def _answer_tokens(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    prompt: str,
    prompt_tokens: list[int],
    template: Mapping[str, Any],
) -> tuple[list[int], list[int]]:
    """The last message up to the token that ends the turn, and what the template writes after that."""
    opening, closing = _around(tokenizer, messages[:-1], prompt, template)
    around = marks_of(tokenizer, template)
    text = _as_generated(messages[-1]["content"], len(messages) - 1, prompt, opening, around) + closing
    marks = {token for token, added in tokenizer.added_tokens_decoder.items() if str(added).strip()}
    ends = [token for token in _tokens(tokenizer, closing) if token in marks | set(tokenizer.all_special_ids)]
    if not ends:
        raise ConfigError(
            f"the chat template ends answers with {closing!r}, which has no special token, so that a model could not "
            "learn to stop; take a template that writes tokenizer.eos_token after an answer"
        )
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    tokens = _after(tokenizer, prompt, prompt_tokens, text, template)
    length = len(tokens) - tokens[::-1].index(end)
    return tokens[:length], tokens[length:]


def _after(tokenizer: Any, prompt: str, prompt_tokens: list[int], text: str, template: Mapping[str, Any]) -> list[int]:
    """The tokens of a text that a model writes after a prompt."""
    whole = _prompt_tokens(tokenizer, prompt + text, template)
    # Tokens that reach across the end of the prompt cannot be generated.
    joined = whole[: len(prompt_tokens)] == prompt_tokens
    return whole[len(prompt_tokens) :] if joined else _tokens(tokenizer, text)


def _as_generated(content: str, place: int, prompt: str, opening: str, around: Marks) -> str:
    """What a model writes after the prompt when its answer is `content`."""
    opened = around.opening(prompt)
    if opened:
        if not around.closed_in(content):
            raise ConfigError(
                f"message {place}: the chat template opens a thinking block for the answer, which never closes it; "
                f"write answers with their thinking ({opened.strip()}...), or take a template that does not think"
            )
        return content.removeprefix(opened if content.startswith(opened) else opened.strip())
    # A template that writes a thinking block of its own before an answer (Qwen3) says how it shows one without, not
    # what the model wrote.
    if around.opened_in(opening) or content.startswith(opening[: opening.find(">") + 1] or opening):
        return content
    return opening + content


def _around(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], prompt: str, template: Mapping[str, Any]
) -> tuple[str, str]:
    """What the template writes between the generation prompt and an answer, and after the answer."""
    if not _templated(tokenizer, template):
        if tokenizer.eos_token is None:
            raise ConfigError("the tokenizer has no eos_token, so that answers would not end; set tokenizer.eos_token")
        return "", str(tokenizer.eos_token)
    answered = _render(tokenizer, [*messages, {"role": "assistant", "content": _ANSWER}], template, ask=False)
    before, found, closing = answered.rpartition(_ANSWER)
    if not found:
        raise ConfigError("the chat template does not write the content of an answer; take another template")
    return before[len(prompt) :] if before.startswith(prompt) else "", closing


def _prompt_text(tokenizer: Any, messages: Sequence[Mapping[str, str]], template: Mapping[str, Any]) -> str:
    if _templated(tokenizer, template):
        return _render(tokenizer, messages, template, ask=True)
    if template:
        raise ConfigError(
            f"{', '.join(template)}: the tokenizer has no chat template to give this to; set tokenizer.chat_template, "
            "or pass chat_template="
        )
    return "\n".join(message["content"] for message in messages)


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]], template: Mapping[str, Any], *, ask: bool) -> str:
    chat = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        text = tokenizer.get_chat_template(template.get("chat_template"))
        told = {**template, "chat_template": _CLOCK + text} if "strftime_now" in text else template
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask, **told))
    except Exception as error:  # a template is a program of others, which fails in any way
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(
            f"the chat template refuses messages of the roles {roles}: {error}; change the messages or pass "
            "another chat_template="
        ) from error


def _prompt_tokens(tokenizer: Any, text: str, template: Mapping[str, Any]) -> list[int]:
    """A chat template writes special tokens itself; other texts get those that the tokenizer adds."""
    return list(tokenizer(text, add_special_tokens=not _templated(tokenizer, template)).input_ids)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _templated(tokenizer: Any, template: Mapping[str, Any]) -> bool:
    return tokenizer.chat_template is not None or template.get("chat_template") is not None
