// The sample of the logits' gradient, and its products, as loops that the compiler vectorises. rows_impl.h includes this
// once for each instruction set. dpo_kernels/kernels/sampling.py explains the sample.

static const int64_t kSampleBlock = 256;
static const int32_t kUnits = 1 << 20;

// The first word of Philox-4x32-10 (Salmon et al., SC 2011) for the counter (token, block, 0), in units.
static int32_t grid_start(uint64_t seed, uint64_t token, uint32_t block) {
    uint32_t c0 = static_cast<uint32_t>(token), c1 = static_cast<uint32_t>(token >> 32), c2 = block, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t first = 0xD2511F53ull * c0, second = 0xCD9E8D57ull * c2;
        c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
        c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(second);
        c3 = static_cast<uint32_t>(first);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return static_cast<int32_t>(c0 >> 12);
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

static int32_t sum_of_places(const int32_t* length, int64_t size) {
    int32_t total = 0;
    DPO_SIMD(reduction(+ : total))
    for (int64_t i = 0; i < size; i++) total += length[i];
    return total;
}

// Writes which entries of a block the grid falls on, if it begins `at` units before them; returns how many. Groups that it
// does not fall on are passed over. There are kSampleBlock lengths.
static int64_t hits(const int32_t* length, int64_t at, int32_t* chosen) {
    constexpr int64_t kGroup = 16;
    int64_t count = 0;
    for (int64_t left = 0; left < kSampleBlock; left += kGroup) {
        const int64_t behind = at + sum_of_places(length + left, kGroup);
        if (behind / kUnits != at / kUnits) {
            for (int64_t i = left; i < left + kGroup; i++) {
                const int64_t end = at + length[i];
                chosen[count] = static_cast<int32_t>(i);
                count += end / kUnits != at / kUnits;
                at = end;
            }
        }
        at = behind;
    }
    return count;
}

// Writes the kept entries of a row, which may be all of them; returns how many there are. With null columns none are
// chosen. Adds how many are expected. `read(left, size, room)` returns exp(z - max) of a block, which may lie in the room,
// and `flat(column)` the derivative of the cap.
template <typename T, typename Read, typename Flat>
static int64_t sample_row(int64_t cols, int64_t start, const SampledRows<T>& rows, int64_t row, const Read& read,
                          const Flat& flat, int32_t* columns, T* values, int64_t* expected) {
    const T threshold = rows.tau * rows.sumexp[row], per = T(kUnits) / threshold;
    const int64_t label = rows.labels[row] - start;
    T room[kSampleBlock];
    int32_t length[kSampleBlock], chosen[kSampleBlock + 1];
    int64_t count = 0, units = 0;
    for (int64_t left = 0; left < cols; left += kSampleBlock) {
        const int64_t size = cols - left < kSampleBlock ? cols - left : kSampleBlock;
        const T* e = read(left, size, room);
        places(e, size, threshold, per, length);
        if (label >= left && label < left + size) length[label - left] = kUnits;
        const int32_t total = sum_of_places(length, size);
        units += total;
        if (columns == nullptr) continue;
        const int64_t at = grid_start(rows.seed, static_cast<uint64_t>(rows.tokens[row]),
                                      static_cast<uint32_t>((start + left) / kSampleBlock));
        if (at + total < kUnits) continue;
        memset(length + size, 0, (kSampleBlock - size) * sizeof(int32_t));
        const int64_t kept = hits(length, at, chosen);
        for (int64_t k = 0; k < kept; k++) {
            const int64_t i = chosen[k];
            T value = e[i] * (T(kUnits) / static_cast<T>(length[i]));
            if (left + i == label) value = -rows.others[row];
            if (rows.softcap != 0) value *= flat(left + i);
            columns[count] = static_cast<int32_t>(left + i);
            values[count++] = value;
        }
    }
    *expected += units / kUnits;
    return count;
}

template <typename T>
static int64_t sample(Tile<T> tile, const SampledRows<T>& rows, int64_t row, int32_t* columns, T* values,
                      int64_t* expected) {
    const T* z = tile.data + row * tile.stride;
    const T max = rows.max[row];
    const auto read = [&](int64_t left, int64_t size, T* room) -> const T* {
        if (rows.exponentiated) return z + left;
        DPO_SIMD()
        for (int64_t i = 0; i < size; i++) room[i] = exponential(z[left + i] - max);
        return room;
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
    const auto read = [&](int64_t left, int64_t size, float* room) -> const float* {
        const float factor = factor_of_block(highest(left), max);
        DPO_SIMD()
        for (int64_t i = 0; i < size; i++) room[i] = factor * below(z[left + i]);
        return room;
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
