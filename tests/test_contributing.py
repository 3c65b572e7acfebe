"""What CONTRIBUTING.md names is there."""

import re

from tests.runs import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text()


# In backticks, with a folder or an ending of a page.
QUOTED = re.findall(r"`([\w./-]+)`", PAGE)
PATHS = {name for name in QUOTED if "/" in name or name.endswith((".md", ".toml"))}


def test_every_path_is_there():
    assert len(PATHS) > 30
    assert [path for path in PATHS if not (ROOT / path).exists()] == []


def test_every_package_has_its_room():
    rooms = {f"dpjax/{path.parent.name}/" for path in ROOT.glob("dpjax/*/__init__.py")}
    assert rooms <= PATHS


def test_every_command_is_there():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z-]+)", PAGE))
    assert targets
    assert [name for name in targets if f"\n{name}:" not in makefile] == []
    modules = set(re.findall(r"python -m ((?:experiments|tests|dpjax)[\w.]*)", PAGE))
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()
