"""Methods, suites and actors from outside the package: what is refused, and entry points of an installed package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sphere_rl import cli, plugins
from sphere_rl.errors import ConfigError
from sphere_rl.experts import Kind, weighted_routing
from sphere_rl.experts.network import KINDS, make_actor
from sphere_rl.sweep.plan import Grid, plan

METHOD = """
from sphere_rl.methods import Method

class Mine(Method):
    name = "{name}"
    summary = "does nothing"
    citation = "Nobody 2026"
"""
PLAIN = METHOD.format(name="a")
OPTION = """
    from dataclasses import dataclass as _dataclass
    from sphere_rl.methods import MethodConfig as _MethodConfig

    @_dataclass(frozen=True)
    class Config(_MethodConfig):
        rate: float = 0.5
"""
TWO = """
from sphere_rl.methods import Method

class One(Method): summary, citation = "one", "Nobody 2026"
class Two(Method): summary, citation = "two", "Nobody 2026"
"""
ACTOR = """
from sphere_rl.experts import Kind, TopK
ACTORS = {'dense': Kind("another", lambda options, training: TopK(2))}
"""
SUITE = """
class Own:
    name, summary, tasks, all_tasks, same_spaces, preset = "{name}", "another", (), (), True, {{}}
    def make(self, task, num_envs, seed, num_threads): ...
    def render_env(self, task, seed): ...

SUITES = ({made},)
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a module into the working directory; what is loaded in a test is forgotten after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_modules", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: list[str] = []

    def one(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        names.append(name)
        return name

    yield one
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (None, "--plugin nowhere", "plugin: 'nowhere' is not allowed; expected a module that can be imported"),
        ("import nothing_like_it", "--plugin broken", "plugin: 'broken' is not allowed; expected a module that can"),
        ("1 / 0", "--plugin broken", "(ZeroDivisionError: division by zero)"),
        ("import sys; sys.exit()", "--plugin broken", "a module that can be imported, from "),
        ("import sys; sys.exit(0)", "--tasks broken:Mine-v0", "a module that can be imported before the colon (Sys"),
        (METHOD.format(name="sphere"), "--plugin broken", "method: 'sphere' is not allowed; expected another name"),
        (METHOD.format(name="clip"), "--plugin broken", "method: 'clip' is not allowed; expected another name: a conf"),
        (METHOD.format(name="replaced"), "--plugin broken", "'replaced' is not allowed; expected another name: a conf"),
        (METHOD.format(name="my-own"), "--plugin broken", "method: 'my-own' is not allowed; expected a name of letter"),
        (METHOD.format(name="my.own"), "--plugin broken", "method: 'my.own' is not allowed; expected a name of letter"),
        (PLAIN.replace("summary", "says"), "--plugin broken", "expected a `summary` of its class Mine, a line"),
        (PLAIN.replace("citation", "by"), "--plugin broken", "expected a `citation` of its class Mine, a line"),
        (PLAIN + "    Config = 3", "--plugin broken", "a `Config` that is a subclass of MethodConfig, not 3"),
        (TWO, "--plugin broken", "'broken' is not allowed; expected one class without a `name`, not One and Two"),
        ("ACTORS = {'mine': 1}", "--plugin broken", "actor: 'mine' is not allowed; expected a sphere_rl.experts.Kind"),
        ("ACTORS = ('mine',)", "--plugin broken", "plugin: 'broken' is not allowed; expected ACTORS with kinds by nam"),
        (ACTOR, "--plugin broken", "actor: 'dense' is not allowed; expected another name: there is one of that name"),
        ("SUITES = 3", "--plugin broken", "suite: 'broken' is not allowed; expected SUITES that are a tuple, not int"),
        ("SUITES = (1,)", "--plugin broken", "suite: 'broken' is not allowed; expected a sphere_rl.suites.Suite"),
        (SUITE.format(name="mine", made="Own"), "--plugin broken", "not the class Own: make one of it"),
        (SUITE.format(name="cw10", made="Own()"), "--plugin broken", "suite: 'cw10' is not allowed; expected another "),
        (SUITE.format(name="mine", made="Own()") + "del Own.preset", "--plugin broken", "not Own, which has no preset"),
        ("", "--plugin ./broken.py", "plugin: './broken.py' is not allowed; expected the name of a module, not of a"),
        ("", "--plugin ./broken.py", "(did you mean broken?)"),
        ("", "--plugin own/broken.py", "(did you mean own.broken?)"),
        ("", "--plugin /own/broken", "(did you mean broken?)"),
        ("", "--plugin broken --method mine", "method: 'mine' is not allowed; expected one or more of"),
    ],
)  # fmt: skip
def test_what_is_none_is_refused_in_one_line(text, words, message, write, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        write("broken", text)
    assert cli.main(["train", "--suite", "gym", "--tasks", "CartPole-v1", *words.split(), "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("run").exists()


def test_a_method_is_called_by_its_name_and_forgotten_with_its_module(write) -> None:
    from sphere_rl.config import TrainConfig, from_dict, override, to_dict
    from sphere_rl.methods import methods

    write("several", METHOD.format(name="mine"))
    config = override(TrainConfig(), {"plugin": ["several"], "method": ["mine"]})
    assert methods()["mine"].__module__ == "several"
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert hash(from_dict(to_dict(config))) == hash(config)


def test_a_run_is_read_without_the_plugins_that_it_does_not_use(write, monkeypatch: pytest.MonkeyPatch) -> None:
    from sphere_rl.config import TrainConfig, from_dict, override, to_dict

    plugins.load([write("unused", METHOD.format(name="unused") + OPTION), write("used", METHOD.format(name="used"))])
    config = override(TrainConfig(), {"plugin": ["used"], "method": ["used"]})
    assert {"used", "sphere"} <= to_dict(config).keys()
    assert "unused" not in to_dict(config)
    assert to_dict(TrainConfig(), ["unused"])["unused"] == {"rate": 0.5}
    earlier = to_dict(config, ["unused"])  # as versions before wrote it
    monkeypatch.setattr(plugins, "_modules", {})
    assert from_dict(to_dict(config)) == config
    monkeypatch.setattr(plugins, "_modules", {})
    assert from_dict(earlier) == config
    assert "unused" not in plugins.loaded()
    with pytest.raises(ConfigError, match=r"gone: \{'rate': 1\} is not allowed; expected network, env_args or"):
        from_dict(earlier | {"method": ["used", "gone"], "gone": {"rate": 1}})
    with pytest.raises(ConfigError, match=r"or a method \(did you mean sphere\?\): "):
        override(TrainConfig(), {"sphree": {"rho": 1}})


def test_a_class_that_others_are_made_of_is_no_method(write) -> None:
    from sphere_rl.methods import methods

    base = METHOD.format(name="ignored").replace("Mine", "_Base").replace("    summary", "    words")
    own = 'class Own(_Base):\n    name, summary = "own", "does nothing"\n'
    plugins.load([write("based", base + own)])
    assert {name for name, method in methods().items() if method.__module__ == "based"} == {"own"}


def test_functions_of_a_plugin_may_import_from_its_folder(write) -> None:
    write("beside", "VALUE = 3")
    plugins.load([write("late", "def value():\n    import beside\n    return beside.VALUE\n")])
    assert vars(plugins.loaded()["late"])["value"]() == 3


def test_an_installed_package_offers_by_entry_points(write, tmp_path: Path) -> None:
    write("offering", METHOD.format(name="ignored"))
    info = tmp_path / "offering-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offering\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sphere_rl.methods]\noffered = offering:Mine\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from sphere_rl import cli; cli.main(sys.argv[1:])"
    words = ["list", "methods", "--json"]
    listed = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stdout
    assert [row["method"] for row in map(json.loads, listed.splitlines())][-1] == "offered"


def test_a_gate_of_ones_own_routes_as_its_weights_say(write) -> None:
    """Every sample to the experts of its two largest logits, weights from a closed form, gradients into the gate."""
    module = write("gates", "ACTORS = {}")
    plugins.load([module])

    class Halves:
        shared = 0

        def __call__(self, logits: torch.Tensor):
            chosen = torch.zeros_like(logits).scatter(1, logits.detach().topk(2, dim=1).indices, 0.5)
            return weighted_routing(chosen * (1 + logits - logits.detach()))

    kind = Kind("two experts, half of each", lambda options, training: Halves())
    vars(plugins.loaded()[module])["ACTORS"] = {"halves": kind}
    actor, peer = (make_actor(kind, 4, 2, width=8, depth=1, num_experts=5) for kind in ("halves", "topk_moe"))
    peer.load_state_dict(actor.state_dict())
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    trace = actor.trace(x)
    same = peer.trace(x)
    assert torch.equal(trace.gates != 0, same.gates != 0)
    every = actor.experts.every(x)
    expected = 0.5 * torch.einsum("ne,ena->na", (trace.gates != 0).float(), every)
    torch.testing.assert_close(trace.output, expected)
    torch.testing.assert_close(actor(x), expected)
    assert actor.gate is not None
    (gradient,) = torch.autograd.grad(trace.output.sum(), [actor.gate.head.bias])
    by_hand = 0.5 * ((trace.gates != 0).float() * every.sum(-1).t()).sum(0)
    torch.testing.assert_close(gradient[0], by_hand)
    assert not actor.has_kernel_forward
    assert set(KINDS) == {"dense", "wide", "topk_moe", "dense_moe", "shared_moe", "ds_moe"}


def test_too_few_experts_for_a_gate_are_refused(write) -> None:
    plugins.load([write("few", "from sphere_rl.experts import Kind, TopK\n"
                        "ACTORS = {'few': Kind('one', lambda options, training: TopK(4, shared=2))}")])  # fmt: skip
    with pytest.raises(ConfigError, match=r"num_shared: 2 is not allowed; expected 0 to 1"):
        make_actor("few", 3, 1, num_experts=5)


STRONG = """
from dataclasses import dataclass
from sphere_rl.methods import Method, MethodConfig

class Mine(Method):
    name = "strong"
    summary = "does nothing"
    citation = "Nobody 2026"

    @dataclass(frozen=True)
    class Config(MethodConfig):
        rho: float = 0.1
        \"\"\"A strength.\"\"\"
"""


def test_an_axis_of_a_plugins_method_concerns_that_method_alone(write) -> None:
    grid = Grid(
        suites=("gym",), tasks=("CartPole-v1",), methods=("none", "strong"), train=("--plugin", write("axes", STRONG)),
        options=(("strong.rho", ("0.1", "0.2")),),
    )  # fmt: skip
    found = [run.name.removeprefix("gym-crl-topk_moe-") for run in plan(grid, Path("out"))]
    assert found == ["none-seed0", "strong-rho0.1-seed0", "strong-rho0.2-seed0"]
