"""What mkdocs does for the documentation besides its plugins: reports of published runs as live pages, and links from
names in running text to the reference.

`mkdocs.yml` names this file under ``hooks``. ``SPHERE_LIVE=0`` leaves the live pages empty, for a look at the text.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LIVE = {name: f"docs/results/{name}" for name in ("cw10", "pilot", "alone")}
"""Folders of published runs, by the name of their page in ``live/``."""
DIRECTIVE = re.compile(r"^::: (sphere_rl[\w.]*)", re.MULTILINE)
CODE = re.compile(r"<code>([\w.]+)(\(\))?</code>")

_made = tempfile.TemporaryDirectory(prefix="sphere-site-")
_documented: set[str] = set()


def on_files(files: Files, config: Any) -> Files:
    """Add the live pages to the site, and note which names the reference has."""
    for name, runs in LIVE.items():
        folder = Path(_made.name) / name
        if not folder.exists():
            make_report(ROOT / runs, folder)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            files.append(File.generated(config, f"live/{path.relative_to(_made.name)}", abs_src_path=str(path)))
    _documented.clear()
    for file in files.documentation_pages():
        _documented.update(DIRECTIVE.findall(file.content_string))
    return files


def make_report(runs: Path, folder: Path) -> None:
    """Write what ``sphere report`` makes of published runs.

    Raises:
        subprocess.CalledProcessError: it failed; the site is not built without its pages.
    """
    if os.environ.get("SPHERE_LIVE") == "0":
        folder.mkdir()
        (folder / "index.html").write_text("<!doctype html><title>left out</title>")
        return
    paths = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "sphere_rl.cli", "report", str(runs), "--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": paths})


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Make ``sp.NAME`` and names of the reference links to it, wherever they stand in text as code."""
    short = {name.rpartition(".")[2]: name for name in _documented if name.rpartition(".")[2][:1].isupper()}

    def link(match: re.Match[str]) -> str:
        text = match[1]
        name = f"sphere_rl.{text[3:]}" if text.startswith("sp.") else short.get(text, text)
        if name not in _documented or html.rfind("<a ", 0, match.start()) > html.rfind("</a>", 0, match.start()):
            return match[0]
        return f'<autoref identifier="{name}" optional>{match[0]}</autoref>'

    return CODE.sub(link, html)
