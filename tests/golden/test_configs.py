"""The recipes, fully resolved. If one moves: was the change intended?

To accept a change: ``python -m tests.golden.test_configs`` writes the files anew.
"""

import importlib
import json
from pathlib import Path

import pytest

from dpjax.training.config import check, flatten

HERE = Path(__file__).parent / "configs"
ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "common"
)


def resolved(name):
    return importlib.import_module(f"configs.{name}").get_config().to_dict()


def as_text(config):
    return json.dumps(flatten(config), indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_what_it_was(name):
    golden = (HERE / f"{name}.json").read_text()
    assert as_text(resolved(name)) == golden, "the recipe changed: intended?"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_passes_the_checks(name):
    check(resolved(name))


@pytest.mark.parametrize("name", RECIPES)
def test_its_variants_pass_the_checks_too(name):
    recipe = importlib.import_module(f"configs.{name}")
    for variant in getattr(recipe, "VARIANTS", ()):
        check(recipe.get_config(variant).to_dict())


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_how_to_run_it(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    assert f"--config=configs/{name}.py" in text


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for recipe in RECIPES:
        (HERE / f"{recipe}.json").write_text(as_text(resolved(recipe)))
