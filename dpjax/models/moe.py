"""A decoder of the Llama family whose MLPs are mixtures of experts, routed in each example."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dpjax.checks import check_model, check_number, check_positive_int
from dpjax.models import losses
from dpjax.models.linen import token_model
from dpjax.models.transformer import (
    STD,
    Attention,
    Spec,
    check_length,
    dense,
    embed,
    norm,
)
from dpjax.typing import Example, Key, Loss, Model, Params, Scalar

CHOICES = 2
"""Experts of each token."""


class Routed(NamedTuple):
    """Outputs of a mixture of experts.

    Attributes:
        logits: ``[T, V]``.
        balance: 1 if every expert gets as much of the example, up to E if one gets all; the
            mean over layers.
    """

    logits: Float[Array, "T V"]
    balance: Scalar


def route(
    scores: Float[Array, "T E"], capacity: int
) -> tuple[Float[Array, "T E C"], Scalar]:
    """Choose two experts for each token, first come first served.

    Only tokens of one example compete: what others do cannot change its gradient.

    Args:
        scores: Of the router.
        capacity: C, places of each expert. First choices come before second ones, earlier
            tokens before later; who finds no place passes this expert by.

    Returns:
        The weight of each token at each place of each expert, and the balance:
        ``E sum_e f_e p_e`` with the share f_e of choices, before any is dropped, and the mean
        probability p_e (Fedus et al. 2021, arXiv 2101.03961, equation 4, for two choices as in
        Lepikhin et al. 2020, arXiv 2006.16668).
    """
    experts = scores.shape[1]
    chances = jax.nn.softmax(scores, axis=1)
    weights, chosen = jax.lax.top_k(chances, CHOICES)
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    # [choice, T, E]: in the order in which places are given away.
    asked = jax.nn.one_hot(chosen.T, experts, dtype=scores.dtype)
    flat = asked.reshape(-1, experts)
    place = jnp.sum((jnp.cumsum(flat, axis=0) - 1) * flat, axis=1).astype(jnp.int32)
    places = jax.nn.one_hot(place, capacity, dtype=scores.dtype)  # zeros beyond
    given = (flat[:, :, None] * places[:, None]).reshape(CHOICES, -1, experts, capacity)
    combined = jnp.sum(weights.T[:, :, None, None] * given, axis=0)
    share = jax.lax.stop_gradient(jnp.mean(asked, axis=(0, 1)))
    return combined, experts * jnp.sum(share * jnp.mean(chances, axis=0))


class _Experts(nn.Module):
    """E gated MLPs, each of its own tokens."""

    spec: Spec
    experts: int

    @nn.compact
    def __call__(self, x: Float[Array, "E C D"]) -> Float[Array, "E C D"]:
        spec, dtype = self.spec, self.spec.compute_dtype

        def kernel(name: str, inputs: int, outputs: int, std: float) -> Array:
            start = nn.initializers.normal(std)
            return self.param(name, start, (self.experts, inputs, outputs)).astype(
                dtype
            )

        gate = x @ kernel("gate", spec.width, spec.hidden, STD)
        y = jax.nn.silu(gate) * (x @ kernel("up", spec.width, spec.hidden, STD))
        std = STD / math.sqrt(2 * spec.layers)
        return y @ kernel("down", spec.hidden, spec.width, std)


class _Block(nn.Module):
    """Attention and a mixture of experts, each added to the residual stream."""

    spec: Spec
    experts: int
    capacity_factor: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "T D"], positions: Int[Array, "T"]
    ) -> tuple[Float[Array, "T D"], Scalar]:
        spec, dtype = self.spec, self.spec.compute_dtype
        attention = Attention(spec, name="attention")
        x = x + attention(norm(spec, name="norm_0")(x), positions, None)
        y = norm(spec, name="norm_1")(x)
        # In float32: of close scores, rounding would choose.
        router = nn.Dense(
            self.experts,
            use_bias=False,
            kernel_init=nn.initializers.normal(STD),
            name="router",
        )
        places = math.ceil(self.capacity_factor * CHOICES * len(x) / self.experts)
        combined, balance = route(router(y.astype(jnp.float32)), places)
        sent = (combined > 0).astype(dtype)
        inside = jnp.einsum("tec,td->ecd", sent, y)
        outside = _Experts(spec, self.experts, name="experts")(inside)
        return x + jnp.einsum("tec,ecd->td", combined.astype(dtype), outside), balance


class _Moe(nn.Module):
    vocab_size: int
    length: int
    experts: int
    capacity_factor: float
    spec: Spec

    @nn.compact
    def __call__(self, tokens: Int[Array, "T"]) -> Routed:
        spec = self.spec
        check_length(len(tokens), positions=self.length)
        x = embed(spec, self.vocab_size, name="token")(tokens)
        positions = jnp.arange(len(tokens))
        block = nn.remat(_Block, prevent_cse=not spec.scan) if spec.remat else _Block
        sizes = (spec, self.experts, self.capacity_factor)
        if spec.scan:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=spec.layers,
            )
            x, balances = stack(*sizes, name="layers")(x, positions)
        else:
            found = []
            for i in range(spec.layers):
                x, balance = block(*sizes, name=f"layers_{i}")(x, positions)
                found.append(balance)
            balances = jnp.stack(found)
        x = norm(spec, name="norm")(x)
        logits = dense(spec, self.vocab_size, name="head", bias=False)(x)
        return Routed(logits, jnp.mean(balances))


def moe(
    *,
    vocab_size: int,
    length: int,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    experts: int,
    capacity_factor: float,
    rotary_base: float,
    epsilon: float,
    dtype: str,
    scan: bool,
    remat: bool,
) -> Model:
    """Build a decoder with experts for MLPs, two of them for each token (as Mixtral has).

    Attention and norms are those of ``llama``. Tokens of an example compete for the places of
    its experts; examples do not. Weights of experts, ``experts/(gate|up|down)``, have a first
    axis of experts, which ``dpjax.parallel.rules.EXPERTS`` splits over ``model``.

    Args:
        vocab_size: V. A token of V or more gives NaN.
        length: Most tokens an example may have.
        layers: Number of blocks.
        width: Of the residual stream.
        heads: Of the queries; divides ``width``.
        kv_heads: Of keys and values; divides ``heads``.
        hidden: Width of an expert.
        experts: E, at least 2.
        capacity_factor: Places of an expert over what it needs if all get as much. With
            E / 2 no token is ever passed by.
        rotary_base: See ``llama``.
        epsilon: Of RMSNorm.
        dtype: Of activations and logits, "float32" or "bfloat16"; parameters and the router
            are float32.
        scan: Stack the parameters of all blocks and scan over them.
        remat: Recompute the inside of blocks in the backward pass.

    Returns:
        A model from ``example["tokens"]``, ``int32[T]``, to ``Routed``; evaluated, to logits
        alone.

    Raises:
        ValueError: If the sizes do not fit, here; or, when it is traced, if an example has
            more than ``length`` tokens.

    References:
        Jiang et al., Mixtral of Experts, https://arxiv.org/abs/2401.04088
    """
    for name, value in (("vocab_size", vocab_size), ("length", length)):
        check_positive_int(name, value)
    check_positive_int("experts", experts)
    if experts < CHOICES:
        raise ValueError(
            f"experts={experts} must be at least {CHOICES}: each token has two"
        )
    check_number("capacity_factor", capacity_factor)
    if not (capacity_factor > 0 and math.isfinite(capacity_factor)):
        raise ValueError(
            f"capacity_factor={capacity_factor} must be positive and finite"
        )
    spec = Spec(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        activation="silu",
        gated=True,
        bias=False,
        norm="rms",
        epsilon=epsilon,
        post_norm=False,
        causal=True,
        rotary_base=rotary_base,
        dtype=dtype,
        scan=scan,
        remat=remat,
    )
    model = token_model(
        _Moe(vocab_size, length, experts, capacity_factor, spec), reads=("tokens",)
    )

    def logits(params: Params, example: Example, key: Key) -> Array:
        out: Any = model.apply(params, example, key)
        return out.logits

    settings = dataclasses.asdict(spec) | {"length": length, "experts": experts}
    return model._replace(evaluate=logits, settings=tuple(settings.items()))


def balanced_lm(model: Model, *, coefficient: float) -> Loss:
    """Build ``losses.causal_lm``, plus ``coefficient`` times the balance of the example.

    Args:
        model: A mixture of experts.
        coefficient: At least 0; 0.01 in Fedus et al. 2021.

    Raises:
        ValueError: ``model`` is none, or ``coefficient`` negative.
    """
    check_model(model)
    check_number("coefficient", coefficient)
    if not coefficient >= 0:
        raise ValueError(f"coefficient={coefficient} must be at least 0")

    def loss(params: Params, example: Example, key: Key) -> Scalar:
        balances: list[Scalar] = []

        def apply(params: Params, example: Example, key: Key) -> Array:
            out: Any = model.apply(params, example, key)
            balances.append(out.balance)
            return out.logits

        value = losses.causal_lm(model._replace(apply=apply))(params, example, key)
        return value + coefficient * balances[0]

    return loss
