// Kernels that the gate must refuse, each for its own reason, and one that it must not.
#include <cstdint>

namespace planted {

__global__ void __launch_bounds__(512) good(float* out, const float* in) {
    out[threadIdx.x] = in[threadIdx.x] * 2.0f;
}

// 128 values alive at once.
template <int COUNT>
__device__ void many_values(float* out, const float* in) {
    float values[COUNT];
#pragma unroll
    for (int at = 0; at < COUNT; ++at) values[at] = in[at * 1024 + threadIdx.x];
#pragma unroll
    for (int step = 1; step < 4; ++step) {
#pragma unroll
        for (int at = 0; at < COUNT; ++at) values[at] = values[at] * values[(at * 7 + step) % COUNT] + in[step];
    }
#pragma unroll
    for (int at = 0; at < COUNT; ++at) out[at * 1024 + threadIdx.x] = values[at];
}

__global__ void __launch_bounds__(1024) spilling(float* out, const float* in) { many_values<128>(out, in); }

__global__ void __launch_bounds__(512) hungry(float* out, const float* in) { many_values<80>(out, in); }

// No block size given: it might be the largest.
__global__ void unbounded(float* out, const float* in) { many_values<48>(out, in); }

__global__ void __launch_bounds__(512) indexed(float* out, const float* in, const int* places) {
    float values[16];
    for (int at = 0; at < 16; ++at) values[at] = in[at];
    for (int at = 0; at < 64; ++at) values[places[at]] += 1.0f;
    for (int at = 0; at < 16; ++at) out[at] = values[places[at]];
}

// Named like ours, but an element at a time.
template <class T>
__global__ void __launch_bounds__(512) reduce_rows(T* out, const T* in) {
    out[threadIdx.x] = in[threadIdx.x] + in[threadIdx.x + 512];
}
template __global__ void reduce_rows<float>(float*, const float*);

__global__ void __launch_bounds__(512) dlogits_rows(float* out, const float4* in) {
    const float4 four = in[threadIdx.x];
    out[threadIdx.x] = four.x + four.y + four.z + four.w;
}

}  // namespace planted
