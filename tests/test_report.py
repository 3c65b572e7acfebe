"""The privacy card states every fact, and its flags tell what weakens it."""

import dataclasses
import importlib
import json

import pytest

import dpjax
from dpjax.report import privacy_card
from tests.contracts.test_mechanisms import MECHANISMS, PRIVATE


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_card_states_every_primary_fact(name):
    mechanism = MECHANISMS[name]
    card = json.loads(privacy_card(mechanism, steps=3).to_json())
    for field in dataclasses.fields(mechanism):
        assert field.name in card["mechanism"]
    for field in dataclasses.fields(mechanism.sampling):
        value = getattr(mechanism.sampling, field.name)
        assert card["mechanism"]["sampling"][field.name] == value
    assert card["steps_taken"] == 3
    assert card["adjacency"] == mechanism.sampling.adjacency
    assert str(mechanism.event(3)) == card["event"]
    assert {"jax", "numpy", "dp-accounting"} <= card["versions"].keys()


@pytest.mark.parametrize("name", PRIVATE)
def test_the_page_and_the_json_agree(name):
    card = privacy_card(PRIVATE[name], steps=5)
    page = card.to_markdown()
    assert f"| epsilon (PLD) | {card.epsilon:.4f} |" in page
    assert f"epsilon = {card.epsilon:.2f} at delta" in page
    for flag in card.flags:
        assert f"- {flag}" in page


@pytest.mark.parametrize(
    ("multiplier", "accountant", "claim"),
    [(1e3, "PLD", "epsilon = 0.00"), (0.1, "RDP", "epsilon = ")],
)
def test_the_card_names_its_accountant_and_never_rounds_to_zero(
    multiplier, accountant, claim
):
    mechanism = MECHANISMS["dp_sgd poisson"]
    mechanism = dataclasses.replace(mechanism, noise_multiplier=multiplier)
    card = privacy_card(mechanism, steps=5)
    assert f"| epsilon ({accountant}) | {card.epsilon:.4f} |" in card.to_markdown()
    assert card.headline().startswith(claim)
    shown = float(card.headline().split()[2])
    assert shown == pytest.approx(card.epsilon, rel=0.05)


def test_an_honest_poisson_run_has_no_flags():
    card = privacy_card(MECHANISMS["dp_sgd poisson"], steps=5)
    assert card.private
    assert card.flags == ()


@pytest.mark.parametrize(
    ("changes", "options", "flag", "private"),
    [
        ({"noise_multiplier": 0.0}, {}, "no finite epsilon", False),
        ({"delta": 0.01}, {}, "delta is not below", True),
        ({"sampling": dpjax.FullBatch()}, {}, "without amplification", True),
        ({}, {"seed": 3}, "seed=3", False),
        ({}, {"flags": ["raw losses were logged"]}, "raw losses", True),
    ],
)
def test_whatever_weakens_the_claim_is_flagged(changes, options, flag, private):
    mechanism = dataclasses.replace(MECHANISMS["dp_sgd poisson"], **changes)
    card = privacy_card(mechanism, steps=5, **options)
    assert any(flag in text for text in card.flags)
    assert card.private == private
    assert (card.headline() == "NOT PRIVATE") == (not private)


@pytest.mark.parametrize("name", dpjax.__all__)
def test_public_names_load_from_their_homes(name):
    value = getattr(dpjax, name)
    home = importlib.import_module(value.__module__)
    assert getattr(home, name) is value


def test_unknown_public_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'clipped_gard'"):
        dpjax.clipped_gard  # noqa: B018
