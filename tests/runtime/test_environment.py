"""What a job says of its surroundings reaches the report."""

from ftgen.logs.failures import find
from runtime.job import environment


def test_the_environment_is_one_line_that_the_reader_of_logs_understands(capsys, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", 'node[1-2] "x"')
    environment.tell({"gpu": {"name": "cpu"}})
    (told,) = find(capsys.readouterr().out.encode())
    assert told.kind == "environment"
    facts = environment.found({"gpu": {"name": "cpu"}})
    assert facts["packages"]["torch"]
    assert facts["nodes"] == 'node[1-2] "x"'
    assert told.json.decode().startswith('{"python": ')


def test_one_rank_tells_for_all(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    environment.tell({"gpu": {"name": "cpu"}})
    assert capsys.readouterr().out == ""
