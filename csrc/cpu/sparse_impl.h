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

// Writes the kept entries of a row, which may be all of them; returns how many there are. Adds how many are expected.
template <typename T>
static int64_t sample(Tile<T> tile, const SampledRows<T>& rows, int64_t row, int32_t* columns, T* values,
                      int64_t* expected) {
    const T* z = tile.data + row * tile.stride;
    const T max = rows.max[row], threshold = rows.tau * rows.sumexp[row], per = T(kUnits) / threshold;
    const int64_t label = rows.labels[row] - tile.start;
    T e[kSampleBlock];
    int32_t length[kSampleBlock];
    int64_t count = 0, units = 0;
    for (int64_t left = 0; left < tile.cols; left += kSampleBlock) {
        const int64_t size = tile.cols - left < kSampleBlock ? tile.cols - left : kSampleBlock;
        if (rows.exponentiated) {
            memcpy(e, z + left, size * sizeof(T));
        } else {
            DPO_SIMD()
            for (int64_t i = 0; i < size; i++) e[i] = exponential(z[left + i] - max);
        }
        int32_t total = 0, large = 0;
        DPO_SIMD(reduction(+ : total, large))
        for (int64_t i = 0; i < size; i++) {
            const bool small = e[i] > T(0) && e[i] <= threshold;
            const T units_of_e = e[i] * per + T(0.5);  // infinite where a unit of the threshold underflows
            const T rounded = units_of_e < T(kUnits) ? units_of_e : T(kUnits);
            const int32_t whole = static_cast<int32_t>(small ? rounded : T(0));
            length[i] = small && whole < 1 ? 1 : whole;
            total += length[i];
            large += e[i] <= threshold ? 0 : 1;  // NaN is kept
        }
        int64_t at = grid_start(rows.seed, static_cast<uint64_t>(rows.tokens[row]),
                                static_cast<uint32_t>((tile.start + left) / kSampleBlock));
        const bool with_label = label >= left && label < left + size;
        if (with_label && e[label - left] <= threshold) {
            total -= length[label - left];
            length[label - left] = 0;
            large++;
        }
        units += total;
        *expected += large;
        if (!with_label && large == 0 && at + total < kUnits) continue;
        for (int64_t i = 0; i < size; i++) {
            T value = e[i];
            if (with_label && left + i == label) {
                value = -rows.others[row];
            } else if (length[i] != 0) {
                const int64_t end = at + length[i];
                const bool hit = end / kUnits != at / kUnits;
                at = end;
                if (!hit) continue;
                value *= T(kUnits) / static_cast<T>(length[i]);
            } else if (e[i] <= threshold) {
                continue;  // it is 0
            }
            if (rows.softcap != 0) {
                const T capped = z[left + i] / rows.softcap;
                value *= T(1) - capped * capped;
            }
            columns[count] = static_cast<int32_t>(left + i);
            values[count++] = value;
        }
    }
    *expected += units / kUnits;
    return count;
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
