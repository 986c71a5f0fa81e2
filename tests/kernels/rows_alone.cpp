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
            error = std::fmax(error, apart(z[r * kStride + i], wanted, std::fabs(wanted) + 1e-3L));
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
            left = std::fmax(left, apart(folded[r * kStride + i], e, e));
            if (i == labels[r]) continue;
            exps += e, spread -= e * below, square += e * e;
        }
        if (max[r] != highest || z[r * kStride + argmax[r]] != highest) healthy = false;
        if (labels[r] < kCols && target[r] != z[r * kStride + labels[r]]) healthy = false;
        sums = std::fmax(sums, apart(others[r], exps, exps));
        sums = std::fmax(sums, apart(entropy[r], spread, spread));
        sums = std::fmax(sums, apart(squares[r], square, square));
        sums = std::fmax(sums, apart(sum[r], logits, 8.0L * kCols));
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
            error = std::fmax(error, apart(d[r * kStride + i], wanted, std::fabs(wanted)));
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
                      {codes.data() + left, kStride, highest.data() + b * kRows, 0}, 0, kRows);
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
            error = std::fmax(error, static_cast<double>(last ? 65535 - code : std::fabs(steps - code)));
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
        passes.dlogits_of_codes({out.data(), kStride, highest.data(), kRows}, kCols, kStart, how, 0, kRows);
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
                    left = std::fmax(left, static_cast<double>(std::fabs((got + (long double)residual[r]) / own - 1)));
                    if (!(std::fabs(residual[r]) <= std::fabs(own) / 256)) healthy = false;
                } else if (code == 65535) {
                    if (got != 0) healthy = false;
                } else {
                    const float of = highest[i / kCodedCols * kRows + r];
                    const long double share = std::exp((long double)of - max[r] - code * step);
                    const long double wanted = share * scale[r] * slope(of - code * step);
                    rounded = std::fmax(rounded, static_cast<double>(std::fabs(got / wanted - 1)));
                }
            }
        }
        if (residual[2] != 0 || residual[3] != 0) healthy = false;
        // Half a unit of bfloat16, and 3e-6 of the polynomial.
        report("float", softcap == 0 ? "gradient of codes" : "gradient of capped codes", rounded * 256, 1 + 1e-3);
        report("float", softcap == 0 ? "label of codes" : "label of capped codes", left / 1.1920929e-07, 8);
    }
}

}  // namespace

int main() {
    check<float>("float", DPO_ROWS::passes_float, 1.1920929e-07f);
    check<double>("double", DPO_ROWS::passes_double, 2.220446049250313e-16);
    check_codes(DPO_ROWS::passes_float);
    std::vector<float> in = numbers<float>(1000);
    std::vector<uint16_t> out(1000);
    DPO_ROWS::passes_float.to_bfloat16(in.data(), out.data(), 1000, 0.3f);
    double error = 0;
    for (int i = 0; i < 1000; i++) {
        error = std::fmax(error, std::fabs(from_bfloat16(out[i]) - 0.3f * in[i]) / std::fabs(0.3f * in[i]));
    }
    report("float", "bfloat16", error * 256, 1);
    return healthy ? EXIT_SUCCESS : EXIT_FAILURE;
}
