"""Stands in for the job's Python where Slurm's side or the guard's is the point: program.py ENTRYPOINT COMMAND.

The entrypoint, the checkpoint's code and the guard are the real ones; NeMo, the download and the training are not: they
write a line into $STAGE_PATH/events each and take a moment. Environment: what they do, as the constants below say.
"""

import ctypes
import os
import runpy
import signal
import socket
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

MODE = os.environ.get("PROGRAM_MODE", "")  # what a rank of the training does: see train
CONVERT_S = float(os.environ.get("PROGRAM_CONVERT_S", "0.3"))
TRAIN_S = float(os.environ.get("PROGRAM_TRAIN_S", "0.5"))
STAGE = Path(os.environ["STAGE_PATH"])
WEIGHTS = 3 << 20  # bytes: more than the guard's idea of a small file


def event(what: str) -> None:
    job, restart = os.environ.get("SLURM_JOB_ID", "-"), os.environ.get("SLURM_RESTART_COUNT", "0")
    line = f"{time.time():.3f} {what} {job}/{restart} {socket.gethostname()}\n"
    with (STAGE / "events").open("a") as file:
        file.write(line)


NO_TENSORS = "\x02\0\0\0\0\0\0\0{}"  # a file of safetensors: the length of its header, and an empty header


def fetch(_repository: object, _script: str) -> Path:
    event("download")
    folder = STAGE / "HF_ckpt" / "downloaded"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": NO_TENSORS}.items():
        (folder / name).write_text(text)
    return folder


def import_directory(_source: Path, output: Path, _scratch: Path) -> str:
    event("converting")
    for name in ("context", "weights"):
        (output / name).mkdir(parents=True)
        (output / name / "half").write_bytes(b"1" * WEIGHTS)
        time.sleep(CONVERT_S / 2)
    (output / "weights" / "last").write_bytes(b"2" * WEIGHTS)
    event("converted")
    return "none"


def check(plan: dict) -> int:
    event("check")
    time.sleep(float(os.environ.get("PROGRAM_CHECK_S", "0")))
    return 0


def train(plan: dict) -> int:
    """One rank: says where it stands, and that it may trust every byte of the checkpoint."""
    from runtime.engines.nemo import convert
    from runtime.guard import manifest
    from runtime.node import beside, telemetry

    if MODE == "sampled":
        telemetry.begin(plan)
    with beside.checked(plan):
        pass
    flaw = manifest.flaw(convert.directory(plan), convert.source(plan), thorough=True)
    env, rank = os.environ, int(os.environ["RANK"])
    place = " ".join(env.get(n, "-") for n in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"))
    gpus = len(env.get("CUDA_VISIBLE_DEVICES", "").split(","))
    print(f"rank {rank}: {place} {env['MASTER_PORT']} {socket.gethostname()} {gpus}", flush=True)
    for name in env.get("PROGRAM_SHOW", "").split():
        print(f"rank {rank} has {name}={env.get(name)}", flush=True)
    event(f"train:{rank}:{'trusted' if flaw is None else 'PARTIAL'}")
    if MODE in {"save", "deaf"}:
        return save(plan, rank)
    if MODE == "status" and rank == 3:
        time.sleep(TRAIN_S)
        return 42
    if MODE == "segfault" and rank == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if MODE == "raise":
        raise RuntimeError(f"CUDA error on device {rank}")
    if MODE == "locked":
        ctypes.PyDLL(None).sleep(int(TRAIN_S))  # in C, without releasing Python's lock
    time.sleep(60 if MODE in {"status", "segfault"} and int(env["WORLD_SIZE"]) > 3 else TRAIN_S)
    event(f"trained:{rank}")
    return 0


def started_with(name: str) -> str:
    """The value of a variable when this process started, which the loader has seen."""
    pairs = (pair.partition(b"=") for pair in Path("/proc/self/environ").read_bytes().split(b"\0"))
    return next((value.decode() for key, _, value in pairs if key.decode() == name), "")


def save(plan: dict, rank: int) -> int:
    """Steps of a tenth of a second, saved as the plan asks with the job's own guard. "deaf": it does not stop when asked."""
    from runtime.guard import checkpoints
    from runtime.job import stop

    stop.listen(signal.SIGUSR1, signal.SIGTERM)
    folder = checkpoints.folder_of_run()
    claim = checkpoints.own(folder) if rank == 0 else None
    resumed = checkpoints.newest(folder)
    first = resumed.step if resumed else 0
    event(f"resumed:{rank}:{first}")
    for step in range(first + 1, plan["max_steps"] + 1):
        time.sleep(0.1)
        asked = stop.asked() if MODE == "save" else ""
        if claim and (asked or step % plan["save"]["every_steps"] == 0 or step == plan["max_steps"]):
            weights = checkpoints.staging(folder, step, claim.generation) / "weights"
            weights.mkdir(parents=True)
            (weights / "all").write_text("weights")
            checkpoints.publish_step(folder, step, claim.generation, checkpoints.about(plan, [], {}))
        if asked:
            event(f"stopped:{rank}:{step}:{asked}")
            return stop.AGAIN
    event(f"trained:{rank}")
    return 0


def replace(package: types.ModuleType, name: str, function: Callable) -> None:
    """Put a module with only this function in the place of `name` of the package."""
    module = types.ModuleType(f"{package.__name__}.{name}")
    setattr(module, function.__name__, function)
    sys.modules[module.__name__] = module
    setattr(package, name, module)


def main() -> None:
    entrypoint = sys.argv[1]
    os.environ["PROGRAM_STARTED_WITH"] = started_with("LD_LIBRARY_PATH")
    sys.path.insert(0, str(Path(entrypoint).parent))
    from runtime.engines import nemo
    from runtime.hub import fetch as hub

    hub.fetch = fetch
    hub.bytes_to_download = lambda *_: 0
    replace(sys.modules["runtime"], "check", check)
    replace(nemo, "importer", import_directory)
    replace(nemo, "train", train)
    sys.argv = sys.argv[1:]
    runpy.run_path(entrypoint, run_name="__main__")


if __name__ == "__main__":
    main()
