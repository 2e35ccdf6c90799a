// Which of the implementations of layers.h is in use.

#include "layers.h"

#include <cstring>

#include "secateur.h"

namespace sct {

const Layers &layers() {
#if defined(__x86_64__)
    const char *isa = sct_isa();
    if (std::strncmp(isa, "avx2", 4) == 0) return LAYERS_AVX2;
    if (std::strncmp(isa, "avx512", 6) == 0) return LAYERS_AVX512;
#endif
    return LAYERS_REFERENCE;
}

}  // namespace sct
