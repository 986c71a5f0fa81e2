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

constexpr int64_t kElementsByTask = 32768;
constexpr int64_t kParts = 64;  // of a product's columns, alike in work

// Entries of neighbouring rows that one thread has sampled.
struct Found {
    int64_t first;
    std::vector<int64_t> counts;
    std::vector<int32_t> columns;
    std::vector<double> wide;
    std::vector<float> values;
};

template <typename T>
std::vector<T>& values_of(Found& found);
template <>
std::vector<float>& values_of<float>(Found& found) { return found.values; }
template <>
std::vector<double>& values_of<double>(Found& found) { return found.wide; }

// Returns offsets (C + 1,) int64, columns (K,) int32 and values (K,). All are empty if more than `most` are expected.
std::tuple<Tensor, Tensor, Tensor> sample_rows(const Tensor& tile, const Tensor& labels, int64_t start,
                                               const Tensor& max, const Tensor& others, const Tensor& sumexp,
                                               const Tensor& tokens, int64_t seed, double tau,
                                               std::optional<double> softcap, bool exponentiated, int64_t most) {
    const TileShape shape = check_matrix("tile", tile);
    check_wide("tile", tile);
    check_softcap(softcap);
    DPO_CHECK(start >= 0 && start % 256 == 0, "start must be a multiple of 256, got ", start);
    DPO_CHECK(tau > 0 && tau <= 1, "tau must be in (0, 1], got ", tau);
    DPO_CHECK(!exponentiated || !softcap.has_value(), "a softcap needs the logits");
    check_vector("labels", labels, shape.rows, ScalarType::Long, tile.device());
    check_vector("tokens", tokens, shape.rows, ScalarType::Long, tile.device());
    check_vector("max", max, shape.rows, tile.scalar_type(), tile.device());
    check_vector("others", others, shape.rows, tile.scalar_type(), tile.device());
    check_vector("sumexp", sumexp, shape.rows, tile.scalar_type(), tile.device());
    std::vector<Found> parts;
    std::mutex mutex;
    std::atomic<int64_t> kept{0}, expected{0};  // the second does not depend on the seed, and decides
    with_type(tile, [&](auto zero) {
        using T = decltype(zero);
        const Tile<T> logits{tile.mutable_data_ptr<T>(), shape.stride, shape.cols, start};
        const SampledRows<T> rows{labels.const_data_ptr<int64_t>(), max.const_data_ptr<T>(),
                                  others.const_data_ptr<T>(),       sumexp.const_data_ptr<T>(),
                                  tokens.const_data_ptr<int64_t>(), static_cast<uint64_t>(seed),
                                  static_cast<T>(tau),              static_cast<T>(softcap.value_or(0.0)),
                                  exponentiated};
        over_rows(shape, [&](int64_t first, int64_t last) {
            Found found{first, {}, {}, {}, {}};
            std::vector<int32_t> columns(shape.cols);
            std::vector<T> values(shape.cols);
            for (int64_t row = first; row < last && expected.load() <= most; row++) {
                int64_t of_row = 0;
                const int64_t count = passes<T>().sample(logits, rows, row, columns.data(), values.data(), &of_row);
                found.counts.push_back(count);
                found.columns.insert(found.columns.end(), columns.begin(), columns.begin() + count);
                values_of<T>(found).insert(values_of<T>(found).end(), values.begin(), values.begin() + count);
                kept += count;
                expected += of_row;
            }
            const std::lock_guard<std::mutex> lock(mutex);
            parts.push_back(std::move(found));
        });
    });
    const int32_t longs = aoti_torch_dtype_int64(), ints = aoti_torch_dtype_int32();
    const bool wide = tile.scalar_type() == ScalarType::Double;
    const int32_t dtype = wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    const bool fits = expected.load() <= most;
    const int64_t total = fits ? kept.load() : 0;
    const Tensor offsets = new_tensor({fits ? shape.rows + 1 : 0}, {1}, longs, tile);
    const Tensor columns = new_tensor({total}, {1}, ints, tile), values = new_tensor({total}, {1}, dtype, tile);
    if (!fits) return {offsets, columns, values};
    std::sort(parts.begin(), parts.end(), [](const Found& a, const Found& b) { return a.first < b.first; });
    int64_t* at = offsets.mutable_data_ptr<int64_t>();
    *at = 0;
    for (Found& part : parts) {
        const int64_t begin = *at;
        std::copy(part.columns.begin(), part.columns.end(), columns.mutable_data_ptr<int32_t>() + begin);
        if (wide) std::copy(part.wide.begin(), part.wide.end(), values.mutable_data_ptr<double>() + begin);
        else std::copy(part.values.begin(), part.values.end(), values.mutable_data_ptr<float>() + begin);
        for (const int64_t count : part.counts) at[1] = at[0] + count, at++;
    }
    return {offsets, columns, values};
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

// out[r] (+)= scale[r] * the sum over entries of row r: value times the head's row of the entry's column.
void sparse_times_head_(const Tensor& offsets, const Tensor& columns, const Tensor& values, const Tensor& scale,
                        const Tensor& head, const Tensor& out, bool accumulate) {
    const TileShape from = check_matrix("head", head), to = check_matrix("out", out);
    check_entries(offsets, columns, values, scale, from.rows);
    DPO_CHECK(to.rows == scale.size(0) && to.cols == from.cols, "out must have the shape [", scale.size(0), ", ",
              from.cols, "], got ", out.sizes());
    const bool narrow = head.scalar_type() == ScalarType::BFloat16;
    DPO_CHECK(out.scalar_type() == values.scalar_type() && (narrow ? out.scalar_type() == ScalarType::Float
                                                                    : head.scalar_type() == out.scalar_type()),
              "head must be ", out.scalar_type(), " or bfloat16 beside float32, got ", head.scalar_type());
    with_type(out, [&](auto zero) {
        using T = decltype(zero);
        const Entries<T> entries = entries_of<T>(offsets, columns, values, scale);
        parallel_for(0, to.rows, 1, [&](int64_t first, int64_t last) {
            std::vector<T> factors;
            for (int64_t r = first; r < last; r++) {
                const int64_t begin = entries.offsets[r], count = entries.offsets[r + 1] - begin;
                factors.assign(entries.values + begin, entries.values + begin + count);
                for (T& factor : factors) factor *= entries.scale[r];
                T* row = out.mutable_data_ptr<T>() + r * to.stride;
                const int32_t* indices = entries.columns + begin;
                if (narrow) {
                    passes<float>().add_bfloat16_rows(
                        reinterpret_cast<float*>(row), to.cols, static_cast<const uint16_t*>(head.const_data_ptr()),
                        from.stride, indices, reinterpret_cast<const float*>(factors.data()), count, accumulate);
                } else {
                    passes<T>().add_rows(row, to.cols, head.const_data_ptr<T>(), from.stride, indices, factors.data(),
                                         count, accumulate);
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
    DPO_CHECK(hidden.scalar_type() == out.scalar_type() && out.scalar_type() == values.scalar_type(),
              "hidden and out must be ", values.scalar_type());
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
                passes<T>().add_rows(out.mutable_data_ptr<T>() + c * to.stride, to.cols, hidden.const_data_ptr<T>(),
                                     from.stride, rows.data() + begin, factors.data() + begin, count, accumulate);
            }
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
        "sparse_times_head_(Tensor offsets, Tensor columns, Tensor values, Tensor scale, Tensor head, Tensor(a!) out, "
        "bool accumulate) -> ()");
    m.def(
        "sparse_transposed_times_hidden_(Tensor offsets, Tensor columns, Tensor values, Tensor scale, Tensor hidden, "
        "Tensor(a!) out, bool accumulate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dpo_kernels, CPU, m) {
    m.impl("sample_rows", TORCH_BOX(&sample_rows));
    m.impl("sparse_times_head_", TORCH_BOX(&sparse_times_head_));
    m.impl("sparse_transposed_times_hidden_", TORCH_BOX(&sparse_transposed_times_hidden_));
}

}  // namespace dpo_kernels
