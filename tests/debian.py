"""Debian programs that tests need: installed when they are missing and may be, else the test is skipped and says so."""

import os
import shutil
import subprocess
from functools import cache

import pytest

APT = ("apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300")


@cache
def program(name: str, *packages: str) -> str:
    """The program's path; `packages` bring it."""
    if not shutil.which(name) and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run([*APT, "update"], check=True, capture_output=True, timeout=300)
        install = [*APT, "install", "--no-install-recommends", *packages]
        subprocess.run(install, check=True, capture_output=True, timeout=900, env=environment)
    found = shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not there: apt-get install {' '.join(packages)}")
    return found
