// AVX2 with the dot product of bytes (AVX-VNNI): Intel since Alder Lake, AMD since Zen 5.

#if defined(__x86_64__)

// GCC since 11 and clang since 12 know the instructions; with an older compiler the set is missing.
#if __has_include(<avxvnniintrin.h>)

#include <cpuid.h>
#include <immintrin.h>

#include "kernels.h"
#include "shuffle_tables.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,avxvnni")
#endif

#define SCT_VNNI 1

namespace sct {
namespace {

#include "avx2_body.h"

bool available() {
    unsigned eax, ebx, ecx, edx;
    // Nor avxvnni.
    return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 4);
}

}  // namespace

extern const Kernels kAvx2Vnni;
const Kernels kAvx2Vnni = {"avx2-vnni", available, quantize, rows};

}  // namespace sct

#include "target_end.h"

#else

#include "kernels.h"

namespace sct {

extern const Kernels kAvx2Vnni;
const Kernels kAvx2Vnni = {"avx2-vnni", [] { return false; }, nullptr, nullptr};

}  // namespace sct

#endif

#endif
