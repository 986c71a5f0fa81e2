// The choice of an instruction set for the row passes, and threads over rows.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>

#include "../checks.h"
#include "rows.h"

#ifdef DPO_X86
#include <xmmintrin.h>
#endif

namespace dpo_kernels {

enum class Isa { base, avx2, avx512 };

// The best that the machine has, or a lesser one that DPO_KERNELS_ISA asks for: base, avx2 or avx512.
inline Isa isa() {
    static const Isa chosen = [] {
        Isa best = Isa::base;
#ifdef DPO_X86
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
        if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            best = Isa::avx512;
        }
#endif
        const char* asked = std::getenv("DPO_KERNELS_ISA");
        if (asked == nullptr || *asked == '\0') return best;
        const std::string name(asked);
        DPO_CHECK(name == "base" || name == "avx2" || name == "avx512",
                  "DPO_KERNELS_ISA must be base, avx2 or avx512, got ", name);
        return std::min(best, name == "avx512" ? Isa::avx512 : name == "avx2" ? Isa::avx2 : Isa::base);
    }();
    return chosen;
}

template <typename T>
const Passes<T>& passes();

template <>
inline const Passes<float>& passes<float>() {
#ifdef DPO_X86
    if (isa() == Isa::avx512) return avx512::passes_float;
    if (isa() == Isa::avx2) return avx2::passes_float;
#endif
    return base::passes_float;
}

template <>
inline const Passes<double>& passes<double>() {
#ifdef DPO_X86
    if (isa() == Isa::avx512) return avx512::passes_double;
    if (isa() == Isa::avx2) return avx2::passes_double;
#endif
    return base::passes_double;
}

// A thread calls it after passes that leave the cache to others: their stores are not ordered, and whoever waits for
// the thread must find them.
inline void order_stores() {
#ifdef DPO_X86
    _mm_sfence();
#endif
}

constexpr int64_t kElementsByTask = 32768;  // of a tile, at least, before another thread is worth it

template <typename Body>
void over_rows(const TileShape& shape, const Body& body) {
    parallel_for(0, shape.rows, std::max<int64_t>(1, kElementsByTask / std::max<int64_t>(1, shape.cols)), body);
}

// Calls body(T) with a tensor's element type, which the checks have found to be one of two.
template <typename Body>
void with_type(const Tensor& tensor, const Body& body) {
    if (tensor.scalar_type() == ScalarType::Float) body(0.0f);
    else body(0.0);
}

constexpr int64_t kCachedCodes = 8 << 20;  // 16 MiB, which may be found in the cache by whoever reads them

// Codes of these logits and the largest logits of their blocks, (blocks, rows), from tensors.
inline Codes codes_of(const Tensor& codes, const Tensor& highest, int64_t rows, int64_t cols) {
    const TileShape shape = check_matrix("codes", codes);
    DPO_CHECK(codes.scalar_type() == ScalarType::Short && shape.rows == rows && shape.cols == cols,
              "codes must be int16 of the shape [", rows, ", ", cols, "], got ", codes.scalar_type(), " of the shape ",
              codes.sizes());
    const int64_t blocks = (cols + kCodedCols - 1) / kCodedCols;
    DPO_CHECK(highest.scalar_type() == ScalarType::Float && highest.dim() == 2 && highest.size(0) == blocks &&
              highest.size(1) == rows && highest.is_contiguous(),
              "highest must be contiguous float32 of the shape [", blocks, ", ", rows, "], got ", highest.scalar_type(),
              " of the shape ", highest.sizes());
    uint16_t* data = static_cast<uint16_t*>(codes.mutable_data_ptr());
    const bool whole_lines = (reinterpret_cast<uintptr_t>(data) | shape.stride * sizeof(*data)) % 64 == 0;
    return {data, shape.stride, highest.mutable_data_ptr<float>(), rows, whole_lines && rows * cols > kCachedCodes};
}

}  // namespace dpo_kernels
