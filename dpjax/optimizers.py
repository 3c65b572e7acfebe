"""Optimizers that optax does not ship under one name. They see released gradients only."""

import optax


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
    """
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
