#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <functional>
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
};

void work(Job& job, int worker) {
  const auto workers = static_cast<int>(job.shares.size());
  for (int i = 0; i < workers; i++) {
    Share& share = job.shares[(worker + i) % workers];
    for (int64_t task; (task = share.next++) < share.end;) job.run(job.data, task, worker);
  }
}

// torch has loaded an OpenMP already. A second one, linked here, would bring a second pool of threads, and the two would
// spin against each other; so take torch's, by names that libgomp and LLVM's libomp share.
struct OpenMP {
  using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
  using ThreadNumber = int (*)();

  Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  ThreadNumber thread_number = reinterpret_cast<ThreadNumber>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));

  explicit operator bool() const { return parallel && thread_number; }
};

const OpenMP& openmp() {
  static const OpenMP found;
  return found;
}

}  // namespace

void parallel(int64_t tasks, int threads, void (*run)(void*, int64_t, int), void* data) {
  threads = static_cast<int>(std::clamp<int64_t>(tasks, 1, threads));
  Job job{run, data, std::vector<Share>(threads)};
  for (int i = 0; i < threads; i++) job.shares[i].next = tasks * i / threads, job.shares[i].end = tasks * (i + 1) / threads;
  if (threads <= 1) return work(job, 0);
  // A worker is a thread of OpenMP's pool by its number, so that a thread always begins with the same part of a weight:
  // with several memory nodes, the part that it has moved into memory (`dami.use_huge_pages`) lies on its own.
  if (openmp())
    return openmp().parallel(
        [](void* job) { work(*static_cast<Job*>(job), openmp().thread_number()); }, &job, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back(work, std::ref(job), i);
  work(job, 0);
  for (std::thread& other : others) other.join();
}

}  // namespace dami
