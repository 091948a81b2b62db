#pragma once

// A part of cpu.cpp, which is compiled once per instruction set; see there. The pass itself: dot
// products of a few rows with v, then multiples of these rows onto y while they are in the cache.
#include "power_iteration/formats.h"
#include "power_iteration/kernel.h"

namespace foreshock::power_iteration::FORESHOCK_ISA {
namespace {

template <int kRows>
struct Rows {
    const uint8_t* row[kRows];
};

template <int kRows>
struct Products {
    double u[kRows] = {};  // of the rows with v
    double wsq = 0;        // of the rows with themselves; each of the two steps adds a part
};

// Fetches a run of memory ahead of its use, some lines with each line of every row.
struct Prefetch {
    const uint8_t* next;

    template <int kLines>
    void step() {
#pragma GCC unroll 4
        for (int i = 0; i < kLines; ++i) __builtin_prefetch(next + kLine * i, 0, 2);
        next += kLine * kLines;
    }
};

// Squares need as many multiplications as a step itself. Of elements that come in two parts each
// step squares one; of others the second step, which has fewer sums of its own to keep.
template <class Format>
constexpr int kSquaredWithDot = Format::kParts - 1;
constexpr int kSquaredWithAdd = 0;
// Independent sums, to cover the latency of a fused multiply-add.
constexpr int kChains = 4;

template <class Vector>
double total(const Vector (&chains)[kChains]) {
    return total((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

// Float sums are kept over so many lines only, then added up in double.
constexpr size_t kMostLines = 256;

template <class Format, int kRows>
void dot_lines(const Rows<kRows>& rows, const typename Format::Sum* v, size_t lines,
               Prefetch& ahead, Products<kRows>& products) {
    using Vector = typename Format::Vector;
    constexpr int kParts = Format::kParts;
    Prefetch fetch = ahead;
    Vector u[kRows] = {};
    Vector wsq[kChains] = {};
    for (size_t i = 0; i < lines * kVectorsPerLine; ++i) {
        if (i % kVectorsPerLine == 0) fetch.template step<(kRows + 1) / 2>();
        Vector vs[kParts];
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) {
            vs[p] = load<Vector>(v + (i * kParts + static_cast<size_t>(p)) * kLanes<Format>);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
            for (int p = 0; p < kParts; ++p) {
                const Vector w = Format::part(rows.row[r] + i * kBytes, p);
                u[r] += w * vs[p];
                if (p > 0 && p == kSquaredWithDot<Format>) wsq[r % kChains] += w * w;
            }
        }
    }
    for (int r = 0; r < kRows; ++r) products.u[r] += total(u[r]);
    products.wsq += total(wsq);
    ahead = fetch;
}

template <class Format, int kRows>
void add_lines(const Rows<kRows>& rows, const typename Format::Sum (&u)[kRows],
               typename Format::Sum* y, size_t lines, Prefetch& ahead, double& sum_wsq) {
    using Vector = typename Format::Vector;
    constexpr int kParts = Format::kParts;
    Prefetch fetch = ahead;
    Vector us[kRows];
    for (int r = 0; r < kRows; ++r) us[r] = Vector{} + u[r];
    Vector wsq[kChains] = {};
    for (size_t i = 0; i < lines * kVectorsPerLine; ++i) {
        if (i % kVectorsPerLine == 0) fetch.template step<kRows / 2>();
        typename Format::Sum* to = y + i * kParts * kLanes<Format>;
        Vector ys[kParts];
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) ys[p] = load<Vector>(to + p * kLanes<Format>);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
            for (int p = 0; p < kParts; ++p) {
                const Vector w = Format::part(rows.row[r] + i * kBytes, p);
                ys[p] += us[r] * w;
                if (p == kSquaredWithAdd) wsq[r % kChains] += w * w;
            }
        }
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) store(to + p * kLanes<Format>, ys[p]);
    }
    sum_wsq += total(wsq);
    ahead = fetch;
}

// The elements of a few rows, brought together and filled up with zeros to whole lines: the ends of
// rows, and rows whose elements do not lie next to each other.
template <class Format, int kRows>
struct Stage {
    static constexpr size_t kLines = 16;
    static constexpr size_t kElements = kLines * kElementsPerLine<Format>;
    alignas(kLine) uint8_t bytes[kRows][kLines * kLine];

    Rows<kRows> fill(const Rows<kRows>& from, const int64_t* offsets, size_t begin, size_t count) {
        constexpr size_t kBytesEach = kItem<Format>;
        const size_t lines = (count + kElementsPerLine<Format> - 1) / kElementsPerLine<Format>;
        Rows<kRows> staged;
        for (int r = 0; r < kRows; ++r) {
            staged.row[r] = bytes[r];
            const uint8_t* row = from.row[r];
            for (size_t j = 0; j < count; ++j) {
                const int64_t at = offsets ? offsets[begin + j] : static_cast<int64_t>(begin + j);
                std::memcpy(bytes[r] + j * kBytesEach, row + at * int64_t{kBytesEach}, kBytesEach);
            }
            std::memset(bytes[r] + count * kBytesEach, 0, lines * kLine - count * kBytesEach);
        }
        return staged;
    }
};

// Calls visit(rows, first slot, lines) for all columns: in place as far as whole lines lie next to
// each other, from a stage otherwise.
template <class Format, int kRows, class Visit>
void visit_columns(const Matrix& matrix, const Rows<kRows>& rows, Visit visit) {
    constexpr size_t kElements = kElementsPerLine<Format>;
    const size_t columns = static_cast<size_t>(matrix.columns);
    const size_t in_place = matrix.column_offsets ? 0 : columns / kElements;
    for (size_t line = 0; line < in_place; line += kMostLines) {
        Rows<kRows> here;
        for (int r = 0; r < kRows; ++r) here.row[r] = rows.row[r] + line * kLine;
        visit(here, line * kElements, kMostLines < in_place - line ? kMostLines : in_place - line);
    }
    Stage<Format, kRows> stage;
    for (size_t begin = in_place * kElements; begin < columns; begin += stage.kElements) {
        const size_t rest = columns - begin;
        const size_t count = rest < stage.kElements ? rest : stage.kElements;
        const Rows<kRows> staged = stage.fill(rows, matrix.column_offsets, begin, count);
        visit(staged, begin, (count + kElements - 1) / kElements);
    }
}

template <class Format, int kRows>
void read_rows(const Matrix& matrix, int64_t first, int64_t end, const typename Format::Sum* v,
               Block& block) {
    using Sum = typename Format::Sum;
    const int64_t row_bytes = matrix.row_stride * int64_t{kItem<Format>};
    const uint8_t* data = static_cast<const uint8_t*>(matrix.data) + first * row_bytes;
    Rows<kRows> rows;
    for (int r = 0; r < kRows; ++r) rows.row[r] = data + r * row_bytes;
    // The rows that come next mostly follow in memory; a block's last ones look at themselves.
    Prefetch ahead{first + kRows < end ? data + kRows * row_bytes : data};

    Products<kRows> products;
    visit_columns<Format>(matrix, rows, [&](const Rows<kRows>& here, size_t slot, size_t lines) {
        dot_lines<Format>(here, v + slot, lines, ahead, products);
    });
    Sum u[kRows];
    for (int r = 0; r < kRows; ++r) {
        block.usq += products.u[r] * products.u[r];
        u[r] = static_cast<Sum>(products.u[r]);
    }
    Sum* y = static_cast<Sum*>(block.y);
    visit_columns<Format>(matrix, rows, [&](const Rows<kRows>& here, size_t slot, size_t lines) {
        add_lines<Format>(here, u, y + slot, lines, ahead, products.wsq);
    });
    block.wsq += products.wsq;
}

// Rows that are taken together should stay in the second-level cache beside those to come.
constexpr int64_t kGroupBytes = 512 << 10;

template <class Format>
void read_block(const Matrix& matrix, const Scratch& scratch, Block& block) {
    const auto* v = static_cast<const typename Format::Sum*>(scratch.v);
    std::memset(block.y, 0, static_cast<size_t>(scratch.padded) * sizeof(typename Format::Sum));
    block.usq = block.wsq = 0;
    const int64_t row_bytes = matrix.columns * int64_t{kItem<Format>};
    const int64_t end = block.end;
    int64_t row = block.begin;
    if (8 * row_bytes <= kGroupBytes) {
        for (; row + 8 <= end; row += 8) read_rows<Format, 8>(matrix, row, end, v, block);
    }
    for (; row + 4 <= end; row += 4) read_rows<Format, 4>(matrix, row, end, v, block);
    for (; row < end; ++row) read_rows<Format, 1>(matrix, row, end, v, block);
}

}  // namespace
}  // namespace foreshock::power_iteration::FORESHOCK_ISA
