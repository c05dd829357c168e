"""What learns: networks with their optimisers (`actor_critic`), what they learn from (`rollout`, `minibatch`) and by
(`losses`), and a gradient step without autograd: `fused` prepares a network for it, `policy_step` and `value_step` take
it.
"""
