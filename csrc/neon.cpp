// NEON with the dot product of bytes (sdot).

#if defined(__aarch64__)

#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "kernels.h"
#include "shuffle_tables.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define SCT_DOT_PRODUCT 1

namespace sct {
namespace {

#include "neon_body.h"

bool available() {
#if defined(__linux__)
    constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
    return getauxval(AT_HWCAP) & kDotProducts;
#else
    return true;  // every ARM processor of Apple has it
#endif
}

}  // namespace

extern const Kernels kNeon;
const Kernels kNeon = {"neon", available, quantize, block_rows};

}  // namespace sct

#include "target_end.h"

#endif
