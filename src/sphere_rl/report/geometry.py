"""What a run's policies at the ends of its tasks do on one probe batch: spectra of K and A, and weighted features.

K maps a direction of output gradients to the change of outputs that a gradient step makes of it. In the eigenspace of
its three largest eigenvalues it maps the unit sphere to an ellipsoid with semi-axes λ₁ ≥ λ₂ ≥ λ₃. What is drawn is its
shape: K scaled so that λ₁ + λ₂ + λ₃ = 3, as for the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from sphere_rl.runs import RunFolder
from sphere_rl.runs.checkpoint import task_checkpoints
from sphere_rl.spectrum import effective_rank
from sphere_rl.training.diagnosis import on_probe, spectra
from sphere_rl.training.policies import placed

ITERATIONS = 500
"""Of t-SNE, half of them with exaggerated attraction: a few hundred states have settled by then."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The policy at the end of one task, on the probe batch.

    kernel_eigenvalues: of the full eNTK, descending. feature_eigenvalues: of A = ΦᵀΦ/N, descending.
    features: Φ, the routing-weighted last hidden features.
    """

    task_index: int
    task: str
    kernel_eigenvalues: Float[ndarray, "n"]
    feature_eigenvalues: Float[ndarray, "k"]
    features: Float[ndarray, "N m"]

    @property
    def kernel_rank(self) -> float:
        """r_e(K)."""
        return effective_rank(self.kernel_eigenvalues)

    @property
    def semi_axes(self) -> Float[ndarray, "3"]:
        """3λ₁/Σ, 3λ₂/Σ, 3λ₃/Σ with Σ = λ₁ + λ₂ + λ₃ of K: (1, 1, 1) for a sphere; zeros where no gradient moves it."""
        leading = self.kernel_eigenvalues[:3]
        return 3 * leading / leading.sum() if leading[0] > 0 else np.zeros(3)

    @property
    def drawn_rank(self) -> float:
        """r_e of λ₁, λ₂, λ₃ alone, 1 for a needle and 3 for a sphere: it belongs to the shape, `kernel_rank` to K."""
        return effective_rank(self.kernel_eigenvalues[:3])

    @property
    def top_share(self) -> float:
        """(λ₁ + λ₂ + λ₃) / tr K."""
        total = self.kernel_eigenvalues.sum()
        return float(self.kernel_eigenvalues[:3].sum() / total) if total > 0 else 0.0


def snapshots(run_dir: Path | str) -> list[Snapshot]:
    """Return the snapshot of every task that the run has finished, in order; results are kept in memory."""
    folder = RunFolder.existing(run_dir)
    return [_snapshot(path, path.stat().st_mtime_ns) for path in task_checkpoints(folder)]


@cache
def _snapshot(path: Path, _: int) -> Snapshot:
    folder = RunFolder.existing(path.parent.parent)
    place = placed(folder, path)
    task, policy, observations = on_probe(folder, place)
    found = spectra(policy, observations)
    return Snapshot(
        task_index=place.task_index,
        task=task,
        kernel_eigenvalues=found.kernel_eigenvalues,
        feature_eigenvalues=found.feature_eigenvalues,
        features=found.features,
    )


def dominant_direction(features: Float[ndarray, "N m"], shown: int = 5) -> Int[ndarray, "N"]:
    """For each state the singular direction of Φ that its features are longest along: 0, 1, … ``shown`` − 1 (and more).

    φ_n = Σ_i (σ_i u_ni) v_i: the index of the largest |σ_i u_ni|, capped. All 0 where Φ has collapsed to a line.
    """
    return np.minimum(np.abs(coordinates(features)).argmax(axis=1), shown - 1)


def coordinates(features: Float[ndarray, "N m"]) -> Float[ndarray, "N N"]:
    """σ_i u_ni: features along their singular directions, the longest first, by the Gram matrix ΦΦᵀ.

    Distances between states are those of Φ, in N columns instead of thousands.
    """
    phi = torch.as_tensor(features, dtype=torch.float64)
    squares, u = torch.linalg.eigh(phi @ phi.T)
    return (u * squares.clamp(min=0).sqrt()).flip(1).numpy()


def embed(features: Float[ndarray, "N m"]) -> Float[ndarray, "N 2"]:
    """t-SNE of weighted features in two dimensions (van der Maaten & Hinton 2008), started from their principal axes.

    Raises ImportError without scikit-learn. Features that are all equal stay one point.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if np.ptp(features, axis=0).max() == 0:
        return np.zeros((len(features), 2))
    states = coordinates(features - features.mean(axis=0))
    start = 1e-4 * states[:, :2] / states[:, 0].std()
    perplexity = min(30.0, (len(features) - 1) / 3)
    with threadpool_limits(1):  # for a few hundred states more threads only spin
        model = TSNE(perplexity=perplexity, init=start.astype(np.float32), random_state=0, max_iter=ITERATIONS)
        return model.fit_transform(states.astype(np.float32))


@cache
def embedding(snapshot: Snapshot) -> tuple[Float[ndarray, "N 2"], Int[ndarray, "N"]]:
    """A snapshot's features embedded, and each state's dominant direction; kept in memory as the snapshot is."""
    return embed(snapshot.features), dominant_direction(snapshot.features)


POINTS = 21
"""Of an ellipsoid's grid, along each of its two angles."""


def ellipsoid(semi_axes: Float[ndarray, "3"]) -> tuple[ndarray, ndarray, ndarray]:
    """Surface of an ellipsoid, longest axis first: x, y and z on a grid."""
    # from the south pole up: so the faces' normals point outwards, towards the light
    azimuth, height = np.meshgrid(np.linspace(0, 2 * np.pi, POINTS), np.linspace(np.pi, 0, POINTS))
    sphere = np.cos(azimuth) * np.sin(height), np.sin(azimuth) * np.sin(height), np.cos(height)
    return tuple(axis * side for axis, side in zip(semi_axes, sphere, strict=True))  # type: ignore[return-value]
