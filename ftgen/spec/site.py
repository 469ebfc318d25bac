"""Defines every key of a site profile: what a job requests from Slurm, and where its Python comes from.

In: a document (`dict[str, Any]`). Out: a frozen `Site`.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, StringConstraints, WithJsonSchema

from ftgen.errors import quoted
from ftgen.spec.spec import Environment, OneLine, Positive, Table, Walltime, is_one_line
from ftgen.validation import show

# A value in a #SBATCH line: one word without quotes and spaces, so that it cannot begin another option.
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.,:&|()\[\]*/%+@=-]+$")]
SIZE = r"^[0-9]+[KMGT]?$"
MEMORY = r"^(none|[0-9]+[KMGT]?)$"
EXPANDED = "~ and variables such as $HOME, $USER and $STAGE_PATH are expanded on the node."


def _size(text: str) -> str:
    if not re.fullmatch(SIZE, text):
        raise ValueError(f"must be a number of MB, or a number with K, M, G or T, found {quoted(text)}")
    return text


def _memory(text: str) -> str:
    if not re.fullmatch(MEMORY, text):
        raise ValueError(f'must be a number of MB, a number with K, M, G or T, or "none", found {quoted(text)}')
    return text


def _address(value: Any) -> str | list[str]:
    words = value if isinstance(value, list) else [value]
    good = words and all(isinstance(word, str) and is_one_line(word) for word in words) and words[0]
    if not good or (isinstance(value, str) and (re.search(r"\s", value) or value == "interface:")):
        rule = 'must be an address, interface:NAME, or a command as a list of words such as ["hostname", "-i"]'
        raise ValueError(f"{rule}, found {show(value)}")
    return words if isinstance(value, list) else str(value)


Size = Annotated[str, AfterValidator(_size), WithJsonSchema({"type": "string", "pattern": SIZE})]
Address = Annotated[
    str | list[str],
    PlainValidator(_address),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "pattern": r"^\S+$"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
    ),
]
Price = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Memory = Annotated[str, AfterValidator(_memory), WithJsonSchema({"type": "string", "pattern": MEMORY})]


class Python(Table):
    """Where the Python of the job comes from."""

    kind: Literal["none", "venv", "container", "apptainer", "singularity"] = Field(
        "none",
        description='"none": python3 of the submitting shell, or the interpreter at python.path. "venv": a virtual '
        'environment. "container": an image that pyxis runs. "apptainer" or "singularity": an image that this program runs.',
    )
    path: OneLine | None = Field(None, description=f'Interpreter for kind = "none", or folder for kind = "venv". {EXPANDED}')
    image: OneLine | None = Field(
        None,
        description="Image: the whole path of a file (.sqsh for pyxis, .sif for apptainer), or a name in a registry such as "
        f"nvcr.io/nvidia/nemo:24.12. ftgen writes the name as pyxis or apptainer wants it. {EXPANDED} A relative path is "
        "refused, because it would depend on the folder in which sbatch is called.",
    )
    image_fits: bool = Field(
        False,
        description="The image has the packages that a job needs, though its name is that of an image without them: for an "
        "image of your own. `ftgen list --images` says which images fit.",
    )
    mounts: list[OneLine] = Field([], description=f"More folders to mount into the image, as SRC:DST. {EXPANDED}")
    image_from: OneLine | None = Field(
        None, description="Image that `ftgen setup` imports into the image file, such as nvcr.io/nvidia/nemo:24.12."
    )
    writable: bool | None = Field(
        None,
        description="Let the job write into the image. The changes are lost at its end. Default: true for pyxis, because "
        "enroot mounts an image read-only unless the site changes that, and packages write beside their files; false for "
        "apptainer and singularity, whose --writable-tmpfs has room for only 64 MiB unless the site changes that.",
    )
    mount_home: bool = Field(False, description="Mount the home directory into the image.")
    container_name: bool = Field(
        False,
        description="pyxis: start the image once per job and node, and use it for all steps of the job (srun's option "
        "--container-name). Otherwise each step unpacks the image again. Only where pyxis is configured with "
        "container_scope=job: elsewhere the unpacked image stays on the node when the job has ended.",
    )
    container_env: list[OneLine] = Field(
        [],
        description="pyxis: names of variables of the job that replace those of the image before the image's entrypoint "
        "runs (srun's option --container-env). [environment] needs no entry here.",
    )


class NodeCheck(Table):
    """A short check of each node before the training: GPUs, their clocks and links, a GEMM, a copy, an all-reduce."""

    on: bool = Field(True, description="Check each node, while the training imports its packages. It takes seconds.")
    bad: Literal["warn", "stop"] = Field(
        "warn",
        description='What becomes of a run with a node that is not well. "warn": it goes on, and the log, the verdict and '
        'the tables name the node. "stop": it ends before the first step.',
    )


class Site(Table):
    """A cluster: its Slurm options, its limits and its Python."""

    partition: Word | None = Field(None, description="Partition. Default: SBATCH_PARTITION of the submitting shell.")
    account: Word | None = Field(None, description="Account. Default: SBATCH_ACCOUNT of the submitting shell.")
    qos: Word | None = Field(None, description="Quality of service.")
    reservation: Word | None = Field(None, description="Reservation.")
    constraint: Word | None = Field(None, description="Node features.")
    gpus_per_node: Positive | None = Field(
        None, description="GPUs of each node. Default: that of the GPU in the catalogue, such as 8 for h100 and 4 for gb200."
    )
    gpu_request: Literal["none", "gres", "gpus-per-node"] = Field(
        "none", description="sbatch option that requests GPUs: none (whole nodes), --gres=gpu:N, or --gpus-per-node=N."
    )
    gpu_type: Word | None = Field(None, description="GPU type in that option, as in --gres=gpu:TYPE:N.")
    gres: list[Word] = Field([], description="Other generic resources of each node, such as nvme:1.")
    max_nodes: Positive | None = Field(None, description="Node limit of the partition.")
    max_walltime: Walltime | None = Field(None, description="Time limit of the partition, as [days-]hours:minutes:seconds.")
    segment: Positive | None = Field(
        None,
        description="Nodes of a segment, which Slurm places in one block, such as an NVL72 rack (--segment, with Slurm's "
        "topology/block). A job with fewer nodes is one segment.",
    )
    mpi: Word = Field("none", description="Value of srun's option --mpi. The ranks find each other without MPI.")
    exclusive: bool = Field(True, description="Request whole nodes. false: share nodes; then set cpus_per_gpu.")
    cpus_per_gpu: Positive | None = Field(
        None,
        description="CPUs of each GPU's task (--cpus-per-task). Default: all CPUs of whole nodes; with exclusive = false, "
        "as many as Slurm gives, often one.",
    )
    mem: Memory | None = Field(
        None,
        description='Memory of each node: MB, or a number with K, M, G or T. "0" requests all memory of the node. "none" '
        'requests nothing. Default: "0" for whole nodes, "none" with exclusive = false.',
    )
    mem_per_cpu: Size | None = Field(None, description="Memory of each CPU (--mem-per-cpu), instead of mem.")
    mem_per_gpu: Size | None = Field(
        None, description="Memory of each GPU (--mem-per-gpu), instead of mem. Needs a gpu_request."
    )
    requeue: bool | None = Field(
        None, description="Run a job again after a node failure or a pre-emption. Default: Slurm's configuration."
    )
    end_before_limit_s: Positive = Field(
        120,
        description="A job ends itself this many seconds before its time limit, or at 3/4 of it if that is later. "
        "With [save], the default is longer by the time that a save takes at 1 GB/s.",
    )
    convert: Literal["job", "task"] = Field(
        "job",
        description='What converts a missing checkpoint. "job": a job of one task; the run waits for it in the queue. '
        '"task": one task of the run, before the training.',
    )
    convert_flags: list[OneLine] = Field(
        [], description="More sbatch options of the conversion job, such as --partition=cpu. They override all others."
    )
    job_name_prefix: Word | None = Field(None, description="Text before the names of all jobs, such as myaccount-.")
    output_folder: OneLine | None = Field(
        None,
        description="Existing folder for Slurm's own output files sbatch_*.out. Slurm expands %u (user) and no variables. "
        "Default: the folder in which sbatch is called.",
    )
    sbatch_flags: list[OneLine] = Field(
        [], description="More #SBATCH options, as --name=value. ftgen quotes the value, so it can be JSON or have spaces."
    )
    srun_flags: list[OneLine] = Field([], description="More srun options.")
    modules: list[OneLine] = Field([], description="Environment modules to load.")
    setup_lines: list[OneLine] = Field(
        [],
        description="Lines of bash to run before Python, after the modules are loaded, such as source /opt/site/nccl.sh. "
        "They run in a bash of their own. The job takes over the environment, the limits and the umask that they leave. A "
        "line that fails ends the job: append || true where that is wrong.",
    )
    prefix: list[OneLine] = Field(
        [],
        description="Words of a command to start Python with in each task of the training, such as numactl and "
        "--cpunodebind={local_rank//4}. {rank}, {local_rank} and {node_rank} are replaced, also divided by a number.",
    )
    master_addr: Address | None = Field(
        None,
        description="Address of the first node for the other nodes: a name or an address, interface:NAME for the address of "
        "a network interface, or a list of words to run that prints it. Default: the name of the first node.",
    )
    shared_paths: list[OneLine] = Field(
        [],
        description=f"Shared folders that jobs need in addition to STAGE_PATH. They are mounted into an image. {EXPANDED}",
    )
    stage_path: OneLine | None = Field(
        None,
        description="STAGE_PATH if the submitting shell does not set it. ~ and variables such as $HOME and $USER are "
        "expanded on the node. Default: the directory of the submission.",
    )
    python: Python = Field(default_factory=Python, description="Where the Python of the job comes from.")
    telemetry: bool = Field(
        True,
        description="Record power, energy, clocks, throttling, temperature and memory of each GPU once a second, in "
        "telemetry.NODE.jsonl beside the log. The tables then have the energy of a token.",
    )
    price_per_gpu_hour: Price | None = Field(
        None, description="Price of one GPU for an hour. The tables and `ftgen plan` then have the cost of a run."
    )
    currency: Word | None = Field(None, description="Currency of price_per_gpu_hour, such as EUR.")
    node_check: NodeCheck = Field(default_factory=NodeCheck, description="A check of each node before the training.")
    environment: Environment = Field(
        {},
        description="Environment variables of all jobs at this site. $NAME and ${NAME} stand for variables of the job, as "
        'in "/opt/x/lib:$LD_LIBRARY_PATH", and $$ for a dollar. Nothing else is expanded.',
    )
    catalogue: OneLine | None = Field(
        None, min_length=1, description="Path of a user catalogue, relative to this file: [models.NAME], [gpus.NAME]."
    )
