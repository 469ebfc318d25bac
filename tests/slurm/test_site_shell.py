"""What a site runs and sets before Python: modules, lines of a shell, variables that extend what is there."""

import re

import pytest
from cluster import SITE, Desk

TASK = 'convert = "task"\n'

# A file as sites have it: it reads what is not set, fails in between, and uses names that the job's script has too.
SITE_FILE = """\
export FROM_FILE=${NOT_SET_ANYWHERE}x
false
name=other nodes=99 tasks=0 step=7 log=/nowhere code=/nowhere python=none children=x
say() { echo "the file's own say"; }
die() { exit 99; }
srun_flags=--nonsense
trap 'echo the file has a trap' EXIT USR1
set -euxo pipefail
IFS=:
declare -x DECLARED="two  words"
export LINES_OF_TEXT='first
second'
unset TO_BE_UNSET
ulimit -c 0
ulimit -n 200
umask 027
(exec -a ftgen-test-daemon sleep 300) &
"""


def run(desk: Desk, site: str, gpus: int = 1, extra: str = "", **environment: str) -> int:
    job = desk.submit(desk.compile("spec", gpus=gpus, site=TASK + site, extra=extra), **environment)
    assert desk.ended(job, 90).state == "COMPLETED", desk.everything()
    return job


def test_lines_of_the_site_run_in_a_shell_of_their_own_and_the_job_takes_over_what_they_leave(desk):
    (desk.folder / "site.sh").write_text(SITE_FILE)
    lines = [f"source {desk.folder}/site.sh", 'export LATER="$DECLARED, $(echo run)"; echo "said by a line"']
    names = "FROM_FILE DECLARED LATER TO_BE_UNSET HOME"
    job = run(
        desk,
        f"setup_lines = {lines}\n".replace("'source", '"source').replace("site.sh'", 'site.sh"'),
        2,
        PROGRAM_SHOW=names,
        TO_BE_UNSET="x",
    )
    assert desk.shown(job, "FROM_FILE") == ["x", "x"]
    assert desk.shown(job, "DECLARED") == ["two  words"] * 2
    assert desk.shown(job, "LATER") == ["two  words, run"] * 2
    assert desk.shown(job, "TO_BE_UNSET") == ["None"] * 2
    log = desk.log(job)
    assert "\nsaid by a line\n" in log
    assert log.endswith("ftgen: exit status 0\n")  # by the script's own function, in its own trap
    plan = next(desk.stage.glob("logs/experiments/*/*/*/plan.json"))
    assert plan.stat().st_mode & 0o777 == 0o644  # written before the lines ran
    assert (desk.stage / "HF_ckpt/models").stat().st_mode & 0o777 == 0o750  # written after them
    assert "DUE TO" not in log


def test_limits_that_the_lines_set_hold_in_the_tasks(desk):
    desk.python.write_text("#!/bin/bash\n[ $2 = finetune ] && echo limits $(ulimit -n) $(ulimit -c)\nexit 0\n")
    job = run(desk, 'setup_lines = ["ulimit -n 300", "ulimit -c 0"]\n', 2)
    assert desk.log(job).count("limits 300 0\n") == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("source /no/such/file.sh", "/no/such/file.sh: No such file or directory"),
        ("no-such-command --flag", "no-such-command: command not found"),
        ("exit 3", ""),
        ("echo ${X", "unexpected EOF"),
        ("[ -e /no/such/file ] && echo found", ""),
    ],
)
def test_a_line_that_fails_ends_the_job_and_is_in_the_log_with_its_text(desk, line, said):
    script = desk.compile("spec", site=f"{TASK}setup_lines = ['true', '{line}', 'echo not this one']\n")
    job = desk.submit(script)
    assert desk.ended(job).exit_code == 1
    log = desk.log(job)
    assert f"ftgen: error: this line of the site profile failed: {line}\n  hint: correct it, or append || true to it" in log
    assert said in log
    assert "not this one\n" not in log.partition("\n")[2]
    assert not desk.events("check")


def test_a_line_may_fail_if_the_site_says_so(desk):
    run(desk, "setup_lines = ['[ -e /no/such/file ] && echo found || true']\n")


def test_modules_are_loaded_before_the_lines_by_the_function_of_the_site(desk):
    """There are no environment modules here: a function of a shell, as BASH_ENV defines it on clusters."""
    file = desk.folder / "init.sh"
    file.write_text('module() { export LOADED="${LOADED}[$1 $2]"; [ "$2" != missing ]; }\n')
    site = 'modules = ["cuda/12.4", "it\'s new"]\nsetup_lines = [\'export SEEN="$LOADED"\']\n'
    job = run(desk, site, PROGRAM_SHOW="SEEN", BASH_ENV=str(file))
    assert desk.shown(job, "SEEN") == ["[load cuda/12.4][load it's new]"]
    script = desk.compile("spec", site=f'{TASK}modules = ["missing"]\n')
    job = desk.submit(script, BASH_ENV=str(file))
    assert desk.ended(job).exit_code == 1
    assert "ftgen: error: this line of the site profile failed: module load missing\n" in desk.log(job)


CHAIN = """\
setup_lines = ['export MINE="${MINE}:line"']
[environment]
LD_LIBRARY_PATH = "/opt/amazon/ofi-nccl/lib:$LD_LIBRARY_PATH"
OF_BOTH = "${BASE}/x$MINE"
"""


def test_a_search_path_is_extended_once_in_the_job_and_in_the_jobs_after_it(desk):
    """The chain has a conversion job and two runs, which inherit the environment of the one before."""
    scripts = [desk.compile(name, site=SITE + CHAIN) for name in ("a", "b")]
    shown = {"PROGRAM_SHOW": "LD_LIBRARY_PATH OF_BOTH", "PROGRAM_TRAIN_S": "0"}
    desk.submit(*scripts, LD_LIBRARY_PATH="/usr/x", BASE="/base", **shown)
    desk.quiet(120)
    logs = "".join(path.read_text() for path in desk.stage.rglob("log-*.out"))
    seen = re.findall(r"rank 0 has (LD_LIBRARY_PATH|OF_BOTH)=(.*)", logs)
    assert sorted(seen) == [("LD_LIBRARY_PATH", "/opt/amazon/ofi-nccl/lib:/usr/x")] * 2 + [("OF_BOTH", "/base/x:line")] * 2


HOSTILE = {
    "$(touch pwned)": "$(touch pwned)",
    "`touch pwned`": "`touch pwned`",
    "'; touch pwned; '": "'; touch pwned; '",
    '"; touch pwned; "': '"; touch pwned; "',
    "\\$A \\\\ \\": "\\/a \\\\ \\",
    "$((1 + 1)) $[1+1] ${} $ $1 $@ $- $?": "$((1 + 1)) $[1+1] ${} $ $1 $@ $- $?",
    "$$ $$A $$$A ${A}$A": "$ $A $/a /a/a",
    "$name $log $RANDOM $PATH_OF_NOBODY": "   ",  # variables of the shell are not of the environment
    "* ? ~ ! {a,b} <(id) & | > x": "* ? ~ ! {a,b} <(id) & | > x",
    "$EVIL": "$(touch pwned) `touch pwned` ' \" \\",
    "größer ≥ $A": "größer ≥ /a",
    "a:$UNSET:b::$A:": "a:b::/a:",
    "$UNSET:/b": "/b",
    "/b:$UNSET": "/b",
    "$UNSET$EMPTY:${UNSET}": "",
}


def test_a_value_has_nothing_executed_and_no_empty_element_of_an_unset_variable(desk):
    table = "".join(f"V_{n} = '''{text}'''\n" for n, text in enumerate(HOSTILE) if "'" not in text)
    table += "".join(f"V_{n} = {_basic(text)}\n" for n, text in enumerate(HOSTILE) if "'" in text)
    environment = {"A": "/a", "EMPTY": "", "EVIL": "$(touch pwned) `touch pwned` ' \" \\"}
    names = " ".join(f"V_{n}" for n in range(len(HOSTILE)))
    job = run(desk, SITE + f"[environment]\n{table}", PROGRAM_SHOW=names, **environment)
    seen = {text: desk.shown(job, f"V_{n}") for n, text in enumerate(HOSTILE)}
    assert seen == {text: [value] for text, value in HOSTILE.items()}
    assert not list(desk.folder.rglob("pwned"))
    log = desk.log(job)
    assert "ftgen: warning: V_12 refers to $UNSET, which is not set\n" in log
    assert "refers to $A," not in log


def _basic(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@pytest.mark.parametrize(("before", "after"), [("/usr/x", "/opt/x:/usr/x"), ("", "/opt/x")])
def test_the_loader_sees_the_search_path_from_the_start(desk, before, after):
    """Python is started with it: what os.environ says later makes no difference to the loader."""
    extra = 'environment = { LD_LIBRARY_PATH = "/opt/x:$LD_LIBRARY_PATH" }\n'
    job = run(desk, "", extra=extra, PROGRAM_SHOW="LD_LIBRARY_PATH PROGRAM_STARTED_WITH", LD_LIBRARY_PATH=before)
    assert desk.shown(job, "LD_LIBRARY_PATH") == [after]
    assert desk.shown(job, "PROGRAM_STARTED_WITH") == [after]
