"""Defines every key of a site profile: what a job requests from Slurm, and where its Python comes from.

In: a document (`dict[str, Any]`). Out: a frozen `Site`.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from ftgen.spec.spec import Environment, OneLine, Positive, Table, Walltime

# A value in a #SBATCH line: one word without quotes and spaces, so that it cannot begin another option.
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.,:&|()\[\]*/%+@=-]+$")]


class Python(Table):
    """Where the Python of the job comes from."""

    kind: Literal["none", "venv", "container", "apptainer"] = Field(
        "none",
        description='"none": python3 of the submitting shell, or the interpreter at python.path. "venv": a virtual '
        'environment. "container": an image that pyxis runs. "apptainer": an image that apptainer runs.',
    )
    path: OneLine | None = Field(
        None, description='Interpreter for kind = "none", or folder for kind = "venv". $STAGE_PATH is expanded.'
    )
    image: OneLine | None = Field(
        None,
        description="Image. pyxis: a .sqsh file (a path with a slash) or registry#image:tag. apptainer: a .sif file. "
        "$STAGE_PATH is expanded.",
    )
    mounts: list[OneLine] = Field([], description="More folders to mount into the image, as SRC:DST.")
    image_from: OneLine | None = Field(
        None, description="Image that `ftgen setup` imports into the image file, such as docker://nvcr.io#nvidia/nemo:24.12."
    )
    writable: bool = Field(False, description="Let the job write into the image. The changes are lost at its end.")
    mount_home: bool = Field(False, description="Mount the home directory into the image.")


class Site(Table):
    """A cluster: its Slurm options, its limits and its Python."""

    partition: Word | None = Field(None, description="Partition. Default: SBATCH_PARTITION of the submitting shell.")
    account: Word | None = Field(None, description="Account. Default: SBATCH_ACCOUNT of the submitting shell.")
    qos: Word | None = Field(None, description="Quality of service.")
    reservation: Word | None = Field(None, description="Reservation.")
    constraint: Word | None = Field(None, description="Node features.")
    gpus_per_node: Positive = Field(8, description="GPUs of each node.")
    gpu_request: Literal["none", "gres", "gpus-per-node"] = Field(
        "none", description="sbatch option that requests GPUs: none (whole nodes), --gres=gpu:N, or --gpus-per-node=N."
    )
    gpu_type: Word | None = Field(None, description="GPU type in that option, as in --gres=gpu:TYPE:N.")
    max_nodes: Positive | None = Field(None, description="Node limit of the partition.")
    max_walltime: Walltime | None = Field(None, description="Time limit of the partition, as [days-]hours:minutes:seconds.")
    mpi: Word = Field("pmix", description="Value of srun's option --mpi.")
    exclusive: bool = Field(True, description="Request whole nodes.")
    mem: Word | None = Field("0", description="Memory per node. 0 requests all memory of the node.")
    requeue: bool | None = Field(
        None, description="Run a job again after a node failure or a pre-emption. Default: Slurm's configuration."
    )
    end_before_limit_s: Positive = Field(
        120, description="A job ends itself this many seconds before its time limit, or at 3/4 of it if that is later."
    )
    convert: Literal["job", "task"] = Field(
        "job",
        description='What converts a missing checkpoint. "job": a job of one task; the run waits for it in the queue. '
        '"task": one task of the run, before the training.',
    )
    convert_flags: list[Word] = Field(
        [], description="More sbatch options of the conversion job, such as --partition=cpu. They override all others."
    )
    sbatch_flags: list[Word] = Field([], description="More #SBATCH options. Each is one word, such as --comment=x.")
    srun_flags: list[OneLine] = Field([], description="More srun options.")
    modules: list[OneLine] = Field([], description="Environment modules to load.")
    shared_paths: list[OneLine] = Field(
        [], description="Shared folders that jobs need in addition to STAGE_PATH. They are mounted into an image."
    )
    stage_path: OneLine | None = Field(
        None, description="STAGE_PATH if the submitting shell does not set it. Default: the directory of the submission."
    )
    python: Python = Field(default_factory=Python, description="Where the Python of the job comes from.")
    environment: Environment = Field({}, description="Environment variables of all jobs at this site.")
    catalogue: OneLine | None = Field(
        None, min_length=1, description="Path of a user catalogue, relative to this file: [models.NAME], [gpus.NAME]."
    )
