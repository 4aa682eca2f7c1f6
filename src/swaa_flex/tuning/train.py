"""Fine-tuning with LoRA under sliding-window masks, on transformers' `Trainer` and peft."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedConfig, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..errors import ConfigError, did_you_mean
from ..files import held, is_first_process, refuse_file, write_atomically
from ..hf.adapt import full_attention
from ..hf.config import swaa_of
from ..hf.receipt import refuse_dropped_keywords
from .adapters import ADAPTER, load_adapter, peft, refuse_adapter, save_swaa
from .data import Collator, Example, unreadable
from .identity import hashed, identity

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

RUN = "run.json"
OBJECTIVES = ("ce", "kl")
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class TuningConfig:
    """How to fine-tune; the defaults are those of the paper (arXiv 2512.10411).

    Args:
        objective: "ce", cross-entropy on the answers; or "kl", the divergence from what the model itself says of
            them with full attention and without the adapter.
        rank: of the LoRA matrices.
        scale: by which their product enters, LoRA's alpha / rank.
        target_modules: names of the linear layers that get an adapter.
        dropout: on the input of the adapters.
        learning_rate: the largest.
        warmup_ratio: share of the steps in which it rises.
        schedule: how it falls after: "cosine", "linear", or "constant".
        epochs: passes over the examples.
        max_steps: optimizer steps in place of epochs; None for epochs.
        batch_size: examples per process and forward; with `packing` those that share one row.
        gradient_accumulation: forwards per optimizer step.
        packing: put the examples of a batch into one row, without pads.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        seed: of the adapters' weights, the order of examples and dropout.
        save_steps: optimizer steps between checkpoints, from which an interrupted run goes on.
        log_steps: optimizer steps between lines of progress.

    Raises:
        ConfigError: if a value makes no sense.
    """

    objective: str = "ce"
    rank: int = 16
    scale: float = 8.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    dropout: float = 0.1
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.05
    schedule: str = "cosine"
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 1
    gradient_accumulation: int = 8
    packing: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    save_steps: int = 100
    log_steps: int = 10

    def __post_init__(self) -> None:
        for name, choices in (("objective", OBJECTIVES), ("schedule", SCHEDULES)):
            value = getattr(self, name)
            if value not in choices:
                expected = f"expected one of {', '.join(choices)}"
                raise ConfigError(f"{name}={value!r}: {expected}{did_you_mean(value, choices)}")
        for name in ("rank", "batch_size", "gradient_accumulation", "save_steps", "log_steps"):
            self._check(name, _is_int(getattr(self, name)) and getattr(self, name) >= 1, "a positive integer")
        for name in ("scale", "learning_rate", "epochs"):
            self._check(name, _is_number(getattr(self, name)) and getattr(self, name) > 0, "a positive number")
        for name in ("dropout", "warmup_ratio"):
            value = getattr(self, name)
            self._check(name, _is_number(value) and 0 <= value < 1, "a share from 0 to below 1")
        steps, names = self.max_steps, self.target_modules
        self._check("max_steps", steps is None or (_is_int(steps) and steps >= 1), "a positive integer, or None")
        self._check("seed", _is_int(self.seed) and self.seed >= 0, "an integer from 0")
        good = isinstance(names, tuple) and len(names) > 0 and all(isinstance(name, str) for name in names)
        self._check("target_modules", good, "a tuple of names of linear layers, such as ('q_proj',)")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ConfigError(f"{name}={getattr(self, name)!r}: expected {expected}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


@contextlib.contextmanager
def _quieted() -> Iterator[None]:
    """Without what peft 0.21 asks transformers 5.23 by an old name, and what it says of models without a folder."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated")
        warnings.filterwarnings("ignore", message="Could not find a config file")
        yield


@_quieted()
def finetune(
    model: PreTrainedModel,
    examples: Sequence[Example],
    output_dir: str | Path,
    *,
    held_out: Sequence[Example] = (),
    config: TuningConfig | None = None,
    pad_token_id: int = 0,
    quiet: bool = False,
) -> PeftModel:
    """Trains a LoRA adapter under the model's sliding-window masks: prompts slide, answers are decode rows.

    Runs in one process or in each of those that `accelerate launch` started. An interrupted run goes on from its last
    checkpoint when it is started again in the same folder, to which one run at a time writes. The adapter is written
    to `output_dir/adapter`, with the recipe beside it.

    Args:
        model: a model under `attn_implementation="swaa_flex"`; its `config.swaa` is the recipe.
        examples: token ids and which of them are answers.
        output_dir: for checkpoints and the adapter.
        held_out: examples whose loss is stated under the recipe and under full attention, at every checkpoint.
        config: how to train; `TuningConfig()` if None.
        pad_token_id: what shorter examples of a batch are filled up with.
        quiet: print nothing.

    Returns:
        The model with the trained adapter, in evaluation mode.

    Raises:
        ConfigError: if the model runs no sliding-window attention or carries an adapter, an example has no answer, a
            target does not exist, or the folder holds another run, or one that has not ended. All of it is checked
            before anything is computed.
        ImportError: if peft is not installed.
    """
    config, folder = config or TuningConfig(), Path(output_dir)
    peft()
    _check_model(model, config)
    for name, given in (("examples", examples), ("held_out", held_out)):
        _check_examples(name, given, model.config)
    if not examples:
        raise ConfigError("examples: expected at least one to train on, got none")
    refuse_file(folder, f"output_dir={str(folder)!r}")
    with held(folder / RUN):
        if is_first_process():
            _claim(folder, _run(model, examples, config))
        if (folder / ADAPTER).exists():
            return load_adapter(model, folder / ADAPTER)
        uses_cache = model.config.use_cache  # which the trainer turns off
        training, checkpointed = model.training, model.is_gradient_checkpointing
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        tuned = _with_adapter(model, config)
        try:
            trainer = _Trainer(
                objective=config.objective,
                plain_collator=Collator(pad_token_id=pad_token_id),
                model=tuned,
                args=_arguments(folder, config, len(examples), bool(held_out)),
                train_dataset=list(examples),
                eval_dataset=list(held_out) or None,
                data_collator=Collator(pad_token_id=pad_token_id, packing=config.packing),
                callbacks=[_EmbeddingsInForwardOnly(), *([] if quiet else [_Progress()])],
            )
            trainer.remove_callback(PrinterCallback)
            last = _last_checkpoint(folder)
            if last is not None and _is_complete(last):  # which transformers would train for one more step
                trainer._load_from_checkpoint(last)
            else:
                trainer.train(resume_from_checkpoint=last)
            _refuse_diverged(tuned, config)
            _save(trainer, model.config, folder)
        except BaseException:
            with contextlib.suppress(Exception):
                tuned.unload()  # the model as it came, for another try
            for parameter, before in trainable:
                parameter.requires_grad_(before)
            model.train(training)
            raise
        finally:
            model.config.use_cache = uses_cache
            if config.gradient_checkpointing and not checkpointed:
                # Renamed in transformers 5.23.
                (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
                model.disable_input_require_grads()
        return tuned.eval()


class _Trainer(Trainer):
    """`Trainer` with losses on answer rows only, so that no logits of prompts are computed."""

    model: Any

    def __init__(self, objective: str, plain_collator: Collator, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.objective: str = objective
        self.plain_collator = plain_collator
        self.model_accepts_loss_kwargs = True  # the loss below is a sum over all answers of a step, divided once
        self.base_config: PreTrainedConfig = self.model.get_base_model().config
        self.tokens = torch.zeros((), dtype=torch.long)  # since the last log
        self.since = time.perf_counter()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        real = inputs.get("attention_mask")
        count = inputs["input_ids"].numel() if real is None else real.sum()
        self.tokens = self.tokens.to(inputs["input_ids"].device) + count
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the rate over all processes to what is logged."""
        if "loss" in logs:
            now = time.perf_counter()
            tokens = self.accelerator.reduce(self.tokens, reduction="sum")
            logs["tokens_per_second"] = round(float(tokens) / (now - self.since), 1)
            self.tokens, self.since = torch.zeros_like(self.tokens), now
        super().log(logs, start_time)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        losses = self._losses(model, inputs)
        count = num_items_in_batch if num_items_in_batch is not None else sum(len(x) for x in losses)
        loss = torch.cat(losses).sum() / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, {}) if return_outputs else loss

    def _losses(self, model: nn.Module, inputs: dict[str, Any], objective: str | None = None) -> list[Tensor]:
        """The loss of each predicted token, per row of the batch."""
        inputs = dict(inputs)
        targets = F.pad(inputs.pop("labels"), (0, 1), value=-100)[:, 1:]
        rows = (targets != -100).any(0).nonzero().squeeze(1)
        targets = targets[:, rows]
        told = inputs | {"logits_to_keep": rows, "use_cache": False}
        wanted = targets != -100
        logits = model(**told).logits.float()
        if (objective or self.objective) == "ce":
            losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        else:
            bare = self.accelerator.unwrap_model(model)
            with torch.no_grad(), bare.disable_adapter(), full_attention(self.base_config):
                teacher = model(**told).logits.float().log_softmax(-1)
            losses = F.kl_div(logits.log_softmax(-1), teacher, reduction="none", log_target=True).sum(-1)
        return [loss[mask] for loss, mask in zip(losses, wanted, strict=True)]

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The held-out cross-entropy per answer token, under the recipe and under full attention."""
        self.model.eval()
        # A DataLoader draws a seed, after which the dropout of training would be another.
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            metrics = {"eval_loss": self._held_out_loss()}
            with full_attention(self.base_config):
                metrics["eval_full_attention_loss"] = self._held_out_loss()
        self.model.train()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """One example per row, whatever is packed in training: accelerate counts rows to drop what it has repeated."""
        packing, self.data_collator = self.data_collator, self.plain_collator
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = packing

    def _held_out_loss(self) -> float:
        total = torch.zeros(2, dtype=torch.float64, device="cpu")
        for batch in self.get_eval_dataloader():
            inputs = self._prepare_inputs(batch)
            sums = [
                torch.stack([x.sum(), x.new_tensor(len(x))]) for x in self._losses(self.model_wrapped, inputs, "ce")
            ]
            gathered = self.accelerator.gather_for_metrics(torch.stack(sums))
            total += gathered.sum(0).double().cpu()
        return float(total[0] / total[1])


class _EmbeddingsInForwardOnly(TrainerCallback):
    """Keeps FSDP from gathering the input embeddings for the backward pass, which does not use frozen ones.

    It would gather them ahead of time, and use their buffer again before that has ended: at the end of a backward pass
    torch (2.11 to 2.13) waits for it by a call of `torch.Stream` that does nothing for CUDA events. Now and then the
    next forward had other weights.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        embeddings = model.get_input_embeddings()
        if hasattr(embeddings, "set_unshard_in_backward") and _tied_head(model) is None:
            embeddings.set_unshard_in_backward(False)


class _Progress(TrainerCallback):
    """A line per log: step, loss, learning rate, tokens per second; and the held-out losses."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            full = logs["eval_full_attention_loss"]
            self.console.print(f"held-out loss {logs['eval_loss']:.4f}, with full attention {full:.4f}")
        elif "loss" in logs:
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
                f"learning rate {logs['learning_rate']:.1e}  {logs['tokens_per_second']:,.0f} tokens/s"
            )


def _tied_head(model: Any) -> Any:
    """The layer of the logits, if it shares its weights with the input embeddings."""
    head = model.get_output_embeddings()
    return head if head is not None and head.weight is model.get_input_embeddings().weight else None


def _check_model(model: PreTrainedModel, config: TuningConfig) -> None:
    if model.config._attn_implementation != "swaa_flex":
        raise ConfigError(
            f"the model runs attn_implementation={model.config._attn_implementation!r}, so there are no "
            "sliding-window masks to train under; call swaa_flex.adapt(model, recipe) first"
        )
    refuse_adapter(model)
    refuse_dropped_keywords(model, config.packing)
    head = _tied_head(model)
    if head is not None:
        names = {name.rpartition(".")[2] for name, part in model.named_modules() if part is head}
        if names & set(config.target_modules):
            raise ConfigError(
                f"target_modules: {', '.join(names)} shares its weights with the input embeddings of this model, "
                "which an adapter would change as well; leave it out"
            )
    linear = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
    for name in config.target_modules:
        if name not in linear:
            raise ConfigError(
                f"target_modules: the model has no linear layer {name!r}; it has {', '.join(linear)}"
                f"{did_you_mean(name, linear)}"
            )


def _check_examples(name: str, examples: Sequence[Example], config: PreTrainedConfig) -> None:
    for number, example in enumerate(examples):
        tokens, flags = len(example.input_ids), len(example.decode_rows)
        if tokens != flags:
            raise ConfigError(f"{name}[{number}]: {tokens} input_ids and {flags} decode_rows; expected as many")
        if not any(example.decode_rows[1:]):
            raise ConfigError(
                f"{name}[{number}]: none of its {tokens} tokens is an answer (all labels are -100), so there is "
                "nothing to learn from it; leave it out, or do not cut it off inside the prompt"
            )
        problem = unreadable(config, example.input_ids)
        if problem is not None:
            raise ConfigError(
                f"{name}[{number}]: {problem}; encode with the model's own tokenizer, and leave out what is too long"
            )


def _run(model: PreTrainedModel, examples: Sequence[Example], config: TuningConfig) -> dict[str, Any]:
    """What makes a run this one; how often it saves and logs does not."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("save_steps", "log_steps")}
    data = hashed([(example.input_ids, example.decode_rows) for example in examples])
    return identity(model) | {"examples": data, "swaa": swaa_of(model.config).to_dict(), **settings}


def _claim(folder: Path, run: dict[str, Any]) -> None:
    """Marks the folder as that of this run, and refuses that of another."""
    path, run = folder / RUN, json.loads(json.dumps(run))
    way_out = "choose another folder, or delete this one"
    begun = any(folder.glob("checkpoint-[0-9]*")) or (folder / ADAPTER).exists()
    if path.exists() and begun:
        try:
            found = json.loads(path.read_text())
            others = [name for name in run if found.get(name) != run[name]]
        except (ValueError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path} is damaged, so that no run can go on here; {way_out}") from error
        if others:
            changes = ", ".join(f"{name} was {found.get(name)!r} and is {run[name]!r}" for name in others)
            raise ConfigError(f"{folder} holds another run ({changes}); {way_out}")
    elif begun:
        raise ConfigError(f"{folder} holds checkpoints or an adapter of something else (no run.json); {way_out}")
    write_atomically(path, json.dumps(run, indent=1) + "\n")


def _with_adapter(model: PreTrainedModel, config: TuningConfig) -> PeftModel:
    torch.manual_seed(config.seed)
    tuned: PeftModel = peft().get_peft_model(
        model,
        peft().LoraConfig(
            r=config.rank,
            lora_alpha=config.rank * config.scale,
            lora_dropout=config.dropout,
            target_modules=list(config.target_modules),
            task_type="CAUSAL_LM",
        ),
    )
    if config.gradient_checkpointing:
        # Renamed in transformers 5.23.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return tuned


def _arguments(folder: Path, config: TuningConfig, examples: int, evaluates: bool) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    forwards = math.ceil(examples / (config.batch_size * processes))
    steps = config.max_steps or math.ceil(math.ceil(forwards / config.gradient_accumulation) * config.epochs)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        warmup_steps=int(config.warmup_ratio * steps),  # given a share, transformers rounds up, and 1 of 1 is nothing
        lr_scheduler_type=config.schedule if config.schedule != "constant" else "constant_with_warmup",
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        seed=config.seed,
        save_steps=config.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.save_steps if evaluates else None,
        logging_steps=config.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),  # else torch warns
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    if arguments.world_size != processes:
        raise ConfigError(
            f"{processes} processes were started and none knows of the others; without GPUs accelerate needs "
            "ACCELERATE_USE_CPU=true, or start a single process"
        )
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1  # several GPUs take several processes, not transformers' threads
    return arguments


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end: the trainer's state comes last."""
    steps = sorted((int(path.name.partition("-")[2]), path) for path in folder.glob("checkpoint-[0-9]*"))
    for _, path in reversed(steps):
        with contextlib.suppress(OSError, json.JSONDecodeError):
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
    return None


def _is_complete(checkpoint: str) -> bool:
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return bool(state["global_step"] >= state["max_steps"])


def _refuse_diverged(tuned: nn.Module, config: TuningConfig) -> None:
    for parameter in tuned.parameters():
        if parameter.requires_grad and not bool(getattr(parameter, "_local_tensor", parameter).isfinite().all()):
            raise ConfigError(
                f"the training diverged: weights of the adapter are not finite after learning_rate="
                f"{config.learning_rate!r}; start again with a smaller one, in another folder"
            )


def _save(trainer: _Trainer, config: PreTrainedConfig, folder: Path) -> None:
    """Writes the adapter, all of it or nothing."""
    part = folder / f"{ADAPTER}.part"
    if trainer.is_world_process_zero():
        shutil.rmtree(part, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(part))  # in all processes: a sharded model is put together
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        for name in ("training_args.bin", "README.md"):  # hold paths and host names, and nothing else
            (part / name).unlink(missing_ok=True)
        described = json.loads((part / "adapter_config.json").read_text())
        described["target_modules"].sort()  # peft keeps a set, whose order differs between processes
        base = Path(described["base_model_name_or_path"] or "-")
        if base.exists():  # a path of this machine says nothing elsewhere
            described["base_model_name_or_path"] = base.name
        write_atomically(part / "adapter_config.json", json.dumps(described, indent=2) + "\n")
        save_swaa(config, part)
        os.replace(part, folder / ADAPTER)
    trainer.accelerator.wait_for_everyone()
