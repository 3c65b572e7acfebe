"""Modules of flax: linen and nnx."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from tests.contracts.zoo.cases import Case, draw_data, ids, named, score, x


def linen(module, data, rules, *, call=None, shapes=None, **options):
    """Build a case of a linen module; the rule is found by the parameter's last name."""

    def apply(variables, e, key):
        if call is not None:
            return call(module, variables, e, key)
        return score(module.apply(variables, e["x"]))

    def loss(p, e, key):
        return apply({"params": p}, e, key)

    def build(rng):
        examples = draw_data(rng, data)
        one = jax.tree.map(lambda a: a[0], examples)

        def init(key):
            if shapes is not None:
                return shapes(module, key, one)
            return module.init(key, one["x"])

        abstract = jax.eval_shape(init, jax.random.key(0))["params"]
        params = jax.tree.map(
            lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape), a.dtype), abstract
        )
        return Case(loss, params, examples, rules_by_name(params, rules), **options)

    return build


def rules_by_name(params, rules):
    """Rule of the longest end of each path that ``rules`` has."""

    def rule(path):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        ends = [end for end in rules if ("/" + name).endswith("/" + end)]
        return name, rules[max(ends, key=len)]

    return dict(rule(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))


NORMS = {"kernel": "dense", "bias": "elementwise", "scale": "elementwise"}


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, data):
        hidden = nn.gelu(nn.LayerNorm()(nn.Dense(4)(data)))
        return nn.Dense(2, use_bias=False)(nn.RMSNorm()(hidden))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, data):
        hidden = nn.Conv(4, (3, 3), strides=2)(data)
        hidden = jnp.tanh(nn.GroupNorm(2)(hidden))
        hidden = nn.ConvTranspose(3, (2, 2), strides=(2, 2))(hidden)
        hidden = nn.Conv(3, (3, 3), feature_group_count=3)(hidden)
        return nn.Dense(2)(nn.avg_pool(hidden, (2, 2)).ravel())


class Attention(nn.Module):
    cross: bool = False

    @nn.compact
    def __call__(self, data, memory=None, *, deterministic=True):
        attention = nn.MultiHeadDotProductAttention(
            2, qkv_features=4, dropout_rate=0.3, deterministic=deterministic
        )
        return attention(data, memory) if self.cross else attention(data)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, data, _):
        return jnp.tanh(nn.Dense(3)(nn.LayerNorm()(data))), None


class Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, data):
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        scanned = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return scanned()(data, None)[0]


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4)
        shared = nn.Dense(4)
        return embed.attend(jnp.tanh(shared(shared(embed(tokens)))))


class General(nn.Module):
    @nn.compact
    def __call__(self, data):
        hidden = nn.DenseGeneral((2, 3), axis=-1)(data)
        hidden = nn.Einsum((2, 3, 4), "thk,hkn->thn")(jnp.tanh(hidden))
        return nn.DenseGeneral(3, axis=(-2, -1))(hidden)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, data):
        return nn.WeightNorm(nn.Dense(4))(data)


def _with_dropout(module, variables, e, key):
    out = module.apply(
        variables, e["x"], deterministic=False, rngs={"dropout": key}
    )  # fmt: skip
    return score(out)


def _with_memory(module, variables, e, key):
    return score(module.apply(variables, e["x"], e["memory"]))


named("linen_mlp", linen(Mlp(), {"x": x(5, 3)}, NORMS))


named("linen_general_and_einsum", linen(General(), {"x": x(5, 3)}, NORMS))


named(
    "linen_convnet",
    linen(
        ConvNet(), {"x": x(6, 6, 2)}, {**NORMS, "kernel": "conv", "Dense_0/kernel": "dense"}
    ),
)  # fmt: skip


named(
    "linen_attention_with_dropout",
    linen(Attention(), {"x": x(5, 3)}, NORMS, call=_with_dropout),
)


named(
    "linen_cross_attention",
    linen(
        Attention(cross=True),
        {"x": x(5, 3), "memory": x(4, 2)},
        NORMS,
        call=_with_memory,
        shapes=lambda module, key, e: module.init(key, e["x"], e["memory"]),
    ),
)


named("linen_scan", linen(Stack(), {"x": x(5, 3)}, NORMS))


named("linen_scan_and_remat", linen(Stack(remat=True), {"x": x(5, 3)}, NORMS))


named(
    "linen_tied_embedding_and_shared_dense",
    linen(Tied(), {"x": ids(7, 5)}, {**NORMS, "kernel": "tied", "embedding": "tied"}),
)


named(
    "linen_weight_norm",
    linen(Normalised(), {"x": x(5, 3)}, {**NORMS, "kernel": "derived", "scale": "derived"}),
)  # fmt: skip


named(
    "linen_optimized_lstm",
    linen(
        nn.RNN(nn.OptimizedLSTMCell(3)), {"x": x(4, 2)}, NORMS
    ),
)  # fmt: skip


named("linen_gru", linen(nn.RNN(nn.GRUCell(3)), {"x": x(4, 2)}, NORMS))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

    def __call__(self, tokens):
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + jnp.tanh(layer(self.norm(hidden)))
        return self.embed.attend(hidden)


class NnxScanned(nnx.Module):
    def __init__(self, rngs):
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return nnx.Linear(3, 3, rngs=rngs)

        self.layers = create(rngs.split(2))
        self.attention = nnx.MultiHeadAttention(
            2, 3, qkv_features=4, decode=False, rngs=rngs
        )

    def __call__(self, data):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(hidden, layer):
            return jnp.tanh(layer(hidden))

        return self.attention(run(data, self.layers))


def nnx_case(name, model, data, rules):
    """Build a case of an nnx module, its parameters as a pure dict."""

    def build(rng):
        graph, state, rest = nnx.split(
            nnx.eval_shape(lambda: model(nnx.Rngs(0))), nnx.Param, ...
        )

        def loss(p, e, key):
            filled = jax.tree.map(lambda leaf: leaf, state)
            nnx.replace_by_pure_dict(filled, p)
            return score(nnx.merge(graph, filled, rest)(e["x"]))

        params = jax.tree.map(
            lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape), jnp.float32),
            nnx.to_pure_dict(state),
        )
        return Case(loss, params, draw_data(rng, data), rules_by_name(params, rules))

    named(name, build)


nnx_case(
    "nnx_tied_transformer_blocks", NnxModel, {"x": ids(7, 5)}, {**NORMS, "embedding": "tied"}
)  # fmt: skip


nnx_case("nnx_scan_remat_and_attention", NnxScanned, {"x": x(5, 3)}, NORMS)
