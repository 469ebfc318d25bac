"""Tells the file of an image from a name in a registry, and writes the name as each program wants it.

In: `python.kind`, and an image as people write it (`str`). Out: the image for pyxis, enroot or apptainer (`str`). Pure.

pyxis takes an image that begins with `.` or `/` for a file, and all others for a name (pyxis_slurmstepd.c, release 0.24). It
separates the registry from the name with `#`; without `#`, it asks Docker Hub. apptainer wants docker://REGISTRY/NAME:TAG.
"""

SUFFIXES = (".sqsh", ".squashfs", ".sqfs", ".sif", ".img")
# Sources without "//" that apptainer knows (its manual, "Support for Docker and OCI Containers").
WITHOUT_SLASHES = ("docker-daemon:", "docker-archive:", "oci:", "oci-archive:")


def is_file(image: str) -> bool:
    """Whether the image is the whole path of a file. A variable of the job may begin it."""
    return image.startswith(("/", "~", "$"))


def is_relative(image: str) -> bool:
    """Whether the image looks like a file in an unknown folder."""
    return image.startswith(".") or (not is_file(image) and "://" not in image and image.endswith(SUFFIXES))


def image_for(kind: str, image: str) -> str:
    """The image as pyxis (kind "container") or apptainer wants it: a path, or a name."""
    scheme, _, name = image.rpartition("://")
    if is_file(image) or scheme not in ("", "docker") or image.startswith(WITHOUT_SLASHES):
        return image
    if kind != "container":
        return f"docker://{name.replace('#', '/', 1)}"
    registry, slash, rest = name.partition("/")
    return f"{registry}#{rest}" if slash and _is_host(registry) and "#" not in name else name


def import_name(kind: str, image: str) -> str:
    """The image as `enroot import` (kind "container") or `apptainer pull` wants it: with the scheme docker://."""
    name = image_for(kind, image)
    return name if is_file(name) or "://" in name else f"docker://{name}"


def _is_host(text: str) -> bool:
    """Whether this part of a name is a registry. This is Docker's own rule: nvidia/cuda has no registry."""
    return "." in text or ":" in text or text.rpartition("@")[2] == "localhost"
