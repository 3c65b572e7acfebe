"""The tables of experiments/results/audit.md: what attacks find in what ships.

    python -m experiments.audit_tables --out=DIR [--suite=A,B] [--mnist=FILE.npz]

--out=DIR          receives NAME.json, NAME.md and, for some, NAME.png for each suite
--suite=A,B        mechanisms, canaries, membership, inversion, referee; all if not given
--mnist=FILE.npz   Keras' layout; membership and inversion use digits alone without it

Exit status: 0 done, 2 wrong arguments or input.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments import options

Rows = list[dict[str, Any]]

# Okabe and Ito's palette, which the colour-blind can tell apart, without yellow.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        given = options.read(argv, ("out", "suite", "mnist"))
        if "out" not in given:
            raise ValueError("--out=DIR is missing; see --help")
        suites = options.choices("suite", given.get("suite"), SUITES)
        sources = _sources(given.get("mnist"))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = Path(given["out"])
    out.mkdir(parents=True, exist_ok=True)
    for name in suites:
        rows = SUITES[name](sources)
        (out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
        (out / f"{name}.md").write_text(markdown(rows))
        if name in _PLOTS:
            _draw(rows, **_PLOTS[name]).savefig(out / f"{name}.png", dpi=150)
        print(out / f"{name}.md", flush=True)
    return 0


def markdown(rows: Rows) -> str:
    """Return rows as a table."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [[_text(row[column]) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mechanisms(sources: dict[str, Any]) -> Rows:
    """Attack every small plan, and the claims known to be false."""
    del sources
    from dpjax.audit import distinguish, verdict
    from experiments.audit_settings import FALSE, SETTINGS

    rows = []
    for name, mechanism in (SETTINGS | FALSE).items():
        claim = verdict.claim_of(mechanism)
        attacks = distinguish.attacks_on(mechanism)
        # The attack that looks for what independent coins exclude needs many draws.
        trials = 10_000 if "opposed" in attacks else 40_000
        findings = verdict.audit_mechanism(
            mechanism, trials=trials, seed=0, confidence=0.99
        )
        best = max(findings, key=lambda f: (f.verdict == "VIOLATED", f.lower_bound))
        rows.append(
            {
                "plan": name,
                "claimed": claim.epsilon,
                "shown, 99 %": best.lower_bound,
                "if Gaussian": best.gdp_lower_bound,
                "posterior, 90 %": f"{best.posterior.lower:.2f} to "
                f"{best.posterior.upper:.2f}",
                "attack": best.attack,
                "verdict": verdict.worst(findings),
            }
        )
    return rows


def canaries(sources: dict[str, Any]) -> Rows:
    """Put canaries into one full-batch run of the digits recipe at several epsilons."""
    del sources
    from configs import digits_mlp_dpsgd
    from dpjax.audit import verdict
    from dpjax.audit.canaries import KINDS, canary_scores
    from dpjax.experiment import build_experiment

    rows = []
    for epsilon in (1.0, 4.0, 8.0):
        config = digits_mlp_dpsgd.get_config().to_dict()
        config["mechanism"] |= {
            "epsilon": epsilon,
            "steps": 10,
            "sampling": {"name": "dpjax.sampling:FullBatch"},
        }
        config["run"]["seed"] = 0
        experiment = build_experiment(config)
        claim = verdict.claim_of(experiment.mechanism)
        for kind in KINDS:
            count = 2000 if kind == "dirac" else 200
            scores = canary_scores(config, experiment, kind=kind, count=count, seed=0)
            found = verdict.judge_one_run(*scores, claim, attack=kind, confidence=0.95)
            rows.append(
                {
                    "claimed": claim.epsilon,
                    "canaries": kind,
                    "number": count,
                    "shown in one run, 95 %": found.lower_bound,
                    "if Gaussian and independent": found.gdp_lower_bound,
                    "of the claim": found.gdp_lower_bound / claim.epsilon,
                }
            )
    return rows


def membership(sources: dict[str, Any]) -> Rows:
    """Attack 32 models for each epsilon, each trained on half of 600 examples."""
    import numpy as np

    from dpjax.accounting import calibrate
    from dpjax.audit import membership as attack
    from dpjax.mechanisms import DpSgd
    from dpjax.sampling import FullBatch

    rows, models = [], 32
    for name, source in sources.items():
        chosen = _first(source, 600)
        rng = np.argsort(_spread(models, len(chosen)), axis=0)
        members = rng < models // 2
        for epsilon in (1.0, 3.0, 8.0, 30.0, math.inf):

            def make(noise: float, size: int = len(chosen)) -> DpSgd:
                return DpSgd(
                    clip_norm=1.0,
                    clip_style="flat",
                    noise_multiplier=noise,
                    sampling=FullBatch(),
                    steps=100,
                    num_examples=size // 2,
                    delta=1e-4,
                )

            plan = (
                make(0.0) if math.isinf(epsilon) else calibrate(make, epsilon=epsilon)
            )
            experiment = _small(chosen, plan, learning_rate=2.0)
            params = attack.shadow_models(experiment, members, seed=0)
            losses = attack.losses_of(experiment, params)
            by_loss = attack.attacked(attack.loss_scores(losses), members)
            by_lira = attack.attacked(attack.lira_scores(losses, members), members)
            rows.append(
                {
                    "data": name,
                    "epsilon": epsilon,
                    "loss of members": float(losses[members].mean()),
                    "of others": float(losses[~members].mean()),
                    "AUC, loss": by_loss.auc,
                    "AUC, LiRA": by_lira.auc,
                    "TPR at 1 %, LiRA": by_lira.tpr_at_1_percent,
                    "TPR at 0.1 %, LiRA": by_lira.tpr_at_01_percent,
                }
            )
    return rows


def inversion(sources: dict[str, Any]) -> Rows:
    """Invert one release of DP-SGD, for several batch sizes and noises."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dpjax.audit import inversion as attack
    from dpjax.clipping import clipped_grad
    from dpjax.noise import noisy_mean, root_key

    rows = []
    for name, source in sources.items():
        for size in (1, 4, 16, 64):
            experiment = _small(_first(source, size), None, learning_rate=1.0)
            examples = jax.tree.map(jnp.asarray, source[list(range(size))])
            blank = jax.tree.map(lambda x: x[0], examples)
            params = experiment.model.init(jax.random.key(0), blank)
            engine = clipped_grad(experiment.loss, clip_norm=1.0)
            clipped, _ = engine(params, examples, jax.random.key(0))
            for noise in (0.0, 0.001, 0.01, 0.1, 1.0):
                release = noisy_mean(
                    clipped,
                    l2_bound=1.0,
                    stddev=noise,
                    divisor=float(size),
                    key=root_key(0),
                    step=0,
                )
                layer = next(iter(release.values()))
                closed = attack.invert_linear(layer["kernel"], layer["bias"])
                guess = attack.invert_by_descent(
                    experiment.loss,
                    params,
                    release,
                    examples,
                    inputs="image",
                    steps=500,
                    learning_rate=0.05,
                    key=jax.random.key(1),
                )
                truths = np.asarray(examples["image"])
                rows.append(
                    {
                        "data": name,
                        "batch": size,
                        "sigma": noise,
                        "linear layer": attack.best_correlation(closed[:8], truths),
                        "descent": attack.best_correlation(np.asarray(guess), truths),
                    }
                )
    return rows


def referee(sources: dict[str, Any]) -> Rows:
    """Compare accountants on a grid of Poisson-sampled Gaussians."""
    del sources
    from dpjax.accounting import epsilon
    from dpjax.audit.referee import Sampled, edgeworth_epsilon, fourier_epsilon
    from dpjax.mechanisms import DpSgd
    from dpjax.sampling import Poisson

    rows = []
    for rate, steps in ((0.001, 10_000), (0.01, 1000), (0.05, 500), (0.25, 200)):
        for noise in (0.7, 1.0, 2.0, 5.0):
            plan = DpSgd(
                clip_norm=1.0,
                clip_style="flat",
                noise_multiplier=noise,
                sampling=Poisson(rate=rate),
                steps=steps,
                num_examples=10**6,
                delta=1e-5,
            )
            exact = epsilon(plan)
            if exact > 12:
                continue
            sampled = Sampled(rate, noise, steps)
            down, up = (
                fourier_epsilon(sampled, delta=1e-5, rounded=side)
                for side in ("down", "up")
            )
            rows.append(
                {
                    "rate": rate,
                    "steps": steps,
                    "noise multiplier": noise,
                    "Fourier, down": down,
                    "PLD": exact,
                    "Fourier, up": up,
                    "RDP": epsilon(plan, accountant="rdp"),
                    **{
                        f"Edgeworth {order}": edgeworth_epsilon(
                            sampled, delta=1e-5, order=order
                        )
                        for order in (1, 2, 3)
                    },
                }
            )
    return rows


SUITES: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "mechanisms": mechanisms,
    "canaries": canaries,
    "membership": membership,
    "inversion": inversion,
    "referee": referee,
}

_PLOTS: dict[str, dict[str, Any]] = {
    "membership": {"x": "epsilon", "ys": ("AUC, loss", "AUC, LiRA"), "by": ("data",)},
    "inversion": {
        "x": "sigma",
        "ys": ("linear layer",),
        "by": ("data", "batch"),
    },
}


def _sources(mnist: str | None) -> dict[str, Any]:
    from dpjax.data.arrays import digits, npz

    found: dict[str, Any] = {"digits": digits(split="train", test_fraction=0.2)}
    if mnist is not None:
        found["MNIST"] = npz(path=mnist, split="train")
    return found


def _first(source: Any, size: int) -> Any:
    from dpjax.data.arrays import ArraySource

    return ArraySource(source[list(range(size))])


def _small(source: Any, mechanism: Any, *, learning_rate: float) -> Any:
    """Return an experiment of a small MLP on ``source``."""
    import optax

    from configs import digits_mlp_dpsgd
    from dpjax.experiment import build_experiment

    config = digits_mlp_dpsgd.get_config().to_dict()
    # Replaced below: calibrating it would be a waste.
    config["mechanism"] |= {"epsilon": None, "noise_multiplier": 1.0}
    built = build_experiment(config)
    return dataclasses.replace(
        built,
        source=source,
        mechanism=mechanism or built.mechanism,
        optimizer=optax.sgd(learning_rate),
    )


def _spread(rows: int, columns: int) -> Any:
    import jax
    import numpy as np

    return np.asarray(jax.random.uniform(jax.random.key(0), (rows, columns)))


def _draw(rows: Rows, *, x: str, ys: Iterable[str], by: tuple[str, ...]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    groups = list(dict.fromkeys(tuple(row[key] for key in by) for row in rows))
    ticks = list(dict.fromkeys(row[x] for row in rows))
    for i, group in enumerate(groups):
        of_group = [row for row in rows if tuple(row[key] for key in by) == group]
        for y, dash in zip(ys, ("-", "--"), strict=False):
            axes.plot(
                [ticks.index(row[x]) for row in of_group],
                [row[y] for row in of_group],
                dash,
                marker="o",
                color=_COLOURS[i % len(_COLOURS)],
                label=f"{', '.join(map(str, group))}: {y}",
            )
    axes.set_xticks(range(len(ticks)), [_text(tick) for tick in ticks])
    axes.set_xlabel(x)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else str(value)
    return str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
