// Memory for tiles and gradients: huge pages, and blocks that are kept for the next step.
//
// A tile or a gradient is allocated, written once and given back, which costs page faults: up to a fifth of a short
// step. Huge pages have 512 times fewer faults, and memory of the step before has none.
#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "../torch_abi.h"

namespace dpo_kernels {
namespace {

#ifdef __linux__
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPhysicalShare = 8;  // an eighth of the memory may lie idle, in all processes together
constexpr uint64_t kStale = 16;       // an idle block is freed after so many requests; a step makes two or three

struct Block {
    void* memory;
    size_t bytes;
    uint64_t since;
};

// The machine's memory, or what the container may have of it.
size_t memory_of_machine() {
    size_t least = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
    for (const char* file : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
        size_t limit = 0;
        if (std::ifstream(file) >> limit) least = std::min(least, limit);  // "max" is no number
    }
    return least;
}

// DPO_KERNELS_CPU_CACHE_BYTES, or this process's part of an eighth of the memory. torchrun sets LOCAL_WORLD_SIZE.
size_t limit_of_idle() {
    const char* asked = std::getenv("DPO_KERNELS_CPU_CACHE_BYTES");
    if (asked == nullptr) {
        const char* processes = std::getenv("LOCAL_WORLD_SIZE");
        const size_t count = processes == nullptr ? 1 : std::strtoull(processes, nullptr, 10);
        return memory_of_machine() / kPhysicalShare / std::max<size_t>(1, count);
    }
    char* end = nullptr;
    errno = 0;
    const unsigned long long bytes = std::strtoull(asked, &end, 10);
    DPO_CHECK(errno == 0 && asked[0] >= '0' && asked[0] <= '9' && *end == '\0',
              "DPO_KERNELS_CPU_CACHE_BYTES must be a number of bytes, got ", asked);
    return static_cast<size_t>(bytes);
}

class Pool {
   public:
    explicit Pool(size_t limit) : limit_(limit) {}

    // Takes the smallest idle block of at most twice the size, or a new one in place of the largest that is too small.
    // Batches are ragged, and without the replacement each new size would leave a block. Memory is null if the system
    // has none.
    Block take(size_t bytes) {
        std::vector<Block> stale;
        Block found{nullptr, 0, 0};
        {
            std::lock_guard<std::mutex> lock(mutex_);
            clock_++;
            for (size_t i = 0; i < idle_.size();) {
                if (clock_ - idle_[i].since > kStale) stale.push_back(remove(i));
                else i++;
            }
            const size_t none = idle_.size();
            size_t best = none, outgrown = none;
            for (size_t i = 0; i < none; i++) {
                const size_t size = idle_[i].bytes;
                if (size < bytes && (outgrown == none || size > idle_[outgrown].bytes)) outgrown = i;
                if (size >= bytes && size <= 2 * bytes && (best == none || size < idle_[best].bytes)) best = i;
            }
            if (best < none) found = remove(best);
            else if (outgrown < none) stale.push_back(remove(outgrown));
        }
        free_all(stale);
        if (found.memory == nullptr) found = allocate(bytes);
        if (found.memory == nullptr && empty() > 0) found = allocate(bytes);
        return found;
    }

    void give(Block block) {
        std::vector<Block> excess;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            block.since = clock_;
            if (block.bytes > limit_) {
                excess.push_back(block);
            } else {
                while (idle_bytes_ + block.bytes > limit_) excess.push_back(remove(0));  // the oldest
                idle_.push_back(block);
                idle_bytes_ += block.bytes;
            }
        }
        free_all(excess);
    }

    // Gives all idle blocks back to the system; returns their bytes.
    size_t empty() {
        std::vector<Block> all;
        size_t bytes = 0;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            all.swap(idle_);
            std::swap(bytes, idle_bytes_);
        }
        free_all(all);
        return bytes;
    }

    size_t limit() const { return limit_; }

   private:
    Block remove(size_t i) {
        const Block block = idle_[i];
        idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(i));
        idle_bytes_ -= block.bytes;
        return block;
    }

    static Block allocate(size_t bytes) {
        void* memory = nullptr;
        if (posix_memalign(&memory, kHugePage, bytes) != 0) return {nullptr, 0, 0};
        madvise(memory, bytes, MADV_HUGEPAGE);  // if it fails, the pages are small
        return {memory, bytes, 0};
    }

    static void free_all(const std::vector<Block>& blocks) {
        for (const Block& block : blocks) std::free(block.memory);
    }

    const size_t limit_;
    std::mutex mutex_;
    std::vector<Block> idle_;  // in the order in which they were given back
    size_t idle_bytes_ = 0;
    uint64_t clock_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
    static Pool* const one = new Pool(limit_of_idle());
    return *one;
}
#endif

Tensor new_huge(const Tensor& like, Sizes size) {
    std::vector<int64_t> strides(size.size());
    int64_t elements = 1;
    for (size_t i = size.size(); i-- > 0;) {
        DPO_CHECK(size[i] >= 0 && (size[i] == 0 || elements <= INT64_MAX / 16 / size[i]),
                  "size must be of lengths >= 0 whose product fits the memory, got ", size);
        strides[i] = elements;
        elements *= std::max<int64_t>(1, size[i]);
    }
    for (const int64_t length : size) {
        if (length == 0) elements = 0;
    }
#ifdef __linux__
    const size_t bytes = static_cast<size_t>(elements) * like.element_size();
    if (bytes >= 2 * kHugePage) {
        const Block block = pool().take((bytes + kHugePage - 1) / kHugePage * kHugePage);
        if (block.memory != nullptr) {
            return torch::stable::from_blob(block.memory, size, strides, like.device(), like.scalar_type(),
                                            [block](void*) { pool().give(block); });
        }
    }
#endif
    int32_t dtype = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    return new_tensor(size, strides, dtype, like);
}

int64_t empty_cache() {
#ifdef __linux__
    return static_cast<int64_t>(pool().empty());
#else
    return 0;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dpo_kernels, m) {
    // Returns uninitialised memory of a tensor's dtype, in huge pages if the system has them. It is kept when freed.
    m.def("new_huge(Tensor like, SymInt[] size) -> Tensor");
    // Gives the kept memory back to the system; returns the number of bytes.
    m.def("empty_cache() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(dpo_kernels, CPU, m) { m.impl("new_huge", TORCH_BOX(&new_huge)); }
STABLE_TORCH_LIBRARY_IMPL(dpo_kernels, CompositeImplicitAutograd, m) { m.impl("empty_cache", TORCH_BOX(&empty_cache)); }

}  // namespace dpo_kernels
