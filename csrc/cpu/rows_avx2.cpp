#if defined(__x86_64__) && defined(__GNUC__)
#define DPO_NAMESPACE avx2
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "rows_impl.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
