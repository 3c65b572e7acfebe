"""Scores of generated text against several references each. Needs the extra ``text``."""

from collections.abc import Sequence
from typing import Any


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return corpus BLEU (sacrebleu, its own tokens, case kept), 0 to 100.

    Args:
        texts: One for each prompt.
        references: At least one for each prompt.
    """
    import sacrebleu

    most = max(map(len, references))
    # None where a prompt has fewer references than another one: sacrebleu's types do not
    # know that it allows this.
    columns: Any = [
        [r[i] if i < len(r) else None for r in references] for i in range(most)
    ]
    return sacrebleu.corpus_bleu([*texts], columns).score


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean over prompts of the best ROUGE-L F1 (rouge-score), 0 to 100."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"])
    best = [
        max(scorer.score(one, text)["rougeL"].fmeasure for one in many)
        for text, many in zip(texts, references, strict=True)
    ]
    return 100 * sum(best) / len(best)
