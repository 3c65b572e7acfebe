"""From public text to a private task, without a download.

    python -m experiments.public_to_private --task=e2e --text=FILE --data=DIR --workdir=DIR
    python -m experiments.public_to_private --task=sst2 --text=FILE --data=DIR --workdir=DIR

--task      e2e: descriptions of restaurants, by a tiny GPT with private LoRA adapters
            (configs/e2e_tiny_gpt.py; BLEU and ROUGE-L need the extra ``text``);
            sst2: the mood of sentences, by a tiny encoder
            (configs/sst2_tiny_encoder.py)
--text      public text to pretrain on, and to learn the vocabulary from
--data      e2e: devset.csv (private) and testset_w_refs.csv; sst2: train.tsv and test.tsv
--workdir   receives the vocabulary, one run for each variant of the recipe, and results/:
            scores (a table, and JSON with versions), samples, and of the private run
            config, metrics and card

Run again after an interruption: what is finished is not repeated.

Exit status: 0 done, 2 wrong arguments or input.
"""

import csv
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.shared import options, report, timing
from experiments.sweeps import sweep

_OPTIONS = ("task", "text", "data", "workdir")
_VOCABULARY = {"e2e": 1024, "sst2": 4096}
_SPECIALS = ("<eos>", "<mask>")
_CAVEAT = (
    "The model without privacy has seen the private data without noise: its scores and "
    "samples are for data that may be published, and no epsilon holds for them."
)
_WORDS = (" poor", " good")  # of the classes for the untouched model: It was ...
_FILES = {
    "e2e": {"devset.csv": "train.csv", "testset_w_refs.csv": "test.csv"},
    "sst2": {"train.tsv": "train.tsv", "test.tsv": "test.tsv"},
}


class Task(NamedTuple):
    """A recipe, and how its runs are compared."""

    recipe: Any
    private: str
    compare: Callable[[Path, Mapping[str, Any]], dict[str, dict[str, float]]]


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    return options.command(argv, __doc__, _compare)


def _compare(argv: list[str]) -> int:
    given = options.read(argv, _OPTIONS)
    missing = [name for name in _OPTIONS if name not in given]
    if missing:
        raise ValueError(f"--{missing[0]} is missing; see --help")
    options.choices("task", given["task"], _FILES)
    _run(given["task"], *(Path(given[name]) for name in _OPTIONS[1:]))
    return 0


def _run(name: str, text: Path, data: Path, workdir: Path) -> None:
    options.keep_programs()
    from configs import e2e_tiny_gpt, sst2_tiny_encoder
    from dpjax.training.train import train

    task = {
        "e2e": Task(e2e_tiny_gpt, "lora", _compare_e2e),
        "sst2": Task(sst2_tiny_encoder, "private", _compare_sst2),
    }[name]
    _prepare(name, text, data, workdir)
    recipes = {
        variant: task.recipe.get_config(f"{variant},{workdir}").to_dict()
        for variant in task.recipe.VARIANTS
    }
    for variant, config in recipes.items():
        if not (workdir / variant / "export").exists():
            train(config, workdir / variant)
    scores = task.compare(workdir, recipes)
    table = f"{_table(scores)}\n{_CAVEAT}\n"
    (workdir / "results" / "scores.md").write_text(table)
    _write_facts(name, scores, workdir / "results")
    for file in ("config.json", "metrics.jsonl", "privacy_card.md"):
        shutil.copy(workdir / task.private / file, workdir / "results" / file)
    print(table)


def _write_facts(name: str, scores: Mapping[str, Any], results: Path) -> None:

    from dpjax.training.about import PACKAGES, device

    facts = timing.provenance(
        module="experiments.public_to_private",
        argv=[f"--task={name}"],  # the rest names the machine's folders
        packages=PACKAGES,
        device=device(),
    )
    sweep.write_json(results / "scores.json", {**facts, "scores": scores})


def _prepare(name: str, text: Path, data: Path, workdir: Path) -> None:
    from dpjax.data.tokenizers import train_bpe

    (workdir / "results").mkdir(parents=True, exist_ok=True)
    links = {text: "public.txt"} | {data / a: b for a, b in _FILES[name].items()}
    for source, link in links.items():
        if not source.is_file():
            raise FileNotFoundError(f"{source} does not exist")
        if not (workdir / link).exists():
            (workdir / link).symlink_to(source.absolute())
    vocabulary = workdir / "tokenizer.json"
    if not vocabulary.exists():
        train_bpe(
            paths=[str(text)],
            vocab_size=_VOCABULARY[name],
            specials=_SPECIALS,
            out=str(vocabulary),
            provenance="public",
        )


def _compare_sst2(
    workdir: Path, recipes: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    import jax

    from dpjax.training import config as configs
    from dpjax.training.export import load_export

    config = recipes["private"]
    shown, scores, answers = range(0, 1821, 150), {}, {}
    for label, run in _runs("private").items():
        spec, source = config["model"], config["evaluation"]["source"]
        if run == "pretrain":
            spec, source = _untouched(spec["model"]["encoder"], source)
        source, model = configs.build(source), configs.build(spec)
        metric = configs.build(config["evaluation"]["metric"], model)
        params = load_export(workdir / run / "export")
        scores[label] = {"accuracy": _mean(metric, source, params)}
        predict = jax.vmap(model.evaluating().apply, (None, 0, None))
        logits = predict(params, source[shown], jax.random.key(0))
        answers[label] = [_WORDS[int(row.argmax())] for row in logits]
    rows = (workdir / "test.tsv").read_text().splitlines()
    lines = ["The likelier class of every 150th sentence of the test set.\n"]
    for i, row in enumerate(shown):
        text, truth = rows[row].split("\t")
        lines.append(f"**{text}**\n")
        lines += [f"- {label}:{words[i]}" for label, words in answers.items()]
        lines.append(f"- label:{_WORDS[int(truth)]}\n")
    (workdir / "results" / "samples.md").write_text("\n".join(lines))
    return scores


def _untouched(encoder: Mapping[str, Any], source: Any) -> tuple[Any, Any]:
    """Return model and source that ask the public model for a word: It was ..."""
    from configs.sst2_tiny_encoder import MASK
    from dpjax.training import config as configs

    encode = configs.build(source["tokenizer"]).encode
    model = {
        "name": "dpjax.models.bert:infilling",
        "encoder": encoder,
        "mask_token": MASK,
        "label_tokens": [encode(word)[0] for word in _WORDS],
    }
    template = ("{sentence}", " It was", "<mask>", ".")
    return model, {**source, "template": template}


def _compare_e2e(
    workdir: Path, recipes: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    import jax
    import jax.numpy as jnp

    from dpjax.data.arrays import ArraySource
    from dpjax.models.losses import causal_lm
    from dpjax.models.peft import merge_lora
    from dpjax.training import config as configs
    from dpjax.training.export import load_export
    from experiments.shared.text_scores import bleu, rouge_l

    config = recipes["lora"]
    source = configs.build(config["evaluation"]["source"])
    # A quarter is enough for a mean.
    source = ArraySource(source[range(0, len(source), 4)])
    model = configs.build(recipes["pretrain"]["model"])
    tokenizer = configs.build(config["data"]["source"]["tokenizer"])
    loss = causal_lm(model)

    def nats(params: Any, example: Any) -> Any:
        return loss(params, example, jax.random.key(0)) * jnp.sum(example["weights"])

    records = source[range(len(source))]
    answers = [
        tokenizer.decode(row[w > 0]).removesuffix("<eos>")
        for row, w in zip(records["tokens"], records["weights"], strict=True)
    ]
    size = sum(len(answer.encode()) for answer in answers) / len(source)
    prompts: dict[str, list[str]] = {}
    with (workdir / "test.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            prompts.setdefault(row["mr"], []).append(row["ref"])
    references, scores, texts = [*prompts.values()], {}, {}
    for label, run in _runs("lora").items():
        params = load_export(workdir / run / "export")
        params = merge_lora(params, scale=config["model"]["scale"])
        texts[label] = _write(model, params, [*prompts], tokenizer)
        scores[label] = {
            "nats per byte": _mean(nats, source, params) / size,
            "BLEU": bleu(texts[label], references),
            "ROUGE-L": rouge_l(texts[label], references),
        }
    (workdir / "results" / "samples.md").write_text(_samples(prompts, texts))
    return scores


def _runs(private: str) -> dict[str, str]:
    return {
        "public model, untouched": "pretrain",
        "private": private,
        "without privacy": "nonprivate",
    }


def _mean(metric: Any, source: Any, params: Any) -> float:
    from dpjax.parallel.sharding import make_layout
    from dpjax.training.evaluate import evaluator

    layout = make_layout(data=1, fsdp=1, model=1, rules=((".*", None),))
    return evaluator(metric, batch_size=64, layout=layout)(params, source)


def _write(model: Any, params: Any, prompts: list[str], tokenizer: Any) -> list[str]:
    """Return the likeliest continuation of each prompt."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dpjax.models.generate import generator

    stop, length, new = tokenizer.specials["<eos>"], 112, 80
    encoded = [tokenizer.encode(f"{prompt}\n") for prompt in prompts]
    sample = generator(
        model,
        max_new_tokens=new,
        stop_token=stop,
        temperature=0.0,
        top_k=None,
        top_p=1.0,
    )
    texts = []
    for i in range(0, len(encoded), 64):
        part = encoded[i : i + 64]
        room = np.full((64, length), stop, np.int32)
        for row, tokens in zip(room, part, strict=False):
            row[: len(tokens)] = tokens
        lengths = np.array([len(tokens) for tokens in part] + [1] * (64 - len(part)))
        prompt = jnp.asarray(room), jnp.asarray(lengths)
        rows = np.asarray(sample(params, *prompt, jax.random.key(0)))
        for row in rows[: len(part)]:
            kept = row[: np.argmax(row == stop)] if stop in row else row
            texts.append(tokenizer.decode(kept).strip())
    return texts


def _table(scores: Mapping[str, Mapping[str, float]]) -> str:
    columns = [*next(iter(scores.values()))]
    rows = [
        [label, *(f"{row[column]:.3f}" for column in columns)]
        for label, row in scores.items()
    ]
    return report.markdown(["", *columns], rows)


def _samples(prompts: Mapping[str, list[str]], texts: Mapping[str, list[str]]) -> str:
    lines = [
        "Likeliest continuations (greedy), every hundredth prompt of the test set.\n"
    ]
    for i in range(0, len(prompts), 100):
        prompt = [*prompts][i]
        lines.append(f"**{prompt}**\n")
        lines += [f"- {label}: {ours[i]}" for label, ours in texts.items()]
        lines.append(f"- reference: {prompts[prompt][0]}\n")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
