"""NVIDIA GPUs, as XLA's compiler has to know them where none is attached."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Facts about a GPU, from the target specs of openxla/xla (xla/backends/gpu/target_config/specs, October 2026), but
    for `products`, from NVIDIA's data sheets.

    Attributes:
      name: as the driver gives it.
      capability: compute capability, major and minor.
      accelerated: whether its architecture has features of its own (sm_90a, sm_100a).
      cores: streaming multiprocessors.
      fpus: float32 units of each.
      clock: GHz.
      shared: bytes of shared memory of a core.
      shared_per_block: the most of it for a block that asks for it.
      l2: bytes of the L2 cache.
      memory: bytes.
      bandwidth: bytes per second between memory and cores.
      products: floating-point operations per second of bfloat16 products, without sparsity.
    """

    name: str
    capability: tuple[int, int]
    accelerated: bool
    cores: int
    fpus: int
    clock: float
    shared: int
    shared_per_block: int
    l2: int
    memory: int
    bandwidth: int
    products: float

    @property
    def float32_products(self) -> float:
        """Floating-point operations per second of float32 products, which no tensor core takes in full precision."""
        return 2e9 * self.cores * self.fpus * self.clock


_HOPPER = {
    "capability": (9, 0),
    "accelerated": True,
    "cores": 132,
    "fpus": 128,
    "clock": 1.98,
    "shared": 233472,
    "shared_per_block": 232448,
    "l2": 52428800,
    "products": 989e12,
}
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", memory=84942979072, bandwidth=3352320000000, **_HOPPER),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", memory=151397597184, bandwidth=4800000000000, **_HOPPER),
    "a100-80": Gpu(
        "NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        accelerated=False,
        cores=108,
        fpus=64,
        clock=1.41,
        shared=167936,
        shared_per_block=166912,
        l2=41943040,
        memory=85100068864,
        bandwidth=2039040000000,
        products=312e12,
    ),
    "b200": Gpu(
        "NVIDIA B200",
        capability=(10, 0),
        accelerated=True,
        cores=148,
        fpus=128,
        clock=1.965,
        shared=233472,
        shared_per_block=232448,
        l2=132644864,
        memory=191514411008,
        bandwidth=7672320000000,
        products=2250e12,
    ),
}
# The oldest software that the compiler may count on: JAX's CUDA 13 wheels need these or newer.
_CUDA, _CUDNN = "13.0.0", (9, 12, 0)


def target_config(gpu: Gpu) -> str:
    """The GPU as text of XLA's GpuTargetConfigProto (stream_executor/device_description.proto). Limits that all of
    these GPUs share are CUDA's (CUDA C++ Programming Guide, compute capabilities)."""
    major, minor = gpu.capability
    version = dict(zip(("major", "minor", "patch"), _CUDNN, strict=True))
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_block_optin": gpu.shared_per_block,
        "shared_memory_per_core": gpu.shared,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fpus,
        "clock_rate_ghz": gpu.clock,
        "l2_cache_size": gpu.l2,
        "memory_bandwidth": gpu.bandwidth,
        "device_memory_size": gpu.memory,
        "driver_version": f'"{_CUDA}"',
        "runtime_version": f'"{_CUDA}"',
        "compile_time_toolkit_version": f'"{_CUDA}"',
        "dnn_version": f'"{".".join(map(str, _CUDNN))}"',
        "cuda_compute_capability": _message(
            {
                "major": major,
                "minor": minor,
                "feature_extension": "ACCELERATED_FEATURES" if gpu.accelerated else "NONE",
            }
        ),
    }
    config = {
        "gpu_device_info": _message(info),
        "platform_name": '"CUDA"',
        "dnn_version_info": _message(version),
        "device_description_str": f'"{gpu.name}"',
    }
    return _fields(config)


def _message(fields: dict[str, object]) -> str:
    return "{ " + _fields(fields) + " }"


def _fields(fields: dict[str, object]) -> str:
    return " ".join(f"{name}: {value}" for name, value in fields.items())
