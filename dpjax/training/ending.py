"""What a run leaves at its end: the export, and the card that names its file."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from dpjax.training import report
from dpjax.training.about import file_digest
from dpjax.training.export import export, take_part
from dpjax.typing import Params


def publish(
    workdir: Path,
    params: Params,
    card: report.PrivacyCard,
    names: Mapping[str, str],
    scores: Mapping[str, float],
) -> None:
    """Export the parameters of a run that is complete, and tell how it ended.

    An export that is there already is kept; the cards are written anew. The first process
    does it, while the others call ``export.take_part``.

    Args:
        workdir: Of the run.
        params: All of them, wherever they are.
        card: After the last step.
        names: A file that tells which were trained; see ``report.parameter_names``.
        scores: The last evaluation, by name.
    """
    folder = workdir / "export"
    if (folder / "params.npz").exists():
        take_part(params)
    else:
        export(folder, params, {**card.files(), **names})
    digest = file_digest(folder / "params.npz")
    about = card.about and dataclasses.replace(card.about, parameters=digest)
    card = dataclasses.replace(card, about=about)
    card.write(folder)
    card.write(workdir)
    print(report.end_block(card, scores, workdir))
