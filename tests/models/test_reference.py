"""Each network against the same network written out in plain numpy."""

import jax
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from dpjax.models.convnet import groupnorm_cnn, tanh_cnn
from dpjax.models.mlp import mlp
from dpjax.models.wide_resnet import wide_resnet


def conv(x, p, stride, padding):
    kernel = p["kernel"]
    if padding == "SAME":
        pads = []
        for n, k in zip(x.shape[:2], kernel.shape[:2], strict=True):
            total = max((-(-n // stride) - 1) * stride + k - n, 0)
            pads.append((total // 2, total - total // 2))
        x = np.pad(x, [*pads, (0, 0)])
    windows = sliding_window_view(x, kernel.shape[:2], axis=(0, 1))
    windows = windows[::stride, ::stride]
    return np.einsum("hwcij,ijco->hwo", windows, kernel) + p["bias"]


def ws_conv(x, p, stride):
    w = p["kernel"]
    fan_in = w[..., 0].size
    mean, var = w.mean((0, 1, 2)), w.var((0, 1, 2))
    w = p["gain"] * (w - mean) / np.sqrt(fan_in * var)
    return conv(x, {"kernel": w, "bias": p["bias"]}, stride, "SAME")


def group_norm(x, p, groups, epsilon):
    grouped = x.reshape(*x.shape[:2], groups, -1)
    mean = grouped.mean((0, 1, 3), keepdims=True)
    var = grouped.var((0, 1, 3), keepdims=True)
    normal = ((grouped - mean) / np.sqrt(var + epsilon)).reshape(x.shape)
    return normal * p["scale"] + p["bias"]


def max_pool(x):
    return sliding_window_view(x, (2, 2), axis=(0, 1)).max((-2, -1))


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def relu(x):
    return np.maximum(x, 0)


def forward_mlp(x, p):
    x = relu(dense(x.reshape(-1), p["dense_0"]))
    return dense(relu(dense(x, p["dense_1"])), p["head"])


def forward_tanh_mlp(x, p):
    return dense(np.tanh(dense(x.reshape(-1), p["dense_0"])), p["head"])


def forward_tanh_cnn(x, p):
    x = max_pool(np.tanh(conv(x, p["conv_0"], 2, "SAME")))
    x = max_pool(np.tanh(conv(x, p["conv_1"], 2, "VALID")))
    return dense(np.tanh(dense(x.reshape(-1), p["dense"])), p["head"])


def forward_groupnorm_cnn(x, p):
    for i, stride in enumerate([1, 2, 1, 2]):
        x = conv(x, p[f"conv_{i}"], stride, "SAME")
        x = relu(group_norm(x, p[f"norm_{i}"], 8, 1e-6))
    return dense(x.mean((0, 1)), p["head"])


def forward_wrn_16_1(x, p, groups=8):
    def residual(x, p, stride):
        y = ws_conv(group_norm(relu(x), p["norm_0"], groups, 1e-5), p["conv_0"], stride)
        return ws_conv(group_norm(relu(y), p["norm_1"], groups, 1e-5), p["conv_1"], 1)

    x = ws_conv(x, p["stem"], 1)
    for stage, stride in enumerate([1, 2, 2]):
        q = p[f"stage_{stage}_block_0"]
        skip = group_norm(relu(x), q["skip_norm"], groups, 1e-5)
        x = ws_conv(skip, q["skip_conv"], stride) + residual(x, q, stride)
        x = x + residual(x, p[f"stage_{stage}_block_1"], 1)
    x = group_norm(relu(x), p["norm"], groups, 1e-5)
    return dense(x.mean((0, 1)), p["head"])


@pytest.mark.parametrize(
    ("model", "forward", "shape"),
    [
        (
            mlp(features=(7, 6), num_classes=5, activation="relu"),
            forward_mlp,
            (4, 3, 2),
        ),
        (
            mlp(features=(7,), num_classes=5, activation="tanh"),
            forward_tanh_mlp,
            (4, 3, 2),
        ),
        (tanh_cnn(num_classes=5), forward_tanh_cnn, (17, 16, 1)),
        (groupnorm_cnn(num_classes=5), forward_groupnorm_cnn, (7, 6, 3)),
        (
            wide_resnet(
                depth=16,
                width=1,
                num_classes=5,
                groups=8,
                weight_standardization=True,
                dtype="float32",
            ),
            forward_wrn_16_1,
            (7, 6, 3),
        ),
    ],
)
def test_model_is_the_written_out_network(model, forward, shape):
    rng = np.random.default_rng(0)
    image = rng.normal(size=shape).astype(np.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), {"image": image})
    # Random everywhere: at init, biases of 0 and scales of 1 would hide mistakes.
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape, scale=0.5).astype(np.float32), params
    )
    logits = jax.jit(model.apply)(params, {"image": image}, jax.random.key(0))
    wide = jax.tree.map(np.float64, params)
    np.testing.assert_allclose(
        logits, forward(image.astype(np.float64), wide), rtol=1e-4, atol=1e-4
    )
