"""SPHERE in rsl_rl 5 (Isaac Lab's PPO): a model with a mixture of experts, named in the runner's configuration.

    "actor": {"class_name": "sphere_rl.integrations.rsl_rl:MoEModel", "hidden_dims": [256] * 3, "num_experts": 8, …}

PPO and its runner stay as they are: the penalty is in the model's backward pass.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sphere_rl.errors import ConfigError
from sphere_rl.experts.network import MoENetwork
from sphere_rl.experts.options import NetworkOptions
from sphere_rl.experts.tracing import traced
from sphere_rl.extras import require
from sphere_rl.integrations.gradient_share import Amount
from sphere_rl.integrations.mixture import added_by, regularized_output, uniform

require("rsl-rl")
from rsl_rl.models import MLPModel  # noqa: E402


class MoEModel(MLPModel):
    """rsl_rl's model with a mixture of experts in place of its MLP, and SPHERE in its backward pass.

    Args:
        hidden_dims: hidden layers of each expert and of the gate, all of one width, with ReLU.
        num_experts: experts.
        top_k: how many of them the gate selects for a state.
        kind: one of `sphere_rl.experts.network.kinds`, those of plugins included.
        sphere_rho: the penalty's gradient as a share of the loss's, at features and routing weights
            (`sphere_rl.regularize`), 0.1 by default; 0 switches it off.
        sphere_strength: a fixed factor in its place, as if ``sphere_strength · penalty`` were part of the loss.
        sphere_scale: ``free`` or ``literal``, as in `sphere_rl.sphere_penalty`.
        args: rsl_rl's own, and ``kwargs``: ``obs_normalization``, ``distribution_cfg``.

    ``model.network`` is the mixture: `sphere_rl.integrations.mixture.plasticity` measures it.

    Raises:
        ValueError: a field that is impossible; one line.
    """

    def __init__(
        self,
        *args: Any,
        hidden_dims: Sequence[int] = (256, 256, 256),
        activation: str = "relu",
        num_experts: int = 8,
        top_k: int = 2,
        kind: str = "topk_moe",
        sphere_rho: float | int | None = None,
        sphere_strength: float | int | None = None,
        sphere_scale: str = "free",
        **kwargs: Any,
    ) -> None:
        sphere = {"sphere_rho": sphere_rho, "sphere_strength": sphere_strength, "sphere_scale": sphere_scale}
        added, (width, depth) = added_by(sphere), uniform("hidden_dims", hidden_dims)
        if activation != "relu":
            raise ConfigError("activation", activation, "relu: the experts have no other")
        super().__init__(*args, hidden_dims=[1], activation="relu", **kwargs)
        output_dim = args[3] if len(args) > 3 else kwargs["output_dim"]
        inputs = output_dim if self.distribution is None else self.distribution.input_dim
        if not isinstance(inputs, int):
            name = type(self.distribution).__name__
            raise ConfigError("distribution_cfg", name, "a distribution of one number for each action")
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        options = NetworkOptions(width, depth, num_experts, top_k)
        self.mlp: Any = Mixture(MoENetwork(kind, self._get_latent_dim(), inputs, options, generator), added)

    @property
    def network(self) -> MoENetwork:
        """Gate and experts."""
        return self.mlp.network

    def as_jit(self) -> nn.Module:
        """The model traced, with all experts computed and those that are not selected weighted by zero."""
        own: Any = super().as_jit()
        steps = nn.Sequential(own.obs_normalizer, own.mlp, own.deterministic_output)
        example = torch.zeros(2, self._get_latent_dim(), device=next(self.parameters()).device)
        return traced(steps, example)


class Mixture(nn.Module):
    """The module that rsl_rl calls for a model's outputs."""

    def __init__(self, network: MoENetwork, added: Amount) -> None:
        super().__init__()
        self.network, self.added = network, added

    def forward(self, latent: Tensor) -> Tensor:
        """[..., D] → [..., A]."""
        rows = latent.reshape(-1, latent.shape[-1])
        output = regularized_output(self.network, rows, self.added)
        return output.reshape(*latent.shape[:-1], output.shape[-1])
