// Which block kernel multiplies bfloat16 matrices in this process: one of ours (AMX, AVX512_BF16) or torch's (brgemm).
#include "products.h"

#include <torch/headeronly/util/BFloat16.h>

#include <cstdlib>
#include <string>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#endif
#ifdef DPO_X86
#include <cpuid.h>
#endif

namespace dpo_kernels {
namespace {

using c10::BFloat16;

float to_float(uint16_t value) { return static_cast<float>(BFloat16(value, BFloat16::from_bits())); }

void block_portable(int64_t rows, int64_t cols, int64_t depth, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                    float* c, int64_t c_stride, bool accumulate) {
    for (int64_t i = 0; i < rows; i++) {
        float* out = c + i * c_stride;
        if (!accumulate) std::fill(out, out + cols, 0.0f);
        for (int64_t k = 0; k < depth; k++) {
            const float left = to_float(a[i * a_stride + k]);
            const uint16_t* right = b + k / 2 * kCols * 2 + k % 2;
            for (int64_t j = 0; j < cols; j++) out[j] += left * to_float(right[2 * j]);
        }
    }
}

// torch's block kernel and its switch are C++ functions of libtorch that no stable function reaches, so they are looked
// up by the names that compilers give them. One that a torch does not have, or has with other arguments, is not found.
struct Brgemm {
    void (*multiply)(int64_t rows, int64_t cols, int64_t depth, int64_t a_stride, int64_t b_stride, int64_t c_stride,
                     bool accumulate, const BFloat16* a, const BFloat16* b, float* c, bool packed);
    void (*release)(bool packed);
    const void* (*context)();
    bool (*enabled)(const void* context);  // a member function of the context: torch.backends.mkldnn.enabled
};

const Brgemm& brgemm() {
    static const Brgemm found = [] {
        Brgemm names{};
#ifdef __linux__
        const auto look_up = [](auto& function, const char* name) {
            function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(RTLD_DEFAULT, name));
            return function != nullptr;
        };
        if (!look_up(names.multiply, "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb") ||
            !look_up(names.release, "_ZN2at6native7cpublas14brgemm_releaseEb") ||
            !look_up(names.context, "_ZN2at13globalContextEv") ||
            !look_up(names.enabled, "_ZNK2at7Context17userEnabledMkldnnEv")) {
            names = Brgemm{};
        }
#endif
        return names;
    }();
    return found;
}

void block_brgemm(int64_t rows, int64_t cols, int64_t depth, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                  float* c, int64_t c_stride, bool accumulate) {
    brgemm().multiply(rows, cols, depth, a_stride, kCols, c_stride, accumulate, reinterpret_cast<const BFloat16*>(a),
                      reinterpret_cast<const BFloat16*>(b), c, true);
}

void finish_brgemm() { brgemm().release(true); }

constexpr Product kPortable{"portable", block_portable, block_portable, kRows, 1, kCols, nullptr};
constexpr Product kBrgemm{"brgemm", block_brgemm, block_brgemm, kRows, 32, kCols, finish_brgemm};
#ifdef DPO_X86
constexpr Product kAvx512{"avx512_bf16",
                          avx512::block_bfloat16,
                          avx512::block_bfloat16_past_cache,
                          21 * avx512::kStripRows,
                          avx512::kStripRows,
                          avx512::kPanel,
                          nullptr};
#ifdef __linux__
constexpr Product kAmx{
    "amx", amx::block_bfloat16, amx::block_bfloat16_past_cache, kRows, amx::kStripRows, amx::kPanel, amx::release};
#endif
#endif

// Whether a block kernel adds to a result what the plain loops add. The operands are small integers, so both are exact.
bool agrees(const Product& product, int64_t rows, int64_t cols, int64_t depth, bool transposed) {
    std::vector<BFloat16> a(rows * depth), b(depth * cols);
    std::vector<float> got(rows * cols, 1.0f), wanted = got;
    for (size_t i = 0; i < a.size(); i++) a[i] = BFloat16(static_cast<float>(i % 7) - 3.0f);
    for (size_t i = 0; i < b.size(); i++) b[i] = BFloat16(static_cast<float>(i % 5) - 2.0f);
    const auto *a_bits = reinterpret_cast<const uint16_t*>(a.data()), *b_bits = reinterpret_cast<const uint16_t*>(b.data());
    const Matrix left = transposed ? Matrix{a_bits, 1, rows} : Matrix{a_bits, depth, 1};
    const Matrix right{b_bits, cols, 1};
    multiply(rows, cols, depth, left, right, got.data(), cols, true, product);
    multiply(rows, cols, depth, left, right, wanted.data(), cols, true, kPortable);
    return got == wanted;
}

// Whether a block kernel gives the right results, for small blocks and for whole ones with a rest in every direction.
// torch's layout of the packed operand is internal to torch and may change.
bool probe(const Product& product) {
    try {
        return agrees(product, 17, 33, 6, false) && agrees(product, kRows + 2, kCols + 44, kDepth + 6, false) &&
               agrees(product, kRows + 2, kCols + 44, kDepth + 5, true);
    } catch (const std::exception&) {
        return false;
    }
}

// The value of DPO_KERNELS_BF16: the name of a way, or "0" for none. "1", an empty value and no value ask for the
// machine's own.
const std::string& asked_for() {
    static const std::string asked = [] {
        const char* value = std::getenv("DPO_KERNELS_BF16");
        const std::string name(value == nullptr ? "" : value);
        DPO_CHECK(name.empty() || name == "0" || name == "1" || name == "portable" || name == "brgemm" ||
                  name == "avx512_bf16" || name == "amx",
                  "DPO_KERNELS_BF16 must be 0, 1, amx, avx512_bf16, brgemm or portable, got ", name);
        return name == "1" ? std::string() : name;
    }();
    return asked;
}

const Product* by_vectors() {
#ifdef DPO_X86
    static const bool runs = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16") && probe(kAvx512);
    if (runs) return &kAvx512;
#endif
    return nullptr;
}

bool torch_may_use_it() { return brgemm().multiply != nullptr && brgemm().enabled(brgemm().context()); }

// Whether torch's block kernel is there and right. It refuses to run, and is not tried, where it is switched off.
bool runs_brgemm() {
    if (brgemm().multiply == nullptr) return false;
    if (!torch_may_use_it()) return true;
    static const bool runs = probe(kBrgemm);
    return runs;
}

const Product* torchs() { return torch_may_use_it() && runs_brgemm() ? &kBrgemm : nullptr; }

// Whether the CPU multiplies tiles of bfloat16, AMX-BF16. Not every compiler's own question knows the word.
bool has_tiles() {
#ifdef DPO_X86
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx >> 22 & 1u) != 0;
#else
    return false;
#endif
}

const Product* by_tiles() {
#if defined(DPO_X86) && defined(__linux__)
    static const bool runs = isa() == Isa::avx512 && has_tiles() && amx::allowed() && probe(kAmx);
    if (runs) return &kAmx;
#endif
    return nullptr;
}

const Product* first_of(const Product* first, const Product* second) { return first != nullptr ? first : second; }

}  // namespace

const Product* product_of_this_machine() {
    const std::string& asked = asked_for();
    if (asked == "portable") return &kPortable;
    if (asked == "0") return nullptr;
    if (asked == "brgemm") {
        DPO_CHECK(runs_brgemm(), "DPO_KERNELS_BF16=brgemm: this torch or this CPU has no such block kernel");
        return torchs();
    }
    if (asked == "avx512_bf16") {
        DPO_CHECK(by_vectors() != nullptr, "DPO_KERNELS_BF16=avx512_bf16: this CPU has no AVX512_BF16, or "
                  "DPO_KERNELS_ISA asks for less");
        return by_vectors();
    }
    if (asked == "amx") {
        DPO_CHECK(by_tiles() != nullptr, "DPO_KERNELS_BF16=amx: this CPU has no AMX, Linux does not give it to this "
                  "process, or DPO_KERNELS_ISA asks for less");
        return by_tiles();
    }
    if (by_tiles() != nullptr) return by_tiles();
    // Tiles that are there and not ours to use may be torch's.
    return has_tiles() ? first_of(torchs(), by_vectors()) : first_of(by_vectors(), torchs());
}

const Product& required_product() {
    const Product* product = product_of_this_machine();
    DPO_CHECK(product != nullptr, asked_for() == "0" ? "DPO_KERNELS_BF16=0 asks for no product of bfloat16 matrices"
              : "no fast product of bfloat16 matrices: this CPU has none, or torch's (torch.backends.mkldnn) is off");
    return *product;
}

namespace {

bool has_bfloat16_matmul() { return product_of_this_machine() != nullptr; }

// How bfloat16 matrices are multiplied now: by one of the block kernels, or in float32 by torch's GEMM.
std::string bfloat16_product() {
    const Product* product = product_of_this_machine();
    return product == nullptr ? "float32" : product->name;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dpo_kernels, m) {
    m.def("has_bfloat16_matmul() -> bool");
    m.def("bfloat16_product() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dpo_kernels, CompositeImplicitAutograd, m) {
    m.impl("has_bfloat16_matmul", TORCH_BOX(&has_bfloat16_matmul));
    m.impl("bfloat16_product", TORCH_BOX(&bfloat16_product));
}

}  // namespace dpo_kernels
