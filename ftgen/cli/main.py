"""The entry point of the command line: groups the commands, and turns errors into messages and exit codes.

In: the arguments of the process. Out: results on stdout, messages on stderr, an exit code: 0 success, 1 something that the
user must change, 2 wrong usage, 3 a bug of ftgen, 130 interrupted. Commands import other modules late, so --help is fast.
"""

import os
import sys
import traceback

import click

from ftgen import __version__
from ftgen.cli import compile as compile_
from ftgen.cli import (
    data,
    diff,
    doctor,
    history,
    import_env,
    plan,
    published,
    report,
    rerun,
    schema,
    seal,
    setup,
    tabulate,
    verify,
    watch,
)
from ftgen.cli import list as list_
from ftgen.errors import UserError

# otherwise pydantic searches every installed package for plug-ins; ftgen has none
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

SECTIONS = {
    "Describe an experiment": (plan, data, list_, schema, import_env),
    "Compile and submit": (setup, doctor, compile_),
    "Read results": (watch, tabulate, report, history, published),
    "Share runs": (seal, verify, rerun, diff),
}


class Sections(click.Group):
    """A group whose help lists the commands in sections, each with the first line of its help."""

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections."""
        wide = max(len(name) for name in self.commands)
        for title, modules in SECTIONS.items():
            rows = [(f"{each.command.name:{wide}}", _first_line(each.command)) for each in modules]
            with formatter.section(title):
                formatter.write_dl(rows)


def _first_line(command: click.Command) -> str:
    return (command.help or "").partition("\n")[0].rstrip(".")


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def ftgen() -> None:
    """Compile specs of Llama fine-tunes to Slurm jobs, and read their logs into result tables.

    \b
      ftgen compile specs/lora_fp8_16.toml
      sbatch generated/*.sh
      ftgen tabulate logs/
    """


for _modules in SECTIONS.values():
    for _module in _modules:
        ftgen.add_command(_module.command)


def main() -> None:
    """Run one command and end the process with its exit code."""
    try:
        ftgen.main(prog_name="ftgen", standalone_mode=False)
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
        click.echo(f"This is a bug in ftgen {__version__}. Please report it with the lines above.", err=True)
        sys.exit(3)
