"""Subcommands of ``sphere`` that are more than a call, and what they are made of."""
