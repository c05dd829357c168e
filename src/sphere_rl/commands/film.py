"""The process that films a run in training: ``python -m sphere_rl.commands.film RUN CHECKPOINT OUT``."""

from __future__ import annotations

import sys

from sphere_rl.commands.play import play
from sphere_rl.errors import CommandLineError, ConfigError, RunFolderError
from sphere_rl.suites.picture import Picture

SMALL = Picture(240, 180)
"""A quarter of what ``sphere play`` draws; an environment whose frames cannot be chosen has its own."""
FRAMES_PER_SECOND = 12

if __name__ == "__main__":
    run, name, out = sys.argv[1:]
    try:
        play(run, out, checkpoint=name, fps=FRAMES_PER_SECOND, picture=SMALL, insist=False)
    except (CommandLineError, ConfigError, RunFolderError, OSError) as error:
        print(f"sphere: {error}", file=sys.stderr)
        sys.exit(2)
