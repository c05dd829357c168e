"""What the paper's two bar charts print, to be drawn beside runs of the same suite.

Mean success at the end of each task, five seeds, without intervals (Luo et al., ICML 2026). The charts do not say which
actor the mitigations have: it is taken to be the mixture that SPHERE is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sphere_rl.suites import make_suite

SPHERE = "sphere", "literal"
"""The paper's penalty; the scale-free form is not in the paper."""
PUBLISHED: dict[str, dict[tuple[str, ...], tuple[float, float]]] = {
    "cw10": {
        ("dense", "none"): (0.65, 0.18),
        ("wide", "none"): (0.66, 0.21),
        ("topk_moe", "none"): (0.67, 0.21),
        ("topk_moe", "layernorm"): (0.53, 0.38),
        ("topk_moe", *SPHERE): (0.71, 0.49),
        ("topk_moe", "parseval"): (0.67, 0.23),
        ("topk_moe", "c_chain"): (0.67, 0.22),
        ("topk_moe", "cbp"): (0.69, 0.29),
    },
    "h1": {
        ("dense", "none"): (0.54, 0.36),
        ("wide", "none"): (0.62, 0.41),
        ("topk_moe", "none"): (0.55, 0.36),
        ("topk_moe", "layernorm"): (0.61, 0.50),
        ("topk_moe", *SPHERE): (0.75, 0.54),
        ("topk_moe", "parseval"): (0.62, 0.40),
        ("topk_moe", "c_chain"): (0.57, 0.41),
        ("topk_moe", "cbp"): (0.49, 0.45),
    },
}
"""Success in RL and in CRL by suite, actor and method."""


def published(
    suite: str, tasks: Sequence[str], actor: str, methods: Sequence[str], settings: Mapping[str, object]
) -> tuple[float, float] | None:
    """Success in RL and CRL that the paper prints for such runs; ``None`` for others, and for other task sequences.

    ``settings``: what the runs trained with, by name.
    """
    known = PUBLISHED.get(suite, {})
    if not known or tuple(tasks) != make_suite(suite).tasks:
        return None
    key = (actor, *methods, *([str(settings.get("sphere.scale"))] if tuple(methods) == SPHERE[:1] else ()))
    return known.get(key)
