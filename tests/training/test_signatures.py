"""Signatures read from source agree with those Python sees."""

import inspect

import optax
import pytest

from dpjax.training.signatures import Signature, find, module_file

SOURCE = """
import dataclasses
from typing import ClassVar
from optax import sgd as renamed
from . import sibling

CONSTANT = 3

def function(a, b=1, *, c, d=2): ...

def open_ended(a, **rest): ...

class Plain:
    def __init__(self, n, *, scale=1.0): ...

@dataclasses.dataclass
class Facts:
    kind: ClassVar[str] = "facts"
    size: int
    rate: float = 0.5

class Child(Facts): ...

@dataclass
class More(Facts):
    rate: float
    extra: int = 1

class Foreign(somewhere.Else): ...
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("function", Signature(("a", "c"), ("b", "d"))),
        ("open_ended", Signature(("a",), (), open=True)),
        ("Plain", Signature(("n",), ("scale",))),
        ("Facts", Signature(("size",), ("rate",))),
        ("Child", Signature(("size",), ("rate",))),
        ("More", Signature(("size", "rate"), ("extra",))),
        ("Foreign", Signature((), open=True)),
        ("CONSTANT", Signature((), open=True)),
        ("sibling", Signature((), open=True)),
        ("absent", None),
    ],
)
def test_definitions_of_every_kind(name, expected, tmp_path):
    file = tmp_path / "module.py"
    file.write_text(SOURCE)
    assert find(file, name) == expected


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lamb"])
def test_optax_names_are_followed_to_their_definition(name):
    found = find(module_file("optax"), name)
    seen = inspect.signature(getattr(optax, name)).parameters.values()
    required = [p.name for p in seen if p.default is inspect.Parameter.empty]
    assert list(found.required) == required
    assert {*found.required, *found.optional} == {p.name for p in seen}


@pytest.mark.parametrize("module", ["no_such_module", "dpjax.no_such_module"])
def test_missing_modules_have_no_file(module):
    assert module_file(module) is None
