"""The structured eNTK against per-sample Jacobians of torch.func and one matrix product: time, memory, agreement.

    python benchmarks/entk.py

Actor topk_moe (10 experts, 256×3, top-2), 256 states, 4 outputs. The peer is what one writes with
torch.func: the same network with all experts in batched tensors (data-dependent routing cannot be vmapped),
`vmap(jacrev)` over the states, a Jacobian [1024, P] in float32, and K = J Jᵀ. Each side runs in a process of its own,
whose peak resident memory is read; one thread each and processor time, so that a busy machine does not bend the ratio.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from sphere_rl.experts.network import Actor, make_actor
from sphere_rl.spectrum.kernel import entk

SAMPLES, OBSERVATION, ACTIONS, REPEATS, THREADS = 256, 39, 4, 7, 1


def case() -> tuple[Actor, Tensor]:
    observations = torch.randn(SAMPLES, OBSERVATION, generator=torch.Generator().manual_seed(0))
    return make_actor("topk_moe", OBSERVATION, ACTIONS), observations


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mixture(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """The actor's mean [A] for one state, every expert computed."""

    def layers(part: str) -> list[tuple[Tensor, Tensor]]:
        names = [name for name in parameters if name.startswith(part) and name.endswith("weight")]
        return [(parameters[name], parameters[name.replace("weight", "bias")]) for name in names]

    def mlp(part: str) -> Tensor:
        *hidden, (head, head_bias) = layers(part)
        h = x.expand(len(head), -1)
        for weight, bias in hidden:
            h = (torch.einsum("eoi,ei->eo", weight, h) + bias).relu()
        return torch.einsum("eoi,ei->eo", head, h) + head_bias

    logits = mlp("gate.")[0]
    best, index = logits.topk(2)
    gates = torch.zeros_like(logits).scatter(0, index, best.softmax(0))
    return gates @ mlp("experts.")


def peer(actor: Actor, observations: Tensor) -> Tensor:
    parameters = {name: p.detach() for name, p in actor.named_parameters() if "log_std" not in name}
    size = sum(p.numel() for p in parameters.values())
    jacobian = torch.empty(SAMPLES, ACTIONS, size)
    per_sample = torch.func.vmap(torch.func.jacrev(mixture), (None, 0))
    for start in range(0, SAMPLES, 8):  # chunks: the Jacobian is held once, not twice
        parts = per_sample(parameters, observations[start : start + 8])
        torch.cat([part.flatten(2) for part in parts.values()], dim=2, out=jacobian[start : start + 8])
    flat = jacobian.view(SAMPLES * ACTIONS, size)
    return flat @ flat.T


def worker(side: str, file: str) -> None:
    """Time one side in this process and save its kernel."""
    torch.set_num_threads(THREADS)
    actor, observations = case()
    run, repeats = (entk, REPEATS) if side == "ours" else (peer, 1)
    seconds, kernels = [], []
    before = peak_bytes()
    for _ in range(repeats):
        start = time.process_time()
        kernels = [run(actor, observations)]
        seconds.append(time.process_time() - start)
    torch.save(kernels[0], file)
    seconds = statistics.median(seconds[1:] or seconds)  # the first call of ours warms up
    print(json.dumps({"seconds": seconds, "peak": peak_bytes(), "imports": before}))


def run(side: str, file: Path) -> dict[str, float]:
    out = subprocess.run([sys.executable, __file__, side, str(file)], check=True, capture_output=True, text=True)
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = {side: Path(folder, side) for side in ("ours", "peer")}
        first, peer_run, second = (run(side, files[side]) for side in ("ours", "peer", "ours"))
        kernels = {side: torch.load(file, weights_only=True).double() for side, file in files.items()}
    seconds = statistics.mean((first["seconds"], second["seconds"]))
    peak = max(first["peak"], second["peak"])
    difference = (kernels["ours"] - kernels["peer"]).norm() / kernels["peer"].norm()
    print(f"topk_moe, 10 experts, 256x3, top-2, N = {SAMPLES}, A = {ACTIONS}, float32, {THREADS} thread")
    print(f"structured  {seconds:8.3f} s   peak {peak / 2**20:7.0f} MiB ({first['imports'] / 2**20:.0f} before)")
    print(f"torch.func  {peer_run['seconds']:8.3f} s   peak {peer_run['peak'] / 2**20:7.0f} MiB")
    print(f"time ratio    {peer_run['seconds'] / seconds:6.0f}x faster (wanted: at least 50)")
    print(f"memory ratio  {peak / peer_run['peak']:6.3f} of the peer's peak (wanted: at most 0.1)")
    print(f"kernels differ by {difference:.1e} (relative, Frobenius)")


if __name__ == "__main__":
    worker(*sys.argv[1:3]) if len(sys.argv) == 3 else main()
