// How products of bfloat16 matrices are cut into blocks and packed for the block kernels.
#pragma once

#include <algorithm>
#include <memory>

#include "blocks.h"
#include "passes.h"

namespace dpo_kernels {

constexpr int64_t kRows = 128;                // rows of a block of the result, at most
constexpr int64_t kCols = 256;                // columns of a block, the most that brgemm takes
constexpr int64_t kDepth = 2048;              // products that are summed at a time
constexpr int64_t kDepthStep = 32;            // depths are multiples of it, as torch keeps a kernel for each depth
constexpr int64_t kPackedElements = 4 << 20;  // elements of the right operand that are packed at a time

inline int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// How many elements a sum of so many has with its zeros, where the left operand is read row after row.
inline int64_t padded(int64_t depth) { return depth % 2 == 0 ? depth : up(depth, kDepthStep); }

struct Matrix {
    const uint16_t* data;
    int64_t row_stride;
    int64_t col_stride;

    const uint16_t* at(int64_t row, int64_t col) const { return data + row * row_stride + col * col_stride; }
};

// A bfloat16 tensor that is contiguous along its rows or its columns. The name is for errors.
Matrix operand(const char* name, const Tensor& tensor);

// Memory that begins with a line of the cache, and keeps nothing when it grows.
template <typename T>
class Aligned {
public:
    void reserve(int64_t elements) {
        if (elements <= size_) return;
        memory_.reset(new char[elements * sizeof(T) + kLine]);
        size_ = elements;
    }

    T* data() const {
        const auto address = reinterpret_cast<uintptr_t>(memory_.get());
        return reinterpret_cast<T*>(memory_.get() + (kLine - address % kLine) % kLine);
    }

private:
    static constexpr size_t kLine = 64;
    std::unique_ptr<char[]> memory_;
    int64_t size_ = 0;
};

// How blocks are multiplied.
struct Product {
    const char* name;
    Block block;
    Block past_cache;  // for a result that is larger than the cache and written once
    int64_t rows;      // of a block of the result, at most kRows and a multiple of `step`
    int64_t step;      // rows that the block kernel takes at a time
    int64_t panel;     // columns of a panel of the packed right operand, a divisor of kCols
    void (*finish)();  // called by each thread after its last block; null for nothing
};

// Cuts rows into blocks of about the same height, so that threads with the same number of blocks do the same work.
class RowBlocks {
public:
    RowBlocks(int64_t rows, const Product& product)
        : rows_(rows), step_(product.step), steps_((rows + step_ - 1) / step_),
          blocks_((rows + product.rows - 1) / product.rows) {}

    int64_t number() const { return blocks_; }
    int64_t start(int64_t block) const { return std::min(rows_, block * steps_ / blocks_ * step_); }
    int64_t height(int64_t block) const { return start(block + 1) - start(block); }

private:
    int64_t rows_, step_, steps_, blocks_;
};

// The way that is fastest here. It is null if none is fast, or if torch may use none now (torch.backends.mkldnn).
const Product* product_of_this_machine();

// The same; an error that says why where it is null.
const Product& required_product();

const Packing& packing();

// Elements k0.. of the columns n0.. of the right operand, as its panels.
void pack_right(const Matrix& b, int64_t k0, int64_t depth, int64_t reach, int64_t n0, int64_t cols, int64_t panel,
                uint16_t* out);

// Elements k0.. of the rows m0.. of the left operand, with `stride` from row to row.
void pack_left(const Matrix& a, int64_t m0, int64_t rows, int64_t k0, int64_t depth, int64_t reach, uint16_t* out,
               int64_t stride);

// The distance of packed rows of so many elements: not a multiple of a large power of two, which would bring the same
// column of many rows to the same few places of the cache.
inline int64_t row_distance(int64_t elements) { return up(elements, 64) + 32; }

// c (+)= a b.
void multiply(int64_t rows, int64_t cols, int64_t depth, const Matrix& a, const Matrix& b, float* c, int64_t c_stride,
              bool accumulate, const Product& product);

}  // namespace dpo_kernels
