#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx2,fma")
#define DPO_NAMESPACE avx2
#include "rows_impl.h"
#endif
