// Hopper's matrix product of a warpgroup: d [64, N] += a [64, 16] b [16, N], a in registers, b in shared memory, d float32.
//
// `MatrixProduct<T, N, TRANSPOSED>::run(d, a, b, add)` starts one; T is __nv_bfloat16 or __half, N a multiple of 16 up to 256.
// `d` may be longer than the N / 2 numbers a thread holds: thread t of warp w has rows 16 w + t % 32 / 4 (+ 8), columns
// 8 n + 2 (t % 4) (+ 1) in d[4 n .. 4 n + 3], row the slower. `a` is laid out as load_matrices gives it (rows 0-7, rows 8-15,
// then the same of k 8-15). `b` is a descriptor: rows of N, k contiguous, or TRANSPOSED: rows of k, N contiguous.
// Without `add` d is overwritten.
#pragma once
#include "hopper.cuh"

namespace smoe {

template <typename T, int N, bool TRANSPOSED = false>
struct MatrixProduct;

// The registers of d as inline assembly names them, and as it binds them; inline assembly knows no loops.
#define SMOE_NAME_8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define SMOE_NAMES_16 SMOE_NAME_8(0, 1, 2, 3, 4, 5, 6, 7)
#define SMOE_NAMES_32 SMOE_NAMES_16 "," SMOE_NAME_8(8, 9, 10, 11, 12, 13, 14, 15)
#define SMOE_NAMES_48 SMOE_NAMES_32 "," SMOE_NAME_8(16, 17, 18, 19, 20, 21, 22, 23)
#define SMOE_NAMES_64 SMOE_NAMES_48 "," SMOE_NAME_8(24, 25, 26, 27, 28, 29, 30, 31)
#define SMOE_NAMES_80 SMOE_NAMES_64 "," SMOE_NAME_8(32, 33, 34, 35, 36, 37, 38, 39)
#define SMOE_NAMES_96 SMOE_NAMES_80 "," SMOE_NAME_8(40, 41, 42, 43, 44, 45, 46, 47)
#define SMOE_NAMES_112 SMOE_NAMES_96 "," SMOE_NAME_8(48, 49, 50, 51, 52, 53, 54, 55)
#define SMOE_NAMES_128 SMOE_NAMES_112 "," SMOE_NAME_8(56, 57, 58, 59, 60, 61, 62, 63)
#define SMOE_NAMES_144 SMOE_NAMES_128 "," SMOE_NAME_8(64, 65, 66, 67, 68, 69, 70, 71)
#define SMOE_NAMES_160 SMOE_NAMES_144 "," SMOE_NAME_8(72, 73, 74, 75, 76, 77, 78, 79)
#define SMOE_NAMES_176 SMOE_NAMES_160 "," SMOE_NAME_8(80, 81, 82, 83, 84, 85, 86, 87)
#define SMOE_NAMES_192 SMOE_NAMES_176 "," SMOE_NAME_8(88, 89, 90, 91, 92, 93, 94, 95)
#define SMOE_NAMES_208 SMOE_NAMES_192 "," SMOE_NAME_8(96, 97, 98, 99, 100, 101, 102, 103)
#define SMOE_NAMES_224 SMOE_NAMES_208 "," SMOE_NAME_8(104, 105, 106, 107, 108, 109, 110, 111)
#define SMOE_NAMES_240 SMOE_NAMES_224 "," SMOE_NAME_8(112, 113, 114, 115, 116, 117, 118, 119)
#define SMOE_NAMES_256 SMOE_NAMES_240 "," SMOE_NAME_8(120, 121, 122, 123, 124, 125, 126, 127)
#define SMOE_BIND_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SMOE_BIND_16 SMOE_BIND_4(0), SMOE_BIND_4(4)
#define SMOE_BIND_32 SMOE_BIND_16, SMOE_BIND_4(8), SMOE_BIND_4(12)
#define SMOE_BIND_48 SMOE_BIND_32, SMOE_BIND_4(16), SMOE_BIND_4(20)
#define SMOE_BIND_64 SMOE_BIND_48, SMOE_BIND_4(24), SMOE_BIND_4(28)
#define SMOE_BIND_80 SMOE_BIND_64, SMOE_BIND_4(32), SMOE_BIND_4(36)
#define SMOE_BIND_96 SMOE_BIND_80, SMOE_BIND_4(40), SMOE_BIND_4(44)
#define SMOE_BIND_112 SMOE_BIND_96, SMOE_BIND_4(48), SMOE_BIND_4(52)
#define SMOE_BIND_128 SMOE_BIND_112, SMOE_BIND_4(56), SMOE_BIND_4(60)
#define SMOE_BIND_144 SMOE_BIND_128, SMOE_BIND_4(64), SMOE_BIND_4(68)
#define SMOE_BIND_160 SMOE_BIND_144, SMOE_BIND_4(72), SMOE_BIND_4(76)
#define SMOE_BIND_176 SMOE_BIND_160, SMOE_BIND_4(80), SMOE_BIND_4(84)
#define SMOE_BIND_192 SMOE_BIND_176, SMOE_BIND_4(88), SMOE_BIND_4(92)
#define SMOE_BIND_208 SMOE_BIND_192, SMOE_BIND_4(96), SMOE_BIND_4(100)
#define SMOE_BIND_224 SMOE_BIND_208, SMOE_BIND_4(104), SMOE_BIND_4(108)
#define SMOE_BIND_240 SMOE_BIND_224, SMOE_BIND_4(112), SMOE_BIND_4(116)
#define SMOE_BIND_256 SMOE_BIND_240, SMOE_BIND_4(120), SMOE_BIND_4(124)

// The numbers are those of the operands after d: N / 2 and on.
#define SMOE_PRODUCT(T, NAME, N, A0, A1, A2, A3, B, ADD, ORDER)                                                        \
  template <bool TRANSPOSED>                                                                                           \
  struct MatrixProduct<T, N, TRANSPOSED> {                                                                             \
    template <int LENGTH>                                                                                              \
    static __device__ __forceinline__ void run(float (&d)[LENGTH], const uint32_t (&a)[4], uint64_t b, bool add) {     \
      static_assert(LENGTH >= N / 2, "a thread holds N / 2 numbers of d");                                             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME\
                   "." NAME " {" SMOE_NAMES_##N "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1, %" #ORDER \
                   ";\n}\n"                                                                                            \
                   : SMOE_BIND_##N                                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"(TRANSPOSED ? 1 : 0));      \
    }                                                                                                                  \
  };
#define SMOE_PRODUCTS(N, A0, A1, A2, A3, B, ADD, ORDER)                                                                \
  SMOE_PRODUCT(__nv_bfloat16, "bf16", N, A0, A1, A2, A3, B, ADD, ORDER)                                                \
  SMOE_PRODUCT(__half, "f16", N, A0, A1, A2, A3, B, ADD, ORDER)
SMOE_PRODUCTS(16, 8, 9, 10, 11, 12, 13, 14)
SMOE_PRODUCTS(32, 16, 17, 18, 19, 20, 21, 22)
SMOE_PRODUCTS(48, 24, 25, 26, 27, 28, 29, 30)
SMOE_PRODUCTS(64, 32, 33, 34, 35, 36, 37, 38)
SMOE_PRODUCTS(80, 40, 41, 42, 43, 44, 45, 46)
SMOE_PRODUCTS(96, 48, 49, 50, 51, 52, 53, 54)
SMOE_PRODUCTS(112, 56, 57, 58, 59, 60, 61, 62)
SMOE_PRODUCTS(128, 64, 65, 66, 67, 68, 69, 70)
SMOE_PRODUCTS(144, 72, 73, 74, 75, 76, 77, 78)
SMOE_PRODUCTS(160, 80, 81, 82, 83, 84, 85, 86)
SMOE_PRODUCTS(176, 88, 89, 90, 91, 92, 93, 94)
SMOE_PRODUCTS(192, 96, 97, 98, 99, 100, 101, 102)
SMOE_PRODUCTS(208, 104, 105, 106, 107, 108, 109, 110)
SMOE_PRODUCTS(224, 112, 113, 114, 115, 116, 117, 118)
SMOE_PRODUCTS(240, 120, 121, 122, 123, 124, 125, 126)
SMOE_PRODUCTS(256, 128, 129, 130, 131, 132, 133, 134)
#undef SMOE_PRODUCTS
#undef SMOE_PRODUCT

}  // namespace smoe
