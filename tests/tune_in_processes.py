"""Fine-tunes the tiny model of tests/test_tuning.py in the processes of torchrun, which that test starts."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from test_tuning import SHARED, adapted, examples, finetune
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
    config = TuningConfig(batch_size=2, packing=os.environ["PACKED"] == "True", **SHARED)
    tuned = finetune(adapted(), examples(16), folder, held_out=examples(5, 1), config=config, quiet=True)
    sharded = any(isinstance(parameter, DTensor) for parameter in tuned.parameters())
    found = {"sharded": sharded, "world": torch.distributed.get_world_size()}
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
