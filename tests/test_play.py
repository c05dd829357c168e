"""Videos of episodes, read back frame by frame."""

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from PIL import Image

from sphere_rl.cli import main
from sphere_rl.commands.play import play, record
from sphere_rl.config import override, preset
from sphere_rl.errors import ConfigError, MissingExtraError, StorageError
from sphere_rl.protocol import start
from sphere_rl.runs import RunFolder
from sphere_rl.suites import make_suite
from sphere_rl.suites.picture import Picture
from sphere_rl.training.policies import load_policy


class Counter(gymnasium.Env):
    """Draws its step count as brightness; ends after twelve steps."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(0.0, 20.0, (1,))
    action_space = gymnasium.spaces.Box(-0.5, 0.5, (1,))
    count = 0

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        info = {"success": np.float64(self.count > 9)}
        return np.full(1, self.count, np.float32), np.asarray(action).item(), self.count == 12, False, info

    def render(self) -> Any:
        return np.full((33, 48, 3), 20 * self.count, dtype=np.uint8)


class Boasting(Counter):
    """Names success in its tenth step alone, where it is there."""

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        *found, _ = super().step(action)
        return (*found, {"success": True} if self.count == 10 else {})  # type: ignore[return-value]


def read_gif(path: Path) -> tuple[list[np.ndarray], list[int]]:
    with Image.open(path) as picture:
        frames, durations = [], []
        for index in range(getattr(picture, "n_frames", 1)):
            picture.seek(index)
            frames.append(np.asarray(picture.convert("RGB")))
            durations.append(picture.info["duration"])
    return frames, durations


def read_mp4(path: Path, height: int, width: int) -> np.ndarray:
    """All frames [N, height, width, 3], decoded by ffmpeg itself."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    command = [ffmpeg, "-loglevel", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    pixels = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    return np.frombuffer(pixels, np.uint8).reshape(-1, height, width, 3)


def test_gif_shows_every_other_step_in_real_time(tmp_path: Path) -> None:
    """50 steps a second at 25 pictures a second: steps 0, 2, 4 ... 12, 40 ms each."""
    recording = record(Counter(), lambda observation: 2.0, tmp_path / "deep" / "clip.gif", steps=100, fps=25)
    frames, durations = read_gif(recording.path)
    assert (recording.frames, recording.steps, recording.total_reward, recording.success) == (7, 12, 24.0, True)
    assert [frame.mean().round() for frame in frames] == [0, 40, 80, 120, 160, 200, 240]
    assert frames[0].shape == (32, 48, 3)
    assert set(durations) == {40}


def test_a_gif_has_no_pictures_too_short_for_browsers(tmp_path: Path) -> None:
    """Of 500 steps a second every tenth, 20 ms each, whatever is asked for."""
    fast = Counter()
    fast.metadata = fast.metadata | {"render_fps": 500}
    recording = record(fast, lambda observation: 0.0, tmp_path / "clip.gif", steps=100, fps=500)
    frames, durations = read_gif(recording.path)
    assert [frame.mean().round() for frame in frames] == [0, 200, 240]
    assert set(durations) == {20}


@pytest.mark.parametrize(("steps", "success"), [(9, None), (10, True), (12, False)])
def test_success_that_is_named_only_when_it_is_there_ends_with_the_step(
    tmp_path: Path, steps: int, success: bool | None
) -> None:
    assert record(Boasting(), lambda observation: 0.0, tmp_path / "clip.gif", steps=steps).success is success


def test_mp4(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    recording = record(Counter(), lambda observation: 0.0, tmp_path / "clip.mp4", steps=5, fps=50)
    frames = read_mp4(recording.path, height=32, width=48)
    assert (recording.frames, recording.steps, recording.success) == (6, 5, False)
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), [0, 20, 40, 60, 80, 100], atol=6)


def test_an_mp4_that_cannot_be_written_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    """ffmpeg ends before it has read a frame, or is stopped by a limit on the size of files."""
    pytest.importorskip("imageio_ffmpeg")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OSError, match="ffmpeg cannot write it") as found:
        record(Counter(), lambda observation: 0.0, tmp_path / "folder.mp4", steps=5)
    assert found.value.filename == str(tmp_path / "folder.mp4")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="ffmpeg cannot write it"):
            record(Counter(), lambda observation: 0.0, tmp_path / "large.mp4", steps=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "large.mp4").exists()


def test_a_gif_that_finds_no_room_is_named_and_not_begun(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(StorageError, match=r"film\.gif: cannot be written"):
            record(Counter(), lambda observation: 0.0, tmp_path / "film.gif", steps=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_an_environment_that_fails_to_draw_is_said_in_one_line(tmp_path: Path) -> None:
    class Blind(Counter):
        def render(self) -> Any:
            raise ValueError("no camera")

    with pytest.raises(ConfigError, match=r"Blind.*one that can be drawn \(ValueError: no camera\)"):
        record(Blind(), lambda observation: 0.0, tmp_path / "film.gif", steps=5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip.avi", {}, r"out: '.*clip.avi' is not allowed; expected a file that ends in .mp4 or .gif"),
        ("clip.gif", {"steps": 0}, "steps: 0 is not allowed; expected 1 or more"),
        ("clip.gif", {"fps": -1}, "fps: -1 is not allowed"),
    ],
)
def test_errors_of_use(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        record(Counter(), float, tmp_path / name, **options)


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Graphics libraries end the process where they fail, and can be chosen only once."""
    variables = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MUJOCO_GL")}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=variables | environment, capture_output=True, text=True, timeout=100, check=False
    )


DRAW = """
import sys, numpy as np
from sphere_rl.commands.play import record
from sphere_rl.suites import make_suite
from sphere_rl.errors import ConfigError
env = make_suite(sys.argv[1] if len(sys.argv) > 1 else SUITE).render_env(TASK, seed=0)
try:
    recording = record(env, lambda observation: np.zeros(env.action_space.shape), OUT, steps=2, fps=50)
except ConfigError as error:
    sys.exit(f"refused: {error}")
env.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "task"), [("h1", "slide"), ("cw10", "push"), ("gym", "Pendulum-v1"), ("gym", "HalfCheetah-v5")]
)
def test_every_suite_can_be_filmed(tmp_path: Path, suite: str, task: str) -> None:
    """Without a display; frames differ from one another and show more than one colour."""
    out = tmp_path / "clip.gif"
    code = DRAW.replace("SUITE", repr(suite)).replace("TASK", repr(task)).replace("OUT", repr(str(out)))
    result = in_new_process(code)
    if result.returncode and ("OpenGL" in result.stderr or "EGL" in result.stderr or "pygame" in result.stderr):
        pytest.skip(f"nothing to draw with: {result.stderr[-200:]}")
    assert result.returncode == 0, result.stderr
    frames, _ = read_gif(out)
    assert len(frames) >= 2
    assert all(frame.std() > 10 for frame in frames)
    assert (frames[0] != frames[-1]).any()


SAME = """
import sys, hashlib, numpy as np
from sphere_rl.suites.picture import Picture
from sphere_rl.suites import make_suite
for picture in (None, Picture(64, 48), Picture(64, 48, fine=True)):
    env = make_suite("cw10").render_env("push-wall", seed=3)
    if picture is not None:
        env.draw_as(picture)
    vector = make_suite("cw10").make("push-wall", 1, seed=3, num_threads=1)
    seen, expected = [env.reset()[0]], [vector.reset()[0][0]]
    for action in np.random.default_rng(0).uniform(-1, 1, (30, 4)).astype(np.float32):
        seen.append(env.step(action)[0])
        expected.append(vector.step(action[None])[0][0])
    assert np.array_equal(seen, expected)
    print(env.spec.max_episode_steps, *env.render().shape, env.render().astype(int).sum())
    env.close()
"""


@pytest.mark.slow
def test_metaworld_plays_the_same_however_it_is_drawn() -> None:
    """Bit for bit the training environment's episode; without shadows the picture is brighter."""
    result = in_new_process(SAME)
    if result.returncode and "EGL" in result.stderr:
        pytest.skip(f"nothing to draw with: {result.stderr[-200:]}")
    assert result.returncode == 0, result.stderr
    usual, plain, fine = ([int(word) for word in line.split()] for line in result.stdout.splitlines())
    assert usual[:-1] == [500, 360, 480, 3]
    assert plain[:-1] == fine[:-1] == [500, 48, 64, 3]
    assert plain[-1] > fine[-1]


H1 = """
from sphere_rl.suites.picture import Picture
from sphere_rl.suites import make_suite
for fine in (False, True):
    env = make_suite("h1").render_env("stand", seed=3)
    env.draw_as(Picture(1400, 48, fine))
    env.reset()
    print(*env.render().shape, env.render()[-16:].astype(int).sum(), env.spec.max_episode_steps)
    env.close()
"""


@pytest.mark.slow
def test_h1_is_drawn_as_chosen() -> None:
    result = in_new_process(H1)
    if result.returncode and "OpenGL" in result.stderr:
        pytest.skip(f"nothing to draw with: {result.stderr[-200:]}")
    assert result.returncode == 0, result.stderr
    plain, fine = (line.split() for line in result.stdout.splitlines())
    assert plain[:3] == fine[:3] == ["48", "1400", "3"]
    assert plain[3] != fine[3]
    assert plain[4] == "1000"


def test_frames_are_chosen_where_that_is_possible(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="size: '8x48' is not allowed; expected 16 to 4096 pixels a side"):
        Picture(8, 48)
    assert main(["play", str(tmp_path), "--out", "clip.gif", "--size", "640"]) == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_sees_how_far_it_is(
    tmp_path: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    env = Counter()
    env.spec = EnvSpec("Counter-v0", max_episode_steps=12)
    record(env, lambda observation: 0.0, tmp_path / "clip.gif", steps=100, progress=True)
    captured = capsys.readouterr()
    assert ("12/12" in captured.err) == terminal
    assert captured.out == ""


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere windows need no display variable")


@pytest.mark.parametrize("backend", ["disable", pytest.param("glfw", marks=ON_LINUX)])
def test_no_opengl_is_said_in_one_line(tmp_path: Path, backend: str) -> None:
    """MuJoCo without any graphics, or told to open a window without a display: the line names what would help."""
    code = DRAW.replace("SUITE", "'h1'").replace("TASK", "'stand'").replace("OUT", repr(str(tmp_path / "clip.gif")))
    result = in_new_process(code, MUJOCO_GL=backend, DISPLAY="", WAYLAND_DISPLAY="")
    assert result.returncode == 1
    assert f"refused: MUJOCO_GL: {backend!r} is not allowed" in result.stderr
    assert "expected a working OpenGL library: install" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "clip.gif").exists()


@ON_LINUX
def test_metaworld_without_egl_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, mode: int) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(MissingExtraError, match=r"^MetaWorld is drawn with EGL.*install libegl1 \(libEGL.so.1: cannot"):
        make_suite("cw10").render_env("push", 0)


def test_a_run_is_filmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest checkpoint's mean action plays, clipped to the box; the reward here is the action itself."""
    monkeypatch.setitem(
        gymnasium.registry, "Counter-v0", EnvSpec("Counter-v0", entry_point=lambda **options: Counter(**options))
    )
    options = {"num_envs": 1, "num_steps": 8, "minibatch_size": 8, "steps_per_task": 8, "final_eval_episodes": 1}
    changes = options | {"tasks": ("Counter-v0",), "actor": "dense", "spectrum_every": -1}
    with RunFolder(tmp_path / "run") as folder:
        start(override(preset(make_suite("gym")), changes), folder, lambda step: [])
    recording = play(tmp_path / "run", tmp_path / "clip.gif", steps=9, fps=50)
    policy = load_policy(tmp_path / "run")
    actions = policy(torch.arange(9.0)[:, None]).detach().clamp(-0.5, 0.5)
    assert recording.total_reward == pytest.approx(actions.sum().item(), rel=1e-5)
    assert len(actions.unique()) > 1
    assert (recording.steps, recording.success) == (9, False)
    assert [frame.mean() for frame in read_gif(recording.path)[0]] == [20.0 * step for step in range(10)]
    with pytest.raises(ConfigError, match="expected a file that ends in"):
        play(tmp_path / "run", "clip.png")
    with pytest.raises(ConfigError, match="tasks: 'fly'"):
        play(tmp_path / "run", "clip.gif", task="fly")
    with pytest.raises(ConfigError, match="size: '64x48' is not allowed; expected the frames that the environment has"):
        play(tmp_path / "run", "clip.gif", picture=Picture(64, 48))


def test_unknown_tasks_cannot_be_filmed() -> None:
    for suite in ("h1", "cw10"):
        with pytest.raises(ConfigError, match="tasks: 'fly' is not allowed"):
            make_suite(suite).render_env("fly", 0)


def test_a_process_that_has_trained_can_draw() -> None:
    """A policy is held against its task's environments before anything is drawn: EnvPool is loaded by then."""
    code = (
        "from sphere_rl.suites import make_suite\nsuite = make_suite('cw10')\nsuite.make('reach', 1, 0, 1).close()\n"
        "env = suite.render_env('reach', 0)\nenv.reset()\nprint(env.render().shape)\n"
    )
    result = in_new_process(code)
    assert (result.returncode, result.stdout) == (0, "(360, 480, 3)\n"), result.stderr
