"""The command line: parse, call, print, exit code. Results go to stdout, prose to stderr.

Exit codes: 0 fine, 1 something the user must change, 2 usage, 3 a bug of ftgen's, 130 interrupted.
What a command needs is imported inside it, so that each starts as fast as it can.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ftgen import __version__
from ftgen.errors import UserError

if TYPE_CHECKING:
    from ftgen.compare import Baseline
    from ftgen.summarize import Summary
    from ftgen.window import Window

# pydantic would look through every installed package for plug-ins, which ftgen does not have
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
ANYWHERE = click.Path(path_type=Path)
FAIL_ON = "regression, incomplete, failed, invalid, doubtful"
FORMATS = "terminal, markdown, csv, json, html, latex"

spec_argument = click.argument("specs", nargs=-1, required=True, type=ANYWHERE, metavar="SPEC...")
site_option = click.option("--site", type=FILE, help="The cluster's profile, a TOML file.")


def _complete_key(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[str]:
    from ftgen import completion

    return completion.keys(typed)


set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY.PATH=VALUE",
    shell_complete=_complete_key,
    help="Change a key of the spec.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def ftgen() -> None:
    """Specs of Llama fine-tuning benchmarks in, self-contained sbatch scripts and result tables out."""


@ftgen.command("compile")
@spec_argument
@site_option
@set_option
@click.option("--out", type=FOLDER, default=Path("generated"), show_default=True, help="Where the scripts go.")
@click.option("--check", is_flag=True, help="Write nothing: compare, and exit 1 with a diff where files are stale.")
def compile_specs(specs: tuple[Path, ...], site: Path | None, overrides: tuple[str, ...], out: Path, check: bool) -> None:
    """Compile each SPEC, or each in a folder, into OUT/<name>.sh, which stands alone, and OUT/<name>.py, its entrypoint."""
    from ftgen import files
    from ftgen.experiment import load_all
    from ftgen.render import render

    texts = {name: text for each in load_all(specs, site, overrides) for name, text in render(each.plan).items()}
    if check:
        stale = files.differences(out, texts)
        click.echo(stale, nl=False)
        if stale:
            click.echo(f"{out} is stale: compile the specs again", err=True)
            sys.exit(1)
        return
    for path in files.write(out, texts):
        if path.suffix == ".sh":
            click.echo(path)


@ftgen.command()
@click.option("--site", type=FILE, required=True, help="The cluster's profile, a TOML file.")
@click.argument("specs", nargs=-1, type=ANYWHERE, metavar="[SPEC...]")
@click.option("--out", type=FOLDER, default=Path("generated"), show_default=True, help="OUT/setup/<site>.sh is written.")
def setup(site: Path, specs: tuple[Path, ...], out: Path) -> None:
    """Compile the job that sets a site up: folders, image or virtual environment, the sources that each SPEC asks for."""
    from ftgen import files
    from ftgen.experiment import load_all, load_site
    from ftgen.setup import render_setup

    profile = load_site(site)
    text = render_setup(profile, site.stem, [each.plan for each in load_all(specs, site, ())])
    for path in files.write(out / "setup", {f"{site.stem}.sh": text}):
        click.echo(path)


@ftgen.command()
@click.argument("specs", nargs=-1, type=ANYWHERE, metavar="[SPEC...]")
@site_option
def doctor(specs: tuple[Path, ...], site: Path | None) -> None:
    """Look, on a login node, whether jobs of each SPEC will run at this site; without SPEC, a job of one node."""
    from ftgen.doctor import examine
    from ftgen.experiment import load_all, load_site
    from ftgen.site import Site

    failed = False
    profile = load_site(site) if site else Site()
    for finding in examine(profile, [each.plan for each in load_all(specs, site, ())]):
        failed |= finding.verdict == "FAIL"
        click.echo(finding)
    if failed:
        sys.exit(1)


@ftgen.command()
@click.argument("spec", type=FILE)
@site_option
@set_option
@click.option("--name", help="Which experiment, where SPEC has a matrix of them.")
@click.option("--json", "as_json", is_flag=True, help="The plan as the job gets it.")
def plan(spec: Path, site: Path | None, overrides: tuple[str, ...], name: str | None, as_json: bool) -> None:
    """Show every number that SPEC resolves to, and where it comes from."""
    from ftgen import experiment, origins

    loaded = experiment.load(spec, site, overrides, name)
    if as_json:
        click.echo(loaded.plan.to_json())
        return
    rows = origins.explain(loaded)
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, origin in rows:
        click.echo(f"{key:{wide[0]}}  {value:{min(wide[1], 44)}}  {origin}".rstrip())


@ftgen.command("list")
@click.argument("specs", nargs=-1, type=ANYWHERE, metavar="[SPEC...]")
@site_option
@set_option
@click.option("--out", type=FOLDER, default=Path("generated"), show_default=True, help="Where the scripts are.")
def list_experiments(specs: tuple[Path, ...], site: Path | None, overrides: tuple[str, ...], out: Path) -> None:
    """Show the experiments of each SPEC or folder (default: specs/) and whether their scripts are current."""
    from ftgen import inventory

    rows = inventory.rows(specs or (Path("specs"),), out, site, overrides)
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(f"{text:{width}}" for text, width in zip(row, wide, strict=True)).rstrip())


@ftgen.command("import-env")
@click.option("--spec", type=FILE, help="Write the spec there instead of to stdout.")
@click.option("--site", type=FILE, help="Write the site profile there instead of to stdout.")
def import_env(spec: Path | None, site: Path | None) -> None:
    """Translate the variables of the recipe's own launcher into a spec and a site profile.

    Reads DTYPE, MODEL_SIZE, SFT_SCHEME (or FT_TYPE), JOB_TOTAL_GPUS, RUN_CONF_GPUS_PER_NODE, RUN_CONF_IMAGE, STAGE_PATH,
    SBATCH_ACCOUNT and SBATCH_PARTITION.
    """
    from ftgen import files, launcher

    texts = (("spec", spec, launcher.spec(os.environ)), ("site profile", site, launcher.site(os.environ)))
    for title, path, text in texts:
        if path:
            files.write(path.parent, {path.name: text})
            click.echo(path)
        else:
            click.echo(f"# {title}\n{text}")


@ftgen.command()
@click.option("--site", is_flag=True, help="Of a site profile, in place of a spec.")
@click.option("--results", is_flag=True, help="Of what `ftgen tabulate --format json` prints, in place of a spec's.")
def schema(site: bool, results: bool) -> None:
    """Print the JSON Schema of a spec."""
    from ftgen import fields, spec
    from ftgen.site import Site

    document = Site.model_json_schema() if site else fields.json_schema() if results else spec.json_schema()
    click.echo(json.dumps(document, indent=2))


logs_argument = click.argument("logs", nargs=-1, required=True, type=ANYWHERE, metavar="LOGS...")
window_option = click.option(
    "--window", metavar="N|A-B", help="Time the last N steps, or steps A to B. Default: the plan's last, or 20."
)
baseline_option = click.option("--baseline", metavar="published|FILE.json", help="Compare with it, cell by cell.")
tolerance_option = click.option("--tolerance", default="5%", show_default=True, help="How much slower a step may be.")


@ftgen.command()
@logs_argument
@click.option("--format", "format_", default="terminal", show_default=True, help=FORMATS)
@window_option
@click.option("--flat", is_flag=True, help="One table with a row a run.")
@click.option("--columns", default="", metavar="KEY,...", help="The flat table's columns, keys of the JSON results.")
@click.option("--sort", default="", metavar="[-]KEY,...", help="The flat table's order, keys of the JSON results.")
@click.option("--group", is_flag=True, help="Repeats of an experiment as one: mean, spread, how many.")
@baseline_option
@tolerance_option
@click.option("--fail-on", default="", metavar="WORD,...", help=f"Exit 1 on: {FAIL_ON}.")
@click.option("--output", type=FILE, help="Write there instead of to stdout.")
def tabulate(
    logs: tuple[Path, ...],
    format_: str,
    window: str | None,
    flat: bool,
    columns: str,
    sort: str,
    group: bool,
    baseline: str | None,
    tolerance: str,
    fail_on: str,
    output: Path | None,
) -> None:
    """Find every run below LOGS and print the result tables."""
    from ftgen import export, files
    from ftgen.fields import View, read_keys
    from ftgen.verdict import failures, read_words

    if format_ not in export.FORMATS:
        raise click.BadParameter(f"one of {', '.join(export.FORMATS)}", param_hint="--format")
    with _usage():
        words = read_words(fail_on, compared=baseline is not None)
        view = View((), None, flat, read_keys(columns), read_keys(sort), group)
        view.check()
    view = view._replace(baseline=_baseline(baseline, tolerance), runs=_summaries(logs, window))
    if output is None:
        click.echo(export.FORMATS[format_](view), nl=False)
    else:
        write = export.to_text_file if format_ == "terminal" else export.FORMATS[format_]
        files.write(output.parent, {output.name: write(view)})
    if found := failures(view, words):
        click.echo("\n".join(found), err=True)
        sys.exit(1)


@ftgen.command()
@logs_argument
@click.option("-o", "--output", type=FILE, default=Path("report.html"), show_default=True, help="The page to write.")
@click.option("--title", default="Results of fine-tuning runs", show_default=True, help="What it is called.")
@window_option
@baseline_option
@tolerance_option
def report(
    logs: tuple[Path, ...], output: Path, title: str, window: str | None, baseline: str | None, tolerance: str
) -> None:
    """Write one HTML file, to be opened offline, with the tables, curves and verdicts of every run below LOGS."""
    from ftgen import files
    from ftgen.fields import View
    from ftgen.progress import reading
    from ftgen.report import read, report
    from ftgen.runs import find_folders
    from ftgen.units import clean

    view = View((), _baseline(baseline, tolerance))
    steps = _window(window)
    folders = find_folders(logs, lambda text: click.echo(clean(text), err=True))
    with reading() as (found, progress):
        runs = read(map(found, folders), steps, progress)
    (path,) = files.write(output.parent, {output.name: report(runs, view, title=title)})
    click.echo(path)


@ftgen.command()
@logs_argument
@click.option("--every", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds between two looks.")
def watch(logs: tuple[Path, ...], every: float) -> None:
    """Show how far every run below LOGS is, until all are over: a live table, or piped a line a change."""
    from rich.console import Console

    from ftgen.follow import Follower
    from ftgen.watch import watch

    watch(Follower(logs), every, Console(highlight=False, emoji=False, markup=False), click.echo)


@contextmanager
def _usage() -> Iterator[None]:
    """What is wrong inside is wrong in how ftgen was called."""
    try:
        yield
    except UserError as error:
        raise click.UsageError(str(error)) from None


def _baseline(name: str | None, tolerance: str) -> Baseline | None:
    from ftgen.baseline import read_baseline
    from ftgen.compare import read_tolerance

    with _usage():
        allowed = read_tolerance(tolerance)
    return read_baseline(name, allowed) if name else None


def _summaries(logs: tuple[Path, ...], window: str | None) -> list[Summary]:
    from ftgen.progress import reading
    from ftgen.runs import find_folders
    from ftgen.summaries import summarize_all
    from ftgen.units import clean

    steps = _window(window)
    folders = find_folders(logs, lambda text: click.echo(clean(text), err=True))
    with reading() as (found, read):
        return summarize_all(map(found, folders), window=steps, progress=read)


def _window(text: str | None) -> Window | None:
    from ftgen.window import read_window

    with _usage():
        return read_window(text) if text else None


def main() -> None:
    """The process: one command, its exit code."""
    try:
        ftgen.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except UserError as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except Exception:
        traceback.print_exc()
        click.echo(f"This is a bug of ftgen {__version__}: please report it with the lines above.", err=True)
        sys.exit(3)
