from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny
from tiny_tokenizers import CHATML, HYBRID, byte_tokenizer

import swaa_flex
from swaa_flex import ConfigError
from swaa_flex.evaluation.judges import (
    exact,
    final,
    find,
    model_judge,
    name_of,
    substring,
    substring_all,
    token_f1,
    words,
)
from swaa_flex.evaluation.sample import Sample
from swaa_flex.hf import NAME


def to(*answers, **fields):
    return Sample("0", (), answers=answers, **fields)


THINKS = {"opening": "<think>\n"}
REASONS = {"reasoned": True}
NUMBER = to("1234567")

# What was said, what is right, and the verdicts of exact and substring.
TRICKY = {
    "right": ("1234567", NUMBER, 1, 1),
    "in a sentence": ("The secret number is 1234567.", NUMBER, 0, 1),
    "wrong": ("7654321", NUMBER, 0, 0),
    "empty": ("", NUMBER, 0, 0),
    "blank": (" \n", NUMBER, 0, 0),
    "refusal": ("I'm sorry, I cannot find a number in the text.", NUMBER, 0, 0),
    "inside a longer number": ("91234567", NUMBER, 0, 0),
    "beginning of a longer number": ("12345678", NUMBER, 0, 0),
    "inside an identifier": ("id_1234567 or x1234567", NUMBER, 0, 0),
    "with decimals": ("1234567.5", NUMBER, 0, 0),
    "decimals of another": ("0.1234567", NUMBER, 0, 0),
    "end of a sentence": ("1234567.", NUMBER, 1, 1),
    "negative": ("-1234567", NUMBER, 0, 0),
    "typographic minus": ("\u22125", to("-5"), 1, 1),
    "not negative": ("5", to("-5"), 0, 0),
    "range": ("3-5", to("5"), 0, 1),
    "several numbers, one of them right": ("7654321, 1234567 or 1111111", NUMBER, 0, 1),
    "several numbers, none right": ("7654321, 1111111", NUMBER, 0, 0),
    "digits cut off": ("123456", NUMBER, 0, 0),
    "digits apart": ("1 2 3 4 5 6 7", NUMBER, 0, 0),
    "list without blanks": ("7654321,1234567", NUMBER, 0, 1),
    "thousands separators": ("1,234,567", NUMBER, 1, 1),
    "thousands separators and decimals": ("1,234,567.5", NUMBER, 0, 0),
    "apostrophes between thousands": ("1'234'567", NUMBER, 1, 1),
    "narrow blanks between thousands": ("1\u202f234\u202f567", NUMBER, 1, 1),
    "thousands separators in the reference": ("1234567", to("1,234,567"), 1, 1),
    "part of a number with separators": ("1,234,567", to("234"), 0, 0),
    "end of a number with separators": ("1,234", to("234"), 0, 0),
    "no thousands separators": ("1,23", to("23"), 0, 1),
    "groups that are no thousands": ("1,234,56", to("1234"), 0, 0),
    "currency and unit": ("$50 000", to("50"), 0, 1),
    "unit without a blank": ("50km", to("50"), 0, 0),
    "full-width digits": ("\uff11\uff12", to("12"), 1, 1),
    "version": ("Python 3.11.2", to("3.11"), 0, 0),
    "case": ("PARIS", to("Paris"), 1, 1),
    "punctuation": ("'Paris!'", to("Paris"), 1, 1),
    "emphasis": ("**Paris**", to("Paris"), 1, 1),
    "underlined": ("_Paris_", to("Paris"), 1, 1),
    "trailing newline": ("Paris\n", to("Paris"), 1, 1),
    "broken line": ("New\n  York", to("New York"), 1, 1),
    "words apart": ("New towns near York", to("New York"), 0, 0),
    "word inside a longer one": ("Parisian", to("Paris"), 0, 0),
    "article": ("The Nile", to("Nile"), 1, 1),
    "letter that is an article": ("A", to("A"), 1, 1),
    "other letter": ("The B", to("A"), 0, 0),
    "hyphen": ("amber otter", to("amber-otter"), 1, 1),
    "negation": ("It is not Paris.", to("Paris"), 0, 1),
    "accent": ("Zurich", to("Zürich"), 0, 0),
    "composed in another way": ("Zu\u0308rich", to("Z\u00fcrich"), 1, 1),
    "vowel signs": ("कला", to("कल"), 0, 0),
    "no blanks between words": ("答案是北京。", to("北京"), 0, 1),
    "no blanks between words, Thai": ("คำตอบคือสมชายครับ", to("สมชาย"), 0, 1),
    "no blanks between words, Lao": ("ຄຳຕອບແມ່ນວຽງຈັນເດີ", to("ວຽງຈັນ"), 0, 1),
    "no blanks between words, Khmer": ("ចម្លើយគឺភ្នំពេញ។", to("ភ្នំពេញ"), 0, 1),
    "no blanks between words, Burmese": ("အဖြေကရန်ကုန်ပါ။", to("ရန်ကုန်"), 0, 1),
    "no blanks between words, Javanese": ("ꦲꦶꦏꦸꦗꦮꦺꦴꦲꦤꦏ꧀", to("ꦗꦮ"), 0, 0),
    "no blanks between words, Javanese, whole": ("ꦲꦶꦏꦸꦗꦮꦲꦤꦏ꧀", to("ꦗꦮ"), 0, 1),
    "no blanks between words, Tibetan": ("ལན་ནི་ལྷ་ས་ཡིན།", to("ལྷ་ས"), 0, 1),
    "no blanks between words, Yi": ("ꀉꀊꀋꀌ", to("ꀊꀋ"), 0, 1),
    "number between Thai words": ("หมายเลขคือ1234567ครับ", NUMBER, 0, 1),
    "number between Khmer words": ("លេខគឺ1234567។", NUMBER, 0, 1),
    "longer number between Thai words": ("หมายเลขคือ12345678ครับ", NUMBER, 0, 0),
    "Latin word between Thai words": ("เมืองParisครับ", to("Paris"), 0, 1),
    "another vowel sign, Thai": ("กิน", to("กัน"), 0, 0),
    "beginning of a syllable, Thai": ("กั้น", to("กั"), 0, 0),
    "other words, Thai": ("คำตอบคือสมหญิงครับ", to("สมชาย"), 0, 0),
    "blanks of no width, Khmer": ("ចម្លើយ\u200bគឺ\u200bភ្នំ\u200bពេញ", to("ភ្នំពេញ"), 0, 1),
    "word between words with blanks, Cyrillic": ("вид1234567", NUMBER, 0, 0),
    "time": ("at 1:30", to("1"), 0, 0),
    "the same time": ("at 1:30.", to("1:30"), 0, 1),
    "fraction": ("5/7", to("5"), 0, 0),
    "decimal comma": ("1,5", to("5"), 0, 0),
    "the same with a point": ("1,5", to("1.5"), 1, 1),
    "list without blanks of one digit each": ("1,2,3", to("2"), 0, 1),
    "list with slashes": ("7654321/1234567", NUMBER, 0, 1),
    "year of a date": ("12/05/1999", to("1999"), 0, 1),
    "reference with its thinking": ("Paris", to("<think>Rome?</think>Paris"), 1, 1),
    "what the reference thought": ("Rome", to("<think>Rome?</think>Paris"), 0, 0),
    "one of several that are right": ("NYC", to("New York", "NYC"), 1, 1),
    "nothing is right": ("Paris", to(), 0, 0),
    "right answer without words": ("?", to("+"), 0, 0),
    "after the thinking": ("<think>Rome?</think>\n\nParis", to("Paris"), 1, 1),
    "only in the thinking": ("<think>Paris?</think>\n\nRome", to("Paris"), 0, 0),
    "thinking that does not end": ("<think>Paris, I think", to("Paris"), 0, 0),
    "nothing after the thinking": ("<think>Paris</think>", to("Paris"), 0, 0),
    "thinking that the prompt opens": ("Rome?\n</think>\n\nParis", to("Paris", **THINKS), 1, 1),
    "only in thinking that the prompt opens": ("Paris?\n</think>\n\nRome", to("Paris", **THINKS), 0, 0),
    "opened thinking that does not end": ("Paris, I think", to("Paris", **THINKS), 0, 0),
    "after the reasoning": ("Rome is old.\nAnswer: Paris", to("Paris", **REASONS), 1, 1),
    "emphasised mark": ("Rome is old.\n**Answer:** Paris", to("Paris", **REASONS), 1, 1),
    "mark as a sentence": ("Rome is old. The final answer is: Paris", to("Paris", **REASONS), 1, 1),
    "only in the reasoning": ("It could be Paris.\nAnswer: Rome", to("Paris", **REASONS), 0, 0),
    "several final answers": ("Answer: Paris. Wait.\nAnswer: Rome", to("Paris", **REASONS), 0, 0),
    "reasoning that does not end": ("Let us see. Paris", to("Paris", **REASONS), 0, 0),
    "thinking in place of reasoning": ("<think>Rome?</think>Paris", to("Paris", **REASONS), 1, 1),
    "thinking and reasoning": ("<think>Answer: Rome</think>So:\nAnswer: Paris", to("Paris", **REASONS), 1, 1),
    "mark of full width": ("Rome is old.\nAnswer\uff1a Paris", to("Paris", **REASONS), 1, 1),
    "mark that begins a line": ("Answer: Paris\nI hope this answer: helps", to("Paris", **REASONS), 0, 1),
    "power": ("10\u00b2", to("102"), 0, 0),
    "vulgar fraction": ("3\u00bd", to("31"), 0, 0),
    "decimals without a zero": ("It is .5", to("5"), 0, 0),
    "the same with a zero": (".5", to("0.5"), 1, 1),
    "sign before the currency": ("-$5", to("5"), 0, 0),
    "the same after it": ("-$5", to("$-5"), 1, 1),
    "name with signs": ("C", to("C++"), 0, 0),
    "the same name": ("It is C++.", to("C++"), 0, 1),
    "another name with a sign": ("C#", to("C"), 0, 0),
    "mark where none was asked for": ("Paris. Answer: Rome", to("Paris"), 0, 1),
}


@pytest.mark.parametrize(("answer", "sample", "is_exact", "is_substring"), TRICKY.values(), ids=TRICKY)
def test_verdicts_on_tricky_answers(answer, sample, is_exact, is_substring):
    assert exact(answer, sample) == is_exact
    assert substring(answer, sample) == is_substring
    # Of one right answer, all is one; and only an exact answer has every word right.
    if len(sample.answers) == 1:
        assert substring_all(answer, sample) == is_substring
    assert (token_f1(answer, sample) == 1) == is_exact


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("1111111, 2222222, 3333333 and 4444444", 1),
        ("4444444,3333333,2222222,1111111", 1),
        ("1111111 2222222", 0.5),
        ("1111111 1111111 1111111 1111111", 0.25),
        ("1111111222222233333334444444", 0),
        ("5555555", 0),
        ("", 0),
    ],
)
def test_the_share_of_several_answers_that_are_found(answer, share):
    sample = to("1111111", "2222222", "3333333", "4444444")
    assert substring_all(answer, sample) == share
    assert substring(answer, sample) == (share > 0)


@pytest.mark.parametrize(
    ("answer", "answers", "f1"),
    [
        ("in the summer of 1969", ["summer 1969"], 2 * 2 / (4 + 2)),
        ("1969", ["summer 1969"], 2 / 3),
        ("summer summer summer", ["summer 1969"], 2 / 5),  # a word counts as often as it is in both
        ("1969", ["spring", "1969"], 1),
        ("19690", ["1969"], 0),
    ],
)
def test_f1_of_shared_words(answer, answers, f1):
    assert token_f1(answer, to(*answers)) == pytest.approx(f1)


def test_words_of_a_text():
    assert words("**Ada Lovelace**, 1,234.5 km (not -3); x_1, e.g. 東京") == [
        *["ada", "lovelace", "1234.5", "km", "not", "-3", "x_1", "e", "g", "東", "京"]
    ]


def test_what_is_said_last_is_kept_as_written():
    assert final("<think>a</think>b <think>c</think> D.\n", to()) == " D.\n"


def always_right(answer, sample):
    return 1.0


class Named:
    name = "mine"

    def __call__(self, answer, sample):
        return 0.5


def test_judges_have_names_that_tell_them_apart():
    judges = [find(name) for name in ("exact", "substring", "substring_all", "token_f1")]
    assert judges == [exact, substring, substring_all, token_f1]
    assert find(always_right) is always_right
    names = {name_of(judge) for judge in [*judges, always_right, Named()]}
    assert len(names) == 6
    assert {"mine", f"{__name__}.always_right"} < names


def test_judges_that_cannot_be_told_apart_or_are_not_there_are_refused():
    with pytest.raises(ConfigError, match="'substring'"):
        find("substing")
    with pytest.raises(ConfigError, match="a name of its own"):
        find(lambda answer, sample: 1.0)

    def inner(answer, sample):
        return 1.0

    with pytest.raises(ConfigError, match="a name of its own"):
        find(inner)


class Scripted:
    """A model that writes what it is told to, and remembers what it was asked."""

    def __init__(self, tokenizer, reply, attention="sdpa"):
        self.tokenizer, self.reply = tokenizer, reply
        self.config = SimpleNamespace(_attn_implementation=attention)
        self.generation_config = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)
        self.device = "cpu"
        self.asked = []

    def generate(self, input_ids, attention_mask, max_new_tokens, **greedy):
        assert attention_mask.shape == input_ids.shape
        assert greedy["do_sample"] is False
        self.asked.append(self.tokenizer.decode(input_ids[0]))
        written = self.tokenizer(self.reply, add_special_tokens=False).input_ids[:max_new_tokens]
        return torch.cat([input_ids, torch.tensor([written], dtype=torch.long)], 1)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Yes", 1),
        ("yes.<|im_end|>", 1),
        ("**Yes**, it does", 1),
        ("No", 0),
        ("No, though yes", 0),
        ("yesterday", 0),
        ("Hm", 0),
        ("", 0),
        ("<think>yes</think>no", 0),
        ("<think>no</think>yes", 1),
        ("<|channel|>analysis<|message|>yes<|channel|>final<|message|>no", 0),
        ("<|channel|>analysis<|message|>no<|channel|>final<|message|>yes", 1),
        ("<|channel|>analysis<|message|>yes", 0),
        ("no<|im_end|>yes", 0),
    ],
)
def test_a_model_as_judge_says_yes_or_no(reply, verdict):
    tokenizer = byte_tokenizer(CHATML)
    model = Scripted(tokenizer, reply)
    judge = model_judge(model, tokenizer, new_tokens=60)
    assert judge("It is <b>Paris</b>", to("Paris", "Lutetia", question="Which city?")) == verdict
    (asked,) = model.asked
    for part in ("Which city?", "Paris or Lutetia", "It is <b>Paris</b>"):
        assert part in asked
    assert asked.count("<|im_start|>") == 2


def test_a_model_as_judge_sees_only_the_final_answer_and_no_empty_one():
    tokenizer = byte_tokenizer(CHATML)
    model = Scripted(tokenizer, "yes")
    judge = model_judge(model, tokenizer)
    assert judge("<think>unsure", to("Paris")) == judge(" \n", to("Paris")) == 0
    assert model.asked == []
    assert judge("<think>Rome?</think>Paris", to("Paris")) == 1
    assert "Rome" not in model.asked[0]


def test_a_model_as_judge_does_not_think_where_it_need_not():
    tokenizer = byte_tokenizer(HYBRID)
    model = Scripted(tokenizer, "yes")
    assert model_judge(model, tokenizer)("Paris", to("Paris")) == 1
    assert model.asked[0].endswith("<think>\n\n</think>\n\n")
    model_judge(model, tokenizer, template={"enable_thinking": True})("Paris", to("Paris"))
    assert model.asked[1].endswith("assistant\n")
    # One that always does has its verdict after its thinking.
    thinker = byte_tokenizer(CHATML.replace("assistant\n", "assistant\n<think>\n"))
    assert model_judge(Scripted(thinker, "yes or</think>no"), thinker)("Paris", to("Paris")) == 0
    assert model_judge(Scripted(thinker, "yes"), thinker)("Paris", to("Paris")) == 0


def test_a_model_as_judge_reads_with_full_attention(monkeypatch):
    tokenizer = byte_tokenizer(CHATML)
    model = tiny("llama", vocab_size=300)
    swaa_flex.adapt(model, "naive")
    assert model.config._attn_implementation == NAME
    seen = []

    def generate(input_ids, **kwargs):
        seen.append(model.config.swaa["sliding_window"])
        return input_ids

    monkeypatch.setattr(model, "generate", generate)
    judge = model_judge(model, tokenizer)
    judge("Paris", to("Paris"))
    assert seen == [None]
    assert model.config.swaa["sliding_window"] == 2048


def test_models_as_judges_are_told_apart_by_their_weights_and_settings():
    tokenizer = byte_tokenizer(CHATML)
    one, other = tiny("llama", vocab_size=300), tiny("llama", vocab_size=300)
    with torch.no_grad():
        other.model.embed_tokens.weight[0, 0] += 1
    judges = [
        model_judge(one, tokenizer),
        model_judge(other, tokenizer),
        model_judge(one, tokenizer, new_tokens=99),
        model_judge(one, tokenizer, template={"enable_thinking": True}),
    ]
    assert len({name_of(judge) for judge in judges}) == 4
    assert name_of(judges[0]) == name_of(model_judge(one, tokenizer))


def test_a_real_model_writes_the_verdict():
    tokenizer = byte_tokenizer(CHATML)
    assert model_judge(tiny("llama", vocab_size=300), tokenizer)("Paris", to("Paris")) in (0, 1)
