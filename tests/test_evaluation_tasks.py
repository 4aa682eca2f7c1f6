import json
import re
from dataclasses import asdict, replace

import pytest
from conftest import jsonl
from tiny_tokenizers import BEGINS, CHANNELS, CHATML, HYBRID, PARTICULAR, byte_tokenizer, chat

from swaa_flex import ConfigError
from swaa_flex.evaluation.tasks import get, names
from swaa_flex.evaluation.texts import NOISE, read
from swaa_flex.tuning.data import prompt_ids

THINKS = CHATML.replace("assistant\n", "assistant\n<think>\n")
NEEDLES = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(CHATML)


def always_right(answer, sample):
    return 1.0


def one(name, **options):
    (task,) = get(name, **options)
    return task


def text_of(tokenizer, sample):
    return tokenizer.decode(sample.prompt)


# --- needles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [False, True], ids=["text", "noise"])
@pytest.mark.parametrize("template", [None, CHATML, BEGINS], ids=["base", "chat", "bos"])
@pytest.mark.parametrize("name", NEEDLES)
def test_prompts_are_as_long_as_asked_for(name, template, noise):
    tokenizer = byte_tokenizer(template, adds_bos=True)
    task = one(name, noise=noise)
    for length in (900, 1777, 3000):
        samples = task.samples(tokenizer, length, 3, seed=1)
        assert [sample.id for sample in samples] == ["0", "1", "2"]
        for sample in samples:
            assert length - 3 <= len(sample.prompt) <= length
            special = [token for token in sample.prompt if token == tokenizer.bos_token_id]
            assert len(special) == (template is not CHATML)  # never two of them
            text = text_of(tokenizer, sample)
            assert text.endswith("Answer:" if template is None else "assistant\n")
            assert sample.question in text
            assert not sample.continuations
            # An answer fits: the right ones, and some words.
            assert sample.new_tokens >= 16 * len(sample.answers) + 16


@pytest.mark.parametrize("name", NEEDLES)
def test_samples_depend_on_seed_and_length_but_not_on_how_many_there_are(name, tokenizer):
    task = one(name)
    few, many = task.samples(tokenizer, 700, 2, 0), task.samples(tokenizer, 700, 5, 0)
    assert many[:2] == few
    assert many == one(name).samples(tokenizer, 700, 5, 0)
    drawn = {sample.answers for seed in (0, 1) for n in (700, 701) for sample in task.samples(tokenizer, n, 5, seed)}
    assert len(drawn) == 20


@pytest.mark.parametrize(
    ("name", "options", "needles", "asked"),
    [
        ("niah_single", {}, 1, 1),
        ("niah_multikey", {}, 4, 1),
        ("niah_multivalue", {}, 4, 4),
        ("niah_multiquery", {}, 4, 4),
        ("niah_multikey", {"keys": 7}, 7, 1),
        ("niah_multikey", {"keys": 3, "asked": 2, "values": 2}, 6, 4),
    ],
)
@pytest.mark.parametrize("words", [False, True], ids=["numbers", "words"])
def test_needles_say_what_is_asked_for(name, options, needles, asked, words, tokenizer):
    task = one(name, words=words, **options)
    for sample in task.samples(tokenizer, 2500, 4, 0):
        text = text_of(tokenizer, sample)
        hidden = re.findall(r"secret (?:number|word) of ([a-z]+-[a-z]+) is ([a-z]+-[a-z]+|\d{7})\. ", text)
        assert len(hidden) == len(set(hidden)) == needles
        assert len({value for _, value in hidden}) == needles
        keys = set(re.findall(r"[a-z]+-[a-z]+", sample.question))
        assert sorted(value for key, value in hidden if key in keys) == sorted(sample.answers)
        assert len(sample.answers) == asked
        assert all(value.isdigit() != words for value in sample.answers)
        assert task.judge(", ".join(sample.answers), sample) == 1
        assert task.judge(sample.answers[0], sample) == 1 / asked


@pytest.mark.parametrize("options", [{}, {"chains": 1, "hops": 2}, {"chains": 3, "hops": 1}])
def test_chains_of_variables_lead_to_their_value_in_order(options, tokenizer):
    task = one("vt", **options)
    for sample in task.samples(tokenizer, 2500, 4, 0):
        assigned = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})\. ", text_of(tokenizer, sample))
        values = {}
        for variable, value in assigned:
            values[variable] = values.get(value, value)  # of a variable that comes earlier
        chains, length = options.get("chains", 2), options.get("hops", 4) + 1
        assert len(assigned) == len(values) == chains * length
        assert len(set(values.values())) == chains
        (asked,) = re.findall(r"\d{5}", sample.question)
        assert {variable for variable, value in values.items() if value == asked} == set(sample.answers)
        assert len(sample.answers) == length
        assert task.judge("\n".join(sample.answers).lower(), sample) == 1
        assert task.judge(f"{sample.answers[0]}X", sample) == 0


def test_needles_lie_at_all_depths_at_the_ends_of_sentences(tokenizer):
    samples = one("niah_single").samples(tokenizer, 2500, 40, 0)
    texts_before = [text_of(tokenizer, sample).partition("The secret number")[0] for sample in samples]
    for low in range(0, 2500, 500):
        assert sum(low <= len(text) < low + 500 for text in texts_before) >= 3
    assert all(text[-1].isspace() for text in texts_before)
    assert sum(re.search(r"[.!?:]\s+$|\n\s*\n$", text) is not None for text in texts_before) >= 30


def test_a_needle_lies_at_its_depth_where_sentences_have_no_end(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("word " * 2000)
    samples = one("niah_single", text=path).samples(tokenizer, 4000, 20, 0)
    found = [text_of(tokenizer, sample).index("The secret number") for sample in samples]
    assert min(found) < 1000 < 3000 < max(found)
    assert all("word The secret number" in text_of(tokenizer, sample) for sample in samples)


def test_the_haystack_is_the_text_and_goes_round(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("Uno due tre. Quattro cinque sei. ")
    (sample,) = one("niah_single", text=path).samples(tokenizer, 1000, 1, 0)
    text = re.sub(r"The secret.*?\. ", "", text_of(tokenizer, sample).split("\n\n")[1])
    assert set(re.findall(r"\w+\W*", text)[:-1]) <= {"Uno ", "due ", "tre. ", "Quattro ", "cinque ", "sei. "} | {
        "tre.  ",
        "sei.  ",
    }
    assert text.count("Quattro cinque sei.") > 10
    (noise,) = one("niah_single", noise=True).samples(tokenizer, 1000, 1, 0)
    assert all(sentence in text_of(tokenizer, noise) for sentence in NOISE)
    prompts = {text_of(tokenizer, sample)[200:300] for sample in one("niah_single").samples(tokenizer, 1000, 9, 0)}
    assert len(prompts) == 9  # begin anywhere


@pytest.mark.parametrize("name", NEEDLES)
def test_too_short_prompts_are_refused(name, tokenizer):
    task = one(name)
    with pytest.raises(ConfigError, match=r"length=100: .* alone take \d+ tokens") as refusal:
        task.samples(tokenizer, 100, 1, 0)
    least = int(re.search(r"take (\d+)", str(refusal.value))[1])
    assert least <= len(task.samples(tokenizer, least + 40, 1, 0)[0].prompt) + 40 <= least + 80
    with pytest.raises(ConfigError, match="expected a length"):
        task.samples(tokenizer, None, 1, 0)


def test_prompts_are_never_too_long_whatever_the_tokens_are():
    """Sizes that jump and fall, as those of tokenizers that look across words."""
    from swaa_flex.evaluation.needles import _longest

    for limit in range(20, 200, 7):
        for size in (lambda n: 20 + n // 3, lambda n: 20 + n // 9 * 3, lambda n: 20 + n - n % 3, lambda n: 20):
            if size(10**9) == 20:
                continue
            chars = _longest(size, limit)
            assert limit - 12 <= size(chars) <= limit


def test_reasoning_is_asked_for_where_the_style_says_so(tokenizer):
    direct, reasoned = (
        one("niah_single", style=style).samples(tokenizer, 1200, 1, 0)[0] for style in ("direct", "cot")
    )
    assert "step by step" in text_of(tokenizer, reasoned)
    assert "step by step" not in text_of(tokenizer, direct)
    assert (direct.reasoned, reasoned.reasoned) == (False, True)
    assert reasoned.new_tokens > 10 * direct.new_tokens
    assert one("niah_single", new_tokens=7).samples(tokenizer, 1200, 1, 0)[0].new_tokens == 7
    (base,) = one("niah_single", style="cot").samples(byte_tokenizer(None), 1200, 1, 0)
    assert text_of(byte_tokenizer(None), base).endswith("\n\nReasoning:")
    task = one("niah_single", style="cot")
    assert task.judge(f"It is {reasoned.answers[0]}.", reasoned) == 0
    assert task.judge(f"Hm.\nAnswer: {reasoned.answers[0]}", reasoned) == 1


def test_thinking_models_think_only_where_they_are_to_reason():
    hybrid, thinks = byte_tokenizer(HYBRID), byte_tokenizer(THINKS)
    ends = {}
    for style in ("direct", "cot"):
        (sample,) = one("niah_single", style=style).samples(hybrid, 1200, 1, 0)
        ends[style] = text_of(hybrid, sample).rpartition("assistant\n")[2]
    assert ends == {"direct": "<think>\n\n</think>\n\n", "cot": ""}
    (sample,) = one("niah_single", template={"enable_thinking": True}).samples(hybrid, 1200, 1, 0)
    assert text_of(hybrid, sample).endswith("assistant\n")
    (sample,) = one("niah_single", style="cot").samples(thinks, 1200, 1, 0)
    assert sample.opening == "<think>\n"
    with pytest.raises(ConfigError, match="style='cot'"):
        one("niah_single").samples(thinks, 1200, 1, 0)


# --- perplexity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True])
def test_stretches_of_text_do_not_overlap(adds_bos, tmp_path):
    tokenizer = byte_tokenizer(CHATML, adds_bos=adds_bos)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(map(str, range(1000))))
    task = one("ppl", text=path, scored=30)
    samples = task.samples(tokenizer, 100, 1000, 0)
    stretch = 100 - adds_bos
    size = path.stat().st_size
    assert len(samples) == size // stretch == len({sample.id for sample in samples})
    texts = []
    for sample in sorted(samples, key=lambda sample: int(sample.id)):
        (continuation,) = sample.continuations
        assert (len(sample.prompt), len(continuation)) == (70, 30)
        assert sample.prompt.count(tokenizer.bos_token_id) == (sample.prompt[0] == tokenizer.bos_token_id) == adds_bos
        texts.append(tokenizer.decode(sample.prompt[adds_bos:] + continuation))
    assert "".join(texts) == path.read_text()[: size // stretch * stretch]
    assert samples[:3] == task.samples(tokenizer, 100, 3, 0) != task.samples(tokenizer, 100, 3, 1)
    assert task.judge is None


def test_texts_that_are_too_short_to_read_are_refused(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("short " * 20)
    with pytest.raises(ConfigError, match="the text has 120 tokens"):
        one("ppl", text=path, scored=10).samples(tokenizer, 121, 1, 0)
    assert len(one("ppl", text=path, scored=10).samples(tokenizer, 120, 9, 0)) == 1
    for length in (None, 10):
        with pytest.raises(ConfigError, match="more than the 10 tokens"):
            one("ppl", text=path, scored=10).samples(tokenizer, length, 1, 0)
    assert len(one("ppl", text=path, scored=10).samples(tokenizer, 11, 1, 0)[0].prompt) == 1
    path.write_text(" \n")
    with pytest.raises(ConfigError, match="empty"):
        one("ppl", text=path).facts()
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="UTF-8"):
        one("niah_single", text=path).facts()
    with pytest.raises(ConfigError, match=r"missing\.txt"):
        one("vt", text=tmp_path / "missing.txt").samples(tokenizer, 1000, 1, 0)


# --- questions from files ------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path):
    return jsonl(
        tmp_path / "facts.jsonl",
        {"prompt": "Ada wrote programs. Who wrote?", "question": "Who wrote?", "answer": "Ada"},
        {"prompt": "no answer"},
        "{broken\n",
        {"prompt": "Sign?", "answer": "+"},
        {"messages": [{"role": "system", "content": "Be brief."}, *chat("Where is the Louvre?", "Paris")]},
        {"prompt": "x" * 300, "answer": "x"},
    )


def test_rows_become_questions_and_the_others_are_named(questions, tokenizer):
    task = one(f"qa:{questions}")
    assert task.name == "qa:facts"
    assert [line.split(":")[0] for line in sorted(task.left_out)] == ["row 1", "row 2", "row 3"]
    samples = {sample.id: sample for sample in task.samples(tokenizer, None, 9, 0)}
    assert set(samples) == {"0", "4", "5"}
    assert samples["0"].prompt == tuple(prompt_ids(tokenizer, chat("Ada wrote programs. Who wrote?")))
    assert (samples["0"].answers, samples["0"].question) == (("Ada",), "Who wrote?")
    assert (samples["4"].answers, samples["4"].question) == (("Paris",), "")
    system = [{"role": "system", "content": "Be brief."}, *chat("Where is the Louvre?")]
    assert samples["4"].prompt == tuple(prompt_ids(tokenizer, system))
    assert task.judge("It is ADA.", samples["0"]) == 1
    assert task.judge("It is Adam.", samples["0"]) == 0


def test_parquet_files_are_read_as_well(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "LongMemEval.parquet"
    columns = {"prompt": ["Who?", "Where?"], "question": ["Who?", None], "answer": ["Ada", "Paris"]}
    parquet.write_table(pyarrow.table(columns), path)
    answers = {sample.answers for sample in one(f"qa:{path}").samples(tokenizer, None, 9, 0)}
    assert answers == {("Ada",), ("Paris",)}
    choices = {"question": ["Who?"], "choices": [["Ada", "Bob"]], "answer": [1]}
    parquet.write_table(pyarrow.table(choices), path)
    assert one(f"choice:{path}").samples(tokenizer, None, 9, 0)[0].right == 1


def test_a_length_leaves_out_what_is_longer(questions, tokenizer):
    task = one(f"qa:{questions}")
    assert {sample.id for sample in task.samples(tokenizer, 200, 9, 0)} == {"0", "4"}
    assert len(task.samples(tokenizer, 200, 1, 0)) == 1
    with pytest.raises(ConfigError, match=r"the shortest prompt has \d+ tokens"):
        task.samples(tokenizer, 10, 9, 0)


def test_the_seed_decides_the_order_of_rows(tmp_path, tokenizer):
    path = jsonl(tmp_path / "many.jsonl", *({"prompt": f"{i}?", "answer": str(i)} for i in range(30)))
    task = one(f"qa:{path}")
    orders = [[sample.id for sample in task.samples(tokenizer, None, 30, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] != sorted(orders[2])
    assert [sample.id for sample in task.samples(tokenizer, None, 7, 0)] == orders[0][:7]


def test_questions_ask_for_reasoning_and_are_judged_on_request(questions, tokenizer):
    task = one(f"qa:{questions}", style="cot", judge="exact", new_tokens=77)
    sample = next(sample for sample in task.samples(tokenizer, None, 9, 0) if sample.id == "0")
    text = text_of(tokenizer, sample)
    assert "Who wrote?\n\nThink step by step." in text
    assert text.count("<|im_start|>") == 2
    assert (sample.new_tokens, sample.reasoned) == (77, True)
    assert task.judge("Bob? No.\nAnswer: Ada.", sample) == 1
    assert task.judge("Ada\nAnswer: Ada or Bob", sample) == 0
    assert one(f"qa:{questions}", judge=always_right).judge is always_right
    with pytest.raises(ConfigError, match="style='cot'"):
        one(f"qa:{questions}").samples(byte_tokenizer(THINKS), None, 9, 0)


LONGBENCH = {
    "_id": "66f36490821e116aacb2cc22",
    "domain": "Single-Document QA",
    "context": "Paris is the capital of France.",
    "question": "Which city is the capital?",
    "choice_A": "Rome",
    "choice_B": "Oslo",
    "choice_C": "Paris",
    "choice_D": "Lima",
    "answer": "C",
}


@pytest.mark.parametrize(
    ("row", "text", "right"),
    [
        (LONGBENCH, "Paris is the capital of France.\n\nWhich city is the capital?", 2),
        ({"question": "Who?", "choices": ["Ada", "Bob"], "answer": 0}, "Who?", 0),
        (
            {"prompt": "Ada is here. Who?", "question": "Who?", "choices": ["Ada", "Bob"], "answer": "b"},
            "here. Who?",
            1,
        ),
        ({"prompt": "Ada is here.", "question": "Who?", "choices": ["Ada", "Bob"], "answer": 1}, "here.\n\nWho?", 1),
    ],
)
def test_choices_are_listed_and_their_letters_scored(row, text, right, tmp_path, tokenizer):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([row]))
    task = one(f"choice:{path}")
    assert (task.name, task.judge, task.left_out) == ("choice:data", None, [])
    (sample,) = task.samples(tokenizer, None, 9, 0)
    choices = row.get("choices") or ["Rome", "Oslo", "Paris", "Lima"]
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=False))
    prompt = text_of(tokenizer, sample)
    assert f"{text}\n\n{listed}\n\nReply with the letter" in prompt
    assert prompt.count("Who?") + prompt.count("Which city") == 1
    assert prompt.endswith("<|im_start|>assistant\n")
    assert [tokenizer.decode(choice) for choice in sample.continuations] == list("ABCD")[: len(choices)]
    assert sample.right == right


@pytest.mark.parametrize("template", [None, CHATML, HYBRID, BEGINS], ids=["base", "chat", "hybrid", "bos"])
def test_choices_follow_the_prompt_as_an_answer_would(template, tmp_path):
    tokenizer = byte_tokenizer(template, adds_bos=True)
    path = jsonl(tmp_path / "data.jsonl", {"question": "Who?", "choices": ["Ada L.", "Bob"], "answer": 1})
    (sample,) = one(f"choice:{path}", letters=False).samples(tokenizer, None, 9, 0)
    blank = " " if template is None else ""
    assert [tokenizer.decode(choice) for choice in sample.continuations] == [f"{blank}Ada L.", f"{blank}Bob"]
    prompt = text_of(tokenizer, sample)
    assert "Ada" not in prompt
    assert sample.prompt.count(tokenizer.bos_token_id) == (template in (None, BEGINS))
    if template is None:
        assert prompt == "<|bos|>Who?\n\nAnswer:"
    if template == HYBRID:
        assert prompt.endswith("</think>\n\n")


# As GLM-4, GLM-4.5 and GLM-4.7: no token ends an answer, and the model itself writes what stands before it, or the
# prompt does; and as gpt-oss and Mistral.
GLM = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{{ BEFORE }}"
    "{% else %}{{ '\n' }}{% endif %}{{ m['content'].strip() }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking %}{{ THINKING }}{% else %}{{ PROMPT }}{% endif %}{% endif %}"
)


def glm(before, prompt="", thinking=""):
    return GLM.replace("BEFORE", repr(before)).replace("PROMPT", repr(prompt)).replace("THINKING", repr(thinking))


FOLLOWED = {
    "newline": (glm("\n"), {}, "<|assistant|>\n", ""),
    "thinking left out": (glm("\n<think></think>\n", "\n<think></think>"), {}, "\n<think></think>\n", ""),
    "thinking left out by the model": (
        glm("\n<think></think>\n", "\n<think></think>"),
        {"enable_thinking": True},
        "<|assistant|>\n<think></think>\n",
        "",
    ),
    "thinking closed": (glm("</think>", "</think>", "<think>"), {}, "<|assistant|></think>", ""),
    "newline of the prompt only": (glm("", "\n"), {}, "<|assistant|>\n", ""),
    "blank": (glm(" "), {}, "<|assistant|>", " "),
    "channel": (CHANNELS, {}, "<|im_start|>assistant<|channel|>final<|message|>", ""),
    "Mistral": (PARTICULAR, {}, " [/INST]", " "),
}


@pytest.mark.parametrize(("template", "options", "end", "blank"), FOLLOWED.values(), ids=FOLLOWED)
def test_choices_begin_where_a_model_would_begin_them(template, options, end, blank, tmp_path):
    tokenizer = byte_tokenizer(template)
    path = jsonl(tmp_path / "data.jsonl", {"question": "Who?", "choices": [" Ada L.", "Bob\n"], "answer": 1})
    task = one(f"choice:{path}", letters=False, template=options)
    (sample,) = task.samples(tokenizer, None, 9, 0)
    assert [tokenizer.decode(choice) for choice in sample.continuations] == [f"{blank}Ada L.", f"{blank}Bob"]
    assert text_of(tokenizer, sample).endswith(end)
    # What a model reads is what the template makes of the conversation.
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Bob"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, **{"enable_thinking": False, **options})
    read = text_of(tokenizer, sample) + tokenizer.decode(sample.continuations[1])
    assert rendered.startswith(read) or template == glm("", "\n")  # which has the newline in prompts only


def test_choices_of_a_model_that_thinks_first_are_refused(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", {"question": "Who?", "choices": ["Ada", "Bob"], "answer": 1})
    with pytest.raises(ConfigError, match="think before it answers, so that choices would be scored as thoughts"):
        one(f"choice:{path}").samples(byte_tokenizer(THINKS), None, 9, 0)
    thinking = one(f"choice:{path}", template={"enable_thinking": True})
    with pytest.raises(ConfigError, match="think before it answers"):
        thinking.samples(byte_tokenizer(glm("</think>", "</think>", "<think>")), None, 9, 0)


def test_choices_from_a_parquet_file_with_a_column_that_cannot_be_read(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = {"question": ["a?", "b?"], "choices": [["x", "y"]] * 2, "answer": [0, 1]}
    other = pyarrow.array([0, 2932897], pyarrow.date32())
    parquet.write_table(pyarrow.table({**rows, "valid_until": other}), tmp_path / "data.parquet")
    assert len(one(f"choice:{tmp_path / 'data.parquet'}").samples(tokenizer, None, 9, 0)) == 2


def test_rows_without_a_choice_are_named(tmp_path):
    bad = {
        "choices": {"question": "?"},
        "2 to 26": {"question": "?", "choices": ["one"], "answer": 0},
        "choice B": {"question": "?", "choices": ["one", 2], "answer": 0},
        "neither 'question'": {"choices": ["one", "two"], "answer": 0},
        "answer is 2": {"question": "?", "choices": ["one", "two"], "answer": 2},
        "answer is 'C'": {"question": "?", "choices": ["one", "two"], "answer": "C"},
        "answer is 'AB'": {"question": "?", "choices": ["one", "two"], "answer": "AB"},
        "answer is True": {"question": "?", "choices": ["one", "two"], "answer": True},
        "answer is None": {"question": "?", "choices": ["one", "two"]},
        "answer is -1": {"question": "?", "choices": ["one", "two"], "answer": -1},
        "expected an object": [],
        "no JSON": "{\n",
    }
    good = {"question": "?", "choices": ["one", "two"], "answer": "A"}
    path = jsonl(tmp_path / "data.jsonl", good, "\n", *bad.values())
    task = one(f"choice:{path}")
    assert len(task.left_out) == len(bad)
    for number, (reason, line) in enumerate(zip(bad, task.left_out, strict=True), start=2):
        assert line.startswith(f"row {number}: ")
        assert reason in line


@pytest.mark.parametrize("kind", ["qa", "choice"])
def test_files_without_a_usable_row_are_refused(kind, tmp_path):
    with pytest.raises(ConfigError, match="can be used"):
        get(f"{kind}:{jsonl(tmp_path / 'bad.jsonl', {'prompt': '?', 'question': '?'})}")
    with pytest.raises(ConfigError):
        get(f"{kind}:{jsonl(tmp_path / 'empty.jsonl')}")
    with pytest.raises(ConfigError, match=r"\.jsonl, \.json, \.parquet"):
        get(f"{kind}:{tmp_path / 'data.csv'}")
    with pytest.raises(OSError, match=r"missing\.jsonl"):
        get(f"{kind}:{tmp_path / 'missing.jsonl'}")


# --- names, options, facts -----------------------------------------------------------------------------------


def test_tasks_by_name(questions):
    assert [task.name for task in get("niah")] == list(NEEDLES[:4])
    assert [get(name)[0].name for name in (*NEEDLES, "ppl")] == [*NEEDLES, "ppl"]
    assert [task.words for task in get("niah", words=True)] == [True] * 4
    assert names() == ("niah", *NEEDLES, "ppl", "qa:FILE", "choice:FILE")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("niah_singel", {}, "did you mean 'niah_single'"),
        ("qa", {}, "qa:FILE"),
        ("qa:", {}, "qa:FILE"),
        ("ppl", {"txt": "a"}, "did you mean 'text'"),
        ("ppl", {"judge": "exact"}, "unknown option 'judge'"),
        ("niah_single", {"judge": "exact"}, "unknown option 'judge'"),
        ("niah_single", {"style": "cod"}, "did you mean 'cot'"),
        ("niah_single", {"noise": True, "text": "a.txt"}, "one of them"),
        ("niah_multikey", {"keys": 0}, "keys=0: expected 1 to"),
        ("niah_multikey", {"asked": 5}, "asked=5: expected 1 to 4"),
        ("niah_single", {"values": 101}, "values=101"),
        ("niah_single", {"new_tokens": 0}, "new_tokens=0"),
        ("vt", {"hops": 0}, "hops=0"),
        ("vt", {"chains": 0}, "chains=0"),
        ("ppl", {"scored": 0}, "scored=0"),
    ],
)
def test_unknown_names_and_impossible_options_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        get(name, **options)


def test_facts_tell_apart_what_gives_other_samples_or_verdicts(tmp_path, questions):
    text = tmp_path / "text.txt"
    text.write_text("Some text. " * 100)
    choices = jsonl(tmp_path / "choices.jsonl", {"question": "?", "choices": ["one", "two"], "answer": "A"})
    tasks = [
        *(get(name)[0] for name in (*NEEDLES, "ppl", f"qa:{questions}", f"choice:{choices}")),
        *(one("niah_single", **options) for options in ({"noise": True}, {"words": True}, {"text": text})),
        *(one("niah_single", **options) for options in ({"style": "cot"}, {"new_tokens": 9}, {"keys": 2})),
        one("niah_single", template={"enable_thinking": True}),
        *(one("vt", **options) for options in ({"hops": 3}, {"chains": 1})),
        *(one("ppl", **options) for options in ({"text": text}, {"scored": 9})),
        *(one(f"qa:{questions}", **options) for options in ({"style": "cot"}, {"judge": "exact"}, {"new_tokens": 9})),
        one(f"qa:{questions}", judge=always_right),
        one(f"qa:{questions}", template={"a": 1}),
        *(one(f"choice:{choices}", **options) for options in ({"letters": False}, {"template": {"a": 1}})),
    ]
    facts = [json.dumps(task.facts(), sort_keys=True) for task in tasks]
    assert len(set(facts)) == len(facts)
    assert not any(str(tmp_path) in fact for fact in facts)
    # The content counts, not the place.
    before = one("ppl", text=text).facts()
    moved = tmp_path / "moved" / "text.txt"
    moved.parent.mkdir()
    text.rename(moved)
    assert one("ppl", text=moved).facts() == before
    moved.write_text("Other text. " * 100)
    assert one("ppl", text=moved).facts() != before


def test_the_default_text_is_long():
    assert len(read()) > 300_000


def test_samples_are_plain_values(questions, tokenizer):
    for task in (*get("niah"), *get("vt"), *get("ppl", text=questions, scored=9), *get(f"qa:{questions}")):
        for sample in task.samples(tokenizer, 500, 2, 0):
            assert replace(sample) == sample
            assert hash(sample)
            assert json.loads(json.dumps(asdict(sample)))["id"] == sample.id
