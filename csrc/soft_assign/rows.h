#pragma once

// A part of cpu.cpp, which is compiled once per instruction set; see there. How rows of x are read,
// and mapped to where the centers are.
#include <cstdint>
#include <type_traits>

#include "common/tensor_view.h"
#include "soft_assign/functions.h"
#include "soft_assign/kernel.h"

namespace foreshock::soft_assign::FORESHOCK_ISA {
namespace {

// Some features of a block of rows less the offset, if there is one, kRowWidth from row to row and
// filled up with 0 to a full line. The distance between rows is then known when this is compiled.
template <class T, class Item>
void take_block(const void* x, int64_t stride, int64_t count, int64_t begin, int64_t end,
                const T* offset, T* to) {
    // What is left of a float64 is rounded after its offset is gone, not before.
    using Wide = std::conditional_t<std::is_same_v<Item, double>, double, T>;
    const int64_t features = end - begin;
    const int64_t filled = full_lines(features, sizeof(T));
    for (int64_t r = 0; r < count; ++r, to += kRowWidth) {
        const Item* from = static_cast<const Item*>(x) + r * stride + begin;
        if (offset == nullptr) {
            for (int64_t d = 0; d < features; ++d) to[d] = static_cast<T>(from[d]);
        } else {
            for (int64_t d = 0; d < features; ++d) {
                to[d] = static_cast<T>(static_cast<Wide>(from[d]) - offset[begin + d]);
            }
        }
        for (int64_t d = features; d < filled; ++d) to[d] = 0;
    }
}

// Where rows lie, and how they are read.
template <class T>
struct Rows {
    const void* items;
    int64_t item_bytes;
    int64_t stride;   // from row to row
    const T* offset;  // what is taken off each of them, or null
    void (*take_block)(const void*, int64_t, int64_t, int64_t, int64_t, const T*, T*);

    void take(int64_t row, int64_t count, int64_t begin, int64_t end, T* to) const {
        const char* from = static_cast<const char*>(items) + row * stride * item_bytes;
        take_block(from, stride, count, begin, end, offset, to);
    }

    // Has on its way what is taken next while something else is computed: a row's part is too short
    // for the processor to see what follows. 1.2 times as fast where x is in no near cache.
    void fetch(int64_t row, int64_t count, int64_t begin, int64_t end) const {
        const char* from = static_cast<const char*>(items) + (row * stride + begin) * item_bytes;
        for (int64_t r = 0; r < count; ++r, from += stride * item_bytes) {
            for (int64_t at = 0; at < (end - begin) * item_bytes; at += kLineBytes) {
                __builtin_prefetch(from + at, 0, 2);
            }
        }
    }

    // (features / kFeatureBlock, kBlockRows, kRowWidth)
    void take_all(int64_t row, int64_t count, int64_t features, T* to) const {
        for (int64_t begin = 0; begin < features; begin += kFeatureBlock) {
            const int64_t most = begin + kFeatureBlock;
            take(row, count, begin, most < features ? most : features, to);
            to += kBlockRows * kRowWidth;
        }
    }
};

// Directions that rows are mapped to before they are compared: (inputs / kFeatureBlock, features /
// columns, up to kFeatureBlock, columns), as they are read. Columns that fill up are 0.
template <class T>
struct Basis {
    const T* items = nullptr;
    int64_t inputs = 0;
    int64_t columns = 0;  // that are worked on together
    int64_t filled = 0;   // all of them

    Basis() = default;
    Basis(const T* packed, int64_t d, int64_t e)
        : items(packed),
          inputs(d),
          columns(e <= kNarrowLanes<T> ? kNarrowLanes<T>
                  : e <= kLanes<T>     ? kLanes<T>
                                       : 2 * kLanes<T>),
          filled((e + columns - 1) / columns * columns) {}
};

template <class T>
void pack_basis(const T* given, int64_t input_stride, int64_t feature_stride, const Basis<T>& basis,
                int64_t features, T* packed) {
    for (int64_t begin = 0; begin < basis.inputs; begin += kFeatureBlock) {
        const int64_t left = basis.inputs - begin;
        const int64_t inputs = left < kFeatureBlock ? left : kFeatureBlock;
        for (int64_t first = 0; first < basis.filled; first += basis.columns) {
            for (int64_t c = 0; c < basis.columns; ++c) {
                const T* from = given + begin * input_stride + (first + c) * feature_stride;
                for (int64_t d = 0; d < inputs; ++d) {
                    packed[d * basis.columns + c] =
                        first + c < features ? from[d * input_stride] : 0;
                }
            }
            packed += inputs * basis.columns;
        }
    }
}

// Rows whose sums with two vectors of columns the registers hold.
constexpr int kMappedRows = FORESHOCK_VECTOR_BYTES == 64   ? 12
                            : FORESHOCK_VECTOR_BYTES == 32 ? 6
                                                           : 4;
static_assert(kBlockRows % kMappedRows == 0);

// Adds what some inputs of some rows give in some columns.
template <int kCount, int kVectors, class V, class T>
void add_products(const T* x, const T* tile, int64_t inputs, bool is_first, T* mapped) {
    constexpr int64_t kWidth = sizeof(V) / sizeof(T);
    V sums[kCount][kVectors] = {};
    for (int64_t d = 0; d < inputs; ++d) {
        V b[kVectors];
        for (int v = 0; v < kVectors; ++v) b[v] = load_as<V>(tile + (d * kVectors + v) * kWidth);
#pragma GCC unroll 16
        for (int r = 0; r < kCount; ++r) {
            const V of_row = broadcast<V>(x[r * kRowWidth + d]);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sums[r][v] += of_row * b[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kCount; ++r) {
        for (int v = 0; v < kVectors; ++v) {
            T* to = mapped + r * kRowWidth + v * kWidth;
            store_as<V>(to, is_first ? sums[r][v] : load_as<V>(to) + sums[r][v]);
        }
    }
}

template <int kVectors, class V, class T>
void add_all_products(const T* x, int64_t count, const T* tile, int64_t inputs, bool is_first,
                      T* mapped) {
    int64_t row = 0;
    const auto add = [&](auto number) {
        constexpr int kCount = decltype(number)::value;
        for (; row + kCount <= count; row += kCount) {
            const int64_t at = row * kRowWidth;
            add_products<kCount, kVectors, V>(x + at, tile, inputs, is_first, mapped + at);
        }
    };
    add(std::integral_constant<int, kMappedRows>{});
    add(std::integral_constant<int, (kMappedRows + 2) / 3>{});
    add(std::integral_constant<int, 1>{});
}

// (x - offset) @ basis of a block of rows. Some inputs at a time: a block of them stays in the
// first-level cache, and a longer sum of float32 would lose digits.
template <class T>
void map_rows(const Rows<T>& x, int64_t row, int64_t count, const Basis<T>& basis, T* taken,
              T* mapped) {
    const T* tile = basis.items;
    for (int64_t begin = 0; begin < basis.inputs; begin += kFeatureBlock) {
        const int64_t left = basis.inputs - begin;
        const int64_t inputs = left < kFeatureBlock ? left : kFeatureBlock;
        x.take(row, count, begin, begin + inputs, taken);
        const int64_t next = begin + inputs;
        if (next < basis.inputs) {
            const int64_t most = next + kFeatureBlock;
            x.fetch(row, count, next, most < basis.inputs ? most : basis.inputs);
        }
        for (int64_t c = 0; c < basis.filled; c += basis.columns, tile += inputs * basis.columns) {
            T* to = mapped + c / kFeatureBlock * kBlockRows * kRowWidth + c % kFeatureBlock;
            if (basis.columns == 2 * kLanes<T>) {
                add_all_products<2, Vector<T>>(taken, count, tile, inputs, begin == 0, to);
            } else if (basis.columns == kLanes<T>) {
                add_all_products<1, Vector<T>>(taken, count, tile, inputs, begin == 0, to);
            } else {
                add_all_products<1, NarrowVector<T>>(taken, count, tile, inputs, begin == 0, to);
            }
        }
    }
}

}  // namespace
}  // namespace foreshock::soft_assign::FORESHOCK_ISA
