// What the kernels need of a device: CUDA's headers, or the tests' stand-in that runs the kernels on the CPU.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef DPO_KERNELS_EMULATED
#include "emulated.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace dpo_kernels::cuda {

constexpr int kRowThreads = 512;      // threads of a block that owns a row
constexpr int kSegmentThreads = 256;  // threads of a block that sums a run of tokens
constexpr int64_t kMostBlocks = 65535;  // of a grid's second and third dimension; more rows are a loop in the kernel

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream, Arguments... arguments) {
    kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace dpo_kernels::cuda
#endif

namespace dpo_kernels::cuda {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;  // the widest access of one thread on every architecture

// --- arithmetic ---------------------------------------------------------------------------------------------

// The error of __expf is up to 2 + 1.17 |x| ulps, 4e-6 for a logit 30 below its row's maximum, so expf it is.
__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }

// The larger of two, or NaN if either is. CUDA's fmax would drop NaN, and a broken row must stay broken.
template <class T>
__device__ inline T larger(T a, T b) {
    return a > b || a != a ? a : b;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
__device__ inline float larger(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
#endif

// Rounds to the dtype of a result, to nearest even, and back, to see what the rounding took away.
template <class Out, class T>
__device__ inline Out rounded_to(T value) {
    return value;
}
template <>
__device__ inline __nv_bfloat16 rounded_to<__nv_bfloat16, float>(float value) {
    return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half rounded_to<__half, float>(float value) {
    return __float2half_rn(value);
}
__device__ inline float widened(float value) { return value; }
__device__ inline double widened(double value) { return value; }
__device__ inline float widened(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widened(__half value) { return __half2float(value); }

// --- accesses -----------------------------------------------------------------------------------------------

// Neighbouring elements.
template <class T, int COUNT>
struct alignas(COUNT * sizeof(T) % kVectorBytes == 0 ? kVectorBytes : sizeof(T)) Vector {
    static_assert(COUNT == 1 || COUNT * sizeof(T) % kVectorBytes == 0, "one element, or whole accesses");
    T values[COUNT];
};

// Loads and stores take 16 bytes at once if there is more than one element. The pointer must be aligned to as much.
template <int COUNT, class T>
__device__ inline Vector<T, COUNT> load(const T* from) {
    return *reinterpret_cast<const Vector<T, COUNT>*>(from);
}

template <int COUNT, class T>
__device__ inline void store(T* to, const Vector<T, COUNT>& vector) {
    if constexpr (COUNT == 1) {
        *to = vector.values[0];
    } else {
        constexpr int parts = sizeof vector / sizeof(uint4);
        uint4 bits[parts];
        memcpy(bits, &vector, sizeof vector);
        // This is an intrinsic because nvcc splits the assignment of a struct into single elements.
#pragma unroll
        for (int part = 0; part < parts; ++part) __stwb(reinterpret_cast<uint4*>(to) + part, bits[part]);
    }
}

template <class T>
__device__ inline bool is_aligned(const T* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// Elements from `pointer` to the next place where a vector may begin.
template <class T>
__device__ inline int64_t elements_to_alignment(const T* pointer) {
    const uintptr_t past = reinterpret_cast<uintptr_t>(pointer) % kVectorBytes;
    return static_cast<int64_t>((kVectorBytes - past) % kVectorBytes / sizeof(T));
}

// --- a block's threads together -----------------------------------------------------------------------------

struct Sum {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};

struct Larger {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return larger(a, b);
    }
};

struct Smaller {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return b < a ? b : a;
    }
};

// Combines one value of every thread and gives all of them the result. The order is fixed, so the result is too.
template <int THREADS, class T, class Operation>
__device__ inline T block_reduce(T value, Operation combine) {
    static_assert(THREADS % kWarp == 0, "whole warps");
    constexpr int warps = THREADS / kWarp;
    __shared__ T of_warp[warps];
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = of_warp[0];
    for (int warp = 1; warp < warps; ++warp) value = combine(value, of_warp[warp]);
    __syncthreads();  // the next call writes to of_warp again
    return value;
}

}  // namespace dpo_kernels::cuda
