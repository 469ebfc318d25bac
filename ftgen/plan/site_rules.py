"""Checks the rules of a site profile: its Python and images, its memory, the commands that a job runs.

In: a `Site`, and the number of nodes of a run. Out: `Problem`s, whose keys begin with `site`. Pure.
"""

import re
from collections.abc import Iterator

from ftgen import catalogue
from ftgen.errors import KeyPath, Problem, quoted
from ftgen.plan.images import is_file, is_relative
from ftgen.secret import is_secret
from ftgen.spec.site import Site

IN_AN_IMAGE = ("container", "apptainer", "singularity")
PLACEHOLDER = r"\{(?:rank|local_rank|node_rank)(?://[1-9][0-9]*)?\}"
MEMORY_KEYS = ("mem", "mem_per_cpu", "mem_per_gpu")


def site_problems(site: Site, nodes: int, engine: str) -> Iterator[Problem]:
    """Every broken rule of a site profile, for a run of the engine on `nodes` nodes."""
    yield from _python(site)
    yield from _images(site)
    yield from _unfit_images(site, engine)
    yield from _memory(site)
    yield from _resources(site, nodes)
    yield from _commands(site)
    yield from _folders(site)
    yield from _price(site)


def _python(site: Site) -> Iterator[Problem]:
    python = site.python
    in_image = python.kind in IN_AN_IMAGE
    if in_image and not python.image:
        yield Problem(("site", "python", "image"), f'is required for python.kind = "{python.kind}"')
    if python.kind == "venv" and not python.path:
        yield Problem(("site", "python", "path"), 'is required for python.kind = "venv"')
    for key in ("image", "image_from", "image_fits", "mounts", "writable", "mount_home"):
        if getattr(python, key) and not in_image:
            rule = f'requires python.kind = "container", "apptainer" or "singularity", found "{python.kind}"'
            yield Problem(("site", "python", key), rule)
    for key in ("container_name", "container_env"):
        if getattr(python, key) and python.kind != "container":
            yield Problem(("site", "python", key), f'requires python.kind = "container", found "{python.kind}"')
    for number, name in enumerate(python.container_env):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield Problem(
                ("site", "python", "container_env", number), f"must be the name of a variable, found {quoted(name)}"
            )


def _images(site: Site) -> Iterator[Problem]:
    image = site.python.image
    if image and is_relative(image):
        where: KeyPath = ("site", "python", "image")
        hint = f"write the whole path, such as $STAGE_PATH/{image.removeprefix('./')}"
        yield Problem(where, f"must be a whole path or a name in a registry, found {quoted(image)}", hint)
    elif site.python.image_from and not (image and is_file(image)):
        rule = f"requires python.image to be the path of a file, found {quoted(image) if image else 'none'}"
        yield Problem(("site", "python", "image_from"), rule, "set python.image to a file that ftgen setup can write")


def _unfit_images(site: Site, engine: str) -> Iterator[Problem]:
    """Images that are called after one without the engine. An image may have been changed, so the user has the last word."""
    if site.python.image_fits or site.python.kind not in IN_AN_IMAGE:
        return
    for key in ("image", "image_from"):
        if unfit := catalogue.why_unfit(getattr(site.python, key) or "", engine):
            rule, nearest = unfit
            own = "if this is an image of your own that has them, set python.image_fits = true"
            yield Problem(("site", "python", key), rule, f"use {nearest}; {own}")


def _memory(site: Site) -> Iterator[Problem]:
    said = [key for key in MEMORY_KEYS if getattr(site, key) is not None]
    for key in said[1:]:
        rule = f"must not be set with {said[0]}: Slurm takes only one of {', '.join(f'site.{each}' for each in MEMORY_KEYS)}"
        yield Problem(("site", key), rule, also=(("site", said[0]),))
    if site.mem_per_gpu and site.gpu_request == "none":
        rule = 'requires a gpu_request, found "none": without one, Slurm counts no GPUs'
        yield Problem(("site", "mem_per_gpu"), rule, 'set gpu_request = "gres"', also=(("site", "gpu_request"),))


def _resources(site: Site, nodes: int) -> Iterator[Problem]:
    for number, resource in enumerate(site.gres):
        if re.match(r"(gres[:/])?gpu\b", resource):
            where: KeyPath = ("site", "gres", number)
            yield Problem(where, f"must not request GPUs, found {resource}", 'set gpu_request = "gres"')
    segment = min(site.segment or nodes, nodes)
    if nodes % segment:
        below = nodes // segment * segment
        yield Problem(
            ("gpus",),
            f"must fill whole segments: {nodes} nodes are not a multiple of {segment} (site.segment)",
            f"use GPUs for {below} or {below + segment} nodes, or change site.segment",
            also=(("gpus_per_node",), ("site", "segment")),
        )


def _commands(site: Site) -> Iterator[Problem]:
    for key in ("setup_lines", "prefix"):
        for number, text in enumerate(getattr(site, key)):
            for name in filter(is_secret, re.findall(r"\b([A-Za-z_][A-Za-z0-9_]*)=['\"]?[^\s'\"$`]", text)):
                rule = f"must not have the value of {name}: its name looks like a secret"
                hint = f"export it in the shell that submits the job, or add to setup_lines: export {name}=$(cat FILE)"
                yield Problem(("site", key, number), rule, hint)
    for number, word in enumerate(site.prefix):
        left = re.sub(PLACEHOLDER, "", word)
        if "{" in left or "}" in left:
            hint = "use {rank}, {local_rank} or {node_rank}, or one of them divided by a number: {local_rank//4}"
            yield Problem(("site", "prefix", number), f"must not have other braces, found {quoted(word)}", hint)


def _price(site: Site) -> Iterator[Problem]:
    keys = ("price_per_gpu_hour", "currency")
    for key, other in (keys, keys[::-1]):
        if getattr(site, key) is None and getattr(site, other) is not None:
            yield Problem(("site", key), f"is required with site.{other}", also=(("site", other),))


def _folders(site: Site) -> Iterator[Problem]:
    folder = site.output_folder
    if folder is not None and (not folder or re.match("~", folder) or "$" in folder):
        rule = f"must be a folder without ~ and variables, which Slurm does not expand, found {quoted(folder)}"
        yield Problem(("site", "output_folder"), rule, "write the whole path; %u stands for the user")
    if site.stage_path and re.search(r"\$(STAGE_PATH\b|\{STAGE_PATH\})", site.stage_path):
        yield Problem(("site", "stage_path"), f"must not contain itself, found {quoted(site.stage_path)}")
