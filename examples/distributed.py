"""DistributedDataParallel: gradients of several processes equal one process's.

Run as `torchrun --nproc-per-node 2 examples/distributed.py`, or as `python examples/distributed.py`,
which does just that. gloo on the CPU, nccl where every process has a GPU of its own. Each process sees
its share of a batch of real handwritten digits; process 0 then computes the gradients of the whole
batch alone and compares. Exits with 1 if they differ by more than rounding.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time

import side_by_side
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cnnlstm_fast as cf
from cnnlstm_fast.demo import data

#: Of the gradient's norm: what another order of summation explains, and nothing else does.
ROUNDING = 1e-5


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def compare(name: str, model: nn.Module, x: Tensor, y: Tensor, device: torch.device) -> bool:
    """Gradients over all processes against those of one; True on every process if they agree."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = model.to(device)
    alone = copy.deepcopy(model)
    ddp = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    share = len(x) // size
    mine = slice(rank * share, (rank + 1) * share)
    gradients(ddp, x[mine], y[mine])
    begin = time.perf_counter()
    found = gradients(ddp, x[mine], y[mine])
    ms = (time.perf_counter() - begin) * 1e3
    agree = torch.ones(1, device=device)
    if rank == 0:
        expected = gradients(alone, x, y)
        error, which = max(((found[n] - g).norm() / g.norm(), n) for n, g in expected.items())
        agree[0] = bool(error < ROUNDING)
        print(
            f"{name:10} {size} processes, {ms:7.1f} ms per step; gradients differ from one process's by at "
            f"most {error:.1e} of their norm ({which})",
            flush=True,
        )
    dist.broadcast(agree, 0)
    return bool(agree)


def main() -> None:
    if "RANK" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        sys.exit(subprocess.run([*torchrun, *sys.argv]).returncode)
    options = side_by_side.options(__doc__.splitlines()[0])
    local = int(os.environ["LOCAL_RANK"])
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if on_gpus else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        generator = torch.Generator().manual_seed(options.seed)  # the same on every process
        torch.manual_seed(options.seed)
        train, _ = data.load(options.seed)
        count = (4 if options.tiny else 64) * dist.get_world_size()
        x, y = data.clips(train.scans[:count], generator).to(device), train.labels[:count].to(device)
        reference = cf.reference.CNN_LSTM_TimeDistributed(data.CHANNELS, 64, 2, data.CLASSES)
        fast = cf.CNN_LSTM_TimeDistributed(data.CHANNELS, 64, 2, data.CLASSES)
        fast.load_state_dict(reference.state_dict())
        agree = [compare(*side, x, y, device) for side in (("reference", reference), ("fast", fast))]
    finally:
        dist.destroy_process_group()
    sys.exit(not all(agree))


if __name__ == "__main__":
    main()
