"""``sphere diagnose``: how plastic the policies of a run are, from its checkpoints alone.

Every checkpoint is measured on the suite's probe batch, the states that training measures on, too. ``--proxy`` asks how
well r_e(A) of the last expert layer stands for r_e(K): both on many small batches of every checkpoint's policy.
"""

from __future__ import annotations

from pathlib import Path

from sphere_rl.errors import CommandLineError
from sphere_rl.report import diagnosis, figures
from sphere_rl.runs import RunFolder
from sphere_rl.runtime import tune_process
from sphere_rl.terminal.diagnosis import INTERVAL, show, show_proxy
from sphere_rl.terminal.parsers import ArgumentParser, positive
from sphere_rl.training.diagnosis import diagnose, select
from sphere_rl.training.proxy import BATCH, proxy_table
from sphere_rl.training.saved import config_of


def command(words: list[str]) -> None:
    """Measure the plasticity of a run's checkpoints."""
    options = ArgumentParser(prog="sphere diagnose", description=command.__doc__)
    options.add_argument("run", type=Path, help="run folder")
    options.add_argument(
        "--checkpoint", nargs="+", metavar="NAME",
        help="latest, or files of the run's checkpoints folder; by default the ends of its tasks and the latest",
    )  # fmt: skip
    options.add_argument("--proxy", action="store_true", help="r_e(A) of the last expert layer against r_e(K)")
    options.add_argument("--batches", type=positive, help="with --proxy: batches of each kind a checkpoint (16)")
    options.add_argument("--json", action="store_true", help="one JSON object a line instead of the tables")
    options.add_argument("--device", default="cpu", help="PyTorch device, whatever the run was made on (cpu)")
    options.add_argument("--out", type=Path, help="figure: a .png, .svg or .pdf file (RUN/spectrum.png, RUN/proxy.png)")
    given = options.parse_args(words)
    if given.batches and not given.proxy:
        raise CommandLineError("--batches: only allowed with --proxy")
    out = given.out or given.run / ("proxy.png" if given.proxy else "spectrum.png")
    if out.suffix[1:] not in figures.FORMATS:
        raise CommandLineError(f"--out: '{out}' is not allowed; expected a .png, .svg or .pdf file")
    folder = RunFolder.existing(given.run)
    tune_process(config_of(folder).torch_threads)
    chosen = select(folder, given.checkpoint)
    if given.proxy:
        table = proxy_table(folder, chosen, given.batches or 16, given.device)
        show_proxy(folder, table, given.json)
        caption = f"{folder.path}: batches of {BATCH} states; {INTERVAL}."
        figure = diagnosis.ranks(table, caption)
    else:
        found = [diagnose(folder, one, given.device) for one in chosen]
        show(folder, found, given.json)
        figure = diagnosis.spectra(found, f"{folder.path}: eigenvalues on {found[0].kernel_states} probe states.")
    diagnosis.write(figure, out)
