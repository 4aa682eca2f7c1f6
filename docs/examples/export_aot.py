"""Export a model with its cache, and run it from a process without transformers and without swaa_flex.

    python docs/examples/export_aot.py

What it shows:

1. A tiny random Qwen3 under a sliding-window recipe, with a `SWAACache` of fixed size.
2. `torch.export` of two steps, one that appends a chunk of a prompt and one that appends a token. The masks are built
   inside the graphs, from the counters in the cache, so one graph serves every position.
3. AOTInductor turns each step into a `.pt2` package of native code.
4. A second process, in which only torch is imported, loads the packages, computes a prompt and decodes greedily. It
   gets the tokens that `generate` gets.

The packages hold the weights but no cache: its tensors are inputs that the steps change in place, so prefill and
decode share them without a copy. A prompt is padded on the left to whole chunks, and `first` says where it begins;
only batch size, chunk size and the capacity of the cache are constant in the graphs. The recipe has no dense tail and
slides while decoding: a layer then holds sinks and window from the first token on.

It needs a C++ compiler and takes a minute or two.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

CHUNK = 256  # tokens of a prompt per call
CAPACITY = 768  # columns of the cache: pads, prompt and answer
PROMPT, NEW = 300, 40


# --- the process that exports -------------------------------------------------------------------------------------


def tiny_model():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from swaa_flex import SWAAConfig

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CAPACITY,
        initializer_range=0.3,  # larger than usual, or random weights repeat themselves
        attn_implementation="swaa_flex",
        swaa=SWAAConfig(
            sliding_window=128,
            sink_tokens=16,
            full_attention_layers=[1],
            full_attention_decode=False,
            dense_tail=0,
        ),
    )
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


class Step(torch.nn.Module):
    """Appends tokens to the sequences in a cache: from token ids and the cache's tensors to logits."""

    def __init__(self, model):
        super().__init__()
        from swaa_flex import SWAACache

        self.model = model
        self.cache = SWAACache(model.config, max_length=CAPACITY)
        # A forward lets the cache learn the shapes of keys and values. After `start` every call takes the same path,
        # the first one too.
        with torch.no_grad():
            model(torch.zeros(1, CHUNK, dtype=torch.long), past_key_values=self.cache)
        self.cache.reset()
        self.cache.start(torch.zeros(1, dtype=torch.long))

    def empty_state(self):
        """The tensors of an empty cache: of each layer, and the column of each sequence's first token."""
        names = ("keys", "values", "cumulative_length")
        layers = [{name: torch.zeros_like(getattr(layer, name)) for name in names} for layer in self.cache.layers]
        return {"first": torch.zeros_like(self.cache.first), "layers": layers}

    def forward(self, ids, state):
        self.cache.first = first = state["first"]
        for layer, tensors in zip(self.cache.layers, state["layers"], strict=True):
            for name, tensor in tensors.items():
                setattr(layer, name, tensor)
        columns = self.cache.get_seq_length() + torch.arange(ids.shape[1])
        out = self.model(
            input_ids=ids,
            position_ids=(columns - first[:, None]).clamp(min=0),
            past_key_values=self.cache,
            logits_to_keep=1,
        )
        return out.logits[:, -1]


def export(model, tokens):
    """The step for so many tokens, as an exported program."""
    step = Step(model)  # one for each export, which leaves traced tensors in it
    with torch.no_grad():
        return torch.export.export(step, (torch.zeros(1, tokens, dtype=torch.long), step.empty_state()))


def write_packages(folder):
    model = tiny_model()
    for name, tokens in (("prefill", CHUNK), ("decode", 1)):
        torch._inductor.aoti_compile_and_package(export(model, tokens), package_path=str(folder / f"{name}.pt2"))
    torch.manual_seed(1)
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT))
    answer = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )[:, PROMPT:]
    torch.save({"state": Step(model).empty_state(), "prompt": prompt, "answer": answer}, folder / "request.pt")


# --- the process that runs ----------------------------------------------------------------------------------------


def run_packages(folder):
    prefill, decode = (
        torch._inductor.aoti_load_package(str(folder / f"{name}.pt2")) for name in ("prefill", "decode")
    )
    request = torch.load(folder / "request.pt")
    state, prompt = request["state"], request["prompt"]

    pads = -prompt.shape[1] % CHUNK
    state["first"].fill_(pads)
    for ids in torch.nn.functional.pad(prompt, (pads, 0)).split(CHUNK, dim=1):
        logits = prefill(ids.contiguous(), state)
    answer = []
    while len(answer) < NEW:
        token = logits.argmax(-1, keepdim=True)
        answer.append(token)
        if len(answer) < NEW:
            logits = decode(token, state)
    answer = torch.cat(answer, dim=1)

    assert "transformers" not in sys.modules and "swaa_flex" not in sys.modules
    assert torch.equal(answer, request["answer"]), (answer, request["answer"])
    print(f"{answer.shape[1]} tokens as from generate:", *answer[0].tolist())


def main():
    if sys.argv[1:]:
        run_packages(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_packages(Path(folder))
        subprocess.run([sys.executable, __file__, folder], check=True)


if __name__ == "__main__":
    main()
