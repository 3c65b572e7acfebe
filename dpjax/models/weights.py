"""Pretrained weights: Hugging Face's safetensors to our parameters, and back; exports.

Conversions reorder numbers and change no value (but a file in bfloat16 or float16 comes
out as float32). Nothing is fetched unless a path names a model of the Hugging Face hub.
"""

import functools
import json
import re
import zipfile
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import ml_dtypes  # noqa: F401 - lets numpy read bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dpjax.checks import (
    check_model,
    check_path,
    check_patterns,
    check_positive_int,
)
from dpjax.models.layouts import LAYOUTS, NOT_PARAMETERS, Layout, Rule, differences
from dpjax.models.partition import flatten, named_like
from dpjax.typing import Example, Key, Model, Params

Tensors = Mapping[str, np.ndarray]
Value = TypeVar("Value")


def pretrained(
    model: Model,
    *,
    path: str,
    family: str,
    fresh: Sequence[str],
    skip: Sequence[str],
) -> Model:
    """Start a model from weights in the Hugging Face format.

    What no shape shows (the number of heads, epsilon, the base of rotary positions, the
    activation, the first position) must be as in ``config.json``, if there is one in
    Hugging Face's format beside the weights: it is compared here, with ``model.settings``,
    and what that file asks for and we do not compute is refused. Nothing is compared for
    the path of a single file, nor if the model has no settings. Names and shapes are
    checked whenever ``init`` is traced (also by ``jax.eval_shape``); the numbers are read
    only when it runs.

    Args:
        model: Of ``family``, scanned or not.
        path: A safetensors file; a folder with ``model.safetensors`` or its index of
            parts; or the name of a model on the hub, "OWNER/NAME" or "OWNER/NAME@REVISION",
            which needs ``huggingface_hub`` (the extra ``hub``).
        family: "gpt2", "bert", "roberta", "vit" or "llama".
        fresh: Regular expressions of parameters ("head/.*") that the file does not give:
            they start as in ``model``.
        skip: Regular expressions of tensors of the file that are left out.

    Returns:
        A model whose ``init`` gives these weights as float32.

    Raises:
        FileNotFoundError: If there is no such file, nor a way to fetch it.
        ValueError: If the family is unknown, or ``config.json`` says otherwise; it lists
            every difference. From ``init``, if tensors are missing or left over, have
            other shapes (another vocabulary), or are tied here and not there.
    """
    layout = _layout(family)
    check_model(model)
    check_patterns("fresh", fresh)
    check_patterns("skip", skip)
    files = _resolve(path)
    if not Path(path).is_file():
        _check_config(files[0].parent / "config.json", model, family=family)

    def init(key: Key, example: Example) -> Params:
        params = model.init(key, example)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        headers = _read(files, data=False)
        given = _without(shapes, fresh)
        _parts(layout, _named(layout, headers, skip=skip), given)
        raw = _named(layout, {name: name for name in headers}, skip=skip)
        rules = _rules(layout, _separate(_views(given)))
        # Not as constants of the program, which are as large as the model; and one by one:
        # several devices may hold together what none can hold alone.
        loaded = {
            name: jax.pure_callback(
                functools.partial(_load, layout, rules, files, raw, name, leaf), leaf
            )
            for name, leaf in given.items()
        }
        return named_like(params, flatten(params) | loaded)

    return model._replace(init=init)


def exported(model: Model, *, path: str, fresh: Sequence[str]) -> Model:
    """Start a model from the parameters that a run has exported.

    Args:
        model: That of the run, or one with the same parameters but for ``fresh``.
        path: The folder ``export`` of the run.
        fresh: Regular expressions of parameters ("head/.*") that start as in ``model``,
            whatever the export has under such names.

    Returns:
        A model whose ``init`` gives these parameters.

    Raises:
        FileNotFoundError: If there is no such export.
        ValueError: From ``init``, if parameters are missing or left over (adapters, which
            ``peft.merge_lora`` merges), or have other shapes.
    """
    check_path("path", path)
    check_model(model)
    check_patterns("fresh", fresh)
    file = Path(path) / "params.npz"
    if not file.is_file():
        raise FileNotFoundError(
            f"path={path!r} has no params.npz; give the folder 'export' of a finished run"
        )

    def read(given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        with _opened(file) as arrays:
            missing = sorted(set(given) - set(arrays))
            if missing:
                raise ValueError(
                    f"{str(file)!r} has no {', '.join(missing)}; name in fresh= what "
                    "starts anew"
                )
            surplus = [n for n in arrays if n not in given and not _matches(n, fresh)]
            if surplus:
                raise ValueError(
                    f"{str(file)!r} has {', '.join(surplus)}, which the model has not; "
                    "merge adapters, or build the model that was exported"
                )
            # An export has float32 for dtypes that are not numpy's own.
            return {name: arrays[name].astype(x.dtype) for name, x in given.items()}

    def init(key: Key, example: Example) -> Params:
        params = model.init(key, example)
        given = _without(params, fresh)
        for name, array in read(given).items():
            if array.shape != given[name].shape:
                raise ValueError(
                    f"{name} of {str(file)!r} is {list(array.shape)}, and "
                    f"{list(given[name].shape)} in the model"
                )
        shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in given.items()}
        found = jax.pure_callback(lambda: read(given), shapes)
        return named_like(params, flatten(params) | found)

    return model._replace(init=init)


def from_hf(
    tensors: Tensors,
    like: Params,
    *,
    family: str,
    fresh: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> Params:
    """Convert tensors with Hugging Face's names to parameters.

    Args:
        tensors: All tensors of a model.
        like: Parameters of the model, or their shapes; the result has the same tree.
        family: As for ``pretrained``.
        fresh: Parameters that the tensors do not give; they are taken from ``like``.
        skip: Tensors to leave out.

    Raises:
        ValueError: If tensors are missing or left over, have other shapes, or are tied
            here and not there.
    """
    layout = _layout(family)
    check_patterns("fresh", fresh)
    check_patterns("skip", skip)
    given = _without(like, fresh)
    parts = _parts(layout, _named(layout, tensors, skip=skip), given)
    return named_like(like, flatten(like) | _gather(parts, given))


def to_hf(params: Params, *, family: str) -> dict[str, np.ndarray]:
    """Convert parameters to tensors with Hugging Face's names; tied ones come once.

    Raises:
        ValueError: If a parameter is not of the family.
    """
    return {tensor.name: tensor.read() for tensor in _tensors(params, family=family)}


class _Tensor(NamedTuple):
    """A tensor to be: its name, its bytes, and what brings it to the host."""

    name: str
    size: int
    read: Callable[[], np.ndarray]


def _tensors(params: Params, *, family: str) -> list[_Tensor]:
    """Return all tensors, none of them read; of a stack of layers, each layer's."""
    # A stack is sliced when a layer is read: all slices at once would be a second copy.
    flat: dict[str, tuple[Any, int | None]] = {}
    for name, leaf in flatten(params).items():
        if name.startswith("layers/"):
            rest = name.removeprefix("layers/")
            flat |= {f"layers_{i}/{rest}": (leaf, i) for i in range(len(leaf))}
        else:
            flat[name] = leaf, None
    rules = _rules(_layout(family), flat)
    left = sorted(set(flat) - {name for rule in rules for name in rule.ours})
    if left:
        raise ValueError(f"family={family!r} has no parameters {left}")

    def part(leaf: Any, layer: int | None) -> np.ndarray:
        return np.asarray(leaf if layer is None else leaf[layer])

    def bytes_of(leaf: Any, layer: int | None) -> int:
        return leaf.nbytes if layer is None else leaf.nbytes // len(leaf)

    def read(rule: Rule) -> np.ndarray:
        parts = [part(*flat[name]) for name in rule.ours]
        return np.ascontiguousarray(rule.transform.join(parts))

    return [
        _Tensor(
            rule.theirs,
            sum(bytes_of(*flat[name]) for name in rule.ours),
            functools.partial(read, rule),
        )
        for rule in rules
    ]


def read(path: str) -> dict[str, np.ndarray]:
    """Read the tensors of a file, folder or model of the hub, as ``pretrained`` would."""
    return dict(_read(_resolve(path), data=True))


def write(path: str, params: Params, *, family: str) -> None:
    """Write parameters to a safetensors file that Hugging Face's models load.

    It holds no settings. To load it by ``from_pretrained``, put it as
    ``model.safetensors`` beside the ``config.json`` that the training started from, or
    one that transformers makes (``GPT2Config(n_head=...).save_pretrained``).

    Raises:
        ValueError: If a parameter is not of the family, or no file can be at ``path``.
    """
    check_path("path", path)
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise ValueError(
            f"path={path!r} must be a file to write, such as model.safetensors, in a folder "
            "that is there"
        )
    # Without this entry transformers refuses the file.
    save_file(to_hf(params, family=family), path, metadata={"format": "pt"})


def write_sharded(
    folder: str, params: Params, *, family: str, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write parameters as Hugging Face has large models: files, and an index of them.

    ``model-00001-of-00003.safetensors``, ..., and ``model.safetensors.index.json``; one file
    ``model.safetensors`` where that is enough. No more than one file is in memory.

    Args:
        folder: Where to write; it must be there and hold no such files.
        params: Arrays, on the host or on devices of this process.
        family: As for ``pretrained``.
        max_shard_bytes: Size of a file, unless one tensor is larger.

    Raises:
        ValueError: A parameter is not of the family, ``max_shard_bytes`` is below 1, or
            ``folder`` is none, or holds weights.
    """
    check_path("folder", folder)
    check_positive_int("max_shard_bytes", max_shard_bytes)
    if not Path(folder).is_dir():
        raise ValueError(f"folder={folder!r} must be a folder that is there")
    if found := sorted(path.name for path in Path(folder).glob("model*.safetensors*")):
        raise ValueError(f"folder={folder!r} holds {found[0]}: give an empty one")
    shards = _shards(_tensors(params, family=family), max_shard_bytes)
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    files: dict[str, str] = {}
    total = 0
    for shard, name in zip(shards, names, strict=True):
        held = {tensor.name: tensor.read() for tensor in shard}
        save_file(held, Path(folder, name), metadata={"format": "pt"})
        files |= dict.fromkeys(held, name)
        total += sum(array.nbytes for array in held.values())
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        text = json.dumps(index, indent=2, sort_keys=True)
        Path(folder, "model.safetensors.index.json").write_text(text + "\n")


def _shards(tensors: Sequence[_Tensor], most: int) -> list[list[_Tensor]]:
    """Group tensors in their order, each group as large as ``most`` allows."""
    shards: list[list[_Tensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.size > room:
            shards.append([])
            room = most
        shards[-1].append(tensor)
        room -= tensor.size
    return shards


def _opened(file: Path) -> Any:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{str(file)!r} is damaged: it is no npz file")
    return np.load(file, allow_pickle=False)


def _layout(family: str) -> Layout:
    if family not in LAYOUTS:
        raise ValueError(f"{family=} is unknown; choose from {[*LAYOUTS]}")
    return LAYOUTS[family]


def _check_config(file: Path, model: Model, *, family: str) -> None:
    """Raise ValueError unless the model computes what the file says, if it says it."""
    if model.settings is None or not file.exists():
        return
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no JSON: {error}") from error
    if "model_type" not in config:
        return  # not Hugging Face's, or older than the keys that are compared
    found = differences(config, dict(model.settings), family=family)
    if found:
        raise ValueError(
            f"{str(file)!r} is of another model: {'; '.join(found)}. An argument that the "
            "model does not take is fixed: then other weights are needed"
        )


def _named(
    layout: Layout, tensors: Mapping[str, Value], *, skip: Sequence[str]
) -> dict[str, Value]:
    """Return the tensors under today's names, without buffers and what is skipped."""
    for pattern in skip:
        if not any(re.fullmatch(pattern, name) for name in tensors):
            raise ValueError(f"skip={pattern!r} matches none of {sorted(tensors)}")
    known = [re.escape(rule.theirs).replace(r"\{\}", r"\d+") for rule in layout.rules]
    named: dict[str, Value] = {}
    for name, tensor in tensors.items():
        if _matches(name, (*skip, *NOT_PARAMETERS)):
            continue
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if not _matches(name, known) and _matches(layout.prefix + name, known):
            name = layout.prefix + name
        named[name] = tensor
    return named


def _without(like: Params, fresh: Sequence[str]) -> dict[str, Any]:
    """Return the leaves by name, those of ``fresh`` left out."""
    names = flatten(like)
    for pattern in fresh:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ValueError(f"fresh={pattern!r} matches none of {sorted(names)}")
    return {name: leaf for name, leaf in names.items() if not _matches(name, fresh)}


def _parts(
    layout: Layout, tensors: Tensors, given: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return views of the tensors as parameters of separate layers, checked."""
    shapes = {name: view.shape for name, view in _separate(_views(given)).items()}
    rules = _rules(layout, shapes)
    _check_names(layout, rules, tensors)
    parts = {
        name: part
        for rule in rules
        for name, part in zip(
            rule.ours, rule.transform.split(tensors[rule.theirs]), strict=True
        )
    }
    _check_shapes(rules, tensors, parts, shapes)
    return parts


def _views(given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return arrays of such shapes that take no memory."""
    return {name: np.broadcast_to(np.float32(0), x.shape) for name, x in given.items()}


def _check_copies(layout: Layout, tensors: Tensors) -> None:
    """Refuse tensors that are one here and differ."""
    for name, source in layout.copies.items():
        both = name in tensors and source in tensors
        if both and not np.array_equal(tensors[name], tensors[source]):
            raise ValueError(
                f"tensors {name!r} and {source!r} differ, and are one in this model; "
                "the weights are of a model with an untied head"
            )


def _check_names(layout: Layout, rules: list[Rule], tensors: Tensors) -> None:
    wanted = {rule.theirs for rule in rules}
    copies = {
        name: source
        for name, source in layout.copies.items()
        if name in tensors and name not in wanted and source in tensors
    }
    _check_copies(layout, {n: tensors[n] for n in {*copies} | {*copies.values()}})
    missing = sorted(wanted - set(tensors))
    surplus = sorted(set(tensors) - wanted - set(copies))
    if missing or surplus:
        raise ValueError(
            "the weights do not fit the model: "
            + "; ".join(
                f"{len(names)} tensors {what}: {', '.join(names)}"
                for what, names in (("missing", missing), ("left over", surplus))
                if names
            )
            + ". Check sizes and head; name parameters that start anew in fresh=, and "
            "tensors to leave out in skip="
        )


_SIZES = {"token/embedding": "vocab_size", "position": "length"}


def _check_shapes(
    rules: list[Rule],
    tensors: Tensors,
    parts: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    wrong = []
    for rule in rules:
        for name in rule.ours:
            if parts[name].shape != shapes[name]:
                key = _SIZES.get(name)
                wrong.append(
                    f"{rule.theirs} is {list(tensors[rule.theirs].shape)}, which makes "
                    f"{name} {list(parts[name].shape)}, not {list(shapes[name])}"
                    + (f" (see {key}=)" if key else "")
                )
    if wrong:
        raise ValueError(
            "the weights are of a model of other sizes: " + "; ".join(wrong)
        )


def _rules(layout: Layout, ours: Mapping[str, Any]) -> list[Rule]:
    """Return the rules of which all parameters are there, one for each layer."""
    layers = {re.match(r"layers_(\d+)/", name) for name in ours} - {None}
    numbers = sorted({int(match[1]) for match in layers if match})
    expanded = []
    for rule in layout.rules:
        for i in numbers if "{}" in rule.theirs else (0,):
            names = tuple(name.format(i) for name in rule.ours)
            if all(name in ours for name in names):
                expanded.append(Rule(rule.theirs.format(i), names, rule.transform))
    return expanded


def _separate(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return scanned parameters as those of separate layers."""
    separate = {}
    for name, leaf in flat.items():
        if name.startswith("layers/"):
            rest = name.removeprefix("layers/")
            separate |= {f"layers_{i}/{rest}": leaf[i] for i in range(len(leaf))}
        else:
            separate[name] = leaf
    return separate


def _gather(
    parts: Mapping[str, np.ndarray], given: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return the float32 parameters of ``given``, layers stacked where they are there."""
    gathered = {}
    for name, leaf in given.items():
        if name.startswith("layers/"):
            rest = name.removeprefix("layers/")
            layers = [parts[f"layers_{i}/{rest}"] for i in range(leaf.shape[0])]
            gathered[name] = np.stack(layers).astype(np.float32)
        else:
            gathered[name] = np.array(parts[name], np.float32)
    return gathered


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _load(
    layout: Layout,
    rules: Sequence[Rule],
    files: Sequence[Path],
    raw: Mapping[str, str],
    name: str,
    leaf: Any,
) -> np.ndarray:
    """Read one parameter, from those tensors alone that it is made of.

    Args:
        layout: Of the family.
        rules: Of the model.
        files: Of the weights.
        raw: Today's name of each tensor -> its name in the files.
        name: Of the parameter.
        leaf: Its shape.
    """
    wanted = _separate(_views({name: leaf})).keys()
    theirs = {rule.theirs for rule in rules}
    parts: dict[str, np.ndarray] = {}
    for rule in rules:
        if wanted & {*rule.ours}:
            copies = [
                n
                for n, of in layout.copies.items()
                if of == rule.theirs and n in raw and n not in theirs
            ]
            names = {raw[n]: n for n in (rule.theirs, *copies)}
            read = _read(files, data=True, only=names)
            _check_copies(layout, {names[n]: tensor for n, tensor in read.items()})
            split = rule.transform.split(read[raw[rule.theirs]])
            parts |= zip(rule.ours, split, strict=True)
    return _gather(parts, {name: leaf})[name]


def _read(
    files: Sequence[Path], *, data: bool, only: Container[str] | None = None
) -> Tensors:
    """Return the tensors of files; without ``data``, zeros that take no memory.

    Args:
        files: Where they are.
        data: Whether to read them.
        only: Names of those that are wanted; None for all.
    """
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    if only is not None and name not in only:
                        continue
                    shape = opened.get_slice(name).get_shape()
                    tensors[name] = (
                        opened.get_tensor(name)
                        if data
                        else np.broadcast_to(np.float32(0), shape)
                    )
        except SafetensorError as error:
            raise ValueError(
                f"{str(file)!r} is no safetensors file: {error}"
            ) from error
    return tensors


def _resolve(path: str) -> list[Path]:
    """Return the safetensors files of a path or of a model of the hub."""
    check_path("path", path)
    local = Path(path)
    if local.is_file():
        return [local]
    folder = local if local.is_dir() else _fetch(path)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{str(index)!r} does not name the parts of the weights: {error!r}"
            ) from error
        return [folder / part for part in parts]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    found = sorted(file.name for file in folder.iterdir())
    raise FileNotFoundError(
        f"path={path!r} has no model.safetensors, only {found}; weights in another format "
        "must be saved as safetensors first"
    )


def _fetch(path: str) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w.-]+)?", path):
        raise FileNotFoundError(f"path={path!r} does not exist")
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(
            f"path={path!r} does not exist; to fetch it from the Hugging Face hub, "
            "install the extra: pip install 'dpjax[hub]'"
        ) from None
    name, _, revision = path.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=[
                "config.json",
                "model*.safetensors",
                "model.safetensors.index.json",
            ],
        )
    except (
        OSError
    ) as error:  # whatever goes wrong: no network, no such model, no access
        raise FileNotFoundError(
            f"path={path!r} does not exist, and the Hugging Face hub does not give it "
            f"({type(error).__name__}). Without network, download the folder elsewhere "
            "and give its path"
        ) from error
    return Path(folder)
