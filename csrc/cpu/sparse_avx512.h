// What the sampler and its products do across registers, by AVX-512's own instructions. sparse_impl.h includes this
// instead of its loops. The sample is the same.

static_assert(kGroup == 16 && kSampleBlock == 256, "16 groups that fill a register each");

static const int64_t kAhead = 2048;  // codes: a page, beyond which the CPU does not read ahead by itself

DPO_INLINE void read_ahead(const uint16_t* block) {
    const char* ahead = reinterpret_cast<const char*>(block + kAhead);
    for (int64_t i = 0; i < kSampleBlock * 2; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T0);
}

// Of each pair of neighbouring elements of a and b, 32 bits each, the sum: a's and b's by turns.
DPO_INLINE __m512i sums_of_pairs(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

DPO_INLINE __m512i inclusive_sums(__m512i v) {
    const __m512i zero = _mm512_setzero_si512();
    v = _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 15));
    v = _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 14));
    v = _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 12));
    return _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 8));
}

// Which of 16 stretches of the line the grid falls on, if these are their ends and the first begins at `at`.
DPO_INLINE __mmask16 falls_on(__m512i ends, int32_t at) {
    const __m512i starts = _mm512_alignr_epi32(ends, _mm512_set1_epi32(at), 15);
    return _mm512_cmpneq_epi32_mask(_mm512_srli_epi32(ends, 20), _mm512_srli_epi32(starts, 20));
}

static int32_t sums_of_groups(const int32_t* length, int32_t* sums) {
    // Four steps, each of which halves the registers: pairs, halves of quarters, quarters, and halves.
    __m512i v[16], pairs[8], fours[4];
    for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(length + i * kGroup);
    for (int i = 0; i < 8; i++) pairs[i] = sums_of_pairs(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 4; i++) {
        fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]),
                                    _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
    }
    // Quarter q of fours[i] has the sums of groups 4 i .. 4 i + 3 over elements 4 q .. 4 q + 3 of the groups.
    const __m512i low = _mm512_add_epi32(_mm512_shuffle_i32x4(fours[0], fours[1], 0x88),
                                         _mm512_shuffle_i32x4(fours[0], fours[1], 0xdd));
    const __m512i high = _mm512_add_epi32(_mm512_shuffle_i32x4(fours[2], fours[3], 0x88),
                                          _mm512_shuffle_i32x4(fours[2], fours[3], 0xdd));
    const __m512i all =
        _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd));
    _mm512_storeu_si512(sums, all);
    return _mm512_reduce_add_epi32(all);
}

// Writes the entries of a group that the mask has, and behind them what the next will overwrite.
DPO_INLINE void keep_entries(const Measured<float>& block, int64_t first, __mmask16 mask, int32_t* columns,
                             float* values) {
    const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i all = _mm512_add_epi32(numbers, _mm512_set1_epi32(static_cast<int32_t>(block.left + first)));
    const __m512 length = _mm512_cvtepi32_ps(_mm512_loadu_si512(block.length + first));
    const __m512 times = _mm512_div_ps(_mm512_set1_ps(static_cast<float>(kUnits)), length);
    const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, block.e + first), times);
    _mm512_storeu_si512(columns, _mm512_maskz_compress_epi32(mask, all));
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(mask, value));
}

DPO_INLINE void keep_entries(const Measured<double>& block, int64_t first, uint32_t mask, int32_t* columns,
                             double* values) {
    for (; mask != 0; mask &= mask - 1) keep_entry(block, first + __builtin_ctz(mask), columns++, values++);
}

// There is room for a group behind the last entry.
template <typename T>
static int64_t hits(const Measured<T>& block, int32_t* columns, T* values) {
    const __m512i ends = _mm512_add_epi32(_mm512_set1_epi32(block.at), inclusive_sums(_mm512_loadu_si512(block.sums)));
    int32_t starts[17];
    starts[0] = block.at;
    _mm512_storeu_si512(starts + 1, ends);
    int64_t count = 0;
    for (uint32_t groups = falls_on(ends, block.at); groups != 0; groups &= groups - 1) {
        const int64_t g = __builtin_ctz(groups);
        const __m512i lengths = _mm512_loadu_si512(block.length + g * kGroup);
        const __m512i within = _mm512_add_epi32(_mm512_set1_epi32(starts[g]), inclusive_sums(lengths));
        const __mmask16 mask = falls_on(within, starts[g]);
        keep_entries(block, g * kGroup, mask, columns + count, values + count);
        count += __builtin_popcount(mask);
    }
    return count;
}

DPO_INLINE void put_sums(float* out, __m512 sums, bool accumulate, bool past_cache) {
    if (accumulate) sums = _mm512_add_ps(_mm512_loadu_ps(out), sums);
    if (past_cache) _mm512_stream_ps(out, sums);
    else _mm512_storeu_ps(out, sums);
}

// Adds up 32 * kPairs elements of rows of bfloat16, those of even and of odd numbers apart: a bfloat16 is the upper half
// of a float. Inlined or not unrolled, the sums would not stay in registers.
template <int kPairs>
__attribute__((noinline)) static void add_pairs(float* out, const uint16_t* matrix, int64_t stride,
                                                const int32_t* indices, const float* factors, int64_t count,
                                                bool accumulate, bool past_cache) {
    __m512 even[kPairs], odd[kPairs];
#pragma GCC unroll 9
    for (int i = 0; i < kPairs; i++) even[i] = odd[i] = _mm512_setzero_ps();
    const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
    for (int64_t k = 0; k < count; k++) {
        const uint16_t* row = matrix + indices[k] * stride;
        const __m512 factor = _mm512_set1_ps(factors[k]);
#pragma GCC unroll 9
        for (int i = 0; i < kPairs; i++) {
            __m512i both = _mm512_loadu_si512(row + 32 * i);
            __asm__("" : "+v"(both));  // or the compiler reads it twice
            even[i] = _mm512_fmadd_ps(factor, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), even[i]);
            odd[i] = _mm512_fmadd_ps(factor, _mm512_castsi512_ps(_mm512_and_si512(both, upper)), odd[i]);
        }
    }
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#pragma GCC unroll 9
    for (int i = 0; i < kPairs; i++) {
        float* at = out + 32 * i;
        put_sums(at, _mm512_permutex2var_ps(even[i], low, odd[i]), accumulate, past_cache);
        put_sums(at + 16, _mm512_permutex2var_ps(even[i], high, odd[i]), accumulate, past_cache);
    }
}

static int64_t add_in_registers(float* out, int64_t width, const uint16_t* matrix, int64_t stride,
                                const int32_t* indices, const float* factors, int64_t count, bool accumulate,
                                bool past_cache) {
    int64_t done = 0;
    const auto add = [&](auto* run, int64_t columns) {
        for (; done + columns <= width; done += columns) {
            run(out + done, matrix + done, stride, indices, factors, count, accumulate, past_cache);
        }
    };
    add(add_pairs<9>, 32 * 9);  // 18 registers of sums
    add(add_pairs<3>, 32 * 3);
    add(add_pairs<1>, 32);
    return done;
}
