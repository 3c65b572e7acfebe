"""What each table of ``experiments.audits.tables`` is made of."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

Rows = list[dict[str, Any]]
Sources = dict[str, Any]
"""Data sets by name."""


def mechanisms(sources: Sources) -> Rows:
    """Attack every small plan, and the claims known to be false."""
    del sources
    from dpjax.audit import distinguish, verdict
    from experiments.audits.settings import FALSE, SETTINGS

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


def canaries(sources: Sources) -> Rows:
    """Put canaries into one full-batch run of the digits recipe at several epsilons."""
    del sources
    from configs import digits_mlp_dpsgd
    from dpjax.audit import verdict
    from dpjax.audit.canaries import KINDS, canary_scores
    from dpjax.training.experiment import build_experiment

    rows = []
    for epsilon in (1.0, 4.0, 8.0):
        config = digits_mlp_dpsgd.get_config().to_dict()
        config["mechanism"] |= {
            "epsilon": epsilon,
            "steps": 10,
            "sampling": {"name": "dpjax.privacy:FullBatch"},
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


def membership(sources: Sources) -> Rows:
    """Attack 16 models for each epsilon, each trained on half of 300 examples."""
    import numpy as np
    from scipy.stats import norm

    from dpjax.audit import membership as attack

    rows, models = [], 16
    for name, source in sources.items():
        chosen = _first(source, 300)
        rng = np.argsort(_uniform(0, models, len(chosen)), axis=0)
        members = rng < models // 2
        for epsilon in (1.0, 3.0, 8.0, 30.0, math.inf):
            plan = _plan(epsilon, size=len(chosen) // 2, steps=100)
            experiment = _small(chosen, plan, learning_rate=2.0, hidden=16)
            params = attack.shadow_models(experiment, members, seed=0)
            losses = attack.losses_of(experiment, params)
            by_loss = attack.attacked(attack.loss_scores(losses), members)
            by_lira = attack.attacked(attack.lira_scores(losses, members), members)
            # Full batches are one Gaussian, whose trade-off curve is known.
            shift = 10 / plan.noise_multiplier if plan.noise_multiplier else math.inf
            rows.append(
                {
                    "data": name,
                    "epsilon": epsilon,
                    "loss of members": float(losses[members].mean()),
                    "of others": float(losses[~members].mean()),
                    "AUC, loss": by_loss.auc,
                    "AUC, LiRA": by_lira.auc,
                    "TPR at 1 %, LiRA": by_lira.tpr_at_1_percent,
                    "at most": float(norm.sf(norm.isf(0.01) - shift)),
                    "TPR at 0.1 %, LiRA": by_lira.tpr_at_01_percent,
                }
            )
    return rows


def inversion(sources: Sources) -> Rows:
    """Invert one release of DP-SGD, for several batch sizes and noises."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dpjax.audit import inversion as attack
    from dpjax.clipping import clipped_grad
    from dpjax.privacy.noise import noisy_mean, root_key

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


def exposure(sources: Sources) -> Rows:
    """Train language models on text with secrets in it; rank each secret among 1024.

    Four models for each epsilon, of 128 sequences of a Markov chain and of half of 32
    secrets: a name, and digits that are learnt by heart or not at all.
    """
    del sources
    import numpy as np
    import optax

    from dpjax.audit import membership as attack
    from dpjax.data.arrays import ArraySource
    from dpjax.models.gpt2 import gpt2
    from dpjax.models.losses import causal_lm

    models, texts, secrets, length = 4, 128, 32, 8
    model = gpt2(
        vocab_size=10 + secrets,
        length=length,
        layers=1,
        width=32,
        heads=2,
        dtype="float32",
        scan=False,
        remat=False,
    )
    ranked = np.floor(10 * _uniform(0, secrets, 1024, length)).astype(np.int32)
    ranked[:, :, 0] = 10 + np.arange(secrets)[:, None]
    moves = 1 + np.floor(2 * _uniform(1, texts, length)).astype(np.int32)
    plain = np.cumsum(moves, axis=1) % 10
    source = ArraySource({"tokens": np.concatenate([plain, ranked[:, 0]])})
    inside = np.argsort(_uniform(2, models, secrets), axis=0) < models // 2
    members = np.concatenate([np.ones((models, texts), bool), inside], axis=1)
    rows = []
    for epsilon in (1.0, 8.0, 30.0, math.inf):
        plan = _plan(epsilon, size=texts + secrets // 2, steps=300)
        experiment = dataclasses.replace(
            _small(source, plan, learning_rate=1.0),
            model=model,
            loss=causal_lm(model),
            optimizer=optax.adam(0.01),
        )
        params = attack.shadow_models(experiment, members, seed=0)
        candidates = ArraySource({"tokens": ranked.reshape(-1, length)})
        losses = attack.losses_of(
            dataclasses.replace(experiment, source=candidates), params
        ).reshape(-1, 1024)
        each = [attack.exposure(row[0], row[1:]) for row in losses]
        bits = np.reshape(each, (models, secrets))
        rows.append(
            {
                "epsilon": epsilon,
                "exposure of secrets in the data, bits": float(bits[inside].mean()),
                "of secrets that are not": float(bits[~inside].mean()),
                "ranked first, of those in the data": float(
                    (bits[inside] > 9.9).mean()
                ),
            }
        )
    return rows


def intervals(sources: Sources) -> Rows:
    """Estimate the epsilon of attacks on 300 simulated Gaussian mechanisms for each row."""
    del sources
    import itertools

    import numpy as np
    from scipy.stats import binom, norm

    from dpjax.audit import bayes, estimators
    from dpjax.audit.estimators import Counts

    delta, repeats, rows = 1e-5, 300, []
    for runs, mu, place in itertools.product((100, 1000), (0.5, 1.0, 2.0), (0.5, 1.0)):
        rates = norm.sf([place * mu - mu, place * mu])
        true = float(estimators.epsilon_at(delta)(*rates))
        levels = _uniform(len(rows), repeats, 2)
        ends = np.empty((2, repeats, 2))
        for i, (hits, alarms) in enumerate(binom.ppf(levels, runs, rates).astype(int)):
            counts = Counts(
                int(hits), runs - int(hits), int(alarms), runs - int(alarms)
            )
            found = bayes.posterior(counts, delta=delta, credibility=0.9)
            ends[0, i] = found.lower, found.upper
            ends[1, i] = estimators.epsilon_interval(
                counts, delta=delta, confidence=0.9
            )
        covered = ((ends[..., 0] <= true) & (true <= ends[..., 1])).mean(axis=1)
        width = np.median(ends[..., 1] - ends[..., 0], axis=1)
        rows.append(
            {
                "runs": runs,
                "mu": mu,
                "threshold / mu": place,
                "epsilon of the attack": true,
                "posterior covers": float(covered[0]),
                "Clopper-Pearson covers": float(covered[1]),
                "width, posterior": float(width[0]),
                "width, Clopper-Pearson": float(width[1]),
                "ratio": float(width[0] / width[1]),
            }
        )
    return rows


def ew_tune(sources: Sources) -> Rows:
    """Account for the runs that were published with an epsilon of 8."""
    del sources
    from experiments.audits.settings import EW_TUNE

    rows = []
    for run in EW_TUNE:
        found = _accounted(run.sampled, delta=run.delta)
        rows.append({"task": run.task, "batch": run.batch, "delta": run.delta} | found)
    return rows


def referee(sources: Sources) -> Rows:
    """Compare accountants on a grid of Poisson-sampled Gaussians."""
    del sources
    from dpjax.audit.referee import Sampled

    plans = [
        Sampled(rate, noise, steps)
        for rate, steps in ((0.001, 10_000), (0.01, 1000), (0.05, 500), (0.25, 200))
        for noise in (0.7, 1.0, 2.0, 5.0)
    ]
    rows = [_accounted(plan, delta=1e-5) for plan in plans]
    return [row for row in rows if row["PLD"] < 12]


SUITES: dict[str, Callable[[Sources], Rows]] = {
    "mechanisms": mechanisms,
    "canaries": canaries,
    "intervals": intervals,
    "membership": membership,
    "exposure": exposure,
    "inversion": inversion,
    "referee": referee,
    "ew_tune": ew_tune,
}


def _first(source: Any, size: int) -> Any:
    from dpjax.data.arrays import ArraySource

    return ArraySource(source[list(range(size))])


def _small(
    source: Any, mechanism: Any, *, learning_rate: float, hidden: int = 64
) -> Any:
    """Return an experiment of an MLP with ``hidden`` units on ``source``."""
    import optax

    from configs import digits_mlp_dpsgd
    from dpjax.training.experiment import build_experiment

    config = digits_mlp_dpsgd.get_config().to_dict()
    # Replaced below: calibrating it would be a waste.
    config["mechanism"] |= {"epsilon": None, "noise_multiplier": 1.0}
    config["model"]["features"] = (hidden,)
    built = build_experiment(config)
    return dataclasses.replace(
        built,
        source=source,
        mechanism=mechanism or built.mechanism,
        optimizer=optax.sgd(learning_rate),
    )


def _plan(epsilon: float, *, size: int, steps: int) -> Any:
    """Return DP-SGD on full batches, without noise if epsilon is inf."""
    from dpjax.mechanisms import DpSgd
    from dpjax.privacy.accounting import calibrate
    from dpjax.privacy.sampling import FullBatch

    def make(noise: float) -> DpSgd:
        return DpSgd(
            clip_norm=1.0,
            clip_style="flat",
            noise_multiplier=noise,
            sampling=FullBatch(),
            steps=steps,
            num_examples=size,
            delta=1e-4,
        )

    return make(0.0) if math.isinf(epsilon) else calibrate(make, epsilon=epsilon)


def _accounted(plan: Any, *, delta: float) -> dict[str, Any]:
    """Return epsilon of a plan (``dpjax.audit.referee.Sampled``) by all accountants."""
    from dpjax.audit.referee import edgeworth_epsilon, fourier_epsilon
    from dpjax.mechanisms import DpSgd
    from dpjax.privacy.accounting import epsilon
    from dpjax.privacy.sampling import Poisson

    mechanism = DpSgd(
        clip_norm=1.0,
        clip_style="flat",
        noise_multiplier=plan.noise_multiplier,
        sampling=Poisson(rate=plan.rate),
        steps=plan.steps,
        num_examples=10**6,
        delta=delta,
    )
    found = {
        "rate": plan.rate,
        "steps": plan.steps,
        "noise multiplier": plan.noise_multiplier,
        "Fourier, down": fourier_epsilon(plan, delta=delta, rounded="down"),
        "PLD": epsilon(mechanism),
        "Fourier, up": fourier_epsilon(plan, delta=delta, rounded="up"),
        "RDP": epsilon(mechanism, accountant="rdp"),
    }
    for order in (1, 2, 3):
        estimate = edgeworth_epsilon(plan, delta=delta, order=order)
        found[f"Edgeworth {order}"] = estimate
    return found


def _uniform(seed: int, *shape: int) -> Any:
    import jax
    import numpy as np

    return np.array(jax.random.uniform(jax.random.key(seed), shape))
