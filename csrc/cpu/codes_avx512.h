// Sums and codes of a block of logits from one reading, by AVX-512's own instructions. A compiler's loops read it four
// times, and wait for sums across a register. codes_impl.h includes this for that instruction set.

static const int64_t kLanes = 16;
static const int64_t kVectors = kCodedCols / kLanes;

// `exponential` of x <= 0, bit for bit.
DPO_INLINE __m512 exponential_below(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(kLeastExponent), x);  // NaN if x is
    const __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(kLog2e), _mm512_set1_ps(kShifter));
    const __m512 n = _mm512_sub_ps(shifted, _mm512_set1_ps(kShifter));
    const __m512 near = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2[0]), x);
    const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2[1]), near);
    __m512 q = _mm512_set1_ps(kExp[0]);
    for (int i = 1; i < 5; i++) q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(kExp[i]));
    const __m512 p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(q, r), r, r), _mm512_set1_ps(1.0f));
    const __m512i biased = _mm512_add_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(127));
    return _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23)));
}

// What `encode` makes of 32 logits, of which the largest was taken.
DPO_INLINE __m512i codes_of(__m512 low, __m512 high) {
    const __m512 by_nat = _mm512_set1_ps(kStepsByNat), half = _mm512_set1_ps(0.5f), last = _mm512_set1_ps(kLastCode);
    const __m512 first = _mm512_min_ps(_mm512_fnmadd_ps(low, by_nat, half), last);  // the last code for NaN
    const __m512 second = _mm512_min_ps(_mm512_fnmadd_ps(high, by_nat, half), last);
    const __m512i packed = _mm512_packus_epi32(_mm512_cvttps_epi32(first), _mm512_cvttps_epi32(second));
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), packed);
}

DPO_INLINE void store_codes(uint16_t* out, __m512i codes, bool past_cache) {
    if (past_cache) _mm512_stream_si512(reinterpret_cast<__m512i*>(out), codes);
    else _mm512_storeu_si512(out, codes);
}

// `largest` of kCodedCols logits: NaN is dropped.
DPO_INLINE float largest_of_block(const float* z) {
    __m512 best[4];
    for (int i = 0; i < 4; i++) best[i] = _mm512_set1_ps(-INFINITY);
    for (int i = 0; i < kVectors; i++) best[i % 4] = _mm512_max_ps(_mm512_loadu_ps(z + i * kLanes), best[i % 4]);
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(best[0], best[1]), _mm512_max_ps(best[2], best[3])));
}

// Returns the sum of the exponentials of kCodedCols logits relative to the largest, and writes their codes if asked to.
template <bool kCoded>
DPO_INLINE float sum_of_block(const float* z, float highest, uint16_t* codes, bool past_cache) {
    const __m512 shift = _mm512_set1_ps(highest);
    __m512 total[4];
    for (int i = 0; i < 4; i++) total[i] = _mm512_setzero_ps();
    for (int i = 0; i < kVectors; i += 2) {
        const __m512 low = _mm512_sub_ps(_mm512_loadu_ps(z + i * kLanes), shift);
        const __m512 high = _mm512_sub_ps(_mm512_loadu_ps(z + (i + 1) * kLanes), shift);
        if (kCoded) store_codes(codes + i * kLanes, codes_of(low, high), past_cache);
        total[i % 4] = _mm512_add_ps(total[i % 4], exponential_below(low));
        total[i % 4 + 1] = _mm512_add_ps(total[i % 4 + 1], exponential_below(high));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(total[0], total[1]), _mm512_add_ps(total[2], total[3])));
}

static void reduce_block(Tile<float> tile, const int64_t* labels, RowState<float> state, Codes codes, int64_t first,
                         int64_t last) {
    const bool sums_only = !state.entropy && !state.square_sum && !state.logit_sum && !state.argmax;
    if (tile.cols != kCodedCols || !sums_only) return reduce_and_encode(tile, labels, state, codes, first, last);
    for (int64_t r = first; r < last; r++) {
        const float* z = tile.data + r * tile.stride;
        const int64_t label = labels[r] - tile.start;
        const float highest = largest_of_block(z);
        // A row with the label, or without a finite logit, is rare.
        if ((label >= 0 && label < kCodedCols) || highest - highest != 0.0f) {
            reduce_and_encode(tile, labels, state, codes, r, r + 1);
            continue;
        }
        state.max[r] = highest;
        if (codes.data) {
            codes.highest[r] = highest;
            uint16_t* out = codes.data + r * codes.stride;
            state.others[r] = sum_of_block<true>(z, highest, out, codes.past_cache);
        } else {
            state.others[r] = sum_of_block<false>(z, highest, nullptr, false);
        }
    }
}
