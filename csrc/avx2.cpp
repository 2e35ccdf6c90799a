// AVX2 as Intel since Haswell and AMD since Zen have it.

#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>

#include "kernels.h"
#include "shuffle_tables.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#endif

namespace sct {
namespace {

#include "avx2_body.h"

bool available() { return has_avx2(); }

}  // namespace

extern const Kernels kAvx2;
const Kernels kAvx2 = {"avx2", available, quantize, rows};

}  // namespace sct

#include "target_end.h"

#endif
