// Every kernel on allocations of exactly the size that it may touch, for -fsanitize=address,undefined: who reads or
// writes beside them, even without a use for what was read, ends the program with a report.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "emulated.cpp"

namespace {

template <class T>
std::vector<T> filled(int64_t count, double value) {
    return std::vector<T>(static_cast<size_t>(count), static_cast<T>(value));
}

void expect_no(const char* fault) {
    if (fault == nullptr) return;
    std::fprintf(stderr, "%s\n", fault);
    std::exit(1);
}

// `rows` rows of `cols` elements; the allocation ends where the last row does, and begins `offset` elements before.
template <class T>
struct Matrix {
    std::unique_ptr<T[]> memory;
    int64_t offset, stride;

    Matrix(int64_t rows, int64_t cols, int64_t extra, int64_t offset) : offset(offset), stride(cols + extra) {
        memory.reset(new T[static_cast<size_t>(offset + (rows - 1) * stride + cols)]());
    }
    T* data() const { return memory.get() + offset; }
};

template <class T>
constexpr int code() {
    return static_cast<int>(sizeof(T) == 8 ? DType::float64 : DType::float32);
}

template <class T, class Out>
void rows_of(DType out_dtype, int64_t cols, int64_t extra, int64_t offset, int64_t out_offset) {
    constexpr int64_t rows = 3;
    const Matrix<T> tile(rows, cols, extra, offset);
    const Matrix<Out> out(rows, cols, extra, out_offset);
    const std::vector<int64_t> labels{0, cols - 1, cols + 5};
    const std::unique_ptr<T[]> bias(new T[static_cast<size_t>(cols)]());
    for (T* const given : {bias.get(), static_cast<T*>(nullptr)}) {
        expect_no(emulated_apply_bias_scale_cap(code<T>(), tile.data(), rows, cols, tile.stride, given, 0.5, 30.0));
    }
    std::vector<std::vector<T>> state(6, filled<T>(rows, 0));
    std::vector<int64_t> argmax(rows, 0);
    state[0].assign(rows, -static_cast<T>(INFINITY));
    T* const max = state[0].data();
    T* const others = state[1].data();
    for (const bool stats : {false, true}) {
        const auto wanted = [&](int which) { return stats ? state[which].data() : nullptr; };
        expect_no(emulated_reduce_rows(code<T>(), tile.data(), rows, cols, tile.stride, 0, labels.data(), max, others,
                                       state[2].data(), wanted(3), wanted(4), stats ? argmax.data() : nullptr,
                                       wanted(5)));
    }
    const std::vector<T> scale = filled<T>(rows, 0.5);
    std::vector<T> residual = filled<T>(rows, 0);
    expect_no(emulated_dlogits_rows(code<T>(), tile.data(), tile.stride, static_cast<int>(out_dtype), out.data(),
                                    out.stride, rows, cols, 0, labels.data(), max, others, scale.data(),
                                    residual.data(), 30.0));
    expect_no(emulated_dlogits_rows(code<T>(), tile.data(), tile.stride, code<T>(), tile.data(), tile.stride, rows,
                                    cols, 0, labels.data(), max, others, nullptr, nullptr, 0.0));
}

template <class T, class Weight>
void tails_of() {
    const std::vector<int64_t> offsets{0, 300, 300, 301, 310};  // the last one is beyond the values
    const std::vector<T> values = filled<T>(305, -1);
    const std::vector<Weight> weights = filled<Weight>(305, 1);
    const std::vector<double> ref = filled<double>(4, -2), nan_if_invalid{0};
    std::vector<double> sums = filled<double>(4, 0), losses = filled<double>(2, 0), grad = sums;
    for (const void* given : {static_cast<const void*>(weights.data()), static_cast<const void*>(nullptr)}) {
        expect_no(emulated_segment_sum(code<T>(), values.data(), code<Weight>(), given, 305, offsets.data(), 4,
                                       sums.data()));
        expect_no(emulated_sigmoid_sequence_loss(code<T>(), values.data(), code<Weight>(), given, 305, offsets.data(),
                                                 2, ref.data(), nan_if_invalid.data(), 0.1, 0.1, sums.data(),
                                                 losses.data(), grad.data()));
    }
}

}  // namespace

int main() {
    for (const int64_t cols : {1, 2, 3, 31, 1000, 5000}) {
        for (int64_t offset = 0; offset < 4; ++offset) {
            rows_of<float, float>(DType::float32, cols, offset, offset, offset);
            rows_of<float, __nv_bfloat16>(DType::bfloat16, cols, offset, offset, offset + 4);
            rows_of<float, __half>(DType::float16, cols, 3 - offset, offset, 1);
            rows_of<double, double>(DType::float64, cols, offset, offset, offset + 1);
        }
    }
    tails_of<float, float>();
    tails_of<float, double>();
    tails_of<double, float>();
    tails_of<double, double>();
    return 0;
}
