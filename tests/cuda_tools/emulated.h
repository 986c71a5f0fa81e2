// Stands in for CUDA's headers, so that the kernels of csrc/cuda run on the CPU as they are.
//
// The threads of a block are fibers (fibers.cpp). A warp runs until all of its threads wait for others of it, then
// the next one does: whoever needs a barrier and has none is overtaken, or overtakes, in some order of the warps.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct __attribute__((aligned(16), may_alias)) uint4 {
    uint32_t x, y, z, w;
};
inline void __stwb(uint4* to, uint4 value) { *to = value; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
inline const char* cudaGetErrorString(cudaError_t) { return "the emulated launch failed"; }

// --- sixteen bits -------------------------------------------------------------------------------------------

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    if (value != value) return {0x7fff};
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half value) {
    const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    const int units = exponent ? fraction + 1024 : fraction;
    float magnitude = std::ldexp(static_cast<float>(units), (exponent ? exponent : 1) - 25);
    if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
    return value.bits >> 15 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float value) {
    const int sign = std::signbit(value) ? 0x8000 : 0;
    if (value != value) return {0x7fff};
    const double magnitude = std::fabs(static_cast<double>(value));
    if (magnitude >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
    const int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
    // Units in the last place; a carry out of the fraction is one into the exponent, as it should be.
    const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    return {static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + units))};
}

// --- threads ------------------------------------------------------------------------------------------------

namespace emulated {

// Runs `call(kernel)` in every thread of every block.
void run_grid(dim3 grid, unsigned threads, void (*call)(const void*), const void* kernel);

void barrier();

// What the lane that is this one's number xor `partner` offers in the same shuffle.
uint64_t exchanged(uint64_t value, unsigned partner);

// Notes what was done that must not be; the first such note counts. The launch ends with the block.
void report(const char* what);

// The note and no more of it, or null.
const char* taken_fault();
bool has_fault();

// Of warps, their lanes and blocks: 0 ascending, 1 descending, more: shuffled by this seed.
void set_order(unsigned order);

}  // namespace emulated

inline void __syncthreads() { emulated::barrier(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move at most 64 bits");
    if (mask != 0xffffffffu) emulated::report("a shuffle of some lanes, which is not emulated");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = emulated::exchanged(bits, static_cast<unsigned>(distance));
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// --- launches -----------------------------------------------------------------------------------------------

namespace dpo_kernels::cuda {

#ifdef EMULATED_AS_LAUNCHED
constexpr int kRowThreads = 512;
constexpr int kSegmentThreads = 256;
constexpr int64_t kMostBlocks = 65535;
#else
// Small enough that short rows keep every thread busy for several rounds, and few rows every block.
constexpr int kRowThreads = 128;
constexpr int kSegmentThreads = 64;
constexpr int64_t kMostBlocks = 2;
#endif

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, void*, Arguments... arguments) {
    const auto run = [&] { kernel(arguments...); };
    const auto call = [](const void* what) { (*static_cast<decltype(&run)>(what))(); };
    emulated::run_grid(grid, static_cast<unsigned>(threads), call, &run);
    return emulated::has_fault() ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace dpo_kernels::cuda
