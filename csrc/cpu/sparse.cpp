// The operators of sparse gradients on the CPU: a sample of the logits' gradient, and its products with the head and with
// the hidden states. Each row of a result belongs to one thread and is added up in a fixed order, so that the number of
// threads changes no bit.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <vector>

#include "../checks.h"
#include "passes.h"

namespace dpo_kernels {
namespace {

constexpr int64_t kPanelBytes = 2 << 20;  // of the head, about as large as a second-level cache
constexpr int64_t kCachedSums = 4 << 20;  // of a result: 16 MiB, which may be found in the cache by whoever reads it
constexpr int64_t kParts = 64;  // of a product's columns, alike in work

// Entries of neighbouring rows that one thread has sampled.
template <typename T>
struct Found {
    int64_t first;
    std::vector<int64_t> counts;
    std::vector<int32_t> columns;
    std::vector<T> values;
};

using Sample = std::tuple<Tensor, Tensor, Tensor>;  // offsets (C + 1,) int64, columns (K,) int32 and values (K,)

constexpr int64_t kTried = 32;       // of so many rows one is tried first
constexpr int64_t kFewestTried = 4;  // where these are too few to speak for the others, none is

// How many entries a sample is expected to keep of some of the rows, and how many rows these are.
template <typename OfRow>
std::pair<int64_t, int64_t> expected_of_some(const TileShape& shape, const OfRow& of_row) {
    const int64_t tried = shape.rows / kTried < kFewestTried ? 0 : shape.rows / kTried;
    std::atomic<int64_t> expected{0};
    over_rows({tried, shape.cols, shape.stride}, [&](int64_t first, int64_t last) {
        int64_t of_these = 0;
        for (int64_t k = first; k < last; k++) of_row(k * kTried, nullptr, nullptr, &of_these);
        expected += of_these;
    });
    return {expected.load(), tried};
}

constexpr int64_t kRoom = 16;  // of entries that a row may write behind its last

// Collects the entries that `of_row(row, columns, values, expected)` chooses of each row. All tensors are empty if more
// than `most` are expected, of all rows or of some in proportion. Neither depends on the seed, or the mean over seeds
// would not be the gradient.
template <typename T, typename OfRow>
Sample collect(const TileShape& shape, int64_t most, const Tensor& like, const OfRow& of_row) {
    const int32_t longs = aoti_torch_dtype_int64(), ints = aoti_torch_dtype_int32();
    const int32_t dtype = sizeof(T) == sizeof(double) ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    const auto sized = [&](int64_t offsets, int64_t entries) -> Sample {
        return {new_tensor({offsets}, {1}, longs, like), new_tensor({entries}, {1}, ints, like),
                new_tensor({entries}, {1}, dtype, like)};
    };
    const auto [of_some, tried] = expected_of_some(shape, of_row);
    if (of_some * shape.rows > most * tried) return sized(0, 0);
    std::vector<Found<T>> parts;
    std::mutex mutex;
    std::atomic<int64_t> kept{0}, expected{0};
    over_rows(shape, [&](int64_t first, int64_t last) {
        Found<T> found{first, {}, {}, {}};
        std::vector<int32_t> columns(shape.cols + kRoom);
        std::vector<T> values(shape.cols + kRoom);
        for (int64_t row = first; row < last && expected.load() <= most; row++) {
            int64_t likely = 0;
            const int64_t count = of_row(row, columns.data(), values.data(), &likely);
            found.counts.push_back(count);
            found.columns.insert(found.columns.end(), columns.begin(), columns.begin() + count);
            found.values.insert(found.values.end(), values.begin(), values.begin() + count);
            kept += count;
            expected += likely;
        }
        const std::lock_guard<std::mutex> lock(mutex);
        parts.push_back(std::move(found));
    });
    if (expected.load() > most) return sized(0, 0);
    Sample sample = sized(shape.rows + 1, kept.load());
    std::sort(parts.begin(), parts.end(), [](const Found<T>& a, const Found<T>& b) { return a.first < b.first; });
    int64_t* at = std::get<0>(sample).mutable_data_ptr<int64_t>();
    int32_t* columns = std::get<1>(sample).mutable_data_ptr<int32_t>();
    T* values = std::get<2>(sample).mutable_data_ptr<T>();
    *at = 0;
    for (Found<T>& part : parts) {
        std::copy(part.columns.begin(), part.columns.end(), columns + *at);
        std::copy(part.values.begin(), part.values.end(), values + *at);
        for (const int64_t count : part.counts) at[1] = at[0] + count, at++;
    }
    return sample;
}

// What both samplers read of the rows, whose sums have one dtype.
template <typename T>
SampledRows<T> sampled_rows(const TileShape& shape, const Tensor& labels, int64_t start, const Tensor& max,
                            const Tensor& others, const Tensor& sumexp, const Tensor& tokens, int64_t seed, double tau,
                            std::optional<double> softcap) {
    const ScalarType dtype = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
    check_softcap(softcap);
    DPO_CHECK(start >= 0 && start % 256 == 0, "start must be a multiple of 256, got ", start);
    DPO_CHECK(tau > 0 && tau <= 1, "tau must be in (0, 1], got ", tau);
    check_vector("labels", labels, shape.rows, ScalarType::Long, max.device());
    check_vector("tokens", tokens, shape.rows, ScalarType::Long, max.device());
    check_vector("max", max, shape.rows, dtype, max.device());
    check_vector("others", others, shape.rows, dtype, max.device());
    check_vector("sumexp", sumexp, shape.rows, dtype, max.device());
    SampledRows<T> rows{};
    rows.labels = labels.const_data_ptr<int64_t>();
    rows.max = max.const_data_ptr<T>();
    rows.others = others.const_data_ptr<T>();
    rows.sumexp = sumexp.const_data_ptr<T>();
    rows.tokens = tokens.const_data_ptr<int64_t>();
    rows.seed = static_cast<uint64_t>(seed);
    rows.tau = static_cast<T>(tau);
    rows.softcap = static_cast<T>(softcap.value_or(0.0));
    return rows;
}

Sample sample_rows(const Tensor& tile, const Tensor& labels, int64_t start, const Tensor& max, const Tensor& others,
                   const Tensor& sumexp, const Tensor& tokens, int64_t seed, double tau, std::optional<double> softcap,
                   bool exponentiated, int64_t most) {
    const TileShape shape = check_matrix("tile", tile);
    check_wide("tile", tile);
    check_same_device("max", max, tile.device());
    DPO_CHECK(!exponentiated || !softcap.has_value(), "a softcap needs the logits");
    std::optional<Sample> sample;
    with_type(tile, [&](auto zero) {
        using T = decltype(zero);
        SampledRows<T> rows =
            sampled_rows<T>(shape, labels, start, max, others, sumexp, tokens, seed, tau, softcap);
        rows.exponentiated = exponentiated;
        const Tile<T> logits{tile.mutable_data_ptr<T>(), shape.stride, shape.cols, start};
        sample = collect<T>(shape, most, tile, [&](int64_t row, int32_t* columns, T* values, int64_t* expected) {
            return passes<T>().sample(logits, rows, row, columns, values, expected);
        });
    });
    return *sample;
}

Sample sample_codes(const Tensor& codes, const Tensor& highest, const Tensor& labels, int64_t start, const Tensor& max,
                    const Tensor& others, const Tensor& target, const Tensor& sumexp, const Tensor& tokens,
                    int64_t seed, double tau, std::optional<double> softcap, int64_t most) {
    const TileShape shape = check_matrix("codes", codes);
    const Codes all = codes_of(codes, highest, shape.rows, shape.cols);
    check_same_device("max", max, codes.device());
    check_vector("target", target, shape.rows, ScalarType::Float, codes.device());
    SampledRows<float> rows =
        sampled_rows<float>(shape, labels, start, max, others, sumexp, tokens, seed, tau, softcap);
    rows.target = target.const_data_ptr<float>();
    return collect<float>(shape, most, codes, [&](int64_t row, int32_t* columns, float* values, int64_t* expected) {
        return passes<float>().sample_of_codes(all, shape.cols, start, rows, row, columns, values, expected);
    });
}

// What the products read of a sample: entries offsets[r]..offsets[r+1]-1 are those of row r.
template <typename T>
struct Entries {
    int64_t rows;
    const int64_t* offsets;
    const int32_t* columns;
    const T* values;
    const T* scale;
};

void check_entries(const Tensor& offsets, const Tensor& columns, const Tensor& values, const Tensor& scale,
                   int64_t bound) {
    DPO_CHECK(scale.dim() == 1, "scale must have one dimension, got the shape ", scale.sizes());
    DPO_CHECK(columns.dim() == 1, "columns must have one dimension, got the shape ", columns.sizes());
    const int64_t rows = scale.size(0), total = columns.size(0);
    check_wide("values", values);
    check_vector("scale", scale, rows, values.scalar_type(), values.device());
    check_vector("offsets", offsets, rows + 1, ScalarType::Long, scale.device());
    check_vector("columns", columns, total, ScalarType::Int, scale.device());
    check_vector("values", values, total, scale.scalar_type(), scale.device());
    const int64_t* at = offsets.const_data_ptr<int64_t>();
    const int32_t* column = columns.const_data_ptr<int32_t>();
    DPO_CHECK(at[0] == 0 && at[rows] == total, "offsets must go from 0 to ", total, ", got ", at[0], " to ", at[rows]);
    for (int64_t r = 0; r < rows; r++) DPO_CHECK(at[r] <= at[r + 1], "offsets must not fall");
    for (int64_t k = 0; k < total; k++) {
        DPO_CHECK(column[k] >= 0 && column[k] < bound, "columns must be in [0, ", bound, "), got ", column[k]);
    }
}

template <typename T>
Entries<T> entries_of(const Tensor& offsets, const Tensor& columns, const Tensor& values, const Tensor& scale) {
    return {scale.size(0), offsets.const_data_ptr<int64_t>(), columns.const_data_ptr<int32_t>(),
            values.const_data_ptr<T>(), scale.const_data_ptr<T>()};
}

// The matrix whose rows are added up has the dtype of the sum, or bfloat16 beside float32.
void check_added(const char* name, const Tensor& matrix, const Tensor& out, const Tensor& values) {
    DPO_CHECK(out.scalar_type() == values.scalar_type(), "out must be ", values.scalar_type(), ", got ",
              out.scalar_type());
    const bool narrow = matrix.scalar_type() == ScalarType::BFloat16 && out.scalar_type() == ScalarType::Float;
    DPO_CHECK(narrow || matrix.scalar_type() == out.scalar_type(), name, " must be ", out.scalar_type(),
              " or bfloat16 beside float32, got ", matrix.scalar_type());
}

// out (+)= the sum of factors[k] times row indices[k] of the matrix.
template <typename T>
void add(T* out, int64_t width, const Tensor& matrix, int64_t stride, const int32_t* indices, const T* factors,
         int64_t count, bool accumulate, bool past_cache) {
    if (matrix.scalar_type() == ScalarType::BFloat16) {  // T is float, see check_added
        passes<float>().add_bfloat16_rows(reinterpret_cast<float*>(out), width,
                                          static_cast<const uint16_t*>(matrix.const_data_ptr()), stride, indices,
                                          reinterpret_cast<const float*>(factors), count, accumulate, past_cache);
    } else {
        passes<T>().add_rows(out, width, matrix.const_data_ptr<T>(), stride, indices, factors, count, accumulate);
    }
}

// out[r] (+)= scale[r] * the sum over entries of row r: value times the head's row of the entry's column.
void sparse_times_head_(const Tensor& offsets, const Tensor& columns, const Tensor& values, const Tensor& scale,
                        const Tensor& head, const Tensor& out, bool accumulate) {
    const TileShape from = check_matrix("head", head), to = check_matrix("out", out);
    check_entries(offsets, columns, values, scale, from.rows);
    DPO_CHECK(to.rows == scale.size(0) && to.cols == from.cols, "out must have the shape [", scale.size(0), ", ",
              from.cols, "], got ", out.sizes());
    check_added("head", head, out, values);
    with_type(out, [&](auto zero) {
        using T = decltype(zero);
        const Entries<T> entries = entries_of<T>(offsets, columns, values, scale);
        const int64_t element = head.scalar_type() == ScalarType::BFloat16 ? 2 : sizeof(T);
        const int64_t panel = std::max<int64_t>(1, kPanelBytes / (element * std::max<int64_t>(1, from.cols)));
        parallel_for(0, to.rows, 1, [&](int64_t first, int64_t last) {
            std::vector<T> factors;
            std::vector<int64_t> done(entries.offsets + first, entries.offsets + last);
            // Panel by panel of the head, which stays in the cache for all rows. Columns ascend.
            for (int64_t bound = panel; bound < std::max<int64_t>(1, from.rows) + panel; bound += panel) {
                for (int64_t r = first; r < last; r++) {
                    const int64_t begin = done[r - first], stop = entries.offsets[r + 1];
                    int64_t end = begin;
                    while (end < stop && entries.columns[end] < bound) end++;
                    const bool more = accumulate || bound > panel;  // the first panel sets rows to 0
                    if (begin == end && more) continue;
                    done[r - first] = end;
                    factors.assign(entries.values + begin, entries.values + end);
                    for (T& factor : factors) factor *= entries.scale[r];
                    T* row = out.mutable_data_ptr<T>() + r * to.stride;
                    add(row, to.cols, head, from.stride, entries.columns + begin, factors.data(), end - begin, more,
                        false);
                }
            }
        });
    });
}

// out[c] (+)= the sum over entries of column c: value times scale and hidden state of the entry's row.
void sparse_transposed_times_hidden_(const Tensor& offsets, const Tensor& columns, const Tensor& values,
                                     const Tensor& scale, const Tensor& hidden, const Tensor& out, bool accumulate) {
    const TileShape from = check_matrix("hidden", hidden), to = check_matrix("out", out);
    check_entries(offsets, columns, values, scale, to.rows);
    DPO_CHECK(from.rows == scale.size(0) && to.cols == from.cols, "out must have the width of hidden, ", from.cols,
              ", got ", out.sizes());
    check_added("hidden", hidden, out, values);
    with_type(out, [&](auto zero) {
        using T = decltype(zero);
        const Entries<T> entries = entries_of<T>(offsets, columns, values, scale);
        // Entries by column, in the order of their rows.
        const int64_t total = entries.offsets[entries.rows];
        std::vector<int64_t> begins(to.rows + 1, 0);
        for (int64_t k = 0; k < total; k++) begins[entries.columns[k] + 1]++;
        for (int64_t c = 0; c < to.rows; c++) begins[c + 1] += begins[c];
        std::vector<int64_t> next(begins.begin(), begins.end() - 1);
        std::vector<int32_t> rows(total);
        std::vector<T> factors(total);
        for (int64_t r = 0; r < entries.rows; r++) {
            for (int64_t k = entries.offsets[r]; k < entries.offsets[r + 1]; k++) {
                const int64_t place = next[entries.columns[k]]++;
                rows[place] = static_cast<int32_t>(r);
                factors[place] = entries.values[k] * entries.scale[r];
            }
        }
        const bool lines = (reinterpret_cast<uintptr_t>(out.mutable_data_ptr()) | to.stride * sizeof(T)) % 64 == 0;
        const bool past_cache = lines && !accumulate && to.rows * to.cols > kCachedSums;
        // A column costs about as much as an entry, whose row is written once.
        const auto work_before = [&](int64_t column) { return begins[column] + column; };
        const int64_t work = total + to.rows;
        std::vector<int64_t> bounds(kParts + 1, to.rows);
        for (int64_t part = 0, column = 0; part < kParts; part++) {
            while (column < to.rows && work_before(column) < work * part / kParts) column++;
            bounds[part] = column;
        }
        parallel_for(0, kParts, 1, [&](int64_t first, int64_t last) {
            for (int64_t c = bounds[first]; c < bounds[last]; c++) {
                const int64_t begin = begins[c], count = begins[c + 1] - begin;
                if (count == 0 && accumulate) continue;
                add(out.mutable_data_ptr<T>() + c * to.stride, to.cols, hidden, from.stride, rows.data() + begin,
                    factors.data() + begin, count, accumulate, past_cache);
            }
            order_stores();
        });
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dpo_kernels, m) {
    m.def(
        "sample_rows(Tensor tile, Tensor labels, int start, Tensor max, Tensor others, Tensor sumexp, Tensor tokens, "
        "int seed, float tau, float? softcap, bool exponentiated, int most) -> (Tensor offsets, Tensor columns, "
        "Tensor values)");
    m.def(
        "sample_codes(Tensor codes, Tensor highest, Tensor labels, int start, Tensor max, Tensor others, Tensor target, "
        "Tensor sumexp, Tensor tokens, int seed, float tau, float? softcap, int most) -> (Tensor offsets, "
        "Tensor columns, Tensor values)");
    m.def(
        "sparse_times_head_(Tensor offsets, Tensor columns, Tensor values, Tensor scale, Tensor head, Tensor(a!) out, "
        "bool accumulate) -> ()");
    m.def(
        "sparse_transposed_times_hidden_(Tensor offsets, Tensor columns, Tensor values, Tensor scale, Tensor hidden, "
        "Tensor(a!) out, bool accumulate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dpo_kernels, CPU, m) {
    m.impl("sample_rows", TORCH_BOX(&sample_rows));
    m.impl("sample_codes", TORCH_BOX(&sample_codes));
    m.impl("sparse_times_head_", TORCH_BOX(&sparse_times_head_));
    m.impl("sparse_transposed_times_hidden_", TORCH_BOX(&sparse_transposed_times_hidden_));
}

}  // namespace dpo_kernels
