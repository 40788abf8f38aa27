// The sums of Winograd's F(4x4, 3x3) on a CPU, before and after the matrix products. See winograd.py.
//
// Letters: H W sides of the image, C channels, n m blocks of 4 x 4 outputs a column and a row. Channels come last and
// are worked on side by side, a vector at a time. The 36 numbers of a block read from the image lie `pitch` floats apart.
#include "vectors.h"

// The paper's B' along one side: six neighbours -> six numbers.
template <class V>
static inline void forth(const V* d, int step, V* out, int out_step) {
    const V even = d[4 * step] - d[2 * step], odd = d[3 * step] - d[step];
    const V wide_even = d[4 * step] - 4 * d[2 * step], wide_odd = d[3 * step] - 4 * d[step];
    out[0] = 4 * (d[0] - d[2 * step]) + even;
    out[out_step] = wide_even + wide_odd;
    out[2 * out_step] = wide_even - wide_odd;
    out[3 * out_step] = even + 2 * odd;
    out[4 * out_step] = even - 2 * odd;
    out[5 * out_step] = d[5 * step] - d[3 * step] - 4 * odd;
}

// The paper's A' along one side: six numbers -> four outputs.
template <class V>
static inline void back(const V* m, int step, V* out, int out_step) {
    const V near = m[step] + m[2 * step], far = m[3 * step] + m[4 * step];
    const V near_less = m[step] - m[2 * step], far_less = m[3 * step] - m[4 * step];
    out[0] = near + far + m[0];
    out[out_step] = near_less + 2 * far_less;
    out[2 * out_step] = near + 4 * far;
    out[3 * out_step] = near_less + 8 * far_less + m[5 * step];
}

template <class V>
static inline void forth_block(const float* const at[36], int64_t c, float* out, int64_t pitch) {
    V d[36], t[36];
    for (int i = 0; i < 36; i++) load(at[i] + c, d[i]);
    for (int x = 0; x < 6; x++) forth(d + x, 6, t + x, 6);
    for (int y = 0; y < 6; y++) forth(t + 6 * y, 1, d + 6 * y, 1);
    for (int i = 0; i < 36; i++) store(d[i], out + i * pitch + c);
}

template <class V>
static inline void back_block(const float* const m[36], int64_t at, const float* bias, int64_t c, float* out,
                              int64_t row, int64_t column) {
    V d[36], t[24], o[16], b;
    for (int i = 0; i < 36; i++) load(m[i] + at + c, d[i]);
    for (int x = 0; x < 6; x++) back(d + x, 6, t + x, 6);
    for (int y = 0; y < 4; y++) back(t + 6 * y, 1, o + 4 * y, 1);
    load(bias + c, b);
    for (int y = 0; y < 4; y++)
        for (int x = 0; x < 4; x++) store(o[4 * y + x] + b, out + y * row + x * column + c);
}

extern "C" {

// `rows` rows of blocks from the row `first` on: image (H, W, C) -> numbers (36, rows * m, C). Beyond the image
// there is the `border`, C zeros.
void to_numbers(const float* image, int64_t height, int64_t width, int64_t channels, int64_t first, int64_t rows,
                const float* border, float* numbers, int64_t pitch, int64_t threads) {
    const int64_t across = width / 4;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < rows * across; block++) {
        const int64_t top = 4 * (first + block / across) - 1, left = 4 * (block % across) - 1;
        const float* at[36];
        for (int y = 0; y < 6; y++)
            for (int x = 0; x < 6; x++) {
                const bool inside = top + y >= 0 && top + y < height && left + x >= 0 && left + x < width;
                at[6 * y + x] = inside ? image + ((top + y) * width + left + x) * channels : border;
            }
        float* out = numbers + block * channels;
        int64_t c = 0;
        for (; c + W <= channels; c += W) forth_block<Vector>(at, c, out, pitch);
        for (; c < channels; c++) forth_block<float>(at, c, out, pitch);
    }
}

// 36 products (rows * m, C) -> the same rows of blocks in the image (H, W, C).
void from_products(const float* const products[36], const float* bias, int64_t width, int64_t channels, int64_t first,
                   int64_t rows, float* image, int64_t threads) {
    const int64_t across = width / 4;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < rows * across; block++) {
        const int64_t at = block * channels, row = width * channels;
        float* out = image + (4 * (first + block / across) * width + 4 * (block % across)) * channels;
        int64_t c = 0;
        for (; c + W <= channels; c += W) back_block<Vector>(products, at, bias, c, out, row, channels);
        for (; c < channels; c++) back_block<float>(products, at, bias, c, out, row, channels);
    }
}
}
