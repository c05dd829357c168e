"""Plain PPO, the baseline of every comparison."""

from __future__ import annotations

from sphere_rl.methods import Method


class NoMitigation(Method):
    """No hook does anything."""

    summary = "plain PPO"
    citation = "Schulman et al. 2017, Proximal Policy Optimization Algorithms"
