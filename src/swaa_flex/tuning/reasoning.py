"""Where the reasoning of a model ends and its answer begins: the marks that its chat template puts around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import regex

FIELDS = ("reasoning_content", "thinking", "reasoning")
"""What transformers and chat templates call the reasoning of a message."""


class Marks(NamedTuple):
    """What stands around reasoning and answer in the text that a model writes, as regular expressions.

    Attributes:
        opens: Begins reasoning.
        closes: Ends it, and begins the answer.
        ends: Ends the answer.
    """

    opens: str
    closes: str
    ends: str

    def split(self, text: str) -> tuple[str, str]:
        """Cuts a text into the reasoning, with its marks, and the answer.

        Reasoning that does not come to an end is no answer.

        Args:
            text: what a model wrote, with an opening that its prompt ended with put before it.

        Returns:
            The reasoning, empty if there is none; and the answer, empty if there is none.

        Examples:
            >>> KNOWN.split("<think>42? No.</think>43")
            ('<think>42? No.</think>', '43')
            >>> KNOWN.split("<think>42? Let me")
            ('<think>42? Let me', '')
        """
        begin = max((found.end() for found in regex.finditer(self.closes, text, _FLAGS)), default=0)
        if self.opened_in(text[begin:]):
            return text, ""
        end = regex.search(self.ends, text[begin:], _FLAGS)
        return text[:begin], text[begin : begin + end.start()] if end else text[begin:]

    def opened_in(self, text: str) -> bool:
        """Whether reasoning begins somewhere in the text."""
        return regex.search(self.opens, text, _FLAGS) is not None

    def closed_in(self, text: str) -> bool:
        """Whether reasoning ends somewhere in the text."""
        return regex.search(self.closes, text, _FLAGS) is not None

    def opening(self, prompt: str) -> str:
        """The mark with which a prompt ends that begins the reasoning, and whitespace after it; or the empty text."""
        found = regex.search(rf"(?:{self.opens})\s*\Z", prompt, _FLAGS)
        return str(found[0]) if found else ""


def marks_of(tokenizer: Any, template: Mapping[str, Any]) -> Marks:
    """The marks that a model puts around its reasoning.

    They are those of the tokenizer's response template, if it has one (transformers 5.13). Otherwise the chat template
    is shown a message with reasoning, and what it writes around it counts. `KNOWN` is for models without a chat
    template, and for templates that leave reasoning out.

    Args:
        tokenizer: of transformers.
        template: further arguments of `apply_chat_template`.
    """
    declared = None if "chat_template" in template else getattr(tokenizer, "response_template", None)
    return (_declared(declared) if declared else None) or _rendered(tokenizer, template) or KNOWN


_FLAGS = regex.DOTALL
_NEVER = "(?!)"
_NAME = r"(?i:\w+:)?(?i:think|thinking|thoughts?|reason|reasoning|scratchpad)(?::\w+)?"

KNOWN = Marks(
    opens=rf"""(?x:
        <\|?{_NAME}\|?> | ◁{_NAME}▷ | \[THINK\]         # <think>, <seed:think>, ◁think▷; of Mistral
        | <\|(?i:start|begin_of)_(?i:thinking|thought)\|>  # of Cohere
        | <\|channel\|>(?:analysis|commentary)\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>  # of gpt-oss
        | <\|channel>thought | <unused94>thought           # of Gemma 4 and MedGemma
        | <\|inner_prefix\|>                               # of Apertus
        | Here(?:'s|\ is)\ my\ thought\ process:           # of Granite 3.2
        | Here\ are\ my\ reasoning\ steps:                 # of Apriel
    )""",
    closes=rf"""(?x:
        (?: <\|?/{_NAME}\|?> | ◁/{_NAME}▷ | \[/THINK\] | <\|(?i:end|end_of)_(?i:thinking|thought)\|>
          | <channel\|> | <unused95> | <\|inner_suffix\|> )
        (?:\s* (?: <\|START_RESPONSE\|> | <(?:response|answer)> ))?
        | <\|channel\|>final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>
        | Here(?:'s|\ is)\ my\ response: | \[BEGIN\ FINAL\ RESPONSE\]
    )""",
    ends=r"<\|(?:end|return|END_RESPONSE)\|>|</(?:response|answer)>|\[END FINAL RESPONSE\]",
)
"""The usual marks, where a tokenizer does not say which they are."""


def _declared(spec: Mapping[str, Any]) -> Marks | None:
    """The marks of a response template of transformers."""
    fields = spec.get("fields", {})
    reasoning = next((fields[name] for name in FIELDS if name in fields), None)
    if reasoning is None:
        return None
    content = fields.get("content", {})
    opens, closes = _declared_mark(reasoning, "open"), _declared_mark(reasoning, "close")
    closes = _declared_mark(content, "open") or closes  # more may stand between them, such as another role header
    if not opens or not closes:
        return None
    return Marks(opens, closes, _declared_mark(content, "close") or _NEVER)


def _declared_mark(field: Mapping[str, Any], side: str) -> str:
    literals = field.get(side, [])
    literals = [literals] if isinstance(literals, str) else literals
    return str(field.get(f"{side}_pattern", "")) or "|".join(regex.escape(literal) for literal in literals)


_QUESTION, _REASONING, _ANSWER = "QUESTION-OF-THE-USER", "REASONING-OF-THE-ASSISTANT", "ANSWER-OF-THE-ASSISTANT"
_BLOCK = {"type": "text", "text": _ANSWER}
_REASONED: tuple[dict[str, Any], ...] = (
    {"content": _ANSWER, **dict.fromkeys(FIELDS, _REASONING)},
    {"content": [{"type": "thinking", "thinking": _REASONING}, _BLOCK]},  # of Mistral
)
"""Forms in which chat templates take an answer with its reasoning."""

_USER = {"role": "user", "content": _QUESTION}
_TAG = regex.compile(r"<[^<>]*>|\[[^\[\]]*\]|◁[^◁▷]*▷")
_PARTS = regex.compile(rf"{_TAG.pattern}|(?:(?!{_TAG.pattern}).)+", regex.DOTALL)  # tags, and what is between them
_PRINTED = regex.compile(r"""['"]type['"]""")  # a template that does not know of blocks prints the list of them


def _rendered(tokenizer: Any, template: Mapping[str, Any]) -> Marks | None:
    """The marks that a chat template writes around reasoning and answer, if it shows both."""

    def rendered(*messages: Mapping[str, Any], ask: bool = False, thinks: bool = True) -> str:
        switches = {"enable_thinking": thinks, "thinking": thinks}
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=ask, **{**template, **switches}
                )
            )
        except Exception:  # templates raise what they like on a form that is not theirs
            return ""

    prompts = [rendered(_USER, ask=True, thinks=thinks) for thinks in (True, False)]
    plain = rendered(_USER, {"role": "assistant", "content": _ANSWER}).partition(_ANSWER)[0]
    for form in _REASONED:
        before, reasoned, after = rendered(_USER, {"role": "assistant", **form}).partition(_REASONING)
        between, answered, behind = after.partition(_ANSWER)
        if not (reasoned and answered and between.strip()) or _PRINTED.search(between):
            continue
        opens = _opening(prompts, before, between)
        if not opens:
            continue
        # An answer without reasoning may have a mark of its own, as the last part of what stands between the two.
        direct = [mark for mark in _written_after(prompts, plain) if between.strip().endswith(mark)]
        closes = min(direct, key=len, default=between.strip())
        tag = _TAG.match(behind.lstrip())
        return Marks(_as_written(opens), _as_written(closes), _as_written(tag[0]) if tag else _NEVER)
    return None


def _opening(prompts: Sequence[str], before: str, between: str) -> str:
    """The mark that opens reasoning, which the template may write into the prompt, or leave to the model.

    Args:
        prompts: of a model that is to think, and of one that is not to.
        before: what stands before the reasoning in a conversation.
        between: what stands between the reasoning and the answer.
    """
    by_model = _written_after(prompts, before)
    if by_model:
        return min(by_model, key=len)
    in_prompt = _written_after([before], prompts[0])  # and left out of the conversation
    if in_prompt and not in_prompt[0].startswith(between.strip()):
        return in_prompt[0]
    # What the other prompt does not have there; or the last tag, if it opens reasoning too, and closes it at once.
    own, other = (_PARTS.findall(text.rpartition(_QUESTION)[2]) for text in (before, prompts[1]))
    shared = sum(1 for _ in takewhile(lambda parts: parts[0] == parts[1], zip(own, other, strict=False)))
    differing = "".join(own[shared:]).strip()
    tags = [part for part in own if part.strip()][-1:]
    return differing or next((tag for tag in tags if _TAG.fullmatch(tag)), "")


def _written_after(starts: Iterable[str], text: str) -> list[str]:
    """What a text has after those starts that it begins with, where that is more than whitespace."""
    rests = [text[len(start) :].strip() for start in starts if start and text.startswith(start)]
    return [rest for rest in rests if rest]


def _as_written(mark: str) -> str:
    """A mark as a regular expression; a model may lay it out in another way."""
    return r"\s*".join(regex.escape(part) for part in mark.split())
