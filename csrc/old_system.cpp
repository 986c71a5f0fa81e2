// Definitions that the compiler would take from newer systems than the extension loads on: see old_system.h.
#include <sstream>

#ifdef __GLIBCXX__
// Their constructors without arguments are in libstdc++ since gcc 9.
template class std::basic_stringstream<char>;
template class std::basic_ostringstream<char>;
#endif

#if defined(__linux__) && defined(__GLIBC__)
// libstdc++ asks glibc 2.32 whether there is one thread, to save atomic operations. This answer is that there are more.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
