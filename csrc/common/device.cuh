#pragma once

// A part of the cuda.cu files.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/status.h"

namespace foreshock {
namespace {

// Whether this block is the last of `count` to come here. The ticket returns to 0 as the last one
// is drawn, so that the next launch, or the replay of a graph, finds it as this one did.
__device__ bool draws_last_ticket(std::uint32_t* ticket, std::uint32_t count) {
    __shared__ bool is_last;
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicInc(ticket, count - 1) == count - 1;
    }
    __syncthreads();
    if (is_last) __threadfence();
    return is_last;
}

Status status_of(cudaError_t error) {
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Asking for its attributes loads a kernel, which must not wait until a graph is captured.
template <class Kernel>
Status load_kernel(Kernel* kernel) {
    cudaFuncAttributes attributes;
    return status_of(cudaFuncGetAttributes(&attributes, kernel));
}

}  // namespace
}  // namespace foreshock
