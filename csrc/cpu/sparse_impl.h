// The sample of the logits' gradient, and its products, as loops that the compiler vectorises. rows_impl.h includes this
// once for each instruction set. dpo_kernels/kernels/sampling.py explains the sample.

static const int64_t kSampleBlock = 256;
static const uint32_t kStarts = 16;     // blocks whose grids are placed at a time
static const int64_t kGroup = 16;       // entries whose places are added up before one of them is looked for
static const int32_t kUnits = 1 << 20;  // of a step

// Where the grids of kStarts blocks begin, in units: the first words of Philox-4x32-10 (Salmon et al., SC 2011) for the
// counters (token, block, 0).
static void grid_starts(uint64_t seed, uint64_t token, uint32_t block, int32_t* starts) {
    DPO_SIMD()
    for (uint32_t i = 0; i < kStarts; i++) {
        uint32_t c0 = static_cast<uint32_t>(token), c1 = static_cast<uint32_t>(token >> 32), c2 = block + i, c3 = 0;
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; round++) {
            const uint64_t first = uint64_t{0xD2511F53} * c0, second = uint64_t{0xCD9E8D57} * c2;
            c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
            c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
            c1 = static_cast<uint32_t>(second);
            c3 = static_cast<uint32_t>(first);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        starts[i] = static_cast<int32_t>(c0 >> 12);
    }
}

// The places that entries take on the line of the grid, in units. An entry that is always kept takes a whole step: the
// grid falls on it wherever it begins, and on the entries behind it as if it were not there. NaN is kept, and 0 is not.
template <typename T>
static void places(const T* e, int64_t size, T threshold, T per, int32_t* length) {
    DPO_SIMD()
    for (int64_t i = 0; i < size; i++) {
        const T units = e[i] * per + T(0.5);  // infinite where a unit of the threshold underflows
        const int32_t whole = static_cast<int32_t>(units < T(kUnits) ? units : T(kUnits));
        const int32_t small = e[i] > T(0) ? (whole < 1 ? 1 : whole) : 0;
        length[i] = e[i] <= threshold ? small : kUnits;
    }
}

// A block of a row on the line of the grid. The grid begins `at` units before the block's entries.
template <typename T>
struct Measured {
    alignas(64) T room[kSampleBlock];
    alignas(64) int32_t length[kSampleBlock];
    alignas(64) int32_t sums[kSampleBlock / kGroup];
    int32_t at;
    int64_t left;  // the first of its columns
    const T* e;    // exponentials, here or in the tile
};

// Where entry i of a block is kept: its column and its value, which is divided by the part of a step that it takes.
template <typename T>
DPO_INLINE void keep_entry(const Measured<T>& block, int64_t i, int32_t* column, T* value) {
    *column = static_cast<int32_t>(block.left + i);
    *value = block.e[i] * (T(kUnits) / static_cast<T>(block.length[i]));
}

#ifdef DPO_AVX512
#include "sparse_avx512.h"
#else
// Adds up the places of each group of kGroup entries; returns the sum of all. There are kSampleBlock.
static int32_t sums_of_groups(const int32_t* length, int32_t* sums) {
    int32_t total = 0;
    for (int64_t g = 0; g < kSampleBlock / kGroup; g++) {
        int32_t sum = 0;
        DPO_SIMD(reduction(+ : sum))
        for (int64_t i = 0; i < kGroup; i++) sum += length[g * kGroup + i];
        total += sums[g] = sum;
    }
    return total;
}

// Writes the entries of a block that the grid falls on; returns how many. Groups that it does not fall on are passed over.
template <typename T>
static int64_t hits(const Measured<T>& block, int32_t* columns, T* values) {
    int32_t chosen[kSampleBlock + 1];
    int64_t count = 0;
    int32_t at = block.at;
    for (int64_t g = 0; g < kSampleBlock / kGroup; g++) {
        const int32_t behind = at + block.sums[g];
        if (behind / kUnits != at / kUnits) {
            for (int64_t i = g * kGroup; i < (g + 1) * kGroup; i++) {
                const int32_t end = at + block.length[i];
                chosen[count] = static_cast<int32_t>(i);
                count += end / kUnits != at / kUnits;
                at = end;
            }
        }
        at = behind;
    }
    for (int64_t k = 0; k < count; k++) keep_entry(block, chosen[k], columns + k, values + k);
    return count;
}

DPO_INLINE void read_ahead(const uint16_t*) {}

// Returns how many columns of a sum of rows it has written.
static int64_t add_in_registers(float*, int64_t, const uint16_t*, int64_t, const int32_t*, const float*, int64_t, bool,
                                bool) {
    return 0;
}
#endif

// Writes the kept entries of a row, which may be all of them; returns how many there are. With null columns none are
// chosen. Adds how many are expected. `read(block, size, threshold, per)` fills in the block's exponentials exp(z - max)
// and their places, and `flat(column)` returns the derivative of the cap.
template <typename T, typename Read, typename Flat>
static int64_t sample_row(int64_t cols, int64_t start, const SampledRows<T>& rows, int64_t row, const Read& read,
                          const Flat& flat, int32_t* columns, T* values, int64_t* expected) {
    const T threshold = rows.tau * rows.sumexp[row], per = T(kUnits) / threshold;
    const int64_t label = rows.labels[row] - start;
    const uint64_t token = static_cast<uint64_t>(rows.tokens[row]);
    const uint32_t first = static_cast<uint32_t>(start / kSampleBlock);
    Measured<T> block;
    int32_t starts[kStarts];
    int64_t count = 0, units = 0;
    for (int64_t left = 0; left < cols; left += kSampleBlock) {
        const int64_t size = cols - left < kSampleBlock ? cols - left : kSampleBlock;
        const uint32_t number = static_cast<uint32_t>(left / kSampleBlock);
        if (number % kStarts == 0) grid_starts(rows.seed, token, first + number, starts);
        block.left = left;
        block.at = starts[number % kStarts];
        read(block, size, threshold, per);
        const bool own = label >= left && label < left + size;
        if (own) block.length[label - left] = kUnits;
        memset(block.length + size, 0, (kSampleBlock - size) * sizeof(int32_t));
        const int32_t total = sums_of_groups(block.length, block.sums);
        units += total;
        if (columns == nullptr || block.at + total < kUnits) continue;
        const int64_t kept = hits(block, columns + count, values + count);
        if (own) {
            for (int64_t k = count; k < count + kept; k++) {
                if (columns[k] == label) values[k] = -rows.others[row];
            }
        }
        if (rows.softcap != 0) {
            for (int64_t k = count; k < count + kept; k++) values[k] *= flat(columns[k]);
        }
        count += kept;
    }
    *expected += units / kUnits;
    return count;
}

template <typename T>
static int64_t sample(Tile<T> tile, const SampledRows<T>& rows, int64_t row, int32_t* columns, T* values,
                      int64_t* expected) {
    const T* z = tile.data + row * tile.stride;
    const T max = rows.max[row];
    const auto read = [&](Measured<T>& block, int64_t size, T threshold, T per) {
        const T* from = z + block.left;
        block.e = rows.exponentiated ? from : block.room;
        if (!rows.exponentiated) {
            DPO_SIMD()
            for (int64_t i = 0; i < size; i++) block.room[i] = exponential(from[i] - max);
        }
        places(block.e, size, threshold, per, block.length);
    };
    const auto flat = [&](int64_t column) { return slope(z[column], rows.softcap); };
    return sample_row(tile.cols, tile.start, rows, row, read, flat, columns, values, expected);
}

static int64_t sample_of_codes(Codes codes, int64_t cols, int64_t start, const SampledRows<float>& rows, int64_t row,
                               int32_t* columns, float* values, int64_t* expected) {
    const uint16_t* z = codes.data + row * codes.stride;
    const float max = rows.max[row];
    const auto highest = [&](int64_t column) {
        return codes.highest[column / kCodedCols * codes.highest_stride + row];
    };
    const auto read = [&](Measured<float>& block, int64_t size, float threshold, float per) {
        const uint16_t* from = z + block.left;
        const float factor = factor_of_block(highest(block.left), max);
        block.e = block.room;
        read_ahead(from);
        DPO_SIMD()
        for (int64_t i = 0; i < size; i++) block.room[i] = factor * below(from[i]);
        places(block.e, size, threshold, per, block.length);
    };
    const auto flat = [&](int64_t column) {
        if (column == rows.labels[row] - start) return slope(rows.target[row], rows.softcap);
        return slope_of_code(z[column], highest(column), rows.softcap);
    };
    return sample_row(cols, start, rows, row, read, flat, columns, values, expected);
}

DPO_INLINE float widened(float value) { return value; }
DPO_INLINE double widened(double value) { return value; }
DPO_INLINE float widened(uint16_t value) { return from_bfloat16(value); }

// out (+)= the sum of factors[k] times row indices[k] of a matrix. Rows are added in their order, four at a time.
template <typename T, typename Element>
static void add_rows(T* out, int64_t width, const Element* matrix, int64_t stride, const int32_t* indices,
                     const T* factors, int64_t count, bool accumulate) {
    if (!accumulate) memset(out, 0, width * sizeof(T));
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
        const Element* a = matrix + indices[k] * stride;
        const Element* b = matrix + indices[k + 1] * stride;
        const Element* c = matrix + indices[k + 2] * stride;
        const Element* d = matrix + indices[k + 3] * stride;
        const T fa = factors[k], fb = factors[k + 1], fc = factors[k + 2], fd = factors[k + 3];
        DPO_SIMD()
        for (int64_t i = 0; i < width; i++) {
            out[i] += (fa * widened(a[i]) + fb * widened(b[i])) + (fc * widened(c[i]) + fd * widened(d[i]));
        }
    }
    for (; k < count; k++) {
        const Element* a = matrix + indices[k] * stride;
        const T fa = factors[k];
        DPO_SIMD()
        for (int64_t i = 0; i < width; i++) out[i] += fa * widened(a[i]);
    }
}

// The same of bfloat16. AVX-512 keeps the sum of most columns in registers.
static void add_bfloat16_rows(float* out, int64_t width, const uint16_t* matrix, int64_t stride, const int32_t* indices,
                              const float* factors, int64_t count, bool accumulate, bool past_cache) {
    const int64_t done = add_in_registers(out, width, matrix, stride, indices, factors, count, accumulate, past_cache);
    if (done == width) return;
    add_rows(out + done, width - done, matrix + done, stride, indices, factors, count, accumulate);
}
