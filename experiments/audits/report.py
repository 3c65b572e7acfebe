"""The findings of an audit as JSON, as a page and as a picture."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpjax.audit.verdict import CREDIBILITY, Finding, worst
from dpjax.training.report import PrivacyCard, strict
from experiments.shared.report import COLOURS, tidy


def write(card: PrivacyCard, findings: Sequence[Finding], directory: Path) -> None:
    """Write ``audit.json``, ``audit.md`` and ``audit.png`` to ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "audit.json").write_text(to_json(card, findings))
    (directory / "audit.md").write_text(to_markdown(card, findings))
    draw(card, findings).savefig(directory / "audit.png", dpi=150)


def to_json(card: PrivacyCard, findings: Sequence[Finding]) -> str:
    """Return card and findings as strict JSON; an infinite number is the string "inf"."""
    content = {
        "verdict": worst(findings),
        "claimed": {"epsilon": card.epsilon, "delta": card.delta},
        "findings": [_plain(f) for f in findings],
        "card": json.loads(card.to_json()),
    }
    return json.dumps(strict(content), indent=1) + "\n"


def to_markdown(card: PrivacyCard, findings: Sequence[Finding]) -> str:
    """Return the report as a page for people."""
    rows = "\n".join(
        f"| {f.attack} | {f.trials} | {f.lower_bound:.3f} | {f.gdp_lower_bound:.3f} | "
        f"{f.posterior.median:.2f} [{f.posterior.lower:.2f}, {f.posterior.upper:.2f}] | "
        f"{f.excess.shown:.3g} of {f.excess.claimed:.3g} at {f.excess.epsilon:.2f} | "
        f"{f.verdict} |"
        for f in findings
    )
    return (
        f"# Audit: {worst(findings)}\n\n"
        f"Claim: {card.headline()}, {card.adjacency.replace('_', ' ')}, "
        f"{card.mechanism['name']}, {card.steps_taken} steps.\n\n"
        "| attack | runs counted | epsilon at least | if Gaussian | "
        f"posterior, {CREDIBILITY:.0%} | delta shown of claimed | verdict |\n"
        f"| --- | --- | --- | --- | --- | --- | --- |\n{rows}\n\n"
        f"Bounds hold with confidence {findings[0].confidence:.4g} for each attack. "
        '"If Gaussian" assumes the trade-off curve of one Gaussian, and "posterior" is of '
        "the attack, not of the mechanism: neither is part of the verdict (nor, with "
        "canaries, is the profile of delta). An attack that "
        "refutes nothing proves nothing.\n\n![ROC](audit.png)\n"
    )


def print_summary(
    card: PrivacyCard, findings: Sequence[Finding], directory: Path
) -> None:
    """Print one line for the claim and one for each attack."""
    print(f"claim: {card.headline()}")
    for f in findings:
        print(
            f"{f.attack}: epsilon >= {f.lower_bound:.3f} at confidence "
            f"{f.confidence:.4g}: {f.verdict}"
        )
    print(f"{worst(findings)}; report in {directory / 'audit.md'}")


def draw(card: PrivacyCard, findings: Sequence[Finding]) -> Any:
    """Return a matplotlib figure: ROC of the attacks, and bounds against the claim."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, f in enumerate(findings):
        colour = COLOURS[i % len(COLOURS)]
        left.plot(*zip(*f.roc, strict=True), color=colour, linewidth=2, label=f.attack)
        low, median, high = (min(e, 2 * card.epsilon) for e in f.posterior)
        error = [[median - low], [high - median]]
        right.errorbar(median, i, xerr=error, color=colour, capsize=4, fmt="o")
        right.plot(f.lower_bound, i, marker=">", color="black", markersize=9)
    left.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    left.set(xlabel="FPR", ylabel="TPR", title="telling the neighbours apart")
    right.axvline(card.epsilon, color="black", linewidth=1, linestyle="--")
    right.set(
        yticks=range(len(findings)),
        yticklabels=[f.attack for f in findings],
        xlabel="epsilon",
        title=f"claimed (dashed), shown (black), posterior ({CREDIBILITY:.0%})",
        ylim=(-0.5, len(findings) - 0.5),
    )
    right.set_xlim(left=0)
    for axes in (left, right):
        tidy(axes)
    left.legend(frameon=False, loc="lower right")
    return figure


def _plain(finding: Finding) -> dict[str, Any]:
    fields = dataclasses.fields(finding)
    values = {field.name: getattr(finding, field.name) for field in fields}
    for name in ("counts", "posterior", "excess"):
        values[name] = values[name]._asdict()
    return values
