"""Run an analysed program with something added at its sites."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jaxtyping import Array

from dpjax.clipping.analysis.uses import Affine, Program, Site, free_axis
from dpjax.clipping.analysis.values import Path
from dpjax.clipping.execution import hooks
from dpjax.jaxprs import CALLS, bind, callee, scan_counts

Visit = Callable[[Site, Any, Any, Any], tuple[Array, Any]]
"""``(site, weight, data, extra) -> (output, saved)``: how to run a site."""


def interpret(
    program: Program,
    inputs: Sequence[Any],
    *,
    visit: Visit,
    extra: Mapping[Path, Any],
    affine: Mapping[Path, Affine],
) -> tuple[list[Any], dict[Path, Any]]:
    """Run ``program`` on the inputs of one example, handing its sites to ``visit``.

    Args:
        program: What to run.
        inputs: One value for each input of the jaxpr.
        visit: Called for each site whose path is in ``extra``; others run unchanged.
        extra: What ``visit`` gets, with one leading axis for each loop around the site.
        affine: Those of the program that ``hooks.affine`` is to run.

    Returns:
        The outputs, and by path what ``visit`` saved, stacked in the same way.
    """
    run = _Interpreter(program.sites, visit, affine)
    return run.jaxpr(program.closed.jaxpr, program.closed.consts, inputs, (), extra)


def _is_piece(key: Path, here: Path) -> bool:
    return len(key) == len(here) + 2 and key[-2] < 0


class _Interpreter:
    def __init__(
        self, sites: Mapping[Path, Site], visit: Visit, affine: Mapping[Path, Affine]
    ) -> None:
        self._sites = sites
        self._visit = visit
        self._affine = affine

    def jaxpr(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        inputs: Sequence[Any],
        path: Path,
        extra: Mapping[Path, Any],
    ) -> tuple[list[Any], dict[Path, Any]]:
        env: dict[Any, Any] = {}
        saved: dict[Path, Any] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            here = (*path, index)
            below = {k: v for k, v in extra.items() if k[: len(here)] == here}
            values = [read(atom) for atom in eqn.invars]
            for side in [~key[-1] for key in below if key[-1] < 0 and key[:-1] == here]:
                key = (*here, ~side)
                site, more = self._sites[key], below.pop(key)
                data = site.data_of(values)
                values[side], saved[key] = self._visit(site, values[side], data, more)
            pieces = next((key[:-1] for key in below if _is_piece(key, here)), None)
            if pieces:
                out, kept = self._pieces(eqn, values, pieces, below)
                saved |= kept
            elif here in self._affine:
                out = [hooks.affine(*map(read, self._affine[here]))]
            elif not below:
                out = bind(eqn, values)
            else:
                out, kept = self._opened(eqn, values, here, below)
                saved |= kept
            env.update(zip(eqn.outvars, out, strict=True))
        return [read(atom) for atom in jaxpr.outvars], saved

    def _opened(
        self,
        eqn: JaxprEqn,
        values: list[Any],
        path: Path,
        extra: Mapping[Path, Any],
    ) -> tuple[list[Any], dict[Path, Any]]:
        name = eqn.primitive.name
        if path in extra:
            site = self._sites[path]
            weight, data = values[site.side], site.data_of(values)
            out, kept = self._visit(site, weight, data, extra[path])
            return [out], {path: kept}
        if name == "scan":
            return self._scan(eqn, values, path, extra)
        assert name in CALLS, name
        inner = callee(eqn)

        def call(values: list[Any], extra: Mapping[Path, Any]) -> tuple[list, dict]:
            return self.jaxpr(inner.jaxpr, inner.consts, values, path, extra)

        if "prevent_cse" in eqn.params:
            call = jax.checkpoint(
                call,
                prevent_cse=eqn.params["prevent_cse"],
                policy=eqn.params["policy"],
            )
        return call(values, extra)

    def _pieces(
        self,
        eqn: JaxprEqn,
        values: list[Any],
        path: Path,
        extra: Mapping[Path, Any],
    ) -> tuple[list[Any], dict[Path, Any]]:
        """Run a product with a weight that is put together, piece by piece."""
        side = ~path[-1]
        keys = [key for key in self._sites if key[:-1] == path]
        pieces = [piece for key in keys if (piece := self._sites[key].piece)]
        outs, saved = [], {}
        for key, piece in zip(keys, pieces, strict=True):
            ends = piece.start, piece.start + piece.size
            weight = jax.lax.slice_in_dim(values[side], *ends, axis=piece.axis)
            site, data = self._sites[key], values[1 - side]
            if key in extra:
                out, saved[key] = self._visit(site, weight, data, extra[key])
            else:
                out = hooks.apply(site, weight, data)
            outs.append(out)
        axis = free_axis(eqn, side, pieces[0].axis)
        assert axis is not None
        return [jax.lax.concatenate(outs, axis)], saved

    def _scan(
        self,
        eqn: JaxprEqn,
        values: list[Any],
        path: Path,
        extra: Mapping[Path, Any],
    ) -> tuple[list[Any], dict[Path, Any]]:
        body = eqn.params["jaxpr"]
        num_consts, num_carry = scan_counts(eqn)
        consts, rest = values[:num_consts], values[num_consts:]

        def step(carry: list[Any], slices: tuple[list[Any], Any]) -> tuple[list, tuple]:
            xs, extra = slices
            out, saved = self.jaxpr(
                body.jaxpr, body.consts, [*consts, *carry, *xs], path, extra
            )
            return out[:num_carry], (out[num_carry:], saved)

        carry, (ys, saved) = jax.lax.scan(
            step,
            rest[:num_carry],
            (rest[num_carry:], dict(extra)),
            length=eqn.params["length"],
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        return [*carry, *ys], saved
