// What the operators use of torch: its stable ABI, which is C functions of libtorch behind headers of inline code. What is
// compiled against any torch runs on every torch from the one that is named here on (torch 2.11's from_blob is the newest
// function that is called).
#pragma once

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include "old_system.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>

namespace dpo_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// How errors name things: as torch itself does.
inline std::ostream& operator<<(std::ostream& out, const Device& device) {
    out << (device.is_cpu() ? "cpu" : device.is_cuda() ? "cuda" : "device type ");
    if (!device.is_cpu() && !device.is_cuda()) out << static_cast<int>(device.type());
    return device.has_index() && !device.is_cpu() ? out << ':' << device.index() : out;
}

inline std::ostream& operator<<(std::ostream& out, const Sizes& sizes) {
    out << '[';
    for (size_t i = 0; i < sizes.size(); i++) out << (i == 0 ? "" : ", ") << sizes[i];
    return out << ']';
}

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::runtime_error(text.str());
}

// Throws a RuntimeError of Python's whose text is "dpo_kernels: " and the parts. They are evaluated only then.
#define DPO_CHECK(condition, ...)                                            \
    do {                                                                     \
        if (!(condition)) ::dpo_kernels::refuse("dpo_kernels: ", __VA_ARGS__); \
    } while (false)

// Uninitialised memory on a tensor's device.
inline Tensor new_tensor(const Sizes& sizes, const Sizes& strides, int32_t dtype, const Tensor& like) {
    int32_t kind = 0;
    AtenTensorHandle made = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &kind));
    const AOTITorchError status =
        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, kind,
                                 like.get_device_index(), &made);
    if (status != AOTI_TORCH_SUCCESS) {  // the text of torch's own error does not come through its C functions
        auto bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
        for (size_t i = 0; i < sizes.size(); i++) bytes *= sizes[i];
        refuse("dpo_kernels: no memory for ", bytes, " bytes on ", like.device());
    }
    return Tensor(made);
}

// A vector of float64 on a tensor's device.
inline Tensor new_doubles(int64_t length, const Tensor& like) {
    return new_tensor({length}, {1}, aoti_torch_dtype_float64(), like);
}

// Calls body(first, last) for parts of begin..end-1 on torch's threads. libtorch would print an exception of the body and
// lose its text, so the first one is thrown again here.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
    std::optional<std::string> error;
    std::mutex mutex;
    torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
        try {
            body(first, last);
        } catch (const std::exception& caught) {
            const std::lock_guard<std::mutex> lock(mutex);
            if (!error) error = caught.what();
        }
    });
    if (error) throw std::runtime_error(*error);
}

}  // namespace dpo_kernels
