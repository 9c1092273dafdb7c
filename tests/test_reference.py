"""The reference: the block in PyTorch, and the tutorial's three systems, against code written here."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, in_layout, random_blocks, torch_block
from torch import nn

import cnnlstm_fast as cf
from cnnlstm_fast import reference


@random_blocks(20)
@pytest.mark.parametrize("layout", ["channels_first", "features", "columns_time_major"])
def test_conv_block(block, layout):
    tensors = {k: torch.randn(s) for k, s in block.shapes().items()}
    out = reference.conv_block(
        **tensors, stride=block.stride, padding=block.padding, dilation=block.dilation, groups=block.groups,
        activation=block.activation, pool=block.pool_module(), layout=layout,
    )  # fmt: skip
    assert torch.equal(out, in_layout(torch_block(block, **tensors), layout))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_activation_and_pool_modules(training, layout):
    """In the order of a module list, with the norm's own statistics; running ones are updated."""
    torch.manual_seed(torch.initial_seed())
    x, weight, bias = torch.randn(3, 4, 10, 9), torch.randn(8, 4, 3, 3), torch.randn(8)
    norm = nn.BatchNorm2d(8).train(training)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    twin = copy.deepcopy(norm)
    out = reference.conv_block(
        x,
        weight,
        bias,
        padding=1,
        norm=norm,
        activation=nn.LeakyReLU(0.1),
        pool=nn.AvgPool2d(2),
        layout=layout,
    )
    expected = F.avg_pool2d(F.leaky_relu(twin(F.conv2d(x, weight, bias, padding=1)), 0.1), 2)
    assert torch.equal(out, in_layout(expected, layout))
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, twin.get_buffer(name)), name


@pytest.mark.parametrize(
    "name",
    [
        "relu", "gelu", "silu", "tanh", "elu", "leaky_relu", "hardtanh", "sigmoid", "softplus", "mish",
        "hardswish", "hardsigmoid",
    ],
)  # fmt: skip
def test_activations_by_name(name):
    x, weight = torch.randn(2, 3, 7, 7), torch.randn(4, 3, 3, 3)
    out = reference.conv_block(x, weight, activation=name)
    assert torch.equal(out, getattr(F, name)(F.conv2d(x, weight)))


@pytest.mark.parametrize("activation", [nn.Softmax(dim=0), nn.PReLU(4), nn.GLU(0)], ids=repr)
def test_unbatched_maps_reach_modules_unbatched(activation):
    """A module that counts dimensions from the front sees (C, H, W), as in a plain Sequential."""
    x, weight = torch.randn(3, 7, 7), torch.randn(4, 3, 4, 4)
    expected = activation(F.conv2d(x, weight))
    assert torch.equal(reference.conv_block(x, weight, activation=activation), expected)
    assert torch.equal(cf.functional.conv_block(x, weight, activation=activation), expected)


def test_the_plan_is_ignored():
    x, weight = torch.randn(2, 3, 7, 7), torch.randn(4, 3, 3, 3)
    outs = [reference.conv_block(x, weight, plan=plan) for plan in ("auto", "direct", "chunked", "reference")]
    assert all(torch.equal(outs[0], out) for out in outs)


# ------------------------------------------------------------- the three systems


LSTM_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def stacked_lstm(lstm: nn.LSTM, steps: torch.Tensor) -> torch.Tensor:
    """The last step's output of a stacked batch-first LSTM, gate by gate; (B, S, F) -> (B, hidden)."""
    for layer in range(lstm.num_layers):
        w, u, b, c = (getattr(lstm, f"{kind}_l{layer}") for kind in LSTM_KINDS)
        hidden = cell = steps.new_zeros(steps.shape[0], lstm.hidden_size)
        outputs = []
        for step in steps.unbind(1):
            i, f, g, o = (step @ w.T + b + hidden @ u.T + c).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            outputs.append(hidden)
        steps = torch.stack(outputs, 1)
    return steps[:, -1]


def conv_relu_pool(image: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    return F.max_pool2d(F.conv2d(image, conv.weight, conv.bias, padding=1).clamp(min=0), 2)


def simple_features(model, x):
    """Each location a step: entry (b, i * W + j, c) is channel c at (i, j)."""
    y = conv_relu_pool(x, model.cnn)
    steps = [y[:, :, i, j] for i in range(y.shape[2]) for j in range(y.shape[3])]
    return torch.stack(steps, 1)


def conv1d_features(model, x):
    y = conv_relu_pool(x, model.cnn[0])
    line = torch.stack([y[:, :, i, j] for i in range(y.shape[2]) for j in range(y.shape[3])], 2)
    return F.conv1d(line, model.cnn_1d.weight, model.cnn_1d.bias, padding=1).transpose(1, 2)


def time_distributed_features(model, x):
    """Each frame on its own, as in a Python loop over time."""
    return torch.stack([conv_relu_pool(frame, model.cnn[0]).flatten(1) for frame in x.unbind(1)], 1)


SIZES = (3, 16, 2, 5)  # input channels, hidden units, layers, classes
SYSTEMS = {
    "Simple": (cf.reference.CNN_LSTM_Simple, {}, (2, 3, 9, 6), simple_features, (2, 12, 64)),
    "1DConv": (cf.reference.CNN_LSTM_1DConv, {}, (2, 3, 9, 6), conv1d_features, (2, 12, 64)),
    "TimeDistributed": (
        cf.reference.CNN_LSTM_TimeDistributed, {"image_size": (9, 6)}, (2, 4, 3, 9, 6),
        time_distributed_features, (2, 4, 64 * 4 * 3),
    ),
}  # fmt: skip
systems = pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)


@systems
def test_features_and_scores(system):
    make, keywords, shape, features, features_shape = system
    model = make(*SIZES, **keywords).double()
    x = torch.randn(shape, dtype=torch.float64)
    assert tuple(model.features(x).shape) == features_shape
    torch.testing.assert_close(model.features(x), features(model, x), rtol=1e-12, atol=1e-12)
    scores = F.linear(stacked_lstm(model.lstm, features(model, x)), model.fc.weight, model.fc.bias)
    assert tuple(scores.shape) == (2, 5)
    torch.testing.assert_close(model(x), scores, rtol=1e-12, atol=1e-12)


KEYS = {
    "Simple": ["cnn.weight", "cnn.bias"],
    "1DConv": ["cnn.0.weight", "cnn.0.bias", "cnn_1d.weight", "cnn_1d.bias"],
    "TimeDistributed": ["cnn.0.weight", "cnn.0.bias"],
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_keys_are_the_tutorials(name):
    make, keywords, *_ = SYSTEMS[name]
    lstm = [f"lstm.{kind}_l{layer}" for layer in range(2) for kind in LSTM_KINDS]
    assert list(make(*SIZES, **keywords).state_dict()) == [*KEYS[name], *lstm, "fc.weight", "fc.bias"]


@pytest.mark.parametrize("name", SYSTEMS)
def test_attributes_and_signature_are_the_contracts(name):
    make, keywords, *_ = SYSTEMS[name]
    children = {
        "Simple": ["cnn", "relu", "pool", "lstm", "fc"],
        "1DConv": ["cnn", "cnn_1d", "lstm", "fc"],
        "TimeDistributed": ["cnn", "lstm", "fc"],
    }
    model = make(*SIZES, **keywords)
    assert [child for child, _ in model.named_children()] == children[name]
    parameters = inspect.signature(make).parameters
    named = ["input_channels", "lstm_hidden_size", "lstm_num_layers", "num_classes"]
    named += [] if name == "Simple" else ["sequence_length"]
    named += ["image_size"] if name == "TimeDistributed" else []
    assert list(parameters) == named
    if name != "Simple":
        assert parameters["sequence_length"].default is None
        assert make(*SIZES, 7, **keywords).fc.out_features == SIZES[3]  # and taken by position
    if name == "TimeDistributed":
        assert parameters["image_size"].default == (28, 28)
        assert parameters["image_size"].kind is inspect.Parameter.KEYWORD_ONLY


def test_steps_of_a_simple_model_are_locations():
    """What `view` gets wrong: one bright location changes one step, all its channels."""
    model = cf.reference.CNN_LSTM_Simple(*SIZES)
    dark, bright = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    bright[0, :, 4, 2] = 100  # reaches pooled rows 1..2 and columns 0..1 through the 3x3 kernel
    changed = (model.features(bright) != model.features(dark)).any(-1)[0].view(4, 4)
    assert set(changed.nonzero().unbind(1)[0].tolist()) <= {1, 2}
    assert set(changed.nonzero().unbind(1)[1].tolist()) <= {0, 1} and changed.any()


@pytest.mark.parametrize("frames", [(9, 28), (32, 32), (14, 14), (28, 30)], ids=str)
def test_frames_of_another_size_say_so(frames):
    model = cf.reference.CNN_LSTM_TimeDistributed(*SIZES)
    h, w = frames
    x = torch.randn(2, 3, 3, h, w)
    with pytest.raises(ValueError) as caught:
        model(x)
    for words in (
        "12544", str(64 * (h // 2) * (w // 2)), f"{h}x{w}", "28x28", f"image_size=({h}, {w})"
    ):  # fmt: skip
        assert words in str(caught.value)
    assert model.__class__(*SIZES, image_size=frames)(x).shape == (2, 5)


def test_frames_of_another_shape_but_as_many_features():
    """28x28 and 14x56 both give 12544 features, and PyTorch's model takes both."""
    model = cf.reference.CNN_LSTM_TimeDistributed(*SIZES)
    assert model(torch.randn(1, 2, 3, 14, 56)).shape == (1, 5)


@pytest.mark.parametrize("shape", [(3, 28, 28), (2, 3, 28, 28), (1, 2, 4, 3, 28, 28)], ids=str)
def test_what_is_not_a_batch_of_clips_says_so(shape):
    with pytest.raises(ValueError, match=r"\(B, T, C, H, W\)"):
        cf.reference.CNN_LSTM_TimeDistributed(*SIZES)(torch.randn(shape))


@pytest.mark.parametrize("sizes", [(28, 28), (27, 29), (2, 3), (1, 9)], ids=str)
def test_image_size_decides_the_lstms_input(sizes):
    h, w = sizes
    if h < 2:  # nothing is left after the pool: refused here or by the LSTM, never silently empty
        with pytest.raises((ValueError, RuntimeError)):
            model = cf.reference.CNN_LSTM_TimeDistributed(*SIZES, image_size=sizes)
            model(torch.randn(1, 2, 3, h, w))
        return
    model = cf.reference.CNN_LSTM_TimeDistributed(*SIZES, image_size=sizes)
    assert model.lstm.input_size == 64 * (h // 2) * (w // 2)
    assert model(torch.randn(1, 2, 3, h, w)).shape == (1, 5)


@systems
def test_it_learns(system):
    """Every parameter gets a gradient, and a few steps lower the loss."""
    make, keywords, shape, *_ = system
    model = make(*SIZES, **keywords)
    x, y = torch.randn(8, *shape[1:]), torch.arange(8) % 5
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
