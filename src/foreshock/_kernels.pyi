"""
Compiled kernels; called by the cpu and cuda implementations of foreshock.ops.
"""
from __future__ import annotations
import typing
import typing_extensions
__all__: list[str] = ['TensorTable', 'has_cuda', 'health_scan_avx2', 'health_scan_avx512', 'health_scan_baseline', 'health_scan_cuda', 'health_scan_plan', 'health_scan_plan_bytes', 'isas', 'power_iteration_advance_avx2', 'power_iteration_advance_avx512', 'power_iteration_advance_baseline', 'power_iteration_advance_cuda', 'power_iteration_cuda_whole_bytes', 'power_iteration_plan', 'power_iteration_plan_bytes', 'thread_count']
class TensorTable:
    """
    Where a list of tensors lies in memory.
    """
    def __init__(self, tensors: list, exchange_api: typing_extensions.CapsuleType, layout: typing.Any) -> None:
        ...
    def __len__(self) -> int:
        ...
    def matches(self, tensors: list) -> bool:
        """
        Whether these are the same addresses, element types, shapes and strides.
        """
    @property
    def address(self) -> int:
        ...
def has_cuda() -> bool:
    """
    Whether CUDA kernels were built in.
    """
def health_scan_avx2(arg0: typing.SupportsInt | typing.SupportsIndex, arg1: typing.SupportsInt | typing.SupportsIndex, arg2: typing.SupportsInt | typing.SupportsIndex, arg3: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def health_scan_avx512(arg0: typing.SupportsInt | typing.SupportsIndex, arg1: typing.SupportsInt | typing.SupportsIndex, arg2: typing.SupportsInt | typing.SupportsIndex, arg3: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def health_scan_baseline(arg0: typing.SupportsInt | typing.SupportsIndex, arg1: typing.SupportsInt | typing.SupportsIndex, arg2: typing.SupportsInt | typing.SupportsIndex, arg3: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def health_scan_cuda(arg0: typing.SupportsInt | typing.SupportsIndex, arg1: typing.SupportsInt | typing.SupportsIndex, arg2: typing.SupportsInt | typing.SupportsIndex, arg3: typing.SupportsInt | typing.SupportsIndex, arg4: typing.SupportsInt | typing.SupportsIndex, arg5: typing.SupportsInt | typing.SupportsIndex, arg6: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def health_scan_plan(arg0: typing.SupportsInt | typing.SupportsIndex, arg1: typing.SupportsInt | typing.SupportsIndex, arg2: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def health_scan_plan_bytes(arg0: typing.SupportsInt | typing.SupportsIndex, arg1: typing.SupportsInt | typing.SupportsIndex) -> int:
    ...
def isas() -> list:
    """
    (name, supported here) of each instruction set, narrowest first.
    """
def power_iteration_advance_avx2(arg0: typing.SupportsInt | typing.SupportsIndex, arg1: typing.SupportsInt | typing.SupportsIndex, arg2: typing.SupportsInt | typing.SupportsIndex, arg3: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def power_iteration_advance_avx512(arg0: typing.SupportsInt | typing.SupportsIndex, arg1: typing.SupportsInt | typing.SupportsIndex, arg2: typing.SupportsInt | typing.SupportsIndex, arg3: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def power_iteration_advance_baseline(arg0: typing.SupportsInt | typing.SupportsIndex, arg1: typing.SupportsInt | typing.SupportsIndex, arg2: typing.SupportsInt | typing.SupportsIndex, arg3: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def power_iteration_advance_cuda(arg0: typing.SupportsInt | typing.SupportsIndex, arg1: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def power_iteration_cuda_whole_bytes() -> int:
    ...
def power_iteration_plan(arg0: typing.SupportsInt | typing.SupportsIndex, arg1: typing.SupportsInt | typing.SupportsIndex, arg2: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def power_iteration_plan_bytes(arg0: typing.SupportsInt | typing.SupportsIndex, arg1: typing.SupportsInt | typing.SupportsIndex) -> int:
    ...
def thread_count() -> int:
    """
    Threads that a kernel would use now.
    """
