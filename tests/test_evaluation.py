from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_envs import LENGTH

from sphere_rl.experts.network import make_actor
from sphere_rl.learner.normalizer import ObservationNormalizer
from sphere_rl.learner.rollout import Episode
from sphere_rl.suites import make_suite
from sphere_rl.training.agent import Policy
from sphere_rl.training.evaluation import ToldSuccess, evaluate, summarize


def policy(normalizer: ObservationNormalizer | None = None, kind: str = "topk_moe") -> Policy:
    return Policy(make_actor(kind, 3, 1, width=8, depth=1, num_experts=3), normalizer)


def test_summary_by_hand() -> None:
    result = summarize([Episode(10, 1.0, True, True), Episode(20, 5.0, False, True), Episode(30, 0.0, False, False)])
    assert (result.episodes, result.mean_return, result.mean_length) == (3, 2.0, 20.0)
    assert result.success_final == pytest.approx(1 / 3)
    assert result.success_once == pytest.approx(2 / 3)
    assert result.std_return == pytest.approx(np.sqrt((1 + 9 + 4) / 3))


def test_success_is_unknown_where_the_task_does_not_define_it() -> None:
    result = evaluate(policy(), make_suite("gym"), "Pendulum-v1", episodes=3, seed=0)
    assert result.success_final is None
    assert result.success_once is None
    assert (result.episodes, result.mean_length) == (3, 200.0)


@pytest.mark.parametrize(("at", "final"), [(3, 0.0), (LENGTH, 0.25)])
def test_success_that_is_named_only_when_it_is_there_is_a_share_of_all_episodes(at: int, final: float) -> None:
    """One episode of four succeeds, in step ``at``, and says so then: no other step of any episode names success."""
    actor = Policy(make_actor("dense", 3, 2, width=8, depth=1), None)
    for episodes in (4, 40):
        found = evaluate(actor, make_suite("gym"), "Boasting-v0", episodes, seed=1, arguments={"at": at})
        assert (found.episodes, found.success_final, found.success_once) == (episodes, final, 0.25)


def test_a_task_that_has_told_success_once_has_none_where_nothing_is_told() -> None:
    told = ToldSuccess([{"task": "b", "success_final": 0.0}])
    unknown = {"success_final": None, "success_once": None}
    assert told.complete({"task": "a"} | unknown) == {"task": "a"} | unknown
    assert told.complete({"task": "a"}) == {"task": "a"}  # of an iteration without an episode's end
    told.complete({"task": "a", "success_final": 0.5, "success_once": 0.5})
    for task in "ab":
        assert told.complete({"task": task} | unknown)["success_once"] == 0.0
    assert told.complete({"task": "c"} | unknown)["success_final"] is None


def test_evaluation_normalises_before_it_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As training does: seconds since 1970, ten apart, are one number in float32."""
    seen: list[torch.Tensor] = []
    policy_ = Policy(make_actor("dense", 3, 2, width=8, depth=1), ObservationNormalizer(3, 10.0))
    monkeypatch.setattr(policy_, "normalize", lambda observation: seen.append(observation) or observation.float())
    evaluate(policy_, make_suite("gym"), "Broken-v0", 1, seed=0, arguments={"what": "reward", "at": 99, "value": 0.0})
    assert {one.dtype for one in seen} == {torch.float64}


def test_evaluation_is_deterministic_and_leaves_the_policy_as_it_was() -> None:
    p = policy(kind="ds_moe").train()
    state = {key: value.clone() for key, value in p.state_dict().items()}
    rng = torch.get_rng_state()
    first, second = (evaluate(p, make_suite("gym"), "Pendulum-v1", 4, seed=3) for _ in range(2))
    assert first == second != evaluate(p, make_suite("gym"), "Pendulum-v1", 4, seed=4)
    assert p.training
    assert all(torch.equal(value, state[key]) for key, value in p.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())


def test_evaluation_equals_episodes_run_one_by_one() -> None:
    """CartPole's episodes differ in length: the quota of each environment must be its own first episodes."""
    import gymnasium

    p = Policy(make_actor("dense", 4, 2, width=8, depth=1, discrete=True), None)
    result = evaluate(p, make_suite("gym"), "CartPole-v1", episodes=12, seed=9)  # ten environments, two of them twice
    seeds = np.random.SeedSequence(9).generate_state(10).tolist()
    lengths = []
    for i, seed in enumerate(seeds):
        env = gymnasium.make("CartPole-v1")
        observation, _ = env.reset(seed=seed)
        for _ in range(2 if i < 2 else 1):
            length, done = 0, False
            while not done:
                action = int(p(torch.as_tensor(observation)[None]).argmax())
                observation, _, terminated, truncated, _ = env.step(action)
                length, done = length + 1, terminated or truncated
            lengths.append(length)
            observation, _ = env.reset()
    assert result.mean_length == pytest.approx(np.mean(lengths))
    assert result.episodes == 12


def test_policy_normalizes_as_the_agent_does() -> None:
    normalizer = ObservationNormalizer(3, clip=1.5)
    normalizer.update(np.random.default_rng(0).normal(2.0, 3.0, (50, 3)))
    p, raw = policy(normalizer), np.random.default_rng(1).normal(2.0, 9.0, (20, 3)).astype(np.float32)
    seen = torch.as_tensor(normalizer(raw), dtype=torch.float32)
    assert seen.abs().max() == 1.5
    torch.testing.assert_close(p(torch.as_tensor(raw)), p.actor(seen))
    normalizer.update(np.ones((50, 3)))  # later statistics do not reach a policy that was taken before
    torch.testing.assert_close(p.normalize(torch.as_tensor(raw)), seen)


def test_metaworld_success_is_the_flag_of_the_episode() -> None:
    result = evaluate(
        Policy(make_actor("dense", 39, 4, width=8, depth=1), None), make_suite("cw10"), "drawer-close", 2, seed=0
    )
    assert result.success_final is not None
    assert result.success_once is not None
    assert result.success_final <= result.success_once
    assert result.mean_length == 500
