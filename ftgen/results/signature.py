"""Signs a manifest with an SSH key, and checks such a signature, by `ssh-keygen -Y`.

In: the path of the manifest. Out: `manifest.json.sig` beside it; or who signed it. LogError: what ssh-keygen says.
"""

import subprocess
from pathlib import Path

from ftgen.errors import LogError, Problem

NAMESPACE = "ftgen"  # what the signature is for, so that none for another purpose counts


def sign(manifest: Path, key: Path) -> None:
    """Write the signature beside the manifest. ssh-keygen asks for the key's passphrase if it has one."""
    _ssh_keygen("sign", "-f", str(key), "-n", NAMESPACE, str(manifest), what=f"{key} cannot sign")


def signer(manifest: Path, signers: Path) -> str:
    """Who signed the manifest, by a file of allowed signers (ssh-keygen(1), ALLOWED SIGNERS). LogError: nobody in it did."""
    signature = f"{manifest}.sig"
    refused = f"the signature is of nobody in {signers}"
    said = _ssh_keygen("find-principals", "-s", signature, "-f", str(signers), what=refused)
    (name, *_) = said.splitlines() or [""]
    words = ["verify", "-f", str(signers), "-I", name, "-n", NAMESPACE, "-s", signature]
    _ssh_keygen(*words, what="the signature does not fit", stdin=manifest)
    return name


def fits(manifest: Path) -> str:
    """The key that signed this manifest, whoever has it. LogError: the signature is of another manifest."""
    words = ["check-novalidate", "-n", NAMESPACE, "-s", f"{manifest}.sig"]
    said = _ssh_keygen(*words, what="the signature does not fit", stdin=manifest)
    return said.partition(" key ")[2].strip() or said.strip()


def _ssh_keygen(*words: str, what: str, stdin: Path | None = None) -> str:
    try:
        done = subprocess.run(
            ["ssh-keygen", "-Y", *words], input=stdin.read_bytes() if stdin else None, capture_output=True, check=False
        )
    except FileNotFoundError:
        hint = "install OpenSSH 8.2 or later, or leave the signature out"
        raise LogError(Problem((), f"{what}: ssh-keygen is not installed", hint)) from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).decode(errors="replace").split())
        raise LogError(Problem((), f"{what}: {said}"))
    return done.stdout.decode(errors="replace")
