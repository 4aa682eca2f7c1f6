"""Fine-tunes the tiny model of tests/test_tuning.py in the processes of torchrun, which that test starts."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from processes import leave
from test_tuning import SHARED, adapted, examples, finetune
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from swaa_flex.tuning import TuningConfig

if __name__ == "__main__":
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
