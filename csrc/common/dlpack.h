#pragma once

#include <cstdint>

// The binary layout of the part of DLPack 1.x that we call: how a framework describes a tensor to
// others without linking either to the other. Names and order follow the DLPack specification.
namespace foreshock::dlpack {

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : std::uint8_t { kFloat = 2, kBfloat = 4, kFloat8E4M3fn = 10, kFloat8E5M2 = 12 };

struct Tensor {
    void* data;
    std::int32_t device_type;
    std::int32_t device_id;
    std::int32_t ndim;
    std::uint8_t type_code;
    std::uint8_t type_bits;
    std::uint16_t type_lanes;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};
static_assert(sizeof(Tensor) == 48);

struct ExchangeApi {
    std::uint32_t major;
    std::uint32_t minor;
    const ExchangeApi* previous;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object;
    void* managed_tensor_to_py_object;
    int (*tensor_from_py_object)(void* py_object, Tensor* out);  // borrows; -1: Python error is set
    void* current_work_stream;
};

inline constexpr std::uint32_t kMajor = 1;
inline constexpr const char* kCapsuleName = "dlpack_exchange_api";

}  // namespace foreshock::dlpack
