"""What learns: rollouts, the networks with their optimisers, and the gradient step on a minibatch."""
