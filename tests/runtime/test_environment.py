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


def test_another_cudnn_than_that_of_pytorch_is_told_and_ends_nothing(capsys, monkeypatch):
    """As PyTorch 2.11 said it on an H100 whose system has an older cuDNN."""

    def refuse() -> None:
        raise RuntimeError(
            "cuDNN version incompatibility: PyTorch was compiled  against (9, 19, 0) but found runtime version (9, 14, 0). "
            "PyTorch already comes bundled with cuDNN."
        )

    monkeypatch.setattr("torch.backends.cudnn.version", refuse)
    assert environment._cudnn() is None
    said = "PyTorch was compiled  against (9, 19, 0) but found runtime version (9, 14, 0)\n"
    assert capsys.readouterr().err == f"ftgen: warning: cuDNN version incompatibility: {said}"
