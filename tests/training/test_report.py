"""The privacy card states every fact, and its flags tell what weakens it."""

import dataclasses
import datetime
import importlib
import json
import math
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest

import dpjax
from dpjax.data.inspection import Inspection
from dpjax.training.about import about, checkout, file_digest, keyed
from dpjax.training.report import card_of, inspected, privacy_card
from tests.checks import thinned
from tests.contracts.test_mechanisms import MECHANISMS, PRIVATE
from tests.runs import ROOT, tiny


@pytest.mark.parametrize("name", thinned([(name,) for name in MECHANISMS], 3))
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


@pytest.mark.parametrize("name", thinned([(name,) for name in PRIVATE], 3))
def test_the_page_and_the_json_agree(name):
    card = privacy_card(PRIVATE[name], steps=5)
    page = card.to_markdown()
    assert f"| epsilon (PLD) | {card.epsilon:.4f} |" in page
    assert f"epsilon = {card.epsilon:.2f} at delta" in page
    for flag in card.flags:
        assert f"- {flag}" in page


@pytest.mark.parametrize(
    ("changes", "accountant", "claim"),
    [
        ({"noise_multiplier": 1e3}, "PLD", "epsilon = 0.00"),
        ({"delta": 1e-16}, "RDP", "epsilon = "),
    ],
)
def test_the_card_names_its_accountant_and_never_rounds_to_zero(
    changes, accountant, claim
):
    mechanism = dataclasses.replace(MECHANISMS["dp_sgd poisson"], **changes)
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
        ({"delta": 0.01}, {}, "delta is not below 1/1000, one over", True),
        ({"noise_multiplier": 0.4}, {}, "epsilon is above 10", True),
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


def chance(card):
    """How often the best guess at one example is right, as the card says."""
    return float(card.sentence.partition("at most ")[2].split()[0]) / 100


@pytest.mark.parametrize("multiplier", [0.3, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-2])
def test_the_sentence_is_what_epsilon_allows(multiplier, delta):
    mechanism = dataclasses.replace(
        MECHANISMS["dp_sgd poisson"], noise_multiplier=multiplier, delta=delta
    )
    card = privacy_card(mechanism, steps=5)
    odds = math.exp(card.epsilon)
    # Randomised response, and all lost with probability delta, is the worst there is.
    worst = delta + (1 - delta) * odds / (1 + odds)
    assert worst - delta <= chance(card) <= worst + delta / 2 + 1e-3
    # Twice the total variation, from the region of hypothesis tests.
    assert chance(card) >= (odds + delta) / (odds + 1) - 1e-9
    assert card.sentence in card.to_markdown()


def test_the_sentence_promises_nothing_that_is_not_proven():
    plan = MECHANISMS["dp_sgd poisson"]
    silent = dataclasses.replace(plan, noise_multiplier=0.0)
    for card in (privacy_card(silent, steps=5), privacy_card(plan, steps=5, seed=1)):
        assert "guarantees nothing" in card.sentence
    claimed = [m for m in PRIVATE.values() if m.caveats(5)]
    assert claimed
    assert "if what the flags say" in privacy_card(claimed[0], steps=5).sentence
    public = MECHANISMS["non-private"]
    assert "without privacy" in privacy_card(public, steps=5).sentence


def test_the_card_says_what_is_released_what_is_not_and_what_is_fixed():
    page = privacy_card(MECHANISMS["dp_sgd poisson"], steps=5).to_markdown()
    for part in (
        "## May be published",
        "## Must stay secret",
        "keys of noise, sampling",
    ):
        assert part in page
    assert "| unit | one training example |" in page
    assert "| adjacency | add or remove one, n fixed and public |" in page
    assert "a constant of the plan like rates" in page


def run(seed=None, **changes):
    config = tiny(**{"run.seed": seed} | changes)
    params = {"w": np.zeros(3, np.float32)}
    return config, about(config, params, data_fingerprint="f00d", secret=b"s" * 16)


def test_the_card_of_a_run_names_what_it_is_about():
    config, facts = run()
    card = card_of(config, MECHANISMS["dp_sgd poisson"], 5, facts)
    page, found = card.to_markdown(), json.loads(card.to_json())["about"]
    assert found == dataclasses.asdict(facts)
    for name, value in dataclasses.asdict(facts).items():
        assert f"| {name} | {value} |" in page
    assert (facts.engine, facts.dtype, facts.device) == ("auto", "float32", "cpu")
    assert facts.date in {
        str(datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=days))
        for days in (0, 1)
    }
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    assert head.stdout.strip() in facts.commit


def test_a_fingerprint_of_private_data_is_told_under_a_secret_key_or_not_at_all():
    private, seeded, public = (
        run()[1].data,
        run(seed=1)[1].data,
        run(**{"data.provenance": "public"})[1].data,
    )
    assert public == "f00d"
    assert "f00d" not in private + seeded
    assert keyed("f00d", b"s" * 16) in private
    assert keyed("f00d", b"t" * 16) not in private
    assert "withheld" in seeded


def test_the_digest_of_a_file_is_that_of_sha256sum(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert file_digest(path) == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_repeated_rows_are_on_the_card_of_public_data_only():
    plan = MECHANISMS["dp_sgd poisson"]
    found = Inspection(duplicates=12, copies=7, read=90, whole=True)
    cards = {
        provenance: card_of(
            tiny(**{"run.seed": None, "data.provenance": provenance}),
            plan,
            5,
            inspection=found,
        )
        for provenance in ("public", "private")
    }
    assert any("12 examples repeat" in flag for flag in cards["public"].flags)
    none = card_of(tiny(**{"run.seed": None}), plan, 5)
    assert cards["private"] == none
    assert "a group of k" in cards["private"].to_markdown()
    assert "one is there 7 times" in inspected(found)[0]


def test_repeated_rows_of_a_sample_are_told_as_of_one():
    config = tiny(**{"run.seed": None, "data.provenance": "public"})
    found = Inspection(duplicates=12, copies=7, read=90, whole=False)
    flags = card_of(config, MECHANISMS["dp_sgd poisson"], 5, inspection=found).flags
    assert any("12 examples of the 90 looked at repeat" in flag for flag in flags)
    none = Inspection(duplicates=0, copies=1, read=90, whole=False)
    for counted in (found, none):
        assert "of the 90 looked at" in inspected(counted)[0]


def test_what_wandb_is_told_is_flagged():
    plan = MECHANISMS["dp_sgd poisson"]
    card = card_of(tiny(**{"run.seed": None, "run.writers": ("wandb",)}), plan, 5)
    assert any("when each step ended" in flag for flag in card.flags)


def test_version_tells_packages_commit_and_device(capsys):
    """Of ``python -m dpjax``, wherever what it prints comes from."""
    front = runpy.run_module("dpjax")["main"]
    assert front(["--version"]) == 0
    told = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    found = subprocess.run(head, capture_output=True, text=True, check=True).stdout
    assert told["commit"].split()[0] == found.strip()
    assert told["jax"] == jax.__version__
    assert told["device"] == jax.devices()[0].device_kind
    assert front(["--versoin"]) == 2
    assert capsys.readouterr().err.startswith("error: --versoin is given; ")


@pytest.mark.parametrize("untracked", [False, True])
def test_changes_to_a_clone_are_told(tmp_path, monkeypatch, untracked):
    def git(*command):
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *command], check=True)

    package = tmp_path / "dpjax" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    look = checkout.__wrapped__
    monkeypatch.setitem(look.__globals__, "__file__", str(package))
    assert look(untracked=untracked) is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    assert not look(untracked=untracked).changed
    (tmp_path / "new.py").write_text("")
    assert look(untracked=untracked).changed == untracked
    package.write_text("x = 1")
    assert look(untracked=untracked).changed
    # What is installed inside of another repository has no commit.
    inside = tmp_path / "libraries" / "dpjax"
    inside.mkdir(parents=True)
    monkeypatch.setitem(look.__globals__, "__file__", str(inside / "__init__.py"))
    assert look(untracked=untracked) is None


def test_the_clock_of_the_studies_loads_no_framework():
    """Other libraries are measured where JAX is not installed."""
    code = (
        "import sys, experiments.shared.timing; "
        "sys.exit(bool({'jax', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
