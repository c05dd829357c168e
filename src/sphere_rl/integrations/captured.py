"""What forward hooks saw of one forward pass, and Φ made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from sphere_rl.kernels.precision import at_least_float32
from sphere_rl.penalty import check_array, check_routed, weighted_features

Select = Callable[[str, Any], Any]
"""The tensor meant in a module's output, by name and output; (features, gates) of a module that gives both."""


@dataclass
class Captured:
    """Outputs of one pass by the names of their modules: ``features`` in order of experts, and ``gates``.

    outputs: what each module returned, with the versions of its tensors and whether gradients were recorded.
    """

    features: Sequence[str]
    gates: str | None
    select: Select | None
    outputs: dict[str, tuple[Any, list[int], bool]] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)

    @torch.compiler.disable  # it would be compiled for each name anew
    def add(self, name: str, output: Any) -> None:
        """Note an output. What is wrong with it is said where it is used."""
        if name in self.outputs:
            self.repeated.add(name)
        self.outputs[name] = output, _versions(output), torch.is_grad_enabled()

    def tensors(self) -> list[Tensor]:
        """All captured tensors that have a gradient, each once."""
        found = {id(t): t for output, *_ in self.outputs.values() for t in _tensors(output) if t.requires_grad}
        return list(found.values())

    def in_float32(self, sources: Sequence[Tensor]) -> tuple[Captured, list[Tensor]]:
        """The same pass in float32 at least, with leaves of a graph of their own in the place of ``sources``.

        Raises ValueError where an output was changed in place.
        """
        self.check()
        leaves = {id(one): at_least_float32(one.detach()).requires_grad_() for one in sources}

        def copied(one: Any) -> Any:
            if id(one) in leaves:
                return leaves[id(one)]
            return at_least_float32(one) if isinstance(one, Tensor) else one

        made = Captured(self.features, self.gates, self.select)
        for name, (output, _, _) in self.outputs.items():
            made.add(name, tree_map(copied, output))  # type: ignore[reportAttributeAccessIssue]
        return made, list(leaves.values())

    def phi(self) -> Float[Tensor, "N m"]:
        """Φ of the pass. Raises ValueError as `sphere_rl.integrations.hooks.Tracker.phi` says."""
        features, gates = self.parts()
        return features if features.ndim == 2 else weighted_features(features, gates)

    def detached(self) -> tuple[Tensor, Tensor | None]:
        """`parts`, as values alone: features always [N, E, H], gates None where there are none."""
        features, gates = self.parts()
        given = None if self.gates is None or gates is None else gates.detach()
        return (features[:, None] if features.ndim == 2 else features).detach(), given

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Features [N, m] and no gates, or features [N, E, H] and gates [N, E], which are 1 where there are none."""
        self.check()
        gates = None if self.gates is None else self._chosen("gates", self.gates)
        if gates is not None:
            gates = _rows("gates", self.gates, gates, 1)
        every = [self._chosen("features", name) for name in self.features]
        if len(every) == 1:
            name, (one,) = self.features[0], every
            features = _rows("features", name, one, 1) if gates is None else _expert_rows(name, one, gates)
        else:
            rows = [_rows("features", name, one, 1) for name, one in zip(self.features, every, strict=True)]
            self._check_alike(rows)
            features = torch.stack(rows, dim=1)
            gates = features.new_ones(features.shape[:2]) if gates is None else gates
        check_routed(features, gates) if features.ndim == 3 else check_array("features", features, "N m")
        return features, gates

    def check(self) -> None:
        """Raise ValueError unless every module ran once and nobody has changed its output."""
        if not self.outputs:
            raise ValueError("module: has not run yet, allowed: after a forward pass with the hooks in place")
        for kind, name in (*(("features", name) for name in self.features), ("gates", self.gates)):
            if name is None:
                continue
            if name not in self.outputs or name in self.repeated:
                times = "ran more than once" if name in self.repeated else "did not run"
                raise ValueError(f"{kind}: '{name}' {times} in the last forward pass, allowed: once, on all rows")
            output, versions, _ = self.outputs[name]
            if versions != _versions(output):
                raise ValueError(
                    f"{kind}: the output of '{name}' was changed in place, allowed: outputs left as they are"
                )

    def _chosen(self, kind: str, name: str) -> Tensor:
        output = self.outputs[name][0]
        chosen = output if self.select is None else self.select(name, output)
        if name == self.gates and name in self.features and isinstance(chosen, tuple | list) and len(chosen) == 2:
            chosen = chosen[kind == "gates"]
        if not isinstance(chosen, Tensor):
            got = type(chosen).__name__
            raise ValueError(
                f"{kind}: '{name}' gave {got}, allowed: a tensor (select=lambda name, output: ... picks it)"
            )
        return chosen

    def _check_alike(self, rows: Sequence[Tensor]) -> None:
        for name, one in zip(self.features, rows, strict=True):
            if one.shape != rows[0].shape:
                got = f"{tuple(rows[0].shape)} of '{self.features[0]}' and {tuple(one.shape)} of '{name}'"
                raise ValueError(f"features: got shapes {got}, allowed: one shape [N, H] for all experts")


def _rows(kind: str, name: str | None, tensor: Tensor, trailing: int) -> Tensor:
    """Leading axes as one, ``trailing`` ones kept."""
    if tensor.ndim <= trailing:
        wanted = "[..., H]" if kind == "features" else "[..., E]"
        raise ValueError(f"{kind}: '{name}' gave shape {tuple(tensor.shape)} without rows, allowed: {wanted}, N rows")
    kept = tensor.shape[-trailing:]
    return tensor.reshape(prod(tensor.shape[:-trailing]), *kept)


def _expert_rows(name: str, tensor: Tensor, gates: Tensor) -> Tensor:
    if tensor.ndim < 3 or tensor.shape[-2] != gates.shape[1]:
        got, experts = tuple(tensor.shape), gates.shape[1]
        raise ValueError(
            f"features: '{name}' gave shape {got}, allowed: [..., {experts}, H] for {experts} routing weights"
        )
    return _rows("features", name, tensor, 2)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _versions(output: Any) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in _tensors(output)]
