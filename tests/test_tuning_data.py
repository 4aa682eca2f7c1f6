import datetime
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import jsonl, needs_smollm2
from tiny_models import tiny
from tiny_tokenizers import BEGINS, CHANNELS, CHATML, HYBRID, PARTICULAR, THINKING, byte_tokenizer, chat, texts
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, OPTConfig, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import swaa_flex
from swaa_flex import ConfigError
from swaa_flex.cli import checkpoint
from swaa_flex.tuning.data import (
    Collator,
    Example,
    Sample,
    encode,
    encode_each,
    fit,
    opened_thinking,
    prompt_ids,
    read_samples,
    unreadable,
)

# --- files ---------------------------------------------------------------------------------------------------


def test_rows_of_the_reference_format_and_chats_become_samples(tmp_path):
    path = jsonl(
        tmp_path / "data.jsonl",
        {"prompt": "Long text. Who?", "question": "Who?", "answer": "Ada", "prompt_len": 7},
        "\n",
        {"messages": chat("a", "b", "c"), "answer": None},
        {"messages": chat("a", "b")},
        {"messages": [{"role": "system", "content": "s", "tool_calls": None}, *chat("a", "b")], "answer": "ref"},
        {"messages": [chat("a")[0] | {"name": ""}, chat("a", "b")[1] | {"tool_calls": [], "annotations": {}}]},
        json.dumps({"prompt": "no newline at the end"}),
    )
    samples, bad = read_samples(path)
    assert bad == []
    assert samples == [
        Sample(({"role": "user", "content": "Long text. Who?"},), "Ada", "Who?", 0),
        Sample(tuple(chat("a", "b", "c")), None, None, 2),
        Sample(tuple(chat("a", "b")), "b", None, 3),
        Sample(({"role": "system", "content": "s"}, *chat("a", "b")), "ref", None, 4),
        Sample(tuple(chat("a", "b")), "b", None, 5),
        Sample(({"role": "user", "content": "no newline at the end"},), None, None, 6),
    ]
    assert [len(sample.prompt) for sample in samples] == [1, 3, 1, 2, 1, 1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{'prompt': 1}\n", "no JSON"),
        ("[" * 200_000 + "\n", "no JSON"),
        ("null\n", "expected an object with 'prompt' or 'messages', got null"),
        ("[1]\n", "expected an object with 'prompt' or 'messages', got a list"),
        ({"text": "x"}, "neither 'prompt' nor 'messages'"),
        ({"prompt": None}, "neither 'prompt' nor 'messages'"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": 3}, "prompt is a number, expected text"),
        ({"prompt": "\ud800"}, "prompt is no valid Unicode"),
        ({"prompt": "x", "answer": 3}, "answer is a number, expected text"),
        ({"messages": "x"}, "messages is text, expected a list"),
        ({"messages": []}, "messages holds nothing to be answered"),
        ({"messages": chat("", "b")[:1]}, "content of message 0 is empty"),
        ({"messages": ["x"]}, "message 0 is text, expected role and content"),
        ({"messages": [{"role": "user"}]}, "content of message 0 is missing"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "message 0 has role 'asistant', .*'assistant'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"message 0 has role \['user'\]"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages holds nothing to be answered"),
        ({"messages": [chat("a")[0] | {"tool_calls": [{}]}]}, "message 0 has 'tool_calls'; expected role and content"),
        ({"messages": [chat("a")[0] | {"weight": 0}]}, "message 0 has 'weight'; expected role and content"),
        (
            {"messages": [*chat("a"), {"role": "assistant", "content": "b", "reasoning_content": "c"}]},
            "message 1 has 'r",
        ),
    ],
)
def test_a_bad_row_is_reported_and_not_fatal(tmp_path, row, reason):
    path = jsonl(tmp_path / "data.jsonl", {"prompt": "good"}, row, {"prompt": "good too"})
    samples, bad = read_samples(path)
    assert [sample.row for sample in samples] == [0, 2]
    (line,) = bad
    assert re.match(f"row 1: {reason}", line)


def test_bytes_that_are_no_text_are_a_bad_row(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "with a byte order mark"}\n{"prompt": "\xff"}\n')
    samples, bad = read_samples(path)
    assert samples[0].messages[0]["content"] == "with a byte order mark"
    assert bad[0].startswith("row 1: no JSON")


def test_a_json_file_holds_a_list(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"prompt": "a"}, None, {"prompt": "b"}]))
    samples, bad = read_samples(path)
    assert [sample.row for sample in samples] == [0, 2]
    assert bad == ["row 1: expected an object with 'prompt' or 'messages', got null"]
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(ConfigError, match=r"must end in \.jsonl"):
        read_samples(path)
    path.write_text('{"prompt": "a"}')
    with pytest.raises(ConfigError, match="expected a JSON list of rows, got an object"):
        read_samples(path)


def test_a_file_without_a_usable_row_is_refused(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", {"text": "a"}, {"text": "b", "label": 1})
    with pytest.raises(ConfigError, match=r"found columns text, label, expected 'prompt'.*rename the columns"):
        read_samples(path)
    with pytest.raises(ConfigError, match=r"data\.jsonl is empty"):
        read_samples(jsonl(path))
    path.write_bytes(b"\x00\xff no JSON\n")
    with pytest.raises(ConfigError, match=r"none of its 1 rows can be used.* row 0: no JSON"):
        read_samples(path)
    with pytest.raises(ConfigError, match=r"none of its 2 rows can be used.* row 0: prompt is empty"):
        read_samples(jsonl(path, {"prompt": ""}, {"prompt": ""}))
    with pytest.raises(ConfigError, match=r"data\.csv: expected a file that ends in \.jsonl, \.json, \.parquet"):
        read_samples(tmp_path / "data.csv")


def test_parquet_rows_become_the_same_samples(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"messages": chat("a", "b"), "answer": "ref", "length": 3},
        {"messages": [{"role": "user", "content": None}], "answer": None, "length": 1},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    samples, bad = read_samples(tmp_path / "data.parquet")
    assert samples == read_samples(jsonl(tmp_path / "data.jsonl", *rows))[0]
    assert bad == ["row 1: content of message 0 is missing"]
    (tmp_path / "text.parquet").write_text("not parquet at all")
    with pytest.raises(ConfigError, match="not a parquet file"):
        read_samples(tmp_path / "text.parquet")


def bad_columns(pyarrow):
    """Columns of three values, of which Python cannot hold the second, or not without pandas."""
    return {
        "no UTF-8": pyarrow.array([b"fine", b"\xff bad", b"fine"]).view(pyarrow.string()),
        "year 10000": pyarrow.array([0, 2932897, 0], pyarrow.date32()),
        "nanoseconds": pyarrow.array([0, 1, 0], pyarrow.timestamp("ns")),
        "ages": pyarrow.array([0, 2**62, 0], pyarrow.duration("s")),
    }


@pytest.mark.parametrize("kind", ["no UTF-8", "year 10000", "nanoseconds", "ages"])
def test_columns_of_a_parquet_file_that_are_not_looked_at_are_not_read(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    other = bad_columns(pyarrow)[kind]
    path, prompts = tmp_path / "data.parquet", ["a", "b", "c"]
    parquet.write_table(pyarrow.table({"prompt": prompts, "other": other, "prompt.other": other}), path)
    samples, bad = read_samples(path)
    assert [sample.messages[0]["content"] for sample in samples] == prompts and bad == []
    parquet.write_table(pyarrow.table({"text": other}), path)
    with pytest.raises(ConfigError, match="found columns text, expected 'prompt'"):
        read_samples(path)


@pytest.mark.parametrize("column", ["prompt", "answer", "messages"])
def test_a_value_of_a_parquet_file_that_cannot_be_read_is_a_bad_row(tmp_path, column):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = bad_columns(pyarrow)["no UTF-8"]
    if column == "messages":
        roles = pyarrow.array(["user"] * 3)
        message = pyarrow.StructArray.from_arrays([roles, values], names=["role", "content"])
        values = pyarrow.ListArray.from_arrays([0, 1, 2, 3], message)
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a", "b", "c"], column: values}), path)
    samples, bad = read_samples(path)
    assert [sample.row for sample in samples] == [0, 2]
    assert bad[0].startswith(f"row 1: {column} cannot be read ('utf-8' codec")


def test_a_parquet_file_with_two_columns_of_a_name_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    parquet.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(ConfigError, match="column 'prompt' is there 2 times; rename"):
        read_samples(tmp_path / "data.parquet")
    parquet.write_table(pyarrow.table({"prompt": [b"bytes"]}), tmp_path / "data.parquet")
    with pytest.raises(ConfigError, match="prompt is bytes, expected text"):
        read_samples(tmp_path / "data.parquet")


def test_empty_fields_of_a_message_are_not_shown_to_the_template():
    tokenizer = byte_tokenizer(CHATML.replace("m['content'] +", "m['content'] + m | string +"))
    messages = [chat("Hi")[0] | {"tool_calls": [], "name": None}]
    assert prompt_ids(tokenizer, messages) == prompt_ids(tokenizer, chat("Hi"))


@pytest.mark.parametrize("damaged", ["header", "page", "footer", "end"])
def test_a_damaged_parquet_file_is_refused(damaged, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"prompt": [f"a {i}" for i in range(500)]}), path, use_dictionary=False)
    data = bytearray(path.read_bytes())
    begin = {"header": 0, "page": 6, "footer": data.rfind(b"prompt") - 40, "end": len(data) - 8}[damaged]
    data[begin : begin + 20] = b"\xff" * min(20, len(data) - begin)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"rows\.parquet: not a parquet file, or damaged"):
        read_samples(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'swaa-flex\[eval\]'"):
        read_samples(tmp_path / "data.parquet")


# --- tokens --------------------------------------------------------------------------------------------------


def test_answers_are_decode_rows_up_to_the_end_of_the_turn():
    tokenizer = byte_tokenizer(CHATML)
    example = encode(tokenizer, chat("Hi", "Hello", "2+2?", "4"))
    assert texts(tokenizer, example) == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Hello<|im_end|>",
        "\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
        "4<|im_end|>",
        "\n",
    ]
    assert example.labels == [
        token if row else -100 for token, row in zip(example.input_ids, example.decode_rows, strict=True)
    ]


@pytest.mark.parametrize("template", [CHATML, BEGINS, CHANNELS, PARTICULAR])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_plain_conversation_is_what_the_template_makes_of_it(template, adds_bos):
    tokenizer = byte_tokenizer(template, adds_bos)
    messages = chat("Hi", "Hello\n\nthere", "And?", "é")
    example = encode(tokenizer, messages)
    assert example.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    for turn in (1, 3):
        prompt = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=False)
        assert prompt_ids(tokenizer, messages[:turn]) == prompt == example.input_ids[: len(prompt)]
        assert not example.decode_rows[len(prompt) - 1]
        assert example.decode_rows[len(prompt)]
    each = encode_each(tokenizer, messages)
    assert each[1].input_ids == example.input_ids
    assert example.input_ids[: len(each[0].input_ids)] == each[0].input_ids


def test_tokens_do_not_reach_across_the_end_of_the_prompt():
    tokenizer = byte_tokenizer(CHATML)
    messages = chat("Hi", "\n\nHello")
    prompt = prompt_ids(tokenizer, messages[:1])
    example = encode(tokenizer, messages)
    assert example.input_ids[: len(prompt)] == prompt
    assert texts(tokenizer, example)[1] == "\n\nHello<|im_end|>"
    assert example.input_ids != tokenizer.apply_chat_template(messages, return_dict=False)  # one token for "\n\n"
    with pytest.raises(ConfigError, match="message 1: the chat template shows this answer in another form"):
        encode(tokenizer, [*messages, *chat("And?", "4")])


def test_thinking_belongs_to_the_answer():
    tokenizer = byte_tokenizer(HYBRID)
    answer = "<think>\n\nHm,\n2 and 2\n</think>4"  # not as the template would lay it out
    assert texts(tokenizer, encode(tokenizer, chat("2+2?", answer)))[1] == answer + "<|im_end|>"
    assert texts(tokenizer, encode(tokenizer, chat("2+2?", "4")))[1] == "4<|im_end|>"
    prompt, written, _ = texts(tokenizer, encode(tokenizer, chat("2+2?", "4"), enable_thinking=False))
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert written == "4<|im_end|>"


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("<think>\nHm\n</think>\n\n4", "Hm\n</think>\n\n4"),
        ("<think>Hm</think>4", "Hm</think>4"),
        ("Hm\n</think>\n\n4", "Hm\n</think>\n\n4"),
    ],
)
def test_thinking_that_the_prompt_opens_is_not_opened_twice(content, written):
    tokenizer = byte_tokenizer(THINKING)
    prompt, answer, _ = texts(tokenizer, encode(tokenizer, chat("2+2?", content)))
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert answer == written + "<|im_end|>"
    assert opened_thinking(tokenizer, chat("2+2?")) == "<think>\n"
    assert opened_thinking(byte_tokenizer(HYBRID), chat("2+2?"), enable_thinking=False) == ""


def test_an_answer_that_never_ends_the_thinking_is_refused():
    with pytest.raises(ConfigError, match=r"message 1: .*opens a thinking block .* never closes it"):
        encode(byte_tokenizer(THINKING), chat("2+2?", "4"))


@pytest.mark.parametrize(("template", "options"), [(HYBRID, {}), (THINKING, {}), (HYBRID, {"enable_thinking": False})])
def test_history_without_its_thinking_takes_one_sample_per_answer(template, options):
    tokenizer = byte_tokenizer(template)
    thought = chat("2+2?", "<think>\nHm\n</think>\n\n4", "3+3?", "<think>\nOh\n</think>\n\n6")
    with pytest.raises(
        ConfigError, match=r"message 1: .*split the conversation into one sample per answer: encode_each"
    ):
        encode(tokenizer, thought, **options)
    first, second = encode_each(tokenizer, thought, **options)
    assert first == encode(tokenizer, thought[:2], **options)
    prompt = prompt_ids(tokenizer, thought[:3], **options)
    assert second.input_ids[: len(prompt)] == prompt
    assert second.decode_rows.index(True) == len(prompt)
    assert "Hm" not in tokenizer.decode(second.input_ids)
    assert "Oh\n</think>\n\n6<|im_end|>" in texts(tokenizer, second)[1]


def test_plain_history_is_none_that_a_template_for_thinking_could_have_had():
    messages = chat("2+2?", "4", "3+3?", "<think>\nOh\n</think>\n\n6")
    with pytest.raises(ConfigError, match=r"message 1: .*split the conversation"):
        encode(byte_tokenizer(THINKING), messages)


def test_history_without_thinking_stays_one_sample():
    tokenizer = byte_tokenizer(HYBRID)
    example = encode(tokenizer, chat("2+2?", "4", "3+3?", "<think>\nOh\n</think>\n\n6"))
    assert texts(tokenizer, example)[1::2] == ["4<|im_end|>", "<think>\nOh\n</think>\n\n6<|im_end|>"]


def test_what_the_template_puts_before_answers_is_written_once():
    tokenizer = byte_tokenizer(CHANNELS)
    assert texts(tokenizer, encode(tokenizer, chat("Hi", "4")))[1] == "<|channel|>final<|message|>4<|im_end|>"
    raw = "<|channel|>analysis<|message|>Hm<|im_end|><|im_start|>assistant<|channel|>final<|message|>4"
    assert texts(tokenizer, encode(tokenizer, chat("Hi", raw)))[1] == raw + "<|im_end|>"
    tokenizer = byte_tokenizer(PARTICULAR)
    assert encode(tokenizer, chat("Hi", "4")) == encode(tokenizer, chat("Hi", " 4"))


@pytest.mark.parametrize(
    ("template", "written"),
    [(PARTICULAR, ["▁4", "</s>", "▁4"]), (PARTICULAR.replace("' ' +", ""), ["4", "</s>", "4"])],
)
def test_a_tokenizer_that_begins_texts_with_a_blank_does_not_begin_answers_with_one(template, written):
    # As SentencePiece: "4" alone is "▁4".
    vocab = {character: number for number, character in enumerate("▁[]/INSTHi24")}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "▁4": len(vocab)}, merges=[("▁", "4")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=template)
    messages = chat("Hi", "4", "24", "42")
    example = encode(tokenizer, messages)
    assert example.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    answers = [token for token, row in zip(example.input_ids, example.decode_rows, strict=True) if row]
    assert tokenizer.convert_ids_to_tokens(answers) == [*written, "2", "</s>"]


@pytest.mark.parametrize("begin", ["", "  ", "\n", " \n", "{# one #}"])
@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%A, %B %-d, %Y, %H:%M:%S %p", "%j %y %U %a %I"])
def test_the_date_in_a_template_is_that_of_any_day(form, begin, monkeypatch):
    class NewYear(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2025, 1, 1)

    opening = "{% set today = strftime_now('FORM') if strftime_now is defined else 'never' %}{{ 'Today: ' + today }}\n"
    tokenizer = byte_tokenizer(begin + opening.replace("FORM", form) + CHATML)
    prompt = prompt_ids(tokenizer, chat("Hello"))
    example = encode(tokenizer, chat("Hello", "Hi"))
    assert example.input_ids[: len(prompt)] == prompt
    monkeypatch.setattr(chat_template_utils, "datetime", NewYear)
    assert prompt == tokenizer.apply_chat_template(chat("Hello"), add_generation_prompt=True, return_dict=False)


def test_any_error_of_a_template_is_a_refusal():
    tokenizer = byte_tokenizer("{{ messages[0]['content'] + 1 }}" + CHATML)
    with pytest.raises(ConfigError, match="the chat template refuses messages of the roles user"):
        prompt_ids(tokenizer, chat("Hello"))


@pytest.mark.parametrize(
    ("config", "tokens", "new_tokens", "problem"),
    [
        (GPT2Config(vocab_size=9, n_positions=8), [0, 8], 6, None),
        (GPT2Config(vocab_size=9, n_positions=8), [0, 8], 7, "2 tokens and 7 to be written, and the model has 8"),
        (GPT2Config(vocab_size=9, n_positions=8), [1] * 9, 0, "9 tokens, and the model has 8 positions"),
        (OPTConfig(vocab_size=9, max_position_embeddings=8), [1] * 9, 0, "9 tokens, and the model has 8 positions"),
        (LlamaConfig(vocab_size=9, max_position_embeddings=8), [1] * 9, 9, None),
        (LlamaConfig(vocab_size=9), [0, 9], 0, "token ids from 0 to 9, and the model has 9"),
        (LlamaConfig(vocab_size=9), [-1, 3], 0, "token ids from -1 to 3"),
        (LlamaConfig(vocab_size=9), [], 3, "no tokens"),
    ],
)
def test_what_a_model_cannot_read_is_known_before_it_does(config, tokens, new_tokens, problem):
    found = unreadable(config, tokens, new_tokens)
    assert found is None if problem is None else problem in found


@pytest.mark.parametrize("adds_bos", [False, True])
def test_without_a_chat_template_contents_are_joined(adds_bos):
    tokenizer = byte_tokenizer(None, adds_bos)
    messages = [{"role": "system", "content": "Sums."}, *chat("2+2=", "4")]
    assert prompt_ids(tokenizer, messages[:2]) == tokenizer("Sums.\n2+2=").input_ids
    bos = "<|bos|>" * adds_bos
    assert texts(tokenizer, encode(tokenizer, messages)) == [bos + "Sums.\n2+2=", "4<|im_end|>"]
    with pytest.raises(ConfigError, match="split the conversation"):
        encode(tokenizer, [*messages, *chat("3+3=", "6")])
    assert texts(tokenizer, encode_each(tokenizer, [*messages, *chat("3+3=", "6")])[1])[0] == (
        bos + "Sums.\n2+2=\n4\n3+3="
    )
    with pytest.raises(ConfigError, match="enable_thinking: the tokenizer has no chat template"):
        prompt_ids(tokenizer, messages[:2], enable_thinking=False)
    assert prompt_ids(tokenizer, messages[:2], chat_template=CHATML) == prompt_ids(
        byte_tokenizer(CHATML), messages[:2]
    )


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (CHATML, [], "messages: there are none"),
        (CHATML, chat("Hi"), "messages: the last one has role 'user', expected 'assistant'"),
        (CHATML, chat("Hi", "Hello")[1:], "messages: the first one has role 'assistant', expected a prompt"),
        (CHATML, [*chat("Hi"), {"role": "assistant", "content": ""}], "messages: content of message 1 is empty"),
        (CHATML, [*chat("Hi"), {"role": "bot", "content": "x"}], "messages: message 1 has role 'bot'"),
        (PARTICULAR, [{"role": "system", "content": "x"}, *chat("a", "b")], "refuses .* system, user: only user and"),
        (CHATML.replace("<|im_end|>", ""), chat("a", "b"), r"ends answers with '\\n', which has no special token"),
        ("{{ messages[0]['content'] }}", chat("a", "b"), "does not write the content of an answer"),
    ],
)
def test_what_cannot_be_encoded_is_refused(template, messages, problem):
    with pytest.raises(ConfigError, match=problem):
        encode(byte_tokenizer(template), messages)


def test_answers_without_an_end_are_refused():
    tokenizer = byte_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"no eos_token.*set tokenizer\.eos_token"):
        encode(tokenizer, chat("a", "b"))


@needs_smollm2
def test_tokens_of_smollm2_are_those_of_its_template():
    package = Path(checkpoint.installed())
    tokenizer = AutoTokenizer.from_pretrained(package.parent, gguf_file=package.name)
    messages = chat("What is 17 * 3?", "It's  51:\n\n```py\n17 * 3\n```\n", "Sure? Ünïcödé 北京", " Yes.")
    example = encode(tokenizer, messages)
    assert example.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert texts(tokenizer, example)[1::2] == [f"{messages[turn]['content']}<|im_end|>" for turn in (1, 3)]
    for turn in (1, 3):
        stock = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=False)
        assert prompt_ids(tokenizer, messages[:turn]) == stock


# --- batches -------------------------------------------------------------------------------------------------

THREE = [
    Example([11, 12, 13], [False, True, True]),
    Example([21], [True]),
    Example([31, 32, 33, 34, 35], [False, False, True, True, False]),
]


def as_dicts(examples):
    return [{"input_ids": example.input_ids, "decode_rows": example.decode_rows} for example in examples]


@pytest.mark.parametrize("examples", [THREE, as_dicts(THREE)])
def test_batches_are_padded_on_the_right(examples):
    batch = Collator(pad_token_id=7)(examples)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[11, 12, 13, 7, 7], [21, 7, 7, 7, 7], [31, 32, 33, 34, 35]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
        "labels": [[-100, 12, 13, -100, -100], [21, -100, -100, -100, -100], [-100, -100, 33, 34, -100]],
        "decode_rows": [
            [False, True, True, False, False],
            [True, False, False, False, False],
            [False, False, True, True, False],
        ],
    }
    assert batch["decode_rows"].dtype == torch.bool
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "labels")} == {torch.int64}


def test_batches_are_padded_on_the_left():
    right = Collator(pad_token_id=7)([THREE[0], THREE[2]])
    left = Collator(pad_token_id=7, padding_side="left")([THREE[0], THREE[2]])
    assert left["input_ids"].tolist() == [[7, 7, 11, 12, 13], [31, 32, 33, 34, 35]]
    for name, tensor in left.items():
        assert torch.equal(tensor[0].roll(-2), right[name][0])


@pytest.mark.parametrize("examples", [THREE, as_dicts(THREE)])
def test_packed_examples_are_one_row(examples):
    batch = Collator(pad_token_id=7, packing=True)(examples)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[11, 12, 13, 21, 31, 32, 33, 34, 35]],
        "position_ids": [[0, 1, 2, 0, 0, 1, 2, 3, 4]],
        "labels": [[-100, 12, 13, -100, -100, -100, 33, 34, -100]],
        "decode_rows": [[False, True, True, True, False, False, True, True, False]],
    }
    assert Collator(pad_token_id=7)(examples)["labels"][1, 0] == 21  # the examples are as they were


def test_padded_and_packed_batches_have_the_same_loss():
    model = tiny("llama", vocab_size=263)
    tokenizer = byte_tokenizer(CHATML)
    examples = [
        encode(tokenizer, chat("a" * 30, "Hello there.", "b" * 40, "Once more.")),
        encode(tokenizer, chat("Hi", "A somewhat longer answer than the other.")),
    ]
    pad = tokenizer.pad_token_id
    for full_attention_decode in (True, False):
        config = {"sliding_window": 8, "sink_tokens": 2, "full_attention_layers": [1], "dense_tail": 3}
        swaa_flex.adapt(model, config | {"full_attention_decode": full_attention_decode})
        with torch.no_grad():
            losses = [
                model(**collator(examples), use_cache=False).loss.item()
                for collator in (Collator(pad), Collator(pad, padding_side="left"), Collator(pad, packing=True))
            ]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_labels_of_their_own_are_kept():
    (example,) = as_dicts(THREE[:1])
    assert Collator(pad_token_id=7)([example | {"labels": [11, 12, -100]}])["labels"].tolist() == [[11, 12, -100]]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"pad_token_id": None}, "pad_token_id=None: .*eos_token_id"),
        ({"pad_token_id": 0, "padding_side": "lef"}, "padding_side='lef'.*'left'"),
    ],
)
def test_a_collator_refuses_what_it_cannot_do(options, problem):
    with pytest.raises(ConfigError, match=problem):
        Collator(**options)


def test_examples_that_are_too_long_are_named():
    kept, dropped = fit(THREE, 3)
    assert kept == THREE[:2]
    assert dropped == ["example 2: 5 tokens, more than max_length=3"]
    assert fit(THREE, 5) == (THREE, [])
    with pytest.raises(ConfigError, match="max_length=0"):
        fit(THREE, 0)
