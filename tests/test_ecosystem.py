"""The package under what others train and ship models with: sharding, loss scaling, trainers, checkpoints."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forked import run_forked
from helpers import needs_extension
from torch import nn
from torch.utils.checkpoint import checkpoint

import cnnlstm_fast as cf


def twins(name: str = "CNN_LSTM_Simple") -> tuple[nn.Module, nn.Module]:
    """A fast system and its reference with the same weights."""
    options = {"image_size": (12, 14)} if name == "CNN_LSTM_TimeDistributed" else {}
    fast, plain = (getattr(kind, name)(3, 12, 2, 5, **options) for kind in (cf, cf.reference))
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def batch(name: str = "CNN_LSTM_Simple", size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    clip = (4,) if name == "CNN_LSTM_TimeDistributed" else ()
    return torch.randn(size, *clip, 3, 12, 14), torch.randint(0, 5, (size,))


def assert_same_parameters(fast: nn.Module, plain: nn.Module, **tolerance) -> None:
    torch.testing.assert_close(dict(fast.state_dict()), dict(plain.state_dict()), **tolerance)


SYSTEMS = ("CNN_LSTM_Simple", "CNN_LSTM_1DConv", "CNN_LSTM_TimeDistributed")

_FSDP = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
sys.path.insert(0, "tests")
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import test_ecosystem as t

def run(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(3)
    mine = slice(rank * 3, rank * 3 + 3)
    for system in t.SYSTEMS:
        fast, plain = t.twins(system)
        x, y = t.batch(system, 6)
        for part in (fast.lstm, fast):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
        for _ in range(2):
            t.F.cross_entropy(fast(x[mine]), y[mine]).backward()
            t.F.cross_entropy(plain(x), y).backward()
        for (name, sharded), whole in zip(fast.named_parameters(), plain.parameters()):
            found = sharded.grad.full_tensor()
            torch.testing.assert_close(found, whole.grad, rtol=1e-4, atol=1e-6, msg=f"{system}: {name}")
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()

mp.start_processes(run, (sys.argv[1],), 2, start_method="fork")
print("the end")
"""


@needs_extension
def test_fully_sharded(tmp_path):
    """FSDP2 over two processes: gradients and results are those of one."""
    ran = run_forked(f"import sys; sys.argv[1:] = [{str(tmp_path / 'store')!r}]\n{_FSDP}")
    assert ran.stdout.endswith("the end\n"), ran.stderr[-3000:]


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_scaled_loss_under_autocast(name, accelerated):
    """``GradScaler``: the same steps, the same scale, and the step with infinite gradients left out."""
    fast, plain = twins(name)
    if accelerated:
        fast = cf.accelerate(copy.deepcopy(plain))
    scales = []
    x, y = batch(name)
    for model in (fast, plain):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(5):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x).float(), y)
            optimizer.zero_grad()
            scaler.scale(loss * (float("inf") if step == 3 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
    assert scales[:5] == scales[5:] == [1024, 2048, 2048, 1024, 1024]  # grown, halved by the infinity
    assert_same_parameters(fast, plain, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", SYSTEMS)
def test_activations_computed_again(name, reentrant):
    """Checkpointed features, of the fast system and of what ``accelerate`` makes of the plain one."""
    fast, plain = twins(name)
    accelerated = cf.accelerate(copy.deepcopy(plain))
    x, y = batch(name)
    for _ in range(3):  # the accelerated model fuses from its second call on
        grads = []
        for model in (fast, accelerated, plain):
            model.zero_grad()
            given = x.clone().requires_grad_()
            features = checkpoint(model.features, given, use_reentrant=reentrant)
            F.cross_entropy(model.fc(model.lstm(features)[0][:, -1]), y).backward()
            grads.append([given.grad, *(p.grad for p in model.parameters())])
        for mine in grads[:2]:
            torch.testing.assert_close(mine, grads[2], rtol=1e-4, atol=1e-6)


@needs_extension
def test_reduce_overhead_with_dynamic_shapes():
    fast, plain = twins()
    compiled = torch.compile(fast.eval(), mode="reduce-overhead", dynamic=True)
    with torch.no_grad():
        for size in (2, 3, 7):
            x, _ = batch(size=size)
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_lightnings_trainer(tmp_path):
    """Fit, checkpoint and go on from it: an accelerated model takes the steps of the plain one."""
    lightning = pytest.importorskip("pytorch_lightning")

    class Task(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, given, _):
            x, y = given
            return F.cross_entropy(self.model(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    _, plain = twins()
    fast = cf.accelerate(copy.deepcopy(plain))
    data = torch.utils.data.DataLoader([tuple(t[0] for t in batch(size=1)) for _ in range(12)], 4)
    options = dict(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    for model in (plain, fast):
        trainer = lightning.Trainer(max_epochs=2, **options)
        trainer.fit(Task(model), data)
    trainer.save_checkpoint(tmp_path / "fast.ckpt")
    assert any(site.plan != "PyTorch" for site in fast.report().sites)
    assert_same_parameters(fast, plain, rtol=1e-4, atol=1e-6)
    again = Task(cf.reference.CNN_LSTM_Simple(3, 12, 2, 5))
    again.load_state_dict(torch.load(tmp_path / "fast.ckpt", weights_only=True)["state_dict"])
    assert_same_parameters(again.model, fast, rtol=0, atol=0)


@pytest.mark.parametrize("name", SYSTEMS)
def test_checkpoints_of_other_versions(name, tmp_path):
    """What any version of torch saved, of the reference or the fast model, both load, with its results.

    ``make versions`` runs this under one version after another with a folder that they share.
    """
    folder = Path(os.environ.get("CNNLSTM_FAST_CHECKPOINTS", tmp_path))
    fast, plain = twins(name)
    x, _ = batch(name)
    for kind, model in (("fast", fast), ("reference", plain)):
        saved = {"state": model.state_dict(), "x": x, "out": model(x).detach()}
        torch.save(saved, folder / f"{name}-{kind}-{torch.__version__}.pt")
    found = sorted(folder.glob(f"{name}-*.pt"))
    assert len(found) >= 2
    for path in found:
        saved = torch.load(path, weights_only=True)
        for model in twins(name):
            model.load_state_dict(saved["state"])
            torch.testing.assert_close(model(saved["x"]), saved["out"], rtol=1e-4, atol=1e-5)
