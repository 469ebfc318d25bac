"""Ask NVML, the driver's library behind nvidia-smi, for the state of this node's GPUs.

In: nothing, or a GPU. Out: names, and the figures of FIGURES as numbers. None: a GPU or a driver does not have the figure.

Once a second, nvidia-smi would be too slow: each of its calls is a process. The names and numbers are those of nvml.h.
"""

import ctypes
from collections.abc import Callable
from typing import Any

LIBRARY = "libnvidia-ml.so.1"  # of the driver
LONGEST_TEXT = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE, and the size for UUIDs
NOT_FOUND = 13  # NVML_ERROR_FUNCTION_NOT_FOUND
SM, MEMORY = 1, 2  # nvmlClockType_t
ON_GPU = 0  # nvmlTemperatureSensors_t

Handle = ctypes.c_void_p
Figures = dict[str, float | int | None]


class NvmlError(Exception):
    """Why NVML says nothing."""


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class Nvml:
    """NVML, loaded and initialized. NvmlError: it is not there, or the driver does not answer."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise NvmlError(f"NVML cannot be loaded: {error}") from None
        self._must("nvmlInit_v2")

    def gpus(self) -> list[tuple[Handle, dict[str, str | None]]]:
        """Every GPU that this process may see, with its index, UUID and name."""
        count = ctypes.c_uint()
        self._must("nvmlDeviceGetCount_v2", ctypes.byref(count))
        found = []
        for index in range(count.value):
            gpu = Handle()
            self._must("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(gpu))
            uuid, name = (self._text(function, gpu) for function in ("nvmlDeviceGetUUID", "nvmlDeviceGetName"))
            found.append((gpu, {"index": str(index), "uuid": uuid, "name": name}))
        return found

    def figures(self, gpu: Handle) -> Figures:
        """What FIGURES names, of one GPU, now."""
        return {name: ask(self, gpu) for name, ask in FIGURES.items()}

    def number(self, gpu: Handle, function: str, *arguments: Any, kind: Any = ctypes.c_uint) -> int | None:
        """The number that a function writes behind its last argument."""
        value = kind()
        status = self._call(function, gpu, *arguments, ctypes.byref(value))
        return None if status else int(value.value)

    def memory_used(self, gpu: Handle) -> int | None:
        """Bytes that are in use."""
        memory = _Memory()
        return None if self._call("nvmlDeviceGetMemoryInfo", gpu, ctypes.byref(memory)) else int(memory.used)

    def _text(self, function: str, gpu: Handle) -> str | None:
        text = ctypes.create_string_buffer(LONGEST_TEXT)
        status = self._call(function, gpu, text, ctypes.c_uint(LONGEST_TEXT))
        return None if status else text.value.decode(errors="replace")

    def _call(self, function: str, *arguments: Any) -> int:
        """The function's status; 0 is success."""
        found = getattr(self._library, function, None)
        return int(found(*arguments)) if found else NOT_FOUND

    def _must(self, function: str, *arguments: Any) -> None:
        if status := self._call(function, *arguments):
            raise NvmlError(f"{function}: {self._said(status)}")

    def _said(self, status: int) -> str:
        describe = getattr(self._library, "nvmlErrorString", None)
        if not describe:
            return f"error {status}"
        describe.restype = ctypes.c_char_p
        return f"{(describe(status) or b'').decode(errors='replace')} ({status})"


def _power(nvml: Nvml, gpu: Handle) -> float | None:
    milliwatts = nvml.number(gpu, "nvmlDeviceGetPowerUsage")
    return None if milliwatts is None else milliwatts / 1000


def _energy(nvml: Nvml, gpu: Handle) -> float | None:
    millijoules = nvml.number(gpu, "nvmlDeviceGetTotalEnergyConsumption", kind=ctypes.c_ulonglong)
    return None if millijoules is None else millijoules / 1000


def _reasons(nvml: Nvml, gpu: Handle) -> int | None:
    for function in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):  # before 535
        bits = nvml.number(gpu, function, kind=ctypes.c_ulonglong)
        if bits is not None:
            return bits
    return None


def _memory_gib(nvml: Nvml, gpu: Handle) -> float | None:
    used = nvml.memory_used(gpu)
    return None if used is None else round(used / 2**30, 3)


FIGURES: dict[str, Callable[[Nvml, Handle], float | int | None]] = {
    "power_w": _power,  # since Ampere the mean of the last second, but for GA100, which tells the moment's
    "energy_j": _energy,  # since the driver was loaded
    "sm_clock_mhz": lambda nvml, gpu: nvml.number(gpu, "nvmlDeviceGetClockInfo", ctypes.c_int(SM)),
    "memory_clock_mhz": lambda nvml, gpu: nvml.number(gpu, "nvmlDeviceGetClockInfo", ctypes.c_int(MEMORY)),
    "throttle_reasons": _reasons,  # bits nvmlClocksEventReason…
    "temperature_c": lambda nvml, gpu: nvml.number(gpu, "nvmlDeviceGetTemperature", ctypes.c_int(ON_GPU)),
    "memory_used_gib": _memory_gib,
}
