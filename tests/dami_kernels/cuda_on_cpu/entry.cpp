// What Python calls by ctypes.
#include "../../../csrc/cuda/api.h"

extern "C" int decode(int type, const dami::cuda::Linear* linear, int warps, bool copies_are_late) {
  on_cpu::copies_are_late = copies_are_late;
  return dami::cuda::decode(static_cast<dami::cuda::Type>(type), *linear, warps, nullptr);
}
extern "C" int shared_per_warp(int base, int other) {
  return dami::cuda::shared_per_warp(static_cast<dami::cuda::Storage>(base), static_cast<dami::cuda::Storage>(other));
}
