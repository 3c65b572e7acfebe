"""A walk that loses a path is found out, and its parameters are differentiated plainly."""

import dataclasses

import pytest

from dpjax.clipping import bookkeeping
from dpjax.clipping.analysis import uses as analysis
from dpjax.clipping.analysis.values import DATA, ParamValue, constant
from tests.checks import thinned
from tests.contracts.test_zoo import compare, known


def forgets(why):
    def mutate(monkeypatch):
        plainly = analysis._differentiate_plainly

        def forgetful(tags, reason, record, **options):
            if not reason.startswith(why):
                plainly(tags, reason, record, **options)

        monkeypatch.setattr(analysis, "_differentiate_plainly", forgetful)

    return mutate


def drops_a_leaf(monkeypatch):
    """Values made of several parameters name all but the first."""
    derive = analysis.derive

    def dropping(eqn, values):
        return [
            dataclasses.replace(tag, leaves=tag.leaves - {min(tag.leaves)})
            if len(tag.leaves) > 1
            else tag
            for tag in derive(eqn, values)
        ]

    monkeypatch.setattr(analysis, "derive", dropping)


def stops_at(primitive):
    """No gradient is expected to come back through these."""

    def mutate(monkeypatch):
        derive = analysis.derive

        def stopping(eqn, values):
            tags = derive(eqn, values)
            if eqn.primitive.name != primitive:
                return tags
            return [dataclasses.replace(tag, leaves=frozenset()) for tag in tags]

        monkeypatch.setattr(analysis, "derive", stopping)

    return mutate


def forgets_the_iteration(monkeypatch):
    """A slice of a stacked weight is taken for the same in every iteration."""
    monkeypatch.setattr(analysis, "_iterated", lambda tag, loop: tag)


def takes_data_for_a_constant(monkeypatch):
    equation = analysis._equation

    def mistaken(eqn, operands, *rest):
        if eqn.primitive.name == "exp" and operands[0] is DATA:
            return [constant(None)]
        return equation(eqn, operands, *rest)

    monkeypatch.setattr(analysis, "_equation", mistaken)


def names_another_equation(monkeypatch):
    """A site says that it is the first equation of the program."""
    site = analysis.Site

    def first(path, eqn, *rest):
        return site((0,), eqn, *rest)

    monkeypatch.setattr(analysis, "Site", first)


def names_the_wrong_side(monkeypatch):
    site = analysis.Site

    def swapped(path, eqn, side, *rest):
        return site(path, eqn, 1 - side, *rest)

    monkeypatch.setattr(analysis, "Site", swapped)


def loses_what_a_call_returns(monkeypatch):
    walk = analysis._walk

    def losing(jaxpr, consts, inputs, path, *rest):
        tags = walk(jaxpr, consts, inputs, path, *rest)
        lost = [DATA if isinstance(tag, ParamValue) else tag for tag in tags]
        return lost if path else tags

    monkeypatch.setattr(analysis, "_walk", losing)


def copies_another_operand(monkeypatch):
    copied = analysis._copied
    monkeypatch.setattr(analysis, "_copied", lambda eqn, _: copied(eqn, eqn.invars[0]))


def forgets_a_piece(monkeypatch):
    pieces = analysis._pieces
    monkeypatch.setattr(analysis, "_pieces", lambda *args: pieces(*args)[:-1])


MUTANTS = {
    "carry_turns_from_data_into_a_parameter": forgets("is carried"),
    "each_layer_hands_its_weights_to_the_next": forgets("is carried"),
    "weight_handed_on_by_the_inner_of_two_loops": forgets("is carried"),
    "branches_that_return_data_or_parameters": forgets("meets data"),
    "dense_on_tokens": forgets("meets data"),
    "l2_regulariser": forgets("meets data"),
    "lora_merged": drops_a_leaf,
    "weight_transposed": stops_at("transpose"),
    "scan_over_layers": forgets_the_iteration,
    "weight_times_a_function_of_data": takes_data_for_a_constant,
    "dense_all_equal": names_another_equation,
    "tied_head": names_the_wrong_side,
    "weight_and_bias_in_one_matrix": copies_another_operand,
    "fused_queries_keys_and_values": forgets_a_piece,
    "network_of_a_flat_vector": forgets("meets data"),
    "jit_that_hands_parameters_through": loses_what_a_call_returns,
}


@pytest.mark.parametrize("name", thinned([(name,) for name in MUTANTS], 2))
def test_what_a_wrong_walk_loses_is_differentiated_plainly(monkeypatch, name):
    case, vectors = known(name)
    MUTANTS[name](monkeypatch)
    compare(bookkeeping, case, vectors)
    monkeypatch.setattr(analysis, "unaccounted", lambda *_: set())
    with pytest.raises(Exception):  # noqa: B017, PT011
        compare(bookkeeping, case, vectors)
