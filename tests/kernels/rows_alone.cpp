// The row passes without torch, beside plain sums in long double: for a CPU that is only emulated here. It prints the
// largest error of each pass in units of the last place, and fails where one is too large.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "rows.h"

using namespace dpo_kernels;

namespace {

bool healthy = true;

void report(const char* type, const char* what, double error, double most) {
    std::printf("%s %s %.3g\n", type, what, error);
    if (!(error <= most)) healthy = false;
}

// The larger error; NaN if either is, which std::fmax would drop.
double worse(double error, double other) { return std::isnan(error) || error >= other ? error : other; }

// Numbers in [-8, 8) that every machine makes alike.
template <typename T>
std::vector<T> numbers(int64_t count) {
    std::vector<T> values(count);
    uint64_t state = 42;
    for (T& value : values) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        value = static_cast<T>(static_cast<double>(state >> 40) / (1 << 20) - 8.0);
    }
    return values;
}

template <typename T>
void check(const char* type, const Passes<T>& passes, T epsilon) {
    constexpr int64_t kRows = 3, kCols = 2051, kStride = 2053;
    const std::vector<T> raw = numbers<T>(kRows * kStride), bias = numbers<T>(kCols);
    const int64_t labels[kRows] = {0, 2050, 5000};
    const auto apart = [&](long double got, long double wanted, long double size) {
        return static_cast<double>(std::fabs(got - wanted) / size / epsilon);
    };

    std::vector<T> z = raw;
    passes.apply_bias_scale_cap({z.data(), kStride, kCols, 0}, bias.data(), T(0.7), T(30), 0, kRows);
    double error = 0;
    for (int64_t r = 0; r < kRows; r++) {
        for (int64_t i = 0; i < kCols; i++) {
            const long double wanted = 30 * std::tanh((long double)(raw[r * kStride + i] + bias[i]) * T(0.7) / 30);
            error = worse(error, apart(z[r * kStride + i], wanted, std::fabs(wanted) + 1e-3L));
        }
    }
    report(type, "bias, scale and cap", error, 4);

    std::vector<T> max(kRows, -INFINITY), others(kRows), target(kRows), entropy(kRows), sum(kRows), squares(kRows);
    std::vector<int64_t> argmax(kRows);
    std::vector<T> folded = z;
    passes.reduce({folded.data(), kStride, kCols, 0}, labels,
                  {max.data(), others.data(), target.data(), entropy.data(), sum.data(), argmax.data(), squares.data()},
                  true, 0, kRows);
    double sums = 0, left = 0;
    for (int64_t r = 0; r < kRows; r++) {
        long double highest = -INFINITY, exps = 0, spread = 0, logits = 0, square = 0;
        for (int64_t i = 0; i < kCols; i++) highest = std::fmax(highest, (long double)z[r * kStride + i]);
        for (int64_t i = 0; i < kCols; i++) {
            const T below = z[r * kStride + i] - max[r];
            const long double e = std::exp((long double)below);
            logits += z[r * kStride + i];
            left = worse(left, apart(folded[r * kStride + i], e, e));
            if (i == labels[r]) continue;
            exps += e, spread -= e * below, square += e * e;
        }
        if (max[r] != highest || z[r * kStride + argmax[r]] != highest) healthy = false;
        if (labels[r] < kCols && target[r] != z[r * kStride + labels[r]]) healthy = false;
        sums = worse(sums, apart(others[r], exps, exps));
        sums = worse(sums, apart(entropy[r], spread, spread));
        sums = worse(sums, apart(squares[r], square, square));
        sums = worse(sums, apart(sum[r], logits, 8.0L * kCols));
    }
    report(type, "sums", sums, 16);
    report(type, "exponentials", left, 2);

    std::vector<T> d = z;
    Gradient<T> how{};
    how.labels = labels, how.max = max.data(), how.others = others.data();
    passes.dlogits({d.data(), kStride, kCols, 0}, how, 0, kRows);
    error = 0;
    for (int64_t r = 0; r < kRows; r++) {
        for (int64_t i = 0; i < kCols; i++) {
            const T below = z[r * kStride + i] - max[r];
            const long double e = std::exp((long double)below);
            const long double wanted = i == labels[r] ? -(long double)others[r] : e;
            error = worse(error, apart(d[r * kStride + i], wanted, std::fabs(wanted)));
        }
    }
    report(type, "gradient", error, 2);
}

float from_bfloat16(uint16_t value) {
    const uint32_t wide = static_cast<uint32_t>(value) << 16;
    float back;
    static_assert(sizeof(back) == sizeof(wide), "a float has four bytes");
    __builtin_memcpy(&back, &wide, sizeof(back));
    return back;
}

// Logits as codes, and the gradient from codes, beside the same by exact exponentials of what the codes say. The last
// block is narrow. A block and a whole row have unreachable tokens only, and one logit is NaN.
void check_codes(const Passes<float>& passes) {
    constexpr int64_t kRows = 4, kCols = 2051, kStride = 2053, kStart = 7;
    constexpr int64_t kBlocks = (kCols + kCodedCols - 1) / kCodedCols;
    constexpr int64_t kUnreachable = 3, kNan = 1900;  // of row 1: the block, and the column
    std::vector<float> z = numbers<float>(kRows * kStride), highest(kBlocks * kRows, -INFINITY), max(kRows, -INFINITY);
    for (float& value : z) value *= 3;  // within (-30, 30), and far enough apart for the last code
    for (int64_t i = 0; i < kCodedCols; i++) z[kStride + kUnreachable * kCodedCols + i] = -INFINITY;
    for (int64_t i = 0; i < kCols; i++) z[3 * kStride + i] = -INFINITY;
    z[kStride + kNan] = NAN;
    std::vector<uint16_t> codes(kRows * kStride, 1);
    for (int64_t b = 0; b < kBlocks; b++) {
        const int64_t left = b * kCodedCols, width = std::min(kCols - left, kCodedCols);
        for (int64_t r = 0; r < kRows; r++) {
            for (int64_t i = 0; i < width; i++) {
                highest[b * kRows + r] = std::fmax(highest[b * kRows + r], z[r * kStride + left + i]);
            }
            max[r] = std::fmax(max[r], highest[b * kRows + r]);
        }
        passes.encode({z.data() + left, kStride, width, kStart + left},
                      {codes.data() + left, kStride, highest.data() + b * kRows, 0, false}, 0, kRows);
    }
    const long double step = std::log(2.0L) / 1024;
    double error = 0;
    int64_t beyond = 0;
    for (int64_t r = 0; r < kRows; r++) {
        for (int64_t i = 0; i < kStride; i++) {
            const uint16_t code = codes[r * kStride + i];
            if (i >= kCols) {  // between the rows nothing is written
                if (code != 1) healthy = false;
                continue;
            }
            const long double steps = (highest[i / kCodedCols * kRows + r] - (long double)z[r * kStride + i]) / step;
            const bool last = !(steps < 65535);
            beyond += last;
            error = worse(error, static_cast<double>(last ? 65535 - code : std::fabs(steps - code)));
        }
    }
    if (beyond <= kCodedCols + kCols + 1) healthy = false;
    // Half a step of rounding, and what float32 loses of 65535 steps in a difference, a product and a sum.
    report("float", "codes", error, 0.5 + 3 * 65535 * 6e-8);

    const float others[kRows] = {0.75f, 3.0f, 11.0f, 0.0f}, scale[kRows] = {1.5f, -0.25f, 0.125f, 1.0f};
    const float target[kRows] = {-2.5f, 24.0f, 0.0f, 0.0f};
    const int64_t labels[kRows] = {kStart, kStart + 2050, kStart + 2051, kStart - 1};  // the last two are in no column
    for (const float softcap : {0.0f, 30.0f}) {
        std::vector<uint16_t> out = codes;  // the result takes the place of the codes
        std::vector<float> residual(kRows, 0.0f);
        Gradient<float> how{};
        how.labels = labels, how.max = max.data(), how.others = others, how.scale = scale;
        how.bfloat16 = out.data(), how.bfloat16_stride = kStride, how.residual = residual.data();
        how.softcap = softcap, how.target = target;
        passes.dlogits_of_codes({out.data(), kStride, highest.data(), kRows, false}, kCols, kStart, how, 0, kRows);
        const auto slope = [&](long double at) { return softcap == 0 ? 1.0L : 1 - at / softcap * (at / softcap); };
        double rounded = 0, left = 0;
        for (int64_t r = 0; r < kRows; r++) {
            for (int64_t i = 0; i < kStride; i++) {
                const uint16_t code = codes[r * kStride + i];
                const float got = from_bfloat16(out[r * kStride + i]);
                if (i >= kCols) {
                    if (out[r * kStride + i] != 1) healthy = false;
                } else if (i == labels[r] - kStart) {
                    const long double own = -(long double)others[r] * slope(target[r]) * scale[r];
                    left = worse(left, static_cast<double>(std::fabs((got + (long double)residual[r]) / own - 1)));
                    if (!(std::fabs(residual[r]) <= std::fabs(own) / 256)) healthy = false;
                } else if (code == 65535) {
                    if (got != 0) healthy = false;
                } else {
                    const float of = highest[i / kCodedCols * kRows + r];
                    const long double share = std::exp((long double)of - max[r] - code * step);
                    const long double wanted = share * scale[r] * slope(of - code * step);
                    rounded = worse(rounded, static_cast<double>(std::fabs(got / wanted - 1)));
                }
            }
        }
        if (residual[2] != 0 || residual[3] != 0) healthy = false;
        // Half a unit of bfloat16, and 3e-6 of the polynomial.
        report("float", softcap == 0 ? "gradient of codes" : "gradient of capped codes", rounded * 256, 1 + 1e-3);
        report("float", softcap == 0 ? "label of codes" : "label of capped codes", left / 1.1920929e-07, 8);
    }
}

// Sums and codes of a block at once, beside reduce and encode, of which they have all bits but the last of the sums. The
// codes may go past the cache. A row has the label, one an unreachable token, one nothing else, and one NaN.
void check_blocks(const Passes<float>& passes) {
    constexpr int64_t kRows = 6, kStart = 512;
    alignas(64) static uint16_t codes[2][kRows * kCodedCols];
    for (const int64_t cols : {kCodedCols, kCodedCols - 3}) {
        for (const bool past_cache : {false, true}) {
            std::vector<float> z = numbers<float>(kRows * kCodedCols);
            z[2 * kCodedCols + 9] = -INFINITY;
            std::fill_n(z.begin() + 3 * kCodedCols, kCodedCols, -INFINITY);
            z[4 * kCodedCols + 100] = NAN;
            z[5 * kCodedCols + 17] = 40.0f;
            const int64_t labels[kRows] = {0, kStart + 9, kStart + 1000, kStart - 1, 3, 4};
            float max[2][kRows], others[2][kRows], target[2][kRows] = {}, highest[2][kRows];
            for (int way = 0; way < 2; way++) {
                const Codes out{codes[way], kCodedCols, highest[way], 0, past_cache && cols == kCodedCols};
                const Tile<float> tile{z.data(), kCodedCols, cols, kStart};
                RowState<float> state{};
                state.max = max[way], state.others = others[way], state.target = target[way];
                std::fill_n(max[way], kRows, -INFINITY);
                std::fill_n(others[way], kRows, 0.0f);
                if (way == 0) {
                    passes.reduce(tile, labels, state, false, 0, kRows);
                    passes.encode(tile, out, 0, kRows);
                } else {
                    passes.reduce_block(tile, labels, state, out, 0, kRows);
                }
            }
            double error = 0;
            for (int64_t r = 0; r < kRows; r++) {
                const bool broken = r == 4;
                if (max[1][r] != max[0][r] || highest[1][r] != highest[0][r]) healthy = false;
                if (target[1][r] != target[0][r]) healthy = false;
                if (std::isnan(others[1][r]) != broken || std::isnan(others[0][r]) != broken) healthy = false;
                if (others[0][r] == 0 && others[1][r] != 0) healthy = false;
                if (others[0][r] > 0) error = worse(error, std::fabs(others[1][r] / others[0][r] - 1.0));
                for (int64_t i = 0; i < cols; i++) {
                    if (codes[1][r * kCodedCols + i] != codes[0][r * kCodedCols + i]) healthy = false;
                }
            }
            report("float", "sums of a block", error / 1.1920929e-07, 8);
        }
    }
}

// Philox-4x32-10 as its paper has it, for a counter (token, block, 0): the first of its four words.
uint32_t philox(uint64_t seed, uint64_t token, uint32_t block) {
    uint32_t counter[4] = {static_cast<uint32_t>(token), static_cast<uint32_t>(token >> 32), block, 0};
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        const uint64_t left = uint64_t{0xD2511F53} * counter[0], right = uint64_t{0xCD9E8D57} * counter[2];
        const uint32_t next[4] = {static_cast<uint32_t>(right >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(right),
                                  static_cast<uint32_t>(left >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(left)};
        std::copy(next, next + 4, counter);
        key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
    }
    return counter[0];
}

// A sample beside a walk along the line of the grid, entry by entry.
template <typename T>
void check_sample(const char* type, const Passes<T>& passes) {
    constexpr int64_t kCols = 5000, kRoom = 16;  // 19 blocks and a part: more than begin at a time
    constexpr int64_t kUnits = 1 << 20, kBlock = 256, kStart = 2560;
    std::vector<T> e = numbers<T>(kCols);
    for (T& value : e) value = std::exp(value);
    for (int64_t i = 0; i < kCols; i += 7) e[i] = 0;
    std::fill_n(e.begin() + 1000, 300, T(2000));  // more than a block that is kept as a whole
    const int64_t label = kStart + 4321, token = (int64_t{1} << 33) + 5;
    const T max = 0, others = 3, sumexp = T(1e6);
    SampledRows<T> rows{};
    rows.labels = &label, rows.max = &max, rows.others = &others, rows.sumexp = &sumexp, rows.tokens = &token;
    rows.seed = 0x123456789abcull, rows.exponentiated = true;
    for (const T tau : {T(1e-3), T(1e-6)}) {
        rows.tau = tau;
        std::vector<int32_t> columns(kCols + kRoom);
        std::vector<T> values(kCols + kRoom);
        int64_t expected = 0, counted = 0, units = 0, k = 0, wrong = 0;
        const Tile<T> tile{e.data(), kCols, kCols, kStart};
        const int64_t count = passes.sample(tile, rows, 0, columns.data(), values.data(), &expected);
        passes.sample(tile, rows, 0, nullptr, nullptr, &counted);
        const T threshold = tau * sumexp, per = T(kUnits) / threshold;
        int64_t at = 0;
        for (int64_t i = 0; i < kCols; i++) {
            if (i % kBlock == 0) at = philox(rows.seed, token, static_cast<uint32_t>((kStart + i) / kBlock)) >> 12;
            const bool own = kStart + i == label;
            const int64_t whole = static_cast<int64_t>(std::fmin(std::fma(e[i], per, T(0.5)), T(kUnits)));
            const int64_t length = own || e[i] > threshold ? kUnits : e[i] > 0 ? std::max<int64_t>(1, whole) : 0;
            const bool kept = (at + length) / kUnits != at / kUnits;
            at += length, units += length;
            if (!kept) continue;
            const T wanted = own ? -others : e[i] * (T(kUnits) / static_cast<T>(length));
            wrong += k >= count || columns[k] != i || !(std::fabs(values[k] / wanted - 1) < 1e-5);
            k++;
        }
        if (expected != units / kUnits || counted != expected || k != count || count < 100) wrong++;
        report(type, "sample", static_cast<double>(wrong), 0);
    }
}

// Sums of rows of bfloat16, of all widths up to more than are kept in registers, beside those in double.
void check_added_rows(const Passes<float>& passes) {
    constexpr int64_t kCount = 7, kStride = 800, kMatrix = 20;
    std::vector<float> raw = numbers<float>(kMatrix * kStride), factors = numbers<float>(kCount);
    std::vector<uint16_t> matrix(raw.size());
    passes.to_bfloat16(raw.data(), matrix.data(), static_cast<int64_t>(raw.size()), 1.0f);
    const int32_t indices[kCount] = {3, 19, 0, 3, 7, 8, 1};
    alignas(64) static float out[kStride];
    double error = 0;
    for (int64_t width = 0; width <= 700; width++) {
        for (const int64_t count : {int64_t{0}, kCount}) {
            for (int way = 0; way < 3; way++) {  // set, set past the cache, and added
                std::fill_n(out, kStride, 5.0f);
                passes.add_bfloat16_rows(out, width, matrix.data(), kStride, indices, factors.data(), count, way == 2,
                                         way == 1);
                for (int64_t i = 0; i < kStride; i++) {
                    double wanted = way == 2 || i >= width ? 5.0 : 0.0;
                    for (int64_t k = 0; k < count && i < width; k++) {
                        wanted += static_cast<double>(factors[k]) * from_bfloat16(matrix[indices[k] * kStride + i]);
                    }
                    error = worse(error, std::fabs(out[i] - wanted));
                }
            }
        }
    }
    report("float", "sums of rows", error / 1.1920929e-07, 512 * kCount);
}

}  // namespace

int main() {
    check<float>("float", DPO_ROWS::passes_float, 1.1920929e-07f);
    check<double>("double", DPO_ROWS::passes_double, 2.220446049250313e-16);
    check_codes(DPO_ROWS::passes_float);
    check_blocks(DPO_ROWS::passes_float);
    check_sample<float>("float", DPO_ROWS::passes_float);
    check_sample<double>("double", DPO_ROWS::passes_double);
    check_added_rows(DPO_ROWS::passes_float);
    std::vector<float> in = numbers<float>(1000);
    std::vector<uint16_t> out(1000);
    DPO_ROWS::passes_float.to_bfloat16(in.data(), out.data(), 1000, 0.3f);
    double error = 0;
    for (int i = 0; i < 1000; i++) {
        error = worse(error, std::fabs(from_bfloat16(out[i]) - 0.3f * in[i]) / std::fabs(0.3f * in[i]));
    }
    report("float", "bfloat16", error * 256, 1);
    return healthy ? EXIT_SUCCESS : EXIT_FAILURE;
}
