"""`compile`: a model with a cache of fixed size, compiled once for every prompt length.

A prompt is cut into chunks of a few sizes (`chunks`), padded on the left in the first one. Layers are compiled one by
one (`prompt_attention`). On a GPU each size of chunk is a CUDA graph, and so is the decode step (`graphs`).
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
import time
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateNonBeamOutput

from ..algebra import holds_integers
from ..errors import ConfigError, DoesNotFitError, SWAAError, UnsupportedModelError
from .cache import CACHE, SWAACache
from .chunks import SMALLEST, cut, ladder, most_pads
from .config import swaa_of
from .conversation import Conversation
from .graphs import Graphs
from .prompt import prompt
from .prompt_attention import PromptChunk, PromptModel
from .serving import ServedModel
from .surroundings import surroundings


def compile(
    model: PreTrainedModel,
    *,
    max_length: int,
    batch_size: int = 1,
    prefill_chunk: int = 8192,
    options: dict[str, Any] | None = None,
    backend: str | Callable[..., Any] | None = None,
) -> CompiledModel:
    """Prepares a model for requests of up to `max_length` tokens, without any compilation after `warmup(all=True)`.

    Args:
        model: a model with `attn_implementation="swaa_flex"`.
        max_length: the most tokens of a request, prompt and answer together.
        batch_size: sequences that are decoded together; a request may have fewer.
        prefill_chunk: the most tokens of a prompt that are computed at once; a multiple of 128. There are smaller
            sizes for the rest of a prompt, each half of the one before. Activations take memory for one chunk.
        options: of `torch.compile` for the decode step.
        backend: of `torch.compile`; None: "inductor" on a GPU, no compilation on a CPU, where it takes minutes.

    Returns:
        The compiled model. Nothing is compiled before its `warmup` or its first request.

    Raises:
        ConfigError: if an argument makes no sense, or the model does not run swaa_flex.
        UnsupportedModelError: if its code takes pads for tokens, its modules cannot be copied, or its layers lie on
            several devices.

    Weights may change in place afterwards. If they are replaced (`model.to`, `load_state_dict(assign=True)`), or the
    recipe is, requests are refused: compile again.
    """
    return CompiledModel(model, max_length, batch_size, prefill_chunk, options, backend)


def _for_requests(method: Callable[..., Any]) -> Callable[..., Any]:
    """One call at a time, without gradients and autocast; not in inference mode, whose tensors cannot be written."""
    plain = torch.inference_mode(False)(torch.no_grad()(method))

    @functools.wraps(method)
    def alone(self: CompiledModel, *args: Any, **kwargs: Any) -> Any:
        with self._lock, torch.autocast(self.device.type, enabled=False):
            return plain(self, *args, **kwargs)

    return alone


class CompiledModel:
    """See `compile`.

    Threads may share it: calls wait for each other, and a request that another thread has replaced is refused.

    Attributes:
        model: the model.
        cache: its `SWAACache`.
        max_length: the most tokens of a request.
        batch_size: sequences that are decoded together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_length: int,
        batch_size: int,
        prefill_chunk: int,
        options: dict[str, Any] | None,
        backend: str | Callable[..., Any] | None,
    ) -> None:
        for name, value in (("max_length", max_length), ("batch_size", batch_size), ("prefill_chunk", prefill_chunk)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: expected a positive number")
        if prefill_chunk % SMALLEST:
            raise ConfigError(f"prefill_chunk={prefill_chunk}: expected a multiple of {SMALLEST}")
        if not callable(getattr(model, "can_generate", None)) or not model.can_generate():
            raise ConfigError(f"expected a causal language model of transformers, got {type(model).__name__}")
        if model.config._attn_implementation != "swaa_flex":
            raise ConfigError(
                f"the model runs attn_implementation={model.config._attn_implementation!r}; "
                "call swaa_flex.adapt(model, recipe) before compiling it"
            )
        _refuse_rotations_that_change(model, max_length)
        _refuse_several_devices(model)
        self.model = model.eval()
        self.max_length = max_length
        self.batch_size = batch_size
        self.chunks = ladder(min(prefill_chunk, _whole_blocks(max_length)))
        self.device = model.device
        self.cache = self._new_cache()
        _refuse_what_takes_pads(self.cache)
        self.first = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        self.tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=self.device)
        self.last_row = torch.zeros(1, dtype=torch.long, device=self.device)  # of a chunk: the last that is no pad ...
        self.pads_after = torch.zeros((), dtype=torch.long, device=self.device)  # ... and how many pads follow it
        self._lock = threading.RLock()
        self._owner = 0  # the thread that began the request
        self.rows = 0  # sequences of the request, at most batch_size
        self.room = 0  # decode steps that the request may still take
        self.calls = 0  # requests and decode steps up to now
        self._conversation: Conversation | None = None  # in the cache, if a request may go on with it
        if backend is None and self.device.type == "cuda":
            backend = "inductor"
        self._is_compiled = backend is not None
        self._prompt_model = PromptModel(model, backend)
        self._decode = _compiled(_decode, backend, options)
        self._addresses, self._hooks = _addresses(model), _hooks(model)
        self._graphs = Graphs(self.device)
        self._ids = {size: torch.zeros(batch_size, size, dtype=torch.long, device=self.device) for size in self.chunks}
        self._prompts: dict[tuple[int, int | None], Callable[[], Tensor]] = {}  # by size and dense tail
        self._restart: Callable[[], None]
        self._release: Callable[[], None]
        self._step: Callable[[], Tensor]
        self._is_warm = False
        self._has_warned = False
        self._free = 0  # bytes of the device, before anything was allocated

    # --- requests ---------------------------------------------------------------------------------------------

    @_for_requests
    def warmup(self, *, all: bool = False, quiet: bool = False) -> CompiledModel:
        """Makes what every request needs: the decode step and the smallest chunk. Other sizes are made when needed.

        Args:
            all: whether to make all sizes now, so that no request waits for one.
            quiet: whether to say nothing; otherwise stderr shows what is being made, and then how long it took.

        Raises:
            DoesNotFitError: if the memory of the device does not suffice; says which max_length would fit.
        """
        from rich.console import Console  # not needed by servers that are quiet

        self._check_model()
        console = Console(stderr=True, quiet=quiet or not self._is_compiled)
        with console.status("swaa_flex: warming up") as status:
            seconds = self._make(self.chunks if all else self.chunks[:1], None, status.update)
        if seconds:
            each = ", ".join(f"{name} {took:.1f}" for name, took in seconds.items())
            said = f"swaa_flex: ready after {sum(seconds.values()):.1f} s ({each})"
            console.print(said, highlight=False, soft_wrap=True)
        return self

    @_for_requests
    def prefill(self, input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None = None) -> Tensor:
        """Starts a request: computes its prompts.

        Args:
            input_ids: `[sequences, len]`, or a list of token lists of any lengths.
            attention_mask: `[sequences, len]`, 0 for pads, on either side.

        Returns:
            Logits of the first new token, `[sequences, vocab]`.

        Raises:
            ConfigError: if the request has more sequences or tokens than the model was compiled for.
        """
        return self._begin(input_ids, attention_mask)

    @_for_requests
    def decode_step(self, tokens: Tensor) -> Tensor:
        """Appends one token to each sequence.

        Args:
            tokens: `[sequences]`.

        Returns:
            Logits of the next token, `[sequences, vocab]`; valid until the next call.

        Raises:
            ConfigError: if no prompt was computed before, or it was interrupted, or max_length is reached.
        """
        rows, room = self.rows, self.room
        if rows > 0 and self._owner != threading.get_ident():
            raise ConfigError(
                "decode_step: another thread has begun a request since then, which replaced this one; use generate, "
                "or hold a lock of your own from prefill on"
            )
        _check_chosen(tokens, rows, "decode_step")
        if room == 0:
            raise ConfigError(f"the request has reached max_length={self.max_length} tokens; compile for more")
        self.calls += 1
        conversation, self._conversation = self._conversation, None
        self.rows = self.room = 0  # an interrupted step cannot be gone on with
        self.tokens[:rows, 0] = tokens.reshape(-1)
        with prompt():  # whatever surrounds the call
            logits = self._step()[:rows]
        if conversation is not None:
            conversation.answers.append(self.tokens[:rows].clone())
        self._conversation = conversation
        self.rows, self.room = rows, room - 1
        return logits

    @_for_requests
    def generate(
        self,
        inputs: Tensor | Sequence[Sequence[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> GenerateNonBeamOutput | torch.LongTensor:
        """Answers prompts as `generate` of transformers does, whose code chooses tokens and stops.

        It takes what that takes for greedy decoding and sampling: a `GenerationConfig` or its fields, logits
        processors, stopping criteria, stop strings, a streamer, `return_dict_in_generate`, `num_return_sequences` up
        to `batch_size` sequences. `model.generate(..., custom_generate=server)` is the same, but there transformers
        (5.17 to 5.24) hands on neither `streamer` nor `tokenizer`.

        After each token the host reads whether all answers have ended, as with any model, and waits for the device
        there. Prompts on another device, and some of what may be handed in, a streamer for one, make it wait again.

        Args:
            inputs: `[sequences, len]`, also as `input_ids=`, beside `attention_mask=`. Or a list of token lists, which
                are padded on the left.
            generation_config: of the request; the model's if None.
            kwargs: of transformers' `generate`.

        Returns:
            Prompts and answers, `[sequences, len]`, or an output that holds them, if the config asks for one. It has
            no cache, as the next request overwrites that.

        Raises:
            ConfigError: if the request has more sequences or tokens than the model was compiled for, or asks for what
                needs another cache or other forwards, such as beams and assistants.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is not None:
            prompts = self._checked(input_ids, kwargs.get("attention_mask"))
            if not isinstance(input_ids, Tensor):
                pad = self.model.generation_config.pad_token_id or 0
                input_ids = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side="left")
                real = [torch.ones_like(row) for row in prompts]
                kwargs["attention_mask"] = pad_sequence(real, batch_first=True, padding_side="left")
        answers = ServedModel(self).generate(input_ids, generation_config, **kwargs)
        self.rows = self.room = 0  # the request has ended
        return answers  # type: ignore[no-any-return]

    @_for_requests
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> GenerateNonBeamOutput | torch.LongTensor:
        """The decoding method of `model.generate(..., custom_generate=server)`; see `generate`."""
        if model is not self.model:
            raise ConfigError("custom_generate: another model was compiled than the one whose generate was called")
        return ServedModel(self).decode(
            input_ids, logits_processor, stopping_criteria, generation_config, streamer, **kwargs
        )

    @_for_requests
    def forget(self) -> None:
        """Lets the next request be computed by itself, even if it begins with the tokens of the last one.

        To be called after weights were written past autograd (`tensor.data`), which nothing can notice.
        """
        self._conversation, self.rows, self.room = None, 0, 0

    # --- inside -----------------------------------------------------------------------------------------------

    def _begin(
        self, input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None, new: int = 0
    ) -> Tensor:
        """Starts a request that will have `new` tokens more than its prompts."""
        prompts = self._checked(input_ids, attention_mask, new)
        self._check_model()
        self._make(self.chunks[:1], None)
        self.calls += 1
        return self._prefill(prompts)

    def _checked(
        self, input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None, new: int = 0
    ) -> list[Tensor]:
        """The prompts one by one, without pads."""
        if isinstance(input_ids, Tensor):
            if input_ids.dim() != 2:
                raise ConfigError(f"input_ids of shape {list(input_ids.shape)}: expected [sequences, len]")
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            if not isinstance(real, Tensor) or real.shape != input_ids.shape:
                raise ConfigError(
                    f"attention_mask: expected a tensor of the shape of input_ids, {list(input_ids.shape)}, "
                    f"got {list(real.shape) if isinstance(real, Tensor) else type(real).__name__}"
                )
            rows = [row[kept] for row, kept in zip(input_ids, real.to(input_ids.device).bool(), strict=True)]
        elif attention_mask is not None:
            raise ConfigError("attention_mask with a list of prompts: leave it out, lists have no pads")
        elif isinstance(input_ids, Mapping):
            raise ConfigError("input_ids: got a mapping; hand on what it holds, as in generate(**inputs)")
        else:
            rows = [_as_ids(row, number) for number, row in enumerate(input_ids)]
        if not 1 <= len(rows) <= self.batch_size:
            raise ConfigError(f"a request of {len(rows)} sequences: compiled for batch_size={self.batch_size}")
        longest = max(len(row) for row in rows)
        if min(len(row) for row in rows) == 0:
            raise ConfigError("a prompt without tokens: expected at least one token in each sequence")
        for number, row in enumerate(rows):
            self._check_ids(row, number)
        if longest + new > self.max_length:
            asked = f" and {new} new ones" if new else ""
            raise ConfigError(
                f"a prompt of {longest} tokens{asked}: compiled for max_length={self.max_length}; "
                "shorten the request, or compile for more"
            )
        return [row.to(self.device) for row in rows]

    def _check_ids(self, row: Tensor, number: int) -> None:
        """Refuses what are no token ids; on a GPU, reading their values would make the host wait."""
        if not holds_integers(row):
            raise ConfigError(f"sequence {number}: expected integers, token ids, got {row.dtype}")
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if row.device.type != "cpu":
            return
        low, high = (int(end) for end in row.aminmax())
        if not 0 <= low <= high < vocabulary:
            raise ConfigError(f"sequence {number}: token ids from {low} to {high}; the model has {vocabulary}")

    def _check_model(self) -> None:
        """Refuses a model that is no longer the one that was compiled."""
        if self.model.training:
            raise ConfigError("the model was put into training mode after it was compiled; call model.eval()")
        implementation = self.model.config._attn_implementation
        recipe = swaa_of(self.cache.config) if implementation == "swaa_flex" else None
        if recipe != self.cache.swaa:
            raise ConfigError(
                f"the model was compiled for {self.cache.swaa} and runs {recipe or implementation} by now; "
                "call swaa_flex.adapt, if need be, and swaa_flex.compile again"
            )
        if _addresses(self.model) != self._addresses or _hooks(self.model) != self._hooks:
            raise ConfigError(
                "the model's weights were replaced (moved, converted, or assigned), or a layer replaced or hooked, "
                "after it was compiled; call swaa_flex.compile again"
            )

    def _prefill(self, prompts: list[Tensor]) -> Tensor:
        tail = surroundings.prompt.dense_tail
        begun, self._conversation = self._conversation, None
        self.rows = self.room = 0  # an interrupted prompt cannot be gone on with
        lengths = torch.tensor([len(row) for row in prompts], device="cpu")
        longest = int(lengths.max())
        new = 0 if begun is None else self._new_tokens(begun, prompts, tail)
        if new == 0 or self._make(cut(new, self.chunks), tail):  # what was made has used the cache
            begun, new = None, longest
        sizes = cut(new, self.chunks)
        self._make(sizes, tail)
        # Pads are on the left of new sequences, and on the right of those that go on.
        columns = sum(sizes)
        ids = torch.zeros(self.batch_size, columns, dtype=torch.long, device=self.device)
        for index in range(self.batch_size):  # an incomplete batch repeats its last sequence
            row = prompts[min(index, len(prompts) - 1)][-new:]
            ids[index, : len(row)] = row
            if begun is None:
                ids[index] = ids[index].roll(columns - len(row))
        every = lengths[torch.arange(self.batch_size, device="cpu").clamp(max=len(prompts) - 1)]
        self.lengths.copy_(every)
        if begun is None:
            self.first.copy_(columns - every)
            self._restart()
        logits = None
        for number, chunk in enumerate(ids.split(list(sizes), dim=1)):
            size = chunk.shape[1]
            pads = columns - new if begun is not None and number == len(sizes) - 1 else 0
            self.last_row.fill_(size - pads - 1)
            self.pads_after.fill_(pads)
            self._ids[size].copy_(chunk)
            logits = self._prompts[size, tail]()
        assert logits is not None
        logits = logits[: len(prompts)].clone()  # the next graph that runs may write over them
        self._release()
        held = columns if begun is None else begun.columns + new
        self._conversation = Conversation(prompts, held, tail, _edits(self.model))
        self.rows, self.room, self._owner = len(prompts), self.max_length - longest, threading.get_ident()
        return logits

    def _new_tokens(self, begun: Conversation, prompts: list[Tensor], tail: int | None) -> int:
        """With how many tokens each prompt goes on with what lies in the cache; 0 if all of it has to be computed."""
        new = 0 if begun.edits != _edits(self.model) else begun.new_tokens(prompts, tail)
        if new == 0 or not self._holds_what_new_rows_see():
            return 0
        assert self.cache.max_length is not None
        return new if begun.columns + sum(cut(new, self.chunks)) <= self.cache.max_length else 0

    def _holds_what_new_rows_see(self) -> bool:
        """Whether a further turn may go on in the cache: no layer has released keys that its dense tail would see."""
        if not self.cache.releases_prompts:
            return True
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "a further turn is computed anew, with all that came before: the recipe has released keys that the "
                f"last {self.cache.swaa.dense_tail} rows of its prompt see; with full_attention_decode=True, or "
                "dense_tail=0, a turn goes on where the one before ended",
                stacklevel=4,
            )
        return False

    @property
    def _most_pads(self) -> int:
        return 2 * most_pads(self.max_length, self.chunks)  # of a first turn, and of a further one

    def _new_cache(self) -> SWAACache:
        cache = SWAACache(self.model.config, max_length=_whole_blocks(self.max_length + self._most_pads))
        if self.device.type == "cuda":
            cache.keep_addresses()
        return cache

    def _make(
        self, sizes: Sequence[int], tail: int | None, tell: Callable[[str], None] | None = None
    ) -> dict[str, float]:
        """Makes what prompts of these sizes of chunks need and is not there yet; what the cache holds is lost then.

        Args:
            sizes: of chunks.
            tail: dense tail that replaces the recipe's, None for that.
            tell: is told what is being made.

        Returns:
            The seconds that it took to make each thing that was missing.

        Raises:
            DoesNotFitError: if the memory of the device does not suffice; says which max_length would fit.
        """
        missing: dict[str, Callable[[], None]] = {} if self._is_warm else {"decode step": self._make_steps}
        for size in dict.fromkeys(sizes):
            if (size, tail) not in self._prompts:
                missing[f"chunks of {size}"] = functools.partial(self._make_chunk, size, tail)
        if not missing:
            return {}
        self._conversation, self.rows, self.room = None, 0, 0
        for static in (self.last_row, self.pads_after):
            static.zero_()
        if not self._is_warm:
            self._free = _free_memory(self.device)
        seconds = {}
        try:
            for name, make in missing.items():
                if tell is not None:
                    tell(f"swaa_flex: making {name}")
                begun = time.perf_counter()
                make()
                seconds[name] = time.perf_counter() - begun
        except torch.OutOfMemoryError as error:
            raise self._does_not_fit() from error
        return seconds

    def _make_chunk(self, size: int, tail: int | None) -> None:
        self.cache.restart(self.first)
        self._prompts[size, tail] = self._graphs.capture(functools.partial(self._chunk, size, tail))

    def _release_prompts(self) -> None:
        self.cache.hold_prompts()  # a graph is made by running twice
        self.cache.begin_decoding()

    def _make_steps(self) -> None:
        """What surrounds prompts, and the decode step."""
        self.cache.reset()  # an earlier warm-up may have been interrupted
        self._store_nothing()
        self._restart = self._graphs.capture(lambda: self.cache.restart(self.first))
        self._release = self._graphs.capture(self._release_prompts)
        with prompt():  # graphs remember what they are told while they are made
            try:
                self._step = self._graphs.capture(lambda: self._decode(self))
            except ConfigError as error:  # of the cache, about the shape of keys
                raise UnsupportedModelError(
                    f"model type {self.model.config.model_type!r}: compiled prompts store keys as attention sees them "
                    f"and the model stores others ({error}); use generate of transformers, with SWAACache or without"
                ) from error
        self._is_warm = True

    def _store_nothing(self) -> None:
        """A chunk that only stores, so that layers make room for keys and values of their shapes."""
        size = self.chunks[0]
        chunk = PromptChunk(self.model, self.cache, size, self.lengths, self.pads_after, only_stores=True)
        failure: SWAAError | None = None
        try:
            self._prompt_model(self._ids[size], self._ids[size], chunk, self.last_row)
        except SWAAError as error:
            failure = error
        if chunk.reached != self._prompt_model.attends:
            raise UnsupportedModelError(
                "compile runs a copy of the model's modules, and attention of the copy was not reached: the forward "
                "of the model, or of a layer, was replaced by a function that calls the original; put the model's own "
                "forward back"
            ) from failure
        if failure is not None:
            raise failure
        self.cache.restart(self.first)

    def _chunk(self, size: int, tail: int | None) -> Tensor:
        """The next chunk of the prompts, from `_ids`: logits after `last_row`, `[batch_size, vocab]`."""
        columns = torch.arange(size, device=self.device) + self.cache.get_seq_length()
        with prompt(dense_tail=tail):
            chunk = PromptChunk(self.model, self.cache, size, self.lengths, self.pads_after)
            # Pads have positions of tokens: rotary embeddings look at the largest one, and tables of positions end.
            positions = (columns - self.first[:, None]).minimum(self.lengths[:, None] - 1).clamp(min=0)
            return self._prompt_model(self._ids[size], positions, chunk, self.last_row)

    def _does_not_fit(self) -> DoesNotFitError:
        """The error for the memory that was free at first, a fifth of it reckoned for activations."""
        per_token, fixed = self.cache.size_of(self.batch_size, self.model.dtype)
        capacity = self.cache.max_length or 0
        needed = per_token * capacity + fixed
        fits = int((self._free * 0.8 - fixed) / per_token) - self._most_pads if per_token else 0
        fits = fits // SMALLEST * SMALLEST
        self.cache = self._new_cache()  # what was allocated goes
        self._prompts.clear()
        self._is_warm = False
        if 0 < fits < self.max_length:
            way_out = f"max_length={fits} would fit"
        else:  # they would fit, or no length of them would: the rest is too large
            way_out = f"take a smaller prefill_chunk than {self.chunks[-1]}, a smaller batch_size, or a smaller model"
        gib = 1 << 30
        return DoesNotFitError(
            f"max_length={self.max_length} with batch_size={self.batch_size} needs {needed / gib:.1f} GiB of keys and "
            f"values, and {self._free / gib:.1f} GiB were free; {way_out}"
        )


def _as_ids(row: Any, number: int) -> Tensor:
    """A sequence of a request as a tensor `[len]`."""
    try:
        ids = row.clone() if isinstance(row, Tensor) else torch.tensor(row)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"sequence {number}: expected token ids, got {row!r:.60}") from error
    if ids.dim() != 1:
        raise ConfigError(f"sequence {number} has the shape {list(ids.shape)}: expected a list of token ids for each")
    return ids


def _check_chosen(tokens: Any, rows: int, where: str) -> None:
    """Refuses what is not one token id for each sequence."""
    if not holds_integers(tokens):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ConfigError(f"{where}: expected a tensor of token ids, [sequences], got {got}")
    if tokens.numel() != rows:
        raise ConfigError(f"{where}: got {tokens.numel()} tokens for {rows} sequences; prefill comes first")


def _addresses(model: PreTrainedModel) -> list[int]:
    """Where the weights lie, which is what CUDA graphs remember of them."""
    # Rotary embeddings of these kinds replace their buffers themselves (transformers 5.17).
    settled = (
        module
        for module in model.modules()
        if not re.search("longrope|dynamic", str(getattr(module, "rope_type", "")))
    )
    buffers = (buffer for module in settled for buffer in module.buffers(recurse=False))
    tensors = itertools.chain(model.parameters(), buffers)
    return [getattr(tensor, "_local_tensor", tensor).data_ptr() for tensor in tensors]


def _edits(model: PreTrainedModel) -> int:
    """How often weights have changed in place."""
    return sum(tensor._version for tensor in model.parameters() if not tensor.is_inference())


def _hooks(model: PreTrainedModel) -> list[tuple[Any, ...]]:
    """Each module with what runs around its forward, and its adapters of peft: graphs do not look at them again."""
    return [
        (
            *(id(module), id(vars(module).get("forward")), *module._forward_pre_hooks, *module._forward_hooks),
            *(str(vars(module).get(name)) for name in ("_active_adapter", "_disable_adapters", "merged_adapters")),
        )
        for module in model.modules()
    ]


def _refuse_rotations_that_change(model: PreTrainedModel, max_length: int) -> None:
    """Refuses rotary embeddings that depend on the length so far: held keys would have to be rotated again."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        least = kind.get("original_max_position_embeddings") or config.max_position_embeddings
        if kind.get("rope_type") in ("dynamic", "longrope") and max_length > least:
            raise ConfigError(
                f"max_length={max_length}: the model rotates keys in another way beyond {least} tokens (rope_type="
                f"{kind['rope_type']!r}), and keys of a prompt that comes in chunks are held as they were rotated; "
                f"compile for max_length={least}, or use generate of transformers"
            )


def _refuse_several_devices(model: PreTrainedModel) -> None:
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"compile is for a model on one device, and this one has layers on {', '.join(devices)}; use generate of "
            "transformers, or split each layer by tensor parallelism"
        )


def _refuse_what_takes_pads(cache: SWAACache) -> None:
    """Refuses models that take the pads before a prompt for tokens where they do not get an attention mask."""
    if getattr(cache.config, "attn_temperature_tuning", False):
        raise UnsupportedModelError(
            f"model type {cache.config.model_type!r} scales queries by how much its cache has seen "
            "(attn_temperature_tuning), which compiled prompts do not tell it; use generate of transformers"
        )
    recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
    if recurrent or cache.config.model_type in _MAKING_MASKS:
        raise UnsupportedModelError(
            f"model type {cache.config.model_type!r}: compiled prompts are padded, and "
            + ("its recurrent layers take" if recurrent else "it takes")
            + " pads for tokens; use generate of transformers, with SWAACache or without"
        )


_MAKING_MASKS = frozenset({"biogpt"})
"""Model types that make an attention mask of ones where they get none (transformers 5.17 to 5.24)."""


def _compiled(
    function: Callable[..., Tensor], backend: str | Callable[..., Any] | None, options: dict[str, Any] | None = None
) -> Callable[..., Tensor]:
    if backend is None:
        return function
    # A code object of its own: torch.compile counts per code object what it has compiled.
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend, options=options)


def _decode(compiled: CompiledModel) -> Tensor:
    seen = compiled.cache.get_seq_length()
    positions = (seen - compiled.first)[:, None]
    out = compiled.model(input_ids=compiled.tokens, position_ids=positions, **{CACHE: compiled.cache})
    return out.logits[:, -1]  # type: ignore[no-any-return]


def _whole_blocks(length: int) -> int:
    return -(-length // SMALLEST) * SMALLEST


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
