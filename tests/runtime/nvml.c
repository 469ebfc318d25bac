/* Stands in for NVML where there is no GPU: the functions that runtime/node/nvml.py calls, as nvml.h declares them.

Environment: NVML_GPUS, their number (default 2). NVML_FAILS, a function that answers "not supported"; nvmlInit_v2 fails with
"driver not loaded". The power of GPU i is 500 + 100 i W, and its energy counter grows by that since the time of day 0. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int nvmlReturn_t;
typedef struct { int index; } *nvmlDevice_t;
typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
enum { SUCCESS = 0, NOT_SUPPORTED = 3, DRIVER_NOT_LOADED = 9 };

static struct { int index; } gpus[64];

static int fails(const char *function) {
    const char *named = getenv("NVML_FAILS");
    return named && !strcmp(named, function) ? NOT_SUPPORTED : SUCCESS;
}
static int index_of(nvmlDevice_t gpu) { return gpu->index; }
static unsigned milliwatts(nvmlDevice_t gpu) { return 500000 + 100000 * index_of(gpu); }

nvmlReturn_t nvmlInit_v2(void) { return fails(__func__) ? DRIVER_NOT_LOADED : SUCCESS; }
const char *nvmlErrorString(nvmlReturn_t status) { return status == DRIVER_NOT_LOADED ? "Driver Not Loaded" : "Not Supported"; }
nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count) {
    const char *said = getenv("NVML_GPUS");
    *count = said ? atoi(said) : 2;
    return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *gpu) {
    gpus[index].index = index;
    *gpu = (nvmlDevice_t)&gpus[index];
    return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t gpu, char *text, unsigned length) {
    snprintf(text, length, "GPU-%08x", index_of(gpu));
    return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t gpu, char *text, unsigned length) {
    (void)gpu;
    snprintf(text, length, "NVIDIA H100 80GB HBM3");
    return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t gpu, unsigned *power) {
    *power = milliwatts(gpu);
    return fails(__func__);
}
nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t gpu, unsigned long long *energy) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    *energy = (now.tv_sec % 1000000 + now.tv_nsec / 1e9) * milliwatts(gpu);
    return fails(__func__);
}
nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t gpu, int type, unsigned *clock) {
    (void)gpu;
    *clock = type == 1 ? 1755 : 2619;
    return fails(__func__);
}
nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t gpu, unsigned long long *reasons) {
    (void)gpu;
    *reasons = 0x4;
    return fails(__func__);
}
nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t gpu, int sensor, unsigned *temperature) {
    *temperature = sensor == 0 ? 58 + index_of(gpu) : 0;
    return fails(__func__);
}
nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t gpu, nvmlMemory_t *memory) {
    (void)gpu;
    memory->total = 80ULL << 30;
    memory->used = 29ULL << 30;
    memory->free = memory->total - memory->used;
    return fails(__func__);
}
