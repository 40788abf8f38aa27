// The sums of Winograd's F(4x4, 3x3) and F(2x2, 3x3) on a CPU, before and after the matrix products. See winograd.py.
//
// Letters: H W sides of the picture, C channels, n m blocks of outputs a column and a row. Channels come last and are
// worked on side by side, a vector at a time, in float32; in memory numbers are float32 for F(4x4, 3x3) and bfloat16
// for F(2x2, 3x3). The numbers of a block lie `pitch` of them apart.
#include "vectors.h"

// The paper's B' and A' along one side: inputs -> numbers, numbers -> outputs.
struct Four {
    static constexpr int out = 4, in = 6;
    typedef float Number;

    template <class V>
    static inline void forth(const V* d, int step, V* to, int to_step) {
        const V even = d[4 * step] - d[2 * step], odd = d[3 * step] - d[step];
        const V wide_even = d[4 * step] - 4 * d[2 * step], wide_odd = d[3 * step] - 4 * d[step];
        to[0] = 4 * (d[0] - d[2 * step]) + even;
        to[to_step] = wide_even + wide_odd;
        to[2 * to_step] = wide_even - wide_odd;
        to[3 * to_step] = even + 2 * odd;
        to[4 * to_step] = even - 2 * odd;
        to[5 * to_step] = d[5 * step] - d[3 * step] - 4 * odd;
    }

    template <class V>
    static inline void back(const V* m, int step, V* to, int to_step) {
        const V near = m[step] + m[2 * step], far = m[3 * step] + m[4 * step];
        const V near_less = m[step] - m[2 * step], far_less = m[3 * step] - m[4 * step];
        to[0] = near + far + m[0];
        to[to_step] = near_less + 2 * far_less;
        to[2 * to_step] = near + 4 * far;
        to[3 * to_step] = near_less + 8 * far_less + m[5 * step];
    }
};

struct Two {
    static constexpr int out = 2, in = 4;
    typedef bfloat16 Number;

    template <class V>
    static inline void forth(const V* d, int step, V* to, int to_step) {
        to[0] = d[0] - d[2 * step];
        to[to_step] = d[step] + d[2 * step];
        to[2 * to_step] = d[2 * step] - d[step];
        to[3 * to_step] = d[step] - d[3 * step];
    }

    template <class V>
    static inline void back(const V* m, int step, V* to, int to_step) {
        to[0] = m[0] + m[step] + m[2 * step];
        to[to_step] = m[step] - m[2 * step] - m[3 * step];
    }
};

template <class Rule, class V, class Number>
static inline void forth_block(const Number* const* at, int64_t c, Number* out, int64_t pitch) {
    constexpr int n = Rule::in;
    V d[n * n], t[n * n];
    for (int i = 0; i < n * n; i++) load(at[i] + c, d[i]);
    for (int x = 0; x < n; x++) Rule::forth(d + x, n, t + x, n);
    for (int y = 0; y < n; y++) Rule::forth(t + n * y, 1, d + n * y, 1);
    for (int i = 0; i < n * n; i++) store(d[i], out + i * pitch + c);
}

template <class Rule, class V, class Number>
static inline void back_block(const Number* m, int64_t pitch, const float* bias, int64_t c, Number* out, int64_t row,
                              int64_t column) {
    constexpr int n = Rule::in, k = Rule::out;
    V d[n * n], t[k * n], o[k * k], b;
    for (int i = 0; i < n * n; i++) load(m + i * pitch + c, d[i]);
    for (int x = 0; x < n; x++) Rule::back(d + x, n, t + x, n);
    for (int y = 0; y < k; y++) Rule::back(t + n * y, 1, o + k * y, 1);
    load(bias + c, b);
    for (int y = 0; y < k; y++)
        for (int x = 0; x < k; x++) store(o[k * y + x] + b, out + y * row + x * column + c);
}

template <class Rule, class Number = typename Rule::Number>
static void forth(const Number* picture, int64_t height, int64_t width, int64_t channels, int64_t first, int64_t rows,
                  const Number* border, Number* numbers, int64_t pitch, int64_t threads) {
    constexpr int n = Rule::in, k = Rule::out;
    const int64_t across = width / k;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < rows * across; block++) {
        const int64_t top = k * (first + block / across) - 1, left = k * (block % across) - 1;
        const Number* at[n * n];
        for (int y = 0; y < n; y++)
            for (int x = 0; x < n; x++) {
                const bool inside = top + y >= 0 && top + y < height && left + x >= 0 && left + x < width;
                at[n * y + x] = inside ? picture + ((top + y) * width + left + x) * channels : border;
            }
        Number* out = numbers + block * channels;
        int64_t c = 0;
        for (; c + W <= channels; c += W) forth_block<Rule, Vector>(at, c, out, pitch);
        for (; c < channels; c++) forth_block<Rule, float>(at, c, out, pitch);
    }
}

template <class Rule, class Number = typename Rule::Number>
static void back(const Number* numbers, int64_t pitch, const float* bias, int64_t width, int64_t channels,
                 int64_t first, int64_t rows, Number* picture, int64_t threads) {
    constexpr int k = Rule::out;
    const int64_t across = width / k;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < rows * across; block++) {
        const Number* m = numbers + block * channels;
        Number* out = picture + (k * (first + block / across) * width + k * (block % across)) * channels;
        int64_t c = 0;
        for (; c + W <= channels; c += W)
            back_block<Rule, Vector>(m, pitch, bias, c, out, width * channels, channels);
        for (; c < channels; c++) back_block<Rule, float>(m, pitch, bias, c, out, width * channels, channels);
    }
}

extern "C" {

// `rows` rows of blocks from the row `first` on: picture (H, W, C) -> numbers (36 or 16, rows * m, C). Beyond the
// picture there is the `border`, C zeros.
void picture_to_numbers_4(const float* picture, int64_t height, int64_t width, int64_t channels, int64_t first,
                          int64_t rows, const float* border, float* numbers, int64_t pitch,
                          int64_t threads) {
    forth<Four>(picture, height, width, channels, first, rows, border, numbers, pitch, threads);
}
void picture_to_numbers_2(const bfloat16* picture, int64_t height, int64_t width, int64_t channels, int64_t first,
                          int64_t rows, const bfloat16* border, bfloat16* numbers, int64_t pitch,
                          int64_t threads) {
    forth<Two>(picture, height, width, channels, first, rows, border, numbers, pitch, threads);
}

// numbers (36 or 16, rows * m, C) -> the same rows of blocks in the picture (H, W, C).
void numbers_to_picture_4(const float* numbers, int64_t pitch, const float* bias, int64_t width, int64_t channels,
                          int64_t first, int64_t rows, float* picture, int64_t threads) {
    back<Four>(numbers, pitch, bias, width, channels, first, rows, picture, threads);
}
void numbers_to_picture_2(const bfloat16* numbers, int64_t pitch, const float* bias, int64_t width, int64_t channels,
                          int64_t first, int64_t rows, bfloat16* picture, int64_t threads) {
    back<Two>(numbers, pitch, bias, width, channels, first, rows, picture, threads);
}
}
