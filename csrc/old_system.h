// The extension loads wherever torch's own wheels do: glibc 2.28, and the libstdc++ of gcc 8. What newer systems have under
// a newer name as well is asked for by its old name here; old_system.cpp defines what they alone have.
#pragma once

#if defined(__linux__) && defined(__x86_64__)
#include <features.h>
#ifdef __GLIBC__
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
__asm__(".symver dlopen, dlopen@GLIBC_2.2.5");
#endif
#endif
