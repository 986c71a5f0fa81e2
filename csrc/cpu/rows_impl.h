// The row passes as plain loops that the compiler vectorises; included once for each instruction set, with
// DPO_NAMESPACE set to its name. Only C functions of the library are called: see rows.h.
#include "rows.h"

#include <math.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "the row passes round and compare as IEEE has it: build them without -ffast-math"
#endif

// MSVC's own OpenMP knows no simd, and its experimental one relaxes the arithmetic of such loops.
#if defined(_MSC_VER) && !defined(__clang__)
#define DPO_SIMD(...)
#else
#define DPO_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define DPO_SIMD(...) DPO_PRAGMA(omp simd __VA_ARGS__)
#endif

#if defined(__GNUC__)
#define DPO_INLINE static inline __attribute__((always_inline))
#else
#define DPO_INLINE static inline
#endif

namespace dpo_kernels {
namespace DPO_NAMESPACE {

template <typename To, typename From>
DPO_INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

static const int64_t kBlock = 1024;  // columns of a block, which is read twice while it is in the first-level cache

template <typename T>
struct Limits {
    static constexpr T lowest = -T(INFINITY);
};

// The numbers of the exponential in float, which codes_avx512.h reads too.
static const float kLeastExponent = -88.37f;      // n = -127: the factor of the result is 0
static const float kShifter = 12582912.0f;        // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
static const float kLog2e = 1.44269504f;
static const float kLn2[2] = {0.693145752f, 1.42860677e-6f};
static const float kExp[5] = {0.00138146283f, 0.00836871675f, 0.0416683876f, 0.166665206f, 0.499999934f};

// exp(x) within 1 ulp or two; 0 where the result would be subnormal, -inf included; NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts; exp(r) = 1 + r + r^2 q(r), q a minimax polynomial for the
// relative error of exp (3e-9 in float, 4e-18 in double); n is added to the exponent of the result.
DPO_INLINE float exponential(float x) {
    x = x < kLeastExponent ? kLeastExponent : x;
    x = x > -kLeastExponent ? -kLeastExponent : x;
    const float shifted = x * kLog2e + kShifter;
    const float n = shifted - kShifter;
    const float r = (x - n * kLn2[0]) - n * kLn2[1];
    float q = kExp[0];
    for (int i = 1; i < 5; i++) q = q * r + kExp[i];
    const float power = bits<float>((bits<uint32_t>(shifted) + 127u) << 23);
    return (q * r * r + r + 1.0f) * power;
}

DPO_INLINE double exponential(double x) {
    x = x < -708.7 ? -708.7 : x;  // n = -1022 at the least; below, the result is replaced by 0
    x = x > 709.0 ? 709.0 : x;
    const double shifter = 6755399441055744.0;  // 1.5 * 2^52
    const double shifted = x * 1.4426950408889634 + shifter;
    const double n = shifted - shifter;
    const double r = (x - n * 0.6931471803691238) - n * 1.9082149292705878e-10;
    double q = 2.500001743608507915e-8;
    q = q * r + 2.7630241259998390052e-7;
    q = q * r + 2.755758646440899869e-6;
    q = q * r + 0.00002480149311837144033;
    q = q * r + 0.00019841269506539712052;
    q = q * r + 0.0013888888943612336501;
    q = q * r + 0.0083333333334944488405;
    q = q * r + 0.04166666666653021997;
    q = q * r + 0.16666666666666412591;
    q = q * r + 0.5000000000000010621;
    const double power = bits<double>((bits<uint64_t>(shifted) + 1023u) << 52);
    return x <= -708.7 ? 0.0 : (q * r * r + r + 1.0) * power;
}

// tanh(y); an odd polynomial near 0, where 1 - exp(-2|y|) would lose its digits.
DPO_INLINE float hyperbolic_tangent(float y) {
    const float size = y < 0.0f ? -y : y;
    const float square = y * y;
    float p = -0.00571705134f;
    p = p * square + 0.0206505936f;
    p = p * square - 0.0537435002f;
    p = p * square + 0.133314913f;
    p = p * square - 0.333332839f;
    const float near = y + y * square * p;
    const float decay = exponential(-2.0f * size);
    const float far = (1.0f - decay) / (1.0f + decay);
    // The first comparison is false for NaN, which then comes back through the polynomial.
    return size > 0.625f ? (y < 0.0f ? -far : far) : near;
}

DPO_INLINE double hyperbolic_tangent(double y) { return ::tanh(y); }

// Round to nearest, ties to even; NaN stays NaN.
DPO_INLINE uint16_t to_bfloat16(float value) {
    const uint32_t u = bits<uint32_t>(value);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

DPO_INLINE float from_bfloat16(uint16_t value) { return bits<float>(static_cast<uint32_t>(value) << 16); }

// This maximum drops NaN, which comes back through the sum of exponentials.
template <typename T>
static T largest(const T* z, int64_t count) {
    T best = Limits<T>::lowest;
    DPO_SIMD(reduction(max : best))
    for (int64_t i = 0; i < count; i++) best = z[i] > best ? z[i] : best;
    return best;
}

template <typename T>
static T sum(const T* z, int64_t count) {
    T total = 0;
    DPO_SIMD(reduction(+ : total))
    for (int64_t i = 0; i < count; i++) total += z[i];
    return total;
}

template <typename T>
static int64_t first_of(const T* z, int64_t count, T value) {
    int64_t i = 0;
    while (i < count - 1 && z[i] != value) i++;
    return i;
}

// One row's state while it is being folded. Blocks are summed in T, their sums in double.
template <typename T>
struct Running {
    T max;
    double others;
    double entropy;
    double square_sum;

    // Rescale to a new maximum.
    void move_to(T highest) {
        if (highest == max) return;
        const T factor = max == Limits<T>::lowest ? T(0) : exponential(max - highest);
        // Moving the shift by d adds d * exp to every -e * log e.
        const double drop = others > 0 ? (double(highest) - double(max)) * others : 0.0;
        entropy = (entropy + drop) * factor;
        others *= factor;
        square_sum *= double(factor) * factor;
        max = highest;
    }
};

// One row's state, as it is kept between tiles.
template <typename T>
DPO_INLINE Running<T> running(const RowState<T>& state, int64_t at) {
    return {state.max[at], double(state.others[at]), state.entropy ? double(state.entropy[at]) : 0.0,
            state.square_sum ? double(state.square_sum[at]) : 0.0};
}

// Keeps it, and adds to the sum of logits.
template <typename T>
DPO_INLINE void keep(const Running<T>& row, double logits, const RowState<T>& state, int64_t at) {
    state.max[at] = row.max;
    state.others[at] = T(row.others);
    if (state.entropy) state.entropy[at] = T(row.entropy);
    if (state.square_sum) state.square_sum[at] = T(row.square_sum);
    if (state.logit_sum) state.logit_sum[at] += T(logits);
}

template <typename T, bool kOverwrite>
static T exponentials(T* z, int64_t count, T shift) {
    T total = 0;
    DPO_SIMD(reduction(+ : total))
    for (int64_t i = 0; i < count; i++) {
        const T e = exponential(z[i] - shift);
        total += e;
        if (kOverwrite) z[i] = e;
    }
    return total;
}

template <typename T>
static void add_spread(const T* z, int64_t count, T shift, Running<T>& row) {
    T entropy = 0, squares = 0;
    DPO_SIMD(reduction(+ : entropy, squares))
    for (int64_t i = 0; i < count; i++) {
        const T below = z[i] - shift;
        const T e = exponential(below);
        entropy -= e > 0 ? e * below : T(0);  // 0 * -inf would be NaN
        squares += e * e;
    }
    row.entropy += entropy;
    row.square_sum += squares;
}

template <typename T, bool kOverwrite>
static void reduce_row(T* z, const Tile<T>& tile, int64_t label, const RowState<T>& state, int64_t r) {
    const bool spread = state.entropy || state.square_sum;
    Running<T> row = running(state, r);
    const bool here = label >= 0 && label < tile.cols;
    const T target = here ? z[label] : T(0);
    if (here) state.target[r] = target;
    // A row that is overwritten needs its last maximum at once.
    const int64_t step = kOverwrite ? tile.cols : kBlock;
    double logits = 0;
    for (int64_t left = 0; left < tile.cols; left += step) {
        const int64_t width = tile.cols - left < step ? tile.cols - left : step;
        const T highest = largest(z + left, width);
        if (highest > row.max) {
            if (state.argmax) state.argmax[r] = tile.start + left + first_of(z + left, width, highest);
            row.move_to(highest);
        }
        // A row of -inf so far (unreachable tokens) is shifted by 0, or -inf - -inf would be NaN.
        const T shift = row.max == Limits<T>::lowest ? T(0) : row.max;
        for (int64_t at = left; at < left + width; at += kBlock) {
            const int64_t count = left + width - at < kBlock ? left + width - at : kBlock;
            if (state.logit_sum) logits += sum(z + at, count);
            // For the sums the label's own logit is -inf, and its exponential 0. In a broken row it is NaN.
            const bool own = here && label >= at && label < at + count;
            if (own) z[label] = target + Limits<T>::lowest;
            if (spread) add_spread(z + at, count, shift, row);
            row.others += exponentials<T, kOverwrite>(z + at, count, shift);
            if (own) z[label] = kOverwrite ? exponential(target - shift) : target;
        }
    }
    keep(row, logits, state, r);
}

template <typename T>
static void reduce(Tile<T> tile, const int64_t* labels, RowState<T> state, bool overwrite, int64_t first,
                   int64_t last) {
    for (int64_t r = first; r < last; r++) {
        T* z = tile.data + r * tile.stride;
        if (overwrite) reduce_row<T, true>(z, tile, labels[r] - tile.start, state, r);
        else reduce_row<T, false>(z, tile, labels[r] - tile.start, state, r);
    }
}

template <typename T>
static void merge(RowState<T> state, RowState<T> parts, int64_t count, int64_t stride, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
        Running<T> row = running(state, r);
        double logits = 0;
        for (int64_t at = r; at < r + count * stride; at += stride) {
            Running<T> part = running(parts, at);
            if (part.max > row.max) {
                if (state.argmax) state.argmax[r] = parts.argmax[at];
                row.move_to(part.max);
            } else {
                part.move_to(row.max);
            }
            row.others += part.others;
            row.entropy += part.entropy;
            row.square_sum += part.square_sum;
            if (state.logit_sum) logits += parts.logit_sum[at];
        }
        keep(row, logits, state, r);
    }
}

// d z / d raw of the cap, without its scale: 1 - (z / softcap)^2.
template <typename T>
DPO_INLINE T slope(T z, T softcap) {
    const T capped = z / softcap;
    return T(1) - capped * capped;
}

template <typename T>
static void dlogits_in_place(T* z, int64_t cols, T max, T softcap, T scale) {
    if (softcap == T(0)) {
        DPO_SIMD()
        for (int64_t i = 0; i < cols; i++) z[i] = scale * exponential(z[i] - max);
    } else {
        DPO_SIMD()
        for (int64_t i = 0; i < cols; i++) z[i] = scale * (exponential(z[i] - max) * slope(z[i], softcap));
    }
}

static void dlogits_to_bfloat16(const float* z, uint16_t* out, int64_t cols, float max, float softcap, float scale,
                                bool exponentiated) {
    if (exponentiated) {
        DPO_SIMD()
        for (int64_t i = 0; i < cols; i++) out[i] = to_bfloat16(scale * z[i]);
    } else if (softcap == 0.0f) {
        DPO_SIMD()
        for (int64_t i = 0; i < cols; i++) out[i] = to_bfloat16(scale * exponential(z[i] - max));
    } else {
        DPO_SIMD()
        for (int64_t i = 0; i < cols; i++)
            out[i] = to_bfloat16(scale * (exponential(z[i] - max) * slope(z[i], softcap)));
    }
}

// Rounds the label's own value, and keeps what that takes from it.
static void store_label(const Gradient<float>& how, float own, int64_t label, int64_t r) {
    uint16_t* out = how.bfloat16 + r * how.bfloat16_stride + label;
    *out = to_bfloat16(own);
    if (how.residual) how.residual[r] = own - from_bfloat16(*out);
}

template <typename T>
static void store_bfloat16_row(const T*, const Tile<T>&, const Gradient<T>&, T, T, T, int64_t, int64_t) {}

static void store_bfloat16_row(const float* z, const Tile<float>& tile, const Gradient<float>& how, float own,
                               float softcap, float scale, int64_t label, int64_t r) {
    uint16_t* out = how.bfloat16 + r * how.bfloat16_stride;
    dlogits_to_bfloat16(z, out, tile.cols, how.max[r], softcap, scale, how.exponentiated);
    if (label >= 0 && label < tile.cols) store_label(how, own, label, r);
}

template <typename T>
static void dlogits(Tile<T> tile, Gradient<T> how, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
        T* z = tile.data + r * tile.stride;
        const int64_t label = how.labels[r] - tile.start;
        const bool here = label >= 0 && label < tile.cols;
        const T scale = how.scale ? how.scale[r] : T(1);
        // The label's own value: exp(z - max) minus the sum of all is minus the sum of the others.
        T own = 0;
        if (here) {
            own = -how.others[r];
            if (how.softcap != T(0)) own *= slope(z[label], how.softcap);
            own *= scale;
        }
        if (how.bfloat16) {
            store_bfloat16_row(z, tile, how, own, how.softcap, scale, label, r);
            continue;
        }
        if (!how.exponentiated) {
            dlogits_in_place(z, tile.cols, how.max[r], how.softcap, scale);
        } else if (how.scale) {
            DPO_SIMD()
            for (int64_t i = 0; i < tile.cols; i++) z[i] *= scale;
        }
        if (here) z[label] = own;
    }
}

template <typename T>
static void apply_bias_scale_cap(Tile<T> tile, const T* bias, T scale, T softcap, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
        T* z = tile.data + r * tile.stride;
        for (int64_t left = 0; left < tile.cols; left += kBlock) {
            const int64_t stop = tile.cols - left < kBlock ? tile.cols : left + kBlock;
            if (bias) {
                DPO_SIMD()
                for (int64_t i = left; i < stop; i++) z[i] += bias[i];
            }
            if (softcap != T(0)) {
                const T inner = scale / softcap;
                DPO_SIMD()
                for (int64_t i = left; i < stop; i++) z[i] = softcap * hyperbolic_tangent(z[i] * inner);
            } else if (scale != T(1)) {
                DPO_SIMD()
                for (int64_t i = left; i < stop; i++) z[i] *= scale;
            }
        }
    }
}

static void scaled_to_bfloat16(const float* in, uint16_t* out, int64_t count, float factor) {
    DPO_SIMD()
    for (int64_t i = 0; i < count; i++) out[i] = to_bfloat16(factor * in[i]);
}

#include "codes_impl.h"
#include "sparse_impl.h"

extern const Passes<float> passes_float = {reduce<float>,
                                           merge<float>,
                                           dlogits<float>,
                                           apply_bias_scale_cap<float>,
                                           encode,
                                           reduce_block,
                                           dlogits_of_codes,
                                           scaled_to_bfloat16,
                                           sample<float>,
                                           sample_of_codes,
                                           add_rows<float, float>,
                                           add_bfloat16_rows};
extern const Passes<double> passes_double = {reduce<double>,
                                             merge<double>,
                                             dlogits<double>,
                                             apply_bias_scale_cap<double>,
                                             nullptr,
                                             nullptr,
                                             nullptr,
                                             nullptr,
                                             sample<double>,
                                             nullptr,
                                             add_rows<double, double>,
                                             nullptr};

}  // namespace DPO_NAMESPACE
}  // namespace dpo_kernels
