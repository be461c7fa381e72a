// CUDA's short vectors (float4, uint2, ...) and dim3, sized and aligned as CUDA has them. Part of
// cuda_shim.h.
#pragma once

#define SHIM_VECTOR_TYPES(element, name)                                               \
  struct alignas(2 * sizeof(element)) name##2 { element x, y; };                       \
  struct name##3 { element x, y, z; };                                                 \
  struct alignas(4 * sizeof(element) < 16 ? 4 * sizeof(element) : 16) name##4 {        \
    element x, y, z, w;                                                                \
  };                                                                                   \
  inline name##2 make_##name##2(element x, element y) { return {x, y}; }               \
  inline name##3 make_##name##3(element x, element y, element z) { return {x, y, z}; } \
  inline name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }

SHIM_VECTOR_TYPES(char, char)
SHIM_VECTOR_TYPES(unsigned char, uchar)
SHIM_VECTOR_TYPES(short, short)
SHIM_VECTOR_TYPES(unsigned short, ushort)
SHIM_VECTOR_TYPES(int, int)
SHIM_VECTOR_TYPES(unsigned, uint)
SHIM_VECTOR_TYPES(long long, longlong)
SHIM_VECTOR_TYPES(unsigned long long, ulonglong)
SHIM_VECTOR_TYPES(float, float)
SHIM_VECTOR_TYPES(double, double)
#undef SHIM_VECTOR_TYPES

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
