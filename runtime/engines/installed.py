"""Find the packages that `import` would take, without importing them.

In: sys.path. Out: folders, versions.

It uses no other module of the runtime, because the set-up job contains its text.
"""

import importlib.util
import re
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path


def folder(package: str) -> Path | None:
    """The folder that `import` would take the package from. The package is not imported, but those around it are."""
    try:
        spec = importlib.util.find_spec(package)
    except ImportError:
        return None
    return next((Path(place) for place in spec.submodule_search_locations or ()), None) if spec else None


def release(package: Path) -> str:
    """The version in package_info.py, as NeMo and Megatron-Core have it; "" if there is no such file."""
    info = package / "package_info.py"
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    parts = [re.search(rf"^{key} = ['\"]?(\w*)", text, re.MULTILINE) for key in ("MAJOR", "MINOR", "PATCH", "PRE_RELEASE")]
    number = ".".join(part[1] for part in parts[:3] if part)
    return number + (parts[3][1] if parts[3] else "")


def named(name: str, package: Path) -> str:
    """The name with its version and its folder."""
    return " ".join(filter(None, (name, release(package), "in", str(package))))


def is_there(package: str) -> bool:
    """Whether `import` finds the package."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def version(package: str) -> str:
    """The version of a package, by the name that pip knows; "" if it is not installed."""
    try:
        return version_of(package)
    except PackageNotFoundError:
        return ""
