"""Signatures read from source code, without importing what they belong to.

``optax.adamw`` takes a second or two to import; its argument names take milliseconds to
read. Imports of names are followed from file to file.
"""

import ast
import dataclasses
import functools
import importlib.util
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Signature:
    """Names of a callable's arguments.

    Attributes:
        required: Without a default, positional ones first.
        optional: With a default.
        open: Whether other keywords are taken too, or the definition could not be read.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    open: bool = False


def module_file(module: str) -> Path | None:
    """Return the source file of a module, or None if there is none in Python."""
    # Only the top package is looked up by the import system: that imports nothing.
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    base = Path(spec.origin)
    if base.suffix != ".py":  # built in, or an extension
        return None
    if not rest:
        return base
    stem = base.parent.joinpath(*rest)
    candidates = (stem.with_name(stem.name + ".py"), stem / "__init__.py")
    return next((file for file in candidates if file.exists()), None)


@functools.lru_cache(maxsize=64)
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def public_names(file: Path) -> list[str]:
    """Return the public functions and classes that ``file`` defines or imports."""
    names = []
    for node in _parse(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.extend(alias.asname or alias.name for alias in node.names)
    return [name for name in names if not name.startswith("_")]


def find(file: Path, attribute: str) -> Signature | None:
    """Return the signature of ``attribute`` of the module ``file``, or None."""
    for node in _parse(file).body:
        if isinstance(node, ast.FunctionDef) and node.name == attribute:
            return _of_function(node)
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            return _of_class(node, file)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == attribute:
                    return _imported(node, alias.name)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == attribute for t in targets):
                return Signature((), open=True)
    return None


def _imported(node: ast.ImportFrom, attribute: str) -> Signature | None:
    if node.level or not node.module:
        return Signature((), open=True)  # Relative: left to the import itself.
    source = module_file(node.module)
    return find(source, attribute) if source else None


def _of_function(node: ast.FunctionDef) -> Signature:
    positional = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
    split = len(positional) - len(node.args.defaults)
    keywords = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    required, optional = positional[:split], positional[split:]
    for argument, default in keywords:
        (required if default is None else optional).append(argument.arg)
    return Signature(tuple(required), tuple(optional), open=node.args.kwarg is not None)


def _of_class(node: ast.ClassDef, file: Path) -> Signature:
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            found = _of_function(part)
            return dataclasses.replace(found, required=found.required[1:])
    inherited = _inherited(node, file)
    if inherited.open or not node.decorator_list:
        return inherited  # A class that is no dataclass has the fields of its base.
    required, optional = [*inherited.required], [*inherited.optional]
    for field in node.body:
        if not (
            isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        ):
            continue
        if "ClassVar" in ast.unparse(field.annotation):
            continue
        name = field.target.id
        required = [other for other in required if other != name]
        optional = [other for other in optional if other != name]
        (required if field.value is None else optional).append(name)
    return Signature(tuple(required), tuple(optional))


def _inherited(node: ast.ClassDef, file: Path) -> Signature:
    """Return the arguments of the only base; open if it cannot be read."""
    if not node.bases:
        return Signature(())
    (base, *others) = node.bases
    found = None if others or not isinstance(base, ast.Name) else find(file, base.id)
    return found or Signature((), open=True)
