#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace dami {
namespace {

struct Job {
  void (*run)(void*, int64_t, int);
  void* data;
  int64_t tasks;
  std::atomic<int64_t> next_task{0};
  std::atomic<int> next_worker{0};
};

void work(void* pointer) {
  Job& job = *static_cast<Job*>(pointer);
  const int worker = job.next_worker++;
  for (int64_t task; (task = job.next_task++) < job.tasks;) job.run(job.data, task, worker);
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

}  // namespace

void parallel(int64_t tasks, int threads, void (*run)(void*, int64_t, int), void* data) {
  Job job{run, data, tasks};
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  if (threads <= 1) return work(&job);
  // torch has loaded an OpenMP already. A second one, linked here, would bring a second pool of threads, and the two would
  // spin against each other; so take torch's, by the entry point that libgomp and LLVM's libomp share.
  static const auto gomp = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (gomp) return gomp(work, &job, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back(work, &job);
  work(&job);
  for (std::thread& other : others) other.join();
}

}  // namespace dami
