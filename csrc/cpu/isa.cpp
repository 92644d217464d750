#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "api.h"

namespace dami {

extern const Isa scalar;
#if defined(__x86_64__)
extern const Isa avx2, avx512, avx512_bf16, amx;
#elif defined(__aarch64__)
extern const Isa neon;
#endif

namespace {

const std::vector<const Isa*> known = {  // best last
    &scalar,
#if defined(__x86_64__)
    &avx2,   &avx512, &avx512_bf16, &amx,
#elif defined(__aarch64__)
    &neon,
#endif
};

const Isa& find(const std::string& name, const char* what) {
  std::string names;
  for (const Isa* candidate : known) {
    if (!candidate->supported()) continue;
    if (candidate->name == name) return *candidate;
    names += (names.empty() ? "" : ", ") + std::string(candidate->name);
  }
  throw std::invalid_argument(std::string(what) + " must be one of " + names + " on this machine, got '" + name + "'");
}

const Isa& initial() {
  if (const char* name = std::getenv("DAMI_CPU_ISA"); name && *name) return find(name, "DAMI_CPU_ISA");
  return find(supported_isas().back(), "isa");
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{&initial()};
  return isa;
}

}  // namespace

const Isa& isa() { return *current(); }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa* candidate : known)
    if (candidate->supported()) names.push_back(candidate->name);
  return names;
}

void use_isa(const std::string& name) { current() = &find(name, "isa"); }

}  // namespace dami
