"""Subcommands of ``sphere`` that are more than a call: diagnose, play, demo, list."""
