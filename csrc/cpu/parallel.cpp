#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace dami {
namespace {

// Of the tasks [next, end), the first that nobody has taken.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

struct Job {
  void (*run)(void*, int64_t, int);
  void* data;
  std::vector<Share> shares;  // one for each worker
  std::atomic<int> next_worker{0};
};

void work(void* pointer) {
  Job& job = *static_cast<Job*>(pointer);
  const auto workers = static_cast<int>(job.shares.size()), worker = job.next_worker++;
  for (int i = 0; i < workers; i++) {
    Share& share = job.shares[(worker + i) % workers];
    for (int64_t task; (task = share.next++) < share.end;) job.run(job.data, task, worker);
  }
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

}  // namespace

void parallel(int64_t tasks, int threads, void (*run)(void*, int64_t, int), void* data) {
  threads = static_cast<int>(std::clamp<int64_t>(tasks, 1, threads));
  Job job{run, data, std::vector<Share>(threads)};
  for (int i = 0; i < threads; i++) job.shares[i].next = tasks * i / threads, job.shares[i].end = tasks * (i + 1) / threads;
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
