"""Statistics against hand arithmetic and SciPy."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import polars as pl
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sphere_rl import statistics

TASKS = ("push", "pull")
SCORES = np.array([[0.1, 0.9], [0.3, 0.5]])


def rows(protocol: str, phase: str, seed: int, scores: tuple[float, ...], step: int = 100) -> list[dict]:
    return [
        {"suite": "s", "actor": "a", "method": "m", "protocol": protocol, "seed": seed, "phase": phase}
        | {"run": f"{protocol}-{seed}", "task_index": i, "task": task, "task_step": step, "success_final": score}
        for i, (task, score) in enumerate(zip(TASKS, scores, strict=True))
    ]


def evals() -> pl.DataFrame:
    lines = []
    for seed, (rl, crl, kept) in enumerate(
        [((1.0, 0.8), (0.9, 0.4), (0.3, 0.4)), ((0.8, 0.6), (0.7, 0.2), (0.1, 0.2))]
    ):
        lines += rows("rl", "final", seed, rl) + rows("crl", "final", seed, crl) + rows("crl", "retention", seed, kept)
        lines += rows("rl", "train", seed, (0.5, 0.2), step=50) + rows("crl", "train", seed, (0.6, 0.0), step=50)
    return pl.DataFrame(lines)


def approximately(*values: float | None) -> tuple:
    return tuple(None if value is None else pytest.approx(value) for value in values)


def test_mean_and_interquartile_mean_by_hand() -> None:
    values = np.array([0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert statistics.mean(values) == pytest.approx(4.6 / 8)
    assert statistics.iqm(values) == pytest.approx((0.4 + 0.6 + 0.7 + 0.8) / 4)


def test_two_seeds_enumerated() -> None:
    """Draws of whole rows have three values: both first, both second, mixed; draws within tasks have nine sums."""
    together = statistics.bootstrap(SCORES, "crl")
    apart = statistics.bootstrap(SCORES, "rl")
    assert together is not None
    assert apart is not None
    assert set(together.round(9)) == {0.5, 0.45, 0.4}
    first, second = {0.1, 0.2, 0.3}, {0.5, 0.7, 0.9}
    assert set(apart.round(9)) == {round((a + b) / 2, 9) for a in first for b in second}


def test_interval_of_one_task_is_scipys() -> None:
    scores = np.random.default_rng(3).random((12, 1))
    ours = statistics.estimate(scores, "crl", seed=5)
    theirs = scipy.stats.bootstrap(
        (scores.ravel(),), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(5)
    )
    assert ours is not None
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval))
    assert ours.value == pytest.approx(scores.mean())


def test_stratified_draws_keep_every_task() -> None:
    """Tasks of very different difficulty do not widen an interval: each is resampled within itself."""
    scores = np.array([[0.0, 1.0]] * 5)
    assert statistics.estimate(scores, "rl") == statistics.Estimate(0.5, 0.5, 0.5, 5)


def test_coverage_of_the_interval() -> None:
    """Of 200 experiments of 20 seeds, the 95 % interval holds the truth in most: percentile bootstrap, a bit below."""
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        found = statistics.estimate(rng.normal(size=(20, 3)), "crl", seed=i)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0 <= found.high
    assert 0.85 <= hits / 200 <= 0.99


def test_seeded_generator() -> None:
    scores = np.random.default_rng(1).random((5, 4))
    assert statistics.estimate(scores, "rl", seed=1) == statistics.estimate(scores, "rl", seed=1)
    assert statistics.estimate(scores, "rl", seed=1) != statistics.estimate(scores, "rl", seed=2)


def test_missing_is_missing() -> None:
    assert statistics.estimate(np.zeros((0, 0)), "crl") is None
    assert statistics.estimate(np.array([[0.5, np.nan]]), "crl") is None
    one = statistics.estimate(np.array([[0.2, 0.4]]), "crl")
    assert one is not None
    assert astuple(one) == approximately(0.3, None, None, 1)
    part = statistics.estimate(np.array([[0.2, 0.4], [0.9, np.nan]]), "crl")
    assert part == one
    assert astuple(one) == approximately(0.3, None, None, 1)


@settings(max_examples=30, deadline=None)
@given(arrays(float, st.tuples(st.integers(2, 5), st.integers(1, 4)), elements=st.floats(0, 1)))
def test_interval_holds_within_the_scores(scores: np.ndarray) -> None:
    found = statistics.estimate(scores, "rl")
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert scores.min() - 1e-12 <= found.low <= found.high <= scores.max() + 1e-12


def test_paired_difference_uses_common_seeds_only() -> None:
    ours = pl.DataFrame({"seed": [0, 0, 1, 1, 2, 2], "place": [0, 1] * 3, "score": [0.5, 0.7, 0.6, 0.8, 1.0, 1.0]})
    theirs = pl.DataFrame({"seed": [0, 0, 1, 1], "place": [0, 1] * 2, "score": [0.4, 0.5, 0.6, 0.5]})
    found = statistics.estimate(statistics.matrix(statistics.paired_scores(ours, theirs)), "crl")
    assert found is not None
    assert astuple(found) == approximately(0.15, 0.15, 0.15, 2)


def test_differences_of_two_methods_by_hand() -> None:
    """Ours gains 0.1 in every RL score; in CRL seed 0 gains 0.1 and 0.3, seed 1 gains 0.0 and 0.4; one seed more."""
    theirs = evals()
    change = {("rl", 0, 0): 0.1, ("rl", 0, 1): 0.1, ("rl", 1, 0): 0.1, ("rl", 1, 1): 0.1, ("crl", 0, 0): 0.1,
              ("crl", 0, 1): 0.3, ("crl", 1, 1): 0.4}  # fmt: skip
    ours = pl.DataFrame([
        row | {"success_final": row["success_final"] + change.get((row["protocol"], row["seed"], row["task_index"]), 0)}
        for row in theirs.iter_rows(named=True) if row["phase"] == "final"
    ] + rows("crl", "final", 7, (1.0, 1.0)))  # fmt: skip
    found = statistics.differences(ours, theirs, TASKS)
    assert found["rl"] is not None
    assert astuple(found["rl"]) == approximately(0.1, 0.1, 0.1, 2)
    assert found["crl"] is not None
    # whole seeds are drawn: both first, both second, or mixed
    assert astuple(found["crl"]) == approximately((0.1 + 0.3 + 0.0 + 0.4) / 4, 0.2, 0.2, 2)
    assert found["crl_iqm"] is not None
    assert found["crl_iqm"].value == pytest.approx((0.1 + 0.3) / 2)
    assert found["gap"] is not None
    assert found["gap"].value == pytest.approx(0.1 - 0.2)
    (before,), (after,) = (
        statistics.headline(lines.filter(pl.col("seed") < 2), {"s": TASKS}) for lines in (theirs, ours)
    )
    assert found["gap"].value == pytest.approx(after["gap"].value - before["gap"].value)
    assert found["retention"] is None
    assert found["improvement"] is not None  # not paired: of three and two seeds 4.5 of 6 pairs, and all 6
    assert (found["improvement"].value, found["improvement"].seeds) == (pytest.approx((0.75 + 1) / 2), 2)


def test_probability_of_improvement_is_mann_whitneys() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 5, (6, 3)) / 4, rng.integers(0, 5, (4, 3)) / 4  # with ties
    expected = np.mean([scipy.stats.mannwhitneyu(ours[:, t], theirs[:, t]).statistic / 24 for t in range(3)])
    for protocol in ("rl", "crl"):
        found, back = statistics.improvement(ours, theirs, protocol), statistics.improvement(theirs, ours, protocol)
        assert found is not None
        assert back is not None
        assert (found.value, found.seeds) == (pytest.approx(expected), 4)
        assert back.value == pytest.approx(1 - expected)
        assert found.low is not None
        assert found.high is not None
        assert 0 <= found.low < found.value < found.high <= 1


def test_draws_of_an_improvement_are_of_whole_agents_in_a_sequence() -> None:
    """Agents that are good on one task and bad on the other, either way: in CRL each draw of ours is worth a half."""
    ours, theirs = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.5, 0.5], [0.5, 0.5]])
    assert statistics.improvement(ours, theirs, "crl") == statistics.Estimate(0.5, 0.5, 0.5, 2)
    apart = statistics.improvement(ours, theirs, "rl")
    assert apart is not None
    assert (apart.value, apart.low, apart.high) == (0.5, 0.0, 1.0)
    alone = statistics.improvement(ours[:1], theirs, "crl")
    assert alone == statistics.Estimate(0.5, None, None, 1)
    assert statistics.improvement(np.full((2, 1), np.nan), theirs[:, :1], "crl") is None


def test_performance_profile_by_hand() -> None:
    thresholds = np.array([0.0, 0.3, 0.5, 0.9])
    found = statistics.profile(SCORES, thresholds, "crl")
    assert found is not None
    share, low, high = found
    assert share.tolist() == [1.0, 0.5, 0.25, 0.0]  # of 0.1, 0.9, 0.3 and 0.5, those above; a score is not above itself
    assert low.tolist() == [1.0, 0.5, 0.0, 0.0]  # whole seeds are drawn: (0.1, 0.9) twice, or (0.3, 0.5) twice
    assert high.tolist() == [1.0, 0.5, 0.5, 0.0]
    one = statistics.profile(SCORES[:1], thresholds, "crl")
    assert one is not None
    assert one.tolist() == [[1.0, 0.5, 0.5, 0.0]] * 3
    assert statistics.profile(np.zeros((0, 2)), thresholds, "crl") is None


def test_stratified_interval_is_that_of_a_loop() -> None:
    """SciPy's multi-sample bootstrap against drawing the seeds of each task one by one."""
    scores, rng = np.random.default_rng(0).random((8, 3)), np.random.default_rng(5)
    draws = [np.mean([rng.choice(scores[:, task], 8).mean() for task in range(3)]) for _ in range(4000)]
    found = statistics.estimate(scores, "rl")
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.015)


def test_returns_have_no_forward_transfer() -> None:
    lines = evals().with_columns(mean_return=-1000 * pl.col("success_final"))
    (row,) = statistics.headline(lines, {"s": TASKS}, "mean_return")
    assert row["crl"].value == pytest.approx(-550)
    assert row["forward_transfer"] is None


def test_area_under_curve_by_hand() -> None:
    """Held at 0.2 to step 20, trapezoid to 0.6 at 60, held to 100: (0.2·20 + 0.4·40 + 0.6·40) / 100."""
    assert statistics.area_under_curve([60, 20], [0.6, 0.2], 100) == pytest.approx(0.44)
    assert statistics.area_under_curve([50, 100], [0.5, 0.5], 100) == pytest.approx(0.5)


def test_forward_transfer_by_hand() -> None:
    """Against the mean of the RL runs, task by task: (0.7 − 0.4)/0.6 and (0.2 − 0.4)/0.6."""
    found = statistics.forward_transfer(np.array([[0.7, 0.2]]), np.array([[0.3, 0.6], [0.5, 0.2]]))
    assert found is not None
    assert astuple(found) == approximately((0.5 - 1 / 3) / 2, None, None, 1)
    assert statistics.forward_transfer(np.ones((1, 1)), np.ones((1, 1))) is None


def test_forward_transfer_is_as_uncertain_as_the_runs_that_it_is_measured_by() -> None:
    """Equal agents in sequence, of RL 0.0 and 0.9: its mean is drawn as 0.0, 0.45 or 0.9."""
    found = statistics.forward_transfer(np.array([[0.5], [0.5]]), np.array([[0.0], [0.9]]))
    assert found is not None
    assert astuple(found) == approximately(0.05 / 0.55, (0.5 - 0.9) / 0.1, 0.5, 2)


def test_a_first_task_that_is_trained_once_for_both_protocols_is_drawn_once() -> None:
    """A sweep takes it from the sequence. Each seed's own gap is 0 here, so there is nothing to be uncertain of."""
    same = np.array([[1.0, 1.0], [0.18, 1.0]])
    assert statistics.gap(same, same) == statistics.Estimate(0.0, 0.0, 0.0, 2)
    apart = statistics.gap(same, same[::-1])
    assert apart is not None
    assert (apart.low, apart.high) == (pytest.approx(-0.41), pytest.approx(0.41))
    transfer = statistics.forward_transfer(same / 2, same / 2)
    assert transfer is not None
    assert astuple(transfer) == approximately(0.0, 0.0, 0.0, 2)


def test_a_gap_of_unequal_numbers_of_seeds_has_an_interval_where_both_have_two() -> None:
    alone, agents = np.array([[0.0], [0.0], [1.0]]), np.full((2, 1), 0.5)
    for found, sign in ((statistics.gap(alone, agents), 1), (statistics.gap(agents, alone), -1)):
        assert found is not None
        assert astuple(found) == approximately(-sign / 6, -0.5, 0.5, 2)
    for one in (statistics.gap(alone, agents[:1]), statistics.gap(agents[:1], alone)):
        assert one is not None
        assert (one.low, one.high, one.seeds) == (None, None, 1)


def test_runs_that_stand_at_two_places_are_drawn_once() -> None:
    """Ten agents on A alone: a sequence A, A, A, A tells nothing new of them; on four tasks they would be forty."""
    scores = np.linspace(0, 1, 10)[:, None]
    once, again = (statistics.estimate(np.tile(scores, n), "rl", tasks="A" * n) for n in (1, 4))
    assert again is not None
    assert again == once
    four = statistics.estimate(np.tile(scores, 4), "rl", tasks="ABCD")
    assert four is not None
    assert four.low is not None
    assert again.low is not None
    assert four.low > again.low


def test_an_unfinished_run_alone_is_no_baseline() -> None:
    """RL and CRL learn the same, so nothing is transferred; that one RL run was stopped half-way changes nothing."""
    lines = []
    for protocol in ("rl", "crl"):
        for seed in (0, 1):
            curve = [(25, 0.0), (50, 0.0), (75, 0.9), (100, 0.9)][: 2 if (protocol, seed) == ("rl", 1) else 4]
            for step, score in curve:
                phase = "final" if step == 100 else "train"
                lines += [
                    row | {"seed": seed} for row in lines_of(protocol, f"{protocol}{seed}", "A", [score], phase, step)
                ]
    (row,) = statistics.headline(pl.DataFrame(lines), {"s": ("A",)})
    assert (row["rl"].seeds, row["forward_transfer"].value) == (1, pytest.approx(0.0))


def test_places_are_counted_before_scores_are_missed() -> None:
    """A, B, A, and nothing known of the first: the third task's score is not at the first's place."""
    lines = pl.DataFrame(lines_of("crl", "c", "ABA", [0.0, 0.25, 0.5])).with_columns(
        success_final=pl.when(pl.col("task_index") > 0).then("success_final")
    )
    assert statistics.final_scores(lines, tuple("ABA"))["place"].to_list() == [1, 2]


def test_headline_by_hand() -> None:
    (row,) = statistics.headline(evals(), {"s": TASKS})
    values = {name: row[name].value for name in ("rl", "crl", "gap", "retention", "forgetting", "forward_transfer")}
    assert (row["suite"], row["actor"], row["method"]) == ("s", "a", "m")
    assert values["rl"] == pytest.approx((1.0 + 0.8 + 0.8 + 0.6) / 4)
    assert values["crl"] == pytest.approx((0.9 + 0.4 + 0.7 + 0.2) / 4)
    assert values["gap"] == pytest.approx(0.8 - 0.55)
    assert values["retention"] == pytest.approx((0.3 + 0.4 + 0.1 + 0.2) / 4)
    assert values["forgetting"] == pytest.approx((0.6 + 0.0 + 0.6 + 0.0) / 4)
    # areas: half at the train evaluation, then a trapezoid to the final one; RL's are means over both seeds
    rl = [0.5 * 0.5 + 0.5 * (0.5 + 0.9) / 2, 0.5 * 0.2 + 0.5 * (0.2 + 0.7) / 2]
    crl = [[0.3 + (0.6 + 0.9) / 4, (0.0 + 0.4) / 4], [0.3 + (0.6 + 0.7) / 4, (0.0 + 0.2) / 4]]
    transfer = np.mean([[(crl[s][t] - rl[t]) / (1 - rl[t]) for t in range(2)] for s in range(2)])
    assert values["forward_transfer"] == pytest.approx(transfer)
    assert row["crl_iqm"].value == pytest.approx((0.4 + 0.7) / 2)
    assert row["crl"].seeds == row["gap"].seeds == 2


def test_unfinished_sequence_has_no_headline() -> None:
    part = evals().filter((pl.col("task") == "push") | (pl.col("protocol") == "rl"))
    (row,) = statistics.headline(part, {"s": TASKS})
    assert row["rl"] is not None
    assert row["crl"] is row["gap"] is row["retention"] is row["forgetting"] is row["forward_transfer"] is None


def test_single_task_runs_take_their_place_in_the_sequence() -> None:
    lines = [row | {"task_index": 0, "run": row["task"]} for row in rows("rl", "final", 0, (0.25, 0.75))]
    found = statistics.final_scores(pl.DataFrame(lines), TASKS)
    assert statistics.matrix(found, range(2)).tolist() == [[0.25, 0.75]]


def test_repeated_tasks_keep_their_places() -> None:
    lines = [rows("crl", "final", 0, (0.25, 0.75))[0] | {"task_index": i, "success_final": i / 4} for i in range(3)]
    found = statistics.final_scores(pl.DataFrame(lines), ("push", "push", "push"))
    assert statistics.matrix(found).tolist() == [[0.0, 0.25, 0.5]]


def lines_of(protocol: str, run: str, tasks: str, scores: list[float], phase: str = "final", step: int = 100) -> list:
    key = {"suite": "s", "actor": "a", "method": "m", "protocol": protocol, "seed": 0, "run": run, "phase": phase}
    return [
        key | {"task_index": i, "task": task, "task_step": step, "success_final": score}
        for i, (task, score) in enumerate(zip(tasks, scores, strict=True))
    ]


def test_a_task_that_comes_twice_has_both_its_places_in_every_number() -> None:
    """A, B, A: agents of RL that were trained on A alone stand at both places, in CRL each time has its own scores."""
    evals = pl.DataFrame(
        lines_of("crl", "c", "ABA", [0.2, 0.4, 0.8])
        + lines_of("crl", "c", "ABA", [0.2, 0.4, 0.4], "train", 50)
        + lines_of("crl", "c", "ABA", [0.7, 0.1, 0.8], "retention")
        + lines_of("rl", "a", "A", [0.5]) + lines_of("rl", "b", "B", [0.75])
    )  # fmt: skip
    (row,) = statistics.headline(evals, {"s": ("A", "B", "A")})
    values = {name: number.value for name, number in row.items() if isinstance(number, statistics.Estimate)}
    assert values["rl"] == pytest.approx((0.5 + 0.75 + 0.5) / 3)
    assert values["crl"] == pytest.approx((0.2 + 0.4 + 0.8) / 3)
    assert values["gap"] == pytest.approx(values["rl"] - values["crl"])
    assert values["forgetting"] == pytest.approx((-0.5 + 0.3 + 0) / 3)
    areas = [0.2, 0.4, 0.5 * 0.4 + 0.5 * 0.6]  # the last: held at 0.4 for half of the task, then up to 0.8
    transfer = [(area - rl) / (1 - rl) for area, rl in zip(areas, [0.5, 0.75, 0.5], strict=True)]
    assert values["forward_transfer"] == pytest.approx(np.mean(transfer))


def test_an_rl_run_of_the_whole_sequence_keeps_its_own_scores() -> None:
    lines = pl.DataFrame(lines_of("rl", "r", "ABA", [0.25, 0.5, 1.0]))
    assert statistics.matrix(statistics.final_scores(lines, tuple("ABA"))).tolist() == [[0.25, 0.5, 1.0]]
    apart = pl.DataFrame(lines_of("crl", "r", "BA", [0.25, 0.5]))  # of another sequence: by task
    assert statistics.matrix(statistics.final_scores(apart, tuple("ABA")), range(2)).tolist() == [[0.5, 0.25]]


def test_two_runs_of_a_seed_are_not_one() -> None:
    lines = pl.DataFrame(lines_of("crl", "one", "AB", [0.1, 0.2]) + lines_of("crl", "two", "AB", [0.3, 0.4]))
    scores = statistics.final_scores(lines, ("A", "B"))
    with pytest.raises(ValueError, match="two runs of one seed"):
        statistics.matrix(scores)
    for joined in (statistics.paired_scores, statistics.forgetting_scores):
        with pytest.raises(ValueError, match="two runs of one seed"):
            joined(scores, scores)
