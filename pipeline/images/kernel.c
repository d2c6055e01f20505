/* The inner loops of resample.py, which says what they compute; loaded with ctypes.

   Pixels are 8-bit RGB, 3 bytes each. Weights are integers of 22 fractional bits, split into
   w = (high << 12) + low with 0 <= low < 4096, so that both halves fit into the 16-bit multiplier
   of AVX2. Sums are taken modulo 2^32 and are therefore exact in any order. Without AVX2 the same
   sums are taken one by one. Every function returns 0, or -1 when memory ran out. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define WEIGHT_BITS 22
#define LOW_BITS 12
#define HALF (1 << (WEIGHT_BITS - 1))

static double bilinear(double x) {
    x = x < 0.0 ? -x : x;
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double bicubic(double x) {
    x = x < 0.0 ? -x : x;
    if (x < 1.0) {
        return (1.5 * x - 2.5) * x * x + 1.0;
    }
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 : 0.0;
}

/* Weights of outputs first .. first + count - 1 out of the new_length that inputs begin ..
   begin + extent are resized to, each over a window of `taps` inputs inside [0, length).
   `support` is the filter's: 1 for bilinear, 2 for bicubic. */
int weigh(int length, int new_length, int first, int count, int support, int taps, double begin,
          double extent, int32_t *starts, int32_t *weights) {
    double (*filter)(double) = support == 1 ? bilinear : bicubic;
    double scale = extent / new_length, widening = scale < 1.0 ? 1.0 : scale;
    double reach = support * widening, narrowing = 1.0 / widening;
    double *window = malloc(taps * sizeof(double));
    if (!window) {
        return -1;
    }
    memset(weights, 0, (size_t)count * taps * sizeof(int32_t));
    for (int i = 0; i < count; i++) {
        double centre = begin + (first + i + 0.5) * scale, total = 0.0;
        int start = (int)(centre - reach + 0.5), stop = (int)(centre + reach + 0.5);
        start = start < 0 ? 0 : start;
        stop = stop > length ? length : stop;
        starts[i] = start < length - taps ? start : length - taps;
        stop = stop > starts[i] + taps ? starts[i] + taps : stop;
        for (int x = start; x < stop; x++) {
            total += window[x - start] = filter((x - centre + 0.5) * narrowing);
        }
        for (int x = start; x < stop; x++) {
            double weight = window[x - start] / total;
            weights[(size_t)i * taps + x - starts[i]] =
                (int32_t)((weight < 0 ? -0.5 : 0.5) + weight * (1 << WEIGHT_BITS));
        }
    }
    free(window);
    return 0;
}

static uint8_t clip(uint32_t sum) {
    int32_t value = (int32_t)sum >> WEIGHT_BITS;
    return value < 0 ? 0 : value > 255 ? 255 : value;
}

/* One output byte: `taps` bytes that lie `step` apart, weighed. */
static uint8_t weigh_byte(const uint8_t *source, int64_t step, int taps, const int32_t *weights) {
    uint32_t sum = HALF;
    for (int t = 0; t < taps; t++) {
        sum += source[t * step] * (uint32_t)weights[t];
    }
    return clip(sum);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(WITHOUT_AVX2)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))

#define ROWS 4

/* Four taps a group: their low halves, then their high ones. */
static int16_t *pack_weights(int count, int taps, int groups, const int32_t *weights) {
    int16_t *packed = calloc((size_t)count * groups * 8, sizeof(int16_t));
    for (int i = 0; packed && i < count; i++) {
        for (int t = 0; t < taps; t++) {
            int32_t weight = weights[(size_t)i * taps + t];
            int16_t *group = packed + ((size_t)i * groups + t / 4) * 8;
            group[t % 4] = weight & ((1 << LOW_BITS) - 1);
            group[4 + t % 4] = weight >> LOW_BITS;
        }
    }
    return packed;
}

/* One output pixel of each of four rows, 4 bytes each. */
AVX2 static inline __m128i weigh_pixels(const uint8_t *const *rows, int64_t offset, int groups,
                                        const int16_t *packed) {
    const __m256i pairs = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,
                                           6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    const __m256i lows = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    const __m256i highs = _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3);
    __m256i low_sums[ROWS], high_sums[ROWS];
    for (int r = 0; r < ROWS; r++) {
        low_sums[r] = high_sums[r] = _mm256_setzero_si256();
    }
    for (int g = 0; g < groups; g++) {
        __m256i group = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(packed + g * 8)));
        __m256i low = _mm256_permutevar8x32_epi32(group, lows);
        __m256i high = _mm256_permutevar8x32_epi32(group, highs);
        for (int r = 0; r < ROWS; r++) {
            __m128i bytes = _mm_loadu_si128((const __m128i *)(rows[r] + offset + g * 12));
            __m256i pixels = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), pairs);
            low_sums[r] = _mm256_add_epi32(low_sums[r], _mm256_madd_epi16(pixels, low));
            high_sums[r] = _mm256_add_epi32(high_sums[r], _mm256_madd_epi16(pixels, high));
        }
    }
    __m128i sums[ROWS];
    for (int r = 0; r < ROWS; r++) {
        __m256i sum = _mm256_add_epi32(low_sums[r], _mm256_slli_epi32(high_sums[r], LOW_BITS));
        sums[r] = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        sums[r] = _mm_srai_epi32(_mm_add_epi32(sums[r], _mm_set1_epi32(HALF)), WEIGHT_BITS);
    }
    return _mm_packus_epi16(_mm_packs_epi32(sums[0], sums[1]), _mm_packs_epi32(sums[2], sums[3]));
}

/* Rows go four at a time; the last ones by way of a copy, past whose ends it is safe to read. */
AVX2 static int resample_columns_avx2(int rows, int length, int count, int taps, int64_t stride,
                                      const uint8_t *source, const int32_t *starts,
                                      const int32_t *weights, uint8_t *out) {
    int groups = (taps + 3) / 4;
    size_t pitch = 3 * (size_t)length + 32;
    int16_t *packed = pack_weights(count, taps, groups, weights);
    uint8_t *copy = malloc(ROWS * pitch);
    if (!packed || !copy) {
        free(packed);
        free(copy);
        return -1;
    }
    for (int y = 0; y < rows; y += ROWS) {
        const uint8_t *from[ROWS];
        uint8_t *to[ROWS];
        int64_t bytes_behind = 3 * (int64_t)length * (rows - y - ROWS);
        for (int r = 0; r < ROWS; r++) {
            int row = y + r < rows ? y + r : rows - 1;
            from[r] = source + row * stride;
            to[r] = out + (size_t)row * count * 3;
            if (bytes_behind < 16) {
                from[r] = memcpy(copy + r * pitch, from[r], 3 * (size_t)length);
            }
        }
        for (int i = 0; i < count; i++) {
            uint32_t pixels[ROWS];
            _mm_storeu_si128((__m128i *)pixels,
                             weigh_pixels(from, 3 * (int64_t)starts[i], groups,
                                          packed + (size_t)i * groups * 8));
            for (int r = 0; r < ROWS; r++) {
                if (i + 1 < count) {
                    memcpy(to[r] + 3 * (size_t)i, &pixels[r], 4); /* the next one overwrites */
                } else {
                    memcpy(to[r] + 3 * (size_t)i, &pixels[r], 3);
                }
            }
        }
    }
    free(packed);
    free(copy);
    return 0;
}

/* Two taps an entry: the low halves of all, then the high ones. An odd tap's partner weighs 0. */
static void pack_pairs(int taps, const int32_t *weights, uint32_t *low, uint32_t *high) {
    for (int t = 0; t < taps; t += 2) {
        uint32_t first = weights[t], second = t + 1 < taps ? weights[t + 1] : 0;
        uint32_t mask = (1 << LOW_BITS) - 1;
        low[t / 2] = (first & mask) | (second & mask) << 16;
        high[t / 2] = (uint16_t)((int32_t)first >> LOW_BITS) |
                      (uint32_t)((int32_t)second >> LOW_BITS) << 16;
    }
}

/* 32 bytes of one output row. */
AVX2 static inline void weigh_block(const uint8_t *source, int64_t stride, int taps,
                                    const uint32_t *lows, const uint32_t *highs, uint8_t *out) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i low_sums[4] = {zero, zero, zero, zero}, high_sums[4] = {zero, zero, zero, zero};
    for (int t = 0; t < taps; t += 2) {
        __m256i low = _mm256_set1_epi32(lows[t / 2]), high = _mm256_set1_epi32(highs[t / 2]);
        const uint8_t *row = source + t * stride, *next = t + 1 < taps ? row + stride : row;
        __m256i a = _mm256_loadu_si256((const __m256i *)row);
        __m256i b = _mm256_loadu_si256((const __m256i *)next);
        __m256i halves[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
        for (int h = 0; h < 2; h++) {
            __m256i pairs[2] = {_mm256_unpacklo_epi8(halves[h], zero),
                                _mm256_unpackhi_epi8(halves[h], zero)};
            for (int p = 0; p < 2; p++) {
                int k = 2 * h + p;
                low_sums[k] = _mm256_add_epi32(low_sums[k], _mm256_madd_epi16(pairs[p], low));
                high_sums[k] = _mm256_add_epi32(high_sums[k], _mm256_madd_epi16(pairs[p], high));
            }
        }
    }
    for (int k = 0; k < 4; k++) {
        __m256i sum = _mm256_add_epi32(low_sums[k], _mm256_slli_epi32(high_sums[k], LOW_BITS));
        low_sums[k] = _mm256_srai_epi32(_mm256_add_epi32(sum, _mm256_set1_epi32(HALF)), WEIGHT_BITS);
    }
    __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(low_sums[0], low_sums[1]),
                                        _mm256_packs_epi32(low_sums[2], low_sums[3]));
    _mm256_storeu_si256((__m256i *)out, bytes);
}

/* Returns how many bytes of each row are done, a multiple of 32; -1 when memory ran out. */
AVX2 static int resample_rows_avx2(int width, int count, int taps, int64_t stride,
                                   const uint8_t *source, const int32_t *starts,
                                   const int32_t *weights, uint8_t *out) {
    int pairs = (taps + 1) / 2, done = width / 32 * 32;
    uint32_t *packed = malloc(2 * pairs * sizeof(uint32_t));
    if (!packed) {
        return -1;
    }
    for (int i = 0; i < count; i++) {
        pack_pairs(taps, weights + (size_t)i * taps, packed, packed + pairs);
        for (int x = 0; x < done; x += 32) {
            weigh_block(source + starts[i] * stride + x, stride, taps, packed, packed + pairs,
                        out + (size_t)i * width + x);
        }
    }
    free(packed);
    return done;
}

static int has_avx2(void) { return __builtin_cpu_supports("avx2"); }
#else
#define has_avx2() 0
#define resample_columns_avx2(rows, length, ...) ((void)(length), -1)
#define resample_rows_avx2(...) (-1)
#endif

/* Rows of `length` pixels, `stride` bytes apart, to rows of `count` pixels without gaps. */
int resample_columns(int rows, int length, int count, int taps, int64_t stride,
                     const uint8_t *source, const int32_t *starts, const int32_t *weights,
                     uint8_t *out) {
    if (has_avx2()) {
        return resample_columns_avx2(rows, length, count, taps, stride, source, starts, weights, out);
    }
    for (int y = 0; y < rows; y++) {
        for (int i = 0; i < count; i++) {
            const uint8_t *window = source + y * stride + 3 * (int64_t)starts[i];
            for (int c = 0; c < 3; c++) {
                *out++ = weigh_byte(window + c, 3, taps, weights + (size_t)i * taps);
            }
        }
    }
    return 0;
}

/* Rows of `width` bytes, `stride` bytes apart, to `count` rows without gaps. */
int resample_rows(int width, int count, int taps, int64_t stride, const uint8_t *source,
                  const int32_t *starts, const int32_t *weights, uint8_t *out) {
    int done = 0;
    if (has_avx2()) {
        done = resample_rows_avx2(width, count, taps, stride, source, starts, weights, out);
    }
    for (int i = 0; i < count && done >= 0; i++) {
        for (int x = done; x < width; x++) {
            out[(size_t)i * width + x] = weigh_byte(source + starts[i] * stride + x, stride, taps,
                                                    weights + (size_t)i * taps);
        }
    }
    return done < 0 ? -1 : 0;
}
