"""The workloads in PyTorch, and their gradients with and without Opacus.

Called in an environment of its own: see opacus_bench.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch  # pyrefly: ignore[missing-import]
from opacus.grad_sample import (  # pyrefly: ignore[missing-import]
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
)
from opacus.optimizers import (  # pyrefly: ignore[missing-import]
    DPOptimizer,
    DPOptimizerFastGradientClipping,
)
from opacus.utils.fast_gradient_clipping_utils import (  # pyrefly: ignore[missing-import]
    DPLossFastGradientClipping,
)
from torch import nn  # pyrefly: ignore[missing-import]
from torch.nn import functional  # pyrefly: ignore[missing-import]

Gradient = Callable[[], list[Any]]
"""Computes a gradient of a fixed batch; returns a tensor for each parameter."""

_WIDTH, _HEADS, _HIDDEN, _LAYERS, _LENGTH, _VOCABULARY = 256, 4, 1024, 4, 128, 8192


def workload(name: str) -> tuple[Any, Any, Any]:
    """Return a model, inputs and targets of ``mlp``, ``convnet`` or ``gpt``."""
    torch.manual_seed(0)
    if name == "mlp":
        return _mlp(), torch.rand(512, 1, 28, 28) - 0.5, torch.randint(10, (512,))
    if name == "convnet":
        return _convnet(), torch.rand(64, 3, 32, 32) - 0.5, torch.randint(10, (64,))
    tokens = torch.randint(_VOCABULARY, (16, _LENGTH + 1))
    return _Gpt(), tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def plain(model: Any, inputs: Any, targets: Any) -> Gradient:
    """Return the gradient of the mean loss."""
    model = copy.deepcopy(model)

    def run() -> list[Any]:
        model.zero_grad()
        _losses(model(inputs), targets).mean().backward()
        return [p.grad for p in model.parameters()]

    return run


def hooks(model: Any, inputs: Any, targets: Any, *, clip_norm: float) -> Gradient:
    """Return the clipped sum of gradients that hooks materialise."""
    model = GradSampleModule(copy.deepcopy(model))
    optimizer = _private(DPOptimizer, model, inputs, clip_norm=clip_norm)

    def run() -> list[Any]:
        optimizer.zero_grad()
        _losses(model(inputs), targets).mean().backward()
        optimizer.clip_and_accumulate()
        return [p.summed_grad for p in model.parameters()]

    return run


def ghost(model: Any, inputs: Any, targets: Any, *, clip_norm: float) -> Gradient:
    """Return the clipped sum by ghost clipping, in two backward passes."""
    model = GradSampleModuleFastGradientClipping(
        copy.deepcopy(model), max_grad_norm=clip_norm, use_ghost_clipping=True
    )
    optimizer = _private(
        DPOptimizerFastGradientClipping, model, inputs, clip_norm=clip_norm
    )
    loss = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss())

    def run() -> list[Any]:
        optimizer.zero_grad()
        logits = model(inputs)
        shape = logits.shape if logits.ndim == 3 else None
        loss(logits.flatten(0, -2), targets.flatten(), shape=shape).backward()
        return [p.grad for p in model.parameters()]

    return run


def median_norm(model: Any, inputs: Any, targets: Any) -> float:
    """Return the median norm of the gradients of the examples."""
    model = GradSampleModule(copy.deepcopy(model))
    _losses(model(inputs), targets).mean().backward()
    squares = [p.grad_sample.flatten(1).square().sum(1) for p in model.parameters()]
    return float(torch.stack(squares).sum(0).sqrt().median())


def relative_error(total: list[Any], truth: list[Any]) -> float:
    """Return the relative error of a gradient in L2."""
    difference = [a - b for a, b in zip(total, truth, strict=True)]
    return float(_norm(difference) / _norm(truth))


def _norm(tensors: list[Any]) -> Any:
    return torch.cat([t.flatten() for t in tensors]).norm()


def _losses(logits: Any, targets: Any) -> Any:
    """Return the loss of each example: of tokens, the mean."""
    flat = functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), reduction="none"
    )
    return flat.reshape(len(logits), -1).mean(1)


def _private(kind: Any, model: Any, inputs: Any, *, clip_norm: float) -> Any:
    return kind(
        torch.optim.SGD(model.parameters(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=clip_norm,
        expected_batch_size=len(inputs),
    )


def _mlp() -> Any:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


def _convnet() -> Any:
    layers: list[Any] = []
    inputs = 3
    for outputs, stride in ((32, 1), (32, 2), (64, 1), (64, 2)):
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        layers += [conv, nn.GroupNorm(8, outputs), nn.ReLU()]
        inputs = outputs
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *pool, nn.Linear(inputs, 10))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_0, self.norm_1 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.query = nn.Linear(_WIDTH, _WIDTH)
        self.key = nn.Linear(_WIDTH, _WIDTH)
        self.value = nn.Linear(_WIDTH, _WIDTH)
        self.out = nn.Linear(_WIDTH, _WIDTH)
        self.up = nn.Linear(_WIDTH, _HIDDEN)
        self.down = nn.Linear(_HIDDEN, _WIDTH)

    def forward(self, x: Any) -> Any:
        y = self.norm_0(x)
        q, k, v = (
            layer(y).unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = functional.gelu(self.up(self.norm_1(x)), approximate="tanh")
        return x + self.down(y)


class _Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(_VOCABULARY, _WIDTH)
        self.position = nn.Embedding(_LENGTH, _WIDTH)
        self.blocks = nn.Sequential(*(_Block() for _ in range(_LAYERS)))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, _VOCABULARY)

    def forward(self, tokens: Any) -> Any:
        # One row for each example: Opacus takes the first axis for the batch.
        positions = torch.arange(_LENGTH).expand(len(tokens), -1).contiguous()
        x = self.token(tokens) + self.position(positions)
        return self.head(self.norm(self.blocks(x)))
