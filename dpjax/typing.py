"""The shapes that flow between the parts. Letters: B examples, K signed points.

This module may import nothing of dpjax.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

Params = PyTree[Float[Array, "..."]]
Example = PyTree[Shaped[Array, "..."]]
Scalar = Float[Array, ""]
Key = jax.Array

Loss = Callable[[Params, Example, Key], Scalar]
"""The loss of ONE example. There is no batch axis, so nothing can mix examples."""


class Batch(NamedTuple):
    """A fixed-shape slice of a sampled batch.

    Attributes:
        examples: Pytree of arrays ``[B, ...]``.
        mask: ``bool[B]``; padding rows are False and contribute exactly nothing.
        index: ``int32[B]``, the position of each example in its source. Nothing that is
            released may depend on it: it moves when an earlier example is removed.
    """

    examples: PyTree[Shaped[Array, "B ..."]]
    mask: Bool[Array | np.ndarray, "B"]
    index: Int[Array | np.ndarray, "B"]


class Model(NamedTuple):
    """A model as two pure functions on ONE example.

    Attributes:
        init: ``(key, example) -> params``, float32 leaves.
        apply: ``(params, example, key) -> outputs`` of one example, without batch axis.
        decode: Of models that predict the next token, else None: ``(params, tokens, cache,
            start) -> (logits, cache)``. The first call, with cache None and start 0, takes
            ``int32[T]`` for all positions there will be; each later one ``int32[t]`` new
            tokens for the positions from ``start`` on, and logits ``[t, V]`` are about the
            tokens after them. See ``dpjax.models.generate``.
        settings: Of transformers, the arguments that shapes of parameters do not show, as
            pairs of name (``heads``, ``epsilon``, ...) and value:
            ``dpjax.models.weights.pretrained`` compares them with what is said beside
            weights. None if they are not known.
        evaluate: As ``apply``, without randomness: what is evaluated where ``apply`` draws
            from its key (dropout). None: ``apply``, which then must not depend on the key.
    """

    init: Callable[[Key, Example], Params]
    apply: Callable[[Params, Example, Key], Array]
    decode: Callable[[Params, Array, Any, Any], tuple[Array, Any]] | None = None
    settings: tuple[tuple[str, Any], ...] | None = None
    evaluate: Callable[[Params, Example, Key], Array] | None = None

    def evaluating(self) -> "Model":
        """Return the model as it is evaluated: with ``evaluate`` as its ``apply``."""
        return self._replace(apply=self.evaluate or self.apply)

    def around(
        self, change: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> "Model":
        """Return the model with ``change`` made to ``apply``, and to ``evaluate`` alike."""
        evaluate = None if self.evaluate is None else change(self.evaluate)
        return self._replace(apply=change(self.apply), evaluate=evaluate)


class Source(Protocol):
    """A random-access data set.

    ``source[indices]`` takes a list of ints and returns a dict of stacked numpy arrays
    ``[len(indices), ...]`` in that order.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Sequence[int], /) -> dict[str, Any]: ...
