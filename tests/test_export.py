"""A policy taken away: every file acts as the run's policy, nothing is kept that does not, and folders may move."""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import resource
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_runs import config, train

import sphere_rl as sp
from sphere_rl.cli import main
from sphere_rl.commands import export as exporting
from sphere_rl.errors import MissingExtraError, RunFolderError
from sphere_rl.experts.tracing import unsorted_weights
from sphere_rl.kernels.routing import Gating, gate_weights
from sphere_rl.runs import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.load")
STATES = np.random.default_rng(1).normal(0, 2, (40, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    settings = config("Wide", normalize_observations=True, method=["sphere"])
    return train(settings, tmp_path_factory.mktemp("exported") / "run")


def test_weights_without_a_sort_are_those_with_it() -> None:
    """Equal logits, too: half of them are whole numbers from a few."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 6, generator=generator)
    logits[::2] = torch.randint(-1, 2, (200, 6), generator=generator).float()
    for k in (1, 2, 5, 6):
        for gating in (Gating(k, 0, 1.0), Gating(k, 2, 0.5)):
            assert torch.equal(unsorted_weights(logits, gating), gate_weights(logits, gating)[0])


def test_torchscript_acts_as_the_policy(run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run.path), "--format", "torchscript", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "policy.json", "policy.pt"]
    expected = sp.load_policy(run.path)(STATES)
    assert expected.std(0).min() > 1e-3
    module: Any = torch.jit.load(out / "policy.pt")  # type: ignore[reportPrivateImportUsage]
    np.testing.assert_allclose(module(torch.from_numpy(STATES)).detach(), expected, rtol=1e-4, atol=1e-5)
    card = (out / "README.md").read_text()
    for text in (
        "toy_envs:Wide-v0",
        "torch.jit.load",
        "topk_moe, 3 experts",
        "| final |",
        "[N, 3]",
        "normaliser is inside",
    ):
        assert text in card
    assert "onnxruntime" not in card


def test_onnx_acts_as_the_policy(run: RunFolder, tmp_path: Path) -> None:
    """In onnx's reference implementation and, where there is one, in a runtime; batches of any size."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    from onnx.reference import ReferenceEvaluator

    out, _ = exporting.export(run.path, ["onnx"], tmp_path / "out")
    expected = sp.load_policy(run.path)(STATES)
    graphs: list[Any] = [ReferenceEvaluator(str(out / "policy.onnx"))]
    if find_spec("onnxruntime"):
        from onnxruntime import InferenceSession

        graphs.append(InferenceSession(str(out / "policy.onnx")))
    for graph in graphs:
        for rows in (STATES, STATES[:1]):
            (found,) = graph.run(None, {"observation": rows})
            np.testing.assert_allclose(found, expected[: len(rows)], rtol=1e-4, atol=1e-5)
    assert "onnxruntime" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"normalize_observations": True},
        {"actor": "shared_moe", "method": ["injection"], "tasks": ["toy_envs:Wide-v0", "toy_envs:Wide-v0"]},
        {"actor": "dense", "method": ["spectral_norm", "layernorm"]},
        {"actor": "ds_moe", "method": ["crelu"], "tasks": ["toy_envs:Several-v0"]},
    ],
)  # fmt: skip
def test_safetensors_is_read_from_where_it_was_moved(changes: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    run = train(config("Wide", **changes), tmp_path / "run")
    expected = sp.load_policy(run.path)(STATES)
    assert main(["export", str(run.path), "--format", "safetensors", "torchscript"]) == 0
    (out,) = (run.path / "export").iterdir()
    shutil.move(out, tmp_path / "elsewhere")
    shutil.move(run.path, tmp_path / "moved")
    np.testing.assert_array_equal(sp.load_policy(tmp_path / "moved")(STATES), expected)
    shutil.rmtree(tmp_path / "moved")
    np.testing.assert_array_equal(sp.load_policy(tmp_path / "elsewhere")(STATES), expected)
    module: Any = torch.jit.load(tmp_path / "elsewhere" / "policy.pt")  # type: ignore[reportPrivateImportUsage]
    np.testing.assert_allclose(module(torch.from_numpy(STATES)).detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_broken_export_is_refused_in_one_line(run: RunFolder, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    out, _ = exporting.export(run.path, ["safetensors"], tmp_path / "out")
    with pytest.raises(RunFolderError, match="an exported policy has no checkpoints"):
        sp.load_policy(out, "task-00")
    description = json.loads((out / "policy.json").read_text())
    whole = (out / "policy.safetensors").read_bytes()
    for change in (
        {"spaces": description["spaces"] | {"action_dim": 7}},
        {"config": {"actor": "dense"}},
        {"spaces": {}},
        {"spaces": description["spaces"] | {"discrete": 0}},
        {"spaces": description["spaces"] | {"branches": [2.0]}},
    ):
        (out / "policy.json").write_text(json.dumps(description | change))
        with pytest.raises(RunFolderError, match=r"^[^\n]*: not an exported policy \([^\n]*\)$"):
            sp.load_policy(out)
    (out / "policy.json").write_text(json.dumps(description))
    (out / "policy.safetensors").write_bytes(whole[:-9])
    with pytest.raises(RunFolderError, match="not an exported policy"):
        sp.load_policy(out)
    (out / "policy.safetensors").unlink()
    with pytest.raises(
        RunFolderError, match=r"policy\.safetensors: is missing; sphere export RUN --format safetensors"
    ):
        sp.load_policy(out)


def test_a_file_that_acts_differently_is_not_kept(
    run: RunFolder, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def wrong(policy: Any, path: Path) -> Any:
        path.write_bytes(b"")
        return lambda states: policy(states) + 0.01

    monkeypatch.setitem(exporting.FORMATS, "torchscript", ("policy.pt", wrong))
    out = tmp_path / "a" / "b"
    assert main(["export", str(run.path), "--format", "torchscript", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(
        "sphere: format: torchscript acts differently from the run's policy, by up"
    )
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_said_in_one_line(
    run: RunFolder, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "file").touch()
    for words, message in [
        ([str(run.path), "--format", "torchscript", "--out", str(there)], f"{there}: not empty"),
        ([str(run.path), "--format", "tflite"], "argument --format: invalid choice: 'tflite'"),
        ([str(tmp_path), "--format", "onnx"], f"{tmp_path}: not a run folder"),
        ([str(run.path), "--format", "onnx", "--checkpoint", "none"], "checkpoint: 'none' is not in"),
    ]:
        assert main(["export", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"sphere: {message}")
        assert error.count("\n") == 1
    for library, format in (("onnx", "onnx"), ("onnxscript", "onnx"), ("safetensors", "safetensors")):
        with monkeypatch.context() as patch:
            if library == "onnxscript":
                patch.setitem(sys.modules, "onnx", json)  # there
            patch.setitem(sys.modules, library, None)
            assert main(["export", str(run.path), "--format", format, "--out", str(tmp_path / "out")]) == 2
            line = f"sphere: format {format}: {library} is not installed; pip install 'sphere-rl[export]'\n"
            assert capsys.readouterr().err == line
    assert not (run.path / "export").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError):
        exporting.export(run.path, ["safetensors"], tmp_path / "out")


def test_a_file_that_fails_on_another_number_of_states_is_said_in_one_line(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As the graph of a gate does that takes a fixed number of them."""

    def writes(policy: Any, path: Path) -> Any:
        def act(states: np.ndarray) -> np.ndarray:
            if len(states) == 1:
                raise RuntimeError("The following operation failed\nselected index k out of range")
            with torch.no_grad():
                return policy(torch.from_numpy(states)).numpy()

        return act

    monkeypatch.setitem(exporting.FORMATS, "torchscript", ("policy.pt", writes))
    assert main(["export", str(run.path), "--format", "torchscript", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sphere: format: torchscript cannot hold this policy (RuntimeError: The following")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_leaves_the_others_of_the_run(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both made the folder that they share, as far as they know."""

    def fails(policy: Any, path: Path) -> Any:
        (tmp_path / "a" / "done").mkdir()
        raise RunFolderError("no")

    monkeypatch.setitem(exporting.FORMATS, "torchscript", ("policy.pt", fails))
    with pytest.raises(RunFolderError):
        exporting.export(run.path, ["torchscript"], tmp_path / "a" / "b")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["done"]


@pytest.mark.parametrize("format", ["torchscript", "safetensors"])
def test_an_export_that_finds_no_room_is_named_and_leaves_nothing(
    run: RunFolder, format: str, tmp_path: Path, capsys: Any
) -> None:
    if format == "safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))  # room for policy.json
    try:
        assert main(["export", str(run.path), "--format", format, "--out", str(tmp_path / "a" / "b")]) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert said.startswith(f"sphere: {tmp_path / 'a' / 'b'}: cannot be written (")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_card_of_a_policy_shows_no_other_agents_scores(tmp_path: Path) -> None:
    """In protocol rl; the agent of a sequence has been evaluated on the tasks before, too."""
    tasks = ["toy_envs:Drawing-v0", "toy_envs:Boasting-v0"]
    for protocol, shown in (("rl", False), ("crl", True)):
        folder = train(config("x", tasks=tasks, protocol=protocol), tmp_path / protocol)
        out, _ = exporting.export(folder.path, ["torchscript"], tmp_path / f"{protocol}-out", name="step-000000000096")
        assert ("| toy_envs:Drawing-v0 | final |" in (out / "README.md").read_text()) == shown
