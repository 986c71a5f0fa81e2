// Row passes over tiles of logits, by pointers only. Neither this header nor the files that are compiled once for each
// instruction set include a torch header. So no inline function of torch can leak out of a file that may use AVX-512.
#pragma once
#include <stdint.h>

namespace dpo_kernels {

// Running reduction of rows. A null pointer stands for a statistic that was not asked for. Sums of exponentials leave
// the label's own out, because the others would lose their digits beside it when the label is nearly certain.
template <typename T>
struct RowState {
    T* max;
    T* others;        // sum of exp(z - max) without the label's
    T* target;        // the label's logit
    T* entropy;       // -sum of exp(z - max) * (z - max) without the label's
    T* logit_sum;     // sum of z over all columns
    int64_t* argmax;  // first column of the largest logit
    T* square_sum;    // sum of exp(z - max)^2 without the label's
};

// Columns start..start+cols-1 of the vocabulary; row r begins at data + r * stride.
template <typename T>
struct Tile {
    T* data;
    int64_t stride;
    int64_t cols;
    int64_t start;
};

// How d logits are formed; see dlogits_rows below.
template <typename T>
struct Gradient {
    const int64_t* labels;
    const T* max;
    const T* others;
    const T* scale;      // or null
    uint16_t* bfloat16;  // the result in bfloat16, with its own stride; null if the result is written in place
    int64_t bfloat16_stride;
    T* residual;         // what rounding took from the label's own value; only with bfloat16
    T softcap;           // 0 for none
    bool exponentiated;  // the tile holds exp(z - max) already
    const T* target;     // the label's logit; only for codes
};

// Logits in 16 bits. A block of kCodedCols columns of a row has the largest of its logits apart, and of each logit how
// far it lies below, in steps of ln 2 / 1024. The last code stands for everything beyond, which is 2^-64 of the largest
// exponential or less, and counts as 0.
struct Codes {
    uint16_t* data;
    int64_t stride;
    float* highest;          // of row r in block b: highest[b * highest_stride + r]
    int64_t highest_stride;
    bool past_cache;         // the cache is left to what is read sooner, see `order_stores`; rows begin with a line of it
};
constexpr int64_t kCodedCols = 256;

// What the sample of a tile's gradient needs of each row; dpo_kernels/kernels/sampling.py explains it.
template <typename T>
struct SampledRows {
    const int64_t* labels;
    const T* max;
    const T* others;
    const T* sumexp;
    const int64_t* tokens;  // row of each token in the flattened input
    uint64_t seed;
    T tau;
    T softcap;           // 0 for none
    bool exponentiated;  // the tile holds exp(z - max) already
    const T* target;     // the label's logit; only for codes
};

// The passes, for rows first..last-1.
template <typename T>
struct Passes {
    // Fold the tile into the state. With overwrite it is left holding exp(z - max), otherwise as it was.
    void (*reduce)(Tile<T>, const int64_t* labels, RowState<T>, bool overwrite, int64_t first, int64_t last);
    // Fold `count` states of other columns into one, those of a row `stride` elements apart. The label's logit is not one
    // of them: whoever found it has written it.
    void (*merge)(RowState<T>, RowState<T> parts, int64_t count, int64_t stride, int64_t first, int64_t last);
    // sumexp * (softmax - onehot), which is -others for the label, times the softcap's derivative and the row's scale.
    void (*dlogits)(Tile<T>, Gradient<T>, int64_t first, int64_t last);
    // Turns raw products of hidden states and head into final logits, cap(scale * (z + bias)).
    void (*apply_bias_scale_cap)(Tile<T>, const T* bias, T scale, T softcap, int64_t first, int64_t last);
    // Write the logits of at most kCodedCols columns as codes, and the largest of each row.
    void (*encode)(Tile<T>, Codes, int64_t first, int64_t last);
    // Do reduce of at most kCodedCols columns, into states that hold nothing yet, and encode unless the codes are null.
    void (*reduce_block)(Tile<T>, const int64_t* labels, RowState<T>, Codes, int64_t first, int64_t last);
    // Do dlogits of rows of logits that are codes. The result may take the place of the codes.
    void (*dlogits_of_codes)(Codes, int64_t cols, int64_t start, Gradient<T>, int64_t first, int64_t last);
    // out[i] = factor * in[i], rounded to nearest; the two do not overlap.
    void (*to_bfloat16)(const T* in, uint16_t* out, int64_t count, T factor);
    // Writes the entries of one row's gradient that the sample keeps, at most all; returns how many. Adds the number that
    // is expected, whatever the seed. With null columns it does no more than that.
    int64_t (*sample)(Tile<T>, const SampledRows<T>&, int64_t row, int32_t* columns, T* values, int64_t* expected);
    // The same for logits that are codes.
    int64_t (*sample_of_codes)(Codes, int64_t cols, int64_t start, const SampledRows<T>&, int64_t row, int32_t* columns,
                               T* values, int64_t* expected);
    // out (+)= the sum of factors[k] times row indices[k] of a matrix, in that order.
    void (*add_rows)(T* out, int64_t width, const T* matrix, int64_t stride, const int32_t* indices, const T* factors,
                     int64_t count, bool accumulate);
    // The same of rows of bfloat16. The cache may be left to what is read sooner, see `order_stores`.
    void (*add_bfloat16_rows)(T* out, int64_t width, const uint16_t* matrix, int64_t stride, const int32_t* indices,
                              const T* factors, int64_t count, bool accumulate, bool past_cache);
};

namespace base {
extern const Passes<float> passes_float;
extern const Passes<double> passes_double;
}  // namespace base
#if defined(__x86_64__) && defined(__GNUC__)
#define DPO_X86 1
namespace avx2 {
extern const Passes<float> passes_float;
extern const Passes<double> passes_double;
}  // namespace avx2
namespace avx512 {
extern const Passes<float> passes_float;
extern const Passes<double> passes_double;
}  // namespace avx512
#endif

}  // namespace dpo_kernels
