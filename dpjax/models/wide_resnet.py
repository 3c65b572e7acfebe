"""Wide residual networks for private training."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dpjax.checks import check_positive_int
from dpjax.models.linen import image_model
from dpjax.typing import Model


def standardize(kernel: Float[Array, "H W D P"]) -> Float[Array, "H W D P"]:
    """Shift and scale each output channel to mean 0 and variance 1 / fan_in.

    Args:
        kernel: Height, width, input channels, output channels; fan_in is ``H * W * D``.

    Returns:
        The kernel with, for each output channel over (H, W, D), mean 0 and sum of
        squares 1; less where the centred sum of squares was below 1e-4, so that the
        gradient of a constant kernel stays finite.
    """
    centred = kernel - kernel.mean(axis=(0, 1, 2), keepdims=True)
    energy = jnp.sum(centred**2, axis=(0, 1, 2), keepdims=True)
    return centred * jax.lax.rsqrt(jnp.maximum(energy, 1e-4))


class _Conv(nn.Module):
    """Convolution with bias; with standardised kernel and a gain if asked."""

    features: int
    size: int
    stride: int
    standardized: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if self.standardized:
            gain = self.param("gain", nn.initializers.ones, (self.features,))
            kernel = standardize(kernel) * gain[None, None, None]
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x + bias[None, None, None].astype(x.dtype)


class _Block(nn.Module):
    """Two (ReLU, norm, 3x3 conv) beside the identity, or beside a projection."""

    features: int
    stride: int
    project: bool
    groups: int
    standardized: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = functools.partial(
            _Conv, self.features, standardized=self.standardized, dtype=self.dtype
        )
        norm = functools.partial(
            nn.GroupNorm, self.groups, epsilon=1e-5, dtype=self.dtype
        )
        y = norm(name="norm_0")(jax.nn.relu(x))
        y = conv(size=3, stride=self.stride, name="conv_0")(y)
        y = norm(name="norm_1")(jax.nn.relu(y))
        y = conv(size=3, stride=1, name="conv_1")(y)
        if self.project:
            x = norm(name="skip_norm")(jax.nn.relu(x))
            x = conv(size=1, stride=self.stride, name="skip_conv")(x)
        return x + y


class _WideResNet(nn.Module):
    depth: int
    width: int
    num_classes: int
    groups: int
    standardized: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shared = {"standardized": self.standardized, "dtype": self.dtype}
        x = _Conv(16, 3, stride=1, **shared, name="stem")(x)
        for stage in range(3):
            for block in range((self.depth - 4) // 6):
                x = _Block(
                    features=16 * self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    project=block == 0,
                    groups=self.groups,
                    **shared,
                    name=f"stage_{stage}_block_{block}",
                )(x)
        norm = nn.GroupNorm(self.groups, epsilon=1e-5, dtype=self.dtype, name="norm")
        x = norm(jax.nn.relu(x)).mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def wide_resnet(
    *,
    depth: int,
    width: int,
    num_classes: int,
    groups: int,
    weight_standardization: bool,
    dtype: str,
) -> Model:
    """Build the WRN-depth-width of De et al. (2022).

    With ``groups=16, weight_standardization=True`` this is the network of the authors'
    released code, block for block:

    - a 3x3 convolution of 16 filters, three stages of ``(depth - 4) / 6`` blocks with
      16, 32 and 64 times ``width`` filters, the second and the third starting with
      stride 2, then ReLU, GroupNorm, mean over positions and a linear head;
    - the residual branch is twice (ReLU, GroupNorm, 3x3 convolution): the activation
      comes before the norm, unlike in the first wide ResNets (BatchNorm, ReLU, conv);
    - the first block of every stage has a 1x1 convolution on its skip path, after a
      ReLU and a GroupNorm of its own, also where no size changes;
    - every convolution has a bias, and its kernel is standardised for each output
      channel over (height, width, input) to ``gain * (w - mean) / sqrt(fan_in * var)``
      with a learnt gain and ``fan_in * var`` not below 1e-4;
    - GroupNorm has a learnt scale and bias, and epsilon 1e-5;
    - kernels start normal with variance 1 / fan_in (the head's truncated normal), gains
      and scales at 1, biases at 0.

    Not here: the variants the code offers as options (dropout before the head, blocks
    with a learnt zero-initialised scale, other activations and norms). Parameter
    averaging and augmentation multiplicity, which the paper's accuracies need, are no
    part of the model.

    Args:
        depth: Number of layers, 4 more than a multiple of 6: 16, 28, 40.
        width: Factor on the number of filters.
        num_classes: Number of classes.
        groups: Groups of every GroupNorm; divides 16, the filters of the first layer.
        weight_standardization: Standardise the kernels; without it the convolutions
            have no gain either.
        dtype: Of activations and logits, "float32" or "bfloat16"; parameters and what is
            computed from them alone are float32.

    Returns:
        A model from ``example["image"]``, ``float32[H, W, C]``, to logits
        ``[num_classes]`` of this dtype. WRN-16-4 with 10 classes has 2,753,818 parameters.

    Raises:
        ValueError: If there is no such depth, or the groups do not divide the filters.

    References:
        De et al., Unlocking High-Accuracy Differentially Private Image Classification
        through Scale, https://arxiv.org/abs/2204.13650
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, https://arxiv.org/abs/1903.10520
    """
    check_positive_int("num_classes", num_classes)
    if depth < 10 or (depth - 4) % 6 != 0:
        raise ValueError(f"{depth=} must be 6n + 4 with n >= 1, such as 16, 28 or 40")
    if width < 1:
        raise ValueError(f"{width=} must be at least 1")
    if groups < 1 or 16 % groups != 0:
        raise ValueError(f"{groups=} must divide 16, the filters of the first layer")
    return image_model(
        _WideResNet(depth, width, num_classes, groups, weight_standardization, dtype)
    )
