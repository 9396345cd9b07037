// SIMD vectors as wide as the instruction set this file is compiled for, by GCC's vector extension.
//
// For use in one source only per instruction set: everything has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "common/host_device.h"

namespace dmcp {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define DMCP_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define DMCP_VECTOR_BYTES 32
#else
#define DMCP_VECTOR_BYTES 16
#endif

template <typename S>
struct VectorOf {
  typedef S type __attribute__((vector_size(DMCP_VECTOR_BYTES)));
};

template <typename S>
using Vector = typename VectorOf<S>::type;

template <typename S>
constexpr int kLanes = DMCP_VECTOR_BYTES / static_cast<int>(sizeof(S));

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// What activations are computed in.
template <typename T>
struct ComputeIn {
  using type = float;
};
template <>
struct ComputeIn<double> {
  using type = double;
};

typedef uint32_t UInts __attribute__((vector_size(DMCP_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(DMCP_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(DMCP_VECTOR_BYTES / 2)));

// GCC 12 takes the long way round for __builtin_convertvector between 16 and 32 bits.
#if DMCP_VECTOR_BYTES == 64
DMCP_HOST_DEVICE UInts widen(Halves h) { return (UInts)_mm512_cvtepu16_epi32((__m256i)h); }
DMCP_HOST_DEVICE Halves narrow(UInts v) { return (Halves)_mm512_cvtepi32_epi16((__m512i)v); }
#elif DMCP_VECTOR_BYTES == 32
DMCP_HOST_DEVICE UInts widen(Halves h) { return (UInts)_mm256_cvtepu16_epi32((__m128i)h); }
DMCP_HOST_DEVICE Halves narrow(UInts v) {
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
#else
DMCP_HOST_DEVICE UInts widen(Halves h) { return __builtin_convertvector(h, UInts); }
DMCP_HOST_DEVICE Halves narrow(UInts v) { return __builtin_convertvector(v, Halves); }
#endif

DMCP_HOST_DEVICE Vector<float> widen_bfloat16(Halves h) { return (Vector<float>)(widen(h) << 16); }

// To nearest, ties to even; a NaN stays one.
#ifdef __AVX512BF16__
DMCP_HOST_DEVICE Halves narrow_bfloat16(Vector<float> v) {
  return (Halves)_mm512_cvtneps_pbh((__m512)v);  // subnormals become 0
}
#else
DMCP_HOST_DEVICE Halves narrow_bfloat16(Vector<float> v) {
  const UInts bits = (UInts)v;
  const UInts rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UInts quiet = (bits >> 16) | 0x40u;
  return narrow(v == v ? rounded : quiet);
}
#endif

#if DMCP_VECTOR_BYTES == 64
DMCP_HOST_DEVICE Vector<float> widen_float16(Halves h) {
  return (Vector<float>)_mm512_cvtph_ps((__m256i)h);
}
DMCP_HOST_DEVICE Halves narrow_float16(Vector<float> v) {
  return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif DMCP_VECTOR_BYTES == 32
DMCP_HOST_DEVICE Vector<float> widen_float16(Halves h) {
  return (Vector<float>)_mm256_cvtph_ps((__m128i)h);
}
DMCP_HOST_DEVICE Halves narrow_float16(Vector<float> v) {
  return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// Exponents are moved by a multiplication, which also normalises subnormals.
DMCP_HOST_DEVICE Vector<float> widen_float16(Halves h) {
  const UInts bits = widen(h);
  const UInts sign = (bits & 0x8000u) << 16;
  const UInts magnitude = (bits & 0x7fffu) << 13;
  const Vector<float> scaled = (Vector<float>)magnitude * 0x1p112f;
  const UInts special = magnitude | 0x7f800000u;  // infinity and NaN
  return (Vector<float>)(((bits & 0x7c00u) == 0x7c00u ? special : (UInts)scaled) | sign);
}
DMCP_HOST_DEVICE Halves narrow_float16(Vector<float> v) {
  const UInts bits = (UInts)v;
  const UInts sign = (bits >> 16) & 0x8000u;
  const UInts magnitude = bits & 0x7fffffffu;
  // Adding a power of two whose last place is that of the result rounds to it.
  const UInts exponent = magnitude & 0x7f800000u;
  const UInts least = UInts{} + 0x38800000u;  // 2^-14, below which the last place stays
  const UInts magic = (exponent < least ? least : exponent) + (13u << 23);
  const Vector<float> rounded =
      ((Vector<float>)magnitude + (Vector<float>)magic) - (Vector<float>)magic;
  const UInts scaled = (UInts)(rounded * 0x1p-112f) >> 13;
  const UInts infinite = UInts{} + 0x7c00u;
  const UInts finite = (UInts)rounded >= 0x47800000u ? infinite : scaled;  // 2^16
  const UInts result = magnitude > 0x7f800000u ? infinite | 0x200u : finite;
  return narrow(result | sign);
}
#endif

// --- Loads and stores of a whole vector
// -----------------------------------------------------------

template <typename Packed, typename T>
DMCP_HOST_DEVICE Packed read(const T* p) {
  Packed packed;
  std::memcpy(&packed, p, sizeof packed);
  return packed;
}

DMCP_HOST_DEVICE Vector<float> load(const float* p) { return read<Vector<float>>(p); }
DMCP_HOST_DEVICE Vector<double> load(const double* p) { return read<Vector<double>>(p); }
DMCP_HOST_DEVICE Vector<float> load(const BFloat16* p) { return widen_bfloat16(read<Halves>(p)); }
DMCP_HOST_DEVICE Vector<float> load(const Float16* p) { return widen_float16(read<Halves>(p)); }

DMCP_HOST_DEVICE void store(float* p, Vector<float> v) { std::memcpy(p, &v, sizeof v); }
DMCP_HOST_DEVICE void store(double* p, Vector<double> v) { std::memcpy(p, &v, sizeof v); }
DMCP_HOST_DEVICE void store(BFloat16* p, Vector<float> v) {
  const Halves packed = narrow_bfloat16(v);
  std::memcpy(p, &packed, sizeof packed);
}
DMCP_HOST_DEVICE void store(Float16* p, Vector<float> v) {
  const Halves packed = narrow_float16(v);
  std::memcpy(p, &packed, sizeof packed);
}

// --- Stores past the caches, to addresses that are multiples of what is stored
// -----------------------

#if DMCP_VECTOR_BYTES == 64
DMCP_HOST_DEVICE void stream(float* p, Vector<float> v) { _mm512_stream_ps(p, (__m512)v); }
DMCP_HOST_DEVICE void stream(double* p, Vector<double> v) { _mm512_stream_pd(p, (__m512d)v); }
template <typename Half>
DMCP_HOST_DEVICE void stream_halves(Half* p, Halves v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
}
#elif DMCP_VECTOR_BYTES == 32
DMCP_HOST_DEVICE void stream(float* p, Vector<float> v) { _mm256_stream_ps(p, (__m256)v); }
DMCP_HOST_DEVICE void stream(double* p, Vector<double> v) { _mm256_stream_pd(p, (__m256d)v); }
template <typename Half>
DMCP_HOST_DEVICE void stream_halves(Half* p, Halves v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
}
#endif

#if DMCP_VECTOR_BYTES > 16
constexpr bool kCanStream = true;
DMCP_HOST_DEVICE void stream(BFloat16* p, Vector<float> v) { stream_halves(p, narrow_bfloat16(v)); }
DMCP_HOST_DEVICE void stream(Float16* p, Vector<float> v) { stream_halves(p, narrow_float16(v)); }
DMCP_HOST_DEVICE void end_streams() { _mm_sfence(); }
#else
constexpr bool kCanStream = false;
template <typename T, typename V>
DMCP_HOST_DEVICE void stream(T* p, V v) {
  store(p, v);
}
DMCP_HOST_DEVICE void end_streams() {}
#endif

// --- The first n lanes only; the others of a load are 0
// -------------------------------------------

#if DMCP_VECTOR_BYTES == 64
DMCP_HOST_DEVICE uint32_t first(int n) { return (uint32_t{1} << n) - 1; }

DMCP_HOST_DEVICE Vector<float> load(const float* p, int n) {
  return (Vector<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(first(n)), p);
}
DMCP_HOST_DEVICE Vector<double> load(const double* p, int n) {
  return (Vector<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(first(n)), p);
}
DMCP_HOST_DEVICE Vector<float> load(const BFloat16* p, int n) {
  return widen_bfloat16((Halves)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first(n)), p));
}
DMCP_HOST_DEVICE Vector<float> load(const Float16* p, int n) {
  return widen_float16((Halves)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first(n)), p));
}
DMCP_HOST_DEVICE void store(float* p, Vector<float> v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(first(n)), (__m512)v);
}
DMCP_HOST_DEVICE void store(double* p, Vector<double> v, int n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first(n)), (__m512d)v);
}
DMCP_HOST_DEVICE void store(BFloat16* p, Vector<float> v, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(first(n)), (__m256i)narrow_bfloat16(v));
}
DMCP_HOST_DEVICE void store(Float16* p, Vector<float> v, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(first(n)), (__m256i)narrow_float16(v));
}
#else
template <typename T>
DMCP_HOST_DEVICE auto load(const T* p, int n) {
  T whole[kLanes<typename ComputeIn<T>::type>] = {};
  std::memcpy(whole, p, static_cast<size_t>(n) * sizeof(T));
  return load(whole);
}
template <typename T, typename V>
DMCP_HOST_DEVICE void store(T* p, V v, int n) {
  T whole[kLanes<typename ComputeIn<T>::type>];
  store(whole, v);
  std::memcpy(p, whole, static_cast<size_t>(n) * sizeof(T));
}
#endif

// --- Arithmetic that operators do not cover
// -------------------------------------------------------

template <typename S>
DMCP_HOST_DEVICE Vector<S> broadcast(S value) {
  return Vector<S>{} + value;
}

// The larger of u and low, the smaller of u and high; u where it is a NaN, which the second operand
// of these instructions wins.
#if DMCP_VECTOR_BYTES == 64
DMCP_HOST_DEVICE Vector<float> at_least(Vector<float> u, float low) {
  return (Vector<float>)_mm512_max_ps(_mm512_set1_ps(low), (__m512)u);
}
DMCP_HOST_DEVICE Vector<float> at_most(Vector<float> u, float high) {
  return (Vector<float>)_mm512_min_ps(_mm512_set1_ps(high), (__m512)u);
}
#elif DMCP_VECTOR_BYTES == 32
DMCP_HOST_DEVICE Vector<float> at_least(Vector<float> u, float low) {
  return (Vector<float>)_mm256_max_ps(_mm256_set1_ps(low), (__m256)u);
}
DMCP_HOST_DEVICE Vector<float> at_most(Vector<float> u, float high) {
  return (Vector<float>)_mm256_min_ps(_mm256_set1_ps(high), (__m256)u);
}
#endif

// The sum of the lanes, in a fixed order, so that it has the same bits wherever it is taken; the
// lanes are 0 afterwards.
template <typename S>
DMCP_HOST_DEVICE double take_lanes(Vector<S>& v) {
  double sum = 0.0;
  for (int lane = 0; lane < kLanes<S>; ++lane) sum += static_cast<double>(v[lane]);
  v = Vector<S>{};
  return sum;
}

// e^u within 2 units of rounding: u = n ln 2 + r, a polynomial for e^r, then n into the exponent.
DMCP_HOST_DEVICE Vector<float> exponential(Vector<float> u) {
  const Vector<float> raised = u < -87.3f ? broadcast(-87.3f) : u;
  const Vector<float> x = raised > 88.7f ? broadcast(88.7f) : raised;
  const Vector<float> shifted = x * 1.44269504f + 0x1.8p23f;  // rounds to an integer
  const Vector<float> n = shifted - 0x1.8p23f;
  const Vector<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vector<float> e = p * r * r + r + 1.0f;
  const Ints exponent = ((Ints)shifted - 0x4b400000) << 23;
  const Vector<float> power = (Vector<float>)((Ints)e + exponent);
  return u == u ? power : u;
}

DMCP_HOST_DEVICE Vector<double> exponential(Vector<double> u) {
  for (int lane = 0; lane < kLanes<double>; ++lane) u[lane] = __builtin_exp(u[lane]);
  return u;
}

}  // namespace
}  // namespace dmcp
