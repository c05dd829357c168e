"""Runs as they are published: three small files each, side by side in one folder, in place of a run folder.

``STEM-config.json`` is a run's ``config.json`` with its ``status``; ``STEM-eval.jsonl.gz`` and
``STEM-spectrum.jsonl.gz`` are its logs. Whoever has run the same configuration elsewhere adds three files.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

from sphere_rl.errors import RunFolderError
from sphere_rl.runs import RunFolder, file_name, make_folder, write_atomic
from sphere_rl.runs.records import OBJECT, STATUS, check_kinds, content

PUBLISHED = ("eval", "spectrum")
CONFIG = "-config.json"


class PublishedRun(RunFolder):
    """A run's published files, read as its folder would be; ``path`` is their common stem, and no folder."""

    @property
    def config_path(self) -> Path:
        """``STEM-config.json``."""
        return self.path.with_name(f"{self.path.name}{CONFIG}")

    @property
    def files(self) -> list[Path]:
        """Its files, those that are there."""
        logs = (self._log_path(log) for log in PUBLISHED)
        return [path for path in (self.config_path, *logs) if path.exists()]

    def status(self) -> dict[str, Any]:
        """As it was when the run was published."""
        status = self._record().get("status", {})
        check_kinds(f"{self.config_path}: status", status, STATUS, ())
        return status

    def _record(self) -> dict[str, Any]:
        return dict(self._content)

    @cached_property
    def _content(self) -> dict[str, Any]:
        """The configuration's file, read once: what is published does not change while it is looked at."""
        data = super()._record()
        check_kinds(str(self.config_path), data, {"status": OBJECT}, ())
        return data

    def _log_path(self, log: str) -> Path:
        return self.path.with_name(f"{self.path.name}-{log}.jsonl.gz")

    def _log_content(self, log: str) -> bytes:
        path = self._log_path(log)
        if log not in PUBLISHED:
            return b""
        try:
            return gzip.decompress(content(path))
        except (OSError, EOFError, zlib.error) as error:
            raise RunFolderError(f"{path}: is not gzip ({error})") from None


def published_runs(root: Path | str) -> list[Path]:
    """The stems of all published runs at or below ``root``, by name."""
    return sorted(
        path.with_name(path.name.removesuffix(CONFIG))
        for path in Path(root).rglob(f"*{CONFIG}")
        if path.with_name(f"{path.name.removesuffix(CONFIG)}-eval.jsonl.gz").exists()
    )


def publish(folder: RunFolder, out: Path) -> str:
    """Write the published files of a run, as far as it is, and return their stem. Equal runs give equal bytes.

    The stem is ``PROTOCOL[-TASK]-METHOD-seedK``: with the task for runs of protocol rl on one, and the label that a
    run was given in its method's place. A folder that was named by hand keeps that name, its protocol before it.

    Raises:
        RunFolderError: the run cannot be read, or another one is published under that name already.
    """
    record = folder.record() | {"status": folder.status()}
    stem = stem_of(record["config"], folder.path.name)
    target = PublishedRun(out / stem)
    if target.config_path.exists() and target.config() != record["config"]:
        raise RunFolderError(f"{target.config_path}: another run has this name; expected a folder of runs made alike")
    make_folder(out)
    for log in PUBLISHED:
        lines = "".join(json.dumps(row) + "\n" for row in folder.read(log))
        write_atomic(out / f"{stem}-{log}.jsonl.gz", gzip.compress(lines.encode(), 9, mtime=0))
    write_atomic(target.config_path, (json.dumps(record, indent=2) + "\n").encode())
    return stem


def stem_of(config: dict[str, Any], folder: str) -> str:
    """What a run is called where it is published; see `publish`."""
    protocol = config["protocol"]
    if not folder.startswith(config["suite"]):  # no sweep's name: somebody gave it
        parts = [folder.removeprefix(f"{protocol}-")]
    else:
        alone = protocol == "rl" and len(config["tasks"]) == 1
        parts = [*(config["tasks"] if alone else ()), config.get("label") or "+".join(config["method"])]
    stem = re.sub(r"-seed\d+$", "", "-".join([protocol, *parts]))
    return f"{file_name(stem)}-seed{config['seed']}"
