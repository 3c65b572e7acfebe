"""Optimizers that optax does not ship under one name, and what the loop does to any.

They see released gradients only: all that follows is post-processing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree
from optax.contrib import ScheduleFreeState, schedule_free_eval_params

from dpjax.checks import check_number
from dpjax.typing import Params


def sgdw(
    *, learning_rate: optax.ScalarOrSchedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """Build SGD with momentum and decoupled weight decay.

    Each update is ``-lr_t (m_t + weight_decay * params)`` with ``m_t = momentum m_{t-1} +
    g_t``. Under DP the decay also forgets the random walk that the noise makes of every
    direction in which the loss is flat; it is post-processing and costs no privacy.

    Args:
        learning_rate: ``lr_t``, a number or an optax schedule.
        momentum: At least 0 and below 1.
        weight_decay: At least 0.

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization (SGDW),
        https://arxiv.org/abs/1711.05101

    Raises:
        ValueError: A number out of its range.
    """
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate)
    for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        check_number(name, value)
    if not (0 <= momentum < 1 and weight_decay >= 0):
        raise ValueError(f"{momentum=} must be in [0, 1), {weight_decay=} at least 0")
    return optax.chain(
        optax.trace(momentum),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def tunable_sgd(*, learning_rate: float) -> optax.GradientTransformation:
    """Build plain SGD that keeps its learning rate in its state.

    Programs do not depend on the number then: runs of a sweep that differ in it share
    what is compiled.

    Args:
        learning_rate: Constant.
    """
    return optax.inject_hyperparams(optax.sgd)(learning_rate=learning_rate)


def owning(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Let an optimizer have a state of its own, in float32 at least.

    Some optimizers keep the starting parameters in their state, others one array twice, or
    plain numbers. A state in which every leaf is an array of its own can be donated and
    saved. Of parameters in bfloat16 the optimizer sees float32 copies, as the gradients
    are: its moments keep one dtype.

    Args:
        optimizer: Any; what it does to parameters in float32 is not changed.

    Raises:
        ValueError: It is no optimizer.
    """
    functions = [getattr(optimizer, name, None) for name in ("init", "update")]
    if not all(map(callable, functions)):
        raise ValueError(
            f"optimizer={optimizer!r} must be an optax transform, such as optax.sgd(0.1)"
        )
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> optax.OptState:
        wide = jax.tree.map(_widened, params)
        return _unshared(inner.init(wide), shared=(params, wide))

    def update(
        updates: Params,
        state: optax.OptState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Params, optax.OptState]:
        wide = jax.tree.map(_widened, params)
        return inner.update(updates, state, wide, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def evaluation_params(state: optax.OptState, params: Params) -> Params:
    """Return what an optimizer evaluates and hands over, which need not be what it trains.

    That of ``optax.contrib.schedule_free`` is an average. Any other optimizer says so by a
    part of its state with a method ``evaluation_params(params)``.

    Args:
        state: The optimizer's; wrapped in others (``chain``, ``partition``) as it may be.
        params: Those that it trains.
    """
    for part in jax.tree.leaves(state, is_leaf=_evaluates):
        if isinstance(part, ScheduleFreeState):
            params = _of_schedule_free(part, params)
        elif _evaluates(part):
            params = part.evaluation_params(params)
    return params


def _evaluates(part: Any) -> bool:
    return isinstance(part, ScheduleFreeState) or hasattr(part, "evaluation_params")


def _of_schedule_free(state: ScheduleFreeState, params: Params) -> Params:
    # Optax leaves out parameters that are another optimizer's.
    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    own = jax.tree.map(
        lambda z, x: z if is_masked(z) else x, state.z, params, is_leaf=is_masked
    )
    found = schedule_free_eval_params(state, own)
    return jax.tree.map(
        lambda y, x: x if is_masked(y) else y.astype(x.dtype),
        found,
        params,
        is_leaf=is_masked,
    )


def _widened(leaf: Array) -> Array:
    return jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32))


def _unshared(state: PyTree, *, shared: PyTree) -> PyTree:
    """Return arrays none of which is in ``shared``, or in the state twice."""
    seen = set().union(*map(_buffers, jax.tree.leaves(shared)))

    def own(leaf: Any) -> Array:
        array = jnp.asarray(leaf)
        # Numbers are weakly typed, which a checkpoint would not keep.
        array = jnp.asarray(array, array.dtype)
        if _buffers(array) & seen:
            array = jnp.copy(array)
        seen.update(_buffers(array))
        return array

    return jax.tree.map(own, state)


def _buffers(array: Any) -> set[int]:
    """Return where an array lies: two with one place cannot both be donated."""
    is_traced = not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer)
    if is_traced or jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return {id(array)}
    return {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
