"""Self-distillation: a model writes the answers that it is then fine-tuned on, before its attention is changed.

The recipe of the SWAA paper (arXiv 2512.10411): a few answers per prompt, sampled at temperature 1 with full
attention, of which the right ones are kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import GenerationConfig

from ..errors import ConfigError, did_you_mean, listed
from ..evaluation import judges
from ..evaluation.sample import Sample as Judged
from ..files import held
from ..hf import NAME
from ..hf.adapt import full_attention
from .data import Sample, opened_thinking, prompt_ids, unreadable
from .identity import hashed, identity, tokenizer_identity
from .reasoning import KNOWN, Marks, marks_of

Judge = Callable[[Sample, str], bool | float]
"""Says how good an answer is: positive or True if it may be kept, the larger the better."""


@dataclass(frozen=True)
class DistillResult:
    """What a distillation came to.

    Attributes:
        rows: Prompts that were answered.
        answered: Prompts with at least one answer that ended before `max_new_tokens`.
        kept: Answers that were written.
        path: The file they are in.
        resumed: Prompts whose answers were taken over from an interrupted run.
        left_out: A line for each sample that could not be asked: its row, and why.
    """

    rows: int
    answered: int
    kept: int
    path: Path
    resumed: int
    left_out: tuple[str, ...] = ()


def distill(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    out: str | Path,
    *,
    n: int = 4,
    temperature: float = 1.0,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    keep: int = 1,
    judge: str | Judge = "contains",
    template: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> DistillResult:
    """Lets a model answer prompts with full attention, and writes the best answers as fine-tuning data.

    Answers are sampled from the model's whole distribution, whatever its generation config says. Each kept one becomes
    a JSON line with `messages` (the prompt, then the answer, with its thinking), `answer` (the reference), `question`,
    `row` and `score`, in the order of the samples. Answers cut off at `max_new_tokens`, empty ones and repetitions are
    not kept.

    A sample that cannot be asked is left out: one that the chat template refuses, with a token that the model does not
    have, or longer than learned positions reach. These are found before the first answer.

    After each batch its answers are on disk, in `OUT.partial`. The same call after an interruption goes on from there
    and ends with the same file, byte for byte. One run at a time writes to `out`.

    Args:
        model: a causal language model of transformers. If it runs under "swaa_flex", it does so with full attention
            meanwhile; its configuration, its mode and the random state are put back.
        tokenizer: of the model.
        samples: what to answer: their `prompt`.
        out: the file to write, `.jsonl`.
        n: answers per prompt.
        temperature: of the sampling; 0 is greedy.
        max_new_tokens: tokens that an answer may have, thinking included.
        batch_size: prompts at a time, so `batch_size * n` answers.
        seed: of the sampling.
        keep: answers per prompt to keep at most, those that score best, earlier ones first.
        judge: which answers are right. "contains": the words of the reference occur in the answer, as the judge
            `substring` of evaluations has it; "exact": they are the answer. What is said before the reasoning ends
            does not count (`swaa_flex.evaluation.judges`). "none": all, and a cut-off one where there is no other,
            which scores 0. Or a function of the sample and the answer that returns a bool or a score, positive if
            right.
        template: further arguments of `apply_chat_template`, such as `{"enable_thinking": False}`.
        overwrite: replace `out` if it exists, and what an interrupted run with other settings left.
        progress: name the samples that are left out, and show a progress bar if stderr is a terminal.

    Returns:
        The counts.

    Raises:
        ConfigError: if a setting is wrong, a sample has no reference to judge by, none can be asked, `out` exists or
            another run is writing it, or `OUT.partial` is that of a run with other settings, samples, model or
            versions.
    """
    out = Path(out)
    _check(samples, out, n, temperature, max_new_tokens, batch_size, keep)
    template = dict(template or {})
    scored = _judge(judge, samples, marks_of(tokenizer, template))
    ends = _ends(model, tokenizer)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_return_sequences=n,
        eos_token_id=ends,
        pad_token_id=pad,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
    )
    with held(out):
        if out.exists() and not overwrite:
            raise ConfigError(
                f"{out} exists; name another file, or have it replaced with overwrite=True (--overwrite)"
            )
        samples, left_out = _answerable(model, tokenizer, samples, max_new_tokens, template)
        if left_out and progress:
            heading = f"{len(left_out)} of {len(samples) + len(left_out)} prompts are left out:"
            Console(stderr=True).print(listed(heading, left_out), markup=False, highlight=False, soft_wrap=True)
        settings = {
            "n": n,
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "seed": seed,
            "keep": keep,
            "judge": judge if isinstance(judge, str) else getattr(judge, "__qualname__", type(judge).__qualname__),
            "template": hashed(template),
            "samples": hashed([asdict(sample) for sample in samples]),
            "tokenizer": hashed([tokenizer_identity(tokenizer), ends]),
            **_fingerprint(model),
        }
        groups = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
        with _Partial(out.with_name(f"{out.name}.partial"), settings, overwrite) as partial:
            resumed = len(partial.batches)
            if resumed < len(groups):
                with _as_trained(model, generation), _bar(len(samples), progress) as done:
                    done(resumed * batch_size)
                    for number in range(resumed, len(groups)):
                        _seed(seed, number)
                        group = groups[number]
                        answers = _answers(model, tokenizer, group, pad, ends, template)
                        partial.append(_kept(group, answers, scored, keep, last_resort=judge == "none"))
                        done(len(group))
            _write(out, groups, partial.batches)
        partial.path.unlink()
    return DistillResult(
        rows=len(samples),
        answered=sum(batch["answered"] for batch in partial.batches),
        kept=sum(len(batch["kept"]) for batch in partial.batches),
        path=out,
        resumed=sum(map(len, groups[:resumed])),
        left_out=tuple(left_out),
    )


def _answerable(
    model: Any, tokenizer: Any, samples: Sequence[Sample], new_tokens: int, template: Mapping[str, Any]
) -> tuple[list[Sample], list[str]]:
    """The samples that the model can be given to answer, and a line for each of the others."""
    kept: list[Sample] = []
    left_out: list[str] = []
    for sample in samples:
        try:
            problem = unreadable(model.config, prompt_ids(tokenizer, sample.prompt, **template), new_tokens)
        except ConfigError as error:
            problem = str(error)
        if problem is None:
            kept.append(sample)
        else:
            left_out.append(f"row {sample.row}: {problem}")
    if not kept:
        raise ConfigError(f"samples: none of the {len(samples)} can be answered; the first, {left_out[0]}")
    return kept, left_out


# --- answers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    text: str
    ended: bool


def _answers(
    model: Any,
    tokenizer: Any,
    group: Sequence[Sample],
    pad: int,
    ends: Sequence[int],
    template: Mapping[str, Any],
) -> list[list[_Answer]]:
    """The answers to each sample of a batch."""
    prompts = [prompt_ids(tokenizer, sample.prompt, **template) for sample in group]
    longest = max(map(len, prompts))
    padded = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    written = model.generate(
        input_ids=torch.tensor(padded, device=model.device), attention_mask=torch.tensor(mask, device=model.device)
    )[:, longest:].tolist()
    n = len(written) // len(group)
    return [
        [
            _answer(tokenizer, tokens, ends, opened_thinking(tokenizer, sample.prompt, **template))
            for tokens in written[place * n : (place + 1) * n]
        ]
        for place, sample in enumerate(group)
    ]


def _answer(tokenizer: Any, tokens: list[int], ends: Sequence[int], opening: str) -> _Answer:
    length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    # As written, to the letter: it is tokenised again for the training.
    text = tokenizer.decode(tokens[:length], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return _Answer(opening + text, ended=length < len(tokens))


def _kept(
    group: Sequence[Sample], answers: Sequence[Sequence[_Answer]], scored: Judge, keep: int, *, last_resort: bool
) -> dict[str, Any]:
    """The answers of a batch that are kept, as place in the batch, text and score."""
    kept: list[tuple[int, str, float]] = []
    answered = 0
    for place, (sample, of_sample) in enumerate(zip(group, answers, strict=True)):
        answered += any(answer.ended for answer in of_sample)
        texts = dict.fromkeys(answer.text for answer in of_sample if answer.ended and answer.text.strip())
        scores = {text: float(scored(sample, text)) for text in texts}
        best = sorted((text for text in texts if scores[text] > 0), key=lambda text: -scores[text])
        kept += [(place, text, scores[text]) for text in best[:keep]]
        if last_resort and not best:
            kept += [(place, answer.text, 0.0) for answer in of_sample if answer.text.strip()][:1]
    return {"answered": answered, "kept": kept}


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer."""
    of_model = model.generation_config.eos_token_id
    ends = {*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id} - {None}
    if not ends:
        raise ConfigError("neither the model nor the tokenizer has an end-of-text token; set tokenizer.eos_token")
    return sorted(ends)


@contextmanager
def _as_trained(model: Any, generation: GenerationConfig) -> Iterator[None]:
    """Full attention, evaluation mode and our own sampling; afterwards, and after an error, all as before."""
    models = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]  # peft copies it
    before = [each.generation_config for each in models]
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    windowed = model.config._attn_implementation == NAME
    try:
        with torch.random.fork_rng(devices=list(devices)), full_attention(model.config) if windowed else nullcontext():
            # Swapped, not passed: transformers fills in what a passed one leaves open from the model's own.
            model.generation_config = generation
            model.eval()
            yield
    finally:
        for each, own in zip(models, before, strict=True):
            each.generation_config = own
        for module, training in modes:
            module.training = training


def _seed(seed: int, batch: int) -> None:
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{batch}".encode()).digest()[:8]) >> 1)


@contextmanager
def _bar(rows: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (wanted and console.is_terminal)) as bar:
        task = bar.add_task("", total=rows)
        yield lambda rows: bar.advance(task, rows)


# --- judges --------------------------------------------------------------------------------------------------


def _judge(judge: str | Judge, samples: Sequence[Sample], around: Marks) -> Judge:
    if callable(judge):
        return judge
    if judge not in _JUDGES:
        raise ConfigError(
            f"judge={judge!r}: expected {', '.join(_JUDGES)} or a function of sample and answer"
            f"{did_you_mean(judge, _JUDGES)}"
        )
    without = [sample.row for sample in samples if not judges.words(around.split(sample.answer or "")[1])]
    if judge != "none" and without:
        raise ConfigError(
            f"judge={judge!r}: {len(without)} of {len(samples)} samples have no reference answer to judge by, first "
            f"row {without[0]}; add 'answer' to them, with letters or digits, leave them out, or keep answers "
            "unjudged with judge='none'"
        )
    return partial(_JUDGES[judge], around=around)


def _contains(sample: Sample, answer: str, around: Marks = KNOWN) -> bool:
    return bool(judges.substring(answer, _judged(sample, around)))


def _exact(sample: Sample, answer: str, around: Marks = KNOWN) -> bool:
    return bool(judges.exact(answer, _judged(sample, around)))


def _any(sample: Sample, answer: str, around: Marks = KNOWN) -> bool:
    return True


def _judged(sample: Sample, around: Marks) -> Judged:
    return Judged(str(sample.row), (), answers=(sample.answer or "",), marks=around)


_JUDGES: dict[str, Callable[..., bool]] = {"contains": _contains, "exact": _exact, "none": _any}


# --- files ---------------------------------------------------------------------------------------------------


class _Partial:
    """The file of a run that is under way: a line that says which run it is, then a line per batch.

    Each line ends with a newline, so one without is what a killed run was about to write.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool) -> None:
        self.path = path
        self.batches: list[dict[str, Any]] = []
        header = json.dumps({_HEADER: settings}).encode() + b"\n"
        found = path.read_bytes() if path.exists() else b""
        complete = found[: found.rfind(b"\n") + 1]
        try:
            if complete:
                self.batches = self._read(complete, settings)
            elif not header.startswith(found):
                raise self._refusal("it was not begun by this run")
        except ConfigError:
            if not overwrite:
                raise
            complete = b""
        self._file = path.open("ab")
        self._file.truncate(len(complete))
        if not complete:
            self._put(header)

    def __enter__(self) -> _Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, batch: dict[str, Any]) -> None:
        """Adds a batch, which is on disk afterwards."""
        self._put(json.dumps({"batch": len(self.batches), **batch}).encode() + b"\n")
        self.batches.append(batch)

    def _put(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, complete: bytes, settings: dict[str, Any]) -> list[dict[str, Any]]:
        try:
            header, *batches = map(json.loads, complete.split(b"\n")[:-1])
            before = header[_HEADER]
            in_order = [batch["batch"] for batch in batches] == list(range(len(batches)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self._refusal("it is damaged, or not from swaa-flex distill") from error
        settings = json.loads(json.dumps(settings))
        others = [name for name in settings | before if settings.get(name) != before.get(name)]
        if others:
            changes = (
                f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
                if name not in _HASHED
                else f"another {name}"
                for name in others
            )
            raise self._refusal(f"it is from a run with other settings ({', '.join(changes)})")
        if not in_order:
            raise self._refusal("it is damaged: two runs wrote to it at once")
        return batches

    def _refusal(self, reason: str) -> ConfigError:
        return ConfigError(
            f"{self.path}: cannot go on from this file, {reason}; repeat the run that began it, delete it, or start "
            "over with overwrite=True (--overwrite)"
        )


_HEADER = "swaa_flex_distill"
_HASHED = ("template", "samples", "tokenizer", "model", "weights")


def _write(out: Path, groups: Sequence[Sequence[Sample]], batches: Sequence[Mapping[str, Any]]) -> None:
    """The final file, whole or not at all."""
    temporary = out.with_name(f"{out.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        for group, batch in zip(groups, batches, strict=True):
            for place, text, score in batch["kept"]:
                sample = group[place]
                row = {
                    "messages": [*sample.prompt, {"role": "assistant", "content": text}],
                    "answer": sample.answer,
                    "question": sample.question,
                    "row": sample.row,
                    "score": score,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, out)


def _fingerprint(model: Any) -> dict[str, str]:
    """What the answers of a model depend on, apart from what it is asked."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    return identity(model) | {
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype),
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _check(
    samples: Sequence[Sample], out: Path, n: int, temperature: float, max_new_tokens: int, batch_size: int, keep: int
) -> None:
    if not samples:
        raise ConfigError("samples: there are none; read some with read_samples")
    if out.suffix != ".jsonl":
        raise ConfigError(f"{out}: expected a file that ends in .jsonl, which is what is written")
    for name, value in {"n": n, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "keep": keep}.items():
        if value < 1:
            raise ConfigError(f"{name}={value}: expected at least 1")
    if keep > n:
        raise ConfigError(f"keep={keep}: expected at most n={n}, the answers there are; raise n")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature={temperature}: expected at least 0; 1 is the model's own distribution")
    if temperature == 0 and n > 1:
        raise ConfigError(
            f"temperature=0: all n={n} answers to a prompt would be the same; take n=1, or temperature=1"
        )
