"""The cluster: what a job asks Slurm for and where its Python comes from. In: a document. Out: a frozen `Site`."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from ftgen.spec import Environment, OneLine, Positive, Table

# What stands in a #SBATCH line: one word, no quotes, nothing that could begin another option.
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.,:&|()\[\]*/%+@=-]+$")]


class Python(Table):
    """How the job's Python comes to be."""

    kind: Literal["path", "venv", "container"] = Field(
        "path",
        description='"path": the python3 of the shell that submits, or the one named by `path`; '
        '"venv": a virtual environment; "container": an image, run by pyxis.',
    )
    path: OneLine | None = Field(
        None, description="The interpreter (path), the environment's folder (venv); $STAGE_PATH is understood."
    )
    image: OneLine | None = Field(
        None,
        description="Image for pyxis: a .sqsh file (with a slash), or registry#image:tag; $STAGE_PATH is understood.",
    )
    mounts: list[OneLine] = Field([], description="SRC:DST for pyxis, beside STAGE_PATH, which is always mounted.")


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
    mpi: Word = Field("pmix", description="srun's --mpi.")
    exclusive: bool = Field(True, description="Ask for whole nodes.")
    mem: Word | None = Field("0", description="Memory of a node; 0 is all of it.")
    sbatch_flags: list[Word] = Field([], description="Further #SBATCH options, each a word such as --comment=x.")
    srun_flags: list[OneLine] = Field([], description="Further srun options.")
    modules: list[OneLine] = Field([], description="Environment modules to load.")
    stage_path: OneLine | None = Field(
        None, description="STAGE_PATH where the submitting shell has none. Default: the directory it submits from."
    )
    python: Python = Field(default_factory=Python, description="Where the job's Python comes from.")
    environment: Environment = Field({}, description="Environment variables of every job at this site.")
