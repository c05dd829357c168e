"""A minibatch in plain PyTorch: a dense autograd pass through all experts, torch's default Adam."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from sphere_rl import sphere_penalty
from sphere_rl.experts.network import MoENetwork
from sphere_rl.learner.minibatch import Minibatch

RHO = 0.1


def mlp(sizes: list[int]) -> nn.Sequential:
    hidden = [m for a, b in pairwise(sizes[:-1]) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-2], sizes[-1]))


class DenseExperts(nn.Module):
    """The usual mixture of experts: batched products over all of them, multiplied by gates that are mostly zero."""

    def __init__(self, actor: MoENetwork) -> None:
        super().__init__()
        assert actor.gate is not None
        self.top_k = actor.options.top_k
        self.gate = mlp(
            [layer.weight.shape[2] for layer in actor.gate.layers] + [actor.gate.layers[-1].weight.shape[1]]
        )
        for own, copied in zip(self.gate.parameters(), actor.gate.parameters(), strict=True):
            own.data.copy_(copied.squeeze(0))
        self.experts = nn.ParameterList([p.detach().clone() for p in actor.experts.parameters()])
        self.log_std = nn.Parameter(torch.zeros(self.experts[-1].shape[1]))

    def forward(self, observation: Tensor) -> Tensor:
        """Mean actions [N, A]."""
        gates, h, (weight, bias) = self._mixed(observation)
        return torch.einsum("ne,ena->na", gates, torch.baddbmm(bias[:, None], h, weight.mT))

    def features(self, observation: Tensor) -> Tensor:
        """Gate-weighted features of the last layer [N, E·H]."""
        gates, h, _ = self._mixed(observation)
        return torch.einsum("ne,enh->neh", gates, h).flatten(1)

    def _mixed(self, observation: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Gates [N, E], last features [E, N, H], and the last layer's weights and biases."""
        logits = self.gate(observation)
        top = logits.topk(self.top_k, dim=1)
        gates = torch.zeros_like(logits).scatter(1, top.indices, top.values.softmax(1))
        h = observation.expand(gates.shape[1], *observation.shape)
        *hidden, last = zip(self.experts[::2], self.experts[1::2], strict=True)
        for w, b in hidden:
            h = torch.baddbmm(b[:, None], h, w.mT).relu()
        return gates, h, last


class Reference:
    """Actor and critic with their optimisers."""

    def __init__(self, actor: MoENetwork) -> None:
        self.actor = DenseExperts(actor)
        sizes = [layer.weight.shape[2] for layer in actor.experts.layers]
        self.critic = mlp([*sizes, 1])
        self.optimizers = [torch.optim.Adam(m.parameters(), lr=3e-4, eps=1e-5) for m in (self.actor, self.critic)]

    def minibatch(self, batch: Minibatch, sphere: bool = False) -> None:
        """One step of both; with ``sphere`` in mode grad as the authors' public code goes about it.

        That is four forward and two backward passes: loss, penalty, and one each for what is logged.
        """
        self._descend(self.actor, self.optimizers[0], self._gradients(batch, sphere))
        loss = 0.5 * (self.critic(batch.observation).squeeze(1) - batch.value_target).square().mean()
        self._descend(self.critic, self.optimizers[1], torch.autograd.grad(loss, list(self.critic.parameters())))

    def _gradients(self, batch: Minibatch, sphere: bool) -> list[Tensor]:
        parameters = list(self.actor.parameters())
        gradients = list(torch.autograd.grad(self._loss(batch), parameters))
        if sphere:
            penalty = sphere_penalty(self.actor.features(batch.observation))
            own = torch.autograd.grad(penalty, parameters, materialize_grads=True)
            norm, own_norm = nn.utils.get_total_norm(gradients), nn.utils.get_total_norm(own)
            gradients = [g + RHO * norm / (own_norm + 1e-8) * p for g, p in zip(gradients, own, strict=True)]
            with torch.no_grad():
                self._loss(batch)
                self.actor.features(batch.observation)
        return gradients

    def _loss(self, batch: Minibatch) -> Tensor:
        policy = torch.distributions.Normal(
            self.actor(batch.observation), self.actor.log_std.exp(), validate_args=False
        )
        ratio = (policy.log_prob(batch.action).sum(1) - batch.log_prob).exp()
        advantage = (batch.advantage - batch.advantage.mean()) / (batch.advantage.std() + 1e-8)
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()

    @staticmethod
    def _descend(module: nn.Module, optimizer: torch.optim.Optimizer, gradients: list[Tensor] | tuple) -> None:
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
