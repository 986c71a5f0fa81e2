// The device of a tensor, and the stream that torch works on there.
#pragma once

#include <dlfcn.h>

#include "../torch_abi.h"

namespace dpo_kernels {
namespace {

// torch's current CUDA stream. The C function that gives it lies in libtorch_cuda, which is not linked, so that this
// module builds against a torch without CUDA; where a tensor is on a GPU, the library is loaded.
void* current_stream(int32_t device) {
    using Get = int32_t (*)(int32_t device, void** stream);
    static const Get get = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return library == nullptr ? nullptr
                                  : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
    }();
    DPO_CHECK(get != nullptr, "this torch gives no CUDA stream (libtorch_cuda.so is not loaded, or is another one)");
    void* stream = nullptr;
    DPO_CHECK(get(device, &stream) == 0, "torch has no current CUDA stream for device ", device);
    return stream;
}

// Makes a tensor's device current for as long as it lives.
class OnDevice {
public:
    explicit OnDevice(const Tensor& tensor)
        : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}

    void* stream() const { return stream_; }

private:
    torch::stable::accelerator::DeviceGuard guard_;
    void* stream_;
};

}  // namespace
}  // namespace dpo_kernels
