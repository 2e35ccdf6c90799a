// Vectors of 16 floats, whatever registers they take: see layers_body.h. No include guard: each namespace has its own.

typedef float Vector __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));

#define SCT_INLINE static inline __attribute__((always_inline))

SCT_INLINE Vector load(const float *from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}
