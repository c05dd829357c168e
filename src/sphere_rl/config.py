"""The configuration of a run: one frozen dataclass, a sentence under each field, checked when it is made.

Later sources win: the defaults (CW10's), the suite's preset, a TOML file, flags.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from sphere_rl import plugins
from sphere_rl.conversion import convert
from sphere_rl.errors import ConfigError, meant
from sphere_rl.experts.network import kinds
from sphere_rl.experts.options import NetworkOptions
from sphere_rl.methods import MethodConfig, check_methods, methods, own_methods
from sphere_rl.suites import Suite, check_arguments, check_task, make_suite
from sphere_rl.suites.env_args import EnvArgs, Value


class MethodOptions:
    """Options of every method, by method name (``options.sphere.rho``): those that were given, and defaults."""

    _given: dict[str, MethodConfig]

    def __init__(self, **given: MethodConfig) -> None:
        vars(self)["_given"] = {
            name: config for name, config in sorted(given.items()) if config != methods()[name].Config()
        }

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_") or method not in methods():  # looked up by pickle, copy and the like, too
            raise AttributeError(method)
        return self._given.get(method) or methods()[method].Config()

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name}: options are immutable; use override")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MethodOptions) and self._given == other._given

    def __hash__(self) -> int:
        return hash(tuple(self._given.items()))

    def __repr__(self) -> str:
        return f"MethodOptions({', '.join(f'{name}={config}' for name, config in self._given.items())})"

    def replaced(self, method: str, config: MethodConfig) -> MethodOptions:
        """With other options of one method."""
        return MethodOptions(**{**self._given, method: config})


NAMES, WATCHES, SPARES = {"role": "names"}, {"role": "watches"}, {"role": "spares"}
"""Of fields that do not say what is trained: they name a run, say how it is watched, or change no number of it."""


@dataclass(frozen=True)
class TrainConfig:
    """Continual PPO on a task sequence. Defaults are the CW10 preset."""

    suite: str = field(default="cw10", metadata=NAMES)
    """Task suite; `sphere list --suites` names them. Its preset sets the defaults of the other fields."""
    tasks: tuple[str, ...] = field(default=(), metadata=NAMES)
    """Tasks in training order; the suite's own sequence when none are named."""
    env_args: EnvArgs = field(default_factory=EnvArgs)
    """Arguments of the environments, as in g=1.6; of every task alike."""
    max_episode_steps: int = 0
    """Steps after which an episode is truncated, in suite gym; 0: the environment's own limit."""
    protocol: Literal["rl", "crl"] = field(default="crl", metadata=NAMES)
    """rl: a fresh agent for each task. crl: one agent through the sequence; schedules restart at each task."""
    actor: str = field(default="topk_moe", metadata=NAMES)
    """Actor architecture; `sphere list --actors` names them."""
    critic: str = "dense"
    """Critic architecture, of the same kinds as the actor's."""
    method: tuple[str, ...] = field(default=("none",), metadata=NAMES)
    """Mitigation methods, composed in this order; `sphere list --methods` names them."""
    plugin: tuple[str, ...] = field(default=(), metadata=WATCHES)
    """Modules with methods, suites or actors of your own, imported before anything else; see Extending."""
    label: str = field(default="", metadata=NAMES)
    """What tables and figures call the method of this run; by default its name, with settings that tell it apart."""
    seed: int = field(default=0, metadata=NAMES)
    """Seed of every random stream of the run."""
    steps_per_task: int = 1_000_000
    """Environment steps on each task, all environments together; rounded down to whole iterations."""

    num_envs: int = 8
    """Parallel environments."""
    num_steps: int = 2048
    """Steps of each environment in one rollout."""
    minibatch_size: int = 256
    """Samples in a minibatch, at least 2; divides num_envs * num_steps."""
    num_epochs: int = 10
    """Passes over each rollout."""
    learning_rate: float = 3e-4
    """Adam's step size at the start of a task."""
    learning_rate_schedule: Literal["constant", "linear", "kl"] = "linear"
    """linear: to learning_rate_end over the task. kl: adapted after every minibatch to hold kl_target."""
    learning_rate_end: float = 1e-4
    """Step size at the end of a task with the linear schedule."""
    kl_target: float = 0.03
    """kl schedule: the rate is multiplied by 1.5 where KL < half of this, divided by 1.5 where KL > twice this."""
    learning_rate_bounds: tuple[float, float] = (1e-5, 1e-2)
    """kl schedule: smallest and largest rate."""
    adam_eps: float = 1e-5
    """Adam's epsilon."""
    gamma: float = 0.99
    """Discount."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation."""
    clip: float = 0.2
    """PPO's clip range of the probability ratio."""
    target_kl: float = 0.0
    """End an update where KL is above 1.5 times this, before the actor's step; 0: never. kl_target adapts the rate."""
    value_coefficient: float = 0.5
    """Weight of the mean squared value error."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Global-norm clip, separate for actor and critic."""
    normalize_observations: bool = False
    """Normalise observations by running statistics, frozen during a rollout and carried across tasks."""
    observation_clip: float = 10.0
    """Bound on normalised observations."""
    normalize_rewards: bool = False
    """Divide the learner's rewards by the running deviation of the discounted return, and clip them at ±10."""
    network: NetworkOptions = field(default_factory=NetworkOptions)
    """Sizes and layers of actor and critic."""

    eval_every: int = field(default=100_000, metadata=WATCHES)
    """Environment steps between evaluations on the current task."""
    eval_episodes: int = 10
    """Deterministic episodes of an evaluation during a task."""
    final_eval_episodes: int = 50
    """Episodes of each final evaluation: of a task at its end, and of every task again after the last task."""
    eval_max_steps: int = field(default=10_000, metadata=WATCHES)
    """Steps after which an evaluation ends an episode that has no end of its own."""
    spectrum_every: int = field(default=0, metadata=WATCHES)
    """Environment steps between spectral measurements; 0: twenty times a task. Negative: never."""
    checkpoint_every: int = 100_000
    """Environment steps of a segment: after each, a checkpoint is written and environments start anew."""
    env_threads: int | Literal["auto"] = field(default="auto", metadata=SPARES)
    """Threads that step environments, where the suite uses threads; auto: a thread a core."""
    torch_threads: int | Literal["auto"] = field(default="auto", metadata=SPARES)
    """CPU threads for training: 2 run two lanes side by side (same results). auto: 1 or 2, whichever is faster."""
    log: Literal["tensorboard", "wandb"] = field(default="tensorboard", metadata=SPARES)
    """Where logged numbers go: TensorBoard files, or with wandb also to Weights & Biases (extra `wandb`)."""
    films: bool = field(default=False, metadata=SPARES)
    """Film the policy at the end of each task: into films/ and to the `log` destinations (extra `play`)."""
    on_nan: Literal["stop", "rollback"] = field(default="stop", metadata=WATCHES)
    """A number that is not finite stops the run; rollback: it goes back to its last checkpoint, with new seeds."""
    env_timeout: float = field(default=0.0, metadata=WATCHES)
    """Seconds that one call of the environments may take before the run stops; 0: any time."""
    device: str = field(default="cpu", metadata=WATCHES)
    """PyTorch device of networks and rollouts."""
    options: MethodOptions = field(default_factory=MethodOptions)
    """Options of the methods."""

    def __post_init__(self) -> None:
        taken = {f.name for f in fields(self)} | vars(MethodOptions).keys()
        for name in methods().keys() & taken:
            raise ConfigError("method", name, "another name: a configuration has something of that name")
        suite = make_suite(self.suite)
        for task in self.tasks:
            check_task(suite, task)
        check_arguments(suite, self.environment)
        for name in ("actor", "critic"):
            if getattr(self, name) not in kinds():
                raise ConfigError(name, getattr(self, name), f"one of {', '.join(kinds())}")
            kinds()[getattr(self, name)].check(self.network)
        check_methods(self.method)
        self._check_numbers()
        batch = self.num_envs * self.num_steps
        if self.minibatch_size == 1:
            raise ConfigError("minibatch_size", 1, "2 or more: the advantages of a minibatch are normalised")
        if batch % self.minibatch_size:
            raise ConfigError("minibatch_size", self.minibatch_size, f"a divisor of num_envs * num_steps ({batch})")
        if self.steps_per_task < batch:
            raise ConfigError("steps_per_task", self.steps_per_task, f"at least one rollout ({batch} steps)")

    def _check_numbers(self) -> None:
        for name in ("env_threads", "torch_threads"):
            if getattr(self, name) != "auto" and not 1 <= getattr(self, name) <= MOST_THREADS:
                raise ConfigError(name, getattr(self, name), f"auto, or a whole number from 1 to {MOST_THREADS:,}")
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ConfigError(f.name, value, "a whole number below 2**63")
        if self.env_timeout > LONGEST_WAIT:
            raise ConfigError("env_timeout", self.env_timeout, f"0 to {LONGEST_WAIT:g} seconds")
        for name in POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(name, getattr(self, name), "a finite number above 0")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(name, getattr(self, name), "a finite number, 0 or more")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(name, getattr(self, name), "0 to 1")
        low, high = self.learning_rate_bounds
        if not 0 < low <= high < math.inf:
            raise ConfigError("learning_rate_bounds", self.learning_rate_bounds, "two rates, 0 < low <= high")

    @property
    def environment(self) -> dict[str, Value]:
        """Keyword arguments of the suite's ``make`` and ``render_env``."""
        limit = {"max_episode_steps": self.max_episode_steps} if self.max_episode_steps else {}
        return {**self.env_args, **limit}

    @property
    def steps_per_iteration(self) -> int:
        """Environment steps of one rollout."""
        return self.num_envs * self.num_steps

    @property
    def iterations_per_task(self) -> int:
        """Whole rollouts that fit in ``steps_per_task``."""
        return self.steps_per_task // self.steps_per_iteration

    @property
    def steps_of_task(self) -> int:
        """Environment steps on a task, whole rollouts."""
        return task_steps(vars(self))

    @property
    def task_sequence(self) -> tuple[str, ...]:
        """The tasks to train, in order.

        Raises:
            ConfigError: none are named and the suite has no sequence of its own.
        """
        tasks = self.tasks or make_suite(self.suite).tasks
        if not tasks:
            raise ConfigError("tasks", "", f"at least one task: {self.suite} has no sequence of its own")
        return tasks


POSITIVE = (
    "steps_per_task num_envs num_steps minibatch_size num_epochs learning_rate kl_target adam_eps clip max_grad_norm "
    "observation_clip eval_every eval_episodes final_eval_episodes eval_max_steps checkpoint_every"
).split()
NOT_NEGATIVE = (
    "seed target_kl max_episode_steps value_coefficient entropy_coefficient learning_rate_end env_timeout"
).split()
MOST_THREADS, LONGEST_WAIT = 1024, 1e6


def task_steps(config: Mapping[str, Any]) -> int:
    """Environment steps on a task: those of the whole rollouts that fit; also of what an unknown suite recorded."""
    return config["steps_per_task"] - config["steps_per_task"] % (config["num_envs"] * config["num_steps"])


def preset(suite: Suite) -> TrainConfig:
    """The defaults of a suite."""
    return overridden(TrainConfig(suite=suite.name), suite.preset)


def load_toml(path: Path, config: TrainConfig) -> TrainConfig:
    """Apply a TOML file: keys are field names, tables ``[network]``, ``[env_args]`` and method names.

    Raises:
        ConfigError: the file is missing, is not TOML, or names a field or value that does not exist.
    """
    return overridden(config, read_toml(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # a number of thousands of digits is no TOML error
        raise ConfigError("config", str(path), f"a readable TOML file ({error})") from None


def override(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """Replace fields by name; ``"sphere.rho"`` and ``{"sphere": {"rho": ...}}`` both reach a method's option.

    Options of a method that is not in use are set and change nothing: a line on standard error says so.
    """
    changed = overridden(config, changes)
    tell_idle(idle_options(names_of(changes), changed.method), changed.method)
    return changed


def names_of(changes: Mapping[str, Any]) -> Iterator[str]:
    """Names of the options in a table, those of nested tables with a dot, as in ``sphere.rho``."""
    for name, value in changes.items():
        yield from (f"{name}.{inner}" for inner in value) if isinstance(value, Mapping) else (name,)


def idle_options(names: Iterable[str], chosen: Iterable[str]) -> list[str]:
    """Those of the names that are options of a method, and of none that is ``chosen``."""
    others = methods().keys() - {*chosen}
    return [name for name in dict.fromkeys(names) if "." in name and name.partition(".")[0] in others]


def tell_idle(names: Iterable[str], chosen: Iterable[str]) -> None:
    """Say on standard error, in a line for each method, that its options change nothing."""
    by_method: dict[str, list[str]] = {}
    for name in names:
        by_method.setdefault(name.partition(".")[0], []).append(name)
    for method, idle in by_method.items():
        print(f"sphere: {', '.join(idle)}: no effect without method {method} (method: {', '.join(chosen)})",
              file=sys.stderr)  # fmt: skip


def overridden(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """`override` without a word."""
    use_plugins(changes)
    own: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        table, _, inner = key.partition(".")
        if inner:
            nested.setdefault(table, {})[inner] = value
        elif isinstance(value, Mapping):
            nested.setdefault(table, {}).update(value)
        else:
            own[key] = value
    for table, values in nested.items():
        if table == "network":
            own["network"] = _replace(own.get("network", config.network), values, "network.")
        elif table == "env_args":
            own["env_args"] = EnvArgs({**config.env_args, **values})
        elif table in methods():
            options: MethodOptions = own.get("options", config.options)
            own["options"] = options.replaced(table, _replace(getattr(options, table), values, f"{table}."))
        else:
            guess = meant(table, [*TABLES, *methods()])
            raise ConfigError(table, dict(values), f"network, env_args or a method{guess}: {', '.join(methods())}")
    return _replace(config, own, "")


def use_plugins(changes: Mapping[str, Any]) -> None:
    """Load the plugins that a table names, so that their methods, suites and actors are known."""
    plugins.load(convert("plugin", changes.get("plugin", ()), tuple[str, ...]))


TABLES = ("network", "env_args")
"""What `to_dict` gives tables of beside the options of methods."""


def to_dict(config: TrainConfig, used: Iterable[str] = ()) -> dict[str, Any]:
    """Nested plain data, for config.json: ``override(TrainConfig(), to_dict(c)) == c``.

    Of methods it has the package's own and those in use, by ``config`` or as ``used`` says: whoever reads it needs no
    other plugins.
    """
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "options"}
    own |= {"network": dataclasses.asdict(config.network), "env_args": dict(config.env_args)}
    told = {*own_methods(), *config.method, *used}
    return own | {name: dataclasses.asdict(getattr(config.options, name)) for name in methods() if name in told}


def from_dict(data: Mapping[str, Any]) -> TrainConfig:
    """Rebuild what `to_dict` gave, of this version or an earlier one; plugins that it names are loaded."""
    use_plugins(data)
    return overridden(TrainConfig(), updated(data))


def updated(data: Mapping[str, Any]) -> dict[str, Any]:
    """What `to_dict` gave of an earlier version as today's would: fields that it did not know have their defaults.

    Tables of plugins' methods that are not in use, which earlier versions wrote, are left out.
    """
    used = data["method"] if isinstance(data.get("method"), list | tuple) else ()
    told = (*TABLES, *own_methods(), *used)
    data = {name: value for name, value in data.items() if name in told or not isinstance(value, Mapping)}
    options = {name: method.Config.updated(data[name]) for name, method in methods().items() if name in data}
    return to_dict(TrainConfig()) | data | options


def _replace(instance: Any, values: Mapping[str, Any], prefix: str) -> Any:
    hints = get_type_hints(type(instance), include_extras=False)
    known = {f.name for f in fields(instance)}
    converted = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(prefix + name, value, f"a field{meant(name, known)}: {', '.join(sorted(known))}")
        converted[name] = convert(prefix + name, value, hints[name])
    return dataclasses.replace(instance, **converted)
