"""The command line: parse, call, and turn errors into one line and an exit code.

Exit codes: 0 done · 2 bad arguments or configuration · 3 the run failed, or a report leaves runs out · 130 interrupted.
Libraries load when a command needs them, so that ``sphere --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sphere_rl.errors import CommandLineError, ConfigError, RunFolderError, StorageError, TrainingError
from sphere_rl.terminal.parsers import ArgumentParser, positive, seed, size
from sphere_rl.terminal.streams import lasting_streams
from sphere_rl.terminal.waiting import waiting


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, whatever becomes of what it prints."""
    with lasting_streams():
        return answer(list(sys.argv[1:] if arguments is None else arguments))


def answer(words: list[str]) -> int:
    """Run the command that the words name, and say in one line what is wrong."""
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"sphere-rl {version('sphere-rl')}")
        return 0
    if words[0] not in COMMANDS:
        return fail(f"command: {words[0]!r} is not allowed; expected one of {', '.join(COMMANDS)}")
    if threading.current_thread() is threading.main_thread():  # signals reach no other
        signal.signal(signal.SIGTERM, interrupt)
    try:
        return run(words[0], words[1:])
    except (CommandLineError, ConfigError, RunFolderError) as error:
        return fail(str(error))
    except StorageError as error:  # where nothing is trained, a place that takes no files is bad input
        return fail(str(error), code=3 if error.of_the_disk or words[0] in TRAINING else 2)
    except TrainingError as error:
        return fail(str(error), code=3)
    except KeyboardInterrupt:
        return fail("interrupted", code=130)
    except OSError as error:
        if error.filename is None:
            traceback.print_exc()
            return 3
        return fail(f"{error.filename}: {error.strerror}")
    except Exception:
        traceback.print_exc()
        return 3


def run(command: str, words: list[str]) -> int:
    """Run a command for which everything is installed that it needs.

    Raises:
        MissingExtraError: something is not.
    """
    from sphere_rl.extras import explained, require

    asker = f"sphere {command}"
    require(NEEDS[command], asker)
    try:
        return COMMANDS[command](words) or 0
    except ModuleNotFoundError as error:
        if (said := explained(error, asker)) is None:
            raise
        raise said from error


def overview() -> str:
    """The text of ``sphere --help``."""
    rows = "\n".join(f"  {name:<9} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items())
    purpose = "Plastic Mixture-of-Experts policies in continual reinforcement learning."
    return f"usage: sphere COMMAND ...\n\n{purpose}\n\n{rows}\n\nsphere COMMAND --help tells a command's options."


def fail(message: str, code: int = 2) -> int:
    """Say what is wrong in one line; with ``SPHERE_DEBUG=1`` where in the code, before it."""
    if os.environ.get("SPHERE_DEBUG") and sys.exception() is not None:
        traceback.print_exc()
    line = " ".join(message.split())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"
    print(f"sphere: {line}", file=sys.stderr)
    return code


LONGEST = 2000
"""Characters of a line that says what is wrong."""


def interrupt(*_: object) -> NoReturn:
    """Treat a polite kill as Ctrl-C: the run says so in its status. A second one does not keep it from that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def train(words: list[str]) -> None:
    """Train an agent on a sequence of tasks."""
    with waiting("loading PyTorch", quiet=bool({"--quiet", "--help", "-h"} & {*words})):
        from sphere_rl import protocol
        from sphere_rl.config import idle_options, tell_idle
        from sphere_rl.runs import RunFolder
        from sphere_rl.terminal.arguments import named_options, parse_train
        from sphere_rl.training.monitors import make_monitors

        config, out, quiet = parse_train(words)
    tell_idle(idle_options(named_options(words), config.method), config.method)
    with waiting(f"opening the tasks of suite {config.suite}", quiet):
        protocol.check(config)
    RunFolder(out).check_vacant()  # before anything is made there, the lock included
    with RunFolder(out) as folder:
        with resumable(folder):
            protocol.start(config, folder, lambda step: make_monitors(config, folder, step, quiet))
        print_results(folder)


def resume(words: list[str]) -> None:
    """Continue an interrupted run exactly, from its newest checkpoint."""
    with waiting("loading PyTorch", quiet="--quiet" in words):
        from sphere_rl import protocol
        from sphere_rl.runs import RunFolder
        from sphere_rl.training.monitors import make_monitors
        from sphere_rl.training.saved import config_of

    options = run_parser("resume", resume.__doc__, " (a run goes on with its own settings; a new run takes others)")
    options.add_argument("--quiet", action="store_true", help="no progress display")
    given = options.parse_args(words)
    RunFolder.existing(given.run)
    with RunFolder(given.run) as folder:
        if folder.status().get("state") == "finished":
            print(f"{given.run}: finished already", file=sys.stderr)
            return
        with resumable(folder):
            config = config_of(folder)
            protocol.resume(folder, lambda step: make_monitors(config, folder, step, given.quiet))
        print_results(folder)


@contextlib.contextmanager
def resumable(folder: Any) -> Any:
    """After an interruption, say how to go on, and from which step."""
    from sphere_rl.runs import checkpoint

    try:
        yield
    except KeyboardInterrupt:
        folder.interrupt()  # it may not have got so far as to say so itself
        where = f"stopped at step {folder.status().get('global_step', 0):,}; the run goes on from"
        step = checkpoint.newest_step(folder)
        where += " its beginning" if step is None else f" step {step:,}"
        print(f"\n{where}\ncontinue with: sphere resume {folder.path}", file=sys.stderr)
        raise


def evaluate(words: list[str]) -> None:
    """Run deterministic episodes of a run's policies."""
    import json

    from sphere_rl.terminal.tables import print_table

    options = run_parser("evaluate", evaluate.__doc__)
    options.add_argument(
        "--checkpoint",
        help="latest, or a file of the run's checkpoints folder, for all tasks; by default the latest policy in crl, "
        "each task's own in rl",
    )
    options.add_argument("--tasks", nargs="+", help="tasks of the run's suite; by default all tasks of the run")
    options.add_argument("--episodes", type=positive, default=50, help="deterministic episodes of each task (50)")
    limit = "end an episode after so many steps; by default as the run does (its eval_max_steps)"
    options.add_argument("--eval-max-steps", "--max-steps", type=positive, help=limit)
    options.add_argument("--seed", type=seed, default=0, help="of the episodes' first states (0)")
    options.add_argument("--json", action="store_true", help="one JSON object a task instead of the table (off)")
    add_device(options)
    given = options.parse_args(words)
    results = evaluated(given)
    if given.json:
        print("\n".join(json.dumps(result, allow_nan=False) for result in results))
    else:
        print_table(f"{given.run}, {given.episodes} deterministic episodes", results)


def evaluated(given: Any) -> list[dict[str, Any]]:
    """Results of the episodes that flags of ``sphere evaluate`` ask for, a row a task."""
    from sphere_rl.runs import RunFolder
    from sphere_rl.runtime import threads, tune_process
    from sphere_rl.suites import make_suite
    from sphere_rl.suites.guard import call_limit
    from sphere_rl.training.evaluation import evaluate as run_episodes
    from sphere_rl.training.policies import policy_for, read_policies
    from sphere_rl.training.saved import config_of

    folder = RunFolder.existing(given.run)
    config = config_of(folder)
    tune_process(config.torch_threads)
    suite = make_suite(config.suite)
    limits = {"arguments": config.environment, "max_steps": given.eval_max_steps or config.eval_max_steps}
    chosen = policy_for(folder, config, given.tasks, given.checkpoint)
    policies = read_policies(folder, suite, chosen, given.device)
    if not given.tasks and (missing := len(config.task_sequence) - len(chosen)):
        print(f"{given.run}: no policy yet of {missing} of its {len(config.task_sequence)} tasks", file=sys.stderr)
    results = []
    for task, one in chosen:
        policy, number = policies[one.path], threads(config.env_threads)
        with call_limit(config.env_timeout):
            found = run_episodes(policy, suite, task, given.episodes, given.seed, number, **limits)
        results.append({"task": task, "checkpoint": one.path.stem} | found.row())
    return results


def play(words: list[str]) -> None:
    """Film an episode of a run's policy as mp4 or gif."""
    from sphere_rl.commands.play import play as film
    from sphere_rl.suites.picture import Picture

    options = run_parser("play", play.__doc__)
    options.add_argument("--out", type=Path, required=True, help="the video, a .mp4 or .gif file")
    options.add_argument("--task", help="a task of the run's suite; by default the task of the checkpoint")
    options.add_argument(
        "--checkpoint",
        help="latest, or a file of the run's checkpoints folder; by default the latest, in rl that of --task",
    )
    options.add_argument("--seed", type=seed, default=0, help="of the episode's first state (0)")
    options.add_argument("--steps", "--max-steps", type=positive, default=1000, help="stop after so many steps (1000)")
    options.add_argument(
        "--fps", type=positive, default=25, help="pictures a second, about: in real time, every k-th step drawn (25)"
    )
    options.add_argument("--size", type=size, help="WIDTHxHEIGHT of a frame (480x360 where the suite can choose it)")
    options.add_argument("--fine", action="store_true", help="shadows and smooth edges, about ten times as slow (off)")
    add_device(options)
    given = options.parse_args(words)
    picture = Picture(*given.size or (), fine=given.fine) if given.size or given.fine else None
    about = (given.task, given.checkpoint, given.seed, given.steps, given.fps, given.device)
    shot = film(given.run, given.out, *about, picture=picture, progress=True)
    success = "" if shot.success is None else f", {'success' if shot.success else 'no success'}"
    print(
        f"{shot.path}: {shot.frames} frames, {shot.steps} steps, return {shot.total_reward:.1f}{success} "
        f"({shot.task}, {shot.checkpoint})"
    )


def demo(words: list[str]) -> int | None:
    """Train with and without SPHERE on a short MetaWorld sequence, about five minutes."""
    from sphere_rl.commands.demo import command

    return command(words)


def export(words: list[str]) -> None:
    """Take a run's policy away as TorchScript, ONNX or safetensors."""
    from sphere_rl.commands.export import command

    command(words)


def list_all(words: list[str]) -> None:
    """List suites, tasks, actors, methods, metrics or presets."""
    import json

    from sphere_rl import plugins
    from sphere_rl.commands import catalogue
    from sphere_rl.terminal.tables import print_table

    options = ArgumentParser(prog="sphere list", description=list_all.__doc__)
    allowed = ", ".join(catalogue.TOPICS)
    options.add_argument("topics", nargs="*", metavar="TOPIC", help=f"{allowed}; by default all of them")
    options.add_argument("--json", action="store_true", help="one JSON object a row instead of tables")
    for topic in catalogue.TOPICS:
        options.add_argument(
            f"--{topic}", dest="flags", action="append_const", const=topic, help=f"the same as {topic}"
        )
    options.add_argument(
        "--plugin", nargs="+", default=[], metavar="MODULE", help="modules whose contents to list, too"
    )
    given = options.parse_args(words)
    plugins.load(given.plugin)
    columns = os.environ.get("COLUMNS", "")
    chosen = dict.fromkeys([*given.topics, *(given.flags or ())] or catalogue.TOPICS)
    for topic in chosen:
        if topic not in catalogue.TOPICS:
            raise ConfigError("topic", topic, f"one of {allowed}")
    for topic in chosen:
        rows = catalogue.TOPICS[topic]()
        if given.json:
            print("\n".join(json.dumps({"topic": topic} | row) for row in rows))
        else:
            print_table(topic, rows, piped=int(columns) if columns.isdecimal() else LIST_WIDTH)


def diagnose(words: list[str]) -> None:
    """Measure the plasticity of a run's checkpoints."""
    from sphere_rl.commands.diagnose import command

    command(words)


def sweep(words: list[str]) -> int | None:
    """Train a grid of runs on this machine or a Ray cluster."""
    from sphere_rl.sweep import command

    return command(words, report)


def report(words: list[str]) -> int | None:
    """Make a page and figures from a folder of runs."""
    from sphere_rl.report import command

    return command(words)


def compare(words: list[str]) -> None:
    """Compare two runs or two folders of runs, paired by task and seed."""
    from sphere_rl.commands.compare import command

    command(words)


def run_parser(command: str, description: str | None, others: str = "") -> ArgumentParser:
    """A parser whose first argument is a run folder; ``others``: said of flags that it does not have."""
    options = ArgumentParser(prog=f"sphere {command}", description=description, others=others)
    options.add_argument("run", type=Path, help="run folder")
    return options


def add_device(options: ArgumentParser) -> None:
    """The flag of commands that read policies."""
    options.add_argument("--device", default="cpu", help="PyTorch device, whatever the run was made on (cpu)")


def print_results(folder: Any) -> None:
    """The evaluations at the ends of the tasks."""
    from sphere_rl.terminal.tables import print_table

    columns = ("task", "task_step", "episodes", "success_final", "success_once", "mean_return")
    evals = folder.read("eval", (*columns, "phase"))
    rows = [{name: row[name] for name in columns} for row in evals if row["phase"] == "final"]
    print_table(f"{folder.path}: at the end of each task", rows)


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "demo": demo,
    "train": train,
    "resume": resume,
    "evaluate": evaluate,
    "diagnose": diagnose,
    "sweep": sweep,
    "report": report,
    "compare": compare,
    "play": play,
    "export": export,
    "list": list_all,
}

TRAINING = ("demo", "train", "resume", "sweep")
"""Commands under which a disk fails a run."""
LIST_WIDTH = 100
"""Columns of the tables of ``sphere list`` in a pipe, where COLUMNS does not say how many."""
NEEDS = (
    dict.fromkeys(COMMANDS, "train")
    | dict.fromkeys(("compare", "demo", "diagnose", "report"), "report")
    | {"play": "play"}
)
"""The extra that a command needs."""

if __name__ == "__main__":
    sys.exit(main())
