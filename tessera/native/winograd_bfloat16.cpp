// Winograd's F(2x2, 3x3) in bfloat16 on a CPU that multiplies in it: weights, sums and products. See winograd.py.
//
// An image is worked on in squares of up to 8 x 8 blocks of 2 x 2 outputs, all steps of a square by one thread, so that
// what is between stays in that core's cache. Channels come last. Sums and products are accumulated in float32.
//
// Letters: H W sides of the image, C channels in, D channels out, T blocks of a square.
#include <algorithm>
#include <vector>

#include "vectors.h"

#ifndef __AVX512BF16__
extern "C" int64_t possible(int64_t, int64_t) { return 0; }
#else

#include <immintrin.h>

struct bfloat16 {
    uint16_t bits;
};

static inline void load(const bfloat16* from, Vector& to) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    to = (Vector)_mm512_slli_epi32(wide, 16);
}
static inline void store(const Vector& from, bfloat16* to) {  // to nearest, ties to even
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)from);
    memcpy(to, &halves, sizeof halves);
}

constexpr int64_t SQUARE = 8, SIDE = 2 * SQUARE + 2, NUMBERS = 16, ROWS = 4;
constexpr int64_t MOST = (SQUARE * SQUARE + ROWS - 1) / ROWS * ROWS;  // blocks of a square, rounded up
constexpr int64_t GAP = 32;  // beyond a power of two between numbers, so that they do not share one line of the cache

// The paper's G on both sides of the weights of 16 channels in, then a place in `kernels` for each of their pairs.
template <class Number>
static void pack(const Number* weight, int64_t channels, int64_t wide, int64_t block, uint32_t* kernels,
                 int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t d = 0; d < wide; d++)
        for (int64_t c = 0; c < channels; c += W) {
            Vector g[9], t[12], u[NUMBERS];
            for (int i = 0; i < 9; i++) load(weight + (9 * d + i) * channels + c, g[i]);
            for (int x = 0; x < 3; x++) {
                const Vector even = (g[x] + g[6 + x]) * 0.5f, odd = g[3 + x] * 0.5f;
                t[x] = g[x], t[3 + x] = even + odd, t[6 + x] = even - odd, t[9 + x] = g[6 + x];
            }
            for (int y = 0; y < 4; y++) {
                const Vector even = (t[3 * y] + t[3 * y + 2]) * 0.5f, odd = t[3 * y + 1] * 0.5f;
                u[4 * y] = t[3 * y], u[4 * y + 1] = even + odd, u[4 * y + 2] = even - odd, u[4 * y + 3] = t[3 * y + 2];
            }
            for (int i = 0; i < NUMBERS; i++) {
                uint32_t pairs[W / 2];
                store(u[i], (bfloat16*)pairs);
                uint32_t* to = kernels + ((d / block * NUMBERS + i) * channels / 2 + c / 2) * block + d % block;
                for (int k = 0; k < W / 2; k++) to[k * block] = pairs[k];
            }
        }
}

// ROWS of the T: a (ROWS, C) times b (C, 16 N), in which pairs of rows lie together -> out (ROWS, 16 N).
template <int N>
static inline void multiply(const bfloat16* a, const uint32_t* b, int64_t channels, float* out) {
    __m512 sums[ROWS][N] = {};
    for (int64_t k = 0; k < channels / 2; k++) {
        __m512bh column[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) column[n] = (__m512bh)_mm512_loadu_si512(b + (k * N + n) * 16);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            memcpy(&pair, a + r * channels + 2 * k, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], both, column[n]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) _mm512_storeu_ps(out + (r * N + n) * 16, sums[r][n]);
}

// The paper's B' and A' along one side: four inputs -> four numbers -> two outputs.
static inline void forth(const Vector* d, int step, Vector* to, int to_step) {
    to[0] = d[0] - d[2 * step];
    to[to_step] = d[step] + d[2 * step];
    to[2 * to_step] = d[2 * step] - d[step];
    to[3 * to_step] = d[step] - d[3 * step];
}
static inline void back(const Vector* m, int step, Vector* to, int to_step) {
    to[0] = m[0] + m[step] + m[2 * step];
    to[to_step] = m[step] - m[2 * step] - m[3 * step];
}

// One square: `down` x `across` blocks whose first output is at (top, left).
template <int N>
static void square(const bfloat16* image, int64_t height, int64_t width, int64_t channels, const uint32_t* kernels,
                   const float* bias, int64_t wide, int64_t top, int64_t left, int64_t down, int64_t across,
                   bfloat16* patch, bfloat16* numbers, float* products, bfloat16* out) {
    // What the square reads, zeros beyond the image.
    for (int64_t y = 0; y < 2 * down + 2; y++)
        for (int64_t x = 0; x < 2 * across + 2; x++) {
            const int64_t row = top + y - 1, column = left + x - 1;
            bfloat16* to = patch + (y * SIDE + x) * channels;
            if (row < 0 || row >= height || column < 0 || column >= width)
                memset(to, 0, channels * sizeof *to);
            else
                memcpy(to, image + (row * width + column) * channels, channels * sizeof *to);
        }
    const int64_t blocks = down * across, rounded = (blocks + ROWS - 1) / ROWS * ROWS;
    const int64_t pitch = rounded * channels + GAP;
    for (int64_t t = 0; t < blocks; t++) {
        const bfloat16* from = patch + (t / across * 2 * SIDE + t % across * 2) * channels;
        for (int64_t c = 0; c < channels; c += W) {
            Vector d[16], s[16];
            for (int i = 0; i < 16; i++) load(from + (i / 4 * SIDE + i % 4) * channels + c, d[i]);
            for (int x = 0; x < 4; x++) forth(d + x, 4, s + x, 4);
            for (int y = 0; y < 4; y++) forth(s + 4 * y, 1, d + 4 * y, 1);
            for (int i = 0; i < 16; i++) store(d[i], numbers + i * pitch + t * channels + c);
        }
    }
    constexpr int64_t block = 16 * N;
    const int64_t between = rounded * block + GAP;
    for (int64_t first = 0; first < wide; first += block) {
        for (int64_t i = 0; i < NUMBERS; i++) {
            const uint32_t* kernel = kernels + (first / block * NUMBERS + i) * channels / 2 * block;
            for (int64_t t = 0; t < rounded; t += ROWS)
                multiply<N>(numbers + i * pitch + t * channels, kernel, channels, products + i * between + t * block);
        }
        for (int64_t t = 0; t < blocks; t++) {
            bfloat16* to = out + ((top + t / across * 2) * width + left + t % across * 2) * wide + first;
            for (int64_t c = 0; c < block; c += W) {
                Vector m[16], s[8], o[4], b;
                for (int i = 0; i < 16; i++) load(products + i * between + t * block + c, m[i]);
                for (int x = 0; x < 4; x++) back(m + x, 4, s + x, 4);
                for (int y = 0; y < 2; y++) back(s + 4 * y, 1, o + 2 * y, 1);
                load(bias + first + c, b);
                for (int i = 0; i < 4; i++) store(o[i] + b, to + (i / 2 * width + i % 2) * wide + c);
            }
        }
    }
}

template <int N>
static void squares(const bfloat16* image, int64_t height, int64_t width, int64_t channels, const uint32_t* kernels,
                    const float* bias, int64_t wide, bfloat16* out, int64_t threads) {
    const int64_t down = height / 2, across = width / 2;
    const int64_t rows = (down + SQUARE - 1) / SQUARE, columns = (across + SQUARE - 1) / SQUARE;
#pragma omp parallel num_threads(threads)
    {
        std::vector<bfloat16> patch(SIDE * SIDE * channels), numbers(NUMBERS * (MOST * channels + GAP));
        std::vector<float> products(NUMBERS * (MOST * 16 * N + GAP));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * columns; i++) {
            const int64_t y = i / columns * SQUARE, x = i % columns * SQUARE;
            square<N>(image, height, width, channels, kernels, bias, wide, 2 * y, 2 * x,
                      std::min(SQUARE, down - y), std::min(SQUARE, across - x), patch.data(), numbers.data(),
                      products.data(), out);
        }
    }
}

static int64_t block_of(int64_t wide) { return wide % 64 == 0 ? 64 : wide % 32 == 0 ? 32 : 16; }

extern "C" {

// Whether a convolution of so many channels can be done here.
int64_t possible(int64_t channels, int64_t wide) { return channels % W == 0 && wide % 16 == 0; }

// weight (D, 3, 3, C) -> kernels, 16 * C * D numbers.
void pack_float32(const float* weight, int64_t channels, int64_t wide, uint32_t* kernels, int64_t threads) {
    pack(weight, channels, wide, block_of(wide), kernels, threads);
}
void pack_bfloat16(const bfloat16* weight, int64_t channels, int64_t wide, uint32_t* kernels, int64_t threads) {
    pack(weight, channels, wide, block_of(wide), kernels, threads);
}

// image (H, W, C), H and W even -> its convolution (H, W, D).
void convolve(const bfloat16* image, int64_t height, int64_t width, int64_t channels, const uint32_t* kernels,
              const float* bias, int64_t wide, bfloat16* out, int64_t threads) {
    const auto run = wide % 64 == 0 ? squares<4> : wide % 32 == 0 ? squares<2> : squares<1>;
    run(image, height, width, channels, kernels, bias, wide, out, threads);
}
}
#endif
