"""Where reasoning ends, by what a tokenizer says: its response template, its chat template, or the usual marks."""

import pytest
from tiny_tokenizers import CHANNELS, CHATML, HYBRID, THINKING, byte_tokenizer, chat, texts

from swaa_flex import ConfigError
from swaa_flex.evaluation.judges import exact, substring
from swaa_flex.evaluation.prompts import ask
from swaa_flex.evaluation.sample import Sample
from swaa_flex.tuning.data import encode, opened_thinking
from swaa_flex.tuning.reasoning import KNOWN, marks_of

# Chat templates that show reasoning: what they write before it, between it and the answer, and after the answer.
SHOWN = {
    "tags": ("<think>\n", "\n</think>\n\n", "<|im_end|>\n"),
    "tags of another name": ("<mind:inner>", "</mind:inner>", "<|im_end|>\n"),
    "square brackets": ("[MUSE]", "[/MUSE]", "<|im_end|>"),
    "tags around the answer too": ("<mull>\n", "\n</mull>\n<reply>\n", "\n</reply>\n<|im_end|>"),
    "tokens": ("<|ponder_begin|>", "<|ponder_end|>", "<|im_end|>"),
    "a heading": ("Let me see:\n", "\nI conclude:\n", "<|im_end|>"),
    "channels": (
        "<|channel|>analysis<|message|>",
        "<|im_end|><|im_start|>assistant<|channel|>final<|message|>",
        "<|im_end|>",
    ),
}


def shows(before, between, after, header="<|im_start|>assistant", field="reasoning_content"):
    """A chat template that writes reasoning, and an answer without it as the last part of `between` says."""
    direct = "<|channel|>final<|message|>" if "<|channel|>" in before else ""
    return (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        f"{{{{ {header!r} }}}}{{% if m['{field}'] is defined %}}{{{{ {before!r} + m['{field}'] + {between!r} }}}}"
        f"{{% else %}}{{{{ {direct!r} }}}}{{% endif %}}{{{{ m['content'] + {after!r} }}}}"
        "{% else %}{{ '<|im_start|>' + m['role'] + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {header!r} }}}}{{% endif %}}"
    )


def judged(tokenizer, answer, right="42", judge=exact, style="direct"):
    asked = ask(tokenizer, chat("6 * 7?"), style, {})
    return judge(answer, Sample("0", asked.ids, answers=(right,), opening=asked.opening, marks=asked.marks))


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize(("before", "between", "after"), SHOWN.values(), ids=SHOWN)
def test_the_chat_template_says_where_reasoning_ends(before, between, after, field):
    tokenizer = byte_tokenizer(shows(before, between, after, field=field))
    end = after.partition("<|im_end|>")[0]  # generation stops at the token
    assert judged(tokenizer, f"{before}41? No.{between}42{end}") == 1
    assert judged(tokenizer, f"{before}42? No.{between}43{end}", judge=substring) == 0
    assert judged(tokenizer, f"{before}42? Let me", judge=substring) == 0
    assert judged(tokenizer, f"{before}1{between.replace(chr(10), '')}42{end}") == 1  # laid out in another way
    assert judged(tokenizer, "42") == 1
    assert judged(tokenizer, f"{before}41{between}43{before}42", judge=substring) == 0  # it thinks again


def test_an_answer_without_reasoning_has_a_mark_of_its_own():
    tokenizer = byte_tokenizer(shows(*SHOWN["channels"]))
    assert judged(tokenizer, "<|channel|>final<|message|>42") == 1
    again = "<|channel|>analysis<|message|>42?<|im_end|><|im_start|>assistant<|channel|>analysis<|message|>No."
    assert judged(tokenizer, again, judge=substring) == 0
    assert judged(tokenizer, f"{again}<|im_end|><|im_start|>assistant<|channel|>final<|message|>42") == 1


@pytest.mark.parametrize("other", ["", "</mind>", "<mind>\n\n</mind>\n\n"])
def test_reasoning_that_the_prompt_opens_is_found(other):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['reasoning_content'] is defined %}"
        "{{ '<mind>\n' + m['reasoning_content'] + '\n</mind>\n\n' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        f"{{{{ '<mind>\n' if enable_thinking is not defined or enable_thinking else {other!r} }}}}{{% endif %}}"
    )
    tokenizer = byte_tokenizer(template)
    assert opened_thinking(tokenizer, chat("6 * 7?")) == "<mind>\n"
    assert opened_thinking(tokenizer, chat("6 * 7?"), enable_thinking=False) == ""
    assert judged(tokenizer, "41?\n</mind>\n\n42", style="cot") == 1
    assert judged(tokenizer, "42, or else", judge=substring, style="cot") == 0
    _, answer, _ = texts(tokenizer, encode(tokenizer, chat("6 * 7?", "<mind>\n41?\n</mind>\n\n42")))
    assert answer == "41?\n</mind>\n\n42<|im_end|>"
    with pytest.raises(ConfigError, match=r"never closes it; write answers with their thinking \(<mind>\.\.\.\)"):
        encode(tokenizer, chat("6 * 7?", "42"))


def test_a_template_that_takes_reasoning_as_a_block_of_the_content_is_asked_so():
    block = "{{ '[MUSE]' + b['thinking'] + '[/MUSE]' if b['type'] == 'thinking' else b['text'] }}"
    content = f"{{% for b in m['content'] %}}{block}{{% endfor %}}"
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}"
        f"{{% if m['content'] is string %}}{{{{ m['content'] }}}}{{% else %}}{content}{{% endif %}}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    assert judged(tokenizer, "[MUSE]41?[/MUSE]42") == 1
    assert judged(tokenizer, "[MUSE]42?", judge=substring) == 0


DECLARED = {
    "one mark": (
        {"thinking": {"open": "<mull>", "close": "</mull>"}, "content": {"close": "<|im_end|>"}},
        "<mull>",
        "</mull>",
    ),
    "alternatives": (
        {"reasoning_content": {"open": ["<mull>", "<brood>"], "close": ["</mull>", "</brood>"]}, "content": {}},
        "<brood>",
        "</brood>",
    ),
    "patterns": (
        {"reasoning": {"open_pattern": r"<mull \d+>", "close_pattern": r"</mull \d+>\s*"}, "content": {}},
        "<mull 3>",
        "</mull 3>\n",
    ),
    "an answer that is opened": (
        {
            "thinking": {"open": "<|channel|>analysis<|message|>", "close": "<|im_end|>"},
            "content": {"open": "<|channel|>final<|message|>", "close": ["<|return|>", "<|im_end|>"]},
        },
        "<|channel|>analysis<|message|>",
        "<|im_end|><|im_start|>assistant<|channel|>final<|message|>",
    ),
}


@pytest.mark.parametrize(("fields", "opens", "closes"), DECLARED.values(), ids=DECLARED)
def test_a_response_template_says_where_reasoning_ends(fields, opens, closes):
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.response_template = {"start_anchor": "<|im_start|>assistant\n", "fields": fields}
    # The parser of transformers, which such templates are for, is the reference.
    for text, said in ((f"{opens}41?{closes}42", "42"), (f"{opens}42?", "")):
        assert tokenizer.parse_response(text, prefix="").get("content", "") == said
        assert marks_of(tokenizer, {}).split(text)[1] == said
    assert judged(tokenizer, f"{opens}42? No{closes}43", right="43") == 1


def test_a_response_template_without_reasoning_says_nothing_of_it():
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.response_template = {"start_anchor": "x", "fields": {"content": {"close": "<|im_end|>"}}}
    assert marks_of(tokenizer, {}) == KNOWN


@pytest.mark.parametrize("template", [None, CHATML, HYBRID, THINKING, CHANNELS], ids=lambda t: (t or "none")[-40:])
def test_the_usual_marks_are_for_templates_that_leave_reasoning_out(template):
    assert marks_of(byte_tokenizer(template), {}) == KNOWN


# A template that does not know of blocks prints them, which says nothing about how the model writes.
@pytest.mark.parametrize("printed", ["m['content'] | string", "m['content'] | tojson"])
def test_blocks_that_are_only_printed_are_no_marks(printed):
    template = CHATML.replace("m['content']", printed)
    assert marks_of(byte_tokenizer(template), {}) == KNOWN


@pytest.mark.parametrize(
    ("opens", "closes"),
    [
        ("<think>", "</think>"),
        ("<Thinking>", "</Thinking>"),
        ("<seed:think>", "</seed:think>"),
        ("<think:opensource>", "</think:opensource>"),
        ("<reasoning>\n", "\n</reasoning>\n<answer>"),
        ("<thought>", "</thought>"),
        ("◁think▷", "◁/think▷"),
        ("[THINK]", "[/THINK]"),
        ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        ("<|channel|>commentary to=x <|constrain|>json<|message|>", "<|call|><|channel|>final<|message|>"),
        ("<|channel>thought\n", "<channel|>"),
        ("<|inner_prefix|>", "<|inner_suffix|>"),
        ("Here is my thought process:\n", "\nHere is my response:\n"),
        ("Here are my reasoning steps:\n", "\n[BEGIN FINAL RESPONSE]\n"),
    ],
)
def test_the_usual_marks(opens, closes):
    sample = Sample("0", (), answers=("42",))
    assert exact(f"{opens}41?{closes}42", sample) == 1
    assert substring(f"{opens}42?{closes}43", sample) == 0
    assert substring(f"{opens}42? Let me", sample) == 0


@pytest.mark.parametrize("text", ["I think 42", "[Reasoning] 6 * 7 = 42", "x < think > 42", "the channel 42"])
def test_words_about_reasoning_are_no_marks(text):
    assert substring(text, Sample("0", (), answers=("42",))) == 1
