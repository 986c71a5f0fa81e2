#if defined(__x86_64__) && defined(__GNUC__)
#define DPO_NAMESPACE avx512
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#include "rows_impl.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
