"""Accelerators and a CPU host: memory, bandwidth, compute by precision, power and price, each row with its source.

Owns numbers that vendors publish, and prices as they were asked at a date. Refuses to say what of it a program reaches:
that is `Efficiency` in roofline.py. Prices age; a policy or `hybridgate plan` states its own where that matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8"]
Kind = Literal["gpu", "tpu", "cpu"]

GB = 1e9
MIB = 1024**2
GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device. `memory` in bytes, `bandwidth` in bytes a second, `compute` in dense multiply-adds counted as two
    operations a second, by precision (a precision that the device has no units for is absent), `power_w` and `idle_w`
    in watts. `purchase_usd` buys the device alone, `host_usd` the share of the machine around it, and `host_w` is that
    share's power. Hourly rates are what a cloud asks for the device with its share of the host; None where no price is
    known."""

    name: str
    kind: Kind
    memory: float
    bandwidth: float
    compute: Mapping[Precision, float]
    power_w: float
    idle_w: float
    host_w: float
    purchase_usd: float | None
    host_usd: float
    usd_per_hour: float | None
    spot_usd_per_hour: float | None
    source: str
    price_source: str


class UnknownHardware(ValueError):
    """A device that the catalog does not have, with the nearest names."""


_RESALE = "card price: resellers' asking prices, NVIDIA publishes none, read 2026-01 and not verified with a dealer"
_AWS = "AWS us-east-1 on demand divided by the instance's 8 GPUs, read 2026-11-09"
_DGX_A100 = (
    "DGX A100 datasheet (6.5 kW for 8); idle as nvidia-smi commonly shows it; memory as nvidia-smi's total; "
    "https://www.nvidia.com/en-us/data-center/a100/ datasheet, 2022"
)
_DGX_H100 = (
    "DGX H100 datasheet (10.2 kW for 8); idle as nvidia-smi commonly shows it; memory as nvidia-smi's total; "
    "https://www.nvidia.com/en-us/data-center/h100/ datasheet, 2023 (dense, without sparsity)"
)

HARDWARE: Mapping[str, Hardware] = {
    row.name: row
    for row in (
        Hardware(
            name="v100-32gb",
            kind="gpu",
            memory=32510 * MIB,
            bandwidth=900 * GB,
            compute={"fp32": 15.7e12, "fp16": 125e12},  # Volta has no bf16 and no int8 tensor cores
            power_w=300,
            idle_w=40,
            host_w=137,
            purchase_usd=10_000,
            host_usd=5_000,
            usd_per_hour=3.90,
            spot_usd_per_hour=1.80,
            source="V100 SXM2 datasheet, https://images.nvidia.com/content/technologies/volta/pdf/"
            "volta-v100-datasheet-update-us-1165301-r5.pdf, 2020; host from DGX-1 (3.5 kW for 8)",
            price_source="AWS p3dn.24xlarge, 31.212 on demand and 14.39 spot for 8, secondary sources, 2024 to 2026; "
            "card: https://huggingface.co/spaces/sasha/energy-cost-compute",
        ),
        Hardware(
            name="a100-40gb",
            kind="gpu",
            memory=40960 * MIB,
            bandwidth=1555 * GB,
            compute={"fp32": 19.5e12, "fp16": 312e12, "bf16": 312e12, "int8": 624e12},
            power_w=400,
            idle_w=55,
            host_w=412,
            purchase_usd=10_000,
            host_usd=10_000,
            usd_per_hour=2.74,
            spot_usd_per_hour=None,
            source=_DGX_A100,
            price_source=f"p4d.24xlarge, {_AWS}; {_RESALE}",
        ),
        Hardware(
            name="a100-80gb",
            kind="gpu",
            memory=81920 * MIB,
            bandwidth=2039 * GB,
            compute={"fp32": 19.5e12, "fp16": 312e12, "bf16": 312e12, "int8": 624e12},
            power_w=400,
            idle_w=60,
            host_w=412,
            purchase_usd=15_000,
            host_usd=10_000,
            usd_per_hour=3.43,
            spot_usd_per_hour=1.52,
            source=_DGX_A100,
            price_source=f"p4de.24xlarge, {_AWS}; spot: Google Cloud, 12.17 for 8, a secondary source, 2026-03; "
            f"{_RESALE}",
        ),
        Hardware(
            name="h100-80gb",
            kind="gpu",
            memory=81559 * MIB,
            bandwidth=3350 * GB,
            compute={"fp32": 66.9e12, "fp16": 989.4e12, "bf16": 989.4e12, "fp8": 1978.9e12, "int8": 1978.9e12},
            power_w=700,
            idle_w=70,
            host_w=575,
            purchase_usd=30_000,
            host_usd=12_000,
            usd_per_hour=6.88,
            spot_usd_per_hour=2.25,
            source=_DGX_H100,
            price_source=f"p5.48xlarge, {_AWS} (Lambda 3.99, RunPod 2.69 to 3.99 at that time); spot: AWS, a secondary "
            f"source, 2026-03; {_RESALE}",
        ),
        Hardware(
            name="h200",
            kind="gpu",
            memory=143771 * MIB,
            bandwidth=4800 * GB,
            compute={"fp32": 66.9e12, "fp16": 989.4e12, "bf16": 989.4e12, "fp8": 1978.9e12, "int8": 1978.9e12},
            power_w=700,
            idle_w=75,
            host_w=575,
            purchase_usd=35_000,
            host_usd=12_000,
            usd_per_hour=10.44,
            spot_usd_per_hour=6.26,
            source="https://www.nvidia.com/en-us/data-center/h200/ datasheet, 2024; host as of DGX H200",
            price_source="Google Cloud a3-ultragpu-8g, us-central1, on demand and spot divided by 8, 2026-10-13; "
            f"{_RESALE}",
        ),
        Hardware(
            name="tpu-v4",
            kind="tpu",
            memory=32 * GIB,
            bandwidth=1200 * GB,
            compute={"bf16": 275e12, "int8": 275e12},
            power_w=192,
            idle_w=90,
            host_w=0,
            purchase_usd=None,  # rented only
            host_usd=0,
            usd_per_hour=3.22,
            spot_usd_per_hour=0.97,
            source="https://docs.cloud.google.com/tpu/docs/v4, 2026 (one chip; measured power, 90 to 192 W)",
            price_source="Google Cloud us-central2, tpu-v4-8 at 12.88 on demand and 3.864 spot for 4 chips, "
            "https://github.com/skypilot-org/skypilot-catalog",
        ),
        Hardware(
            name="cpu-host",
            kind="cpu",
            memory=128 * GIB,
            bandwidth=153.6 * GB,
            # Zen 4: 32 cores x 32 fp32 operations a cycle x 3.3 GHz; twice that with AVX512_BF16, four times with VNNI.
            compute={"fp32": 3.4e12, "bf16": 6.8e12, "int8": 13.5e12},
            power_w=280,
            idle_w=100,
            host_w=0,
            purchase_usd=8_000,
            host_usd=0,
            usd_per_hour=1.85,
            spot_usd_per_hour=None,
            source="32 cores of AMD EPYC 9004 (Zen 4) with a third of the socket's 12 channels of DDR5-4800, "
            "https://www.amd.com/en/products/specifications/server-processor.html, 2023; 9354P's TDP",
            price_source="AWS m7a.8xlarge, us-east-1 on demand, 2025, not read again; purchase: an estimate for a "
            "one-socket server, not verified",
        ),
    )
}


def hardware(name: str) -> Hardware:
    """The device of that name. Raises UnknownHardware with the nearest names."""
    wanted = name.lower().replace("_", "-").replace(" ", "-")
    if wanted in HARDWARE:
        return HARDWARE[wanted]
    near = [known for known in HARDWARE if known.startswith(wanted)] or get_close_matches(wanted, HARDWARE, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(HARDWARE)}"
    raise UnknownHardware(f"the catalog has no hardware {name!r} ({hint})")
