// Vectors of float32 that are float32 or bfloat16 in memory.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
constexpr int W = 16;  // lanes of a vector
#else
constexpr int W = 8;
#endif
typedef float Vector __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

struct bfloat16 {
    uint16_t bits;
};

// Memory to float32 and back, one number or a vector of them; bfloat16 is rounded to nearest, ties to even.
static inline void load(const float* from, float& to) { to = *from; }
static inline void load(const float* from, Vector& to) { memcpy(&to, from, sizeof to); }
static inline void load(const bfloat16* from, float& to) {
    const uint32_t bits = uint32_t(from->bits) << 16;
    memcpy(&to, &bits, sizeof to);
}
static inline void load(const bfloat16* from, Vector& to) {
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    const Bits bits = __builtin_convertvector(halves, Bits) << 16;
    memcpy(&to, &bits, sizeof to);
}
static inline void store(float from, float* to) { *to = from; }
static inline void store(const Vector& from, float* to) { memcpy(to, &from, sizeof from); }
static inline void store(float from, bfloat16* to) {
    uint32_t bits;
    memcpy(&bits, &from, sizeof bits);
    to->bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
static inline void store(const Vector& from, bfloat16* to) {
#ifdef __AVX512BF16__
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)from);
#else
    Bits bits;
    memcpy(&bits, &from, sizeof bits);
    const Halves halves = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
#endif
    memcpy(to, &halves, sizeof halves);
}
