// Closes what a file opened to be compiled for another processor: `clang attribute push`, or `GCC push_options`.
// No include guard: each file that opens includes it once, at its end.

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
