"""A run: the agent, PPO's update, evaluation, and what is recorded of them."""
