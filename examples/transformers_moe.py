"""SPHERE in the mixture-of-experts blocks of Hugging Face transformers, models and trainers as they are.

    python examples/transformers_moe.py --steps 60    # needs transformers; tiny models with random weights, no download

transformers keeps the experts of a block in one module with three-dimensional weights (Mixtral, Qwen-MoE and others),
whose hidden features nobody sees from outside. So that module gets a forward pass that shows them to `sp.regularize`:
the same parameters, the same output, any loss. It computes all experts for every token, what memory must have room for.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import sphere_rl as sp

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 32,
}  # fmt: skip


def tiny(kind: str, seed: int = 0) -> nn.Module:
    """A language model with random weights; both blocks of ``qwen2_moe`` have a shared expert besides."""
    torch.manual_seed(seed)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES))
    own = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**own, **SIZES))


def regularize_experts(model: nn.Module, **options: Any) -> list[nn.Module]:
    """Give all expert modules that forward pass; ``options`` of `sp.regularize`. Returns these modules."""
    found = [module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj")]
    for module in found:
        module.forward = lambda *given, module=module: forward(module, options, *given)
    return found


def forward(experts: Any, options: dict[str, Any], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Σ_e g_e W_e h_e for tokens x [N, D] with selected experts ``index`` and routing weights ``weights`` [N, k]."""
    experts_count = len(experts.gate_up_proj)
    gates = weights.new_zeros(len(x), experts_count).scatter(1, index, weights).to(x.dtype)
    gate, up = torch.einsum("nd,eid->nei", x, experts.gate_up_proj).chunk(2, dim=-1)
    features = experts.act_fn(gate) * up * (gates != 0)[:, :, None]  # an expert that is not selected has none
    experts.phi = sp.weighted_features(features, gates).detach()
    features, gates = sp.regularize(features, gates, **options)  # this line
    return torch.einsum("ne,nei,edi->nd", gates, features, experts.down_proj)


def train(kind: str, rho: float, steps: int) -> tuple[float, float]:
    """Loss and mean r_e(A) over the blocks at the end, of a model that learns to count in steps of one to five."""
    model: Any = tiny(kind)
    blocks = regularize_experts(model, rho=rho)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator, loss = torch.Generator().manual_seed(0), torch.zeros(())
    for _ in range(steps):
        start, stride = torch.randint(1, 6, (2, 16, 1), generator=generator)
        tokens = (start + stride * torch.arange(16)) % SIZES["vocab_size"]
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ranks = [sp.gram_effective_rank(block.phi) for block in blocks]
    return float(loss.detach()), sum(ranks) / len(ranks)


def main(words: Sequence[str] | None = None) -> dict[tuple[str, float], tuple[float, float]]:
    """Train tiny models of two kinds without and with SPHERE."""
    options = argparse.ArgumentParser(description=main.__doc__)
    options.add_argument("--steps", type=int, default=60, help="gradient steps of each model")
    options.add_argument("--rho", type=float, default=0.1, help="share of the gradient at features and routing weights")
    given = options.parse_args(words)
    cases = [(kind, rho) for kind in ("mixtral", "qwen2_moe") for rho in (0.0, given.rho)]
    results = {case: train(*case, given.steps) for case in cases}
    for (kind, rho), (loss, rank) in results.items():
        print(f"{kind:<10} rho {rho:<5g} loss {loss:.3f}  r_e(A) {rank:5.2f} of 128")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
