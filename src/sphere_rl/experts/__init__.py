"""Mixtures of experts: which expert sees which sample (`routing`), the gates that decide it (`gates`), layers that
compute only those (`layers`), what turns their outputs into actions (`heads`), the actors and critics made of them
(`network`) by a run's `options`, and what becomes of them where a model is traced (`tracing`).
"""

from sphere_rl.experts.gates import Gate, Kind, TopK
from sphere_rl.experts.layers import ExpertMLP, ExpertOutput, GroupedLinear, RoutedFeatures
from sphere_rl.experts.routing import (
    Routing,
    dense_routing,
    gated_routing,
    shared_top_k_routing,
    single_routing,
    top_k_routing,
    weighted_routing,
)

__all__ = [
    "ExpertMLP",
    "ExpertOutput",
    "Gate",
    "GroupedLinear",
    "Kind",
    "RoutedFeatures",
    "Routing",
    "TopK",
    "dense_routing",
    "gated_routing",
    "shared_top_k_routing",
    "single_routing",
    "top_k_routing",
    "weighted_routing",
]
