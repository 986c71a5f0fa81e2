// Row kernels over a tile of logits: from raw products to logits, online log-sum-exp with target gather and statistics,
// and the gradient.
//
// A tile holds columns start..start+cols-1 of the vocabulary. Strides are in elements, and offsets that multiply a row
// are 64-bit. Nothing is added atomically and every reduction has a fixed order: equal inputs give equal bits.
#pragma once

#include "device.cuh"

namespace dpo_kernels::cuda {

// A block's threads, and the logits that each loads at once: 64 bytes, so that two blocks on a multiprocessor hide the
// memory's latency. float64, whose exponentials need the registers, has half the threads and one vector each.
template <class T>
constexpr int row_threads() {
    return sizeof(T) == 8 ? kRowThreads / 2 : kRowThreads;
}
template <class T>
constexpr int batch_size() {
    return sizeof(T) == 8 ? 2 : 16;
}
template <class T>
constexpr int vector_size() {
    return kVectorBytes / static_cast<int>(sizeof(T));
}

// The label's column in this tile, or -1 if it lies in another one. The form is one in which no label overflows.
__device__ inline int64_t column_of(int64_t label, int64_t start, int64_t cols) {
    return label >= start && label - start < cols ? label - start : -1;
}

// Maps this thread's part of a row from `from` to `to`, which is `from` or shares no memory with it. Threads along the
// first dimension of the grid share the columns. `each` gets neighbours and the first one's column, and stores them.
// Vectors begin where both sides are aligned. If no column is, all accesses are scalar, and still coalesced.
template <int SIZE, class T, class Out, class Each>
__device__ inline void map_row(const T* from, const Out* to, int64_t cols, const Each& each) {
    constexpr int unrolled = batch_size<T>() / SIZE;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * row_threads<T>() + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * row_threads<T>();
    int64_t head = elements_to_alignment(to);
    if (head > cols || !is_aligned(from + head)) head = cols;
    const int64_t vectors = (cols - head) / SIZE;
    for (int64_t column = thread; column < head; column += threads) each(load<1>(from + column), column);
    int64_t at = thread;
    for (; at + (unrolled - 1) * threads < vectors; at += unrolled * threads) {
        Vector<T, SIZE> values[unrolled];  // all loads are issued before a store can hold them up
#pragma unroll
        for (int step = 0; step < unrolled; ++step) {
            values[step] = load<SIZE>(from + head + (at + step * threads) * SIZE);
        }
#pragma unroll
        for (int step = 0; step < unrolled; ++step) each(values[step], head + (at + step * threads) * SIZE);
    }
    for (; at < vectors; at += threads) each(load<SIZE>(from + head + at * SIZE), head + at * SIZE);
    for (int64_t column = head + vectors * SIZE + thread; column < cols; column += threads) {
        each(load<1>(from + column), column);
    }
}

// --- logits -------------------------------------------------------------------------------------------------

// cap(scale * (z + bias)) of neighbours. Their own bias begins at `bias`, which is null if there is none. `slope` is
// the factor of z + bias before the cap.
template <int COUNT, class T>
__device__ inline Vector<T, COUNT> with_bias_scale_cap(Vector<T, COUNT> z, const T* bias, T slope, T softcap) {
#pragma unroll
    for (int lane = 0; lane < COUNT; ++lane) {
        T value = z.values[lane];
        if (bias != nullptr) value += bias[lane];
        value *= slope;
        z.values[lane] = softcap == 0 ? value : softcap * hyperbolic_tangent(value);
    }
    return z;
}

// Turns raw products of hidden states and head into final logits, in place.
template <class T>
__global__ void __launch_bounds__(row_threads<T>())
    apply_bias_scale_cap(T* tile,                     // (rows, cols)
                         const T* __restrict__ bias,  // (cols,) or null
                         int64_t rows, int64_t cols, int64_t stride, T scale, T softcap) {
    const T slope = softcap == 0 ? scale : scale / softcap;
    for (int64_t index = blockIdx.y; index < rows; index += gridDim.y) {
        T* const row = tile + index * stride;
        map_row<vector_size<T>()>(row, row, cols, [&](const auto& z, int64_t column) {
            const T* const own = bias == nullptr ? nullptr : bias + column;
            store(row + column, with_bias_scale_cap(z, own, slope, softcap));
        });
    }
}

// --- log-sum-exp and statistics -----------------------------------------------------------------------------

constexpr int64_t kNowhere = INT64_MAX;

// What an online softmax keeps of the logits that it has seen. Sums of exponentials are relative to `max`. They leave
// the label's own out, because the others would lose their digits beside it when the label is nearly certain.
template <class T>
struct Running {
    T max;
    T others;                  // sum of exp(z - max)
    T entropy = 0;             // -sum of exp(z - max) * (z - max)
    T logit_sum = 0;           // sum of z
    T square_sum = 0;          // sum of exp(z - max)^2
    int64_t first = kNowhere;  // column of the first logit that raised `max` to what it is
};

// What is subtracted before exponentiating. Rows of -inf so far (unreachable tokens) are shifted by 0, or -inf - -inf
// would be NaN.
template <class T>
__device__ inline T shift_of(T max) {
    return max == -static_cast<T>(INFINITY) ? T(0) : max;
}

// Makes the sums relative to `highest`, which is no less than the maximum so far.
template <bool STATS, class T>
__device__ inline void rebase(Running<T>& running, T highest) {
    const T kept = running.max == highest ? T(1) : exponential(running.max - shift_of(highest));
    if (STATS) {
        // Moving the shift by d adds d * exp to every -exp * log exp.
        const T drop = running.others == 0 ? T(0) : (highest - running.max) * running.others;
        running.entropy = (running.entropy + drop) * kept;
        running.square_sum *= kept * kept;
    }
    running.others *= kept;
    running.max = highest;
}

// Folds in COUNT logits: groups of GROUP consecutive ones, STRIDE columns from one group to the next. `label` is the
// label's column in the tile, -1 for none.
template <bool STATS, int GROUP, int64_t STRIDE, int COUNT, class T>
__device__ inline void fold(Running<T>& running, const T (&z)[COUNT], int64_t column, int64_t label) {
    static_assert(COUNT % GROUP == 0, "whole groups");
    constexpr int64_t span = (COUNT / GROUP - 1) * STRIDE + GROUP;
    T highest = z[0];
#pragma unroll
    for (int at = 1; at < COUNT; ++at) highest = larger(highest, z[at]);
    if (!(highest <= running.max)) {  // seldom true after the first few; true for NaN
        if (STATS && highest > running.max) {
#pragma unroll
            for (int at = COUNT - 1; at >= 0; --at) {
                if (z[at] == highest) running.first = column + at / GROUP * STRIDE + at % GROUP;
            }
        }
        rebase<STATS>(running, larger(running.max, highest));
    }
    const T shift = shift_of(running.max);
    T moved[COUNT];
#pragma unroll
    for (int at = 0; at < COUNT; ++at) moved[at] = z[at] - shift;
    if (label >= column && label - column < span) {  // true in one batch of a row, for a few of its threads
#pragma unroll
        for (int at = 0; at < COUNT; ++at) {
            // The label's exponential is then 0, or NaN if the row is broken.
            if (column + at / GROUP * STRIDE + at % GROUP == label) moved[at] -= static_cast<T>(INFINITY);
        }
    }
    T others = 0, entropy = 0, logit_sum = 0, square_sum = 0;
#pragma unroll
    for (int at = 0; at < COUNT; ++at) {
        const T e = exponential(moved[at]);
        others += e;
        if (STATS) {
            entropy -= e == 0 ? T(0) : e * moved[at];  // 0 * -inf is 0 here
            logit_sum += z[at];
            square_sum += e * e;
        }
    }
    running.others += others;
    running.entropy += entropy;
    running.logit_sum += logit_sum;
    running.square_sum += square_sum;
}

// This thread's part of a row, in ascending order of columns.
template <bool STATS, class T>
__device__ inline void fold_share(Running<T>& running, const T* row, int64_t cols, int64_t label) {
    constexpr int size = vector_size<T>();
    constexpr int unrolled = batch_size<T>() / size;
    constexpr int64_t threads = row_threads<T>();
    const int64_t head = elements_to_alignment(row) < cols ? elements_to_alignment(row) : cols;
    const int64_t vectors = (cols - head) / size;
    for (int64_t column = threadIdx.x; column < head; column += threads) {
        fold<STATS, 1, 1>(running, load<1>(row + column).values, column, label);
    }
    int64_t at = threadIdx.x;
    for (; at + (unrolled - 1) * threads < vectors; at += unrolled * threads) {
        T z[unrolled * size];
#pragma unroll
        for (int step = 0; step < unrolled; ++step) {
            const auto vector = load<size>(row + head + (at + step * threads) * size);
#pragma unroll
            for (int lane = 0; lane < size; ++lane) z[step * size + lane] = vector.values[lane];
        }
        fold<STATS, size, threads * size>(running, z, head + at * size, label);
    }
    for (; at < vectors; at += threads) {
        const int64_t column = head + at * size;
        fold<STATS, size, size>(running, load<size>(row + column).values, column, label);
    }
    for (int64_t column = head + vectors * size + threadIdx.x; column < cols; column += threads) {
        fold<STATS, 1, 1>(running, load<1>(row + column).values, column, label);
    }
}

// Folds the tile into the running state of each row, one block to a row. With STATS all statistics are computed, and
// those whose pointer is not null are read and written.
template <class T, bool STATS>
__global__ void __launch_bounds__(row_threads<T>())
    reduce_rows(const T* __restrict__ tile,          // (rows, cols), final logits
                const int64_t* __restrict__ labels,  // (rows,)
                T* __restrict__ max,                 // (rows,), as all that follow; read and written
                T* __restrict__ others, T* __restrict__ target, T* __restrict__ entropy, T* __restrict__ logit_sum,
                int64_t* __restrict__ argmax, T* __restrict__ square_sum, int64_t rows, int64_t cols, int64_t stride,
                int64_t start) {
    constexpr int threads = row_threads<T>();
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const T* z = tile + row * stride;
        const T before = max[row];
        // A thread starts from the row's maximum, so it notes a column only where a logit exceeds that.
        Running<T> part{before, T(0)};
        const int64_t label = column_of(labels[row], start, cols);
        fold_share<STATS>(part, z, cols, label);
        const T highest = block_reduce<threads>(part.max, Larger());
        const int64_t own = part.max == highest ? part.first : kNowhere;
        rebase<STATS>(part, highest);
        part.others = block_reduce<threads>(part.others, Sum());
        if (STATS) {
            part.entropy = block_reduce<threads>(part.entropy, Sum());
            part.logit_sum = block_reduce<threads>(part.logit_sum, Sum());
            part.square_sum = block_reduce<threads>(part.square_sum, Sum());
            part.first = block_reduce<threads>(own, Smaller());
        }
        if (threadIdx.x != 0) continue;
        Running<T> total{before, others[row]};
        if (STATS && entropy != nullptr) total.entropy = entropy[row];
        if (STATS && square_sum != nullptr) total.square_sum = square_sum[row];
        rebase<STATS>(total, highest);
        max[row] = highest;
        others[row] = total.others + part.others;
        if (label >= 0) target[row] = z[label];
        if (STATS && entropy != nullptr) entropy[row] = total.entropy + part.entropy;
        if (STATS && logit_sum != nullptr) logit_sum[row] += part.logit_sum;
        if (STATS && square_sum != nullptr) square_sum[row] = total.square_sum + part.square_sum;
        if (STATS && argmax != nullptr && part.first != kNowhere) argmax[row] = start + part.first;
    }
}

// --- gradient -----------------------------------------------------------------------------------------------

// One row's numbers, the same for all of its columns.
template <class T>
struct GradientRow {
    T max;
    T others;
    T scale;
    T softcap;       // 0 if there is none
    int64_t target;  // the label's column, or -1 if it is in another tile
    T* residual;     // receives what rounding to 16 bits took from the label's own value; may be null
};

// sumexp * (softmax - onehot), times the softcap's derivative and the row's scale. For the label the first two factors
// are minus the sum of the others.
template <class T>
__device__ inline T dlogit(const GradientRow<T>& row, T z, int64_t column) {
    T d = exponential(z - row.max);
    if (column == row.target) d = -row.others;
    if (row.softcap != 0) {
        const T capped = z / row.softcap;  // a reciprocal would miss the exact 0 of a saturated logit
        d *= T(1) - capped * capped;
    }
    return d * row.scale;
}

// Writes COUNT neighbours, rounded once, and what the label's own value lost by that. `to` may be where `z` was from.
template <int COUNT, class T, class Out>
__device__ inline void write(const GradientRow<T>& row, const Vector<T, COUNT>& z, int64_t column, Out* to) {
    Vector<Out, COUNT> rounded;
#pragma unroll
    for (int lane = 0; lane < COUNT; ++lane) {
        rounded.values[lane] = rounded_to<Out>(dlogit(row, z.values[lane], column + lane));
    }
    store(to, rounded);
    if (sizeof(Out) == sizeof(T) || row.residual == nullptr) return;
    if (row.target < column || row.target >= column + COUNT) return;
    // Once a row the value is computed again, which costs less than keeping every exact value in a register.
    T own = z.values[0];
    Out own_rounded = rounded.values[0];
#pragma unroll
    for (int lane = 1; lane < COUNT; ++lane) {
        if (column + lane != row.target) continue;
        own = z.values[lane];
        own_rounded = rounded.values[lane];
    }
    *row.residual = dlogit(row, own, row.target) - widened(own_rounded);
}

// The gradient of every logit. `out` is the tile itself or shares no memory with it.
template <class T, class Out>
__global__ void __launch_bounds__(row_threads<T>())
    dlogits_rows(const T* tile,                       // (rows, cols), final logits
                 Out* out,                            // (rows, cols)
                 const int64_t* __restrict__ labels,  // (rows,)
                 const T* __restrict__ max,           // (rows,)
                 const T* __restrict__ others,        // (rows,)
                 const T* __restrict__ scale,         // (rows,) or null
                 T* __restrict__ residual,            // (rows,) of 0, written by the label's thread; or null
                 int64_t rows, int64_t cols, int64_t tile_stride, int64_t out_stride, int64_t start, T softcap) {
    for (int64_t index = blockIdx.y; index < rows; index += gridDim.y) {
        Out* const to = out + index * out_stride;
        const GradientRow<T> row{max[index],
                                 others[index],
                                 scale == nullptr ? T(1) : scale[index],
                                 softcap,
                                 column_of(labels[index], start, cols),
                                 residual == nullptr ? nullptr : residual + index};
        map_row<vector_size<Out>()>(tile + index * tile_stride, to, cols, [&](const auto& z, int64_t column) {
            write(row, z, column, to + column);
        });
    }
}

}  // namespace dpo_kernels::cuda
