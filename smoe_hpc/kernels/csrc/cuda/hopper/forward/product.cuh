// The forward kernel's product: d [64, width] += a [64, 32] b [32, width] for any width that is a multiple of 16.
//
// One block of assembly holds all widths and jumps to the one wanted, so that d stays in the same registers whatever the
// width: written as a switch around templates, the compiler gives every width registers of its own, runs out of them and
// makes the products wait for one another. Fence and commit have to be inside for the same reason.
#pragma once
#include <type_traits>
#include "hopper/wgmma.cuh"

namespace smoe::forward {

#define SMOE_JUMP(I, N) "setp.eq.s32 p, %137, " #I ";\n@p bra W" #N ";\n"
#define SMOE_STEP(NAME, N, A0, A1, A2, A3, OFFSET)                                                                     \
  "add.s64 q, %136, " #OFFSET ";\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" SMOE_NAMES_##N   \
  "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, q, 1, 1, 1, 0;\n"
#define SMOE_CASE(NAME, N)                                                                                             \
  "W" #N ":\nwgmma.fence.sync.aligned;\n" SMOE_STEP(NAME, N, 128, 129, 130, 131, 0)                                    \
  SMOE_STEP(NAME, N, 132, 133, 134, 135, 2) "wgmma.commit_group.sync.aligned;\nbra DONE;\n"
#define SMOE_HALF(NAME)                                                                                                \
  asm volatile(                                                                                                        \
      "{\n.reg .pred p;\n.reg .b64 q;\n" SMOE_JUMP(1, 16) SMOE_JUMP(2, 32) SMOE_JUMP(3, 48) SMOE_JUMP(4, 64)           \
      SMOE_JUMP(5, 80) SMOE_JUMP(6, 96) SMOE_JUMP(7, 112) SMOE_JUMP(8, 128) SMOE_JUMP(9, 144) SMOE_JUMP(10, 160)       \
      SMOE_JUMP(11, 176) SMOE_JUMP(12, 192) SMOE_JUMP(13, 208) SMOE_JUMP(14, 224) SMOE_JUMP(15, 240) SMOE_JUMP(16, 256)\
      SMOE_CASE(NAME, 16) SMOE_CASE(NAME, 32) SMOE_CASE(NAME, 48) SMOE_CASE(NAME, 64) SMOE_CASE(NAME, 80)              \
      SMOE_CASE(NAME, 96) SMOE_CASE(NAME, 112) SMOE_CASE(NAME, 128) SMOE_CASE(NAME, 144) SMOE_CASE(NAME, 160)          \
      SMOE_CASE(NAME, 176) SMOE_CASE(NAME, 192) SMOE_CASE(NAME, 208) SMOE_CASE(NAME, 224) SMOE_CASE(NAME, 240)         \
      SMOE_CASE(NAME, 256) "DONE:\n}\n"                                                                                \
      : SMOE_BIND_256                                                                                                  \
      : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]), "r"(a[1][0]), "r"(a[1][1]), "r"(a[1][2]),              \
        "r"(a[1][3]), "l"(b), "r"(width / 16))

// Starts the products of 32 channels; b: descriptor of [width][64 channels], from these on. Complete after matrix_wait.
template <typename T>
__device__ __forceinline__ void multiply_half(float (&d)[128], const uint32_t (&a)[2][4], uint64_t b, int width) {
  if constexpr (std::is_same_v<T, __half>)
    SMOE_HALF("f16");
  else
    SMOE_HALF("bf16");
}

#undef SMOE_JUMP
#undef SMOE_STEP
#undef SMOE_CASE
#undef SMOE_HALF

}  // namespace smoe::forward
