"""The rule by which the pilot chooses a default, on numbers made up for it."""

from __future__ import annotations

from pilot import Arm, qualified


def test_dead_features_and_lost_returns_disqualify() -> None:
    none = Arm("none", 20, [100.0, 80.0], [9.0, 9.0], [1.0, 1.0])
    dead = Arm("literal_grad_01", 0, [200.0, 200.0], [50.0, 50.0], [1.0, 1.0])
    lost = Arm("free_grad_03", 10, [90.0, 60.0], [60.0, 60.0], [1.0, 1.0])
    good = Arm("free_grad_01", 10, [90.0, 70.0], [20.0, 22.0], [1.0, 1.0])
    other = Arm("layernorm", 10, [90.0, 90.0], [99.0, 99.0], [1.0, 1.0])
    assert qualified([none, dead, lost, good, other]) == [good]
    assert good.mean_rank == 21.0
