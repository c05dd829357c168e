"""A policy's episode as a video: mp4 (H.264) or gif, by the file's ending."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from sphere_rl.errors import ConfigError, described
from sphere_rl.suites.picture import Drawable, Picture

Frame = np.ndarray  # uint8 [height, width, 3]
DEFAULT_STEP_RATE = 50
GIF_RATE = 50
"""Pictures a second at most: a gif counts in hundredths of a second, and one of them is too short for browsers."""


@dataclass(frozen=True)
class Recording:
    """What was recorded."""

    path: Path
    frames: int
    steps: int
    total_reward: float
    success: bool | None
    """Success at the last step; `None` where the task does not define it."""
    task: str | None = None
    checkpoint: str | None = None
    """Whose episode of which task it is, where a run's policy is filmed."""


def play(
    run: Path | str,
    out: Path | str,
    task: str | None = None,
    checkpoint: str | None = None,
    seed: int = 0,
    steps: int = 1000,
    fps: int = 25,
    device: str = "cpu",
    picture: Picture | None = None,
    progress: bool = False,
    insist: bool = True,
) -> Recording:
    """Film a run's policy (mean action) on a task of its suite, by default the checkpoint's own; see `record`.

    By default the checkpoint is the latest; for a named task of an ``rl`` run it is that task's own. Where frames
    cannot be chosen, a ``picture`` is an error, or without ``insist`` the environment's own.

    Raises:
        ConfigError: the suite has no such task, or its frames cannot be chosen; the policy does not fit it; no such
            device; or as `record`.
        RunFolderError: no run, or no such checkpoint, or a broken one.
    """
    import torch

    from sphere_rl.runs import RunFolder
    from sphere_rl.seeding import global_streams
    from sphere_rl.suites.spaces import action_sender, check_numbers
    from sphere_rl.training.policies import load_for_task
    from sphere_rl.training.saved import config_of

    _writer(Path(out))
    suite, task, chosen, policy = load_for_task(run, task, checkpoint, device)
    arguments = config_of(RunFolder.existing(run)).environment
    with global_streams(seed), closing(suite.render_env(task, seed, **arguments)) as env:
        if picture is not None:
            _draw_as(env, picture, insist)
        send = action_sender(env.action_space)

        @torch.no_grad()
        def act(observation: np.ndarray) -> Any:
            check_numbers("the observation", observation[None])
            output = policy(torch.as_tensor(observation, device=device)[None])
            return send(policy.actor.head.mode(output))[0]

        return replace(record(env, act, out, steps, fps, progress), task=task, checkpoint=chosen.path.stem)


def _draw_as(env: gymnasium.Env, picture: Picture, insist: bool) -> None:
    if isinstance(env.unwrapped, Drawable):
        env.unwrapped.draw_as(picture)
    elif insist:
        size = f"{picture.width}x{picture.height}"
        raise ConfigError("size", size, "the frames that the environment has: it does not let them be chosen")


def record(
    env: gymnasium.Env,
    act: Callable[[np.ndarray], Any],
    path: Path | str,
    steps: int = 1000,
    fps: int = 25,
    progress: bool = False,
) -> Recording:
    """Play one episode, at most `steps` long, and write it in real time at about `fps` pictures a second.

    The real time of a step is ``1 / env.metadata["render_fps"]``. Every k-th step is drawn, with the whole number k
    whose pictures a second come nearest: MetaWorld's 80 steps a second at 25 are every third, 26.7 a second.
    ``progress`` shows a bar on stderr where that is a terminal.

    Raises:
        ConfigError: the path is neither .mp4 nor .gif, or no OpenGL library can draw.
    """
    path = Path(path)
    for name, value in (("steps", steps), ("fps", fps)):
        if value < 1:
            raise ConfigError(name, value, "1 or more")
    writer = _writer(path)
    step_rate = env.metadata.get("render_fps") or DEFAULT_STEP_RATE
    stride = max(1, round(step_rate / (min(fps, GIF_RATE) if path.suffix == ".gif" else fps)))
    observation, _ = env.reset()
    frame = _draw(env)
    path.parent.mkdir(parents=True, exist_ok=True)
    frames, taken, total, success = 1, 0, 0.0, None
    with _bar(env, steps, progress) as show, writer(path, frame.shape, step_rate / stride) as write:
        write(frame)
        for taken in range(1, steps + 1):
            observation, reward, terminated, truncated, info = env.step(act(observation))
            total += float(reward)
            if success is not None or "success" in info:  # once it is told, a step that does not tell it had none
                success = bool(np.asarray(info.get("success", False)).item())
            if taken % stride == 0 or terminated or truncated:
                write(_draw(env))
                frames += 1
            show(taken)
            if terminated or truncated:
                break
    return Recording(path, frames, taken, total, success)


@contextmanager
def _bar(env: gymnasium.Env, steps: int, progress: bool) -> Iterator[Callable[[int], object]]:
    """Show how many steps of an episode are done, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    if not (progress and console.is_terminal):
        yield lambda taken: None
        return
    longest = (env.spec.max_episode_steps if env.spec else None) or steps
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("steps", total=min(steps, longest))
        yield lambda taken: bar.update(task, completed=taken)


def _writer(path: Path) -> Any:
    if path.suffix not in WRITERS:
        raise ConfigError("out", str(path), f"a file that ends in {' or '.join(WRITERS)}")
    return WRITERS[path.suffix]


def _draw(env: gymnasium.Env) -> Frame:
    try:
        frame = env.render()
    except gymnasium.error.DependencyNotInstalled as error:
        raise ConfigError("task", _name(env), f"one that can draw here ({error})") from error
    except ConfigError:  # it says itself what is missing
        raise
    except Exception as error:
        raise ConfigError("task", _name(env), f"one that can be drawn ({described(error)})") from error
    if not isinstance(frame, np.ndarray):
        raise ConfigError("task", _name(env), f"one that draws arrays, not {type(frame).__name__}")
    return frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]  # H.264 halves the colour planes


def _name(env: gymnasium.Env) -> str:
    return env.spec.id if env.spec else type(env.unwrapped).__name__


@contextmanager
def _mp4(path: Path, shape: tuple[int, ...], fps: float) -> Iterator[Callable[[Frame], object]]:
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError:
        raise ConfigError("out", str(path), "a .gif, or install imageio-ffmpeg for .mp4") from None
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{shape[1]}x{shape[0]}", "-r", f"{fps:g}", "-i", "-"]
    target = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)]
    command = [get_ffmpeg_exe(), "-loglevel", "error", "-y", *source, *target]
    ffmpeg = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert ffmpeg.stdin is not None
    pipe = ffmpeg.stdin
    try:
        with suppress(BrokenPipeError):  # it has ended, and says why
            yield lambda frame: pipe.write(frame.tobytes())
        _, said = ffmpeg.communicate()
    finally:
        ffmpeg.kill()  # where it has not ended
        ffmpeg.wait()
    if code := ffmpeg.returncode:
        with suppress(OSError):
            path.unlink()
        words = said.decode(errors="replace").strip().splitlines()
        reason = f"signal {-code}" if code < 0 else words[-1] if words else f"exit code {code}"
        raise OSError(errno.EIO, f"ffmpeg cannot write it ({reason})", str(path))


@contextmanager
def _gif(path: Path, shape: tuple[int, ...], fps: float) -> Iterator[Callable[[Frame], object]]:
    from PIL import Image

    from sphere_rl.runs import write_atomic

    frames, film = list[Any](), io.BytesIO()
    yield lambda frame: frames.append(Image.fromarray(frame).quantize(128))
    duration = round(100 / min(fps, GIF_RATE)) * 10
    frames[0].save(film, "gif", save_all=True, append_images=frames[1:], duration=duration, loop=0, optimize=True)
    write_atomic(path, film.getvalue())


WRITERS = {".mp4": _mp4, ".gif": _gif}
