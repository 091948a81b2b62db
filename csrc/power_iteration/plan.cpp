#include "common/tensor_view.h"
#include "power_iteration/kernel.h"

namespace foreshock::power_iteration {
namespace {

constexpr std::int64_t kLine = 64;
// A matrix is cut into some sixteen blocks, for the threads to share: large enough to be worth
// handing over, and of enough rows that adding up their vectors costs little beside reading them.
constexpr std::int64_t kBlocks = 16;
constexpr std::int64_t kMinBlockBytes = std::int64_t{256} << 10;
constexpr std::int64_t kMaxBlockBytes = std::int64_t{4} << 20;
constexpr std::int64_t kMinBlockRows = 64;
// Over more rows than this, float sums would lose too much.
constexpr std::int64_t kMaxBlockRows = 4096;
// The blocks' vectors stay below this many bytes, or as many times the matrix's own vector.
constexpr std::int64_t kMaxPartialBytes = std::int64_t{1} << 20;
constexpr std::int64_t kMaxPartials = 64;
// Below this a second thread costs more to wake than it saves.
constexpr std::int64_t kTaskBytes = std::int64_t{256} << 10;

std::int64_t clamp(std::int64_t value, std::int64_t low, std::int64_t high) {
    return value < low ? low : value > high ? high : value;
}

std::int64_t round_up(std::int64_t value, std::int64_t unit) {
    return (value + unit - 1) / unit * unit;
}

std::int64_t item_bytes(const Matrix& matrix) { return kItemBytes[matrix.dtype]; }

std::int64_t padded_columns(const Matrix& matrix) {
    return round_up(matrix.columns, kLine / item_bytes(matrix));
}

// What vectors are multiplied and summed in.
std::int64_t sum_bytes(const Matrix& matrix) {
    return matrix.dtype == static_cast<std::int64_t>(Dtype::float64) ? 8 : 4;
}

bool is_empty(const Matrix& matrix) { return matrix.rows == 0 || matrix.columns == 0; }

// A function of the matrix alone, so that its result does not depend on the list it is in.
std::int64_t rows_per_block(const Matrix& matrix) {
    const std::int64_t row_bytes = matrix.columns * item_bytes(matrix);
    const std::int64_t bytes =
        clamp(matrix.rows * row_bytes / kBlocks, kMinBlockBytes, kMaxBlockBytes);
    const std::int64_t rows = clamp(bytes / row_bytes, kMinBlockRows, kMaxBlockRows);
    const std::int64_t vector_bytes = padded_columns(matrix) * sum_bytes(matrix);
    const std::int64_t most = clamp(kMaxPartialBytes / vector_bytes, kMaxPartials, matrix.rows);
    const std::int64_t fewest = (matrix.rows + most - 1) / most;
    return round_up(rows > fewest ? rows : fewest, 8);
}

std::int64_t block_count(const Matrix& matrix) {
    if (is_empty(matrix)) return 0;
    const std::int64_t rows = rows_per_block(matrix);
    return (matrix.rows + rows - 1) / rows;
}

// Hands out aligned pieces of the memory behind a plan; without memory it only counts.
class Arena {
  public:
    explicit Arena(void* memory) : memory_(reinterpret_cast<std::uintptr_t>(memory)) {}

    template <class T>
    T* take(std::int64_t count) {
        const std::uintptr_t piece = memory_ + static_cast<std::uintptr_t>(used_);
        used_ += round_up(count * static_cast<std::int64_t>(sizeof(T)), kLine);
        return reinterpret_cast<T*>(piece);
    }
    std::int64_t used() const { return used_; }

  private:
    std::uintptr_t memory_;
    std::int64_t used_ = 0;
};

void deal_blocks(const Matrix* matrices, Plan& plan, Arena& arena) {
    std::int64_t block = 0;
    std::int64_t task_bytes = kTaskBytes;  // so that the first block opens a task
    for (std::int64_t m = 0; m < plan.count; ++m) {
        const Matrix& matrix = matrices[m];
        plan.scratch[m].first_block = block;
        const std::int64_t step = is_empty(matrix) ? 1 : rows_per_block(matrix);
        const std::int64_t rows = is_empty(matrix) ? 0 : matrix.rows;
        for (std::int64_t begin = 0; begin < rows; begin += step) {
            const std::int64_t end = begin + step < rows ? begin + step : rows;
            if (task_bytes >= kTaskBytes) {
                plan.tasks[plan.task_count++] = block;
                task_bytes = 0;
            }
            void* y = arena.take<char>(plan.scratch[m].padded * sum_bytes(matrix));
            plan.blocks[block++] = {m, begin, end, y, 0, 0};
            task_bytes += (end - begin) * matrix.columns * item_bytes(matrix);
        }
        plan.scratch[m].last_block = block;
    }
    plan.tasks[plan.task_count] = block;
}

}  // namespace

std::int64_t plan_bytes(const Matrix* matrices, std::int64_t count) {
    Arena arena(nullptr);
    std::int64_t blocks = 0;
    arena.take<Plan>(1);
    arena.take<Scratch>(count);
    for (std::int64_t m = 0; m < count; ++m) {
        const std::int64_t own = block_count(matrices[m]);
        const std::int64_t padded = padded_columns(matrices[m]);
        arena.take<double>(padded);
        for (std::int64_t b = 0; b < own + 1; ++b) {
            arena.take<char>(padded * sum_bytes(matrices[m]));
        }
        blocks += own;
    }
    arena.take<Block>(blocks);
    arena.take<std::int64_t>(blocks + 1);
    return arena.used();
}

Status plan(const Matrix* matrices, std::int64_t count, Plan* memory) {
    Arena arena(memory);
    Plan& plan = *arena.take<Plan>(1);
    plan = {matrices, count, arena.take<Scratch>(count), nullptr, nullptr, 0, 0};
    std::int64_t blocks = 0;
    for (std::int64_t m = 0; m < count; ++m) {
        const std::int64_t padded = padded_columns(matrices[m]);
        void* v = arena.take<char>(padded * sum_bytes(matrices[m]));
        plan.scratch[m] = {v, arena.take<double>(padded), padded, 0, 0};
        plan.column_count += matrices[m].columns;
        blocks += block_count(matrices[m]);
    }
    plan.blocks = arena.take<Block>(blocks);
    plan.tasks = arena.take<std::int64_t>(blocks + 1);
    deal_blocks(matrices, plan, arena);
    return nullptr;
}

}  // namespace foreshock::power_iteration
