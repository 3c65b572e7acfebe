"""Scores against values worked out by hand."""

import math

import pytest

from experiments.shared.text_scores import bleu, rouge_l

TEXT = "the cat sat on the mat"


def test_bleu_takes_the_best_match_of_several_references():
    assert bleu([TEXT], [["a dog", TEXT]]) == pytest.approx(100)
    # Every n-gram is there, and the text a word shorter: its penalty is exp(1 - 7/6).
    assert bleu([TEXT], [[f"{TEXT} today"]]) == pytest.approx(100 * math.exp(-1 / 6))
    assert bleu([TEXT, TEXT], [["a dog", TEXT], [TEXT]]) == pytest.approx(100)


def test_rouge_l_is_the_mean_of_the_best_f1_of_longest_common_subsequences():
    references = [["a dog", "the cat on a mat"], ["the cat sat on the mat"]]
    # "the cat on mat": 4 of 6 and of 5 words.
    first = 2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5)
    assert rouge_l([TEXT, TEXT], references) == pytest.approx(100 * (first + 1) / 2)
