"""The three systems against their reference twins."""

import copy
import io
import pickle
import re

import pytest
import torch
from helpers import assert_close_as_torch, needs_extension
from torch import nn
from twins import Ops, assert_compiles, assert_like_twin, grid, on_grid, results

import cnnlstm_fast as cf

# name: (constructor arguments behind input_channels, input shape behind the batch, features behind the batch)
SYSTEMS = {
    "CNN_LSTM_Simple": ({}, (3, 10, 13), (5 * 6, 64)),
    "CNN_LSTM_1DConv": ({"sequence_length": 30}, (3, 10, 13), (5 * 6, 64)),
    "CNN_LSTM_TimeDistributed": ({"image_size": (9, 12)}, (4, 3, 9, 12), (4, 64 * 4 * 6)),
}
systems = pytest.mark.parametrize("name", SYSTEMS)


def make(name: str, channels: int = 3, layers: int = 2):
    """The fast system and its reference twin with the same weights, and an input of two samples."""
    more, shape, _ = SYSTEMS[name]
    ours = on_grid(getattr(cf, name)(channels, 12, layers, 5, **more))
    twin = getattr(cf.reference, name)(channels, 12, layers, 5, **more)
    twin.load_state_dict(ours.state_dict())
    x = grid(2, *shape)
    return ours, twin, x if channels == 3 else x.narrow(x.dim() - 3, 0, channels)


@systems
@pytest.mark.parametrize("channels", [1, 3])
def test_results_and_gradients(name, channels):
    assert_like_twin(*make(name, channels))


@systems
def test_errors_over_many_draws_are_pytorchs(name):
    """Through saturated gates one draw's error is a matter of luck; the errors of many are not."""
    errors, own, norms = {}, {}, {}
    for _ in range(12):
        ours, twin, x = make(name)
        with torch.no_grad():
            grad = torch.randn(twin(x).shape)
        true = results(copy.deepcopy(twin).double(), x.double(), grad)
        for found, sums in ((results(ours, x, grad), errors), (results(twin, x, grad), own)):
            for key, t in found.items():
                sums[key] = sums.get(key, 0) + (t - true[key]).square().sum()
        for key, t in true.items():
            norms[key] = norms.get(key, 0) + t.square().sum()
    eps = torch.finfo(torch.float32).eps
    for key, error in errors.items():
        assert error.sqrt() <= 2 * own[key].sqrt() + 16 * eps * norms[key].sqrt(), key


@systems
def test_features(name):
    ours, twin, x = make(name)
    got = ours.features(x)
    assert got.shape == (2, *SYSTEMS[name][2])
    assert got.is_contiguous()
    torch.testing.assert_close(got, twin.features(x))


@systems
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batch_sizes(name, batch):
    ours, twin, x = make(name)
    x = x[:1].repeat(batch, *[1] * (x.dim() - 1))
    torch.testing.assert_close(ours.features(x), twin.features(x))
    if batch:
        torch.testing.assert_close(ours(x), twin(x))


def test_other_sizes_where_size_is_free():
    for name in ("CNN_LSTM_Simple", "CNN_LSTM_1DConv"):
        ours, twin, _ = make(name)
        for shape in ((1, 3, 2, 3), (2, 3, 28, 28), (2, 3, 7, 40)):
            x = grid(*shape)
            torch.testing.assert_close(ours(x), twin(x))


@systems
def test_strided_inputs(name):
    ours, twin, x = make(name)
    expected = twin(x)
    for d in range(1, x.dim()):
        torch.testing.assert_close(ours(x.movedim(d, 0).contiguous().movedim(0, d)), expected)
    torch.testing.assert_close(ours(x.to(memory_format=torch.preserve_format)[:, :].clone()), expected)
    torch.testing.assert_close(ours(x[:1].expand(x.shape)), twin(x[:1].expand(x.shape)))


@systems
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(name, dtype):
    ours, twin, x = make(name)
    got, expected = ours.to(dtype)(x.to(dtype)), twin.to(dtype)(x.to(dtype))
    true = twin.double()(x.to(dtype).double())  # of the same rounded parameters
    assert_close_as_torch(got, expected, true)


@systems
def test_weights_load_both_ways(name):
    ours, twin, x = make(name)
    assert list(ours.state_dict()) == list(twin.state_dict())
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in twin.named_modules()]
    assert isinstance(ours, type(twin))
    other = make(name)[0]
    twin.load_state_dict(other.state_dict())
    torch.testing.assert_close(twin(x), other(x))
    ours.load_state_dict(twin.state_dict())
    torch.testing.assert_close(ours(x), other(x))


@systems
def test_training_follows_the_same_curve(name):
    """By plain gradient descent: Adam makes whole steps of gradients that are rounding noise."""
    ours, twin, x = make(name)
    labels = torch.tensor([1, 3])
    losses = []
    for model in (ours, twin):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)  # Adam makes steps of noise
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-4)
    assert losses[0][-1] < losses[0][0]


@systems
def test_hooked_children_are_called(name):
    ours, twin, x = make(name)
    for child in [m for n, m in ours.named_modules() if n.startswith(("cnn", "relu", "pool"))]:
        seen = []
        handle = child.register_forward_hook(lambda m, i, o, seen=seen: seen.append(1) or o * 2)
        got = ours(x)
        handle.remove()
        assert seen == [1], f"{child} was not called"
        assert not torch.allclose(got, twin(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x), twin(x))


@systems
def test_replaced_children_are_called(name):
    ours, twin, x = make(name)
    swap = {"relu": nn.ELU()} if name == "CNN_LSTM_Simple" else {"cnn.1": nn.ELU()}
    if name == "CNN_LSTM_1DConv":
        swap["cnn_1d"] = nn.Sequential(nn.Conv1d(64, 64, 1), nn.Tanh(), nn.Identity())
    for model in (ours, twin):
        for path, module in swap.items():
            model.set_submodule(path, module)
    torch.testing.assert_close(ours(x), twin(x))
    for model in (ours, twin):
        if name != "CNN_LSTM_Simple":
            model.cnn.append(nn.Dropout(0.5).eval())
    torch.testing.assert_close(ours(x), twin(x))


@systems
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(name, way):
    ours, _, x = make(name)
    ours(x).sum().backward()
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(ours) if way == "deepcopy" else pickle.loads(pickle.dumps(ours))
    assert type(other) is type(ours)
    torch.testing.assert_close(other(x), ours(x))


@systems
def test_train_eval_and_no_grad_agree(name):
    ours, _, x = make(name)
    expected = ours.train()(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), expected)


@pytest.mark.parametrize("module", [cf, cf.reference], ids=["fast", "reference"])
def test_frames_of_another_size(module):
    model = module.CNN_LSTM_TimeDistributed(3, 8, 1, 2)
    message = (
        "the LSTM expects 12544 features but the CNN gives 16384 = 64 x 16 x 16 for 32x33 images "
        "(this model was made for 28x28): pass image_size=(32, 33)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model(torch.zeros(2, 3, 3, 32, 33))
    mended = module.CNN_LSTM_TimeDistributed(3, 8, 1, 2, image_size=(32, 33))
    assert mended(torch.zeros(2, 3, 3, 32, 33)).shape == (2, 2)
    with pytest.raises(ValueError, match=r"expected a batch of clips \(B, T, C, H, W\)"):
        model(torch.zeros(2, 3, 28, 28))


@needs_extension
@systems
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_nothing_but_blocks_between_image_and_lstm(name, gradients, always_ours):
    ours, _, x = make(name)
    with torch.set_grad_enabled(gradients), Ops() as ops:
        ours.features(x)
    assert set(ops.names) == {"cnnlstm_fast::conv_block"}
    assert len(ops.names) == (2 if name == "CNN_LSTM_1DConv" else 1)


class Features(nn.Module):
    """The CNN part as a module of its own, so that its parameters can be listed."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def parameters(self, recurse=True):
        return (p for n, p in self.model.named_parameters() if n.startswith("cnn"))

    def forward(self, x):
        return self.model.features(x)


@pytest.mark.some(2)
@systems
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_the_cnn_without_graph_breaks(name, backend):
    ours, _, x = make(name)
    module = Features(ours)
    assert_compiles(module, module, x, backend)
