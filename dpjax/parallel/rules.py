"""Rules that ship: which dimensions of which parameters are split over devices.

Dimensions are counted from the end, so that they are the same where the parameters of all
layers are stacked.
"""

from typing import Final

TRANSFORMER: Final = (
    (r"(query|key|value|up|gate)/kernel$", -2, -1),
    (r"(query|key|value|up|gate)/bias$", None, -1),
    (r"(attention/out|down)/kernel$", -1, -2),
    (r"(embedding|position)$", -1, None),
    (r"head/kernel$", -2, None),
    (".*", None, None),
)
"""Of ``gpt2``, ``llama``, ``bert`` and ``vit``: heads of attention and the hidden axis of MLPs
are split over ``model``, and must be divisible. Adapters are repeated on every device."""

VOCABULARY: Final = (
    (r"token/embedding$", -1, -2),
    (r"head/kernel$", -2, -1),
    *TRANSFORMER,
)
"""The same, and the vocabulary is split over ``model``, where its size is divisible: that of
GPT-2, 50,257, is not."""

EXPERTS: Final = ((r"experts/(gate|up|down)$", -2, -3), *VOCABULARY)
"""The same of ``moe``: over ``model`` whole experts are split, too."""
