"""What is told to people: the plan, the result and the privacy card."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpjax.data.inspection import Inspection
from dpjax.mechanisms import Mechanism
from dpjax.models.partition import flatten
from dpjax.privacy.accounting import epsilon
from dpjax.training.about import About, versions
from dpjax.training.config import PRIVATE_START
from dpjax.typing import Params

CLAIMED = "claimed, assumption-based"

UNIT = "one training example"
WEAK = 10.0
"""Above, epsilon by itself is not taken for protection (Ponomareva et al. 2023, "How to
DP-fy ML", arXiv 2303.00654, section 5.2: tier 3)."""

RELEASED = (
    "the parameters in export/, and those after each step of the run",
    "metrics.jsonl, but for names that begin with sensitive/ or private_test/",
    "config.json, ledger.txt and this card",
)
SECRET = (
    "checkpoints/: the keys of noise, sampling and loss, and the state of mechanism and "
    "optimizer",
    "which examples a batch had, how many, and what the loss drew for them",
    "how long steps took, and what was printed on the operator's terminal",
)

ASSUMPTIONS = (
    f"Privacy unit: {UNIT}. A person with k examples, or k copies of one, is protected as "
    "a group of k: by about k times epsilon, at a larger delta. Copies are counted at the "
    "start; how many there are is private, and not told here.",
    "The number of training examples is public, a constant of the plan like rates, steps "
    "and divisors, which were computed from it: adjacent data have one example more or "
    "less under the same constants.",
    "Noise and sampling come from non-cryptographic generators (threefry, Philox). Sums "
    "are rounded in floating point; noise is added to them exactly, and what comes out is "
    "rounded to a power of two of about a thousandth of the noise, so that no last bits "
    "are left to tell of an example.",
    "The time that steps take depends on the batches drawn: neither it nor the throughput "
    "is published.",
    "What the config fixes (vocabulary, label words, lengths, constants of preprocessing) "
    "was not learnt from the private data.",
    "The cost covers this run only: other runs on the same data, such as a search for "
    "hyper-parameters, add theirs.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyCard:
    """The statement that goes with a model.

    Attributes:
        sentence: What epsilon means, for people who do not know it.
        private: Whether a finite epsilon is claimed at all.
        proven: Whether epsilon holds for any data; if not, flags say what it assumes.
        epsilon: By PLD, or by RDP where that does not reach, at ``steps_taken``.
        epsilon_rdp: By RDP, a looser cross-check; None where RDP has no analysis.
        delta, unit, adjacency: What epsilon refers to.
        amplified: Whether epsilon relies on amplification by sampling.
        steps_taken, steps_planned: Releases. While a run goes on, those taken include
            what is taken before the next evaluation or checkpoint.
        mechanism: Every primary fact.
        event: What was accounted.
        key_source: Where noise and sampling seeds came from.
        flags: What weakens or voids the claim; empty at best.
        assumptions: What the claim rests on.
        released, secret: What epsilon lets be published, and what it does not.
        about: Which run this is about; None for a plan without one.
        versions: Of the packages that computed it.
    """

    sentence: str
    private: bool
    proven: bool
    epsilon: float
    epsilon_rdp: float | None
    delta: float
    unit: str
    adjacency: str
    amplified: bool
    steps_taken: int
    steps_planned: int
    mechanism: dict[str, Any]
    event: str
    key_source: str
    flags: tuple[str, ...]
    assumptions: tuple[str, ...]
    released: tuple[str, ...]
    secret: tuple[str, ...]
    about: About | None
    versions: dict[str, str]

    def to_json(self) -> str:
        """Return the card as strict JSON; an infinite epsilon is the string "inf"."""
        return json.dumps(strict(dataclasses.asdict(self)), indent=2) + "\n"

    def to_markdown(self) -> str:
        """Return the card as a page for people."""
        # Equal to the last digit only where PLD does not reach (see ``epsilon``).
        same = self.epsilon == self.epsilon_rdp and 0 < self.epsilon < math.inf
        accountant = "RDP" if same else "PLD"
        rows = {
            f"epsilon ({accountant})": f"{self.epsilon:.4f}",
            "epsilon (RDP cross-check)": "no analysis"
            if self.epsilon_rdp is None
            else f"{self.epsilon_rdp:.4f}",
            "analysis": "holds for any data" if self.proven else CLAIMED,
            "delta": f"{self.delta:g}",
            "unit": self.unit,
            "adjacency": f"{self.adjacency.replace('_', ' ')}, n fixed and public",
            "amplification by sampling": "yes" if self.amplified else "none claimed",
            "steps accounted / planned": f"{self.steps_taken} / {self.steps_planned}",
            **{f"mechanism.{key}": value for key, value in self.mechanism.items()},
            "event": f"`{self.event}`",
            "seeds": self.key_source,
            **(dataclasses.asdict(self.about) if self.about else {}),
        }
        table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
        versions = ", ".join(f"{name} {v}" for name, v in self.versions.items())
        return (
            f"# Privacy card: {self.headline()}\n\n{self.sentence}\n\n"
            f"| fact | value |\n| --- | --- |\n{table}\n\n"
            f"## Flags\n\n{_bullets(self.flags or ('none',))}\n"
            f"## Assumptions\n\n{_bullets(self.assumptions)}\n"
            f"## May be published\n\n{_bullets(self.released or ('all',))}\n"
            f"## Must stay secret\n\n{_bullets(self.secret or ('nothing',))}\n"
            f"Computed with {versions}.\n"
        )

    def headline(self) -> str:
        """Return the claim in one line."""
        if not self.private:
            return "NOT PRIVATE"
        # 0.00 would read as perfect privacy.
        digits = ".2f" if self.epsilon >= 0.01 else ".2g"
        claim = f"epsilon = {self.epsilon:{digits}} at delta = {self.delta:g}"
        return claim if self.proven else f"{claim} ({CLAIMED})"

    def write(self, directory: Path) -> None:
        """Write ``privacy_card.json`` and ``privacy_card.md``, each atomically."""
        for name, text in self.files().items():
            unfinished = directory / f".{name}"
            unfinished.write_text(text)
            unfinished.replace(directory / name)

    def files(self) -> dict[str, str]:
        """Return both forms of the card by file name."""
        return {
            "privacy_card.json": self.to_json(),
            "privacy_card.md": self.to_markdown(),
        }


def privacy_card(
    mechanism: Mechanism,
    *,
    steps: int,
    seed: int | None = None,
    flags: Sequence[str] = (),
    assumptions: Sequence[str] = (),
    about: About | None = None,
) -> PrivacyCard:
    """Return the card of ``steps`` releases.

    Args:
        mechanism: What was run.
        steps: Releases really made.
        seed: The written seed of noise and sampling, or None if they came from the OS.
        flags: Further facts that weaken the claim.
        assumptions: Further facts that the claim rests on.
        about: Which run it is about.
    """
    spent = epsilon(mechanism, steps=steps)
    cross_check = epsilon(mechanism, steps=steps, accountant="rdp")
    sampling = mechanism.sampling
    caveats = mechanism.caveats(steps)
    found = [*caveats, *flags]
    if not mechanism.private:
        found.insert(0, "mechanism without privacy: not private")
    elif math.isinf(spent):
        found.insert(0, "no finite epsilon (no noise): not private")
    if seed is not None:
        found.append(f"reproducible sampling and noise (seed={seed}): not private")
    if mechanism.private and mechanism.delta >= 1 / mechanism.num_examples:
        found.append(
            f"delta is not below 1/{mechanism.num_examples}, one over num_examples"
        )
    if mechanism.private and not sampling.amplified:
        found.append("accounted without amplification by sampling")
    if mechanism.private and WEAK < spent < math.inf:
        found.append(f"epsilon is above {WEAK:g}: by itself it protects little")
    protects = mechanism.private and math.isfinite(spent) and seed is None
    return PrivacyCard(
        sentence=_sentence(spent, mechanism, protects=protects, proven=not caveats),
        proven=not caveats,
        private=protects,
        epsilon=spent,
        epsilon_rdp=None if math.isnan(cross_check) else cross_check,
        delta=mechanism.delta,
        unit=UNIT,
        adjacency=sampling.adjacency,
        amplified=sampling.amplified,
        steps_taken=steps,
        steps_planned=mechanism.steps,
        mechanism=facts(mechanism),
        event=str(mechanism.event(steps)),
        key_source="operating system entropy" if seed is None else f"seed={seed}",
        flags=tuple(found),
        assumptions=(*ASSUMPTIONS, *assumptions) if mechanism.private else (),
        released=RELEASED if mechanism.private else (),
        secret=SECRET if mechanism.private else (),
        about=about,
        versions=versions(),
    )


def _sentence(
    epsilon: float, mechanism: Mechanism, *, protects: bool, proven: bool
) -> str:
    """Return what epsilon means: the odds of the best guess at who was in the data.

    With even odds before, a guess is right with probability ``(e^epsilon + delta) /
    (e^epsilon + 1)`` at most, whatever else is known (Kairouz et al. 2015, arXiv 1311.0776,
    the testing region of (epsilon, delta)).
    """
    if not mechanism.private:
        return "This model was trained without privacy, on data declared public."
    if not protects:
        return (
            "This run guarantees nothing about any training example: treat all that it "
            "made like the training data."
        )
    # Of e^-epsilon, which does not overflow.
    chance = (1 + mechanism.delta * math.exp(-epsilon)) / (1 + math.exp(-epsilon))
    most = math.ceil(1000 * chance) / 10
    act = {
        "add_or_remove_one": "used in training",
        "zero_out_one": "used in training, or blanked out there",
    }[mechanism.sampling.adjacency]
    return (
        "Who guesses from all that is released, and from whatever else they know, whether "
        f"{UNIT} of their choice was {act} is right at most {most:g} times in 100, where "
        "tossing a coin is right 50 times"
        + ("." if proven else ", if what the flags say is so.")
    )


def card_of(
    config: Mapping[str, Any],
    mechanism: Mechanism,
    steps: int,
    about: About | None = None,
    inspection: Inspection | None = None,
) -> PrivacyCard:
    """Return the card of a run after ``steps`` steps, with the flags of its config.

    Args:
        config: Of the run.
        mechanism: Its mechanism.
        steps: Releases really made.
        about: Which run it is.
        inspection: What was counted in its data; told only if they are public.
    """
    flags = []
    if mechanism.private and config["run"]["log_sensitive"]:
        flags.append("un-noised statistics of training examples were logged")
    if config["evaluation"]["provenance"] == "private":
        flags.append("evaluated on private data without noise: the scores are private")
    if mechanism.private and "wandb" in config["run"]["writers"]:
        flags.append(
            "wandb was told when each step ended, which depends on the batches"
        )
    public = config["data"]["provenance"] == "public"
    if public and inspection is not None and inspection.duplicates:
        among = "" if inspection.whole else f" of the {inspection.read} looked at"
        flags.append(
            f"{inspection.duplicates} examples{among} repeat earlier ones, one of them "
            f"{inspection.copies} times in all"
        )
    start, assumptions = config["parameters"]["provenance"], []
    if start == "private":
        flags.append(
            f"{PRIVATE_START}: what they reveal is not in this epsilon (experiments.compose "
            "states that of both runs)"
        )
    if start == "public":
        assumptions.append(
            "The parameters at the start were trained on public data, free to all."
        )
    return privacy_card(
        mechanism,
        steps=steps,
        seed=config["run"]["seed"],
        flags=flags,
        assumptions=assumptions,
        about=about,
    )


def inspected(inspection: Inspection) -> list[str]:
    """Return what a look at the data found, for the operator."""
    among = "" if inspection.whole else f", of the {inspection.read} looked at"
    if not inspection.duplicates:
        return [f"no training example is repeated{among}"]
    return [
        f"{inspection.duplicates} training examples are copies of others{among}; one is "
        f"there {inspection.copies} times, and protected as a group of as many"
    ]


def identity(
    config: Mapping[str, Any], mechanism: Mechanism, data_fingerprint: str
) -> dict[str, Any]:
    """Return what must not change while a run goes on.

    Kept in the checkpoints only: a fingerprint of private data is private.
    """
    resolved = {"mechanism": facts(mechanism), "data": data_fingerprint}
    return {**config, "resolved": resolved}


def config_text(config: Mapping[str, Any], mechanism: Mechanism) -> str:
    """Return the resolved config as JSON, for people and scripts."""
    resolved = {"mechanism": facts(mechanism)}
    return json.dumps(strict({**config, "resolved": resolved}), indent=2) + "\n"


def metric_name(config: Mapping[str, Any]) -> str:
    """Return the name under which the evaluation is written, such as test/accuracy."""
    evaluation = config["evaluation"]
    split = "test" if evaluation["provenance"] == "public" else "private_test"
    return f"{split}/{evaluation['metric']['name'].rpartition(':')[2]}"


def start_block(
    config: Mapping[str, Any],
    mechanism: Mechanism,
    *,
    trained: int,
    frozen: int,
    memory: str,
) -> str:
    """Return the plan of a run, before its first step.

    Args:
        config: Of the run.
        mechanism: The plan.
        trained: How many parameters are trained.
        frozen: How many are not.
        memory: What each device holds, in words.
    """
    sampling = mechanism.sampling
    size = config["compute"]["microbatch_size"]
    engine = config["compute"]["engine"] if mechanism.private else "plain"
    rows = {
        "model": config["model"]["name"],
        "parameters": f"{trained + frozen:,}, of which {trained:,} are trained",
        "data": f"{mechanism.num_examples:,} examples, {config['data']['provenance']}",
        "mechanism": type(mechanism).__name__,
        "sampling": f"{sampling}, {mechanism.expected_batch_size:g} examples expected",
        "steps": f"{mechanism.steps:,}",
        "engine": engine + (f" in microbatches of {size}" if size else ""),
    }
    if "noise_multiplier" in facts(mechanism):
        rows["noise multiplier"] = f"{facts(mechanism)['noise_multiplier']:.4f}"
    rows["each device"] = memory
    rows["at the end"] = card_of(config, mechanism, mechanism.steps).headline()
    return _block("plan", rows)


def parameter_names(trained: Params, frozen: Params) -> dict[str, str]:
    """Return a file that tells which of the exported parameters were trained."""
    names = {"trained": [*flatten(trained)], "frozen": [*flatten(frozen)]}
    return {"parameters.json": json.dumps(names, indent=2) + "\n"}


def end_block(card: PrivacyCard, scores: Mapping[str, float], workdir: Path) -> str:
    """Return the result of a run."""
    rows = {name: f"{score:.4f}" for name, score in scores.items()}
    rows["privacy"] = card.headline()
    rows["flags"] = "; ".join(card.flags) or "none"
    rows["card"] = str(workdir / "privacy_card.md")
    rows["export"] = str(workdir / "export")
    return _block("result", rows)


def facts(mechanism: Any) -> dict[str, Any]:
    """Return every primary fact of a mechanism, JSON-able, nested values included."""
    found: dict[str, Any] = {"name": type(mechanism).__name__}
    for field in dataclasses.fields(mechanism):
        value = getattr(mechanism, field.name)
        if callable(value):  # A public function of the step.
            ends = {"first": 0, "last": mechanism.steps - 1}
            found[field.name] = {k: float(value(step)) for k, step in ends.items()}
        else:
            found[field.name] = (
                facts(value) if dataclasses.is_dataclass(value) else value
            )
    return found


def strict(value: Any) -> Any:
    """Return a value for strict JSON: tuples are lists, "inf" and "nan" are strings."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _bullets(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def _block(title: str, rows: Mapping[str, str]) -> str:
    width = max(len(name) for name in rows)
    lines = [f"  {name:<{width}}  {text}" for name, text in rows.items()]
    return "\n".join([title, *lines])
