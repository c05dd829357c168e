"""``python -m sphere_rl`` is the command ``sphere``."""

import sys

from sphere_rl.cli import main

if __name__ == "__main__":
    sys.exit(main())
