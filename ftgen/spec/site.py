"""The cluster: what a job asks Slurm for and where its Python comes from. In: a document. Out: a frozen `Site`."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from ftgen.spec.spec import Environment, OneLine, Positive, Table, Walltime

# What stands in a #SBATCH line: one word, no quotes, nothing that could begin another option.
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.,:&|()\[\]*/%+@=-]+$")]


class Python(Table):
    """How the job's Python comes to be."""

    kind: Literal["none", "venv", "container", "apptainer"] = Field(
        "none",
        description='"none": the python3 of the shell that submits, or the one named by `path`; '
        '"venv": a virtual environment; "container": an image, run by pyxis; "apptainer": an image, run by apptainer.',
    )
    path: OneLine | None = Field(
        None, description="The interpreter (none), the environment's folder (venv); $STAGE_PATH is understood."
    )
    image: OneLine | None = Field(
        None,
        description="For pyxis a .sqsh file (with a slash) or registry#image:tag, for apptainer a .sif file; "
        "$STAGE_PATH is understood.",
    )
    mounts: list[OneLine] = Field([], description="SRC:DST for the image, beside STAGE_PATH and shared_paths.")
    image_from: OneLine | None = Field(
        None, description="What `ftgen setup` makes the image file of, such as docker://nvcr.io#nvidia/nemo:24.12."
    )
    writable: bool = Field(False, description="Let the job write into the image's file system; lost when it ends.")
    mount_home: bool = Field(False, description="Mount the home directory into the image.")


class Site(Table):
    """A cluster, as its users would describe it to each other."""

    partition: Word | None = Field(None, description="Default: the submitting shell's SBATCH_PARTITION.")
    account: Word | None = Field(None, description="Default: the submitting shell's SBATCH_ACCOUNT.")
    qos: Word | None = Field(None, description="Quality of service.")
    reservation: Word | None = Field(None, description="Reservation.")
    constraint: Word | None = Field(None, description="Node features.")
    gpus_per_node: Positive = Field(8, description="GPUs of a node.")
    gpu_request: Literal["none", "gres", "gpus-per-node"] = Field(
        "none", description="How GPUs are asked for: not at all (whole nodes), --gres=gpu:N, or --gpus-per-node=N."
    )
    gpu_type: Word | None = Field(None, description="Type in that request, as in --gres=gpu:TYPE:N.")
    max_nodes: Positive | None = Field(None, description="The largest job that the partition takes, in nodes.")
    max_walltime: Walltime | None = Field(None, description="The longest job that the partition takes.")
    mpi: Word = Field("pmix", description="srun's --mpi.")
    exclusive: bool = Field(True, description="Ask for whole nodes.")
    mem: Word | None = Field("0", description="Memory of a node; 0 is all of it.")
    requeue: bool | None = Field(
        None, description="Run a job again that its node's failure or a pre-emption ended. Default: as Slurm is set up."
    )
    end_before_limit_s: Positive = Field(
        120, description="Seconds before the time limit at which a job ends itself; at most a quarter of it."
    )
    convert: Literal["job", "task"] = Field(
        "job",
        description='Where a checkpoint is made that is not there yet: "job", a job of one task, which the run waits for '
        'outside; "task", one task of the run itself, before it trains.',
    )
    convert_flags: list[Word] = Field(
        [], description="Further sbatch options of that job, over all others, such as --partition=cpu."
    )
    sbatch_flags: list[Word] = Field([], description="Further #SBATCH options, each a word such as --comment=x.")
    srun_flags: list[OneLine] = Field([], description="Further srun options.")
    modules: list[OneLine] = Field([], description="Environment modules to load.")
    shared_paths: list[OneLine] = Field(
        [], description="Folders that jobs need beside STAGE_PATH, the same on every node; mounted into an image."
    )
    stage_path: OneLine | None = Field(
        None, description="STAGE_PATH where the submitting shell has none. Default: the directory it submits from."
    )
    python: Python = Field(default_factory=Python, description="Where the job's Python comes from.")
    environment: Environment = Field({}, description="Environment variables of every job at this site.")
    catalogue: OneLine | None = Field(
        None, min_length=1, description="A catalogue file of your own, relative to this one: [models.NAME], [gpus.NAME]."
    )
