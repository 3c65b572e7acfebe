"""Vision transformers."""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dpjax.checks import check_positive_int
from dpjax.models.linen import image_model
from dpjax.models.transformer import STD, Spec, dense, norm, run_blocks
from dpjax.typing import Model


class _Patches(nn.Module):
    """Cut an image into patches and map each to a token."""

    patch: int
    spec: Spec

    @nn.compact
    def __call__(self, image: Float[Array, "S S C"]) -> Float[Array, "T D"]:
        size, channels = self.patch, image.shape[-1]
        kernel = self.param(
            "kernel",
            nn.initializers.normal(STD),
            (size, size, channels, self.spec.width),
        )
        bias = self.param("bias", nn.initializers.zeros, (self.spec.width,))
        side = image.shape[0] // size
        # As a product, not a convolution: the same numbers, and one dense use of the kernel.
        pieces = image.reshape(side, size, side, size, channels).swapaxes(1, 2)
        pieces = pieces.reshape(side**2, -1)
        dtype = self.spec.compute_dtype
        flat = kernel.reshape(-1, self.spec.width)
        return pieces.astype(dtype) @ flat.astype(dtype) + bias.astype(dtype)[None]


class _Vit(nn.Module):
    num_classes: int
    image_size: int
    patch: int
    spec: Spec

    @nn.compact
    def __call__(self, images: Float[Array, "1 S S C"]) -> Float[Array, "1 V"]:
        spec, expected = self.spec, (self.image_size, self.image_size)
        if images.shape[1:3] != expected:
            raise ValueError(
                f"images are {images.shape[1]}x{images.shape[2]}, the model has "
                f"image_size={self.image_size}; resize them, or change image_size"
            )
        x = _Patches(self.patch, spec, name="patches")(images[0])
        first = self.param("class", nn.initializers.zeros, (1, spec.width))
        position = self.param(
            "position", nn.initializers.normal(STD), (1 + len(x), spec.width)
        )
        x = jnp.concatenate([first.astype(x.dtype), x]) + position.astype(x.dtype)
        x = norm(spec, name="norm")(run_blocks(spec, x)[:1])
        return dense(spec, self.num_classes, name="head", bias=True)(x)


def vit(
    *,
    num_classes: int,
    image_size: int,
    patch: int,
    layers: int,
    width: int,
    heads: int,
    hidden: int,
    epsilon: float,
    dtype: str,
    scan: bool,
    remat: bool,
) -> Model:
    """Build a vision transformer that classifies by its class token.

    Pre-norm blocks, LayerNorm, MLP with exact GELU, biases everywhere, learnt positions,
    a linear head on the normalised class token. No dropout, no extra representation layer.

    Args:
        num_classes: Number of classes V.
        image_size: Side S of the square images.
        patch: Side of a patch; divides ``image_size``.
        layers: Number of blocks.
        width: Of the residual stream.
        heads: Of attention; divides ``width``.
        hidden: Width of the MLP.
        epsilon: Of LayerNorm; 1e-12 in Hugging Face's models, 1e-6 in the paper's code.
        dtype: Of activations and logits, "float32" or "bfloat16"; parameters are float32.
        scan: Stack the parameters of all blocks and scan over them.
        remat: Recompute the inside of blocks in the backward pass.

    Returns:
        A model from ``example["image"]``, ``float32[S, S, C]``, to logits ``[V]``.

    Raises:
        ValueError: If the sizes do not fit, here; or, when it is traced, if images have
            another size.

    References:
        Dosovitskiy et al., An Image is Worth 16x16 Words,
        https://arxiv.org/abs/2010.11929
    """
    check_positive_int("num_classes", num_classes)
    if patch < 1 or image_size % patch:
        raise ValueError(f"{patch=} must divide {image_size=}")
    spec = Spec(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads,
        hidden=hidden,
        activation="gelu",
        gated=False,
        bias=True,
        norm="layer",
        epsilon=epsilon,
        post_norm=False,
        causal=False,
        rotary_base=None,
        dtype=dtype,
        scan=scan,
        remat=remat,
    )
    model = image_model(_Vit(num_classes, image_size, patch, spec))
    return model._replace(settings=tuple(dataclasses.asdict(spec).items()))


def vit_b16(
    *, num_classes: int, image_size: int, dtype: str, scan: bool, remat: bool
) -> Model:
    """Build ViT-B/16: 12 layers of width 768; 86M parameters."""
    return _sixteen(
        768, 12, num_classes, image_size, dtype=dtype, scan=scan, remat=remat
    )


def vit_s16(
    *, num_classes: int, image_size: int, dtype: str, scan: bool, remat: bool
) -> Model:
    """Build ViT-S/16: 12 layers of width 384; 22M parameters."""
    return _sixteen(
        384, 6, num_classes, image_size, dtype=dtype, scan=scan, remat=remat
    )


def vit_ti16(
    *, num_classes: int, image_size: int, dtype: str, scan: bool, remat: bool
) -> Model:
    """Build ViT-Ti/16: 12 layers of width 192; 5.7M parameters."""
    return _sixteen(
        192, 3, num_classes, image_size, dtype=dtype, scan=scan, remat=remat
    )


def _sixteen(
    width: int,
    heads: int,
    num_classes: int,
    image_size: int,
    *,
    dtype: str,
    scan: bool,
    remat: bool,
) -> Model:
    return vit(
        num_classes=num_classes,
        image_size=image_size,
        patch=16,
        layers=12,
        width=width,
        heads=heads,
        hidden=4 * width,
        epsilon=1e-12,
        dtype=dtype,
        scan=scan,
        remat=remat,
    )
