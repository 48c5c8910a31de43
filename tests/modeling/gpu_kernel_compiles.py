"""Compile the GPU kernels for an H100, on a machine without one: everything up to the launch. Run as a script.

The interpreter takes code that the compiler refuses. A driver that names an H100 is all that the compiler asks for.
"""

from __future__ import annotations

from typing import Any

import torch
from elastic_reference import at, make
from peer_reference import normals
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from peerify.modeling import peer_gathered_gpu, peer_gpu, peer_triton
from peerify.modeling.peer_gathered import Rows


class H100:
    """A driver, as far as compiling needs one."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


compiled: list[str] = []
run = JITFunction.run


def without_launch(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
    kernel = run(self, *args, warmup=True, **options)
    assert "cubin" in kernel.asm
    compiled.append(self.__name__)
    return kernel


driver.set_active(H100())
JITFunction.run = without_launch  # type: ignore[method-assign]
for d_model, experts, group, tokens, dtype, inputs in (
    (128, 64, 64, 1, torch.bfloat16, 1.0),
    (40, 33, 24, 1, torch.float32, 0.5),
    (1, 1, 8, 1, torch.float16, 1.0),  # counts of 1 are compiled in
    (64, 70, 64, 5, torch.bfloat16, 0.5),
    (64, 70, 64, 3, torch.float32, 1.0),
):
    layer = make(3, d_model, experts, dtype, group=group)
    at(layer, 1.0, inputs)
    peer_gpu.few_tokens_on_gpu(
        peer_gpu.pack_for_gpu(layer.pool), normals(tokens, d_model, seed=3).to(dtype), layer.budget
    )
    assert not peer_triton._broken, peer_triton._broken
for d_model, dtype in ((64, torch.bfloat16), (1, torch.float32)):
    a_tk, x_td = normals(2, 3, seed=3).float(), normals(2, d_model, seed=3).float()
    table_nd = normals(5, d_model, seed=3).to(dtype)
    rows = Rows(torch.tensor([[0, 1, 2], [2, 4, 4]]), 5)
    peer_gathered_gpu.project(a_tk, x_td, table_nd, rows.index_tk)
    peer_gathered_gpu.combine(a_tk, x_td, table_nd, rows.index_tk)
    peer_gathered_gpu.scatter(a_tk, x_td, table_nd, rows.index_tk, *rows.of_all)
print(len(compiled), "kernels")  # noqa: T201
