"""Which of the package's extras brings which module, and the line that says what is missing.

The core (NumPy, array-api-compat, jaxtyping, PyTorch) has the penalty, `regularize`, `track`, `make_actor` and `entk`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from sphere_rl.errors import MissingExtraError

INCLUDED = {"train": ("suites",), "report": ("train",), "play": ("train",)}
"""Extras that an extra brings with it."""
MODULES = {
    "suites": ("gymnasium", "envpool", "mujoco"),
    "train": ("filelock", "rich", "scipy", "tensorboard"),
    "report": ("jinja2", "matplotlib", "plotly", "polars"),
    "play": ("imageio_ffmpeg", "PIL", "pygame"),
    "export": ("onnx", "onnxscript", "safetensors"),
    "jax": ("jax",),
    "pandas": ("pandas",),
    "ray": ("ray",),
    "rsl-rl": ("rsl_rl",),
    "sb3": ("stable_baselines3",),
    "sklearn": ("sklearn",),
    "wandb": ("wandb",),
}
"""Modules of each extra, by the names that they are imported by."""
ON_USE = {"envpool", "mujoco", "pygame"}
"""Modules that one suite needs and the others do not: they are missed when an environment is made, or draws."""
DISTRIBUTIONS = {"imageio_ffmpeg": "imageio-ffmpeg", "PIL": "pillow", "rsl_rl": "rsl-rl-lib",
                 "sklearn": "scikit-learn", "stable_baselines3": "stable-baselines3"}  # fmt: skip
"""What a module is installed as, where that is another name."""


def require(extra: str, asker: str = "") -> None:
    """Raise `MissingExtraError` where a module of an extra is not installed; ``asker`` begins its line."""
    for module in modules_of(extra):
        if module not in ON_USE and find_spec(module) is None:
            raise missing(module, extra, asker)


def require_module(module: str, asker: str) -> None:
    """Raise `MissingExtraError` where one module of an extra is not installed; ``asker`` begins its line."""
    if find_spec(module) is None:
        raise missing(module, next(extra for extra, modules in MODULES.items() if module in modules), asker)


def modules_of(extra: str) -> Iterator[str]:
    """The modules of an extra, and of those that it brings with it."""
    for other in INCLUDED.get(extra, ()):
        yield from modules_of(other)
    yield from MODULES[extra]


def missing(module: str, extra: str, asker: str) -> MissingExtraError:
    """The error that names a module which is not installed, and the extra that brings it."""
    name = DISTRIBUTIONS.get(module, module)
    return MissingExtraError(f"{asker}{': ' if asker else ''}{name} is not installed; pip install 'sphere-rl[{extra}]'")


def explained(error: ModuleNotFoundError, asker: str) -> MissingExtraError | None:
    """What to say of an import that failed; ``None`` where it is not of a module that an extra brings."""
    module = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in MODULES.items() if module in modules), None)
    return missing(module, extra, asker) if extra else None
