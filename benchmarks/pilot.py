"""Tables of the pilot, and the default that its rule chooses; see benchmarks/pilot.toml.

    python benchmarks/pilot.py docs/results/pilot

An arm qualifies if `feature_rank` is above 0 in every measurement on the policy's own states, and its return in the
evaluation at the end of the first task, averaged over seeds, is not below the lowest seed of `none`. Of those the
default is the one with the highest r_e(K), averaged over the measurements of the second and third task on the policy's
own states and over seeds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import polars as pl
from measure import markdown

from sphere_rl.results import Results, load_results

FORMS = ("literal", "free")


@dataclass(frozen=True)
class Arm:
    """What the rule reads of an arm: lowest rank ever, and of each seed the first task's return and later r_e(K)."""

    name: str
    lowest_rank: int
    returns: list[float]
    ranks: list[float]
    success: list[float]

    @property
    def mean_return(self) -> float:
        return sum(self.returns) / len(self.returns)

    @property
    def mean_rank(self) -> float:
        return sum(self.ranks) / len(self.ranks)


def arms(results: Results) -> list[Arm]:
    """All arms whose runs are finished, as they were planned."""
    done = results.runs.filter((pl.col("state") == "finished").all().over("method"))
    found = []
    for name in dict.fromkeys(done["method"]):
        of = done.filter(pl.col("method") == name)["run"].to_list()
        own = results.spectra.filter(pl.col("run").is_in(of) & (pl.col("batch") == "rollout"))
        final = results.evals.filter(pl.col("run").is_in(of) & (pl.col("phase") == "final"))
        first = final.filter(pl.col("task_index") == 0).sort("seed")
        later = own.filter(pl.col("task_index") > 0).group_by("seed").agg(pl.col("r_e_K").mean()).sort("seed")
        success = final.group_by("seed").agg(pl.col("success_final").mean()).sort("seed")
        found.append(
            Arm(
                name.split(" ")[0],
                int(own["feature_rank"].min()),  # type: ignore[arg-type]
                first["mean_return"].to_list(),
                later["r_e_K"].to_list(),
                success["success_final"].to_list(),
            )
        )
    return found


def qualified(found: list[Arm]) -> list[Arm]:
    """Arms of SPHERE that the rule admits."""
    floor = min(next(arm for arm in found if arm.name == "none").returns)
    return [a for a in found if a.name.startswith(FORMS) and a.lowest_rank > 0 and a.mean_return >= floor]


def main() -> None:
    results = load_results(sys.argv[1])
    found = arms(results)
    several = lambda values, digits: " / ".join(f"{value:.{digits}f}" for value in values)  # noqa: E731
    rows = [
        (a.name, str(a.lowest_rank), several(a.returns, 0), several(a.ranks, 1), several(a.success, 2)) for a in found
    ]
    head = ("arm", "lowest feature_rank", "return, 1st task", "r_e(K), 2nd and 3rd", "success at the tasks' ends")
    print(markdown(head, rows), f"\n{len(results.runs)} runs, seeds separated by /.", sep="\n")
    admitted = sorted(qualified(found), key=lambda arm: arm.mean_rank, reverse=True)
    print("\nQualified, best first: " + (", ".join(arm.name for arm in admitted) or "none"))


if __name__ == "__main__":
    main()
