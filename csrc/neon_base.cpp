// NEON as every 64-bit ARM processor has it.

#if defined(__aarch64__)

#include <arm_neon.h>

#include "kernels.h"
#include "shuffle_tables.h"

namespace sct {
namespace {

#include "neon_body.h"

bool available() { return true; }

}  // namespace

extern const Kernels kNeonBase;
const Kernels kNeonBase = {"neon-base", available, quantize, block_rows};

}  // namespace sct

#endif
