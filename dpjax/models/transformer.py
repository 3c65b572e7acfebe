"""What the transformer families share: attention, MLP, block and stack, on ONE example.

Letters: T tokens, D width, N heads, K heads of keys and values, H width of a head. Every
linear map is an ``nn.Dense`` with a two-axis kernel, so that one name pattern (such as
``attention/(query|value)/kernel``) selects the same thing in every family.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from dpjax.checks import check_bool, check_positive_int

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
}
STD = 0.02
"""Standard deviation of fresh weights, as in GPT-2, BERT, ViT and Llama."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One block, and how a stack of them is run.

    Attributes:
        layers: Number of blocks.
        width: D, of the residual stream.
        heads: N; divides ``width``.
        kv_heads: K; divides ``heads``. Fewer than ``heads`` is grouped-query attention.
        hidden: Width of the MLP.
        activation: "gelu" (exact), "gelu_tanh" or "silu".
        gated: The activation multiplies a second linear map (SwiGLU, if "silu").
        bias: Whether linear maps have one.
        norm: "layer" or "rms".
        epsilon: Added to the variance.
        post_norm: Normalise after each residual sum, as BERT, not before each branch.
        causal: Tokens see no later ones.
        rotary_base: Of rotary positions; None for none.
        dtype: Of activations, "float32" or "bfloat16". Parameters are float32 and are
            cast where they are used; statistics of norms, attention's softmax and
            rotations are computed in float32.
        scan: Parameters of all blocks are stacked and the stack is one ``nn.scan``: it
            compiles once. Otherwise the blocks are separate.
        remat: Keep only the inputs of blocks for the backward pass.

    Raises:
        ValueError: If an option is unknown or the numbers do not divide.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    activation: str
    gated: bool
    bias: bool
    norm: str
    epsilon: float
    post_norm: bool
    causal: bool
    rotary_base: float | None
    dtype: str
    scan: bool
    remat: bool

    def __post_init__(self):
        for name in ("layers", "width", "heads", "kv_heads", "hidden"):
            check_positive_int(name, getattr(self, name))
        for name in ("scan", "remat"):
            check_bool(name, getattr(self, name))
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
        if self.rotary_base is not None and (self.width // self.heads) % 2:
            raise ValueError(
                f"width={self.width} / heads={self.heads} must be even for rotary positions"
            )
        for name, choices in (("activation", _ACTIVATIONS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose from {[*choices]}"
                )

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Dtype of activations."""
        return DTYPES[self.dtype]


def dense(
    spec: Spec, features: int, *, name: str, bias: bool, std: float = STD
) -> nn.Dense:
    """Return a linear map to ``features``; its kernel starts normal, its bias at 0."""
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=spec.compute_dtype,
        kernel_init=nn.initializers.normal(std),
        name=name,
    )


def norm(spec: Spec, *, name: str) -> nn.Module:
    """Return the norm over the width of ``spec``."""
    if spec.norm == "rms":
        return nn.RMSNorm(epsilon=spec.epsilon, dtype=spec.compute_dtype, name=name)
    # E[x^2] - E[x]^2 would cancel in float32 where the mean is large.
    return nn.LayerNorm(
        epsilon=spec.epsilon,
        dtype=spec.compute_dtype,
        use_fast_variance=False,
        name=name,
    )


def embed(spec: Spec, vocab_size: int, *, name: str) -> nn.Embed:
    """Return a token table; its ``attend`` is the tied head."""
    return nn.Embed(
        vocab_size,
        spec.width,
        dtype=spec.compute_dtype,
        embedding_init=nn.initializers.normal(STD),
        name=name,
    )


def rows_from(
    table: Float[Array, "P D"], start: Int[Array, ""] | None, length: int
) -> Float[Array, "T D"]:
    """Return ``length`` rows of a table of positions, from ``start`` on; None is 0."""
    if start is None:
        return jax.lax.slice_in_dim(table, 0, length)
    return jax.lax.dynamic_slice_in_dim(table, start, length)


def check_length(length: int, *, positions: int) -> None:
    """Raise ValueError if a sequence is longer than there are positions."""
    if length > positions:
        raise ValueError(
            f"an example has {length} tokens, and the model length={positions} positions; "
            "shorten the records of the source, or set a larger length"
        )


def rotate(
    x: Float[Array, "T N H"], positions: Int[Array, "T"], *, base: float
) -> Float[Array, "T N H"]:
    """Rotate pairs of features by angles that grow with the position.

    Feature ``j < H/2`` is paired with ``j + H/2`` (the layout of Hugging Face's Llama) and
    turned by ``position * base**(-2j/H)``. Computed in float32; the dtype is kept.

    References:
        Su et al., RoFormer, https://arxiv.org/abs/2104.09864, equation 34.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, None].astype(jnp.float32) * frequencies[None]
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return turned.astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention of the tokens of one example to themselves."""

    spec: Spec

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "T D"],
        positions: Int[Array, "T"],
        mask: Bool[Array, "T"] | None,
    ) -> Float[Array, "T D"]:
        """Return the attention's output; ``mask`` is False where nobody may look."""
        spec = self.spec
        tokens, head = len(x), spec.width // spec.heads
        query, key, value = (
            dense(spec, heads * head, name=name, bias=spec.bias)(x).reshape(
                tokens, heads, head
            )
            for name, heads in (
                ("query", spec.heads),
                ("key", spec.kv_heads),
                ("value", spec.kv_heads),
            )
        )
        if spec.rotary_base is not None:
            query = rotate(query, positions, base=spec.rotary_base)
            key = rotate(key, positions, base=spec.rotary_base)
        key, value, seen, is_causal = self._context(key, value, positions, mask)
        mixed = jax.nn.dot_product_attention(
            query, key, value, mask=seen, is_causal=is_causal
        )
        return _residual(spec, name="out")(mixed.reshape(tokens, spec.width))

    def _context(
        self,
        key: Float[Array, "T K H"],
        value: Float[Array, "T K H"],
        positions: Int[Array, "T"],
        mask: Bool[Array, "T"] | None,
    ) -> tuple[Array, Array, Array | None, bool]:
        """Return what tokens may look at, which of it each sees, and whether in order.

        Earlier tokens are remembered in the collection "cache", if it is mutable: the
        keys and values of all positions, which later calls overwrite at theirs. A prefix
        (see ``dpjax.models.peft``) stands before the tokens.
        """
        remembers = self.is_mutable_collection("cache") and not self.is_initializing()
        has_prefix = self.has_variable("params", "prefix_key")
        if not remembers and not has_prefix:
            seen = None if mask is None else mask[None, None, None]
            return key, value, seen, self.spec.causal
        if remembers:
            key = self._remember("key", key, positions[0])
            value = self._remember("value", value, positions[0])
        seen = jnp.ones((len(positions), len(key)), bool)
        if mask is not None:
            seen = seen & mask[None]
        if self.spec.causal:
            seen = seen & (jnp.arange(len(key))[None] <= positions[:, None])
        if has_prefix:
            first, first_values = (
                self.get_variable("params", f"prefix_{kind}")
                .astype(key.dtype)
                .reshape(-1, *key.shape[1:])
                for kind in ("key", "value")
            )
            key = jnp.concatenate([first, key])
            value = jnp.concatenate([first_values, value])
            seen = jnp.pad(seen, ((0, 0), (len(first), 0)), constant_values=True)
        return key, value, seen[None, None], False

    def _remember(
        self, name: str, new: Float[Array, "t K H"], start: Int[Array, ""]
    ) -> Float[Array, "T K H"]:
        if self.has_variable("cache", name):
            old = self.get_variable("cache", name)
            new = jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=0)
        self.put_variable("cache", name, new)
        return new


class Mlp(nn.Module):
    """Two linear maps with an activation between, or three with a gate."""

    spec: Spec

    @nn.compact
    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Apply to each token."""
        spec = self.spec
        act = _ACTIVATIONS[spec.activation]
        y = dense(spec, spec.hidden, name="up", bias=spec.bias)(x)
        if spec.gated:
            y = act(dense(spec, spec.hidden, name="gate", bias=spec.bias)(x)) * y
        else:
            y = act(y)
        return _residual(spec, name="down")(y)


def _residual(spec: Spec, *, name: str) -> nn.Dense:
    # Each block adds two branches: scaled so (GPT-2), the sum starts of order one.
    std = STD / math.sqrt(2 * spec.layers)
    return dense(spec, spec.width, name=name, bias=spec.bias, std=std)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    spec: Spec

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "T D"],
        positions: Int[Array, "T"],
        mask: Bool[Array, "T"] | None,
    ) -> tuple[Float[Array, "T D"], None]:
        """Return the stream after the block, and None (the output that scan stacks)."""
        spec = self.spec
        norm_0, norm_1 = norm(spec, name="norm_0"), norm(spec, name="norm_1")
        attention, mlp = Attention(spec, name="attention"), Mlp(spec, name="mlp")
        if spec.post_norm:
            x = norm_0(x + attention(x, positions, mask))
            return norm_1(x + mlp(x)), None
        x = x + attention(norm_0(x), positions, mask)
        return x + mlp(norm_1(x)), None


def run_blocks(
    spec: Spec,
    x: Float[Array, "T D"],
    *,
    mask: Bool[Array, "T"] | None = None,
    start: Int[Array, ""] | None = None,
) -> Float[Array, "T D"]:
    """Apply the blocks of ``spec``; call it inside a compact module.

    ``start`` is the position of the first token, 0 if it is None.
    They are named ``layers_0``, ``layers_1``, ...; with ``scan`` there is one,
    ``layers``, whose parameters have a leading axis of layers.
    """
    positions = jnp.arange(len(x))
    if start is not None:
        positions = start + positions
    # Within scan, XLA cannot merge the second forward pass with the first anyway.
    block = nn.remat(Block, prevent_cse=not spec.scan) if spec.remat else Block
    if spec.scan:
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=spec.layers,
        )
        return stack(spec, name="layers")(x, positions, mask)[0]
    for i in range(spec.layers):
        x, _ = block(spec, name=f"layers_{i}")(x, positions, mask)
    return x
