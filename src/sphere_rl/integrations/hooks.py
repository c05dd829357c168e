"""SPHERE for a PyTorch module as it is: forward hooks capture features and routing weights where they arise."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sphere_rl.integrations.captured import Captured, Select
from sphere_rl.integrations.gradient_share import Amount, amount
from sphere_rl.integrations.joint_regularizer import join
from sphere_rl.measuring import measuring
from sphere_rl.penalty import Scale
from sphere_rl.spectrum import captured_metrics
from sphere_rl.spectrum.jacobian import Observations
from sphere_rl.spectrum.kernel import untouched


def track(module: nn.Module, features: str, gates: str | None = None, select: Select | None = None) -> Tracker:
    """Watch ``module``'s features Φ from outside, and regularise them if asked: see `Tracker`.

    ``features`` and ``gates`` are patterns of ``fnmatch`` over the names of ``module.named_modules()``, such as
    ``"experts.*.act"`` and ``"router"``. What the matched modules return, leading axes (batch, time) flattened to N:

    - one module for ``features`` without ``gates``: [..., m], Φ itself (every axis but the last one counts rows);
    - one module and ``gates`` [..., E]: [..., E, H];
    - E modules, in natural order of their names (``experts.10`` after ``experts.9``): [..., H] each, on all rows.

    ``*`` passes dots, so a pattern may match a module and its parts: the outermost ones count.

    ``gates`` must match one module, whose output are the routing weights (after top-k; logits are none). For any other
    output ``select(name, output)`` returns the tensor that is meant, by differentiable operations; for a module that
    both patterns match, the pair (features, gates).

        with sp.track(model, features="experts.*.act", gates="router") as t:
            model(x)
            t.metrics(x)["r_e_A"]

    Raises ValueError for a pattern without a match (and says which names there are), several modules for ``gates``, or
    a compiled module, whose graph passes by its hooks: compile it after this.
    """
    return Tracker(module, features, gates, select)


class Tracker:
    """What `track` returns: a context whose end, like `close`, removes the hooks.

    A forward pass starts where ``module`` is called; where its parts are called from elsewhere, with the first part
    that runs again. The last pass is kept, with its graph, until the next one. Copies of the module are not watched.
    """

    def __init__(self, module: nn.Module, features: str, gates: str | None, select: Select | None) -> None:
        if not isinstance(module, nn.Module):
            raise ValueError(f"module: got {type(module).__name__}, allowed: a torch.nn.Module")
        _refuse_compiled(module)
        self._module, self._select = module, select
        self._features = _matches(module, "features", features)
        self._gates = None if gates is None else _only("gates", gates, _matches(module, "gates", gates))
        self._amount: Amount | None = None
        self._running = False
        self._last = self._fresh()
        parts = dict(module.named_modules())
        names = dict.fromkeys((*self._features, *(() if self._gates is None else (self._gates,))))
        self._handles = [parts[name].register_forward_hook(_Of(parts[name], self._capture(name))) for name in names]
        self._handles.append(module.register_forward_pre_hook(_Of(module, self._start), prepend=True))
        self._handles.append(module.register_forward_hook(_Of(module, self._end)))
        self._handles.append(module.register_forward_hook(_Of(module, self._stop, ends=True), always_call=True))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks; the last pass stays readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def phi(self) -> Float[Tensor, "N m"]:
        """Φ of the last forward pass, its graph included: `sphere_rl.weighted_features`, or the dense features.

        Raises ValueError before any pass, and where what was captured is not as `track` wants it: modules that did not
        run or ran twice, shapes that do not fit, no rows, integers, an output changed in place since.
        """
        return self._last.phi()

    def regularize(self, rho: float | None = None, scale: Scale = "free", *, strength: float | None = None) -> None:
        """From the next forward pass on, add the penalty's gradient to that of the captured outputs.

        Let o be all captured output tensors as one vector (all experts' and the router's), y what ``module``
        returns, L = sphere_penalty(Φ(o), scale) with one joint Gram, and g = (∂y/∂o)ᵀ ∂loss/∂y. In each backward
        pass through y the gradient of o becomes, as by `sphere_rl.regularize`, one of

            g + rho · ‖g‖ / ‖∇_o L‖ · ∇_o L        rho: 0.1 by default
            g + strength · ∇_o L

        How: no expert's gradient may go on before the norm over all of them is known, and no hook on one of them
        can wait for the others. So an operation behind y takes y and o. Its backward pass first finds g by a pass of
        its own from y down to o, then hands on ∂loss/∂y unchanged and the rest to each part of o, where autograd
        adds the two. That costs a second backward pass through what lies between o and y. Where one captured module
        feeds another, g counts both paths, and what ∇_o L adds to the later one reaches the earlier one, too.

        So y must be tensors in tuples, lists or dicts, and the loss must depend on o through y alone; parts that
        are called without ``module`` are not regularised. ``rho=0`` switches it off. Gradient accumulation, autocast,
        DistributedDataParallel, checkpoints (not reentrant ones inside of ``module``) and torch.compile(module) after
        `track` work; second derivatives and torch.func are refused with one line. Raises ValueError as
        `sphere_rl.regularize` does.
        """
        if not self._handles:
            raise ValueError("regularize: the hooks are removed, allowed: before the end of `with` or close()")
        self._amount = amount(rho, strength, scale)

    def metrics(self, observations: Observations) -> dict[str, float | list[float]]:
        """Every metric of `sphere_rl.spectrum.SPECTRAL_METRICS` that applies to ``module(observations)``.

        The spectrum of Φ, the state of its units, with ``gates`` the health of the routing (gate_entropy where the
        weights are ≥ 0 and each row has some), and r_e_K by `sphere_rl.entk` where module(observations) is [N, A] and
        something is trainable: a kernel of N·A rows. A forward pass of its own in the module's present mode; module,
        last pass and random state stay as they are.
        """
        if not self._handles:
            raise ValueError("metrics: the hooks are removed, allowed: before the end of `with` or close()")
        last, running = self._last, self._running
        try:
            with untouched(self._module), torch.no_grad():
                output = self._module(observations)
                features, gates = self._last.detached()
            return captured_metrics(self._module, observations, output, features, gates)
        finally:
            self._last, self._running = last, running

    def _fresh(self) -> Captured:
        return Captured(self._features, self._gates, self._select)

    def _capture(self, name: str) -> Callable[[Any, Any], None]:
        def hook(inputs: Any, output: Any) -> None:
            if measuring():
                return
            _refuse_tracing()
            if not self._running:
                if torch._C._current_graph_task_id() != -1:  # a checkpoint runs a part again for its backward pass
                    return
                if name in self._last.outputs:
                    self._last = self._fresh()
            self._last.add(name, output)  # type: ignore[reportAttributeAccessIssue]

        return hook

    def _start(self, inputs: Any) -> None:
        if not measuring():
            self._last, self._running = self._fresh(), True

    def _stop(self, inputs: Any, output: Any) -> None:
        self._running = False  # when the pass has raised an error, too

    def _end(self, inputs: Any, output: Any) -> Any:
        if measuring() or self._amount is None or self._amount.rho == 0 or not torch.is_grad_enabled():
            return None
        leaves, form = tree_flatten(output)
        odd = next((leaf for leaf in leaves if not isinstance(leaf, Tensor | int | float | str | type(None))), None)
        if odd is not None:
            kind = type(odd).__name__
            raise ValueError(f"module: its output holds {kind}, allowed: tensors in tuples, lists and dicts")
        return tree_unflatten(join(self._amount, leaves, self._last), form)


class _Of:
    """``hook`` for ``module`` alone: copies of it, pickled ones too, take along one of no module, which does nothing.

    ``ends``: it runs where others have raised an error, and raises none itself.
    """

    def __init__(self, module: nn.Module | None, hook: Callable[..., Any] | None, ends: bool = False) -> None:
        self._own, self._hook, self._ends = module, hook, ends

    def __call__(self, called: nn.Module, *given: Any) -> Any:
        if getattr(called, "_is_replica", False) and not self._ends:
            raise ValueError("module: runs as a replica of DataParallel, allowed: DistributedDataParallel")
        return self._hook(*given) if self._hook is not None and called is self._own else None

    def __reduce__(self) -> tuple[type[_Of], tuple[None, None, bool]]:
        return _Of, (None, None, True)


def _refuse_tracing() -> None:
    if torch.compiler.is_compiling():
        raise ValueError("module: is being compiled, allowed: a module that is not, since compiling skips hooks")


def _refuse_compiled(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None:
            where = f"'{name}' in it" if name else "it"
            raise ValueError(f"module: {where} is compiled, past hooks, allowed: the module before torch.compile")


def _matches(module: nn.Module, field: str, pattern: str) -> Sequence[str]:
    if not isinstance(pattern, str):
        raise ValueError(f"{field}: got {pattern!r}, allowed: one pattern of names, as in 'experts.*.act'")
    names = [name for name, _ in module.named_modules()]
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        there = ", ".join(name for name in names if name) or "none but the module itself, ''"
        raise ValueError(f"{field}: got {pattern!r}, which matches no module, allowed: {there}")
    whole = [name for name in found if not any(_inside(name, other) for other in found)]
    return tuple(sorted(whole, key=_natural))


def _inside(name: str, other: str) -> bool:
    return name != other and (not other or name.startswith(f"{other}."))


def _only(field: str, pattern: str, names: Sequence[str]) -> str:
    if len(names) > 1:
        raise ValueError(f"{field}: got {pattern!r}, which matches {', '.join(names)}, allowed: one module")
    return names[0]


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers in it by their size."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
