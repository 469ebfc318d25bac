"""The version of the rules that make figures from logs. In: ftgen's own files. Out: a hash.

Two ftgens with the same hash read the same figures in a log.
"""

from functools import cache
from hashlib import sha256
from pathlib import Path

FOLDER = Path(__file__).parents[1]
PARTS = ("logs/**/*.py", "results/*.py", "catalogue/*.toml", "catalogue/published/*.toml")


@cache
def rules() -> str:
    """The sha256 of the code that reads and judges logs, and of the catalogue."""
    digest = sha256()
    for path in sorted(path for part in PARTS for path in FOLDER.glob(part)):
        digest.update(f"{path.relative_to(FOLDER).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
