// Runs tasks on torch's own threads.
#pragma once

#include <cstdint>

namespace dami {

void parallel(int64_t tasks, int threads, void (*run)(void* data, int64_t task, int worker), void* data);

// Calls body(task, worker) once for every task in [0, tasks), worker in [0, threads). Tasks are handed out one at a time, so
// that a thread the system slows down takes fewer; what is computed must not depend on which worker does it.
template <class Body>
void parallel_for(int64_t tasks, int threads, Body body) {
  parallel(
      tasks, threads, [](void* data, int64_t task, int worker) { (*static_cast<Body*>(data))(task, worker); }, &body);
}

}  // namespace dami
