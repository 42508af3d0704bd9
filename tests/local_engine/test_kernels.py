"""Triton's compiler makes machine code of the kernels, for GPUs that need not be there (`make test-kernels`)."""

from __future__ import annotations

import os
from typing import Any

import pytest

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from local_engine import fused_triton, paged_triton
except ImportError:
    triton = None

pytestmark = pytest.mark.skipif(
    triton is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton, and not its interpreter: make test-kernels",
)
SMALLEST_SHARED = 48 * 1024
"""Bytes of shared memory that a program has on every GPU."""


def compiled(kernel: Any, pointers: dict[str, str], numbers: dict[str, str], constants: dict[str, Any], sm: int) -> Any:
    signature = pointers | numbers | dict.fromkeys(constants, "constexpr")
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(pointers))}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_stages": paged_triton.STAGES})


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "size", "group", "splits"), [("bf16", 128, 4, 32), ("fp16", 80, 1, 1)], ids=["bf16", "fp16"]
)
def test_the_kernels_become_machine_code(sm: int, dtype: str, size: int, group: int, splits: int) -> None:
    pointers = dict.fromkeys(("query", "keys", "values"), f"*{dtype}")
    pointers |= dict.fromkeys(("blocks", "starts", "lengths"), "*i64")
    pointers |= {"out": f"*{dtype}", "peaks": "*fp32", "totals": "*fp32", "partial": "*fp32"}
    numbers = dict.fromkeys(("query_stride", "query_head_stride", "slot_stride", "kv_head_stride"), "i32")
    numbers |= {"scaling": "fp32", "softcap": "fp32", "window": "i32"}
    whole = {"HEADS": 8 * group, "SIZE": size, "SIZE_PADDED": 128, "SPLITS": splits}
    constants = whole | {"GROUP": group, "GROUP_PADDED": 16, "BLOCK": 16, "TILE": 64, "PRECISION": "tf32"}
    constants |= {"WINDOWED": splits > 1, "CAPPED": splits > 1}
    made = compiled(paged_triton._attend, pointers, numbers, constants, sm)
    assert "cubin" in made.asm
    assert made.metadata.shared <= SMALLEST_SHARED
    if splits > 1:
        parts = {name: pointers[name] for name in ("out", "peaks", "totals", "partial")}
        assert "cubin" in compiled(paged_triton._join, parts, {}, whole, sm).asm


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize(("size", "half"), [(128, 64), (80, 20)], ids=["all rotated", "a part rotated"])
def test_the_fused_kernels_become_machine_code(sm: int, size: int, half: int) -> None:
    pointers = dict.fromkeys(("query", "key", "value", "cos", "sin"), "*bf16")
    pointers |= {"slots": "*i64", "keys": "*bf16", "values": "*bf16"}
    strides = [f"{name}_stride" for name in ("query", "key", "value", "cos", "sin", "slot")]
    constants = {"HEADS": 32, "KV_HEADS": 8, "SIZE": size, "HALF": half, "TILE": fused_triton.HEADS_TILE}
    constants |= {"HALF_PADDED": 64, "REST_PADDED": 64, "SIZE_PADDED": 128}
    assert "cubin" in compiled(fused_triton._place, pointers, dict.fromkeys(strides, "i32"), constants, sm).asm
    parts = dict.fromkeys(("gate", "up", "out"), "*bf16")
    numbers = dict.fromkeys(("gate_stride", "up_stride"), "i32")
    whole = {"SIZE": 11_008, "TILE": fused_triton.GATED_TILE}
    assert "cubin" in compiled(fused_triton._gated, parts, numbers, whole, sm).asm
