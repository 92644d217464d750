// What Python calls by ctypes.
#include "../../../csrc/cuda/api.h"

extern "C" int decode(int type, int format, const dami::cuda::Linear* linear, int warps, bool copies_are_late) {
  on_cpu::copies_are_late = copies_are_late;
  return dami::cuda::decode(static_cast<dami::cuda::Type>(type), static_cast<dami::cuda::Format>(format), *linear, warps,
                            nullptr);
}
extern "C" int shared_per_warp(int format) {
  return dami::cuda::shared_per_warp(static_cast<dami::cuda::Format>(format));
}
