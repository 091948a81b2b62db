#pragma once

// A part of cuda.cu: the instructions that CUDA C++ has no sufficient name for.
#include <cstdint>

namespace foreshock::power_iteration {
namespace {

// Begins to copy `bytes` from global to shared memory, past the first-level cache, and fills up to
// 16 bytes with zeros. Without bytes nothing is read. Only the calling thread can rely on
// `wait_for_copies`: what it copies is for itself.
__device__ void copy_async(uint4* to, const void* from, int bytes) {
    const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(address), "l"(from), "r"(bytes)
                 : "memory");
}

// Copies begun since the last call are a group.
__device__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the `kUnderWay` last groups have arrived.
template <int kUnderWay>
__device__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" : : "n"(kUnderWay) : "memory");
}

// A barrier of some warps of a block, beside the one of them all. There are four: that their names
// are constants lets other blocks have theirs.
__device__ void sync_team(int team, int threads) {
    if (team == 0) asm volatile("bar.sync 1, %0;" : : "r"(threads) : "memory");
    if (team == 1) asm volatile("bar.sync 2, %0;" : : "r"(threads) : "memory");
    if (team == 2) asm volatile("bar.sync 3, %0;" : : "r"(threads) : "memory");
    if (team == 3) asm volatile("bar.sync 4, %0;" : : "r"(threads) : "memory");
}

}  // namespace
}  // namespace foreshock::power_iteration
