"""Which parameters are trained: those that patterns name. The rest is frozen.

A frozen parameter takes no part in gradients, norms, noise, optimizer state or
checkpoints. It is an argument of the compiled step, merged in where the loss is computed.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from dpjax.checks import check_patterns
from dpjax.typing import Example, Key, Loss, Params, Scalar


def name_of(path: tuple[Any, ...]) -> str:
    """Return the keys of a path joined by ``/``; "params" if there are none."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "params"


def flatten(params: Params) -> dict[str, Any]:
    """Return the leaves by their names; see ``name_of``.

    Keys are those of dicts, the fields of tuples with names and of dataclasses, the numbers
    of items.

    Raises:
        ValueError: Two leaves would have one name, or one the name of a group of others:
            exports and checkpoints could not tell them apart.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = name_of(path)
        if name in leaves:
            raise ValueError(f"two parameters are named {name!r}: rename one of them")
        leaves[name] = leaf
    for name in leaves:
        groups = itertools.accumulate(name.split("/")[:-1], "{}/{}".format)
        if group := next((g for g in groups if g in leaves), None):
            raise ValueError(
                f"{group!r} is a parameter, and the group of the parameter {name!r}: rename "
                "one of them"
            )
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts of leaves by their names."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *groups, last = name.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = leaf
    return tree


def named_like(like: Params, leaves: Mapping[str, Any]) -> Params:
    """Return the leaves, by their names, in the containers of ``like``.

    Raises:
        ValueError: A leaf of ``like`` is missing, or there are others.
    """
    wanted = flatten(like).keys()
    if differing := sorted(wanted ^ leaves.keys()):
        raise ValueError(
            f"{', '.join(differing)} of the parameters here and there are not in both: "
            "they are of two models"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[n] for n in wanted])


def select(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that one of the patterns matches as a whole.

    Raises:
        ValueError: A pattern is no regular expression, or matches none of the names.
    """
    names = list(names)
    check_patterns("patterns", patterns)
    found = set()
    for pattern in patterns:
        matched = {name for name in names if re.fullmatch(pattern, name)}
        if not matched:
            raise ValueError(
                f"{pattern!r} matches none of {', '.join(names)}. It must match a whole "
                "name; a head that is tied to the token table has no name of its own"
            )
        found |= matched
    return [name for name in names if name in found]


def partition(params: Params, train: Sequence[str]) -> tuple[Params, Params]:
    """Split parameters into those that are trained and those that are frozen.

    Args:
        params: Any pytree of arrays or of their shapes.
        train: Regular expressions; what one of them matches as a whole is trained.

    Returns:
        Trained and frozen parameters: the containers of ``params``, with None in the places
        of the other part; ``{}`` if nothing is frozen.

    Raises:
        ValueError: A pattern matches nothing, there is none, or one array stands under
            two names of which one alone is trained.
    """
    leaves = flatten(params)
    chosen = set(select(leaves, train))
    if not chosen:
        raise ValueError(
            f"train={tuple(train)!r} leaves everything frozen; '.*' trains all"
        )
    if len(chosen) == len(leaves):
        return params, {}
    _check_ties(leaves, chosen)
    trained = {n: leaf if n in chosen else None for n, leaf in leaves.items()}
    frozen = {n: None if n in chosen else leaf for n, leaf in leaves.items()}
    return named_like(params, trained), named_like(params, frozen)


def merge(trained: Params, frozen: Params) -> Params:
    """Return all parameters: what ``partition`` has split."""
    if not jax.tree.leaves(frozen):
        return trained
    return jax.tree.map(
        lambda one, other: other if one is None else one,
        trained,
        frozen,
        is_leaf=lambda leaf: leaf is None,
    )


def with_frozen(loss: Loss, frozen: Params) -> Loss:
    """Return the loss of an example as a function of the trained parameters alone."""

    def of_trained(trained: Params, example: Example, key: Key) -> Scalar:
        return loss(merge(trained, frozen), example, key)

    return of_trained


def _check_ties(leaves: Mapping[str, Any], chosen: set[str]) -> None:
    homes: dict[int, str] = {}
    for name, leaf in leaves.items():
        first = homes.setdefault(id(leaf), name)
        if (first in chosen) != (name in chosen) and isinstance(leaf, jax.Array):
            one, other = sorted([first, name], key=lambda n: n not in chosen)
            raise ValueError(
                f"{one!r} is trained and {other!r} is frozen, and both are one array: "
                "training would untie them; train or freeze both"
            )
