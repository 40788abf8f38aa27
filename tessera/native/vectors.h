// Vectors of float32.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int W = 16;  // lanes of a vector
#else
constexpr int W = 8;
#endif
typedef float Vector __attribute__((vector_size(4 * W)));

// Memory to a number or a vector of them, and back.
static inline void load(const float* from, float& to) { to = *from; }
static inline void load(const float* from, Vector& to) { memcpy(&to, from, sizeof to); }
static inline void store(float from, float* to) { *to = from; }
static inline void store(const Vector& from, float* to) { memcpy(to, &from, sizeof from); }
