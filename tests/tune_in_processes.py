"""What one process and the processes of torchrun fine-tune alike; started by tests/test_tuning.py."""

import json
import os
import sys
from pathlib import Path

import torch
import yaml
from processes import leave, run_in_processes
from safetensors.torch import load_file
from tiny_models import tiny

import swaa_flex
from swaa_flex import SWAAConfig
from swaa_flex.tuning import LAUNCH, Example, TuningConfig, finetune

RECIPE = SWAAConfig(sliding_window=8, sink_tokens=2, full_attention_layers=[1], dense_tail=4)
FAST = {"learning_rate": 0.02, "gradient_accumulation": 2, "dropout": 0.0, "log_steps": 1}
SHARED = {"max_steps": 3, "save_steps": 3, **FAST}


def examples(count, seed=0):
    """The answer repeats the second token of the prompt, which the window does not reach from there."""
    made = []
    for number in range(count):
        chosen = torch.Generator().manual_seed(seed * 1000 + number)
        ids = torch.randint(3, 99, (20 + number % 7,), generator=chosen).tolist()
        made.append(Example(ids + [ids[1]] * 3, [False] * len(ids) + [True] * 3))
    return made


def adapted(recipe=RECIPE, **size):
    return swaa_flex.adapt(tiny("llama", **size), recipe)


def history(folder):
    """Losses of training and of held-out examples, as they were logged."""
    logged = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "eval_loss", "eval_full_attention_loss")
    return [(line["step"], name, line[name]) for line in logged for name in names if name in line]


def check_two_processes(tmp_path, how, tied=False, **environment):
    launch = yaml.safe_load((LAUNCH / f"{how}.yaml").read_text())
    if how == "fsdp":  # as `accelerate launch` hands it on, which itself starts one process only without a GPU
        environment |= {"ACCELERATE_USE_FSDP": "true"}
        environment |= {name.upper(): str(value) for name, value in launch["fsdp_config"].items()}
    environment |= {"PACKED": str(how == "ddp"), "TIED": str(tied)}
    run_in_processes("tune_in_processes.py", tmp_path / "two", **environment)
    kept = [["FSDPEmbedding", False]] if how == "fsdp" and not tied else []
    for rank in range(2):
        found = json.loads((tmp_path / "two" / f"{rank}.json").read_text())
        assert found == {"sharded": how == "fsdp", "world": 2, "unshard_in_backward": kept}
    config = TuningConfig(batch_size=4, packing=how == "ddp", **SHARED)
    model = adapted(tie_word_embeddings=tied)
    finetune(model, examples(16), tmp_path / "one", held_out=examples(5, 1), config=config, quiet=True)
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert [line[:2] for line in one] == [line[:2] for line in two] and len(one) == 5
    torch.testing.assert_close([line[2] for line in two], [line[2] for line in one], atol=1e-3, rtol=1e-3)
    ours, theirs = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("two", "one"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-3, rtol=1e-3)


if __name__ == "__main__":
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    folder = Path(sys.argv[1])
    if os.environ.get("ACCELERATE_USE_FSDP"):
        # accelerate 1.15 shards on what it calls GPUs only; torch shards on CPUs as well.
        start = PartialState.__init__

        def on_gpus(self, *args, **kwargs):
            start(self, *args, **kwargs)
            if self.distributed_type == DistributedType.MULTI_CPU:
                self.distributed_type = DistributedType.MULTI_GPU

        PartialState.__init__ = on_gpus
    kept, set_unshard = [], FSDPModule.set_unshard_in_backward

    def noted(module, wanted):
        kept.append((type(module).__name__, wanted))
        set_unshard(module, wanted)

    FSDPModule.set_unshard_in_backward = noted
    config = TuningConfig(batch_size=2, packing=os.environ["PACKED"] == "True", **SHARED)
    model = adapted(tie_word_embeddings=os.environ["TIED"] == "True")
    tuned = finetune(model, examples(16), folder, held_out=examples(5, 1), config=config, quiet=True)
    sharded = any(isinstance(parameter, DTensor) for parameter in tuned.parameters())
    found = {"sharded": sharded, "world": torch.distributed.get_world_size(), "unshard_in_backward": kept}
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    leave()
