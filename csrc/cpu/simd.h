// Arithmetic on fp32 vectors as wide as the instruction set in use, on the compiler's own vector types: loads that widen,
// stores that round, and the elementary functions the activations need.
//
// Compiled several times with different flags; see vec.h for why everything is in an anonymous namespace.
#pragma once

#include <stddef.h>

#include "vec.h"

namespace levi_fast {
namespace {

#if defined(LEVI_FAST_ISA_AVX512)
constexpr int kLanes = 16;
#elif defined(LEVI_FAST_ISA_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2 or NEON: part of every x86-64 and AArch64 CPU
#endif

typedef float Vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t Vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Vh __attribute__((vector_size(kLanes * 2)));
typedef double Vd __attribute__((vector_size(kLanes * 8)));

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

inline Vf splat(float value) { return Vf{} + value; }

inline Vf load(const float* p) {
  Vf v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

inline Vf load(const bf16* p) {
#if defined(LEVI_FAST_ISA_AVX512)  // GCC widens a vector of 16 in two halves
  return (Vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#else
  Vh raw;
  __builtin_memcpy(&raw, p, sizeof(raw));
  return (Vf)(__builtin_convertvector(raw, Vu) << 16);
#endif
}

inline Vf load(const f16* p) {
#if defined(LEVI_FAST_ISA_AVX512)
  return (Vf)Avx512::load(p).value;
#elif defined(LEVI_FAST_ISA_AVX2)
  return (Vf)Avx2::load(p).value;
#else
  Vf v;
  for (int i = 0; i < kLanes; ++i) {
    v[i] = widen(p[i]);
  }
  return v;
#endif
}

// fp64 is read and written, never computed in: its users are content with fp32 arithmetic.
inline Vf load(const double* p) {
  Vd v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, Vf);
}

inline void store(Vf v, float* p) { __builtin_memcpy(p, &v, sizeof(v)); }

inline void store(Vf v, double* p) {
  const Vd wide = __builtin_convertvector(v, Vd);
  __builtin_memcpy(p, &wide, sizeof(wide));
}

inline void store(Vf v, bf16* p) {
#if defined(LEVI_FAST_BF16_DOT)
  const __m256bh out = _mm512_cvtneps_pbh((__m512)v);  // to nearest even; subnormals become zero
  __builtin_memcpy(p, &out, sizeof(out));
#else
  const Vu bits = (Vu)v;
  const Vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Vh out = __builtin_convertvector(v == v ? rounded : Vu{} + 0x7fc0u, Vh);
  __builtin_memcpy(p, &out, sizeof(out));
#endif
}

// Past the cache, to an address aligned to the vector; fence_stores() before another thread reads.
inline void store_past(Vf v, float* p) {
#if defined(LEVI_FAST_ISA_AVX512)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(LEVI_FAST_ISA_AVX2)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(v, p);
#endif
}

inline void fence_stores() {
#if defined(LEVI_FAST_ISA_AVX512) || defined(LEVI_FAST_ISA_AVX2)
  _mm_sfence();
#endif
}

inline void store(Vf v, f16* p) {
#if defined(LEVI_FAST_ISA_AVX512)
  Avx512{(__m512)v}.store(p);
#elif defined(LEVI_FAST_ISA_AVX2)
  Avx2{(__m256)v}.store(p);
#else
  for (int i = 0; i < kLanes; ++i) {
    narrow(v[i], p + i);
  }
#endif
}

// Two vectors side by side.
template <class T>
inline void store_two(Vf v, Vf next, T* p) {
#if defined(LEVI_FAST_BF16_DOT)
  if constexpr (kSame<T, bf16>) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)next, (__m512)v));
    return;
  }
#endif
  store(v, p);
  store(next, p + kLanes);
}

// Two vectors side by side in a 16-bit dtype: one whole line.
template <class T>
inline void store_past(Vf v, Vf next, T* p) {
#if defined(LEVI_FAST_BF16_DOT)
  if constexpr (kSame<T, bf16>) {  // in one register: halves put together in memory cannot be forwarded to the whole
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)_mm512_cvtne2ps_pbh((__m512)next, (__m512)v));
    return;
  }
#endif
#if defined(LEVI_FAST_ISA_AVX512)
  T both[2 * kLanes];
  store(v, both);
  store(next, both + kLanes);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_loadu_si512(both));
#else
  store(v, p);
  store(next, p + kLanes);
#endif
}

// The first `count` < kLanes elements, zeros behind them.
template <class T>
inline Vf load_part(const T* p, int64_t count) {
#if defined(LEVI_FAST_ISA_AVX512)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
  if constexpr (kSame<T, float>) {
    return (Vf)_mm512_maskz_loadu_ps(mask, p);
  } else if constexpr (kSame<T, bf16>) {
    return (Vf)(__builtin_convertvector((Vh)_mm256_maskz_loadu_epi16(mask, p), Vu) << 16);
  } else if constexpr (kSame<T, f16>) {
    return (Vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
  }
#endif
  T padded[kLanes] = {};
  __builtin_memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_part(Vf v, T* p, int64_t count) {
  T padded[kLanes];
  store(v, padded);
#if defined(LEVI_FAST_ISA_AVX512)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
  if constexpr (kSame<T, float>) {
    _mm512_mask_storeu_ps(p, mask, (__m512)v);
    return;
  } else if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(padded)));
    return;
  }
#endif
  __builtin_memcpy(p, padded, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
inline Vf load_upto(const T* p, int64_t left) {
  return left >= kLanes ? load(p) : load_part(p, left);
}

template <class T>
inline void store_upto(Vf v, T* p, int64_t left) {
  if (left >= kLanes) {
    store(v, p);
  } else {
    store_part(v, p, left);
  }
}

inline Vi lane_numbers() {
  Vi index;
  for (int i = 0; i < kLanes; ++i) {
    index[i] = i;
  }
  return index;
}

// All ones in the lanes below `left`, and in lane `at` alone.
inline Vi lanes_below(int64_t left) { return lane_numbers() < static_cast<int32_t>(left < kLanes ? left : kLanes); }
inline Vi lanes_at(int64_t at) { return lane_numbers() == static_cast<int32_t>(at); }

inline float sum(Vf v) {
#if defined(LEVI_FAST_ISA_AVX512)
  const __m512 x = (__m512)v;
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x),
                                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
#elif defined(LEVI_FAST_ISA_AVX2)
  const __m256 half = (__m256)v;
#endif
#if defined(LEVI_FAST_ISA_AVX512) || defined(LEVI_FAST_ISA_AVX2)
  __m128 x4 = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  x4 = _mm_add_ps(x4, _mm_movehl_ps(x4, x4));
  return _mm_cvtss_f32(_mm_add_ss(x4, _mm_shuffle_ps(x4, x4, 1)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

inline float maximum(Vf v) {
#if defined(LEVI_FAST_ISA_AVX512)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) {
    most = v[i] > most ? v[i] : most;
  }
  return most;
#endif
}

inline Vf vabs(Vf x) { return (Vf)((Vu)x & 0x7fffffffu); }
inline Vf sign_of(Vf magnitude, Vf sign) { return (Vf)((Vu)magnitude | ((Vu)sign & 0x80000000u)); }

// e^x to about 1 ulp: x = n ln2 + r, a polynomial on |r| <= ln2/2 (fitted by Lawson's iteration on Chebyshev nodes, as the
// two below), 2^n put into the exponent in two steps so that the result may be subnormal. NaN stays NaN.
inline Vf vexp(Vf x) {
  const Vf high = splat(89.0f), low = splat(-104.0f);
  Vf y = x > high ? high : x;
  y = y < low ? low : y;
  const Vf shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vf biased = y * 1.44269504f + shift;
  const Vf n = biased - shift;
  Vf r = y - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vf p = splat(1.395047302e-03f);
  p = p * r + 8.368884347e-03f;
  p = p * r + 4.166620606e-02f;
  p = p * r + 1.666651888e-01f;
  p = p * r + 5.000000095e-01f;
  p = (p * r) * r + r + 1.0f;
  const Vi power = (Vi)biased - 0x4b400000;
  const Vi half = power >> 1;
  const Vf first = (Vf)((half + 127) << 23), second = (Vf)((power - half + 127) << 23);
  return x == x ? (p * first) * second : x;
}

// log(1 + u) for u in [0, 1], to about 2 ulp: 2 atanh(u / (2 + u)), so that a small u keeps its digits.
inline Vf vlog1p(Vf u) {
  const Vf s = u / (2.0f + u);
  const Vf z = s * s;
  Vf p = splat(2.817833424e-01f);
  p = p * z + 2.796060145e-01f;
  p = p * z + 4.002490938e-01f;
  p = p * z + 6.666631699e-01f;
  p = p * z + 2.0f;
  return p * s;
}

// tanh(x): x + x P(x^2) near zero, 1 - 2 / (e^2t + 1) with t = |x| farther out.
inline Vf vtanh(Vf x) {
  const Vf t = vabs(x);
  const Vf s = x * x;
  Vf p = splat(-5.717010962e-03f);
  p = p * s + 2.065055395e-02f;
  p = p * s + -5.374348671e-02f;
  p = p * s + 1.333149113e-01f;
  p = p * s + -3.333328392e-01f;
  const Vf near = (p * s) * x + x;
  const Vf u = t > 10.0f ? splat(10.0f) : t;
  const Vf far = sign_of(1.0f - 2.0f / (vexp(u + u) + 1.0f), x);
  return t > 0.625f ? far : near;
}

// Phi(x), the normal distribution's cumulative, and its bell e^(-x^2/2): below zero Phi is the bell times s P(s) with
// s = 1 / (1 + 0.3 |x|) (fitted as above, to 9e-8), so one exponential serves GELU and its derivative.
inline Vf normal_cdf(Vf x, Vf* bell) {
  *bell = vexp((x * x) * -0.5f);
  const Vf s = 1.0f / (1.0f + vabs(x) * 0.3f);
  Vf p = splat(4.483291580e-03f);
  p = p * s + 1.541978335e-02f;
  p = p * s + -1.185740101e-01f;
  p = p * s + 1.658592937e-01f;
  p = p * s + -2.824083428e-02f;
  p = p * s + 1.187777181e-01f;
  p = p * s + 1.021570725e-01f;
  p = p * s + 1.204738593e-01f;
  p = p * s + 1.196438699e-01f;
  const Vf tail = (*bell * s) * p;
  return x < 0.0f ? tail : 1.0f - tail;
}

inline Vf vsigmoid(Vf x) { return 1.0f / (1.0f + vexp(-x)); }

// The activations, numbered as in kernels/layerwise_ensemble_eager.py.
enum : int { kGelu = 0, kRelu = 1, kSilu = 2, kTanh = 3 };

template <int kActivation>
inline Vf activate(Vf x) {
  if constexpr (kActivation == kGelu) {
    Vf bell;
    return x * normal_cdf(x, &bell);
  } else if constexpr (kActivation == kRelu) {
    return x < 0.0f ? Vf{} : x;
  } else if constexpr (kActivation == kSilu) {
    return x / (1.0f + vexp(-x));
  } else {
    return vtanh(x);
  }
}

// Value and derivative at once: they share the costly part.
template <int kActivation>
inline Vf activate(Vf x, Vf* derivative) {
  if constexpr (kActivation == kGelu) {
    Vf bell;
    const Vf cdf = normal_cdf(x, &bell);
    *derivative = cdf + x * (0.39894228f * bell);
    return x * cdf;
  } else if constexpr (kActivation == kRelu) {
    *derivative = x <= 0.0f ? Vf{} : splat(1.0f);
    return x < 0.0f ? Vf{} : x;
  } else if constexpr (kActivation == kSilu) {
    const Vf s = vsigmoid(x);
    *derivative = s * (1.0f + x * (1.0f - s));
    return x * s;
  } else {
    const Vf y = vtanh(x);
    *derivative = 1.0f - y * y;
    return y;
  }
}

}  // namespace
}  // namespace levi_fast
