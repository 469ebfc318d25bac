"""Ask nvidia-smi for the state of this node's GPUs.

In: the names of fields. Out: a dictionary of texts for each GPU. A field that a driver does not know is left out, and a
value that it does not have, such as [N/A], is None.

Environment: CUDA_VISIBLE_DEVICES, the GPUs that this process may use.
"""

import os
import re
import subprocess
from collections.abc import Sequence

Gpu = dict[str, str | None]
LONGEST_S = 20
IDENTITY = ("index", "uuid", "name", "driver_version", "vbios_version")
AT_REST = ("memory.total", "memory.used", "ecc.mode.current", "ecc.errors.uncorrected.volatile.total")
REMAPPED = ("remapped_rows.pending", "remapped_rows.failure")
AT_WORK = (
    "clocks.sm",
    "clocks.max.sm",
    "clocks_event_reasons.active",
    "temperature.gpu",
    "power.draw",
    "power.limit",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
)
FORMER_NAMES = {"clocks_event_reasons.active": "clocks_throttle_reasons.active"}  # before driver 535
UNKNOWN_FIELD = re.compile(r'Field "([^"]+)" is not a valid field')
LINK = re.compile(r"^\s*Link (\d+): (?:<inactive>|([\d.]+) GB/s)", re.MULTILINE)


class SmiError(Exception):
    """Why nvidia-smi says nothing."""


def query(fields: Sequence[str]) -> list[Gpu]:
    """The fields of each GPU that this process may use, in the order of their numbers. SmiError."""
    asked = list(fields)
    while asked:
        code, said = _nvidia_smi(f"--query-gpu={','.join((*IDENTITY, *asked))}", "--format=csv,noheader,nounits")
        if code == 0:
            return visible([rename(gpu) for gpu in parse(said, (*IDENTITY, *asked))])
        unknown = UNKNOWN_FIELD.search(said)
        if not unknown or unknown[1] not in asked:
            raise SmiError(_first_line(said) or f"exit code {code}")
        other = FORMER_NAMES.get(unknown[1])
        asked = [other if field == unknown[1] else field for field in asked if field != unknown[1] or other]  # type: ignore[misc]
    return []


def remapped_rows() -> list[Gpu]:
    """Whether memory rows of each GPU wait to be replaced, or could not be. Empty before Ampere."""
    code, said = _nvidia_smi(f"--query-remapped-rows=gpu_uuid,{','.join(REMAPPED)}", "--format=csv,noheader,nounits")
    return visible(parse(said, ("uuid", *REMAPPED))) if code == 0 else []


def nvlinks() -> list[list[float | None]]:
    """The speed of each NVLink of each GPU, in GB/s and one direction; None for one that is inactive."""
    code, said = _nvidia_smi("nvlink", "--status")
    return parse_nvlinks(said) if code == 0 else []


def parse(text: str, fields: Sequence[str]) -> list[Gpu]:
    """The lines of a CSV answer."""
    rows = ([word.strip() for word in line.split(", ")] for line in text.splitlines() if line.strip())
    return [
        {field: _value(word) for field, word in zip(fields, row, strict=False)} for row in rows if len(row) >= len(fields)
    ]


def parse_nvlinks(text: str) -> list[list[float | None]]:
    """`nvidia-smi nvlink --status`: a head for each GPU, then a line for each link."""
    parts = re.split(r"^GPU \d+: .*$", text, flags=re.MULTILINE)[1:]
    return [[float(speed) if speed else None for _, speed in LINK.findall(part)] for part in parts]


def rename(gpu: Gpu) -> Gpu:
    """Fields by their present names."""
    present = {former: name for name, former in FORMER_NAMES.items()}
    return {present.get(field, field): value for field, value in gpu.items()}


def visible(gpus: list[Gpu]) -> list[Gpu]:
    """The GPUs in CUDA_VISIBLE_DEVICES, by number or UUID. All of them if it is not set, or counts in another way."""
    words = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    chosen = [gpu for gpu in gpus if _is_named(gpu, words)]
    return chosen if words and len(chosen) == len(words) else gpus


def _is_named(gpu: Gpu, words: list[str]) -> bool:
    uuid = gpu.get("uuid") or "-"
    return gpu.get("index") in words or any(word.startswith("GPU-") and uuid.startswith(word) for word in words)


def _value(word: str) -> str | None:
    return None if word in {"", "N/A", "[N/A]", "[Not Supported]", "[Insufficient Permissions]"} else word


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _nvidia_smi(*words: str) -> tuple[int, str]:
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=LONGEST_S, check=False)
    except FileNotFoundError:
        raise SmiError("nvidia-smi is not installed here") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SmiError(f"nvidia-smi does not answer: {error}") from None
    return done.returncode, done.stdout + done.stderr
