// One step of the GPT prior on a CPU: packed matrices, attention over a cache, norms, and the draw. See kernels.py.
//
// Every number of a row is summed in an order of its own, whatever else is in the batch and on however many threads it
// runs: matrices run over the input from its first entry to its last, attention over the positions from the first to
// the last, and only separate outputs share a vector. So a row comes out bit for bit the same alone or among others.
//
// Letters: M rows, N sequences of S new positions each (M = N·S), E width, d head width, P prefix, L own positions.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define WIDE  // vectors of 64 bytes
#ifdef __AVX512BF16__
#define BFLOAT16_PAIRS  // which are multiplied two at a time
#endif
constexpr int W = 16;  // lanes of a vector
#else
constexpr int W = 8;
#endif
constexpr int PANEL = 2 * W;      // outputs of a matrix that are computed together
constexpr int ROWS = 6;           // rows that share a loaded weight: 6 x 2 sums and 2 weights fit 16 registers
constexpr int PANELS_A_TASK = 4;  // of one thread at a time
constexpr int QUERIES = 4;        // that share a loaded key
constexpr float EPS = 1e-6f;

typedef float Vector __attribute__((vector_size(4 * W)));
typedef float Loose __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef int16_t Pairs __attribute__((vector_size(4 * W)));  // two numbers for each output
typedef uint16_t bf16;

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

extern "C" {
struct Matrix {
    const void* data;    // panels of [in][PANEL]
    const float* scale;  // (out) of int8, else null
    int64_t out, in, kind;
};
struct Block {
    const float *attention_norm, *query_scale, *key_scale, *mlp_norm;
    Matrix qkv, out, mlp_in, mlp_out;
};
struct Segment {     // keys and values of all layers, rows and heads
    void *keys;      // (depth, rows, heads, capacity / W, d, W)
    void *values;    // (depth, rows, heads, capacity, d rounded up to W)
    int64_t rows, capacity, kind;
};
}

static inline Vector load(const float* at) { return *(const Loose*)at; }
static inline Vector load(const bf16* at) { return (Vector)(__builtin_convertvector(*(const Halves*)at, Bits) << 16); }
static inline void store(float* at, Vector x) { *(Loose*)at = x; }

// sum + a * b, rounded once on x86, twice elsewhere: left to itself (-ffp-contract) the compiler decides place by place.
static inline Vector add_product(Vector sum, float a, Vector b) {
#if defined(WIDE)
    return _mm512_fmadd_ps(_mm512_set1_ps(a), b, sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_fmadd_ps(_mm256_set1_ps(a), b, sum);
#else
    return sum + a * b;
#endif
}

// Arithmetic on pairs: two weights of each of W outputs, and sum + the products of both with two numbers of a row.
struct WholePairs {  // 8-bit weights; all of it is exact
    typedef int8_t Weight;
    typedef Ints Sum;
    static inline Pairs weights(const int8_t* at) {
#if defined(WIDE)
        return (Pairs)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)at));
#elif defined(__AVX2__)
        return (Pairs)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at));
#else
        Pairs pairs;
        for (int i = 0; i < 2 * W; i++) pairs[i] = at[i];
        return pairs;
#endif
    }
    static inline Ints add(Ints sum, const int16_t* two, Pairs weights) {
        int32_t both;
        memcpy(&both, two, 4);
#if defined(WIDE) && defined(__AVX512VNNI__)
        return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(both));
#elif defined(WIDE)
        return sum + (Ints)_mm512_madd_epi16((__m512i)weights, _mm512_set1_epi32(both));
#elif defined(__AVX2__)
        return sum + (Ints)_mm256_madd_epi16((__m256i)weights, _mm256_set1_epi32(both));
#else
        for (int i = 0; i < W; i++) sum[i] += two[0] * weights[2 * i] + two[1] * weights[2 * i + 1];
        return sum;
#endif
    }
    static inline Vector total(Ints sum) { return __builtin_convertvector(sum, Vector); }
};

#ifdef BFLOAT16_PAIRS
struct HalfPairs {  // bfloat16 on both sides, summed in float32
    typedef bf16 Weight;
    typedef Vector Sum;
    static inline Pairs weights(const bf16* at) { return (Pairs)_mm512_loadu_si512(at); }
    static inline Vector add(Vector sum, const int16_t* two, Pairs weights) {
        int32_t both;
        memcpy(&both, two, 4);
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(both));
    }
    static inline Vector total(Vector sum) { return sum; }
};
#endif

static inline void narrow(float x, float* to) { *to = x; }
static inline void narrow(float x, bf16* to) {  // round to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *to = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Elementary functions, without branches so that loops over them become vectors (polynomials of Cephes) ---------------

static inline float bits_to_float(int32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline int32_t float_to_bits(float x) { int32_t bits; memcpy(&bits, &x, 4); return bits; }

static inline float fast_exp(float x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const float y = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = (y * 1.44269504f + magic) - magic;
    const float f = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    const float e = (p * f * f + f + 1.0f) * bits_to_float(((int32_t)n + 127) << 23);
    return x < -87.0f ? 0.0f : e;
}

static inline float fast_log(float x) {  // of normal positive numbers
    const int32_t bits = float_to_bits(x);
    const int32_t above = bits - 0x3f3504f3;  // mantissas from sqrt(1/2) on
    const float f = bits_to_float((above & 0x007fffff) + 0x3f3504f3) - 1.0f;
    const float n = (float)(above >> 23);
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const float z = f * f;
    return (p * f * z - 0.5f * z + f - n * 2.12194440e-4f) + n * 0.693359375f;
}

static inline float gelu(float x) {  // x Φ(x), the error function after Abramowitz & Stegun 7.1.26, off by 1.5e-7 at most
    const float z = std::fabs(x) * 0.70710678f;
    const float t = 1.0f / (1.0f + 0.3275911f * z);
    const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const float erf = 1.0f - p * fast_exp(-z * z);
    return 0.5f * x * (1.0f + (x < 0 ? -erf : erf));
}

static inline uint32_t hash(uint32_t x) {  // lowbias32
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

static void gelu_all(float* x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] = gelu(x[i]);
}

static void rms_norm(const float* x, const float* scale, int64_t n, float factor, float* out) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += x[i] * x[i];
    const float to = factor / std::sqrt(total / n + EPS);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * to * scale[i];
}

// Matrices -------------------------------------------------------------------------------------------------------------

enum After { PUT, ADD, GELU };  // what becomes of a product: stored, added to what is there, stored after GELU

static void finish(float* sums, int64_t rows, int64_t count, const Matrix& matrix, int64_t first, float* y,
                        After after) {
    // Sums (rows, count) of the outputs from `first` on -> y.
    const int64_t own = matrix.out - first < count ? matrix.out - first : count;
    for (int64_t r = 0; r < rows; r++) {
        float *some = sums + r * count, *to = y + r * matrix.out + first;
        if (matrix.scale)
            for (int64_t i = 0; i < own; i++) some[i] *= matrix.scale[first + i];
        if (after == GELU) gelu_all(some, count);
        if (after == ADD)
            for (int64_t i = 0; i < own; i++) to[i] += some[i];
        else
            memcpy(to, some, 4 * own);
    }
}

template <int R, int B, typename T>
__attribute__((noinline)) static void tile(const float* x, const T* panel, int64_t ahead, const Matrix& matrix, int64_t first, float* y,
                 After after) {
    // R rows times B panels of PANEL outputs: each sum goes over the inputs in their order. What stands `ahead` of the
    // weights being read is wanted next; past the end of the matrix asking for it does no harm.
    const int64_t in = matrix.in;
    Vector sum[R][B][2] = {};
    for (int64_t i = 0; i < in; i++)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            const T* at = panel + (b * in + i) * PANEL;
            __builtin_prefetch(at + ahead, 0, 2);
            const Vector one = load(at), other = load(at + W);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const float own = x[r * in + i];
                sum[r][b][0] = add_product(sum[r][b][0], own, one);
                sum[r][b][1] = add_product(sum[r][b][1], own, other);
            }
        }
    float done[R * B * PANEL];  // apart from the sums, which are to stay in registers
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            store(done + (r * B + b) * PANEL, sum[r][b][0]);
            store(done + (r * B + b) * PANEL + W, sum[r][b][1]);
        }
    finish(done, R, B * PANEL, matrix, first, y, after);
}

// Rows for weights in pairs. For 8-bit ones they are whole numbers, up to 4095 in size, which rounds off far less than
// the weights' 127 do, and no more than lets a sum fit 32 bits whatever the weights; for bfloat16 they are bfloat16.
struct Rounded {
    std::unique_ptr<int16_t[]> numbers;  // (M, in rounded up to even)
    std::unique_ptr<float[]> scale;      // (M)
    Rounded(int64_t M, int64_t in) : numbers(new int16_t[M * (in + 1)]), scale(new float[M]) {}
};

static void round_row(const float* x, int64_t in, int16_t* numbers, float* scale) {
    const int64_t fits = 2147483647 / (127 * in);
    const float limit = fits < 4095 ? fits : 4095, magic = 12582912.0f;
    float most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < in; i++) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
    const float to = most > 0 ? limit / most : 0;
#pragma omp simd
    for (int64_t i = 0; i < in; i++) numbers[i] = (int16_t)(int32_t)((x[i] * to + magic) - magic);
    if (in % 2) numbers[in] = 0;
    *scale = most / limit;
}

static void halve_row(const float* x, int64_t in, int16_t* numbers, float* scale) {
    for (int64_t i = 0; i < in; i++) narrow(x[i], (bf16*)numbers + i);
    if (in % 2) numbers[in] = 0;
    *scale = 1.0f;
}

template <typename Arithmetic, int R, int B>
__attribute__((noinline)) static void pair_tile(const int16_t* x, const float* scale,
                                                const typename Arithmetic::Weight* panel, const Matrix& matrix,
                                                int64_t first, float* y, After after) {
    const int64_t in = matrix.in + matrix.in % 2;
    typename Arithmetic::Sum sum[R][B][2] = {};
    for (int64_t i = 0; i < in; i += 2)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            const auto at = panel + (b * in + i) * PANEL;
            __builtin_prefetch(at + B * in * PANEL, 0, 2);
            const Pairs one = Arithmetic::weights(at), other = Arithmetic::weights(at + 2 * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                sum[r][b][0] = Arithmetic::add(sum[r][b][0], x + r * in + i, one);
                sum[r][b][1] = Arithmetic::add(sum[r][b][1], x + r * in + i, other);
            }
        }
    float done[R * B * PANEL];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            store(done + (r * B + b) * PANEL, Arithmetic::total(sum[r][b][0]) * scale[r]);
            store(done + (r * B + b) * PANEL + W, Arithmetic::total(sum[r][b][1]) * scale[r]);
        }
    finish(done, R, B * PANEL, matrix, first, y, after);
}

// The rows of one kind of matrix, some of them times some panels.
template <typename T>
struct Rows {
    const float* x;
    const Matrix& matrix;
    float* y;
    After after;
    template <int R, int B>
    void run(int64_t begin, int64_t from) const {
        const int64_t size = matrix.in * PANEL;
        tile<R, B>(x + begin * matrix.in, (const T*)matrix.data + from * size, B * size, matrix, from * PANEL,
                   y + begin * matrix.out, after);
    }
};

template <typename Arithmetic>
struct PairRows {
    const Rounded& x;
    const Matrix& matrix;
    float* y;
    After after;
    template <int R, int B>
    void run(int64_t begin, int64_t from) const {
        const int64_t in = matrix.in + matrix.in % 2;
        const auto weights = (const typename Arithmetic::Weight*)matrix.data + from * in * PANEL;
        pair_tile<Arithmetic, R, B>(&x.numbers[begin * in], &x.scale[begin], weights, matrix, from * PANEL,
                                    y + begin * matrix.out, after);
    }
};

template <typename Some>
static void panels(const Some& some, int64_t M, int64_t from, int64_t to) {
    const int64_t tiles = (M + ROWS - 1) / ROWS;
    if (M == 1)  // several panels at once, so that enough sums are under way
        for (; to - from >= 4; from += 4) some.template run<1, 4>(0, from);
    if (M == 2)
        for (; to - from >= 2; from += 2) some.template run<2, 2>(0, from);
    for (; from < to; from++)
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t begin = M * t / tiles, end = M * (t + 1) / tiles;  // as even as they get
            switch (end - begin) {
                case 1: some.template run<1, 1>(begin, from); break;
                case 2: some.template run<2, 1>(begin, from); break;
                case 3: some.template run<3, 1>(begin, from); break;
                case 4: some.template run<4, 1>(begin, from); break;
                case 5: some.template run<5, 1>(begin, from); break;
                default: some.template run<6, 1>(begin, from);
            }
        }
}

static void product(const float* x, int64_t M, const Matrix& matrix, float* y, After after, Rounded& rounded) {
    // y (M, out) from x (M, in), inside a parallel region.
    const int64_t count = (matrix.out + PANEL - 1) / PANEL, tasks = (count + PANELS_A_TASK - 1) / PANELS_A_TASK;
    auto round = matrix.kind == INT8 ? round_row : nullptr;
#ifdef BFLOAT16_PAIRS
    if (matrix.kind == BFLOAT16) round = halve_row;
#endif
    if (round) {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < M; m++)
            round(x + m * matrix.in, matrix.in, &rounded.numbers[m * (matrix.in + matrix.in % 2)], &rounded.scale[m]);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t from = task * PANELS_A_TASK, to = from + PANELS_A_TASK < count ? from + PANELS_A_TASK : count;
        if (matrix.kind == FLOAT32) panels(Rows<float>{x, matrix, y, after}, M, from, to);
#ifdef BFLOAT16_PAIRS
        else if (matrix.kind == BFLOAT16) panels(PairRows<HalfPairs>{rounded, matrix, y, after}, M, from, to);
#else
        else if (matrix.kind == BFLOAT16) panels(Rows<bf16>{x, matrix, y, after}, M, from, to);
#endif
        else panels(PairRows<WholePairs>{rounded, matrix, y, after}, M, from, to);
    }
}

// Attention ------------------------------------------------------------------------------------------------------------

template <int Q, int B, typename T>
static void key_blocks(const float* const* q, const T* keys, int64_t d, float* const* scores, int64_t at) {
    Vector sum[Q][B] = {};
    for (int64_t i = 0; i < d; i++)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            __builtin_prefetch(keys + ((B + b) * d + i) * W);
            const Vector key = load(keys + (b * d + i) * W);
#pragma GCC unroll 8
            for (int n = 0; n < Q; n++) sum[n][b] = add_product(sum[n][b], q[n][i], key);
        }
#pragma GCC unroll 8
    for (int n = 0; n < Q; n++)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) store(scores[n] + at + b * W, sum[n][b]);
}

template <int Q, typename T>
static void score(const float* const* q, const T* keys, int64_t d, int64_t blocks, float* const* scores) {
    constexpr int B = Q == 1 ? 4 : 2;
    int64_t block = 0;
    for (; block + B <= blocks; block += B) key_blocks<Q, B>(q, keys + block * d * W, d, scores, block * W);
    for (; block < blocks; block++) key_blocks<Q, 1>(q, keys + block * d * W, d, scores, block * W);
}

template <int Q, int C, typename T>
static void value_columns(const float* const* weights, const T* values, int64_t stride, int64_t count, float* const* out) {
    Vector sum[Q][C];
#pragma GCC unroll 8
    for (int n = 0; n < Q; n++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) sum[n][c] = load(out[n] + c * W);
    for (int64_t l = 0; l < count; l++) {
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            __builtin_prefetch(values + (l + 16) * stride + c * W);
            const Vector value = load(values + l * stride + c * W);
#pragma GCC unroll 8
            for (int n = 0; n < Q; n++) sum[n][c] = add_product(sum[n][c], weights[n][l], value);
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < Q; n++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) store(out[n] + c * W, sum[n][c]);
}

template <int Q, typename T>
static void mix(const float* const* weights, const T* values, int64_t stride, int64_t count, float* const* out) {
    constexpr int C = Q == 1 ? 8 : Q == 2 ? 4 : 2;
    for (int64_t c = 0; c < stride;) {
        float* there[Q];
#pragma GCC unroll 8
        for (int n = 0; n < Q; n++) there[n] = out[n] + c;
        if (c + C * W <= stride) value_columns<Q, C>(weights, values + c, stride, count, there), c += C * W;
        else value_columns<Q, 1>(weights, values + c, stride, count, there), c += W;
    }
}

struct Place { int64_t depth, heads, d, wide_d; };  // wide_d: d rounded up to whole vectors

template <typename T>
static void attend(int64_t first, int64_t count, int64_t S, int64_t layer, int64_t head, const Place& place,
                   const float* queries, const int32_t* start, const Segment& prefix, const int32_t* prefix_of,
                   int64_t P, const Segment& own, float* mixed, float* scratch) {
    // `count` rows from `first` on, which read the same prefix, at one head.
    const int64_t d = place.d, E = place.heads * d;
    const int64_t before = (P + W - 1) / W * W;  // scores of the prefix, in whole vectors, come first
    const int64_t room = before + own.capacity;
    float *scores[QUERIES], *after[QUERIES], *out[QUERIES];
    const float* q[QUERIES];
    for (int64_t n = 0; n < count; n++) {
        scores[n] = scratch + n * room;
        after[n] = scores[n] + before;
        out[n] = scratch + QUERIES * room + n * place.wide_d;
        q[n] = queries + (first + n) * 3 * E + head * d;
        for (int64_t i = 0; i < place.wide_d; i++) out[n][i] = 0;
    }
    const auto keys = [&](const Segment& s, int64_t row) {
        return (const T*)s.keys + ((layer * s.rows + row) * place.heads + head) * s.capacity * d;
    };
    const auto values = [&](const Segment& s, int64_t row) {
        return (const T*)s.values + ((layer * s.rows + row) * place.heads + head) * s.capacity * place.wide_d;
    };
    const int64_t shared = P ? prefix_of[first / S] : 0;

    if (P) {
        if (count == QUERIES) score<QUERIES>(q, keys(prefix, shared), d, before / W, scores);
        else for (int64_t n = 0; n < count; n++) score<1>(q + n, keys(prefix, shared), d, before / W, scores + n);
        for (int64_t n = 0; n < count; n++)
            for (int64_t l = P; l < before; l++) scores[n][l] = -INFINITY;
    }
    int64_t sees[QUERIES];  // own positions that a row may read
    for (int64_t n = 0; n < count; n++) sees[n] = start[(first + n) / S] + (first + n) % S + 1;
    for (int64_t n = 0; n < count;) {  // rows of one sequence together
        const int64_t row = (first + n) / S;
        if (n == 0 && count == QUERIES && (first + QUERIES - 1) / S == row) {
            score<QUERIES>(q, keys(own, row), d, (sees[QUERIES - 1] + W - 1) / W, after);
            n = QUERIES;
        } else {
            score<1>(q + n, keys(own, row), d, (sees[n] + W - 1) / W, after + n);
            n++;
        }
    }
    int64_t furthest = 0;
    for (int64_t n = 0; n < count; n++) furthest = sees[n] > furthest ? sees[n] : furthest;
    for (int64_t n = 0; n < count; n++) {
        const int64_t end = before + (furthest + W - 1) / W * W;
        for (int64_t l = before + sees[n]; l < end; l++) scores[n][l] = -INFINITY;
        const int64_t own_end = before + (sees[n] + W - 1) / W * W;
        float most = -INFINITY, total = 0;
#pragma omp simd reduction(max : most)
        for (int64_t l = 0; l < own_end; l++) most = scores[n][l] > most ? scores[n][l] : most;
        Vector sums = {};
        for (int64_t l = 0; l < own_end; l += W) {
            for (int i = 0; i < W; i++) scores[n][l + i] = fast_exp(scores[n][l + i] - most);
            sums += load(scores[n] + l);
        }
        for (int i = 0; i < W; i++) total += sums[i];
        for (int64_t l = 0; l < own_end; l++) scores[n][l] /= total;
        for (int64_t l = own_end; l < end; l++) scores[n][l] = 0;
    }

    if (P) {
        if (count == QUERIES) mix<QUERIES>(scores, values(prefix, shared), place.wide_d, P, out);
        else for (int64_t n = 0; n < count; n++) mix<1>(scores + n, values(prefix, shared), place.wide_d, P, out + n);
    }
    for (int64_t n = 0; n < count;) {
        const int64_t row = (first + n) / S;
        if (n == 0 && count == QUERIES && (first + QUERIES - 1) / S == row) {
            mix<QUERIES>(after, values(own, row), place.wide_d, sees[QUERIES - 1], out);
            n = QUERIES;
        } else {
            mix<1>(after + n, values(own, row), place.wide_d, sees[n], out + n);
            n++;
        }
    }
    for (int64_t n = 0; n < count; n++) memcpy(mixed + (first + n) * E + head * d, out[n], 4 * d);
}

template <typename T>
static void remember(float* qkv, int64_t row, int64_t position, int64_t layer, const Place& place, const Block& block,
                     const Segment& own) {
    // Normalises the queries and keys of one new position and writes its keys and values into the cache.
    const int64_t d = place.d, E = place.heads * d;
    for (int64_t head = 0; head < place.heads; head++) {
        float *q = qkv + head * d, *k = q + E, *v = k + E;
        rms_norm(q, block.query_scale, d, 1.0f / std::sqrt((float)d), q);
        rms_norm(k, block.key_scale, d, 1.0f, k);
        const int64_t at = (layer * own.rows + row) * place.heads + head;
        T* keys = (T*)own.keys + at * own.capacity * d + position / W * d * W + position % W;
        T* values = (T*)own.values + (at * own.capacity + position) * place.wide_d;
        for (int64_t i = 0; i < d; i++) narrow(k[i], keys + i * W), narrow(v[i], values + i);
        for (int64_t i = d; i < place.wide_d; i++) narrow(0, values + i);
    }
}

// What Python calls ----------------------------------------------------------------------------------------------------

extern "C" {

int64_t lanes() { return W; }
int64_t panel_width() { return PANEL; }

// (out, in) floats -> panels, filled up with zeros. For int8, whole numbers -> panels of [in / 2][PANEL][2], zero before.
void pack(const float* from, int64_t out, int64_t in, int64_t kind, void* to) {
    const int64_t count = (out + PANEL - 1) / PANEL;
    for (int64_t p = 0; p < count; p++)
        for (int64_t i = 0; i < in; i++)
            for (int64_t j = 0; j < PANEL; j++) {
                const float x = p * PANEL + j < out ? from[(p * PANEL + j) * in + i] : 0.0f;
                const int64_t at = (p * in + i) * PANEL + j;
                const int64_t in_pairs = ((p * ((in + 1) / 2) + i / 2) * PANEL + j) * 2 + i % 2;
                if (kind == FLOAT32) ((float*)to)[at] = x;
                else if (kind == INT8) ((int8_t*)to)[in_pairs] = (int8_t)x;
#ifdef BFLOAT16_PAIRS
                else narrow(x, (bf16*)to + in_pairs);
#else
                else narrow(x, (bf16*)to + at);
#endif
            }
}

// x (M, E) of the new positions -> what comes out of the last block, in place; their keys and values go into `own`.
void trunk(const Block* blocks, int64_t depth, int64_t heads, int64_t E, float* x, int64_t N, int64_t S,
           const int32_t* start, const Segment* prefix, const int32_t* prefix_of, int64_t P, const Segment* own,
           int64_t threads) {
    const int64_t M = N * S, d = E / heads, hidden = blocks[0].mlp_in.out;
    const Place place{depth, heads, d, (d + W - 1) / W * W};
    const int64_t broad = hidden > 3 * E ? hidden : 3 * E;
    std::unique_ptr<float[]> normed(new float[M * E]), wide(new float[M * broad]);
    Rounded rounded(M, hidden > E ? hidden : E);
    std::vector<std::pair<int64_t, int64_t>> groups;  // rows that read the same prefix
    for (int64_t m = 0; m < M;) {
        int64_t end = m + 1;
        while (end < M && end - m < QUERIES && (!P || prefix_of[end / S] == prefix_of[m / S])) end++;
        groups.push_back({m, end - m});
        m = end;
    }
    const int64_t tasks = groups.size() * heads, longest = (P + W - 1) / W * W + own->capacity;

#pragma omp parallel num_threads(threads)
    {
        std::unique_ptr<float[]> scratch(new float[QUERIES * (longest + place.wide_d)]);
        for (int64_t layer = 0; layer < depth; layer++) {
            const Block& block = blocks[layer];
#pragma omp for schedule(static)
            for (int64_t m = 0; m < M; m++) rms_norm(x + m * E, block.attention_norm, E, 1.0f, &normed[m * E]);
            product(normed.get(), M, block.qkv, wide.get(), PUT, rounded);
#pragma omp for schedule(static)
            for (int64_t m = 0; m < M; m++) {
                float* qkv = &wide[m * 3 * E];
                const int64_t row = m / S, position = start[row] + m % S;
                if (own->kind == FLOAT32) remember<float>(qkv, row, position, layer, place, block, *own);
                else remember<bf16>(qkv, row, position, layer, place, block, *own);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < tasks; task++) {
                const auto [first, count] = groups[task / heads];
                auto run = own->kind == FLOAT32 ? attend<float> : attend<bf16>;
                run(first, count, S, layer, task % heads, place, wide.get(), start, *prefix, prefix_of, P, *own,
                    normed.get(), scratch.get());
            }
            product(normed.get(), M, block.out, x, ADD, rounded);
#pragma omp for schedule(static)
            for (int64_t m = 0; m < M; m++) rms_norm(x + m * E, block.mlp_norm, E, 1.0f, &normed[m * E]);
            product(normed.get(), M, block.mlp_in, wide.get(), GELU, rounded);
            product(wide.get(), M, block.mlp_out, x, ADD, rounded);
        }
    }
}

// x (M, E) -> normed (M, E), and their product with `matrix` (M, out).
void norm_and_product(const float* x, int64_t M, const float* norm, const Matrix* matrix, float* normed, float* y,
                      int64_t threads) {
    Rounded rounded(M, matrix->in);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < M; m++) rms_norm(x + m * matrix->in, norm, matrix->in, 1.0f, normed + m * matrix->in);
        product(normed, M, *matrix, y, PUT, rounded);
    }
}

// The MLP of a depth beside the identity, x (M, E) in place, then norm and head as above: logits (M, K).
void depth_head(float* x, int64_t M, const float* norm, const Matrix* mlp_in, const Matrix* mlp_out, const float* norm_out,
                const Matrix* head, float* logits, int64_t threads) {
    const int64_t E = mlp_in->in, hidden = mlp_in->out;
    std::unique_ptr<float[]> normed(new float[M * E]), wide(new float[M * hidden]);
    Rounded rounded(M, hidden > E ? hidden : E);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < M; m++) rms_norm(x + m * E, norm, E, 1.0f, &normed[m * E]);
        product(normed.get(), M, *mlp_in, wide.get(), GELU, rounded);
        product(wide.get(), M, *mlp_out, x, ADD, rounded);
#pragma omp for schedule(static)
        for (int64_t m = 0; m < M; m++) rms_norm(x + m * E, norm_out, E, 1.0f, &normed[m * E]);
        product(normed.get(), M, *head, logits, PUT, rounded);
    }
}

// The likeliest code of each row after noise: logits (N, K), words (N, 2) -> codes (N). See noise.py.
void draw(const float* logits, int64_t N, int64_t K, const uint32_t* words, int64_t* codes, int64_t threads) {
#pragma omp parallel num_threads(threads < N ? threads : N)
    {
        std::unique_ptr<float[]> noisy(new float[K]);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            const float* own = logits + n * K;
            const uint32_t first = words[2 * n], second = words[2 * n + 1];
            float most = -INFINITY;
#pragma omp simd reduction(max : most)
            for (int64_t k = 0; k < K; k++) {
                const uint32_t bits = hash(hash(first + (uint32_t)k) ^ second);
                const float uniform = ((float)(int32_t)(bits >> 9) + 0.5f) * (1.0f / 8388608.0f);
                noisy[k] = own[k] - fast_log(-fast_log(uniform));
                most = noisy[k] > most ? noisy[k] : most;
            }
            codes[n] = 0;
            for (int64_t k = K - 1; k >= 0; k--)
                if (noisy[k] == most) codes[n] = k;
        }
    }
}
}
