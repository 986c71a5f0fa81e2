// The row passes without torch, beside plain sums in long double: for a CPU that is only emulated here. It prints the
// largest error of each pass in units of the last place, and fails where one is too large.
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

}  // namespace

int main() {
    check<float>("float", DPO_ROWS::passes_float, 1.1920929e-07f);
    check<double>("double", DPO_ROWS::passes_double, 2.220446049250313e-16);
    std::vector<float> in = numbers<float>(1000);
    std::vector<uint16_t> out(1000);
    DPO_ROWS::passes_float.to_bfloat16(in.data(), out.data(), 1000, 0.3f);
    double error = 0;
    for (int i = 0; i < 1000; i++) {
        const uint32_t wide = static_cast<uint32_t>(out[i]) << 16;
        float back;
        static_assert(sizeof(back) == sizeof(wide), "a float has four bytes");
        __builtin_memcpy(&back, &wide, sizeof(back));
        error = std::fmax(error, std::fabs(back - 0.3f * in[i]) / std::fabs(0.3f * in[i]));
    }
    report("float", "bfloat16", error * 256, 1);
    return healthy ? EXIT_SUCCESS : EXIT_FAILURE;
}
