"""Stands in for nvidia-smi where there is no GPU: a node of H100s, in the forms that the manual of driver 580 gives.

    nvidia_smi.py [--query-gpu=... | --query-remapped-rows=... | nvlink --status | topo -m]

Environment: SMI_GPUS, their number; SMI_CHANGE, JSON with fields of single GPUs: {"3": {"pcie.link.width.current": "8"}}.
SMI_UNKNOWN, a field that this driver does not know. SMI_LINKS, the active links of GPU 0.
"""

import json
import os
import sys

HEALTHY = {
    "name": "NVIDIA H100 80GB HBM3",
    "driver_version": "580.159.04",
    "vbios_version": "96.00.89.00.01",
    "memory.total": "81559",
    "memory.used": "4",
    "ecc.mode.current": "Enabled",
    "ecc.errors.uncorrected.volatile.total": "0",
    "clocks.sm": "1755",
    "clocks.max.sm": "1980",
    "clocks_event_reasons.active": "0x0000000000000004",
    "clocks_throttle_reasons.active": "0x0000000000000000",
    "temperature.gpu": "58",
    "power.draw": "698.12",
    "power.limit": "700.00",
    "pcie.link.gen.current": "5",
    "pcie.link.gen.max": "5",
    "pcie.link.width.current": "16",
    "pcie.link.width.max": "16",
    "remapped_rows.pending": "No",
    "remapped_rows.failure": "No",
}


def main() -> int:
    words, gpus = sys.argv[1:], int(os.environ.get("SMI_GPUS", "8"))
    changes = json.loads(os.environ.get("SMI_CHANGE", "{}"))
    if words[:1] == ["nvlink"]:
        for number in range(gpus):
            print(f"GPU {number}: NVIDIA H100 80GB HBM3 (UUID: GPU-{number:08x})")
            active = int(os.environ.get("SMI_LINKS", "18")) if number == 0 else 18
            for link in range(18):
                print(f"\t Link {link}: {'26.562 GB/s' if link < active else '<inactive>'}")
        return 0
    (query,) = [word for word in words if word.startswith("--query")]
    fields = query.partition("=")[2].split(",")
    if (unknown := os.environ.get("SMI_UNKNOWN")) in fields:
        print(f'Field "{unknown}" is not a valid field to query.\n')
        return 2
    for number in range(gpus):
        own = {"index": str(number), "uuid": f"GPU-{number:08x}", "gpu_uuid": f"GPU-{number:08x}"}
        values = {**HEALTHY, **own, **changes.get(str(number), {})}
        print(", ".join(values[field] for field in fields))
    return 0


if __name__ == "__main__":
    sys.exit(main())
