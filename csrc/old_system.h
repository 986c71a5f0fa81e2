// The extension loads wherever torch's own wheels do: glibc 2.28, and the libstdc++ of gcc 8. What newer systems have under
// a newer name as well is asked for by its old name here; old_system.cpp defines what they alone have.
#pragma once

#ifdef __linux__
#include <features.h>
#if defined(__GLIBC__) && defined(__x86_64__)
#define DPO_OLD_GLIBC "GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define DPO_OLD_GLIBC "GLIBC_2.17"
#endif
#ifdef DPO_OLD_GLIBC
__asm__(".symver exp, exp@" DPO_OLD_GLIBC);
__asm__(".symver dlsym, dlsym@" DPO_OLD_GLIBC);
__asm__(".symver dlopen, dlopen@" DPO_OLD_GLIBC);
#endif
#endif
