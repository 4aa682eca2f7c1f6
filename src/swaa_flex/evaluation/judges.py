"""Judges: how right an answer is, from 0 to 1.

Judges compare words: runs of letters and digits, without case, punctuation, emphasis and line ends. A number is one
word with its sign, its decimals and its thousands separators, so 1,234,567 is 1234567, and neither contains 234; so is
a time or a fraction, 1:30 or 5/7. In scripts without blanks between words, such as Chinese, Japanese, Thai and Khmer,
and in Korean, where endings are part of a word, each character is one.

Only what is said after the reasoning counts: after a thinking block, whose marks the model's tokenizer knows
(`swaa_flex.tuning.reasoning`), and where the prompt asked for it, after the last "Answer:". Reasoning that never comes
to an end is no answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import regex
import torch

from ..errors import ConfigError, did_you_mean
from ..hf import NAME
from ..hf.adapt import full_attention
from ..tuning.data import opened_thinking, prompt_ids
from ..tuning.identity import hashed, identity
from ..tuning.reasoning import marks_of
from .prompts import prepared
from .sample import Judge, Sample
from .scoring import stop_tokens


def exact(answer: str, sample: Sample) -> float:
    """1 if the answer is one of the right ones, articles aside, as in SQuAD (arXiv 1606.05250).

    Examples:
        >>> exact("**The Nile.**", Sample("0", (), answers=("Nile", "White Nile")))
        1.0
    """
    said = _without_articles(words(final(answer, sample)))
    return float(any(said and said == _without_articles(right) for right in _right(sample)))


def substring(answer: str, sample: Sample) -> float:
    """1 if any of the right answers occurs in the answer as whole words, whatever else it says.

    Examples:
        >>> substring("It is 1,234,567.", Sample("0", (), answers=("1234567",)))
        1.0
        >>> substring("It is 12345678.", Sample("0", (), answers=("1234567",)))
        0.0
    """
    said = words(final(answer, sample))
    return float(any(_holds(said, right) for right in _right(sample)))


def substring_all(answer: str, sample: Sample) -> float:
    """The share of the right answers that occur in the answer as whole words, as RULER scores (arXiv 2404.06654).

    1 means all of them. What else the answer says does not count against it.

    Examples:
        >>> substring_all("7 and 9", Sample("0", (), answers=("7", "8", "9", "10")))
        0.5
    """
    said = words(final(answer, sample))
    found = [_holds(said, right) for right in _right(sample)]
    return sum(found) / len(found) if found else 0.0


def token_f1(answer: str, sample: Sample) -> float:
    """F1 of the words that answer and right answer share, articles aside, as in SQuAD (arXiv 1606.05250).

    Of several right answers the one that fits best counts.

    Examples:
        >>> token_f1("in the summer of 1969", Sample("0", (), answers=("summer 1969",)))
        0.666...
    """
    said = _without_articles(words(final(answer, sample)))
    return max((_f1(said, _without_articles(right)) for right in _right(sample)), default=0.0)


def model_judge(
    model: Any, tokenizer: Any, *, new_tokens: int = 16, template: Mapping[str, Any] | None = None
) -> Judge:
    """A local model as judge: it is shown question, right answers and answer, and says yes or no.

    It reads with full attention, also where it is the adapted model that is being evaluated. An answer that is empty
    is wrong without asking; so is one on which the model says neither yes nor no.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: of this model.
        new_tokens: tokens that a verdict may have; more for a model that always thinks.
        template: further arguments of `apply_chat_template`; a model that can leave out its thinking does so unless
            they say otherwise.
    """
    return _ModelJudge(model, tokenizer, new_tokens, dict(template or {}))


def find(judge: str | Judge) -> Judge:
    """Returns the judge of a name, or the function that is one already.

    Raises:
        ConfigError: if there is no judge of that name, or the function has no name by which its verdicts can be kept.
    """
    if callable(judge):
        name_of(judge)
        return judge
    if judge not in _JUDGES:
        raise ConfigError(
            f"judge={judge!r}: expected {', '.join(_JUDGES)}, or a function of answer and sample"
            f"{did_you_mean(judge, _JUDGES)}"
        )
    return _JUDGES[judge]


def name_of(judge: Judge) -> str:
    """The name under which verdicts are kept: of two judges with the same name, the second gets those of the first.

    That is the attribute `name`, if the judge has one, else module and name of the function.

    Raises:
        ConfigError: if the judge has neither, as a lambda.
    """
    name = getattr(judge, "name", None)
    function = getattr(judge, "__qualname__", "<")
    if name is None and "<" in function:  # <lambda>, and functions made inside of others: <locals>
        raise ConfigError(
            f"judge={judge!r}: expected a function with a name of its own, by which its verdicts are kept; define it "
            "at the top of a module, or set its attribute `name`"
        )
    return f"{judge.__module__}.{function}" if name is None else str(name)


def final(answer: str, sample: Sample) -> str:
    """What an answer says in the end, after a thinking block and, if the sample asks for it, the last "Answer:".

    Returns:
        The text, empty if the reasoning does not come to an end.

    Examples:
        >>> final("<think>42? No.</think> It is 43.", Sample("0", ()))
        ' It is 43.'
        >>> final("6 * 7 is 42. Answer: 42", Sample("0", (), reasoned=True))
        ' 42'
    """
    thought, said = sample.marks.split(sample.opening + answer)
    if not sample.reasoned:
        return said
    pattern = _FINAL_LINE if _FINAL_LINE.search(said) else _FINAL
    *reasoning, last = pattern.split(said)
    return last if reasoning or thought else ""


def words(text: str) -> list[str]:
    """The words of a text, in the form in which judges compare them.

    Examples:
        >>> words("**Paris**, 1,234.5 km (not -3)")
        ['paris', '1234.5', 'km', 'not', '-3']
        >>> words("東京は1:30")
        ['東', '京', 'は', '1:30']
    """
    text = _THOUSANDS.sub(lambda number: re.sub(r"\D", "", number[0]), text)
    text = "".join(f" {char} " if unicodedata.category(char) == "No" else char for char in text)  # powers, fractions
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    for pattern, put in _SPELT:
        folded = pattern.sub(put, folded)
    spaced = _UNSPACED.sub(r" \g<0> ", folded)
    return _WORD.findall(_BETWEEN_WORDS.sub(" ", spaced))


_JUDGES: dict[str, Judge] = {
    "exact": exact,
    "substring": substring,
    "substring_all": substring_all,
    "token_f1": token_f1,
}

_FINAL = re.compile(r"\banswer(?:\s+is)?[\s*_]*[:\uff1a]", re.IGNORECASE)
_FINAL_LINE = re.compile(rf"^[\s*_#]*(?:the\s+)?(?:final\s+)?{_FINAL.pattern}", re.IGNORECASE | re.MULTILINE)
# What belongs to a word or number, in the form that `_WORD` finds.
_SPELT = (
    (re.compile(r"(?<![\w.])\.(?=\d)"), "0."),
    (re.compile(r"(?<!\S)-(\w{0,3}[$\u20ac\u00a3\u00a5])(?=\d)"), r"\1 -"),
    (re.compile(r"(?<![\d.,])(\d+),(\d)(?![\d,]|\.\d)"), r"\1.\2"),  # a decimal comma
    (re.compile(r"(?<=[a-z])\+\+"), "plusplus"),
    (re.compile(r"(?<=[a-z])#(?!\w)"), "sharp"),
)
# One separator throughout a number, between groups of three digits.
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}([,_'\u2019\u00a0\u2009\u202f])\d{3}(?:\1\d{3})*(?!\1?\d)")
# Characters of scripts whose words have no blanks between them: of East Asia, and those in which Unicode breaks lines
# by a dictionary (Thai, Lao, Khmer, Burmese, ...) or by syllables (Javanese, Balinese, ...), and Tibetan.
_UNSPACED = regex.compile(
    r"(?=[\p{L}\p{M}\p{N}])[\p{East_Asian_Width=W}\p{Line_Break=SA}\p{Line_Break=AK}\p{Line_Break=AP}\p{Line_Break=AS}"
    r"\p{Script=Tibetan}]\p{M}*"
)
# All but letters, digits, what `_WORD` splits at, and the signs of times and fractions.
_BETWEEN_WORDS = regex.compile(r"(?!(?<=\d)(?<!\d{3})[:/](?=\d)(?!\d{3}))[^\p{L}\p{M}\p{N}._-]")
_WORD = re.compile(
    r"""
    (?:(?<!\S)-(?=\d))?                             # a sign
    [^\s._-]+ (?: _+[^\s._-]+ | (?<=\d)\.(?=\d)[^\s._-]+ )*  # parts of a name, decimals
    """,
    re.VERBOSE,
)


def _right(sample: Sample) -> list[list[str]]:
    """The words of the right answers, which may be a model's, with reasoning."""
    return [words(sample.marks.split(right)[1]) for right in sample.answers]


def _holds(said: list[str], part: list[str]) -> bool:
    """Whether the words of `part` occur one after the other."""
    places = range(len(said) - len(part) + 1)
    return bool(part) and any(said[place : place + len(part)] == part for place in places)


def _without_articles(said: list[str]) -> list[str]:
    """Unless that is all there is."""
    return [word for word in said if word not in ("a", "an", "the")] or said


def _f1(said: list[str], right: list[str]) -> float:
    shared = (Counter(said) & Counter(right)).total()
    return 2 * shared / (len(said) + len(right)) if shared else 0.0


@dataclass(frozen=True)
class _ModelJudge:
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    new_tokens: int
    template: Mapping[str, Any]

    @cached_property
    def name(self) -> str:
        return f"model {hashed([identity(self.model), _VERDICT, self.new_tokens, self.template])}"

    def __call__(self, answer: str, sample: Sample) -> float:
        said = final(answer, sample).strip()
        if not said:
            return 0.0
        question = f"Question: {sample.question}\n\n" if sample.question else ""
        text = question + _VERDICT.format(right=" or ".join(sample.answers), answer=said)
        chat = [{"role": "user", "content": text}]
        messages, template = prepared(self.tokenizer, chat, "direct", self.template)
        opening = opened_thinking(self.tokenizer, messages, **template)
        written = self._written(prompt_ids(self.tokenizer, messages, **template))
        verdict = words(final(written, Sample("", (), opening=opening, marks=marks_of(self.tokenizer, template))))
        return float(next((word for word in verdict if word in ("yes", "no")), "no") == "yes")

    def _written(self, ids: list[int]) -> str:
        adapted = self.model.config._attn_implementation == NAME
        input_ids = torch.tensor([ids], device=self.model.device)
        stops = stop_tokens(self.model, self.tokenizer)
        with full_attention(self.model.config) if adapted else nullcontext():
            written = self.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=self.new_tokens,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=stops[0],
            )
        tokens = written[0, len(ids) :].tolist()
        end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
        # As written: the marks of a thinking block may be special tokens.
        return str(self.tokenizer.decode(tokens[:end], skip_special_tokens=False))


_VERDICT = (
    "Right answer: {right}\n\nAnswer to be judged: {answer}\n\nDoes the answer to be judged say the same as the right "
    "answer? Other words and more detail are fine; another fact, a refusal, or several different answers are not. "
    "Reply with yes or no."
)
