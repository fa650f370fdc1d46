// One vector type per instruction set, all with the same few operations: load (widening to fp32), add, divide, store
// (rounding to nearest even).
//
// This header is compiled several times with different instruction-set flags. Everything is therefore in an anonymous
// namespace and no C++ standard header is included: an inline function shared between those files (std::min, say) could
// be kept by the linker in its AVX-512 form and then run on a machine without AVX-512.
#pragma once

#include <stdint.h>

#if defined(LEVI_FAST_ISA_AVX2) || defined(LEVI_FAST_ISA_AVX512)
#include <immintrin.h>
#elif defined(LEVI_FAST_ISA_NEON)
#include <arm_neon.h>
#endif

namespace levi_fast {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bf16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

inline float widen(f16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) {  // infinity or NaN (made quiet, as the hardware conversions do)
    return bits_to_float(sign | 0x7f800000u | (rest << 13) | (rest > 0x7c00u ? 0x00400000u : 0u));
  }
  if (rest >= 0x0400u) {
    return bits_to_float(sign | ((rest << 13) + 0x38000000u));
  }
  // Subnormal: rest * 2^-24, exact in fp32.
  return bits_to_float(sign | float_to_bits(static_cast<float>(rest) * 0x1p-24f));
}

inline void narrow(float value, float* out) { *out = value; }
inline void narrow(double value, double* out) { *out = value; }

inline void narrow(float value, bf16* out) {
  const uint32_t bits = float_to_bits(value);
  out->bits = value != value ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void narrow(float value, f16* out) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) {
    // Quiet, payload truncated: what vcvtps2ph and fcvt do.
    out->bits = static_cast<uint16_t>(sign | 0x7e00u | ((rest >> 13) & 0x03ffu));
  } else if (rest >= 0x477ff000u) {  // 65520 and up rounds to infinity
    out->bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (rest >= 0x38800000u) {  // normal
    out->bits = static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0x0fffu + ((rest >> 13) & 1u)) >> 13));
  } else {
    // Subnormal: adding 0.5 puts the half-precision unit (2^-24) at the last bit of fp32, so the adder rounds.
    const float shifted = bits_to_float(rest) + 0.5f;
    out->bits = static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
}

// One element at a time; also every set's way of finishing a row whose width is no multiple of its own.
template <class A>
struct One {
  using Acc = A;
  static constexpr int kWidth = 1;
  A value;
  template <class T>
  static One load(const T* p) {
    return {widen(*p)};
  }
  template <class T>
  void store(T* p) const {
    narrow(value, p);
  }
  One operator+(One other) const { return {value + other.value}; }
  One operator/(A divisor) const { return {value / divisor}; }
};

#if defined(LEVI_FAST_ISA_AVX2) || defined(LEVI_FAST_ISA_AVX512)
struct Avx2 {
  using Acc = float;
  static constexpr int kWidth = 8;
  __m256 value;

  static Avx2 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Avx2 load(const bf16* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
  }
  static Avx2 load(const f16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }

  void store(float* p) const { _mm256_storeu_ps(p, value); }
  void store(bf16* p) const {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd)), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i picked = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    // packus works per 128-bit half: gather the two low quarters afterwards.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(picked, picked), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  void store(f16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }

  Avx2 operator+(Avx2 other) const { return {_mm256_add_ps(value, other.value)}; }
  Avx2 operator/(float divisor) const { return {_mm256_div_ps(value, _mm256_set1_ps(divisor))}; }
};
#endif

#if defined(LEVI_FAST_ISA_AVX512)
struct Avx512 {
  using Acc = float;
  static constexpr int kWidth = 16;
  __m512 value;

  static Avx512 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Avx512 load(const bf16* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
  }
  static Avx512 load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }

  void store(float* p) const { _mm512_storeu_ps(p, value); }
  void store(bf16* p) const {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd)), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i picked = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(picked));
  }
  void store(f16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }

  Avx512 operator+(Avx512 other) const { return {_mm512_add_ps(value, other.value)}; }
  Avx512 operator/(float divisor) const { return {_mm512_div_ps(value, _mm512_set1_ps(divisor))}; }
};
#endif

#if defined(LEVI_FAST_ISA_NEON)
struct Neon {
  using Acc = float;
  static constexpr int kWidth = 4;
  float32x4_t value;

  static Neon load(const float* p) { return {vld1q_f32(p)}; }
  static Neon load(const bf16* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
  }
  static Neon load(const f16* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
  }

  void store(float* p) const { vst1q_f32(p, value); }
  void store(bf16* p) const {
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(vdupq_n_u32(0x7fff), odd));
    const uint32x4_t ordered = vceqq_f32(value, value);
    const uint32x4_t picked = vbslq_u32(ordered, rounded, vdupq_n_u32(0x7fc00000u));
    vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(picked, 16));
  }
  void store(f16* p) const {
    vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(value)));
  }

  Neon operator+(Neon other) const { return {vaddq_f32(value, other.value)}; }
  Neon operator/(float divisor) const { return {vdivq_f32(value, vdupq_n_f32(divisor))}; }
};
#endif

#if defined(LEVI_FAST_ISA_AVX512)
// 32 columns at once. Of bf16, one vector holds the even columns and one the odd ones: a load and an operation each, where
// neighbouring columns would take two loads and a shuffle more. Accumulators stay in that order; storing undoes it.
struct Avx512Pair {
  using Acc = float;
  static constexpr int kWidth = 32;
  __m512 even;
  __m512 odd;

  static Avx512Pair load(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
  static Avx512Pair load(const bf16* p) {
    const __m512i raw = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static Avx512Pair load(const f16* p) { return {Avx512::load(p).value, Avx512::load(p + 16).value}; }

  void store(float* p) const {
    _mm512_storeu_ps(p, even);
    _mm512_storeu_ps(p + 16, odd);
  }
  void store(bf16* p) const {
    const __m512i low = _mm512_srli_epi32(rounded(even), 16);
    const __m512i high = _mm512_and_si512(rounded(odd), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    _mm512_storeu_si512(p, _mm512_or_si512(low, high));
  }
  void store(f16* p) const {
    Avx512{even}.store(p);
    Avx512{odd}.store(p + 16);
  }

  Avx512Pair operator+(Avx512Pair other) const {
    return {_mm512_add_ps(even, other.even), _mm512_add_ps(odd, other.odd)};
  }
  Avx512Pair operator/(float divisor) const {
    return {_mm512_div_ps(even, _mm512_set1_ps(divisor)), _mm512_div_ps(odd, _mm512_set1_ps(divisor))};
  }

 private:
  // As Avx512's, with the result in the upper half of each lane.
  static __m512i rounded(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000));
  }
};
#endif

// The widths a row is worked through in, widest first; each leaves less than its own width to the next.
template <class... V>
struct Widths {};

template <class F, class V, class... Rest>
inline void for_each_vector(Widths<V, Rest...>, int64_t begin, int64_t end, F body) {
  int64_t j = begin;
#pragma GCC unroll 4
  for (; j + V::kWidth <= end; j += V::kWidth) {
    body(static_cast<V*>(nullptr), j);
  }
  if constexpr (sizeof...(Rest) > 0) {
    if (j < end) {
      for_each_vector(Widths<Rest...>{}, j, end, body);
    }
  }
}

}  // namespace
}  // namespace levi_fast
