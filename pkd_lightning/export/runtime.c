/* ---------------------------------------------------------------------------------------------------- arithmetic

   Matrices are stored row by row. A row of channels is filled up with zeros to 4, or to a multiple of 8, so that
   compilers turn loops over channels into vector instructions without a remainder. Sizes are written as numbers where
   these functions are called: each is inlined there, and its loops are compiled for them.

   A weight of a matrix takes PKD_WEIGHTS bits. 32 are a float, 16 its upper half (bfloat16). 8 are a whole number, and
   the float is that times the scale of its output. */

#ifdef __FAST_MATH__
#error "compile without -ffast-math: pkd_exp rounds by adding and subtracting a large number"
#endif
#ifdef __GNUC__
#define PKD_INLINE static inline __attribute__((always_inline, unused))
#else
#define PKD_INLINE static inline
#endif
#define PKD_NO_NORM 0
#define PKD_RMS_NORM 1
#define PKD_LAYER_NORM 2
#if PKD_WEIGHTS == 8
typedef int8_t pkd_weight;
#elif PKD_WEIGHTS == 16
typedef uint16_t pkd_weight;
#else
typedef float pkd_weight;
#endif

/* A weight as a float, whose scale is NULL where PKD_WEIGHTS is not 8. */
PKD_INLINE float pkd_float(pkd_weight weight, const float *scale, int output)
{
#if PKD_WEIGHTS == 16
    union { uint32_t bits; float number; } wide;
    wide.bits = (uint32_t)weight << 16;
    (void)scale, (void)output;
    return wide.number;
#elif PKD_WEIGHTS == 8
    return (float)weight * scale[output];
#else
    (void)scale, (void)output;
    return weight;
#endif
}

/* A matrix (inputs, outputs) as floats: itself, or in memory that the next one takes. */
PKD_INLINE const float *pkd_floats(const pkd_weight *restrict weight, const float *restrict scale, int inputs,
                                   int outputs)
{
#if PKD_WEIGHTS == 32
    (void)scale, (void)inputs, (void)outputs;
    return weight;
#else
    float *restrict to = pkd_matrix;
    int i, o;
    for (i = 0; i < inputs; i++)
        for (o = 0; o < outputs; o++)
            to[i * outputs + o] = pkd_float(weight[i * outputs + o], scale, o);
    return to;
#endif
}

/* e^x = 2^n * e^r with n = x / ln(2) rounded, to a relative error of 1e-7; x is limited to [-87, 87]. Without a branch,
   which would keep compilers from making vectors of the loops that call it: so the limit is one of the number's bits. */
PKD_INLINE float pkd_exp(float x)
{
    const float round = 12582912.0f; /* 1.5 * 2^23: after adding it, the low bits hold the rounded number */
    union { float number; int32_t bits; } limited;
    union { float number; uint32_t bits; } n, result;
    int32_t sign, size;
    float r, power;
    limited.number = x;
    sign = limited.bits & INT32_MIN;
    size = limited.bits & INT32_MAX;
    limited.bits = sign | (size < 0x42ae0000 ? size : 0x42ae0000); /* the bits of 87 */
    n.number = limited.number * 1.44269504f + round;
    r = n.number - round;
    x = limited.number - r * 0.693359375f; /* ln(2) in two parts, the first of few bits */
    r = x + r * 2.12194440e-4f;
    power = 1.9875691500e-4f * r + 1.3981999507e-3f;
    power = power * r + 8.3334519073e-3f;
    power = power * r + 4.1665795894e-2f;
    power = power * r + 1.6666665459e-1f;
    power = power * r + 5.0000001201e-1f;
    result.number = power * r * r + r + 1.0f;
    result.bits += n.bits << 23;
    return result.number;
}

PKD_INLINE float pkd_silu(float x)
{
    return x / (1.0f + pkd_exp(-x));
}

/* log(1 + e^x); of the logarithm the series of 2 artanh(u / (2 + u)) with u = e^-|x|. */
PKD_INLINE float pkd_softplus(float x)
{
    float u = pkd_exp(-fabsf(x)), s = u / (2.0f + u), q = s * s, sum;
    sum = q * (1.0f / 13.0f) + 1.0f / 11.0f;
    sum = q * sum + 1.0f / 9.0f;
    sum = q * sum + 1.0f / 7.0f;
    sum = q * sum + 1.0f / 5.0f;
    sum = q * sum + 1.0f / 3.0f;
    sum = q * sum + 1.0f;
    return 0.5f * (x + fabsf(x)) + 2.0f * s * sum;
}

#ifdef __GNUC__
typedef float pkd_4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float pkd_8 __attribute__((vector_size(32), aligned(4), may_alias));
#else /* one by one, where the compiler has no vectors: the same loops */
typedef float pkd_4, pkd_8;
#endif

/* `rows` rows of pkd_project, at most 4, as many outputs at a time as `vector` has: their sums stay in registers. */
#define PKD_PROJECT_ROWS(vector)                                                                                       \
    for (o = 0; o < outputs; o += (int)(sizeof(vector) / sizeof(float))) {                                             \
        vector sum[4];                                                                                                 \
        memset(sum, 0, sizeof sum);                                                                                    \
        for (r = 0; r < rows && bias; r++)                                                                             \
            sum[r] = *(const vector *)(bias + o);                                                                      \
        for (i = 0; i < inputs; i++)                                                                                   \
            for (r = 0; r < rows; r++)                                                                                 \
                sum[r] += from[r * from_row + i] * *(const vector *)(weight + i * outputs + o);                        \
        for (r = 0; r < rows; r++)                                                                                     \
            *(vector *)(to + r * to_row + o) = sum[r];                                                                 \
    }

PKD_INLINE void pkd_project_rows(const float *restrict from, int from_row, const float *restrict weight,
                                 const float *restrict bias, float *restrict to, int to_row, int rows, int inputs,
                                 int outputs)
{
    int o, i, r;
    if (outputs % 8)
        PKD_PROJECT_ROWS(pkd_4)
    else
        PKD_PROJECT_ROWS(pkd_8)
}

/* to[t][o] = bias[o] + the sum over i of from[t][i] * weight[i][o]; rows are from_row and to_row apart. */
PKD_INLINE void pkd_project(const float *restrict from, int from_row, const float *restrict weight,
                            const float *restrict bias, float *restrict to, int to_row, int rows, int inputs,
                            int outputs)
{
    const int fours = rows - rows % 4;
    int t;
    for (t = 0; t < fours; t += 4)
        pkd_project_rows(from + t * from_row, from_row, weight, bias, to + t * to_row, to_row, 4, inputs, outputs);
    for (t = fours; t < rows; t++)
        pkd_project_rows(from + t * from_row, from_row, weight, bias, to + t * to_row, to_row, 1, inputs, outputs);
}

/* A row of pkd_project, of a matrix that may be large and is read once. */
PKD_INLINE void pkd_project_once(const float *restrict from, const pkd_weight *restrict weight,
                                 const float *restrict scale, const float *restrict bias, float *restrict to,
                                 int inputs, int outputs)
{
#if PKD_WEIGHTS == 32
    (void)scale;
    pkd_project(from, inputs, weight, bias, to, outputs, 1, inputs, outputs);
#else
    int i, o;
    for (o = 0; o < outputs; o++)
        to[o] = bias ? bias[o] : 0.0f;
    for (i = 0; i < inputs; i++)
        for (o = 0; o < outputs; o++)
            to[o] += from[i] * pkd_float(weight[i * outputs + o], scale, o);
#endif
}

/* The norm of one token of d_model channels, in rows of `row`. */
PKD_INLINE void pkd_norm(const float *restrict token, float *restrict to, int kind, int d_model, int row,
                         const float *restrict weight, const float *restrict bias, float eps)
{
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f}, mean = 0.0f, scale;
    int i, l;
    if (kind == PKD_NO_NORM) {
        for (i = 0; i < row; i++)
            to[i] = token[i];
        return;
    }
    if (kind == PKD_LAYER_NORM) {
        for (i = 0; i < d_model; i++)
            mean += token[i];
        mean /= (float)d_model;
    }
    for (i = 0; i < row; i++)
        to[i] = i < d_model ? token[i] - mean : 0.0f;
    for (i = 0; i < row; i += 4)
        for (l = 0; l < 4; l++)
            part[l] += to[i + l] * to[i + l];
    scale = 1.0f / sqrtf((part[0] + part[1] + part[2] + part[3]) / (float)d_model + eps);
    for (i = 0; i < row; i++)
        to[i] = to[i] * scale * weight[i] + (bias ? bias[i] : 0.0f);
}

/* ------------------------------------------------------------------------------------------------- image to tokens

   Images are stored pixel by pixel, (height, width, channels). */

/* Copies an image into the middle of a larger one, whose border of `padding` pixels is zero. */
PKD_INLINE void pkd_pad(const float *restrict image, float *restrict to, int height, int width, int channels,
                        int padding)
{
    const int row = (width + 2 * padding) * channels;
    int y;
    memset(to, 0, sizeof(float) * (size_t)(row * (height + 2 * padding)));
    for (y = 0; y < height; y++)
        memcpy(to + (y + padding) * row + padding * channels, image + y * width * channels,
               sizeof(float) * (size_t)(width * channels));
}

/* A convolution of a padded image of `width` pixels a row; outputs are rows * columns pixels. */
PKD_INLINE void pkd_convolve(const float *restrict image, int width, int channels, int kernel, int stride,
                             const pkd_weight *restrict weight, const float *restrict scale,
                             const float *restrict bias, float *restrict to, int rows, int columns, int outputs)
{
    const int run = kernel * channels, window = kernel * run;
    const float *matrix = pkd_floats(weight, scale, window, outputs);
    int y, x, k;
    for (y = 0; y < rows; y++) {
        for (x = 0; x < columns; x++)
            for (k = 0; k < kernel; k++)
                memcpy(pkd_windows + x * window + k * run, image + ((y * stride + k) * width + x * stride) * channels,
                       sizeof(float) * (size_t)run);
        pkd_project(pkd_windows, window, matrix, bias, to + y * columns * outputs, outputs, columns, window, outputs);
    }
}

/* Averages of blocks of height * width pixels, one token each: of all channels, or plane after plane. The token is the
   average times `weight` plus `bias`, or the average itself. */
PKD_INLINE void pkd_pool(const float *restrict image, int channels, int planes, int rows, int columns, int height,
                         int width, const float *restrict weight, const float *restrict bias, float *restrict tokens,
                         int row)
{
    const int each = channels / planes; /* channels of an average */
    int p, r, c, y, x, k;
    for (p = 0; p < planes; p++)
        for (r = 0; r < rows; r++)
            for (c = 0; c < columns; c++) {
                float sum = 0.0f, *token = tokens + ((p * rows + r) * columns + c) * row;
                for (y = 0; y < height; y++)
                    for (x = 0; x < width; x++)
                        for (k = 0; k < each; k++)
                            sum += image[((r * height + y) * columns * width + c * width + x) * channels + p * each + k];
                sum /= (float)(height * width * each);
                for (k = 0; k < row; k++)
                    token[k] = weight ? sum * weight[k] + bias[k] : k ? 0.0f : sum;
            }
}

PKD_INLINE void pkd_silu_all(float *values, int count)
{
    int i;
    for (i = 0; i < count; i++)
        values[i] = pkd_silu(values[i]);
}

/* ------------------------------------------------------------------------------------------------------ Mamba block

   Gu & Dao, arXiv 2312.00752: h_t = exp(delta_t * A) * h_{t-1} + delta_t * B_t * x_t,
   y_t = (C_t . h_t + D * x_t) * silu(z_t). */

typedef struct {
    const float *norm_weight, *norm_bias; /* (d_model) */
    const pkd_weight *in_proj;            /* (d_model, 2 * inner): x, then z */
    const float *in_scale;                /* of each output, here and below; NULL where weights are not scaled */
    const pkd_weight *conv_weight;        /* (d_conv, inner) */
    const float *conv_scale, *conv_bias;  /* (inner) */
    const pkd_weight *x_proj;             /* (inner, projected): dt_rank steps, then B, then C */
    const float *x_scale;
    const pkd_weight *dt_weight;          /* (dt_rank, inner) */
    const float *dt_scale, *dt_bias;      /* (inner) */
    const float *A, *D;                   /* (d_state, inner), (inner) */
    const pkd_weight *out_proj;           /* (inner, row) */
    const float *out_scale;
} pkd_block;

/* Where in a raster of rows * columns tokens the one is that is read as number t. */
PKD_INLINE int pkd_place(int t, int rows, int columns, int by_columns, int backwards)
{
    if (backwards)
        t = rows * columns - 1 - t;
    return by_columns ? t % rows * columns + t / rows : t;
}

/* Adds a convolution of each channel by itself, of side * side tokens, to the tokens of a raster. Beyond it are
   zeros. */
PKD_INLINE void pkd_local(float *restrict tokens, int rows, int columns, int row, int side,
                          const pkd_weight *restrict weight, const float *restrict scale, const float *restrict bias)
{
    const float *matrix = pkd_floats(weight, scale, side * side, row);
    const int half = side / 2;
    int r, c, y, x, i;
    memcpy(pkd_normed, tokens, sizeof(float) * (size_t)(rows * columns * row));
    for (r = 0; r < rows; r++)
        for (c = 0; c < columns; c++) {
            float *restrict token = tokens + (r * columns + c) * row;
            for (i = 0; i < row && bias; i++)
                token[i] += bias[i];
            for (y = r < half ? half - r : 0; y < side && r + y - half < rows; y++)
                for (x = c < half ? half - c : 0; x < side && c + x - half < columns; x++) {
                    const float *restrict other = pkd_normed + ((r + y - half) * columns + c + x - half) * row;
                    const float *restrict tap = matrix + (y * side + x) * row;
                    for (i = 0; i < row; i++)
                        token[i] += tap[i] * other[i];
                }
        }
}

/* A block with its norm and residual sum, in place. The tokens, rows * columns of d_model channels in rows of `row`,
   are read by columns or by rows, from the end if `backwards`. */
PKD_INLINE void pkd_mamba(const pkd_block *w, float *restrict tokens, int rows, int columns, int by_columns,
                          int backwards, int d_model, int row, int inner, int d_state, int dt_rank, int projected,
                          int d_conv, int norm, float eps, int residual)
{
    const int length = rows * columns, pair = 2 * inner, before = d_conv - 1;
    float *restrict xz = pkd_xz + before * pair; /* after rows of zeros, which the convolution reads first */
    const float *restrict A = w->A, *restrict D = w->D;
    const float *restrict conv_weight, *restrict conv_bias = w->conv_bias;
    int t, i, k, n;

    for (t = 0; t < length; t++)
        pkd_norm(tokens + pkd_place(t, rows, columns, by_columns, backwards) * row, pkd_normed + t * row, norm, d_model,
                 row, w->norm_weight, w->norm_bias, eps);
    memset(pkd_xz, 0, sizeof(float) * (size_t)(before * pair));
    pkd_project(pkd_normed, row, pkd_floats(w->in_proj, w->in_scale, d_model, pair), NULL, xz, pair, length, d_model,
                pair);

    conv_weight = pkd_floats(w->conv_weight, w->conv_scale, d_conv, inner);
    for (t = 0; t < length; t++)
        for (i = 0; i < inner; i++) {
            float sum = conv_bias[i];
            for (k = 0; k < d_conv; k++)
                sum += conv_weight[k * inner + i] * pkd_xz[(t + k) * pair + i];
            pkd_x[t * inner + i] = pkd_silu(sum);
        }
    pkd_project(pkd_x, inner, pkd_floats(w->x_proj, w->x_scale, inner, projected), NULL, pkd_projected, projected,
                length, inner, projected);
    pkd_project(pkd_projected, projected, pkd_floats(w->dt_weight, w->dt_scale, dt_rank, inner), w->dt_bias, pkd_delta,
                inner, length, dt_rank, inner);

    memset(pkd_state, 0, sizeof(float) * (size_t)(inner * d_state));
    for (t = 0; t < length; t++) {
        const float *restrict x = pkd_x + t * inner, *restrict z = xz + t * pair + inner;
        const float *restrict B = pkd_projected + t * projected + dt_rank, *restrict C = B + d_state;
        float *restrict delta = pkd_delta + t * inner; /* becomes the output */
        for (i = 0; i < inner; i++) {
            delta[i] = pkd_softplus(delta[i]);
            pkd_input[i] = delta[i] * x[i];
            pkd_sum[i] = D[i] * x[i];
        }
        for (n = 0; n < d_state; n++) {
            const float b = B[n], c = C[n];
            for (i = 0; i < inner; i++) {
                const float h = pkd_exp(delta[i] * A[n * inner + i]) * pkd_state[n * inner + i] + pkd_input[i] * b;
                pkd_state[n * inner + i] = h;
                pkd_sum[i] += c * h;
            }
        }
        for (i = 0; i < inner; i++)
            delta[i] = pkd_sum[i] * pkd_silu(z[i]);
    }

    pkd_project(pkd_delta, inner, pkd_floats(w->out_proj, w->out_scale, inner, row), NULL, pkd_normed, row, length,
                inner, row);
    for (t = 0; t < length; t++) {
        float *restrict token = tokens + pkd_place(t, rows, columns, by_columns, backwards) * row;
        for (i = 0; i < row; i++)
            token[i] = (residual ? token[i] : 0.0f) + pkd_normed[t * row + i];
    }
}

/* ------------------------------------------------------------------------------------------------ tokens to logits */

/* Averages of the tokens in each cell of a raster of cells * cells, to `to` (cells * cells, row). Cells may overlap. */
PKD_INLINE void pkd_average(const float *restrict tokens, int rows, int columns, int row, int cells, float *restrict to)
{
    int y, x, r, c, i;
    for (y = 0; y < cells; y++)
        for (x = 0; x < cells; x++) {
            const int top = y * rows / cells, bottom = ((y + 1) * rows + cells - 1) / cells;
            const int left = x * columns / cells, right = ((x + 1) * columns + cells - 1) / cells;
            float *restrict cell = to + (y * cells + x) * row;
            for (i = 0; i < row; i++)
                cell[i] = 0.0f;
            for (r = top; r < bottom; r++)
                for (c = left; c < right; c++)
                    for (i = 0; i < row; i++)
                        cell[i] += tokens[(r * columns + c) * row + i];
            for (i = 0; i < row; i++)
                cell[i] /= (float)((bottom - top) * (right - left));
        }
}
